"""Pins the rules of the house: the law of imports, one notebook per module, fresh exports, clean notebooks, light imports. Every
checker of house.py is run on the project and on a planted fault that it must find."""
import os, shutil, statistics, subprocess, sys
from pathlib import Path
import pytest
import house
from house import Notebook, ROOT

NBS, SOURCES = house.notebooks(), house.modules()
NAMES = house.order(NBS)

def nb(name="10_data.store.ipynb", cells=None, exp="data.store", size=1000, meta=None):
    cells = cells if cells is not None else [f"#| default_exp {exp}", "#| export\nx = 1", "#| hide\nimport nbdev; nbdev.nbdev_export()"]
    raw = {"metadata": meta or {}, "cells": [{"cell_type": "code", "source": c if not isinstance(c, str) else c.splitlines(True), "outputs": [], "metadata": {}} for c in cells]}
    return Notebook(name, raw, size)
def found(problems, word): assert any(word in p for p in problems), f"{word!r} not among {problems}"
def clean(problems): assert not problems, "\n"+"\n".join(problems)

# ---------------------------------------------------------------- the project
def test_names(): clean(house.check_names(NBS))
def test_law(): clean(house.check_imports(SOURCES, NAMES))
def test_defined(): clean(house.check_defined(SOURCES, NAMES))
def test_dependencies(): clean(house.check_dependencies(SOURCES, (ROOT/"pyproject.toml").read_text(), (ROOT/"constraints.txt").read_text()))
@pytest.mark.parametrize("book", NBS, ids=lambda b: b.name)
def test_cells(book): clean(house.check_cells(book))
def test_files(): clean(house.check_files())
def test_generated(): clean(house.check_generated())
def test_version(): clean(house.check_version())
def test_every_module_has_its_notebook(): assert set(SOURCES) == set(NAMES)

# ---------------------------------------------------------------- planted faults: names
def test_finds_two_notebooks_with_one_module(): found(house.check_names([nb(), nb("11_data.store.ipynb")]), "would overwrite")
def test_finds_a_wrong_file_name(): found(house.check_names([nb("10_data.shop.ipynb")]), "should be 10_data.store.ipynb")
def test_finds_a_number_outside_the_room(): found(house.check_names([nb("35_data.store.ipynb")]), "room data has numbers 10-19")
def test_finds_a_number_taken_twice(): found(house.check_names([nb(), nb("10_data.other.ipynb", exp="data.other")]), "taken by")
def test_finds_a_workbench_notebook_that_exports(): found(house.check_names([nb("91_tour.ipynb", exp="tour")]), "must not export")
def test_finds_an_unknown_room(): found(house.check_names([nb("10_shed.store.ipynb", exp="shed.store")]), "no room is called shed")
def test_finds_an_export_without_module(): found(house.check_names([nb(cells=["#| export\nx = 1"])]), "without a default_exp")

# ---------------------------------------------------------------- planted faults: imports
TREE = {"core": "00_core.ipynb", "testing": "01_testing.ipynb", "toy": "05_toy.ipynb", "data.store": "10_data.store.ipynb", "data.windows": "11_data.windows.ipynb", "envs.base": "20_envs.base.ipynb",
        "models.lam": "38_models.lam.ipynb", "train.loop": "51_train.loop.ipynb", "evaluate.stats": "60_evaluate.stats.ipynb", "robot.arm": "70_robot.arm.ipynb", "widgets.plots": "80_widgets.plots.ipynb",
        "cli": "90_cli.ipynb", "__main__": "90_main.ipynb"}
