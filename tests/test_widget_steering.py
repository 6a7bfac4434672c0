"""Pins the reconstruction and steering panels without a browser: their numbers are those of the health report and of the simulator,
planted faults are seen, and no data, model or absence of one puts a traceback over the picture or leaves a model behind."""
import contextlib, gc, math, time, weakref
import numpy as np, pytest, torch
from ipywidgets.widgets.widget import _instances
from clam.core import ClamError, Episode
from clam.evaluate.inspection import inspect_episodes
from clam.testing import fake_episodes
from clam.toy import linear_lam, physics, toy_episodes
from clam.widgets.base import Selection
from clam.widgets.plots import Nothing, said
from clam.widgets import reconstruction as R, steering as S

EPS = toy_episodes(5, seed=5, skill=0.)+toy_episodes(5, seed=6, skill=1.)


def decoder(model, eps=EPS, wrong=1.):
    z = np.concatenate([model.encode(e.obs[:-1], e.obs[1:]) for e in eps]); D = np.linalg.lstsq(np.c_[z, np.ones(len(z))], np.concatenate([e.act for e in eps]), rcond=None)[0]
    return lambda z: wrong*torch.as_tensor(np.c_[z.numpy(), np.ones(len(z))]@D)


def toy(kind="healthy", eps=EPS, env="toy", decode=True, wrong=1., **kw):
    model = linear_lam(kind)
    return inspect_episodes(model, eps, (), decoder(model, EPS, wrong) if decode else None, env_name=env, name=kind, H=0, **kw)


class Random: # a linear model with latents of any size
    def __init__(self, S, Z, scale=1.): rng = np.random.default_rng(0); self.P, self.F = scale*rng.normal(size=(S, Z)), rng.normal(size=(Z, S))/Z
    def encode(self, o, n): return (np.asarray(n, float)-o)@self.P
    def predict(self, o, z): return o+z@self.F


class Pixels: # predicts that the change of the frame is scaled by z = [1]
    def __init__(self, gain): self.gain = gain
    def eval(self): return self
    def encode(self, win, t=None): return (win[:, -1]-win[:, -2]).flatten(1)[:, None, :8].contiguous()*0+self.gain
    def predict(self, ctx, z, t=None): return ctx[:, -1:]*z[:, -1:, :1, None, None]


def settle(p):
    p.view()
    if hasattr(p, "job"):
        with contextlib.suppress(ClamError, Nothing): p.job.wait()
    assert p.latest.wait(60)
    return p


@pytest.fixture(autouse=True)
def nothing_left():
    before = len(_instances)
    yield
    for _ in range(4): # a worker may just be letting go
        if len(_instances) <= before: break
        gc.collect(); time.sleep(.05)
    assert len(_instances) <= before, "widget models were left behind"


# ---------------------------------------------------------------- reconstruction
def test_errors_by_hand():
    ins = toy("collapsed"); r = R.reconstruction(ins); unit = np.asarray(ins.subject.unit)
    miss = np.square((ins.predict(np.arange(len(ins)))-ins.next_obs)/unit); stay = np.square((ins.obs-ins.next_obs)/unit)
    assert np.allclose(r.step["cheat"], stay.mean(1)) and np.allclose(r.step["recon"], miss.mean(1), atol=1e-9)
    d = R.split(r, ins, "dimension", relative=False); assert np.allclose(d["cheat"][0], stay.mean(0), rtol=1e-4)
    t = R.split(r, ins, "step", relative=False); assert np.allclose(t["cheat"][0], [stay[ins.t == k].mean() for k in range(40)])
    e = R.split(r, ins, "episode"); assert np.allclose(e["shuffled_z"][0], [r.step["shuffled_z"][ins.episode == k].sum()/r.step["cheat"][ins.episode == k].sum() for k in range(10)])
    assert r.worst[2] == miss[:, 2].argmax()


def test_oracle_never_sees_its_own_episode(monkeypatch):
    seen = []
    monkeypatch.setattr(R, "cross_predict", lambda X, Y, episode: seen.append((np.shape(X), len(np.unique(episode)))) or np.zeros(np.shape(Y)))
    ins = toy(); m = R.oracle_misses(ins, np.arange(len(ins)))
    assert seen == [((400, 2), 10), ((400, 8), 10)]
    assert np.allclose(m["oracle_a"], ins.predict(np.arange(len(ins)), np.zeros((len(ins), 2)))-ins.next_obs, atol=1e-6)       # the guess really takes the place of z


