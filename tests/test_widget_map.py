"""Pins the latent map: what it draws and where, what a click and a lasso show, the cache, the trust meter, that bad input becomes a
sentence, and that a closed panel gives back models, threads and simulator. No browser: the widgets' state is what a reader would see."""
import gc, json, sys, threading, time, weakref
import numpy as np, pytest, torch
from clam.core import write_json
from clam.evaluate.inspection import inspect_episodes
from clam.toy import linear_lam, toy_episodes
from clam.widgets import latent_map as lm
from clam.widgets.base import Cancelled, Selection
from clam.widgets.latent_map import LatentMap

EPS = toy_episodes(4, seed=5, skill=0.)+toy_episodes(4, seed=6, skill=1.)
LABELS = ["play"]*4+["expert"]*4
N = sum(map(len, EPS))
rng = np.random.default_rng(0)

class Model: # a model of pairs whose latent is any function of (o, o')
    def __init__(self, f): self.f, self.std = f, np.ones(6)
    def encode(self, o, n): return self.f(np.asarray(o, float), np.asarray(n, float))
    def predict(self, o, z): return o

def opened(model=None, eps=EPS, labels=LABELS, env="toy", decode=None, **kw): return inspect_episodes(model or linear_lam("healthy"), eps, labels[:len(eps)], decode, env_name=env, H=0, **kw)
def settled(m, errors=0):
    assert all(w.wait(60) for w in m._workers)
    assert sum(len(w.errors) for w in m._workers) == errors, [w.errors for w in m._workers]
    return m._ui

@pytest.fixture
def make(tmp_path, monkeypatch): # `make(inspection)`: a map, drawn, closed at the end; nothing cached outside the test
    monkeypatch.setenv("CLAM_DATA", str(tmp_path)); all_ = []
    def new(source=None, method="pca", **kw):
        m = LatentMap(opened() if source is None else source, method=method, **kw); all_.append(m); m.view()
        return m
    yield new
    for m in all_: m.close()

def fake_umap(monkeypatch, f=lambda z: z[:, :2]*2+1): monkeypatch.setattr(lm, "umap_map", lambda z, tick, seed=0: f(np.asarray(z, np.float32)))


# ---------------------------------------------------------------- drawing
def test_pca_is_there_at_once_and_points_know_their_transition(make):
    m = make(); ui = settled(m); ins = m.inspection
    assert m.drawn == "pca" and m.message == "" and len(ui.fig.data[0].x) == N and not m.job._thread
    c = ins.z-ins.z.mean(0); assert np.allclose(np.linalg.norm(m.xy["pca"], axis=1), np.linalg.norm(c, axis=1), atol=1e-4)    # two dimensions: a rotation
    assert np.array_equal(ui.fig.data[0].customdata, np.c_[ins.episode, ins.t])
    assert "% of variance" in ui.fig.layout.xaxis.title.text and ui.fig.data[0].marker.colorbar.title.text == "action 0"


def test_many_points_are_drawn_by_a_seeded_choice(make):
    eps = toy_episodes(70, seed=3, T=400); ins = opened(eps=eps, labels=["play"]*70, env=None)
    m = make(ins); assert len(ins) == 28_000 and len(m.keep) == 20_000
    assert type(m._ui.fig.data[0]).__name__ == "Scattergl" and m._ui.fig.data[0].x.dtype == np.float32
    assert len(np.unique(m.keep)) == 20_000 and np.array_equal(m.keep, lm.drawable(ins.z)) and len(np.unique(ins.episode[m.keep])) == 70
    assert settled(m) and m.trusted.n == 2000
    hidden = int(np.setdiff1d(np.arange(len(ins)), m.keep)[0]); m.selection.focus = hidden; settled(m)                          # not drawn itself: marked at the drawn point nearest in z
    near = m.keep[np.linalg.norm(ins.z[m.keep]-ins.z[hidden], axis=1).argmin()]
    assert np.allclose(m.spots([hidden])[0], m.xy["pca"][np.searchsorted(m.keep, near)]) and len(m._ui.fig.data[3].x) == 1


