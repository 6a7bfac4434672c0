"""Pins what training does: the same weights as a plain re-implementation of Algorithm 1, bfloat16 close to float32, where each loss's
gradient goes, who sees which actions (with poisoned actions everywhere else), alignment proved on iid actions, deterministic
relabelling, no waiting for numbers inside the loop, stopping from another thread, and agents that act as their networks say."""
import threading, time
import numpy as np, pytest, torch
from torch.nn import functional as F
from clam.config import OptimConfig, RegressionConfig, preset
from clam.core import seed_everything, sub_seed
from clam.data.store import Episodes, EpisodeStore, write_store
from clam.testing import fake_episodes
from clam.toy import ToyWorld, toy_episodes
from clam.train.agents import load_agent
from clam.train.baselines import METHODS, train_method
from clam.train.checkpoint import Run
from clam.train.loop import Callback, Optimiser, Sampler, WindowData, lr_at, precision, regression, run_loop
from clam.train.losses import grad_norm
from clam.train.relabel import label_windows, relabel
from clam.train.stage1 import JointStep, train_stage1

@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(n)

EPISODES = toy_episodes(60, seed=0)
def toy_store(path, episodes=EPISODES): return EpisodeStore(write_store(path, episodes, {"name": "toy", "spec": ToyWorld().spec}))
@pytest.fixture(scope="module")
def store(tmp_path_factory): return toy_store(tmp_path_factory.mktemp("data")/"toy")
def config(model="mlp", **kw): return preset("tiny", model).replace(split__n_expert=8, split__n_labelled=8, **kw)
SHORT = dict(stage1__updates=40, stage2__updates=30, bc__updates=30, idm__updates=30)

def joint(store, path, cfg, **kw): # a run and its JointStep, as train_stage1 makes them
    run = Run(path)
    with run.locked(): run.begin(store, cfg, "clam", resume=True)
    u, l = (WindowData(v, run.normaliser, cfg.lam.n_extra_context) for v in (run.splits.unlabelled_view(store), run.splits.labelled_view(store)))
    with seed_everything(sub_seed(cfg.seed, "lam")): lam, dec = run.new_lam(), run.new_decoder()
    return run, JointStep(lam.train(), dec.train(), u, l, cfg.stage1, cfg.seed, **kw)

# ---------------------------------------------------------------- against a plain loop
def windows_by_hand(store, episodes, norm): # windows, actions of these episodes, one by one
    W, A = [], []
    for e in episodes:
        ep = store[int(e)]
        for t in range(len(ep)):
            W.append(norm.apply(np.stack([ep.obs[max(t-1, 0)], ep.obs[t], ep.obs[t+1]]))); A.append(ep.act[t])
    return torch.tensor(np.array(W)), torch.tensor(np.array(A))

@pytest.mark.parametrize("model", ["mlp", "transformer"])
def test_same_weights_as_a_plain_loop(store, tmp_path, model):
    cfg = config(model, stage1__updates=30, stage1__decoder_every=3, stage1__beta=.7, stage1__recon_weight=1.3); s1 = cfg.stage1
    run, step = joint(store, tmp_path/"r", cfg)
    with seed_everything(sub_seed(cfg.seed, "lam")): lam, dec = run.new_lam(), run.new_decoder()
    U, _ = windows_by_hand(store, run.splits.unlabelled, run.normaliser); L, A = windows_by_hand(store, run.splits.labelled, run.normaliser)
    draw, draw_l = Sampler(len(U), s1.batch, sub_seed(cfg.seed, "unlabelled")), Sampler(len(L), s1.labelled_batch, sub_seed(cfg.seed, "labelled"))
    adam = lambda m, o: torch.optim.AdamW(m.parameters(), lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay, foreach=False, fused=False)
    opt, opt_d = adam(lam, s1.lam_optim), adam(dec, s1.decoder_optim)
    for i in range(30):
        out = step(i)
        w = U[draw.next()]; pred = lam(w, torch.zeros(len(w), dtype=torch.long)).pred
        loss = 1.3*((pred-w[:, -pred.shape[1]:])**2).mean(); turn = i % 3 == 0
        assert abs(out["recon_loss"]*1.3-loss) < 1e-5
        if turn:
            j = draw_l.next(); act = ((dec(lam.idm(L[j], torch.zeros(len(j), dtype=torch.long))[:, -1])-A[j])**2).mean()
            assert abs(out["action_loss"]-act) < 1e-5; loss = loss+.7*act
        opt.zero_grad(); opt_d.zero_grad(); loss.backward()
        for o, m, c, go in ((opt, lam, s1.lam_optim, True), (opt_d, dec, s1.decoder_optim, turn)):
            if go:
                torch.nn.utils.clip_grad_norm_(m.parameters(), c.clip); o.param_groups[0]["lr"] = lr_at(c, i, 30); o.step()
    for m, n in ((step.lam, lam), (step.decoder, dec)):
        for (k, a), b in zip(m.named_parameters(), n.parameters()): assert torch.allclose(a, b, atol=2e-5), (k, float((a-b).abs().max()))

