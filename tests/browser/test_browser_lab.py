"""Pins that JupyterLab shows what the notebooks promise: the tour runs to its end, curves move while a training runs, two notebooks
live beside each other, and a restarted kernel starts again. The driver itself is tested first, on a plot of twenty lines."""
import pytest
from lab import LATE, ROOT, until

PLOT = '''import numpy as np, plotly.graph_objects as go, ipywidgets as W
x = np.random.default_rng(0).normal(size=(500, 2)); said, out, slider = W.HTML("nothing"), W.HTML("3"), W.IntSlider(value=3, max=20)
fig = go.FigureWidget(go.Scattergl(x=x[:, 0], y=x[:, 1], mode="markers")); fig.update_layout(height=400, dragmode="lasso")
fig.data[0].on_click(lambda t, p, s: setattr(said, "value", f"clicked {p.point_inds}")); fig.data[0].on_selection(lambda t, p, s: setattr(said, "value", f"selected {len(p.point_inds)}"))
slider.observe(lambda c: setattr(out, "value", str(c.new)), "value")
for w, name in ((fig, "t-plot"), (said, "t-said"), (out, "t-out"), (slider, "t-slider")): w.add_class(name)
W.VBox([fig, said, W.HBox([slider, out])])'''

def test_the_driver(book):
    b = book([PLOT]); b.run_all(); b.drawn("t-plot", 500); said = lambda: b.shows("t-said")
    for i in b.lonely("t-plot")[:2]: assert b.changed(said, lambda: b.click_point("t-plot", i))[0] == f"clicked [{i}]"
    n, _ = b.changed(said, lambda: b.lasso("t-plot")); x = b.ask("sum(len(t.selectedpoints or ()) for t in fig.data)")
    assert n == f"selected {x}" and 100 < x < 500
    b.slide("t-slider", times=2); until(lambda: b.shows("t-out") == "5", 20, "the slider did not arrive")
    b.page.evaluate("setTimeout(() => { throw new Error('planted') })"); until(lambda: b.page.title() and b.errors, 5, "an error of the page went unseen"); assert "planted" in b.errors.pop()

def test_a_cell_that_fails_is_seen(book):
    b = book(["1/0"])
    with pytest.raises(AssertionError, match="ZeroDivisionError"): b.run_all()

def test_a_training_curve_moves_while_it_trains(book):
    b = book(['''from clam.widgets.live import LiveCurve
import time
curve = LiveCurve("planted"); curve.on_start(0, 200)
for i in range(200): curve.on_log({"stage": "stage1", "update": i, "recon_loss": 1/(1+i)}); time.sleep(.1)
drawn = curve.draws; curve.on_end()'''])
    b.run_all(wait=False); plot = ".jp-OutputArea-output:has(.js-plotly-plot)"
    last = lambda: b.at(plot).evaluate("el => { const t = (el.querySelector('.js-plotly-plot')?._fullData ?? [])[0]; return t ? t.x[t.x.length-1] : -1; }")
    first = until(lambda: max(last(), 0), 60, "no curve was drawn"); assert first < 199, "only the finished curve was seen"
    until(lambda: last() > first, 20, "the curve stands still"); b.finish(); assert b.ask("drawn") > 5

HASTY = """const was = AbortSignal.timeout; AbortSignal.timeout = ms => { if (ms != 2000) return was.call(AbortSignal, ms);
  const c = new AbortController(); queueMicrotask(() => c.abort()); return c.signal; };"""                 # a page in which everything takes longer than anywidget waits

def test_figures_of_a_slow_page(book):
    b = book(["""from clam.widgets.base import Plot
fig = Plot(dict(x=[1, 2, 3], y=[1, 2, 3])); fig.layout.title.text = "changed before it was seen"; fig.add_class("t-plot");""", "fig", "fig"], script=HASTY); before = len(LATE)
    b.run_all(); b.drawn("t-plot", 3); until(lambda: b.page.title() and len(LATE) > before, 20, "anywidget was patient: this test tests nothing")
    shown = lambda: b.page.evaluate("[...document.querySelectorAll('.t-plot.js-plotly-plot')].map(gd => [gd._fullLayout.title.text, gd.data.length])")
    until(lambda: shown() == [["changed before it was seen", 1]]*2, 20, "not both views show the figure")
    assert b.ask("fig.add_scatter(y=[4, 5]) is fig"); until(lambda: shown() == [["changed before it was seen", 2]]*2, 20, "a new curve did not arrive")
    assert b.ask("fig.update_layout(title_text='new') is fig"); until(lambda: shown() == [["new", 2]]*2, 20, "a new title did not arrive")
    b.menu("File", "Save Notebook"); until(lambda: (b.lab.root/b.name).read_text().count("widget-view+json") == 2, 30, "the notebook was not saved")
    for _ in range(3):                               # ipywidgets gives a kernel four seconds to say which widgets there are
        b.page.reload(); b.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=90_000); until(lambda: shown() == [["new", 2]]*2 or b.page.get_by_text("model not found").count(), 60, "opened again, the page does not show the figure as it is")
        if shown() == [["new", 2]]*2: return
    raise AssertionError("opened again three times, the page found no widgets")

def test_two_notebooks_at_once(book):
    slow, quick = book(["import time, os\nwhile not os.path.exists('go-on'): time.sleep(.1)\nmine = 'slow'"], "slow"), book([PLOT+"\n#", "mine = 'quick'"], "quick")
    slow.run_all(wait=False); quick.run_all(); quick.drawn("t-plot", 500) if quick.page.locator(".t-plot").count() else None
    assert not slow.printed("everything has run"), "the slow one should still be busy"
    (slow.lab.root/"go-on").touch(); slow.finish(); assert (slow.ask("mine"), quick.ask("mine")) == ("slow", "quick")

def test_a_restarted_kernel_starts_again(book):
    b = book(["runs = globals().get('runs', 0)+1", PLOT]); b.run_all(); b.run_all() ; assert b.ask("runs") == 2
    b.restart_and_run_all(); assert b.ask("runs") == 1
    b.drawn("t-plot", 500); i = b.lonely("t-plot")[0]; assert b.changed(lambda: b.shows("t-said"), lambda: b.click_point("t-plot", i))[0] == f"clicked [{i}]"

@pytest.mark.slow
def test_the_tour_runs_to_its_end(book):
    "On the toy, as when notebooks are tested."
    b = book(ROOT/"nbs"/"91_tour.ipynb", "tour", first="import os; os.environ['IN_TEST'] = '1'"); b.run_all(200)
    plots, films = b.read_through(".js-plotly-plot", ".jp-OutputArea-output video"); assert plots >= 5 and films >= 2, (plots, films)
    b.page.locator(".clam-bench-head").first.evaluate("e => e.scrollIntoView({block: 'start'})")
    b.at("clam-bench-head"); b.drawn("clam-map", 200); b.click_point("clam-map", b.lonely("clam-map")[0]); until(lambda: b.ask("bench.selection.focus") is not None, 20, "the workbench at the end of the tour does not answer"); b.shot("tour-workbench")