def test_colours_change_in_place(make):
    m = make(); ui = settled(m); trace = ui.fig.data[0]; x = trace.x
    for name in m.names():
        ui.colour.value = name; m.costs.wait(); assert trace is ui.fig.data[0] and trace.marker.colorbar.title.text == name and len(trace.marker.color) == N, name
        assert ui.busy.value == "" and m.message == ""
    assert np.array_equal(trace.x, x)
    ui.colour.value = "episode"; assert trace.marker.colorbar.tickvals is None, "ticks of the words before are gone"
    ui.colour.value = "kind of episode"; assert list(trace.marker.colorbar.ticktext) == ["expert (160)", "play (160)"] and set(trace.marker.color) == {0, 1}
    m.colour = "taste"; assert "no such colour" in m.message and m.colour == ui.colour.value == "kind of episode"


def test_every_column_of_an_inspection_is_offered(make):
    ins = opened(); assert set(ins.columns()) <= set(make(ins).names())
    assert {k: getattr(ins, v) is not None for k, v in lm.COSTLY.items()} == {k: True for k in set(ins.columns())-set(ins.columns(costly=False))}


# ---------------------------------------------------------------- a click
def test_a_click_shows_the_moment(make):
    m = make(); ui = settled(m); n = m.inspection.at(5, 9); m.clicked([n]); settled(m); ins = m.inspection
    assert m.selection.focus == n and "episode 5, step 9 of 40" in ui.label.value and "expert" in ui.label.value
    assert ui.now.value == lm.png_bytes(ins.frame(5, 9), 128) and ui.next.value == lm.png_bytes(ins.frame(5, 10), 128)
    assert f"{ins.act[n, 0]:+.2f}" in ui.actions.value and "video/mp4" in ui.clip.value and ui.near.value.count("<img") == 5
    assert np.array_equal(m.moment.near, ins.neighbours(n, 5)) and np.allclose(ui.fig.data[1].x, m.xy["pca"][m.moment.near, 0])
    m.clicked([3], "nearest in z"); settled(m); assert m.selection.focus == ins.neighbours(n, 5)[3], "a mark can be clicked, too"
    m.clicked([]); ui.pin.click(); assert m.selection.pins == [m.selection.focus] and len(ui.fig.data[2].x) == 1
    m.selection.focus = ins.at(2, 0); ui.back.click(); assert m.selection.focus == ins.at(2, 0), "no way out of the episode"
    m.selection.focus = None; settled(m); assert "Click a point" in ui.label.value and m.moment is None and len(ui.fig.data[3].x) == 0


def test_only_the_last_of_many_clicks_is_shown(make):
    m = make(); settled(m)
    for n in range(0, 300, 10): m.selection.focus = n
    ui = settled(m); assert m.moment.n == 290 and "episode 7, step 10 of" in ui.label.value and ui.near.value.count("<img") == 5


def test_what_comes_too_late_is_not_shown(make, monkeypatch):
    m = make(); ui = settled(m); ins, labels, clips = m.inspection, [], []; ui.label.observe(lambda c: labels.append(c.new), "value"); ui.clip.observe(lambda c: clips.append(c.new), "value")
    pair, film = type(ins).pair, lm.mp4_bytes
    def moved_on(self, n): # while the frames of 5 are made, somebody clicks on 9
        if n == 5: m.selection.focus = 9
        return pair(self, n)
    monkeypatch.setattr(type(ins), "pair", moved_on); m.selection.focus = 5; settled(m); assert len(labels) == 1 and "step 9" in labels[0] and m.moment.n == 9
    def too_late(frames): m.selection.focus = 20; monkeypatch.setattr(lm, "mp4_bytes", film); return b"too late" # and while the clip of 12 is made, on 20
    clips.clear(); monkeypatch.setattr(lm, "mp4_bytes", too_late); m.selection.focus = 12; settled(m)
    assert m.moment.n == 20 and len([c for c in clips if "video/mp4" in c]) == 1 and lm.base64.b64encode(b"too late").decode() not in "".join(clips)


def test_one_selection_moves_two_maps(make):
    s = Selection(); a, b = make(selection=s), make(selection=s); a.clicked([7]); settled(a), settled(b)
    assert a._ui.label.value == b._ui.label.value and b.selection.focus == 7


