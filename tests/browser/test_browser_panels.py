"""Pins that a person can use the panels: a click on a point shows its moment, a lasso its statistics, a film can be scrubbed, a
slider changes three outcomes, a training is started and stopped, and bad input leaves a sentence, never a traceback."""
import shutil
import pytest
from lab import until

OPEN = '''from clam.core import data_dir
from clam.evaluate.inspection import inspect_run
ins = inspect_run(data_dir("runs", "toy"))'''
MAP = OPEN+'''
from clam.widgets.latent_map import LatentMap
panel = LatentMap(ins, method="pca"); panel'''

def focus_of(b): return b.ask("panel.selection.focus")

def test_a_click_shows_the_moment_behind_a_point(book, toy):
    b = book([MAP]); b.run_all(); b.drawn("clam-map", 200)
    seen = lambda: (b.picture("clam-frame-now"), b.picture("clam-frame-next"), b.shows("clam-focus-label"), b.shows("clam-actions"))
    for i in b.lonely("clam-map")[:2]:
        before = seen(); b.click_point("clam-map", i)
        until(lambda: all(x != y for x, y in zip(seen(), before)), 20, "frames, label and actions did not all change")
        n = b.ask("int(panel.keep[%d])" % i); assert focus_of(b) == n
        e, t = b.ask(f"ins.where({n})"); assert f"episode {e}" in b.shows("clam-focus-label") and f"step {t}" in b.shows("clam-focus-label")
    until(lambda: b.at("clam-clip").locator("video").count(), 30, "no clip appeared"); until(lambda: b.at("clam-neighbours").locator("img").count(), 30, "no neighbours appeared")
    b.shot("map"); step = lambda: focus_of(b); b.button("clam-forth"); until(lambda: step() == n+1, 10, "the button did not go to the next step")

def test_a_lasso_changes_the_statistics_and_a_menu_the_colours(book, toy):
    b = book([MAP]); b.run_all(); b.drawn("clam-map", 200); colours = lambda: b.plot("clam-map", "() => String(gd._fullData[0].marker.color)")
    for label in ("step", "neighbours' action disagreement", "kind of episode"): b.changed(colours, lambda: b.choose("clam-map-colour", label), what=f"no other colours for {label}")
    first, _ = b.changed(lambda: b.shows("clam-picked"), lambda: b.lasso("clam-map"))
    picked = b.ask("list(panel.selection.picked)"); assert 10 < len(picked) < b.ask("len(ins)")
    second, _ = b.changed(lambda: b.shows("clam-picked"), lambda: b.lasso("clam-map", .02, .02, .5, .5)); assert first != second and b.ask("list(panel.selection.picked)") != picked
    b.shot("map-lasso")

FILMS = OPEN+'''
from clam.widgets.rollouts import Rollouts
panel = Rollouts(ins); panel'''

def test_films_are_scrubbed_ordered_and_chosen(book, toy):
    b = book([FILMS]); b.run_all(); b.at("clam-player-step"); until(lambda: b.all("clam-film-video").count() == 1, 40, "no film appeared")
    until(lambda: b.all("clam-film-video").first.evaluate("v => v.readyState") >= 2, 20, "the film cannot be played")
    moment = lambda: b.all("clam-film-video").first.evaluate("v => v.currentTime"); bar = b.at("clam-player-step"); bar.click(position={"x": bar.bounding_box()["width"]/2, "y": 4})
    until(lambda: 15 < b.ask("panel.step") < 25, 10, "a click on the bar did not arrive"); s = b.ask("panel.step")
    for _ in range(7): b.page.keyboard.press("ArrowRight")
    until(lambda: b.ask("panel.step") == s+7, 10, "the kernel was not told of the step"); assert f"step {s+7} " in b.shows("clam-player-said") and abs(moment()-(s+7.5)/20) < .06
    assert b.ask("ins.where(panel.selection.focus) == (panel.lead, panel.step)"), "the shared selection is where the film is"
    b.button("clam-player-play"); until(lambda: b.ask("panel.step") > s+9, 20, "the film does not run"); until(lambda: not b.ask("panel.player.playing"), 20, "the film does not stop at its end")
    until(lambda: b.all("clam-thumb").count() >= 4, 40, "no pictures of episodes")
    first = b.ask("panel.on_page"); b.choose("clam-order", "lowest return first"); until(lambda: b.ask("panel.on_page") != first, 10, "the order did not change")
    b.all("clam-thumb").nth(2).click(); until(lambda: b.all("clam-film-video").count() == 2, 40, "the second film did not appear"); b.shot("rollouts"); assert len(b.ask("panel.chosen")) == 2

