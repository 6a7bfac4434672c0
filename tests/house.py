"""The rules of the house as functions that return a list of problems. `python tests/house.py` prints them all; test_house.py runs
each one on the project and on a small planted fault."""
import ast, builtins, dis, json, re, subprocess, sys, tomllib, types
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GROUND = {"core", "testing", "config"}
# first number, last number, rooms it may import beside itself and core/testing/config
ROOMS = {
    "core": (0, 4, set()), "testing": (0, 4, set()), "config": (0, 4, set()), "toy": (5, 5, set()),
    "data": (10, 19, set()), "envs": (20, 29, {"toy"}), "collect": (30, 34, {"toy", "data", "envs"}), "models": (35, 49, set()),
    "train": (50, 59, {"data", "models"}), "evaluate": (60, 69, {"data", "envs", "models", "train"}),
    "robot": (70, 79, {"envs.base", "envs.rendering", "data"}),
    "widgets": (80, 89, {"toy", "data", "envs", "collect", "models", "train", "evaluate", "robot"}),
    "cli": (90, 90, {"toy", "data", "envs", "collect", "models", "train", "evaluate", "robot", "widgets"}), "__main__": (90, 90, {"cli"}),
}
SIMULATORS = {"mujoco", "metaworld", "gymnasium", "dm_control"}
VIEWS = {"plotly", "ipywidgets", "anywidget", "mediapy", "umap"}
NEVER = {"nbdev", "fastcore", "execnb", "ghapi", "pytest", "nbformat", "nbclient"}
ONLY = {**{m: {"widgets"} for m in VIEWS}, **{m: {"envs", "collect", "robot"} for m in SIMULATORS}}   # these packages, only in these rooms
LIGHT = {"numpy", "tqdm"}                         # all that core, testing, config and toy may import from outside
DISTRIBUTION = {"sklearn": "scikit-learn", "zmq": "pyzmq", "umap": "umap-learn", "imageio_ffmpeg": "imageio-ffmpeg", "PIL": "pillow", "serial": "pyserial"} # where import and package differ
SHARED = {19, 89, 90}                                 # numbers that several notebooks may have
MAX_CELL, MAX_EXPORTED, MAX_KB, MAX_STORY_KB = 60, 350, 200, 400 # a story (91-99) stores more pictures