def test_a_fault_while_drawing_the_clip_costs_the_clip_only(make, monkeypatch):
    m = make(); settled(m); monkeypatch.setattr(lm, "overlay", lambda *a: 1/0); m.clicked([3]); ui = settled(m)
    assert "ZeroDivisionError" in ui.clip.value and "step 3" in ui.label.value and ui.near.value.count("<img") == 5


def test_no_message_to_the_browser_undoes_another_trace(make, monkeypatch):
    m = make(); ui = settled(m); sent, send = [], type(ui.fig)._send_update_msg
    monkeypatch.setattr(type(ui.fig), "_send_update_msg", lambda self, restyle_data, relayout_data=None, trace_indexes=None, **kw: (sent.append((dict(restyle_data or {}), list(np.atleast_1d(trace_indexes)))), send(self, restyle_data, relayout_data, trace_indexes, **kw))[1])
    m.selection.pick(range(9)); m.selection.focus = 30; m.selection.pin(40); settled(m); m.selection.pick(range(5)); m.selection.focus = 31; settled(m); m.colour = "step"; m.xy["umap"] = m.xy["pca"]*2; m.method = "umap"; settled(m)
    restyle = type(ui.fig)._send_restyle_msg; monkeypatch.setattr(type(ui.fig), "_send_restyle_msg", lambda self, data, trace_indexes=None, **kw: (sent.append((dict(data), list(np.atleast_1d(trace_indexes)))), restyle(self, data, trace_indexes, **kw))[1])
    m.selection.focus = 32; settled(m); m.selection.pin(41); settled(m); assert len(sent) >= 3 and max(len(which) for _, which in sent) == 3
    assert all(len(which) == 1 or all(len(v) == len(which) and all(isinstance(x, list) for x in v) for v in data.values()) for data, which in sent), "in one message for several traces a browser takes what is undefined for one of them as gone"


# ---------------------------------------------------------------- a lasso
def test_a_lasso_shows_statistics_and_clips(make):
    m = make(); settled(m); inside = np.flatnonzero(m.inspection.act[:, 1] > .6)
    m.selection.pick(inside); ui = settled(m); facts, acts = lm.picked_rows(m.inspection, inside); a = m.inspection.act
    assert facts["transitions"] == [str(len(inside)), str(N)] and acts["action 1"] == [f"{a[inside, 1].mean():+.2f} ± {a[inside, 1].std():.2f}", f"{a[:, 1].mean():+.2f} ± {a[:, 1].std():.2f}"]
    assert facts["of kind expert"][0] == f"{(inside >= 160).mean():.0%}" and "video/mp4" in ui.film.value and np.array_equal(ui.fig.data[0].selectedpoints, inside)
    m.selection.pick([]); settled(m); assert "Draw a lasso" in ui.picked.value and ui.film.value == "" and ui.fig.data[0].selectedpoints is None


def test_clips_are_of_members_far_apart():
    z = np.r_[rng.normal(0, .1, (50, 2)), rng.normal(5, .1, (50, 2)), [[20., 0.]], [[np.nan, 0.]]]
    got = lm.spread(z, np.arange(102), 3); assert 100 in got and 101 not in got and len(set(got)) == 3 and lm.spread(z, [101]) == [] and lm.spread(np.zeros((4, 2)), [0, 1, 2], 6) in ([0, 1, 2], [0, 2, 1])


# ---------------------------------------------------------------- UMAP beside it
def test_umap_is_swapped_in_cached_and_taken_from_the_cache(make, monkeypatch, tmp_path):
    fake_umap(monkeypatch); m = make(method="umap"); m.job.wait(); settled(m)
    assert m.drawn == "umap" and m._ui.fig.layout.xaxis.title.text.startswith("UMAP") and np.allclose(m._ui.fig.data[0].x, m.inspection.z[:, 0]*2+1, atol=1e-5)
    files = list((tmp_path/"cache"/"maps").iterdir()); assert [f.suffix for f in files] == [".npy"]
    m._ui.method.value = "pca"; assert m.drawn == "pca" and np.allclose(m._ui.fig.data[0].x, m.xy["pca"][:, 0])
    fake_umap(monkeypatch, lambda z: 1/0)                                                     # from here on fitting would fail
    again = make(method="umap"); assert again.drawn == "umap" and again.job.status == "idle" and "from the cache" in again._ui.words.value
    for rubbish in (b"", b"x"*400, files[0].read_bytes()[:-40]):
        files[0].write_bytes(rubbish); broken = make(method="umap"); broken.job._thread.join(30); assert broken.drawn == "pca" and "ZeroDivisionError" in broken.progress
    fake_umap(monkeypatch); healed = make(method="umap"); healed.job.wait(); assert healed.drawn == "umap"