STEER = OPEN+'''
from clam.widgets.base import Selection
from clam.widgets.steering import Steering
panel = Steering(ins, Selection(focus=25)); panel'''

def test_a_slider_changes_three_outcomes(book, toy):
    b = book([STEER]); b.run_all(); until(lambda: "after the decoded action" in b.shows("clam-steer-sim"), 40, "no first outcome")
    outcomes = lambda: (b.shows("clam-steer-fdm"), b.shows("clam-steer-action"), b.shows("clam-steer-sim")); before = start = outcomes()
    b.slide("clam-steer-slider-0", "PageUp", 2); until(lambda: all(x != y for x, y in zip(outcomes(), before)), 20, "prediction, action and simulator did not all change")
    b.shot("steering"); b.button("clam-steer-reset"); until(lambda: outcomes() == start, 20, "reset did not bring the recorded latent back")

def test_the_reconstruction_panel_answers(book, toy):
    b = book([OPEN+"\nfrom clam.widgets.reconstruction import ReconVsCheat\npanel = ReconVsCheat(ins); panel"]); b.run_all(); b.drawn("clam-recon-plot", 8)
    i = b.plot("clam-recon-plot", "() => gd._fullData.findIndex(t => t.x && t.x.length > 3)")
    b.changed(lambda: b.shows("clam-recon-focus"), lambda: b.click_point("clam-recon-plot", 3, i), what="a click on an episode showed nothing"); assert b.ask("int(ins.episode[panel.selection.focus])") == 3
    axis = lambda: b.plot("clam-recon-plot", "() => gd._fullLayout.xaxis.title.text")
    b.changed(axis, lambda: b.choose("clam-recon-by", "by step"), what="the split did not change"); b.shot("reconstruction")

TRAINED = '''from clam.config import preset
from clam.core import data_dir
from clam.data.store import open_dataset
from clam.widgets.live import TrainingMonitor
cfg = preset("tiny").replace(stage1__updates=100_000, split__n_expert=8, split__n_labelled=8)
panel = TrainingMonitor(open_dataset("toy"), cfg, data_dir("runs", "started"), title="toy, Stage 1", hz=5.); panel'''

def test_a_training_is_started_and_stopped(book, toy):
    b = book([TRAINED]); b.run_all(); b.button("clam-start"); said = lambda: b.shows("clam-monitor-status")
    until(lambda: "training" in said() and b.ask("panel.update") > 20, 60, "the training did not start")
    points = lambda: b.points("clam-monitor-plot")
    n = until(points, 20, "no curve was drawn"); until(lambda: points() > n, 20, "the curves stand still")
    b.button("clam-pause"); until(lambda: "paused" in said(), 20, "no pause"); at = b.ask("panel.update"); b.page.wait_for_timeout(500); assert b.ask("panel.update") == at
    b.button("clam-checkpoint"); until(lambda: "checkpoint" in said(), 20, "no checkpoint"); b.shot("training"); b.button("clam-pause"); until(lambda: b.ask("panel.update") > at, 20, "it does not go on")
    b.button("clam-stop"); until(lambda: "stopped" in said(), 30, "the training did not stop"); until(lambda: b.ask("panel.job.status") == "done", 20, "its thread did not end"); assert b.ask("panel.update") < 100_000
    assert b.ask("1+1") == 2 and any((b.lab.data/"runs"/"started"/"state").glob("stage1-*")), "the state is saved and the kernel free"

BENCH = '''from clam.core import data_dir
from clam.widgets.bench import Workbench
bench = Workbench(data_dir("runs", "toy"), method="pca"); bench'''

