"""Pins that a person can use the panels: a click on a point shows its moment, a lasso its statistics, a film can be scrubbed, a
slider changes three outcomes, a training is started and stopped, and bad input leaves a sentence, never a traceback."""
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

def test_a_lasso_changes_the_statistics(book, toy):
    b = book([MAP]); b.run_all(); b.drawn("clam-map", 200)
    first, _ = b.changed(lambda: b.shows("clam-picked"), lambda: b.lasso("clam-map"))
    picked = b.ask("list(panel.selection.picked)"); assert 10 < len(picked) < b.ask("len(ins)")
    second, _ = b.changed(lambda: b.shows("clam-picked"), lambda: b.lasso("clam-map", .02, .02, .5, .5)); assert first != second and b.ask("list(panel.selection.picked)") != picked
    b.shot("map-lasso")

def test_colours_change(book, toy):
    b = book([MAP]); b.run_all(); b.drawn("clam-map", 200)
    colours = lambda: b.at("clam-map").evaluate("el => String(el.querySelector('.js-plotly-plot')._fullData[0].marker.color)")
    for label in ("step", "neighbours' action disagreement", "kind of episode"): b.changed(colours, lambda: b.choose("clam-map-colour", label), what=f"no other colours for {label}")