def test_a_cached_map_of_other_latents_is_not_shown(make, monkeypatch):
    fake_umap(monkeypatch); m = make(opened(identity="the same"), method="umap"); m.job.wait()
    other = make(opened(linear_lam("ungrounded"), identity="the same"), method="umap"); other.job.wait()
    assert "from the cache" not in other.progress and np.allclose(other.xy["umap"], other.inspection.z*2+1, atol=1e-5)


def test_a_fit_can_be_cancelled_and_started_again(make, monkeypatch):
    ended = threading.Event()
    def forever(z, tick, seed=0):
        try:
            while True: tick(.4, "layout"); time.sleep(.01)
        except Cancelled: ended.set(); raise
    monkeypatch.setattr(lm, "umap_map", forever); m = make(method="umap"); ui = m._ui
    while m.job.fraction < .3: time.sleep(.01)
    assert ui.cancel.layout.display is None and "layout" in ui.words.value and m.drawn == "pca"
    m.clicked([5]); settled(m); assert "step 5" in ui.label.value, "the map is usable meanwhile"
    ui.cancel.click(); assert ended.wait(10) and m.method == "pca" == ui.method.value and "cancelled" in ui.words.value and ui.cancel.layout.display == "none"
    fake_umap(monkeypatch); ui.method.value = "umap"; m.job.wait(); assert m.drawn == "umap"


def test_two_fits_never_run_at_once(monkeypatch):
    lm._ONE.acquire(); job = lm.Job().start(lambda tick: lm.umap_map(rng.normal(size=(50, 3)), tick))
    try:
        for _ in range(6000):
            if job.text == "UMAP waits for another map": break
            time.sleep(.01)
        else: raise AssertionError(job.text)
        job.cancel(); job._thread.join(30); assert not job._thread.is_alive() and lm._ONE.locked()
    finally: lm._ONE.release()


def test_a_map_leaves_torchs_threads_alone(monkeypatch): # numba's first parallel loop sets the OpenMP threads of torch too: later trainings differed in their last bits
    umap = lm.load_umap()
    class Fake:
        def __init__(self, **kw): pass
        def fit_transform(self, z): torch.set_num_threads(before+1); return np.zeros((len(z), 2))
    monkeypatch.setattr(umap, "UMAP", Fake); before = torch.get_num_threads()
    lm.umap_map(np.random.default_rng(0).normal(size=(20, 3)))
    assert torch.get_num_threads() == before

@pytest.mark.slow
def test_a_real_umap_places_the_rest_where_they_belong():
    z = np.r_[rng.normal(size=(300, 8)), rng.normal(size=(300, 8))+8].astype(np.float32); told = []
    xy = lm.umap_map(z, lambda f=0., text="": told.append(f), fitted=200); cloud = np.arange(600) >= 300
    centre = np.stack([xy[~cloud].mean(0), xy[cloud].mean(0)]); nearest = np.linalg.norm(xy[:, None]-centre, axis=2).argmin(1)
    assert (nearest == cloud).mean() > .99 and told == sorted(told) and len(told) > 50
    assert np.allclose(xy, lm.umap_map(z, fitted=200), atol=1e-3), "seeded"
    from umap import layouts
    assert layouts.tqdm.__name__ == "tqdm_asyncio" or "tqdm" in repr(layouts.tqdm), "umap's own progress bar is back"
    t = lm.trust(z, xy); assert t.kept > 3*t.kept_chance and t.trustworthiness > .75