def test_the_tabs_share_one_selection(book, toy):
    b = book([BENCH]); b.run_all(); b.drawn("clam-map", 200); assert b.ask("list(bench.parts)") == ["Map"] and "10 rollout" in b.shows("clam-bench-head")
    b.click_point("clam-map", b.lonely("clam-map")[0]); n = until(lambda: b.ask("bench.selection.focus") or 0, 10, "the click did not arrive"); e, t = b.ask(f"bench.inspection.where({n})")
    def tab(name): b.tab(name); until(lambda: b.ask(f"{name!r} in bench.parts"), 30, f"{name} did not open")
    tab("Steering"); until(lambda: b.ask("bench.parts['Steering'].turn > 0 and int(bench.parts['Steering'].outcome.n)") == n, 30, "steering is elsewhere")
    tab("Rollouts"); until(lambda: b.ask("[bench.parts['Rollouts'].lead, bench.parts['Rollouts'].step]") == [e, t], 30, "the film is elsewhere")
    until(lambda: b.all("clam-film-video").count() == 1, 40, "no film"); bar = b.at("clam-player-step"); bar.click(position={"x": 3, "y": 4}); until(lambda: b.ask("bench.selection.focus") != n, 10, "scrubbing did not move the selection")
    m = b.ask("bench.selection.focus"); b.tab("Map"); until(lambda: f"episode {b.ask(f'bench.inspection.where({m})')[0]}," in b.shows("clam-focus-label"), 20, "the map did not follow")
    b.tab("Reconstruction"); until(lambda: str(m) in b.shows("clam-recon-focus"), 30, "the reconstruction did not follow")
    tab("Training"); b.drawn("clam-monitor-plot", 10); tab("Health"); b.button("clam-health-run"); until(lambda: b.all("clam-health-report").first.inner_text().strip(), 120, "no report"); word = b.ask("bench.parts['Health'].report.verdict")
    until(lambda: word in b.shows("clam-bench-head"), 10, "the verdict is not in the header"); assert b.ask("bench.message") == ""; b.shot("bench-health")

BAD = {"constant latents": ("LatentMap(ins_of(Fixed(0.)), method='pca')", "collapsed"), "NaN latents": ("LatentMap(ins_of(Fixed(float('nan'))), method='pca')", "NaN"), "no run": ("Workbench(data_dir('runs', 'no-such-run'))", "no run here"),
       "no episodes": ("Rollouts([])", "no episodes"), "one episode of three steps": ("LatentMap(inspect_episodes(linear_lam('healthy'), [toy_episodes(1, T=3)[0]], H=0, env_name='toy'), method='pca')", ""),
       "a latent of one number": ("LatentMap(ins_of(Fixed(None, 1)))", "one dimension"), "64 latents": ("LatentMap(ins_of(Fixed(None, 64)), method='pca')", "neighbours"),
       "frames absent": ("LatentMap(inspect_episodes(linear_lam('healthy'), eps, H=0), Selection(focus=3), method='pca')", "no simulator"), "an empty lasso": ("LatentMap(ins_of(Fixed(None, 3)), Selection(picked=[]), method='pca')", "Draw a lasso"),
       "umap absent": ("LatentMap(ins_of(Fixed(None, 5)))", "pip install umap-learn"), "a run being written": ("Workbench(half)", "no policy yet"),
       "no decoder, no simulator": ("Steering(inspect_episodes(linear_lam('healthy'), eps, H=0), Selection(focus=3))", "decoder")}

def test_bad_input_leaves_a_sentence(book, lab, toy):
    "Every panel in a cell of its own, all in one notebook."
    half = lab.data/"runs"/"half"; shutil.copytree(lab.data/"runs"/toy, half, ignore=shutil.ignore_patterns("*.safetensors", "evals", "manifest.json"))     # Stage 1 has begun, no weights are written yet
    b = book(['''import numpy as np
from clam.core import data_dir
from clam.evaluate.inspection import inspect_episodes
from clam.toy import linear_lam, toy_episodes
from clam.widgets.base import Selection
from clam.widgets.bench import Workbench
from clam.widgets.latent_map import LatentMap
from clam.widgets.rollouts import Rollouts
from clam.widgets.steering import Steering
eps = toy_episodes(4, seed=1)
import sys; sys.modules["umap"] = None; sys.modules["umap.layouts"] = None          # as where umap-learn is not installed
class Fixed:
    def __init__(self, v, Z=3): self.v, self.Z = v, Z
    def encode(self, o, o_next): return np.full((len(o), self.Z), self.v, np.float32) if self.v is not None else (o_next-o).sum(1, keepdims=True)*np.cos(np.outer(np.ones(len(o)), np.arange(self.Z)))+o[:, :1]*np.sin(np.arange(self.Z)).astype(np.float32)
    def predict(self, o, z): return o
half = data_dir("runs", "half")
def ins_of(model): return inspect_episodes(model, eps, H=0, env_name="toy")''', *(f"panel = {code}; panel" for code, _ in BAD.values())]); b.run_all()
    for i, (what, (_, word)) in enumerate(BAD.items(), 1):
        cell = b.page.locator(".jp-Cell").nth(i); cell.evaluate("e => e.scrollIntoView({block: 'start'})"); until(lambda: cell.locator(".clam-panel").count(), 20, f"{what}: no panel")
        until(lambda: word in cell.locator(".clam-panel").first.inner_text(), 20, f"{what}: not a word about {word!r}"); b.shot("bad-"+what.replace(" ", "-").replace(",", ""))
    assert b.traces() == [] and b.ask("2+2") == 4
