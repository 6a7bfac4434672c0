"""Pins the views: no content of the data makes a figure raise, stored figures are small and reproducible, films play and say what
happened, the live curve throttles and stays flat in memory, and the report is one file that loads nothing and hides no gap."""
import html.parser, json, re, subprocess, sys
import imageio_ffmpeg, numpy as np, pytest
from clam.core import ClamError, Episode
from clam.toy import toy_episode
from clam.widgets import live, plots, report, video

rng = np.random.default_rng(0)
STRANGE = [None, [], np.empty((0, 3)), np.full((4, 2), np.nan), np.zeros(5), np.zeros((5, 3)), np.arange(4.), np.ones((1, 1)), np.array([[1e30, 0.], [-1e30, 1.]]),
           np.r_[rng.normal(size=(5, 2)), [[np.inf, 0]]], rng.normal(size=(2, 40)), rng.integers(0, 5, (20, 3)), rng.normal(size=(30, 2)).astype(np.float16)]


@pytest.mark.parametrize("z", STRANGE, ids=range(len(STRANGE)))
@pytest.mark.parametrize("method", ["pca", "umap"])
def test_any_latents_make_a_figure(z, method, monkeypatch):
    monkeypatch.setattr(plots, "umap_within", lambda z, *a, **kw: None)      # as if it took too long: falls back to PCA
    fig = plots.latent_map(z, method=method)
    assert fig.data or plots.said(fig)
    assert json.loads(fig.to_json())


def test_colours_of_every_kind():
    z = rng.normal(size=(50, 4))
    for c in (rng.normal(size=50), np.arange(50), np.full(50, np.nan), np.r_[np.nan, rng.normal(size=49)], np.zeros(50), rng.random(50) < .5, np.array(list("abcde")*10), np.array([f"k{i}" for i in range(50)])):
        fig = plots.latent_map(z, c, hover=[f"p{i}" for i in range(50)])
        assert fig.data and all(t.visible for t in fig.data)
        assert len(fig.data) <= 7


def test_thinning_keeps_colour_and_hover_aligned():
    z = rng.normal(size=(25_000, 3)); xy = np.c_[np.arange(25_000), np.arange(25_000)]
    t = plots.latent_map(z, np.arange(25_000), hover=np.arange(25_000), xy=xy, max_points=1000).data[0]
    assert len(t.x) == 1000 and np.array_equal(t.x, t.marker.color) and t.text[500] == str(int(t.x[500]))


def test_metrics_with_rubbish(tmp_path):
    f = tmp_path/"metrics.jsonl"; f.write_text('{"stage": "a", "update": 1, "loss": 0.5}\n[1]\nnull\n\x00\xff{"x"\n{"stage": "a", "update": 2, "loss": NaN}\n{"stage": "a", "loss": "x"}\n')
    fig = plots.training_curves(f); assert list(fig.data[0].x) == [1]
    negative = plots.training_curves([{"update": i, "loss": i-5.} for i in range(10)]); assert negative.layout.yaxis.type != "log"


def test_results_are_recomputed_from_outcomes():
    r = {"label": "vpt", "success": .99, "successes": [True, False], "returns": [1., 3.]}        # the stated rate is ignored
    assert list(plots.results_bars([r]).data[0].x) == [.5] and "<b>0.50</b>" in plots.results_table([r])
    assert list(plots.results_bars([r], "returns").data[0].x) == [2.]
    assert "&lt;i&gt;" in plots.results_table([{**r, "label": "<i>"}])


def test_figures_are_small_and_reproducible():
    make = lambda: plots.latent_map(np.random.default_rng(1).normal(size=(2500, 16)), np.random.default_rng(2).normal(size=2500))
    assert plots.figure_html(make()) == plots.figure_html(make()) and len(plots.figure_html(make())) < 60_000


def test_importing_the_views_does_not_import_umap():
    code = "import sys, clam.widgets.plots, clam.widgets.video, clam.widgets.live; print([m for m in ('umap', 'torch', 'mujoco', 'numba') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ---------------------------------------------------------------- films
def decode(path):
    reader = imageio_ffmpeg.read_frames(str(path)); w, h = next(reader)["size"]
    return np.stack([np.frombuffer(b, np.uint8).reshape(h, w, 3) for b in reader])


@pytest.mark.parametrize("shape", [(5, 32, 32, 3), (3, 33, 47, 3), (1, 20, 20, 3), (4, 16, 16, 1)])
def test_films_survive_the_encoder(shape, tmp_path):
    frames = np.broadcast_to(np.linspace(40, 200, shape[0]).astype(np.uint8)[:, None, None, None], shape)
    back = decode(video.write_mp4(tmp_path/"x.mp4", frames, crf=18))
    assert len(back) == shape[0] and back.shape[1] % 2 == back.shape[2] % 2 == 0
    assert np.abs(back.mean((1, 2, 3))-np.linspace(40, 200, shape[0])).max() < 6


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(ClamError): video.write_mp4(tmp_path/"x.mp4", np.zeros((3, 4)))
    assert list(tmp_path.iterdir()) == []