# ---------------------------------------------------------------- trust
def brute(z, xy, k): # neighbours kept, with nothing but distances
    d = lambda x: np.argsort(np.where(np.eye(len(x)) > 0, np.inf, np.square(x[:, None]-x).sum(2)), axis=1)[:, :k]
    return np.mean([len(set(a) & set(b))/k for a, b in zip(d(z), d(xy))])


def test_the_meter_counts_right():
    z = rng.normal(size=(200, 5)); xy = z[:, :2]/np.ptp(z[:, :2], axis=0); t = lm.trust(z, xy)
    assert abs(t.kept-brute(z, xy, 15)) < 1e-9 and abs(t.kept_chance-15/199) < 1e-9
    assert lm.trust(z[:, :2], z[:, :2]*[1, 1000.]).kept == lm.trust(z[:, :2], z[:, :2]).kept, "judged as drawn: each axis fills its side"
    lost = lm.trust(z, rng.normal(size=(200, 2))); assert abs(lost.kept-lost.kept_chance) < .04 and "do not read" in lost.sentence and "%" in lost.sentence
    small = lm.trust(z[:8], xy[:8]); assert small.k == 3
    with pytest.raises(lm.Nothing): lm.trust(z[:3], xy[:3])


def test_the_meter_tells_action_clusters_from_others():
    act = np.repeat([[1., 0], [-1, 0], [0, 1], [0, -1]], 50, 0)+rng.normal(0, .05, (200, 2)); noise = rng.normal(size=(200, 2))
    assert lm.trust(act, act, act).action_clusters == "are" and lm.trust(noise, noise, act).action_clusters == "are not"
    t = lm.trust(noise, noise, act); assert abs(t.bins_map-t.bins_chance) < .1 and "not clusters of actions" in t.sentence and len(t.rows()) == 5
    still = lm.trust(noise, noise, np.zeros((200, 2))); assert np.isnan(still.bins_map) and len(still.rows()) == 2 and "actions" not in still.sentence
    assert set(lm.action_bins(act)) == {0, 1, 2, 3} and set(lm.action_bins(np.c_[act, np.ones(200)])) == {0, 1, 2, 3}, "a dimension that never moves makes no bin"
    assert "chance" in lm.trust_html(t, "PCA") and lm.trust_html(t, "PCA").count("<tr>") == 5


# ---------------------------------------------------------------- what goes wrong
def nan_where(rows): # a latent that is NaN where the step is in `rows`
    return Model(lambda o, n: np.where(np.isin(np.arange(len(o)), rows)[:, None], np.nan, n[:, 2:4]-.8*o[:, 2:4]))


@pytest.mark.parametrize("model, words", [(Model(lambda o, n: np.ones((len(o), 4))), "collapsed"), (Model(lambda o, n: np.full((len(o), 3), np.nan)), "NaN"), (linear_lam("collapsed"), "collapsed")])
def test_latents_that_make_no_map(make, model, words):
    m = make(opened(model)); assert words in m.message and m.keep is None and "Traceback" not in m.message
    assert words in m._view.children[0].value and words in lm.message(m.message).layout.annotations[0].text and m.static().layout.annotations
    m._view.children[1].children[0].click(); assert words in m.message, "trying again says the same"
    m.colour = "step"; m.method = "umap"; m.fit(); assert m.keep is None


def test_some_latents_are_nan(make):
    m = make(opened(nan_where(range(5, 25)))); ui = settled(m); assert m.message == "" and len(m.keep) == N-20 and not set(range(5, 25)) & set(m.keep)
    m.selection.focus = 7; settled(m); assert "step 7" in ui.label.value and len(ui.fig.data[3].x) == 0, "there is no place to mark"
    ui.colour.value = lm.ERROR if lm.ERROR in m.names() else "probe error |a - probe(z)|"; m.costs._thread.join(30); assert "needs finite latents" in ui.busy.value
    m.selection.pick(range(40)); settled(m); assert "Inside" in ui.picked.value