@pytest.mark.parametrize("module, source, word", [
    ("core", "from .data.store import EpisodeStore", "room core must not import data.store"),              # upward, between rooms
    ("data.store", "from .windows import window_index", "which comes later"),                             # upward, within a room
    ("data.store", "from clam.data import windows", "which comes later"),                                 # the same, spelt otherwise
    ("data.store", "def f():\n    from .windows import window_index", "which comes later"),               # ... or hidden in a function
    ("core", "from .testing import test_eq", "which comes later"),
    ("models.lam", "from ..envs.base import Env", "room models must not import envs.base"),
    ("envs.base", "import clam.data.store", "room envs must not import data.store"),
    ("train.loop", "from ..envs.base import make_env", "room train must not import envs.base"),
    ("evaluate.stats", "from ..widgets.plots import plot", "room evaluate must not import widgets.plots"),
    ("data.store", "from .shop import x", "which no notebook exports"),
    ("core", "import torch", "core may only import"),
    ("toy", "import matplotlib.pyplot as plt", "toy may only import"),
    ("evaluate.stats", "import plotly.graph_objects as go", "plotly belongs to widgets"),
    ("train.loop", "import ipywidgets", "ipywidgets belongs to widgets"),
    ("data.store", "import mujoco", "mujoco belongs to"),
    ("data.store", "from fastcore.basics import patch", "must not import fastcore"),
    ("cli", "import nbdev", "must not import nbdev"),
    ("widgets.plots", "import umap", "inside the function"),
    ("data.attic", "x = 1", "no notebook exports it"),
])
def test_finds_a_forbidden_import(module, source, word): found(house.check_imports({module: source}, TREE), word)

@pytest.mark.parametrize("module, source", [
    ("data.windows", "from .store import EpisodeStore\nfrom ..core import Episode\nimport numpy as np, torch"), ("robot.arm", "from ..envs.base import Env"), ("__main__", "from .cli import main"),
    ("widgets.plots", "from ..train.loop import run_loop\nimport plotly\ndef f(): import umap"), ("cli", "def f():\n    from .widgets.plots import plot"), ("core", "import os, numpy as np")])
def test_allows_what_the_table_allows(module, source): clean(house.check_imports({module: source}, TREE))

@pytest.mark.parametrize("source, ok", [("import os\ndef f(): return os.sep", True), ("def f(): return os.sep", False), ("class A:\n    def g(self): return [h(x) for x in self]", False),
    ("class A:\n    x = 1\n    y = x", True), ("def f():\n    global g\n    g = 1\ndef h(): return g", True), ("y = x", False)])
def test_finds_a_name_that_only_the_notebook_has(source, ok): assert bool(house.check_defined({"core": source}, NAMES)) != ok

def test_finds_undeclared_and_unpinned_packages():
    project = '[project]\nname="x"\ndependencies=["numpy>=2", "scikit-learn"]\n[project.optional-dependencies]\ndev=["pytest"]'
    found(house.check_dependencies({"core": "import scipy"}, project, "numpy==2\nscikit-learn==1\npytest==9"), "scipy is imported but not declared")
    found(house.check_dependencies({"core": "import sklearn"}, project, "numpy==2\npytest==9"), "scikit-learn is declared but not pinned")
    clean(house.check_dependencies({"core": "import sklearn, numpy"}, project, "numpy==2\nscikit-learn==1\npytest==9"))

def test_finds_an_extra_that_is_imported_at_module_level():
    project = '[project]\nname="x"\ndependencies=[]\n[project.optional-dependencies]\nformats=["h5py"]\ndev=["pytest"]'
    clean(house.check_dependencies({"core": "def f():\n    import h5py"}, project, "h5py==3\npytest==9"))
    found(house.check_dependencies({"core": "import h5py"}, project, "h5py==3\npytest==9"), "h5py is imported but not declared")
    found(house.check_dependencies({"core": "def f():\n    import pytest"}, project, "h5py==3\npytest==9"), "pytest is imported but not declared")

# ---------------------------------------------------------------- planted faults: cells and files
END = "#| hide\nimport nbdev; nbdev.nbdev_export()"
@pytest.mark.parametrize("book, word", [
    (nb(cells=["#| default_exp data.store", "#| export\nimport os\nx = 1", END]), "mixes imports"),
    (nb(cells=["#| default_exp data.store", "import os\nos.getcwd()", END]), "mixes imports"),
    (nb(cells=["#| default_exp data.store", "#| export\nfrom clam.core import *", END]), "imports *"),
    (nb(cells=["#| default_exp data.store", "#| export\n"+"x = 1\n"*61, END]), "61 lines"),
    (nb(cells=["#| default_exp data.store", *["#| export\n"+"x = 1\n"*60]*6, END]), "360 exported lines"),
    (nb(cells=["#| default_exp data.store", "name = input('who? ')", END]), "input()"),
    (nb(cells=["#| default_exp data.store", "#| export\nx = 1"]), "last cell"),
    (nb(meta={"widgets": {"state": {}}}), "saved widget state"),
    (nb(size=201*1024), "201 KB"),
])
def test_finds_a_bad_cell(book, word): found(house.check_cells(book), word)