@pytest.mark.parametrize("kind, word", [("healthy", "what z tells is the action"), ("ungrounded", "only together with o"), ("leaking", "names the place"), ("collapsed", "ignores z")])
def test_planted_faults_are_named(kind, word): ins = toy(kind); assert word in R.sentence(R.reconstruction(ins), ins)


def test_worse_than_nothing_moves():
    class Bad:
        def encode(self, o, n): return n-o
        def predict(self, o, z): return o-3*z
    ins = inspect_episodes(Bad(), EPS, H=0); assert "worse than assuming that nothing moves" in R.sentence(R.reconstruction(ins), ins)


def test_clicks_move_the_selection():
    s = Selection(); p = settle(R.ReconVsCheat(toy("ungrounded"), s)); trace = next(t for t in p.plot.data if t.name == R.NAMES["recon"])
    class At: point_inds = [4]
    for fn in trace._click_callbacks: fn(trace, At, None)
    assert p.inspection.episode[s.focus] == 4 and p.latest.wait() and f"Transition {s.focus}" in p.card.value
    At.point_inds = []; before = s.focus
    for fn in trace._click_callbacks: fn(trace, At, None)               # a click beside the points
    assert s.focus == before
    p.by = "step"; p.clicked(11); assert p.inspection.where(s.focus) == (4, 11)
    p.by = "dimension"; p.clicked(1); assert s.focus == p.recon.worst[1]
    p.close()


def test_short_episode_and_a_late_step():
    eps = [EPS[0], EPS[1].replace(obs=EPS[1].obs[:6], act=EPS[1].act[:5], reward=EPS[1].reward[:5], success=EPS[1].success[:5])]
    s = Selection(focus=42); p = R.ReconVsCheat(inspect_episodes(linear_lam(), eps, env_name="toy", H=0), s, by="step"); p.clicked(30)
    assert p.inspection.where(s.focus) == (0, 30); p.close()


def test_model_of_frames():
    film = toy_episodes(3, seed=9, T=8, frames=True); ins = R.inspect_frames(Pixels(1.), film, H=0, env_name="toy"); r = R.reconstruction(ins)
    assert np.allclose(r.step["recon"], r.step["cheat"]) and r.shape == (3, 32, 32)
    p = settle(R.ReconVsCheat(ins, Selection(focus=3))); assert p.message == "" and p.card.value.count("<img") == 5; p.by = "pixel"; assert [t.type for t in p.plot.data] == ["heatmap"]*3; p.by = "episode"; assert p.message == ""; p.close()
    white = R.heat(np.eye(4)); assert white.shape == (4, 4, 3) and white[0, 0].tolist() == [255]*3 and white[0, 1].tolist() == [0]*3
    s = settle(S.Steering(ins, Selection(focus=3))); assert s.message == "" and "no decoder" in s.w_action.value and s.w_fdm.value.count("<img") == 2; s.close()


def test_frames_are_compared_with_the_simulators_picture():
    film = toy_episodes(3, seed=9, T=8, frames=True); ins = R.inspect_frames(Pixels(1.), film, H=0, env_name="toy", decode=lambda z: torch.zeros(len(z), 2)); ins.render_size = 32
    s = S.steer(ins, 3, z=np.ones(8, np.float32)); assert s.error == pytest.approx(s.still, rel=1e-3) and s.still >= 0       # a prediction of o_t is as far off as o_t
    ins.close(); ins.render_size = 64; s = S.steer(ins, 3); assert math.isnan(s.error) and "cannot be compared" in s.why["error"]; ins.close()


# ---------------------------------------------------------------- steering
def test_simulator_is_the_exact_physics():
    ins = toy(); rng = np.random.default_rng(0)
    for n in rng.choice(len(ins), 12):
        s = S.steer(ins, int(n), ins.z[n]+rng.normal(size=2).astype(np.float32))
        assert np.allclose(s.sim.obs, physics(ins.obs[n], s.action), atol=1e-5) and np.abs(s.sim.action).max() <= 1
    ins.close()


def test_agreement_sees_a_lying_decoder():
    honest, liar = toy(), toy(wrong=-1.); n = int(np.abs(honest.act).min(1).argmax())
    a, b = S.steer(honest, n), S.steer(liar, n); assert a.error < .05 and b.error > .5 and b.error > 10*a.error
    assert "They agree." in S.agreement_html(a) and "disagree" in S.agreement_html(b); honest.close(); liar.close()


