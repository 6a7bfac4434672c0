"""Pins what the site is built from: nbdev processes notebooks (a sixth of them, all in `make soak`) without an error or a warning (a stand-in for quarto records what
it is asked to render), and the real settings in the root `_quarto.yml` reach the build."""
import os, shutil, subprocess, sys
from pathlib import Path
import pytest, yaml

ROOT = Path(__file__).resolve().parent.parent

@pytest.mark.soak
def test_nbdev_prepares_the_site(tmp_path):
    site = tmp_path/"project"; site.mkdir()
    for n in ("nbs", "clam"): shutil.copytree(ROOT/n, site/n, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    pages = sorted(p for p in (site/"nbs").glob("[!_.]*.ipynb") if p.name != "index.ipynb")
    for i, p in enumerate(pages):
        if i % 6 and not os.environ.get("CLAM_SOAK"): p.unlink()
    for n in ("settings.ini", "pyproject.toml", "_quarto.yml", "README.md"): shutil.copy(ROOT/n, site/n)
    quarto = tmp_path/"bin"/"quarto"; quarto.parent.mkdir()
    quarto.write_text("#!/bin/sh\necho \"$*\" >> \"$QUARTO_LOG\"\nmkdir -p _docs\n"); quarto.chmod(0o755)
    env = os.environ | {"PATH": f"{quarto.parent}:{os.environ['PATH']}", "QUARTO_LOG": str(tmp_path/"log"), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run([Path(sys.executable).with_name("nbdev_docs"), "--n_workers", "2"], cwd=site, env=env, capture_output=True, text=True)
    said = done.stdout+done.stderr
    assert done.returncode == 0, said[-3000:]
    assert "Found cells containing" not in said, said[-3000:]
    assert (tmp_path/"log").read_text().splitlines()[-1] == "render --no-cache"
    assert {p.name for p in (site/"nbs").glob("[!_.]*.ipynb")} == {p.name for p in (site/"_proc").glob("*.ipynb")}
    stub = yaml.safe_load((site/"_proc"/"_quarto.yml").read_text())
    files = [(site/"_proc"/f).resolve() for f in stub["metadata-files"]]
    assert all(f.is_file() for f in files), files                          # quarto says nothing when one is missing
    real = yaml.safe_load(files[0].read_text())
    assert files[0] == site/"_quarto.yml" and "metadata-files" not in real and (site/"_proc"/real["format"]["html"]["css"]).is_file()