def test_success_border_is_at_the_frame_the_step_led_to():
    frames = np.zeros((4, 16, 16, 3), np.uint8); out = video.overlay(frames, success=np.array([False, True, False]))
    assert [bool((f[0, 0] == video._GREEN).all()) for f in out] == [False, False, True, False]


def test_action_bars_show_the_action_of_the_frame():
    frames = np.zeros((3, 16, 16, 3), np.uint8); out = video.overlay(frames, act=np.array([[1.], [-1.]], np.float32), size=64, panel=40)
    above, below = (lambda t: (out[t, 64:84] == video._WARM).all(-1).sum()), (lambda t: (out[t, 86:] == video._WARM).all(-1).sum())
    assert above(0) > 100 > below(0) and below(1) > 100 > above(1) and below(2) > 100      # the last frame repeats the last action


# ---------------------------------------------------------------- the live curve
def test_live_curve_follows_the_real_loop():
    loop = pytest.importorskip("clam.train.loop"); import torch
    from clam.config import OptimConfig, RegressionConfig
    x = torch.randn(64, 2); net = torch.nn.Linear(2, 1)
    state, step = loop.regression(net, lambda i: ((x[i],), x[i].sum(1, keepdim=True)), 64, RegressionConfig(updates=50, batch=8, optim=OptimConfig(lr=.05, warmup=0)), seed=0)
    curve = live.LiveCurve("fit", live=True, hz=1e9)
    loop.run_loop(step, state, 50, [curve], stage="fit")
    assert len(curve.static().data) == 1 and curve.static().data[0].x[-1] == 50 and curve.draws == 51


def test_live_curve_is_silent_outside_a_notebook():
    curve = live.LiveCurve(); assert not curve.live
    curve.on_start(0, 1); curve.on_log({"update": 1, "loss": 1.}); curve.on_end()
    assert curve.draws == 0 and len(curve.rows()) == 1


# ---------------------------------------------------------------- the report
def record(method, ok, **kw):
    return {"method": method, "label": "clam-mlp" if method == "clam" else method, "env": "toy", "labels": 20, "first_seed": 1, "successes": ok, "successes_last": ok, "returns": [float(o) for o in ok], "seconds": {"a": 1.}, **kw}


class Sound(html.parser.HTMLParser): # every element that is opened is closed, in order
    VOID = {"meta", "br", "img", "input", "hr", "link"}
    def __init__(self): super().__init__(); self.open, self.ids, self.loads = [], [], []
    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID: self.open.append(tag)
        a = dict(attrs)
        if "id" in a: self.ids.append(a["id"])
        if tag in ("script", "img", "video", "link", "iframe"): self.loads += [v for k, v in a.items() if k in ("src", "href") and not v.startswith("data:")]
    def handle_endtag(self, tag): assert self.open.pop() == tag, tag


@pytest.mark.parametrize("records", [[], [record("bc-al", [])], [record("clam", [True]*3)], [record("clam", [True, False]*9), record("vpt", [False]*18), record("my-own", [True]*18)],
    [{"method": "clam", "label": "clam-mlp"}], [record("clam", [True], diagnostics={"recon": {"recon": float("nan"), "cheat": 1., "ratio": float("nan")}}, provenance={"packages": None})]])
def test_report_is_one_sound_file(records, tmp_path):
    page = report.write_report(tmp_path/"r.html", report.ReportData(records), umap_seconds=0).read_text()
    p = Sound(); p.feed(page); assert p.open == [] and p.loads == []
    assert len(set(p.ids)) == len(p.ids), "two figures share an id"
    assert "Traceback" not in page


def test_report_states_equal_methods_as_equal():
    same = report.ReportData([record("clam", [True, False]*20), record("vpt", [True, False]*20)])
    assert "does not tell the two apart" in report.differences(same)[0]
    other_starts = report.ReportData([record("clam", [True]*20), record("vpt", [False]*20, first_seed=9)]); assert report.differences(other_starts) == []


def test_large_films_are_made_coarser():
    ep = Episode(obs=np.zeros((101, 2), np.float32), frames=rng.integers(0, 256, (101, 224, 224, 3), dtype=np.uint8), act=np.zeros((100, 2), np.float32), reward=np.zeros(100, np.float32), success=np.zeros(100, bool))
    assert len(report._encode(ep)) < 6*report.MAX_FILM      # pure noise is the worst case there is


@pytest.mark.slow
def test_report_from_a_real_demo_of_the_toy(tmp_path):
    experiments = pytest.importorskip("clam.evaluate.experiments")
    from clam.collect.recipes import make_dataset
    from clam.config import preset
    data = make_dataset("toy", episodes=150, out=tmp_path/"episodes"/"toy", workers=1)
    demo = experiments.run_demo(tmp_path, data, preset("tiny").replace(eval__episodes=10, stage1__updates=200, stage2__updates=150, bc__updates=100, idm__updates=100), 1, quiet=True)
    page = report.write_report(tmp_path/"report.html", demo, umap_seconds=0).read_text()
    p = Sound(); p.feed(page); assert p.loads == []
    assert page.count("data:video/mp4") >= 4 and "decoded action" in page and len(page) < 9e6
    for r in demo["records"].values(): assert f"<b>{r['success']:.2f}</b>" in page
