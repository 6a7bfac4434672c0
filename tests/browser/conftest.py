"""One JupyterLab and one Chromium for all browser tests, a small trained toy run in its data folder, and the reason when there is no browser."""
import os
from pathlib import Path
import pytest
import lab as driver

def pytest_collection_modifyitems(items):
    "They come last: while Playwright is open, a loop runs in this process, and `asyncio.run` of other tests would refuse."
    why = driver.missing(); ours = lambda i: Path(i.fspath).parent == Path(__file__).parent; items.sort(key=ours)
    for i in filter(ours, items):
        i.add_marker(pytest.mark.browser)
        if why: i.add_marker(pytest.mark.skip(reason=f"browser tests are skipped: {why}"))

def pytest_terminal_summary(terminalreporter):
    if driver.missing() and terminalreporter.stats.get("skipped"): terminalreporter.write_line(f"note: browser tests were skipped: {driver.missing()}")

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
    for b in opened: b.close()
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
