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

FILMS = OPEN+'''
from clam.widgets.rollouts import Rollouts
panel = Rollouts(ins); panel'''

def test_a_film_is_scrubbed(book, toy):
    b = book([FILMS]); b.run_all(); b.at("clam-player-step"); until(lambda: b.all("clam-film-video").count() == 1, 40, "no film appeared")
    until(lambda: b.all("clam-film-video").first.evaluate("v => v.readyState") >= 2, 20, "the film cannot be played")
    moment = lambda: b.all("clam-film-video").first.evaluate("v => v.currentTime"); bar = b.at("clam-player-step"); bar.click(position={"x": bar.bounding_box()["width"]/2, "y": 4})
    until(lambda: 15 < b.ask("panel.step") < 25, 10, "a click on the bar did not arrive"); s = b.ask("panel.step")
    for _ in range(7): b.page.keyboard.press("ArrowRight")
    until(lambda: b.ask("panel.step") == s+7, 10, "the kernel was not told of the step"); assert f"step {s+7} " in b.shows("clam-player-said") and abs(moment()-(s+7.5)/20) < .06
    assert b.ask("ins.where(panel.selection.focus) == (panel.lead, panel.step)"), "the shared selection is where the film is"
    b.button("clam-player-play"); until(lambda: b.ask("panel.step") > s+9, 20, "the film does not run"); until(lambda: not b.ask("panel.player.playing"), 20, "the film does not stop at its end")
    b.shot("rollouts")

def test_films_are_chosen_and_ordered(book, toy):
    b = book([FILMS]); b.run_all(); until(lambda: b.all("clam-thumb").count() >= 4, 40, "no pictures of episodes")
    first = b.ask("panel.on_page"); b.choose("clam-order", "lowest return first"); until(lambda: b.ask("panel.on_page") != first, 10, "the order did not change")
    b.all("clam-thumb").nth(2).click(); until(lambda: b.all("clam-film-video").count() == 2, 40, "the second film did not appear"); assert len(b.ask("panel.chosen")) == 2