def test_bfloat16_follows_float32(store, tmp_path):
    last = {}
    for setting in ("float32", "bfloat16"):
        run = train_stage1(store, config(stage1__updates=300, stage1__autocast=setting, lam__idm_input="difference", lam__fdm_target="delta", lam__step_units=True), tmp_path/setting, quiet=True)
        m = run.metrics("stage1"); last[setting] = {k: np.mean([r[k] for r in m[-20:] if k in r]) for k in ("recon_loss", "action_loss")}
        assert all(p.dtype == torch.float32 for p in run.lam().parameters())
    for k, v in last["float32"].items(): assert abs(last["bfloat16"][k]-v) < .15*v+1e-3, (k, last)

def test_auto_precision_never_changes_weights_dtype():
    net = torch.nn.Linear(4, 4)
    with precision("auto")(): net(torch.randn(2, 4)).float().sum().backward()
    assert net.weight.grad.dtype == torch.float32

# ---------------------------------------------------------------- where gradients go
@pytest.mark.parametrize("model", ["mlp", "transformer"])
def test_action_loss_reaches_idm_and_decoder_only(store, tmp_path, model):
    _, step = joint(store, tmp_path/"r", config(model))
    act = step.ground()
    assert grad_norm(act, step.lam.idm.parameters()) > 0 and grad_norm(act, step.decoder.parameters()) > 0
    assert all(g is None for g in torch.autograd.grad(act, list(step.lam.fdm.parameters()), allow_unused=True))

def test_the_labelled_pass_does_not_run_the_fdm(store, tmp_path):
    _, step = joint(store, tmp_path/"r", config()); calls = []
    step.lam.fdm.register_forward_hook(lambda *a: calls.append(1))
    step.ground(); assert not calls
    step(0); assert len(calls) == 1

@pytest.mark.parametrize("K", [1, 2, 5])
def test_every_Kth_update_is_grounded(store, tmp_path, K):
    _, step = joint(store, tmp_path/"r", config(stage1__decoder_every=K))
    assert [i for i in range(11) if "action_loss" in step(i)] == list(range(0, 11, K))

def test_gradient_norms_are_logged_now_and_then(store, tmp_path):
    run = train_stage1(store, config(stage1__updates=80), tmp_path/"r", quiet=True)
    seen = [m for m in run.metrics() if "grad_recon" in m]
    assert 5 <= len(seen) <= 45 and all(m["grad_recon"] > 0 and m["grad_action"] > 0 for m in seen)

def test_clips_are_separate():
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2)); oa, ob = (Optimiser([p], OptimConfig(clip=1.), 10) for p in (a, b))
    (1000*a+.5*b).sum().backward(); oa.step(0); ob.step(0)
    assert abs(a.grad.item()-1) < 1e-3 and b.grad.item() == .5

# ---------------------------------------------------------------- who sees which actions
def poisoned(path, spare): # the same dataset with other actions in all episodes but `spare`
    rng = np.random.default_rng(9)
    return toy_store(path, [e if i in spare else e.replace(act=rng.uniform(-1, 1, e.act.shape).astype(np.float32)) for i, e in enumerate(EPISODES)])

@pytest.mark.parametrize("method", METHODS)
def test_only_the_allowed_actions_matter(store, tmp_path, method):
    cfg = config(**SHORT); run = train_method(method, store, cfg, tmp_path/"a", quiet=True)
    allowed = run.splits.expert if method == "bc-expert" else run.splits.labelled
    other = train_method(method, poisoned(tmp_path/"data", set(allowed.tolist())), cfg, tmp_path/"b", quiet=True)
    assert other.splits.expert.tolist() == run.splits.expert.tolist()
    assert all(run.weights_digest(w) == other.weights_digest(w) for w in run.weights())