@pytest.mark.parametrize("Z", [1, 2, 64])
def test_latents_of_any_width(make, Z):
    P = rng.normal(size=(12, Z)); m = make(opened(Model(lambda o, n: np.c_[o, n-o]@P)), method="umap" if Z == 1 else "pca"); ui = settled(m)
    m.clicked([11]); settled(m); m.selection.pick(range(30)); settled(m)
    assert m.message == "" and m.drawn == "pca" and len(ui.fig.data[0].x) == N and np.isfinite(m.trusted.kept) and "step 11" in ui.label.value
    if Z == 1: assert ui.method.disabled and ui.fig.layout.xaxis.title.text == "transition"; m.method = "umap"; assert m.method == "pca" and "one dimension" in ui.words.value


def test_one_episode_no_actions_no_pictures(make):
    one = make(opened(eps=EPS[:1])); one.clicked([4]); ui = settled(one); assert one.message == "" and "no other episode" in ui.near.value and ui.now.value != lm.BLANK
    dumb = make(opened(eps=[e.replace(act=None) for e in EPS], env=None)); dumb.clicked([4]); ui = settled(dumb); dumb.selection.pick([1, 2, 3]); settled(dumb)
    assert dumb.colour == "step" and "no actions" in ui.actions.value and "no simulator" in ui.note.value and ui.frames.layout.display == "none" and np.isnan(dumb.trusted.bins_map)
    assert "Inside" in ui.picked.value and "no clips" in ui.film.value and "no simulator" in dumb.static_detail(4).static()
    seedless = make(opened(eps=[e.replace(meta={}) for e in EPS])); seedless.clicked([4]); assert "cannot be replayed" in settled(seedless).note.value
    three = make(opened(eps=[EPS[0].replace(obs=EPS[0].obs[:4], act=EPS[0].act[:3], reward=EPS[0].reward[:3], success=EPS[0].success[:3])]), method="umap"); three.job._thread.join(30); settled(three)
    assert "too few" in three._ui.trust.value and "at least 10" in three.progress and three.drawn == "pca"


def test_wrong_numbers_are_sentences(make):
    m = make(); ui = settled(m)
    m.selection.focus = N; assert "no such transition" in m.message and "no such transition" in m._view.children[0].value
    m.selection.focus = 3; settled(m); assert m.message == "" and "step 3" in ui.label.value
    m.selection.pick([N+5]); settled(m); assert "no such transition" in ui.picked.value
    m.method = "tsne"; assert "unknown projection" in m.message and m.method == "pca"
    with pytest.raises(lm.DatasetError, match="no transition is in focus"): make().static_detail()


def test_umap_that_is_not_installed(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None); monkeypatch.setitem(sys.modules, "umap.layouts", None)
    m = make(method="umap"); m.job._thread.join(30); settled(m)
    assert "pip install umap-learn" in m._ui.words.value and m.drawn == "pca" == m._ui.method.value and m.message == "" and not lm._ONE.locked()


def test_a_run_that_is_still_being_written(make, tmp_path):
    run = tmp_path/"runs"/"young"; run.mkdir(parents=True)
    m = make("young"); assert "young" in m.message and "Traceback" not in m.message and m.inspection is None
    write_json(run/"config.json", {"half": 1}); m._view.children[1].children[0].click(); assert m.message and m.inspection is None
    m.source = opened(); m._view.children[1].children[0].click(); settled(m)                    # later it is whole: the same button opens it
    assert m.message == "" and m.trouble is None and len(m._ui.fig.data[0].x) == N


@pytest.mark.slow
def test_a_trained_run_opens_by_name_and_an_unfinished_one_says_so(make, tmp_path):
    from clam.collect.recipes import make_dataset
    from clam.config import preset
    from clam.data.store import EpisodeStore
    from clam.train.stage1 import train_stage1
    store = EpisodeStore(make_dataset("toy", 40, seed=1, out=tmp_path/"episodes"/"toy", workers=1)); run = tmp_path/"runs"/"toy"
    train_stage1(store, preset("tiny").replace(stage1__updates=20, split__n_expert=4, split__n_labelled=4), run, quiet=True)
    m = make("toy"); m.clicked([2]); ui = settled(m); assert m.message == "" and "decoded" in ui.actions.value and ui.now.value != lm.BLANK
    (run/"lam.safetensors").unlink(); assert "lam" in make("toy").message and "Traceback" not in make("toy").message


