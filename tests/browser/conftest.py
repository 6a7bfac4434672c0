"""One JupyterLab and one Chromium for all browser tests, a small trained toy run in its data folder, and the reason when there is no
browser. A test whose page hangs loses its browser (`lab.PATIENCE_S`), is tried once more in a fresh one, and named at the end; so is
one that fails after anywidget has given a widget up (two seconds, on a crowded machine)."""
import os
from pathlib import Path
import pytest
from _pytest.runner import runtestprotocol
import lab as driver

def ours(item) -> bool: return Path(item.fspath).parent == Path(__file__).parent

def pytest_collection_modifyitems(items):
    "They come last: while Playwright is open, a loop runs in this process, and `asyncio.run` of other tests would refuse."
    why = driver.missing(); items.sort(key=ours)
    for i in filter(ours, items):
        i.add_marker(pytest.mark.browser)
        if why: i.add_marker(pytest.mark.skip(reason=f"browser tests are skipped: {why}"))

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    if not ours(item): return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for last in (False, True):
        ended, late = len(driver.ENDED), len(driver.LATE); reports = runtestprotocol(item, log=False, nextitem=nextitem); said = driver.ENDED[ended:]
        if driver.LATE[late:] and any(r.failed for r in reports): said.append(f"anywidget waited two seconds for a widget of {driver.LATE[late]}, and no longer")
        for s in said: item.user_properties.append(("browser", f"{item.nodeid}: {s}, {'a second time' if last else 'the test was tried once more'}"))
        if last or not said: break
    for r in reports: r.user_properties = list(item.user_properties); item.ihook.pytest_runtest_logreport(report=r)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True

def pytest_terminal_summary(terminalreporter): # notes travel with the reports, so that they arrive from the workers of pytest-xdist too
    if driver.missing() and terminalreporter.stats.get("skipped"): terminalreporter.write_line(f"note: browser tests were skipped: {driver.missing()}")
    for note in dict.fromkeys(v for reports in terminalreporter.stats.values() for r in reports for k, v in getattr(r, "user_properties", ()) if k == "browser"): terminalreporter.write_line(f"note: {note}")

@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    it = driver.Lab(tmp_path_factory.mktemp("lab"))
    yield it
    it.close()

@pytest.fixture
def book(lab, request): # `book(cells)`: a notebook of these cells, opened; no test may leave an error of the page behind
    opened = []
    def make(cells, name=None, first=None, **kw):
        b = lab.open(lab.write(f"{name or request.node.name.replace('[', '-').replace(']', '')}.ipynb", cells, first), **kw); opened.append(b)
        return b
    yield make
    said = [e for b in opened for e in b.errors]
    for b in lab.books[:]: b.close()                 # one that failed to open, too
    assert not said, said

@pytest.fixture(scope="session")
def toy(lab): # a toy run with policy and ten rollouts in the kernels' data folder; -> its name, for `data_dir("runs", name)`
    from clam.collect.recipes import make_dataset
    from clam.config import EvalConfig, preset
    from clam.data.store import EpisodeStore
    from clam.evaluate.rollout import evaluate
    from clam.train.stage1 import train_stage1
    from clam.train.stage2 import train_stage2
    cfg = preset("tiny").replace(stage1__updates=200, stage2__updates=150, split__n_expert=8, split__n_labelled=8)
    store, run = EpisodeStore(make_dataset("toy", 80, seed=1, out=lab.data/"episodes"/"toy", workers=1)), lab.data/"runs"/"toy"
    train_stage1(store, cfg, run, quiet=True); train_stage2(run, store, quiet=True); evaluate(run, "toy", EvalConfig(episodes=10, videos=0, workers=1), quiet=True)
    return "toy"

@pytest.fixture(scope="session")
def assembly(lab): # the same of MetaWorld Assembly, where a moment is brought back by the simulator: few episodes, hardly trained
    from clam.collect.recipes import make_dataset
    from clam.config import preset
    from clam.data.store import EpisodeStore
    from clam.envs.rendering import choose_gl
    from clam.train.stage1 import train_stage1
    if choose_gl() is None: pytest.skip("nothing here can draw MuJoCo")
    store = EpisodeStore(make_dataset("metaworld/assembly", 30, seed=1, out=lab.data/"episodes"/"metaworld"/"assembly", workers=1))
    train_stage1(store, preset("tiny").replace(stage1__updates=100, split__n_expert=4, split__n_labelled=4), lab.data/"runs"/"assembly", quiet=True)
    return "assembly"