def test_principal_directions_are_orthogonal_and_reset_is_exact():
    ins = inspect_episodes(Random(6, 5), EPS, H=0); p = S.Steering(ins, Selection(focus=17), basis="principal"); start = p.z.copy()
    for k, v in ((0, 1.), (2, -2.), (0, .5)): p.move(k, v)
    c = p.axes.coordinates(p.z); c0 = p.axes.coordinates(start); assert np.allclose(c[[0, 2]], [.5, -2.], atol=1e-4) and np.allclose(c[1], c0[1], atol=1e-4)
    p.reset(); assert np.array_equal(p.z, start); p.close()


@pytest.mark.parametrize("Z", [1, 8, 9, 64])
def test_latents_of_any_size(Z):
    ins = inspect_episodes(Random(6, Z), EPS, H=0, env_name="toy", decode=lambda z: torch.tanh(z[:, :1]).repeat(1, 2)); s = Selection(focus=3); p = settle(S.Steering(ins, s))
    assert p.message == "" and len([w for w in p.sliders if w.layout.display is None]) == min(8, Z) and p.w_agree.value
    assert p.bases == [f"dimensions {k}" for k in range(0, Z, 8)]+["principal"]
    p.w_basis.value = p.bases[-2]; shown = [w for w in p.sliders if w.layout.display is None]; assert len(shown) == (Z-1) % 8+1
    before = p.z.copy(); shown[-1].value = shown[-1].max; assert p.latest.wait() and np.flatnonzero(p.z != before).tolist() == [Z-1]
    p.w_basis.value = "principal"; assert len([w for w in p.sliders if w.layout.display is None]) == min(4, Z, len(p.axes.std)); p.close(); ins.close()


def test_sliders_follow_without_changing_z():
    p = settle(S.Steering(toy(), Selection(focus=3))); far = np.array([40., -35.], np.float32); p.set_z(far, "far"); assert p.latest.wait()
    assert np.array_equal(p.z, far) and p.sliders[0].value == pytest.approx(40) and "trust nothing" in p.w_agree.value
    p.reset(); assert p.latest.wait() and np.array_equal(p.z, p.inspection.z[3]); p.close(); p.inspection.close()


def test_only_the_newest_question_is_answered():
    p = settle(S.Steering(toy(), Selection(focus=3))); asked = p.turn
    for v in np.linspace(-1, 1, 300): p.set_z([v, 0.])
    assert p.latest.wait(60) and p.outcome.z[0] == 1 and p.turn-asked < 300; p.close(); p.inspection.close()


def test_shared_pins_and_two_panels():
    ins, s = toy(), Selection(focus=3); a, b = settle(S.Steering(ins, s)), settle(R.ReconVsCheat(ins, s))
    s.pin(4); assert a.w_mix.disabled; s.pin(90); assert not a.w_mix.disabled and a.w_mix.description == "4 to 90"
    a.w_mix.value = .5; assert a.latest.wait() and np.allclose(a.z, (ins.z[4]+ins.z[90])/2, atol=1e-6)
    s.focus = 77; assert a.latest.wait() and b.latest.wait() and a.outcome.n == 77 and "Transition 77" in b.card.value and a.w_t.value == 37; a.close(); b.close(); ins.close()


