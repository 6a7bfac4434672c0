"""Pins that a page that hangs costs a test its browser and not the whole run: Chromium is ended, the test is tried once more in a
fresh one, and the last lines say so."""
import contextlib, os, shutil, signal, subprocess, sys
from pathlib import Path
import pytest

PLANTED = '''import time
from pathlib import Path
again = Path(__file__).with_name("again")
def spin(b, js): b.lab.since, b.lab.patience = time.monotonic(), 4.; b.page.evaluate("() => { while (true) %s; }" % js)
def test_spins_the_first_time(book):
    b = book(["1"]); second = again.exists(); again.touch()
    if not second: spin(b, "")
    assert b.ask("1+1") == 2
def test_always_spins(book): spin(book(["1"], name="always"), "console.log('a flood')")
def test_after_it(book): assert book(["print(7)"]).run_all().ask("2+2") == 4
'''

@pytest.mark.soak_only
def test_a_page_that_hangs(tmp_path):
    for f in ("conftest.py", "lab.py"): shutil.copy(Path(__file__).with_name(f), tmp_path/f)
    (tmp_path/"pytest.ini").write_text("[pytest]\nmarkers = browser: a browser\n"); (tmp_path/"test_planted.py").write_text(PLANTED)
    done = subprocess.Popen([sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", str(tmp_path)], cwd=tmp_path, env=os.environ | {"CLAM_QUIET": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try: out = done.communicate(timeout=1200)[0]
    finally:
        with contextlib.suppress(ProcessLookupError): os.killpg(done.pid, signal.SIGKILL)     # its JupyterLab too
    said = [l for l in out.splitlines() if l.startswith("note: ")]; assert "2 passed" in out and "1 failed" in out, out[-3000:]
    assert len(said) == 3 and all("Chromium was ended" in l for l in said), out[-3000:]
    assert "test_spins_the_first_time" in said[0] and "tried once more" in said[0] and "test_always_spins" in said[2] and "a second time" in said[2]