@pytest.mark.parametrize("method", METHODS)
def test_reads_of_actions_are_of_allowed_episodes(store, tmp_path, method, monkeypatch):
    reads, original = [], Episodes.act.fget
    monkeypatch.setattr(Episodes, "act", property(lambda self: (reads.append(set(self.index.tolist())), original(self))[1]))
    run = train_method(method, store, config(**SHORT), tmp_path/"a", quiet=True)
    allowed = set((run.splits.expert if method == "bc-expert" else run.splits.labelled).tolist())
    assert reads and all(r <= allowed for r in reads)

# ---------------------------------------------------------------- alignment and determinism
@pytest.mark.parametrize("model", ["mlp", "transformer"])
def test_iid_actions_are_decoded_at_their_own_step(tmp_path, model): # iid actions: one step off and nothing could be learned
    store = EpisodeStore(write_store(tmp_path/"fakes", fake_episodes(120, T=20)))
    cfg = preset("tiny", model).replace(split__n_expert=8, split__n_labelled=20, split__return_fraction=.9, stage1__updates=400)
    run = train_stage1(store, cfg, tmp_path/"r", quiet=True); held = run.splits.heldout_with_actions(store)
    lam, dec = run.lam(), run.decoder(); d = WindowData(held, run.normaliser)
    act = label_windows(lam, lambda w, t: dec(lam.label(w, t)), d)
    r2 = lambda a, b: 1-((a-b)**2).sum()/((b-b.mean(0))**2).sum()
    assert r2(act, held.act) > .8 and r2(act[:-1], held.act[1:]) < .1 and r2(act[1:], held.act[:-1]) < .1

def test_alignment_test_finds_targets_one_step_late(tmp_path, monkeypatch): # the official MLP decoder's fault: a_{t+1} for z_t
    import clam.train.stage1 as stage1
    class Late(WindowData):
        def __init__(self, *a, **kw):
            super().__init__(*a, **kw)
            if self.act is not None: self.act = self.act.roll(-1, 0)
    store = EpisodeStore(write_store(tmp_path/"fakes", fake_episodes(60, T=20))); r2 = {}
    for name, kind in (("right", WindowData), ("late", Late)):
        monkeypatch.setattr(stage1, "WindowData", kind)
        run = train_stage1(store, preset("tiny").replace(split__n_expert=4, split__n_labelled=12, split__return_fraction=.9, stage1__updates=200), tmp_path/name, quiet=True)
        held, lam, dec = run.splits.heldout_with_actions(store), run.lam(), run.decoder(); act = label_windows(lam, lambda w, t: dec(lam.label(w, t)), WindowData(held, run.normaliser))
        r2[name] = 1-((act-held.act)**2).sum()/((held.act-held.act.mean(0))**2).sum()
    assert r2["right"] > .6 and r2["late"] < .1, r2

def test_same_seed_same_bytes_other_seed_other_bytes(store, tmp_path):
    digest = lambda seed, name: train_method("clam", store, config(**SHORT, seed=seed), tmp_path/name, quiet=True).weights_digest("policy")
    assert digest(0, "a") == digest(0, "b") != digest(1, "c")

def test_relabelling_leaves_dropout_behind(store, tmp_path):
    run = train_stage1(store, config("transformer", lam__dropout=.5, stage1__updates=10), tmp_path/"r", quiet=True)
    view = run.splits.expert_view(store); a = relabel(run, view)
    for f in (run.path/"latents").iterdir(): f.unlink()
    assert all((x == y).all() for x, y in zip(a, relabel(run, view)))
    lam = run.new_lam().train(); label_windows(lam, lam.label, WindowData(view, run.normaliser)); assert lam.training
    lam.eval(); label_windows(lam, lam.label, WindowData(view, run.normaliser)); assert not lam.training
    with pytest.raises(ZeroDivisionError): label_windows(lam.train(), lambda w, t: 1/0, WindowData(view, run.normaliser))
    assert lam.training                                                   # put back even after an error