# ---------------------------------------------------------------- static forms, closing
def test_static_forms_need_no_view(make):
    m = LatentMap(opened(), method="pca"); fig = m.static(["action 0", "success"]); assert json.loads(fig.to_json()) and m._view is None and "PCA" in fig.layout.title.text
    card = m.static_detail(9); assert card.static().count("data:image/jpeg") == 7 and "step 9" in card._repr_html_() and repr(card) == "Card(transition 9)"; m.close()


def test_a_closed_map_gives_everything_back(tmp_path, monkeypatch):
    from ipywidgets.widgets.widget import _instances
    monkeypatch.setenv("CLAM_DATA", str(tmp_path)); ins = opened(); s = Selection()
    def once():
        m = LatentMap(ins, s, method="pca"); m.view(); m.selection.focus = 3; m.selection.pick([1, 2, 50]); settled(m); assert len(_instances) > before[0]+20
        m.close(); m.close(); s.focus = 4; s.focus = None; s.pick([])
        return weakref.ref(m)
    before = [len(_instances), threading.active_count()]; once(); gc.collect(); before, sizes = [len(_instances), threading.active_count()], []
    for _ in range(10):
        gone = once(); gc.collect(); sizes.append((len(_instances), threading.active_count())); assert gone() is None
    assert set(sizes) == {tuple(before)}, sizes
    assert ins._env is None and ins._sim is None and not s._trait_notifiers.get("focus", {}).get("change")


def test_closing_ends_a_fit_under_way(make, monkeypatch):
    ended = threading.Event()
    def forever(z, tick, seed=0):
        try:
            while True: tick(.1, "neighbours"); time.sleep(.01)
        finally: ended.set()
    monkeypatch.setattr(lm, "umap_map", forever); m = make(method="umap"); m.close(); assert ended.wait(10) and m._view is None and m.job.status == "cancelled"
    m.view(); assert m._view is not None and len(m._ui.fig.data[0].x) == N; m.close()                     # and it can be shown again


# ---------------------------------------------------------------- one simulator for all who ask
class Slow: # an environment that takes its time to start
    made, closed, threads = 0, 0, set()
    def __init__(self): Slow.made += 1; time.sleep(.3); Slow.threads.add(threading.get_ident())
    def render(self): Slow.threads.add(threading.get_ident()); return np.zeros((8, 8, 3), np.uint8)
    def close(self): Slow.closed += 1; Slow.threads.add(threading.get_ident())


def test_many_who_ask_at_once_get_one_simulator_in_one_thread(monkeypatch):
    from clam.evaluate import inspection as module
    Slow.made = Slow.closed = 0; Slow.threads = set(); monkeypatch.setattr(module, "make_env", lambda *a, **kw: Slow()); monkeypatch.setattr(module.Inspection, "_restore", lambda self, e, t: self._world())
    class Late(module.ThreadPoolExecutor):
        def __init__(self, *a, **kw): time.sleep(.05); super().__init__(*a, **kw)
    monkeypatch.setattr(module, "ThreadPoolExecutor", Late); ins, start = opened(), threading.Barrier(8); got = []
    def ask(): start.wait(); got.append(ins.frame(0, 0))
    threads = [threading.Thread(target=ask) for _ in range(8)]; [t.start() for t in threads]; [t.join(60) for t in threads]
    assert len(got) == 8 and Slow.made == 1 and len(Slow.threads) == 1
    ins.close(); ins.close(); assert Slow.closed == 1 and ins._env is None and len(Slow.threads) == 1


def test_closing_while_the_simulator_starts_leaves_none_behind(monkeypatch):
    from clam.evaluate import inspection as module
    Slow.made = Slow.closed = 0; monkeypatch.setattr(module, "make_env", lambda *a, **kw: Slow()); monkeypatch.setattr(module.Inspection, "_restore", lambda self, e, t: self._world())
    ins = opened(); ins.warm()
    while not Slow.made: time.sleep(.01)
    ins.close(); assert Slow.made == Slow.closed == 1 and ins._env is None and ins._sim is None