# ---------------------------------------------------------------- notebooks
@dataclass
class Notebook:
    name: str   # file name
    raw: dict   # its JSON
    size: int   # bytes
    @property
    def code(self): return ["".join(c["source"]) for c in self.raw["cells"] if c["cell_type"] == "code"]
    @property
    def exported(self): return [s for s in self.code if re.search(r"^#\|\s*export", s, re.M)]
    @property
    def default_exp(self):
        found = [m.group(1) for s in self.code if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", s, re.M))]
        return found[0] if found else None
    @property
    def number(self): return int(self.name[:2]) if self.name[:2].isdigit() else None

def notebooks(root=ROOT) -> list[Notebook]:
    return [Notebook(p.name, json.loads(p.read_text()), p.stat().st_size) for p in sorted((Path(root)/"nbs").glob("[!_.]*.ipynb"))]

def _directives(src): return [l for l in src.split("\n") if l.startswith("#|")]
def _lines(src): return [l for l in src.split("\n") if l.strip() and not l.startswith("#|")]

def check_names(nbs) -> list[str]:
    "`NN_room.module.ipynb` exports `room.module`, once, with a number of its room."
    out, seen, numbers = [], {}, {}
    for nb in nbs:
        exp = nb.default_exp
        if exp is None:
            if nb.exported: out.append(f"{nb.name}: exports without a default_exp")
            if nb.number is not None and nb.number < 91: out.append(f"{nb.name}: only 91-99 and index may export nothing")
            continue
        if exp in seen: out.append(f"{nb.name}: default_exp {exp} is also that of {seen[exp]}; the later one would overwrite the earlier")
        seen[exp] = nb.name
        if nb.number is None or nb.number > 90: out.append(f"{nb.name}: must not export; give it a number below 91"); continue
        if nb.name != f"{nb.number:02d}_{exp.strip('_')}.ipynb": out.append(f"{nb.name}: should be {nb.number:02d}_{exp.strip('_')}.ipynb, or default_exp be changed")
        if nb.number in numbers and nb.number not in SHARED: out.append(f"{nb.name}: number {nb.number} is taken by {numbers[nb.number]}")
        numbers[nb.number] = nb.name
        room = exp.split(".")[0]
        if room not in ROOMS: out.append(f"{nb.name}: no room is called {room}")
        elif not ROOMS[room][0] <= nb.number <= ROOMS[room][1]: out.append(f"{nb.name}: room {room} has numbers {ROOMS[room][0]}-{ROOMS[room][1]}")
    return out

def check_cells(nb) -> list[str]:
    "Pure import cells, short export cells, no saved widget state, sources as lists of lines, the export call last."
    out = []
    def say(i, text): out.append(f"{nb.name}, cell {i}: {text}")
    budget = MAX_STORY_KB if nb.name >= "91" and nb.name[:2].isdigit() else MAX_KB
    if nb.size > budget*1024: out.append(f"{nb.name}: {nb.size//1024} KB, the budget is {budget}")
    if "widgets" in nb.raw.get("metadata", {}): out.append(f"{nb.name}: holds saved widget state; switch that off and clean it")
    exported = sum(len(_lines(s)) for s in nb.exported)
    if exported > MAX_EXPORTED: out.append(f"{nb.name}: {exported} exported lines, the budget is {MAX_EXPORTED}")
    for i, c in enumerate(nb.raw["cells"]):
        if not isinstance(c["source"], list): say(i, "source must be a list of lines (write notebooks with nbformat)"); continue
        if c["cell_type"] != "code": continue
        src = "".join(c["source"])
        for o in c.get("outputs", []):
            if o["output_type"] == "error": say(i, f"stores an error: {o.get('ename')}")
            if "application/vnd.jupyter.widget-view+json" in o.get("data", {}): say(i, "stores a live widget; show its static form")
        if re.search(r"(?<![\w.])input\(", src): say(i, "input() cannot be answered when notebooks are tested")
        if "nbdev_export(" in src or src.startswith("%"): continue
        is_export = bool(re.search(r"^#\|\s*export", src, re.M))
        if is_export and len(_lines(src)) > MAX_CELL: say(i, f"export cell of {len(_lines(src))} lines, the budget is {MAX_CELL}")
        if re.search(r"^#\|\s*eval:\s*false", src, re.M): continue
        try: tree = ast.parse(src)
        except SyntaxError: continue          # magics and top-level await
        imports = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
        if imports and len(imports) != len(tree.body): say(i, "mixes imports with other code; the site's build runs such cells alone")
        if any(isinstance(n, ast.ImportFrom) and n.names[0].name == "*" for n in imports): say(i, "imports *")
    last = "".join(nb.raw["cells"][-1]["source"]) if nb.raw["cells"] else ""
    if nb.default_exp and not ("nbdev_export()" in last and re.search(r"^#\|\s*hide", last, re.M)): out.append(f"{nb.name}: the last cell must be the hidden nbdev_export()")
    return out

# ---------------------------------------------------------------- the law
def order(nbs) -> dict[str, str]: # module -> file name; file names sort in reading order
    return {nb.default_exp: nb.name for nb in nbs if nb.default_exp}

def _imports(source: str, module: str): # (what is imported, at module level?) with relative imports made absolute
    package = ["clam", *module.split(".")][:-1]
    tree = ast.parse(source); top = set(map(id, tree.body))
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            for a in n.names: yield a.name, id(n) in top
        elif isinstance(n, ast.ImportFrom):
            base = ".".join(package[:len(package)-n.level+1] + ([n.module] if n.module else [])) if n.level else n.module
            if base == "clam" or base in {f"clam.{r}" for r in ROOMS}: # `from clam.data import store` names modules
                for a in n.names: yield f"{base}.{a.name}", id(n) in top
            else: yield base, id(n) in top

def check_imports(sources: dict[str, str], names: dict[str, str]) -> list[str]:
    "`sources`: module -> text. Only lower-numbered notebooks, only the rooms of the table, and packages only where they belong."
    out = []
    for mod, text in sources.items():
        if mod not in names: out.append(f"clam/{mod.replace('.', '/')}.py: no notebook exports it"); continue
        room = mod.split(".")[0]
        allowed = GROUND | {room} | ROOMS.get(room, (0, 0, set()))[2]
        if room in GROUND: allowed = GROUND
        if room == "__main__": allowed = {"cli"}
        for what, top in _imports(text, mod):
            first, *rest = what.split(".")
            if first == "clam":
                target = next((m for n in (2, 1) if (m := ".".join(rest[:n])) in names), None)
                if target is None:
                    if rest and rest[0] not in ("__version__",): out.append(f"{names[mod]}: imports {what}, which no notebook exports")
                elif target.split(".")[0] not in allowed and target not in allowed: out.append(f"{names[mod]}: room {room} must not import {target}")
                elif names[target] >= names[mod]: out.append(f"{names[mod]}: imports {target} of {names[target]}, which comes later")
            elif first in sys.stdlib_module_names: continue
            elif first in NEVER: out.append(f"{names[mod]}: the library must not import {first}")
            elif room in GROUND | {"toy"} and first not in LIGHT: out.append(f"{names[mod]}: {room} may only import {', '.join(sorted(LIGHT))}, not {first}")
            elif first in ONLY and room not in ONLY[first]: out.append(f"{names[mod]}: {first} belongs to {', '.join(sorted(ONLY[first]))}")
            elif first == "umap" and top: out.append(f"{names[mod]}: import umap inside the function that needs it; it takes a minute the first time")
    return out

def modules(root=ROOT) -> dict[str, str]: # exported module -> text
    lib = Path(root)/"clam"
    return {".".join(p.relative_to(lib).with_suffix("").parts): p.read_text() for p in sorted(lib.rglob("*.py")) if p.name not in ("__init__.py", "_modidx.py")}

def check_dependencies(sources, pyproject: str, constraints: str) -> list[str]:
    "What the library imports is declared (in an extra, other than dev, only when imported inside functions), and what is declared is pinned."
    project = tomllib.loads(pyproject)["project"]; norm = lambda s: re.sub(r"[-_.]+", "-", s).lower()
    name = lambda req: norm(re.match(r"[\w.-]+", req).group())
    declared = {name(r) for r in project["dependencies"]}
    pinned = {norm(l.split("==")[0]) for l in constraints.split("\n") if "==" in l and not l.startswith("#")}
    found = [(w.split(".")[0], top) for m, t in sources.items() for w, top in _imports(t, m)]
    lazily = {name(r) for extra, rs in project["optional-dependencies"].items() if extra != "dev" for r in rs}
    missing = {m for m, top in found if m not in {*sys.stdlib_module_names, "clam"} and norm(DISTRIBUTION.get(m, m)) not in (declared if top else declared | lazily)}
    out = [f"pyproject.toml: {m} is imported but not declared" for m in sorted(missing)]
    wanted = declared | {name(r) for r in sum(project["optional-dependencies"].values(), [])}
    return out + [f"constraints.txt: {d} is declared but not pinned" for d in sorted(wanted - pinned)]

def check_defined(sources: dict[str, str], names: dict[str, str]) -> list[str]:
    "Every global that a module uses is defined in it: a notebook has names that its module lacks, those of cells that are not exported."
    out, given = [], set(dir(builtins)) | {"__file__", "__name__", "__doc__", "__spec__", "__builtins__", "__annotations__", "__path__"}
    for mod, text in sources.items():
        todo, used, defined = [compile(text, mod, "exec")], {}, set()
        while todo:
            code = todo.pop(); todo += [c for c in code.co_consts if isinstance(c, types.CodeType)]
            for i in dis.get_instructions(code):
                if i.opname == "LOAD_GLOBAL": used.setdefault(i.argval, code.co_name)
                elif i.opname == "LOAD_NAME" and code.co_name == "<module>": used.setdefault(i.argval, code.co_name)
                elif i.opname == "STORE_GLOBAL" or i.opname == "STORE_NAME" and code.co_name == "<module>": defined.add(i.argval)
        out += [f"{names.get(mod, mod)}: {n}, used in {where}, is defined in no exported cell" for n, where in used.items() if n not in defined | given]
    return out

# ---------------------------------------------------------------- files
MACHINE_PATH = re.compile(r"(?<![\w.:/~-])/(?:root|home|work|Users|private|tmp)/\w[\w./-]*")
LEFTOVER = re.compile(r"^(<{7} |>{7} )|\b(breakpoint|set_trace)\(\)", re.M)
def check_text(name: str, text: str) -> list[str]:
    "No path of one machine, no merge conflict, no debugger."
    return [f"{name}: {m.group().strip()} {why}" for pattern, why in ((MACHINE_PATH, "is a path of one machine"), (LEFTOVER, "was left behind")) for m in list(pattern.finditer(text))[:3]]

def committed(root=ROOT): # files that git has or would add
    out = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True).stdout
    return [p for n in sorted(set(out.split("\0")) - {""}) if (p := Path(root)/n).is_file()]

