"""The rollout viewer and the training monitor on their state: order and pages, films made in a thread and cancelled, the step shared
with the map both ways, two policies from one seed; a training that is held, saved, stopped, resumed, and comes out the same to the
last bit; curves of runs that are being written; drift that a rotation cannot fake; a sentence for every bad input; nothing left behind."""
import gc, json, subprocess, sys, threading, time, weakref
import imageio_ffmpeg, numpy as np, pytest
from ipywidgets.widgets.widget import _instances
from clam.config import preset
from clam.core import Episode, locked
from clam.data.store import EpisodeStore, write_store
from clam.evaluate.inspection import inspect_episodes
from clam.evaluate.rollout import FILM_PX, EvalResult, evaluate
from clam.config import EvalConfig
from clam.testing import fake_episodes
from clam.toy import ToyWorld, expert_action, linear_lam, toy_episode, toy_episodes
from clam.train.checkpoint import Run
from clam.train.stage1 import train_stage1
from clam.widgets import live, rollouts
from clam.widgets.base import Selection
from clam.widgets.live import Snapshots, TrainingMonitor, aligned, drift_figure, linear_cka, neighbour_overlap, overlay
from clam.widgets.plots import said
from clam.widgets.rollouts import ORDERS, Footage, Rollouts, compare, fitted, ordered, orders, parting

EPS = toy_episodes(11, seed=3)
CFG = preset("tiny").replace(stage1__updates=120)

class Driver:
    "The toy's expert, for a while."
    def __init__(self, until=10**9): self.until, self.t = until, 0
    def act(self, obs): self.t += 1; return (expert_action(obs) if self.t <= self.until else np.zeros(2)), None
def load_driver(run): return Driver(20)

@pytest.fixture
def ins():
    it = inspect_episodes(linear_lam("healthy"), EPS, env_name="toy", name="toy"); yield it; it.close()
@pytest.fixture
def panel(ins):
    p = Rollouts(ins); yield p; p.close()
@pytest.fixture(scope="module")
def store(tmp_path_factory): return EpisodeStore(write_store(tmp_path_factory.mktemp("d")/"toy", toy_episodes(80, seed=0), {"name": "toy", "spec": ToyWorld().spec}))

def until(f, seconds=60):
    end = time.monotonic()+seconds
    while not f():
        assert time.monotonic() < end, "waited too long"
        time.sleep(.01)

def decode(path):
    reader = imageio_ffmpeg.read_frames(str(path)); w, h = next(reader)["size"]
    return np.stack([np.frombuffer(b, np.uint8).reshape(h, w, 3) for b in reader])

# ---------------------------------------------------------------- order, pages, pictures
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_is_a_permutation_and_stable(order):
    out = ordered(EPS, order); key = [ORDERS[order](EPS[i]) for i in out]
    assert sorted(out) == list(range(len(EPS))) and key == sorted(key)
    assert all(a < b for a, b, k, l in zip(out, out[1:], key, key[1:]) if k == l)

def test_orders_need_what_they_order_by():
    some = [EPS[0].replace(success=None), *EPS[1:]]
    assert orders(some) == ["highest return first", "lowest return first", "as recorded"] and orders([e.replace(reward=None) for e in EPS]) == ["success first", "failures first", "as recorded"]
    p = Rollouts([e.replace(reward=None, success=None) for e in EPS], env_name="toy"); p.view(); assert p.order == "as recorded"
    p.order = "failures first"; assert p.order == "as recorded" and "lack success or reward" in p.message
    p.wait(); assert list(p._films) == [0] and "steps" in p.footage.says(0); p.close()

def test_pages_hold_everything_once(panel):
    seen = []
    for panel.page in range(panel.pages): seen += panel.on_page
    assert sorted(seen) == list(range(11)); panel.page = -3; assert panel.page == 0; panel.page = 99; assert panel.page == 1
    panel.order = "lowest return first"; assert panel.page == 0 and panel.on_page[0] == int(np.argmin([e.total_reward for e in EPS]))

def test_nothing_is_drawn_before_the_panel_is_seen(panel):
    panel.view(); assert panel.footage.replay._env is None and panel.cutting.status == panel.pictures.status == "idle"
    assert len(panel.wall.thumbs) == 8 and "return" in panel.wall.thumbs[0]["text"]
    panel.player.visible = True; panel.wait(); assert panel.footage.replay._env is not None and len(panel._thumbs) == 8
    assert all(t["png"][:4] == b"\x89PNG" for t in panel.wall.thumbs) and len({t["png"] for t in panel.wall.thumbs}) == 8

