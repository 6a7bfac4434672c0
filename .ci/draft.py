"""Notebooks as text, for writing many cells at once.

    .venv/bin/python .ci/draft.py text nbs/05_toy.ipynb > toy.txt     a notebook as text: cells between %%md and %%code lines
    .venv/bin/python .ci/draft.py build toy.txt nbs/05_toy.ipynb      text to notebook, executed, cleaned (outputs are what the cells gave)
    ... build --slow toy.txt ...     also run cells marked `#| slow`; else their stored outputs stay while their source is unchanged
    ... build --no-exec ...          write the cells only; stored outputs of unchanged cells stay
    .venv/bin/python .ci/draft.py run nbs/05_toy.ipynb [--slow]       execute again in place
"""
import argparse, hashlib, json, os, re, sys, warnings
from pathlib import Path
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

SKIP = re.compile(r"^#\|\s*(eval:\s*false|slow|hw)\b", re.M)
TEMPORARY = re.compile("/tmp" r"/tmp\w+")
META = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}

def parse(text: str) -> list[tuple[str, str]]: # [(kind, source)]
    cells, kind, lines = [], None, []
    for line in text.split("\n"):
        if line.rstrip() in ("%%md", "%%code"):
            if kind: cells.append((kind, "\n".join(lines).strip("\n")))
            kind, lines = line.strip()[2:], []
        elif kind: lines.append(line)
        elif line.strip(): sys.exit(f"error: text before the first %%md or %%code: {line!r}")
    if kind: cells.append((kind, "\n".join(lines).strip("\n")))
    return [c for c in cells if c[1]]

def assemble(cells, name: str, old=None): # notebook with ids that follow from the content; outputs of unchanged cells are kept
    cells_before = list(old.cells) if old else []
    kept = {c.source: c.get("outputs", []) for c in cells_before if c.cell_type == "code"}
    ids = {}                                      # ids of cells with the same source, in order: an unchanged cell keeps its own
    for c in cells_before: ids.setdefault((c.cell_type, c.source), []).append(c.id)
    nb, seen = new_notebook(metadata=META), {}
    for kind, src in cells:
        key = name+kind+src; n = seen[key] = seen.get(key, -1)+1
        before = ids.get(("markdown" if kind == "md" else "code", src))
        id = before.pop(0) if before else hashlib.sha1((key+(str(n) if n else "")).encode()).hexdigest()[:8]
        nb.cells.append(new_markdown_cell(src, id=id) if kind == "md" else new_code_cell(src, id=id, outputs=kept.get(src, [])))
    return nb

def execute(nb, folder: Path, slow: bool, timeout: int): # in place; the first error stops it
    from nbclient import NotebookClient
    os.environ.setdefault("CLAM_QUIET", "1")
    skip = re.compile(r"^#\|\s*(eval:\s*false|hw)\b", re.M) if slow else SKIP
    client = NotebookClient(nb, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    with client.setup_kernel():
        for i, c in enumerate(nb.cells):
            if c.cell_type != "code" or skip.search(c.source): continue
            try: client.execute_cell(c, i)
            except Exception as e: sys.exit(f"error in cell {i}:\n{c.source}\n{'-'*60}\n{e}")

def clean(nb): # what a commit needs: no counts, no widget state, no temporary paths
    from nbdev.clean import clean_nb
    from execnb.nbio import dict2nb
    for c in nb.cells:
        if c.cell_type != "code": continue
        c["execution_count"] = None
        c["metadata"] = {k: v for k, v in c.metadata.items() if k != "execution"}
        for o in c.outputs:
            if "execution_count" in o: o["execution_count"] = None
            if "text" in o: o["text"] = TEMPORARY.sub("…", o["text"])
            if "data" in o and "text/plain" in o.data: o.data["text/plain"] = TEMPORARY.sub("…", "".join(o.data["text/plain"]))
    nb.metadata.pop("widgets", None)
    d = dict2nb(nb); clean_nb(d)
    return d

def write(nb, path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        d = json.loads(json.dumps(clean(nb)))
        for c in d["cells"]: c.pop("idx_", None)
        path.write_text(nbformat.writes(nbformat.from_dict(d), indent=1).rstrip("\n")+"\n")

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("verb", choices=("text", "build", "run")); p.add_argument("files", nargs="+", type=Path)
    p.add_argument("--slow", action="store_true"); p.add_argument("--no-exec", action="store_true"); p.add_argument("--timeout", type=int, default=600)
    a = p.parse_args()
    if a.verb == "text":
        nb = nbformat.read(a.files[0], 4)
        print("\n\n".join(f"%%{'md' if c.cell_type == 'markdown' else 'code'}\n{c.source}" for c in nb.cells)); return
    target = a.files[-1]
    if a.verb == "run": nb = nbformat.read(target, 4)
    else: nb = assemble(parse(a.files[0].read_text()), target.name, nbformat.read(target, 4) if target.exists() else None)
    if not a.no_exec: execute(nb, target.parent, a.slow, a.timeout)
    write(nb, target); print("wrote", target)

if __name__ == "__main__": main()
