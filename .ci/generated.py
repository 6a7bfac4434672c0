"""Writes what follows from the notebooks: README.md (from nbs/index.ipynb) and nbs/sidebar.yml (rooms in reading order)."""
import json, re, sys
from pathlib import Path

SECTIONS = [("Ground", 0, 5), ("Data", 10, 19), ("Environments", 20, 29), ("Collection", 30, 34), ("Models", 35, 49), ("Training", 50, 59),
            ("Evaluation", 60, 69), ("Robot", 70, 79), ("Widgets", 80, 89), ("Command line", 90, 90), ("Workbench", 91, 99)]

def sidebar(names) -> str: # names of notebooks -> the text of sidebar.yml; the workbench's stories come first, then the library
    names = sorted(names)
    lines = ["# Written by `make readme`; a test compares it with the notebooks present.", "website:", "  sidebar:", "    contents:"]
    lines += [f"      - {n}" for n in names if not n[:2].isdigit()]
    for title, lo, hi in SECTIONS[-1:] + SECTIONS[:-1]:
        here = [n for n in names if n[:2].isdigit() and lo <= int(n[:2]) <= hi]
        if here: lines += [f"      - section: {title}", "        contents:", *(f"          - {n}" for n in here)]
    return "\n".join(lines)+"\n"

def _output(o) -> str: # one stored output as markdown
    if o["output_type"] == "stream": text = "".join(o["text"])
    else:
        data = o.get("data", {})
        if "text/markdown" in data: return "".join(data["text/markdown"]).strip()+"\n"
        if any(k.startswith("image/") for k in data): raise SystemExit("index.ipynb stores a picture as output; save it under nbs/images and show it from a markdown cell")
        text = "".join(data.get("text/plain", ""))
    return "".join(f"    {l}\n" for l in text.rstrip().split("\n")) if text.strip() else ""

def readme(nb: dict) -> str: # a notebook as the README's markdown; links to notebooks and pictures are written as seen from the root
    parts = ["<!-- Written from nbs/index.ipynb by `make readme`. Edit the notebook. -->\n"]
    for c in nb["cells"]:
        src = "".join(c["source"])
        if c["cell_type"] == "markdown": parts.append(re.sub(r"\]\((?!https?:|#|\.\./)([^)]+)\)", r"](nbs/\1)", src).replace("](../", "](").strip()+"\n")
        elif c["cell_type"] == "code" and not re.search(r"^#\|\s*(hide|default_exp)\b", src, re.M):
            code = "\n".join(l for l in src.split("\n") if not l.startswith("#|")).strip()
            if code: parts.append(f"```python\n{code}\n```\n")
            parts += [t for t in map(_output, c["outputs"]) if t]
    return "\n".join(parts)

def expected(root) -> dict[str, str]: # path below the root -> the text it should have
    nbs = Path(root)/"nbs"; files = {"nbs/sidebar.yml": sidebar(p.name for p in nbs.glob("[!_.]*.ipynb"))}
    if (nbs/"index.ipynb").exists(): files["README.md"] = readme(json.loads((nbs/"index.ipynb").read_text()))
    return files

if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    for name, text in expected(root).items():
        if not (root/name).exists() or (root/name).read_text() != text: (root/name).write_text(text); print("wrote", name)