@pytest.mark.parametrize("shape", [(3, 8, 8, 3), (2, 84, 84, 3), (1, 480, 640, 3), (2, 33, 47, 1), (2, 300, 300, 4)])
def test_frames_of_any_size_fit(shape):
    f = fitted(np.full(shape, 90, np.uint8)); assert f.shape[0] == shape[0] and f.shape[1] == FILM_PX and f.shape[3] == 3 and f.shape[2] % 2 == 0 and (f == 90).all()
    assert abs(f.shape[2]/FILM_PX-shape[2]/shape[1]) < .06

def test_stored_frames_are_not_replayed_and_are_the_right_ones():
    eps = [toy_episode(s, frames=True) for s in range(3)]; f = Footage(eps)
    np.testing.assert_array_equal(f.frames(1)[7, ::7, ::7], eps[1].frames[7]); f.film(2); f.picture(0); assert f.replay._env is None and f.replay._sim is None

def test_a_replayed_film_shows_the_recorded_moments(ins):
    f = Footage(ins, px=96); world = ToyWorld(render_size=96); world.reset(0); e, t = 4, 13
    world.obs = EPS[e].obs[t]; np.testing.assert_array_equal(f.frames(e)[t], world.render()); np.testing.assert_array_equal(f.z(e), ins.z[ins.at(e, 0):ins.at(e, 0)+40])
    for e in (1, 0): np.testing.assert_array_equal(f.picture(e), f.frames(e)[int(np.argmax(EPS[e].success))+1 if EPS[e].succeeded else 40])   # the moment of success, or the end
    assert EPS[1].succeeded and not EPS[0].succeeded; f.close()

# ---------------------------------------------------------------- films and cancelling
def test_choosing_again_cancels_the_film_under_way(ins, monkeypatch):
    made, hold, real = [], threading.Event(), Footage.film
    def slow(self, e, tick=rollouts.say_nothing):
        if e == 0:
            for _ in range(500): tick(.1); hold.wait(.01)
        made.append(e); return real(self, e, tick)
    monkeypatch.setattr(Footage, "film", slow); p = Rollouts(ins); p.chosen = [0]; p.wake(); until(lambda: p.cutting.text)
    p.chosen = [3]; p.wait(); assert made[-1] == 3 and 0 not in made and list(p._films) == [3] and p.message == ""; p.close()

def test_the_cache_of_films_is_bounded(panel, monkeypatch):
    monkeypatch.setattr(Footage, "film", lambda self, e, tick=None: np.zeros((2, 16, 16, 3), np.uint8)); panel.footage.episodes *= 5
    for e in range(40): panel.mp4(e)
    assert len(panel._films) == 24 and 39 in panel._films and 0 not in panel._films

def test_films_of_different_length_share_the_player():
    short = EPS[0].replace(obs=EPS[0].obs[:11], act=EPS[0].act[:10], reward=EPS[0].reward[:10], success=EPS[0].success[:10])
    p = Rollouts([short, EPS[1]], env_name="toy"); p.view(); p.chosen = [0, 1]; p.wait(); assert p.player.steps == 40 and len(p.player.films) == 2
    p.lead = 0; p.step = 35; assert p.message == "" and len(p.together()) == 41; p.close()