def check_files(root=ROOT) -> list[str]:
    "Text without leftovers, no file over 500 KB."
    out = []
    for p in committed(root):
        name = str(p.relative_to(root))
        if p.stat().st_size > 500*1024: out.append(f"{name}: {p.stat().st_size//1024} KB; bulk data does not belong in git")
        try: out += check_text(name, p.read_text())
        except UnicodeDecodeError: continue
    return out

def check_generated(root=ROOT) -> list[str]:
    "README.md and the sidebar follow the notebooks."
    sys.path.insert(0, str(ROOT/".ci"))
    try: import generated
    finally: sys.path.pop(0)
    return [f"{n}: not what the notebooks give; run make readme" for n, text in generated.expected(root).items() if not (Path(root)/n).exists() or (Path(root)/n).read_text() != text]

def check_version(root=ROOT) -> list[str]:
    "settings.ini, the package and the changelog name one version."
    version = re.search(r"^version\s*=\s*(\S+)", (root/"settings.ini").read_text(), re.M).group(1)
    out = []
    if f'__version__ = "{version}"' not in (root/"clam/__init__.py").read_text(): out.append(f"clam/__init__.py: not version {version}")
    if not re.search(rf"^## \d{{4}}-\d\d-\d\d: {re.escape(version)}$", (root/"CHANGELOG.md").read_text(), re.M): out.append(f"CHANGELOG.md: no dated heading for {version}")
    return out

def everything(root=ROOT) -> list[str]:
    nbs, sources = notebooks(root), modules(root)
    out = check_names(nbs) + check_imports(sources, order(nbs)) + check_defined(sources, order(nbs)) + check_dependencies(sources, (root/"pyproject.toml").read_text(), (root/"constraints.txt").read_text())
    for nb in nbs: out += check_cells(nb)
    return out + check_files(root) + check_generated(root) + check_version(root)

if __name__ == "__main__":
    problems = everything()
    print("\n".join(problems) or "the house is in order")
    raise SystemExit(bool(problems))