BAD = {
    "one episode": lambda: toy(eps=EPS[:1]), "one transition": lambda: inspect_episodes(linear_lam(), [Episode(obs=EPS[0].obs[:2], act=EPS[0].act[:1], meta=EPS[0].meta)], env_name="toy", H=0),
    "constant latents": lambda: toy("collapsed"), "no decoder": lambda: toy(decode=False), "no simulator": lambda: toy(env=None), "unknown environment": lambda: toy(env="nowhere/at-all"),
    "no actions": lambda: toy(eps=[e.without_actions() for e in EPS]), "no seeds": lambda: toy(eps=[e.replace(meta={}) for e in EPS]),
    "another simulator": lambda: toy(eps=[e.replace(obs=e.obs+.1) for e in EPS]), "nothing moves": lambda: toy(eps=[e.replace(obs=np.repeat(e.obs[:1], 41, 0)) for e in EPS]),
    "huge latents": lambda: inspect_episodes(Random(6, 3, 1e12), EPS, H=0), "decoder of NaN": lambda: inspect_episodes(linear_lam(), EPS, H=0, env_name="toy", decode=lambda z: z*float("nan")),
    "fake data": lambda: inspect_episodes(Random(6, 2), fake_episodes(4), H=0, env_name="fake", decode=lambda z: z),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("panel", [R.ReconVsCheat, S.Steering])
def test_bad_input_is_a_sentence(what, panel):
    ins = BAD[what](); p = settle(panel(ins, Selection(focus=0)))
    assert not p.message, p.message                                                # the panel itself works; what is missing is said where it is missing
    parts = p.table.value+p.card.value if panel is R.ReconVsCheat else p.w_fdm.value+p.w_action.value+p.w_sim.value+p.w_agree.value
    assert len(parts) > 100 and "Traceback" not in parts and "nan" not in parts.replace("No", "").lower().split()
    assert p.static() is not None
    if panel is S.Steering:
        words = {"no decoder": "no decoder", "no simulator": "no simulator", "unknown environment": "nowhere", "no seeds": "cannot be replayed", "no actions": "True actions are not known", "another simulator": "left the recorded path", "nothing moves": "Nothing moves", "fake data": "broadcast", "decoder of NaN": "not finite"}
        assert words.get(what, "") in parts, parts
        p.sliders[0].value = p.sliders[0].max; assert p.latest.wait() and not p.message; assert p.sweep(0, "dimension 0").data or said(p.sweep(0, "dimension 0"))
    p.close(); ins.close()


@pytest.mark.parametrize("panel", [R.ReconVsCheat, S.Steering])
def test_no_focus_and_wrong_focus(panel):
    ins, s = toy(), Selection(); p = settle(panel(ins, s)); words = p.card.value if panel is R.ReconVsCheat else p.w_where.value
    assert "lick a point" in words and not p.message
    for n in (10**9, -1): s.focus = n; assert p.latest.wait() and "no such transition" in p.message
    s.focus = 2; assert p.latest.wait() and p.message == ""
    p.close(); ins.close()


def test_buttons_without_a_focus_say_what_to_do():
    p = settle(S.Steering(toy(), Selection()))
    for b in p.w_buttons[1:]: p.message = ""; b.click(); assert p.message, b.description
    p.w_mix.value = .5; assert "Pin two" in p.message; p.close(); p.inspection.close()


class Sick: # latents are not finite left of the middle
    def encode(self, o, n): z = linear_lam().encode(o, n); z[o[:, 0] < self.edge] = np.nan; return z
    def predict(self, o, z): return linear_lam().predict(o, z)


@pytest.mark.parametrize("panel", [R.ReconVsCheat, S.Steering])
def test_latents_that_are_not_finite(panel):
    some, all_ = Sick(), Sick(); some.edge, all_.edge = 0., np.inf; ins = inspect_episodes(some, EPS, H=0, env_name="toy"); sick = ins.obs[:, 0] < 0; assert sick.any() and not sick.all()
    p = settle(panel(ins, Selection(focus=int(sick.argmax())))); assert "not finite" in p.message; p.selection.focus = int(sick.argmin()); assert p.latest.wait() and p.message == ""; p.close()
    p = settle(panel(inspect_episodes(all_, EPS, H=0, env_name="toy"), Selection(focus=0))); assert "diverged" in p.message or "not finite" in p.message; assert p.static() is not None; p.close()


@pytest.mark.parametrize("make", [lambda i, s: R.ReconVsCheat(i, s), lambda i, s: S.Steering(i, s)])
def test_closing_stops_everything(make):
    ins, s = toy(), Selection(focus=5); p = settle(make(ins, s)); gone = weakref.ref(p)
    s.focus = 8; p.close(); p.close(); s.focus = 9; assert p.latest.wait() and p.latest._closed; del p
    gc.collect(); assert gone() is None; ins.close()


def test_curve_copies_the_model():
    from clam.config import preset
    from clam.models.lam import build_lam
    lam = build_lam(preset("tiny").lam, 6).train(); batch = (torch.randn(32, 3, 6), torch.arange(32)); torch.manual_seed(0); before = {k: v.clone() for k, v in lam.state_dict().items()}, torch.get_rng_state()
    a, b = R.recon_row(lam, batch, 3), R.recon_row(lam, batch, 3); assert a == b and a["update"] == 3 and a["recon_loss"] > 0
    assert lam.training and all(torch.equal(v, before[0][k]) for k, v in lam.state_dict().items()) and torch.equal(torch.get_rng_state(), before[1])

def test_a_handle_that_snaps_to_its_tick_moves_nothing():
    "A page reports the nearest tick of each slider as soon as it draws it; only a move of more than half a tick is the user's."
    p = settle(S.Steering(toy(), Selection(focus=3))); w = p.sliders[0]; z = p.z.copy(); now, step = p.handles()[0][2], w.step
    w.value = now+.49*step; assert np.array_equal(p.z, z)
    w.value = now+1.2*step; assert not np.array_equal(p.z, z) and abs(p.handles()[0][2]-(now+1.2*step)) < 1e-5
    p.close()