def test_saving_is_atomic_and_plays(panel, tmp_path, monkeypatch):
    f = panel.save(tmp_path/"new"/"a.mp4", [0, 1]); back = decode(f); assert back.shape == (41, 268, 2*224+4, 3)
    first = panel.footage.film(0)[20].astype(int); assert np.abs(back[20, :, :224]-first).mean() < 8
    old = f.read_bytes(); monkeypatch.setattr(rollouts, "write_mp4", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    assert panel.save(f) is None and "disk full" in panel.message and f.read_bytes() == old and [q.name for q in f.parent.iterdir()] == ["a.mp4"]

# ---------------------------------------------------------------- one step, everywhere
def test_step_and_focus_are_one(ins):
    s = Selection(); p = Rollouts(ins, s); p.view(); p.player.visible = True; p.wait(); p.chosen = [2, 6]; p.wait(); heard = []
    s.observe(lambda c: heard.append(c.new), "focus")
    for t in (5, 6, 40): p.player.step = t                               # the browser reports
    assert heard == [ins.at(6, 5), ins.at(6, 6), ins.at(6, 39)] and p.step == 40
    p.player.playing = True; s.focus = ins.at(2, 11); assert (p.lead, p.step, p.player.step, p.player.lead, p.player.playing) == (2, 11, 11, 0, False)
    s.focus = ins.at(8, 0); p.wait(); assert p.chosen == [8, 6] and p.wall.chosen == [8, 6] and p.step == 0 and len(p.player.films) == 2
    s.focus = None; s.focus = 10**6; assert p.lead == 8 and p.message == ""
    late = Rollouts(ins, Selection(focus=ins.at(3, 8))); assert (late.chosen, late.lead, late.step) == ([3], 3, 8); late.close()
    two = Rollouts(ins, s); s.focus = ins.at(1, 7); assert (two.lead, two.step, p.lead, p.step) == (1, 7, 1, 7)
    two.step = 9; assert s.focus == ins.at(1, 9) and p.step == 9        # no echo runs away
    p.close(); two.close(); s.focus = 3

def test_episodes_of_no_inspection_leave_the_map_alone():
    s = Selection(); p = Rollouts(EPS, s, env_name="toy"); s.focus = 50; assert (p.lead, p.step) == (p.chosen[0], 0)
    p.step = 9; assert s.focus == 50; p.close()

# ---------------------------------------------------------------- evaluations, two policies
def test_an_evaluation_is_shown_with_and_without_films(tmp_path):
    for videos in (0, 1):
        r = evaluate(tmp_path/f"e{videos}", "toy", EvalConfig(episodes=5, videos=videos, workers=1), load=load_driver, agent_id=f"driver{videos}", quiet=True)
        p = Rollouts(r); p.chosen = [e for e in range(5) if p.episodes[e].frames is not None][:1] or [0]; p.wait(); assert p.message == "" and len(p._films) >= 1
        assert p.footage.replay._env is not None; p.close()            # the page's other pictures are replayed
        assert any(e.frames is not None for e in p.footage.episodes) == bool(videos)

def test_where_policies_part_is_where_their_actions_first_tell():
    for k in (1, 7, 20):
        c = compare(Driver(), Driver(k), seed=2, env_name="toy", tol=1e-9).wait(); a, b = c.result
        first = int(np.argmax((a.act != b.act).any(1))); assert c.part == first+1 and np.array_equal(a.obs[:c.part], b.obs[:c.part]) and not np.array_equal(a.obs[c.part], b.obs[c.part])
        bar = lambda f: (f[5, 50:100] == (213, 94, 0)).all(); films = c._films(); assert [bar(f) for f in films[0]] == [t >= c.part for t in range(41)]
        c.view(); assert c.message == "" and len(c.player.films) == 2 and c.player.mark == c.part and f"step {c.part}" in c._said.value; c.close()
    parts = [parting(a.obs, b.obs, tol) for tol in (0, .01, .2, .6)]; parts = [99 if p is None else p for p in parts]; assert parts == sorted(parts)
    rising = np.arange(20.)[:, None]; assert parting(rising, rising+1e-6) is None and parting(rising, 2*rising) == 4 and parting(0*rising, 0*rising) is None and parting(rising[:9], rising) == 9

class Nan:
    def act(self, obs): return np.full(2, np.nan), None

@pytest.mark.parametrize("a, b, env, words", [(Driver(), Driver(), "toy/none", "unknown environment"), (Driver(), Driver(), None, "two policies need one environment"),
    ("no-such-run", "nor-this", None, "no run here"), (Driver(), Nan(), "toy", "action is not finite")])
def test_a_comparison_that_cannot_be_made_says_so(a, b, env, words):
    c = compare(a, b, env_name=env).wait(); until(lambda: words in c.message, 5); c.view(); assert words in c.message and c.result is None; c.close()

def test_the_viewer_offers_the_comparison(ins, store, tmp_path):
    from clam.train.baselines import train_method
    for seed in (0, 1): train_method("bc-al", store, CFG.replace(bc__updates=20, seed=seed), tmp_path/f"bc{seed}", quiet=True, threads=1)
    p = Rollouts(ins, runs=[tmp_path/"bc0", tmp_path/"bc1"]); p.view(); row, below = p.view().children[1].children[-1].children; assert p.comparison() is None
    seed, button = row.children[3:]; p.chosen = [5]; assert seed.value == EPS[5].meta["seed"]; seed.value = 7; button.click(); c = p.comparison().wait()
    assert c.message == "" and c.names == ("bc0", "bc1") and c.result[0].meta["seed"] == 7 and c.part is not None and below.children == (c.view(),) and len(c.player.films) == 2
    button.click(); assert p.comparison() is not c and c.player is None; p.comparison().wait(); p.close(); assert p.comparison().player is None

def test_a_comparison_closed_at_once_stops():
    n = threading.active_count(); c = compare(Driver(), Driver(), env_name="toy"); t = c.job._thread; c.close(); t.join(10); assert not t.is_alive() and c.result is None and threading.active_count() <= n

# ---------------------------------------------------------------- bad input
def test_bad_episodes_are_sentences():
    empty = Rollouts([]); assert "no episodes to show" in empty.message; empty.view(); assert "no episodes to show" in empty.view().children[0].value; empty.wait(); empty.page = 3; empty.close()
    one = Rollouts(EPS[:1], env_name="toy"); one.view(); one.wait(); assert one.message == "" and one.pages == 1; one.close()
    for eps, env, words in ((fake_episodes(2), None, "no simulator"), ([e.replace(meta={}) for e in EPS[:2]], "toy", "cannot be replayed"), ([e.replace(act=None) for e in EPS[:2]], "toy", "cannot be replayed"),
                            ([e.replace(obs=e.obs+.01) for e in EPS[:2]], "toy", "left the recorded path"), (EPS[:2], "no/where", "unknown environment")):
        p = Rollouts(eps, env_name=env); p.view(); p.wait(); until(lambda: words in p.message, 5); assert p.trouble is not None and len(p.wall.thumbs) == 2; p.close()
    p = Rollouts(EPS, env_name="toy", order="by taste"); assert "cannot be ordered so" in p.message; p.view(); p.close()

# ---------------------------------------------------------------- nothing left behind
def test_a_closed_viewer_gives_everything_back(ins):
    def once():
        p = Rollouts(ins, runs=[]); p.view(); p.wait(); p.chosen = [1, 2]; p.wait(); r = weakref.ref(p); p.close(); p.close(); return r
    once(); gc.collect(); n, threads = len(_instances), threading.active_count(); gone = [once() for _ in range(3)]; gc.collect()
    assert [g() for g in gone] == [None]*3 and len(_instances) <= n and threading.active_count() <= threads

def test_closing_while_films_are_made_leaves_no_simulator(ins):
    p = Rollouts(ins); p.view(); p.wake(); until(lambda: p.cutting.text); p.close()
    assert p.footage.replay._sim is None and p.footage.replay._env is None and not any(j._thread and j._thread.is_alive() for j in p._jobs)

# ---------------------------------------------------------------- drift
def test_drift_is_blind_to_rotation_and_sees_change():
    rng = np.random.default_rng(0); z = rng.normal(size=(400, 6))*[4, 3, 2, 1, 1, 1]; q = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert abs(linear_cka(z, -3*z@q+1)-1) < 1e-9 and neighbour_overlap(z, -3*z@q+1) == 1. and np.abs(aligned(-3*z@q+1, z)-z).max() < 1e-9
    noise = [linear_cka(z, z+s*rng.normal(size=z.shape)) for s in (.1, 1, 10)]; assert noise[0] > .99 > noise[1] > noise[2]
    assert neighbour_overlap(z, rng.normal(size=z.shape)) < .06      # chance is 10 of 399

@pytest.mark.parametrize("z", [np.zeros((50, 3)), np.ones((50, 1)), np.arange(50.)[:, None], np.random.default_rng(0).normal(size=(2, 4)), np.random.default_rng(0).normal(size=(50, 64)), np.full((50, 2), np.nan)], ids=range(6))
def test_any_snapshots_make_a_figure(z, tmp_path):
    s = Snapshots(); s.add(1, z+.0*z); s.add(2, z*2); fig = drift_figure(s); assert fig.data or said(fig)
    s.save(tmp_path/"snapshots.npz"); assert Snapshots.load(tmp_path).updates == [1, 2] and json.loads(fig.to_json())

def test_snapshots_stay_few_and_keep_the_ends():
    s = Snapshots(limit=7)
    for u in range(100): s.add(u, np.full((3, 2), u)); assert len(s) <= 7 and s.updates[-1] == u and s.updates[0] == 0 and s.z[-1][0, 0] == u
    assert s.updates == sorted(set(s.updates))

# ---------------------------------------------------------------- the monitor
def test_a_watched_training_is_the_same_training(store, tmp_path):
    cfg = preset("tiny", "transformer").replace(stage1__updates=60, lam__dropout=.2)                    # dropout: draws random numbers, and is off while one looks
    train_stage1(store, cfg, tmp_path/"plain", quiet=True, threads=1)
    m = TrainingMonitor(store, cfg, tmp_path/"watched"); m.view(); m.start(threads=1); m.job.wait()
    assert m.state == "done" and all(Run(tmp_path/"plain").weights_digest(w) == Run(tmp_path/"watched").weights_digest(w) for w in ("lam", "decoder"))
    assert len(m.curves["stage1", "probe_r2"].x) >= 20 and m._live is m._saver is m._held is None; m.close()

def test_pause_stop_checkpoint_resume(store, tmp_path):
    m = TrainingMonitor(store, CFG.replace(stage1__updates=400), tmp_path/"r"); m.start(threads=1, save_seconds=1e9); until(lambda: m.update > 5); m.pause(); until(lambda: m.state == "paused")
    at = m.update; m.checkpoint(); until(lambda: "checkpoint" in m.note); assert m.note.endswith(str(at)) and list((tmp_path/"r").glob(f"state/stage1-{at:09d}"))
    m.start(); assert "running already" in m.message and m.state == "paused"; time.sleep(.4); assert m.update == at
    m.pause(); until(lambda: m.update > at+20)
    m.stop(30); assert m.state == "stopped" and at < m.update < 400 and not Run(tmp_path/"r").weights(); stopped = m.update
    other = TrainingMonitor(); other.start(store, CFG.replace(stage1__updates=400), tmp_path/"r", threads=1); other.job.wait()
    assert other.state == "done" and other.update == 400 and other.snapshots.updates[0] <= stopped and min(other.curves["stage1", "recon_loss"].x) < stopped   # history and snapshots go on
    m.close(); other.close()

def test_a_pause_is_no_part_of_the_speed():
    m = TrainingMonitor(); m.on_start(0, 1000); m.on_log({"stage": "s", "update": 100, "loss": 1.}); m._go.clear(); threading.Timer(1., m._go.set).start()
    m.on_update(100); assert m.state == "training"; m.on_log({"stage": "s", "update": 200, "loss": 1.}); assert m.rate > 400 and m.left_s < 2     # 200 updates in no time, and one second of waiting
    m.on_end(); m.close()

def test_stop_while_paused_and_at_once(store, tmp_path):
    m = TrainingMonitor(store, CFG.replace(stage1__updates=50_000), tmp_path/"r"); m.start(threads=1); m.stop(30); assert m.state == "stopped"
    m.start(threads=1); until(lambda: m.update > 3); m.pause(); until(lambda: m.state == "paused"); m.stop(30); assert m.state == "stopped" and not m.job._thread.is_alive(); m.close()

def test_closing_leaves_the_training_alone_unless_asked(store, tmp_path):
    m = TrainingMonitor(store, CFG, tmp_path/"goes-on"); m.view(); m.start(threads=1); until(lambda: m.update > 3); m.pause(); until(lambda: m.state == "paused"); m.close(); m.job.wait()
    assert Run(tmp_path/"goes-on").finished("lam", "decoder")
    m = TrainingMonitor(store, CFG.replace(stage1__updates=50_000), tmp_path/"ends"); m.view(); m.start(threads=1); until(lambda: m.update > 3); t = m.job._thread; m.close(stop=True); assert not t.is_alive() and m.state == "stopped"
    assert list((tmp_path/"ends").glob("state/*")), "its state was not saved"

def test_a_fault_of_the_look_never_ends_a_training(store, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingMonitor, "_batch", lambda self: 1/0)
    m = TrainingMonitor(store, CFG, tmp_path/"r"); m.start(threads=1); m.job.wait(); assert m.state == "done" and "no probe" in m.note and said(m.drift()); m.close()

def test_a_fault_of_the_drawing_never_ends_a_training(store, tmp_path, monkeypatch):
    m = TrainingMonitor(store, CFG, tmp_path/"r", hz=1e9); m.view(); monkeypatch.setattr(m, "_fill", lambda fig: 1/0); m.start(threads=1); m.job.wait(); assert m.state == "done" and m.note == "not drawn: division by zero" and m.draws == 0
    m.close(); monkeypatch.undo()
    for what in ("_fill", "_refresh"): # closed by another thread while it draws
        m = TrainingMonitor(store, CFG, tmp_path/what, hz=1e9); m.view(); monkeypatch.setattr(m, what, lambda *a: (m.close(), 1/0)); m.start(threads=1); m.job.wait(); assert m.state == "done" and m.note == ""; monkeypatch.undo()

def test_a_training_without_actions_or_model_is_watched_too(store, tmp_path):
    from clam.train.baselines import train_method
    m = TrainingMonitor(); train_method("bc-al", store, CFG.replace(bc__updates=60), tmp_path/"bc", callbacks=[m], quiet=True, threads=1)
    assert m.state == "done" and ("bc", "action_loss") in m.curves and m.note == "" and len(m.static().data) >= 2; m.close()

def test_troubles_of_a_monitor_are_sentences(store, tmp_path):
    m = TrainingMonitor(); m.view(); assert said(m.static()) == "no training metrics to show" and "two snapshots" in said(m.drift())
    for do, words in ((m.start, "nothing to train"), (m.checkpoint, "nothing is being trained"), (lambda: m.follow(tmp_path/"none"), "no run here")): do(); assert words in m.message
    with locked(tmp_path/"busy"): m.start(store, CFG, tmp_path/"busy"); until(lambda: m.state == "failed"); assert "in use by another process" in m.message
    m.start(store, CFG.replace(stage1__lam_optim__lr=1e9), tmp_path/"wild", threads=1); until(lambda: m.state in ("failed", "done")); assert m.state == "failed" and "diverged" in m.message
    m.start(store, CFG, tmp_path/"fine", threads=1); m.job.wait(); assert m.state == "done" and m.message == ""; m.close()

@pytest.mark.slow
def test_a_run_written_by_another_process_is_followed(store, tmp_path):
    code = f"from clam.config import preset; from clam.data.store import EpisodeStore; from clam.train.stage1 import train_stage1; train_stage1(EpisodeStore({str(store.path)!r}), preset('tiny').replace(stage1__updates=1500), {str(tmp_path/'r')!r}, quiet=True, threads=1)"
    other = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    try:
        until(lambda: (tmp_path/"r"/"config.json").exists()); m = TrainingMonitor(); m.view(); m.follow(tmp_path/"r", .05); until(lambda: m.update > 0 or m.state != "following")
        busy = TrainingMonitor(); busy.start(store, preset("tiny").replace(stage1__updates=1500), tmp_path/"r"); until(lambda: busy.state in ("failed", "done"))
        assert busy.state == "failed" and "in use by another process" in busy.message or other.poll() is not None
        seen = m.update; until(lambda: m.update > seen or other.poll() is not None); assert m.total == 1500 and m.message == ""
        other.wait(60); until(lambda: m.update == 1500); m.close(); busy.close(); assert m.state == "stopped"
    finally: other.kill(); other.wait()

def test_torn_and_empty_metrics(tmp_path):
    for name, text_ in (("empty", ""), ("torn", '{"stage": "stage1", "update": 10, "recon_loss": 0.5, "cheat_loss": 1.0}\n{"stage": "stage1", "up'), ("rubbish", "\x00\xff[1]\n{}\nnull\n")):
        (tmp_path/name).mkdir(); (tmp_path/name/"metrics.jsonl").write_text(text_)
    fig = overlay([tmp_path/n for n in ("empty", "torn", "rubbish", "none")]); assert [list(t.x) for t in fig.data] == [[10], [10]] and all(w in fig.layout.title.text for w in ("empty", "rubbish", "none"))
    m = TrainingMonitor(beside=[tmp_path/"torn", tmp_path/"none"]); m.on_start(0, 5); m.on_log({"stage": "s", "update": 1, "loss": float("nan")}); m.on_log({"stage": "s", "update": 2, "loss": 1.}); assert len(m.static().data) >= 2; m.on_end(); m.close()

def test_a_monitor_keeps_memory_flat():
    m = TrainingMonitor(hz=1e9); m.view(); m.on_start(0, 10**6)
    for i in range(1, 3000): m.on_log({"stage": "stage1", "update": i, "recon_loss": 1/i, "cheat_loss": .3})
    assert all(len(c.x) <= 301 for c in m.curves.values()) and len(m._fig.data) == 3 and m.draws > 100; m.on_end(); m.close()

def test_a_closed_monitor_gives_everything_back(store, tmp_path):
    def once(i):
        m = TrainingMonitor(store, CFG, tmp_path/f"r{i}"); m.view(); m.start(threads=1); m.job.wait(); m.show_drift(); r = weakref.ref(m); m.close(); m.close(); return r
    once(0); gc.collect(); n, threads = len(_instances), threading.active_count(); gone = [once(i) for i in (1, 2)]; gc.collect()
    assert [g() for g in gone] == [None]*2 and len(_instances) <= n and threading.active_count() <= threads