def test_finds_bad_json():
    book = nb(); book.raw["cells"][1]["source"] = "#| export\nx = 1"
    found(house.check_cells(book), "list of lines")
    book = nb(); book.raw["cells"][1]["outputs"] = [{"output_type": "error", "ename": "ValueError"}]
    found(house.check_cells(book), "stores an error: ValueError")
    book.raw["cells"][1]["outputs"] = [{"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": {}}}]
    found(house.check_cells(book), "live widget")
    clean(house.check_cells(nb()))

def test_finds_leftovers():
    found(house.check_text("a.md", "see " + "/" + "home/ana/x.npy"), "path of one machine")
    found(house.check_text("a.py", "<"*7 + " HEAD"), "was left behind")
    found(house.check_text("a.py", "break" + "point()"), "was left behind")
    clean(house.check_text("a.md", "https://example.org/home/x and data/tmp/x and ./work/x"))

@pytest.fixture
def copied(tmp_path): # the notebooks and what follows from them, in a folder of its own
    for n in ("nbs", "clam"): shutil.copytree(ROOT/n, tmp_path/n, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for n in ("settings.ini", "pyproject.toml", "README.md", "CHANGELOG.md"): shutil.copy(ROOT/n, tmp_path/n)
    return tmp_path

def test_finds_a_stale_sidebar_readme_and_version(copied):
    clean(house.check_generated(copied)); clean(house.check_version(copied))
    (copied/"nbs/99_extra.ipynb").write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    (copied/"README.md").write_text((copied/"README.md").read_text()+"more\n")
    (copied/"settings.ini").write_text((copied/"settings.ini").read_text().replace("version = ", "version = 9"))
    found(house.check_generated(copied), "sidebar.yml"); found(house.check_generated(copied), "README.md")
    found(house.check_version(copied), "clam/__init__.py"); found(house.check_version(copied), "CHANGELOG.md")

# ---------------------------------------------------------------- exports
def export_changes(root) -> list[str]: # modules that nbdev_export changes, makes or leaves orphaned
    before = {p.relative_to(root): p.read_bytes() for p in (root/"clam").rglob("*.py")}
    subprocess.run([Path(sys.executable).with_name("nbdev_export")], cwd=root, check=True, capture_output=True)
    after = {p.relative_to(root): p.read_bytes() for p in (root/"clam").rglob("*.py")}
    return [str(p) for p in sorted({*before, *after}) if before.get(p) != after.get(p)]

def test_exports_are_fresh_and_staleness_is_found(copied):
    f = copied/"clam/core.py"; f.write_text(f.read_text()+"\n# edited by hand\n")
    assert export_changes(copied) == ["clam/core.py"]            # this one, and no other

# ---------------------------------------------------------------- imports are light
def in_python(code): return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout

@pytest.mark.parametrize("module, budget_s", [("clam", .5), ("clam.core", 1.), ("clam.config", 1.), ("clam.testing", 1.), ("clam.toy", 1.), ("clam.cli.shell", 1.5)])
def test_imports_are_light(module, budget_s):
    heavy = ["torch", "umap", "plotly", "mujoco", "metaworld", "matplotlib", "sklearn", "ipywidgets", "mediapy"]
    code = f"import time, sys; t = time.perf_counter(); import {module}; print(time.perf_counter()-t, [m for m in {heavy} if m in sys.modules])"
    runs = [in_python(code).split(maxsplit=1) for _ in range(3)]
    assert runs[0][1].strip() == "[]"
    assert statistics.median(float(t) for t, _ in runs) < budget_s*(3 if os.environ.get("CI") else 1)

def test_nbdev_is_the_version_that_works(): # a drifted environment passes pip check and still breaks every nbdev command
    import nbdev, nbdev.export, nbdev.test
    assert nbdev.__version__.startswith("2.4.")