def test_stage2_targets_are_the_labels_of_the_same_step(store, tmp_path):
    run = train_method("clam", store, config(stage1__updates=100, stage2__updates=600), tmp_path/"r", quiet=True)
    view = run.splits.expert_view(store); z = np.concatenate(relabel(run, view)); o = WindowData(view, run.normaliser, 0).current()
    pred = run.policy()(o).numpy(); err = lambda a, b: ((a-b)**2).mean()
    assert err(pred, z) < err(pred[1:], z[:-1]) and err(pred, z) < err(pred[:-1], z[1:]) and err(pred, z) < .5*z.var()

# ---------------------------------------------------------------- the loop
def test_no_number_is_waited_for_between_logs(store, tmp_path, monkeypatch):
    _, step = joint(store, tmp_path/"r", config(), grad_every=10**9); step(0); calls = []
    for name in ("item", "__float__", "__bool__", "tolist", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, _o=original, _n=name, **kw: (calls.append(_n), _o(self, *a, **kw))[1])
    for i in range(1, 9): step(i)
    assert not calls

def test_stop_and_pause_from_another_thread(store, tmp_path):
    stop, gate, begun = threading.Event(), threading.Event(), threading.Event(); gate.set(); done = []
    class Gate(Callback):
        def on_update(self, i): done.append(i); begun.set(); gate.wait(20); time.sleep(.001)
    out = []
    t = threading.Thread(target=lambda: out.append(train_stage1(store, config(stage1__updates=100_000), tmp_path/"r", [Gate()], stop=stop, quiet=True))); t.start()
    assert begun.wait(30); gate.clear(); time.sleep(.2); n = len(done); time.sleep(.2); assert len(done) == n     # paused
    gate.set(); time.sleep(.1); stop.set(); t.join(30); assert not t.is_alive() and len(done) > n
    assert not out[0].finished("lam") and out[0].states("stage1")[0].name.endswith(f"{len(done):09d}")

def test_metrics_have_what_a_plot_needs(store, tmp_path):
    run = train_method("clam", store, config(**SHORT), tmp_path/"r", quiet=True, log_every=10); m = run.metrics()
    assert [(r["stage"], r["update"]) for r in m] == [("stage1", u) for u in (10, 20, 30, 40)]+[("stage2", u) for u in (10, 20, 30)]
    assert {"recon_loss", "cheat_loss", "action_loss", "lr", "updates_per_second"} <= m[0].keys() and {"latent_loss", "lr"} <= m[-1].keys()

def test_disjoint_training_leaves_the_lam_alone(store, tmp_path):
    a = train_stage1(store, config(stage1__updates=60, stage1__beta=0.), tmp_path/"a", quiet=True)
    b = train_stage1(store, config(stage1__updates=60, stage1__joint=False), tmp_path/"b", quiet=True)
    assert a.weights_digest("lam") == b.weights_digest("lam") and a.weights_digest("decoder") != b.weights_digest("decoder")

@pytest.mark.parametrize("rows", [1, 3])
def test_batches_larger_than_the_data(rows): # drawn with replacement
    x, y = torch.randn(rows, 2), torch.randn(rows, 1)
    state, step = regression(torch.nn.Linear(2, 1), lambda i: ((x[i],), y[i]), rows, RegressionConfig(updates=5, batch=64), 0)
    assert run_loop(step, state, 5).step == 5

# ---------------------------------------------------------------- agents
@pytest.mark.parametrize("method", METHODS)
def test_agents(store, tmp_path, method):
    run = train_method(method, store, config(**SHORT), tmp_path/"r", quiet=True); agent = load_agent(str(run.path)); obs = np.array(store.obs[:7])
    before = obs.copy(); A, Z = agent.act(obs); assert (obs == before).all()
    assert A.shape == (7, 2) and A.dtype == np.float32 and np.abs(A).max() <= 1 and (Z is not None) == (method == "clam")
    x = torch.from_numpy(run.normaliser.apply(obs)); out = run.policy()(x); want = run.decoder()(out) if method == "clam" else out
    assert np.allclose(A, want, atol=1e-6)
    for i in range(7): assert np.allclose(agent.act(obs[i])[0], A[i], atol=1e-5)
    assert np.allclose(agent.act(obs.astype(np.float64)[0])[0], A[0], atol=1e-5)
