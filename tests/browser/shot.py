"""A picture of a panel in JupyterLab: `python tests/browser/shot.py "code whose last line is the panel" out.png [--theme dark] [--size 1280x800] [--sidebar] [--wait 3] [--select clam-panel]`."""
import argparse, tempfile
from pathlib import Path
import lab as driver

p = argparse.ArgumentParser(description=__doc__)
p.add_argument("code"); p.add_argument("out", type=Path); p.add_argument("--theme", default="light"); p.add_argument("--size", default="1280x800"); p.add_argument("--sidebar", action="store_true")
p.add_argument("--wait", type=float, default=3., help="seconds after the last cell has run"); p.add_argument("--select", help="only this part, e.g. clam-panel"); p.add_argument("--data", help="CLAM_DATA of the kernel; default: the checkout's data folder")
a = p.parse_args()
code = Path(a.code).read_text() if a.code.endswith(".py") else a.code
with tempfile.TemporaryDirectory() as d:
    lab = driver.Lab(d, CLAM_DATA=a.data or str(driver.ROOT/"data"))
    try:
        book = lab.open(lab.write("shot.ipynb", [code]), a.theme, tuple(map(int, a.size.split("x"))), a.sidebar).run_all(300)
        book.page.wait_for_timeout(1000*a.wait)
        panel = book.page.locator(".clam-panel").first
        if panel.count(): panel.evaluate("e => e.closest('.jp-OutputArea').scrollIntoView({block: 'start'})"); book.page.wait_for_timeout(300)
        if a.select: book.at(a.select).screenshot(path=a.out)
        else: book.page.screenshot(path=a.out)
        print(a.out, *(f"page error: {e}" for e in book.errors), *book.traces(), sep="\n")
    finally: lab.close()
