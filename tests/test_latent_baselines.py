"""Pins LAPO, LAPA and DynaMo: what each may see (other actions elsewhere change no byte, other labels change only what reads labels),
labels without dropout and at their own step, losses against formulas written out, the same weights after a stop or kill -9, a few
updates on states and on pictures, agents, and that older experiments keep their digests."""
import json, multiprocessing, os, signal, time
import numpy as np, pytest, torch
from torch.nn import functional as F
from clam.config import preset
from clam.core import CheckpointError, ConfigError, seed_everything, sub_seed
from clam.data.store import Episodes, EpisodeStore, write_store
from clam.evaluate.experiments import experiment_digest, label, load_records, run_method, table_cells
from clam.evaluate.ladder import ladder
from clam.evaluate.tables import plan
from clam.models.dynamo import DynaMo, FeaturePolicy, covariance_loss, prediction_loss
from clam.testing import fake_episodes
from clam.toy import ToyWorld, toy_episodes
from clam.train import baselines
from clam.train.agents import load_agent
from clam.train.checkpoint import Run
from clam.train.latent_baselines import METHODS, code_labels, method_config, new_dynamo, new_namer, SEES, train_lapa, train_method
from clam.train.loop import Callback, Sampler, WindowData, lr_at
from clam.train.relabel import label_windows, relabel

OURS = ("lapo", "lapa", "dynamo")
PARTS = {"lapo": ["decoder", "lam", "policy"], "lapa": ["lam", "namer", "policy"], "dynamo": ["dynamo", "policy"]}
BLIND = {"lapo": ["lam", "policy"], "lapa": ["lam", "namer"], "dynamo": ["dynamo"]} # parts that no label may change

@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(n)

EPISODES = toy_episodes(60, seed=0)
def toy_store(path, episodes=EPISODES): return EpisodeStore(write_store(path, episodes, {"name": "toy", "spec": ToyWorld().spec}))
@pytest.fixture(scope="module")
def store(tmp_path_factory): return toy_store(tmp_path_factory.mktemp("data")/"toy")
SHORT = dict(stage1__updates=40, stage2__updates=30, bc__updates=30)
def config(model="mlp", **kw): return preset("tiny", model).replace(**{"split__n_expert": 8, "split__n_labelled": 8, **SHORT, **kw})
def digests(run, parts): return [run.weights_digest(w) for w in parts]

# ---------------------------------------------------------------- five updates of everything
@pytest.mark.parametrize("model", ["mlp", "transformer", "conv", "space_time"])
@pytest.mark.parametrize("method", OURS)
def test_five_updates_on_fakes(tmp_path, method, model):
    side = 16 if model in ("conv", "space_time") else 0
    data = EpisodeStore(write_store(tmp_path/"fakes", fake_episodes(20, T=10, frames=side)))
    cfg = config(model, split__n_expert=2, split__n_labelled=2, split__return_fraction=.9, stage1__updates=5, stage2__updates=5, bc__updates=5, stage1__batch=8, stage2__batch=8, bc__batch=8)
    run = train_method(method, data, cfg, tmp_path/"r", quiet=True)
    assert sorted(run.weights()) == PARTS[method] and run.method == method
    a, z = load_agent(run).act(data[0].frames[:3] if side else data.obs[:3])
    assert a.shape == (3, 2) and np.abs(a).max() <= 1 and (z is None) == (method != "lapo") and (z is None or z.shape == (3, 128))

def test_all_methods_are_known():
    assert set(METHODS) == {*baselines.METHODS, *OURS}
    with pytest.raises(ConfigError, match="lapa"): train_method("gail", None, None, None)

# ---------------------------------------------------------------- who sees what
def poisoned(path, spare): # the same dataset with other actions in all episodes but `spare`
    rng = np.random.default_rng(9)
    return toy_store(path, [e if i in spare else e.replace(act=rng.uniform(-1, 1, e.act.shape).astype(np.float32)) for i, e in enumerate(EPISODES)])

@pytest.mark.parametrize("method", OURS)
def test_only_labelled_actions_matter(store, tmp_path, method):
    cfg = config(stage2__decoded_weight=1.)                                # CLAM's way of letting labels into the second stage must be off
    run = train_method(method, store, cfg, tmp_path/"a", quiet=True); labelled = set(run.splits.labelled.tolist())
    other = train_method(method, poisoned(tmp_path/"others", labelled), cfg, tmp_path/"b", quiet=True)
    assert other.splits.labelled.tolist() == run.splits.labelled.tolist() and other.splits.expert.tolist() == run.splits.expert.tolist()
    assert digests(other, PARTS[method]) == digests(run, PARTS[method])
    wrong = train_method(method, poisoned(tmp_path/"labels", set(range(60))-labelled), cfg, tmp_path/"c", quiet=True)
    assert digests(wrong, BLIND[method]) == digests(run, BLIND[method])
    assert all(wrong.weights_digest(w) != run.weights_digest(w) for w in PARTS[method] if w not in BLIND[method])

@pytest.mark.parametrize("method", OURS)
def test_reads_of_actions_are_of_labelled_episodes(store, tmp_path, method, monkeypatch):
    reads, original = [], Episodes.act.fget
    monkeypatch.setattr(Episodes, "act", property(lambda self: (reads.append(set(self.index.tolist())), original(self))[1]))
    run = train_method(method, store, config(), tmp_path/"a", quiet=True)
    assert reads and all(r <= set(run.splits.labelled.tolist()) for r in reads)

def test_the_comparison_would_see_a_peep(store, tmp_path): # it catches a method that does read the experts' actions
    run = train_method("bc-expert", store, config(), tmp_path/"a", quiet=True)
    other = train_method("bc-expert", poisoned(tmp_path/"data", set(run.splits.labelled.tolist())), config(), tmp_path/"b", quiet=True)
    assert digests(other, ["policy"]) != digests(run, ["policy"])

@pytest.mark.parametrize("images", [False, True], ids=["states", "pictures"])
@pytest.mark.parametrize("method", METHODS)
def test_every_access_is_one_that_the_notebook_names(tmp_path, method, images, monkeypatch):
    "Which field of which episodes is read, from the first batch to the last, against `SEES`; without scaling, which reads the unlabelled states for all methods."
    data = EpisodeStore(write_store(tmp_path/"fakes", fake_episodes(20, T=10, frames=16)))
    few = {f"{r}__{k}": v for r in ("stage1", "stage2", "bc", "idm") for k, v in (("updates", 3), ("batch", 8))}
    cfg = config("conv" if images else "mlp", standardise=False, split__n_expert=2, split__n_labelled=3, split__return_fraction=.9, split__heldout_fraction=.2, **few)
    reads, original = [], Episodes._column
    monkeypatch.setattr(Episodes, "_column", lambda self, n: (reads.append((n, frozenset(self.index.tolist()))), original(self, n))[1])
    run = train_method(method, data, cfg, tmp_path/"r", quiet=True); sets = {n: frozenset(getattr(run.splits, n).tolist()) for n in ("unlabelled", "expert", "labelled")}
    seen = {(n, e) for n, e in reads if n in ("obs", "frames", "act", "z", "state", "mask")}; kind = "frames" if images else "obs"
    assert seen == {(kind, sets[s]) for s in SEES[method]["observations"]} | {("act", sets[s]) for s in SEES[method]["actions"]}
    assert not any(e & set(run.splits.heldout.tolist()) for _, e in seen) and len(sets["labelled"] | sets["expert"]) == 5

@pytest.mark.parametrize("method", OURS)
def test_only_labelled_actions_matter_on_pictures(tmp_path, method):
    eps, rng = fake_episodes(20, T=10, frames=16), np.random.default_rng(0)
    cfg = config("conv", split__n_expert=2, split__n_labelled=2, split__return_fraction=.9, stage1__updates=3, stage2__updates=3, bc__updates=3, stage1__batch=8, stage2__batch=8, bc__batch=8)
    run = train_method(method, EpisodeStore(write_store(tmp_path/"a", eps)), cfg, tmp_path/"ra", quiet=True); spare = set(run.splits.labelled.tolist())
    other = [e if i in spare else e.replace(act=rng.uniform(-1, 1, e.act.shape).astype(np.float32)) for i, e in enumerate(eps)]
    assert digests(train_method(method, EpisodeStore(write_store(tmp_path/"b", other)), cfg, tmp_path/"rb", quiet=True), PARTS[method]) == digests(run, PARTS[method])

# ---------------------------------------------------------------- LAPO
def test_lapo_reads_latents_before_quantisation(store, tmp_path):
    run = train_method("lapo", store, config(), tmp_path/"r", quiet=True); lam = run.lam(); experts = run.splits.expert_view(store)
    win = WindowData(experts, run.normaliser).windows(torch.arange(50))
    with torch.no_grad(): raw, quantised = lam.idm(win, None)[:, -1], lam.encode(win)[:, -1]
    z = torch.from_numpy(np.concatenate(relabel(run, experts))[:50])
    assert torch.allclose(z, raw, atol=1e-6) and not torch.allclose(raw, quantised, atol=1e-3)
    assert run.config.stage2.decoded_weight == 0 and not run.config.stage1.joint

def test_lapo_decodes_iid_actions_at_their_own_step(tmp_path): # iid actions: one step off and nothing could be learned
    data = EpisodeStore(write_store(tmp_path/"fakes", fake_episodes(120, T=20)))
    cfg = preset("tiny").replace(split__n_expert=8, split__n_labelled=20, split__return_fraction=.9, stage1__updates=400, stage2__updates=5)
    run = train_method("lapo", data, cfg, tmp_path/"r", quiet=True); held, lam, dec = run.splits.heldout_with_actions(data), run.lam(), run.decoder()
    act = label_windows(lam, lambda w, t: dec(lam.label(w, t)), WindowData(held, run.normaliser))
    r2 = lambda a, b: 1-((a-b)**2).sum()/((b-b.mean(0))**2).sum()
    assert r2(act, held.act) > .6 and r2(act[:-1], held.act[1:]) < .1 and r2(act[1:], held.act[:-1]) < .1

# ---------------------------------------------------------------- LAPA
@pytest.mark.parametrize("kind, Z, n, codes", [("vq-repo", 8, 1, 128), ("vq-lapo", 16, 8, 64), ("fsq", 8, 1, 1000), ("residual", 8, 2, 128)])
def test_codes_of_every_quantiser(store, tmp_path, kind, Z, n, codes):
    run = train_method("lapa", store, config(lam__quantise=kind, lam__latent_dim=Z, stage1__updates=10, stage2__updates=5, bc__updates=5), tmp_path/"r", quiet=True)
    c = code_labels(run.lam(), WindowData(run.splits.expert_view(store), run.normaliser))
    assert c.shape == (8*40, n) and c.dtype == np.int64 and 0 <= c.min() and c.max() < codes and new_namer(run)[-1].out_features == n*codes

class StopAt(Callback):
    def __init__(self, at): self.left = at
    def on_update(self, i): self.left -= 1; return self.left == 0

def test_codes_leave_dropout_behind(store, tmp_path):
    run = train_method("lapa", store, config("transformer", lam__dropout=.5, lam__quantise="fsq"), tmp_path/"r", [StopAt(50)], quiet=True)
    lam, d = run.lam(), WindowData(run.splits.expert_view(store), run.normaliser); a = code_labels(lam.train(), d)
    assert lam.training and (a == code_labels(lam.eval(), d)).all()
    with torch.no_grad(): noisy = lam.quantiser(lam.train()._idm(d.windows(torch.arange(len(d))), d.t, None)).codes[:, -1].numpy()
    assert (noisy != a).mean() > .02                                       # what labelling in train mode would do

def test_codes_belong_to_their_own_step(store, tmp_path):
    run = train_method("lapa", store, config(stage2__updates=600), tmp_path/"r", quiet=True); experts = run.splits.expert_view(store)
    d = WindowData(experts, run.normaliser); c = torch.from_numpy(code_labels(run.lam(), d))[:, 0]; namer = run._load("namer", new_namer(run), "cpu")
    with torch.no_grad(): logits = namer(d.current())
    cost = lambda a, b: F.cross_entropy(a, b).item()
    assert cost(logits, c) < cost(logits[:-1], c[1:]) and cost(logits, c) < cost(logits[1:], c[:-1])

def test_lapa_keeps_the_body_and_replaces_the_head(store, tmp_path):
    still = config(); still = still.replace(bc__optim=type(still.bc.optim)(lr=1e-12))
    run = train_method("lapa", store, still, tmp_path/"r", quiet=True); body, policy = run._load("namer", new_namer(run), "cpu"), run.policy().net
    for a, b in zip(body[:-1].parameters(), policy[:-1].parameters()): assert torch.allclose(a, b, atol=1e-6)
    assert body[-1].out_features == 128 and policy[-1].out_features == 2
    tuned = train_method("lapa", store, config(), tmp_path/"t", quiet=True).policy().net
    assert all((a-b).abs().max() > 1e-4 for a, b in zip(policy.parameters(), tuned.parameters()))   # everything below the head moves too

# ---------------------------------------------------------------- DynaMo
def test_losses_as_written_out():
    g = torch.Generator().manual_seed(0); h, pred = torch.randn(33, 2, 7, generator=g), torch.randn(33, 7, generator=g)
    cos = [np.dot(p, q)/np.linalg.norm(p)/np.linalg.norm(q) for p, q in zip(pred.numpy(), h[:, 1].numpy())]
    assert abs(prediction_loss(pred, h)-(1-np.mean(cos))) < 1e-5
    x = h.numpy().reshape(-1, 7); x = x-x.mean(0); c = x.T@x/(len(x)-1)
    assert abs(covariance_loss(h)-np.mean([c[i, j]**2 for i in range(7) for j in range(7) if i != j])) < 1e-5

def test_same_weights_as_a_plain_loop(store, tmp_path):
    cfg = config(stage1__updates=12); s1 = cfg.stage1; run = train_method("dynamo", store, cfg, tmp_path/"r", quiet=True)
    with seed_everything(sub_seed(0, "dynamo")): net = new_dynamo(run)
    pairs = torch.tensor(np.concatenate([np.stack([run.normaliser.apply(store[int(e)].obs[i:i+2]) for i in range(40)]) for e in run.splits.unlabelled]))
    draw = Sampler(len(pairs), s1.batch, sub_seed(0, "dynamo")); o = s1.lam_optim
    adam = torch.optim.AdamW(net.parameters(), lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay, foreach=False, fused=False)
    for i in range(12):
        w = pairs[draw.next()]; a, b = net.encoder(w[:, 0]), net.encoder(w[:, 1])
        z = net.dynamics.idm.net(torch.cat([a, b], -1)); guess = net.dynamics.fdm.net(torch.cat([a, z], -1))
        x = torch.stack([a, b], 1).reshape(-1, a.shape[1]); x = x-x.mean(0); c = x.T@x/(len(x)-1); D = len(c)
        loss = (1-(guess*b.detach()).sum(-1)/guess.norm(dim=-1)/b.detach().norm(dim=-1)).mean() + .04*(c.square().sum()-c.diagonal().square().sum())/(D*(D-1))
        adam.zero_grad(); loss.backward(); torch.nn.utils.clip_grad_norm_(net.parameters(), o.clip); adam.param_groups[0]["lr"] = lr_at(o, i, 12); adam.step()
    got = run._load("dynamo", new_dynamo(run), "cpu").state_dict()
    for k, v in net.state_dict().items(): assert torch.allclose(got[k], v, atol=2e-5), (k, float((got[k]-v).abs().max()))

@pytest.mark.parametrize("model", ["mlp", "transformer"])
def test_the_prediction_sees_the_next_observation_only_through_z(model):
    cfg = preset("tiny", model)
    with seed_everything(0): net = DynaMo(6, cfg.lam, cfg.policy).eval(); w = torch.randn(4, 2, 6)
    t = torch.zeros(4, dtype=torch.long)
    with torch.no_grad():
        h, pred = net(w, t); z = net.dynamics.encode(h, t)
        assert torch.equal(net.dynamics.predict(h[:, :1], z, t)[:, -1], pred)               # o_t and z are all there is
        other = w.clone(); other[:, 1] += 1; assert not torch.allclose(net(other, t)[1], pred) # and z does tell of o_{t+1}

def test_the_encoder_of_the_policy_is_frozen(store, tmp_path):
    run = train_method("dynamo", store, config(bc__updates=200), tmp_path/"r", quiet=True); policy, net = run.policy(), run._load("dynamo", new_dynamo(run), "cpu")
    assert isinstance(policy, FeaturePolicy) and all(torch.equal(a, b) for a, b in zip(policy.encoder.parameters(), net.encoder.parameters()))
    losses = [m["action_loss"] for m in run.metrics("bc")]; assert np.mean(losses[-10:]) < .9*np.mean(losses[:10])

# ---------------------------------------------------------------- stop, kill, resume
@pytest.mark.parametrize("method", OURS)
def test_resume_in_any_stage(store, tmp_path, method):
    whole = train_method(method, store, config(), tmp_path/"whole", quiet=True)
    for n in range(20):
        parts = train_method(method, store, config(), tmp_path/"parts", [StopAt(17)], resume=True, quiet=True)
        if parts.finished("policy"): break
    assert n >= 3 and parts.weights() == whole.weights() and digests(parts, whole.weights()) == digests(whole, whole.weights())
    assert not list((parts.path/"state").iterdir())
    with pytest.raises(CheckpointError, match="another configuration"): train_method(method, store, config(stage1__updates=41), tmp_path/"parts", resume=True)

class Tell(Callback): # leaves a file when training has begun
    def __init__(self, flag): self.flag = flag
    def on_update(self, i): self.flag.touch(); time.sleep(.01)

def victim(data, path, flag):
    torch.set_num_threads(1); train_lapa(EpisodeStore(data), config(), path, [Tell(flag)], resume=True, quiet=True, save_every=5)

def test_kill_9(store, tmp_path):
    ctx, kills = multiprocessing.get_context("forkserver"), 0; ctx.set_forkserver_preload(["clam.train.latent_baselines", "torch._dynamo"])
    whole = train_method("lapa", store, config(), tmp_path/"whole", quiet=True)
    for _ in range(30):
        (flag := tmp_path/"begun").unlink(missing_ok=True); p = ctx.Process(target=victim, args=(store.path, tmp_path/"r", flag)); p.start(); end = time.time()+60
        while not flag.exists() and p.is_alive() and time.time() < end: time.sleep(.005)
        p.join(.35 if kills < 4 else 60)
        if p.is_alive(): os.kill(p.pid, signal.SIGKILL); kills += 1; p.join()
        elif Run(tmp_path/"r").finished("policy"): break
    assert kills >= 2 and digests(Run(tmp_path/"r"), whole.weights()) == digests(whole, whole.weights())

# ---------------------------------------------------------------- protocol
def test_arms_have_names_of_their_own():
    cfg = preset("tiny"); arms = [cfg.replace(lam__quantise=q, stage1__joint=j) for q in ("none", "vq-repo") for j in (True, False)]
    assert [label("clam", c) for c in arms] == ["clam-mlp", "clam-mlp-unjoint", "clam-mlp-vq-repo", "clam-mlp-vq-repo-unjoint"]
    assert [label(m, cfg) for m in OURS] == list(OURS) and len({experiment_digest("clam", c) for c in arms}) == 4
    assert method_config("lapo", cfg) != method_config("lapa", cfg) != cfg == method_config("vpt", cfg)

def test_a_record_of_each(store, tmp_path):
    for m in OURS:
        r = run_method(m, store, config(eval__episodes=4, eval__videos=0, eval__workers=1), tmp_path/m, quiet=True, threads=1)
        assert r["label"] == m and len(r["successes"]) == 4 and ("decoded" in r["diagnostics"]) == (m == "lapo") and ("recon" in r["diagnostics"]) == (m != "dynamo")
        json.dumps(r)

def test_the_ladder_climbs_lapo_as_it_climbs_clam(store, tmp_path):
    run = train_method("lapo", store, config(split__heldout_fraction=.2), tmp_path/"r", quiet=True)
    assert [r.name for r in ladder(run, store, episodes=2, quiet=True).rungs] == ["expert", "decoded", "replay", "all_labels", "policy"]

def test_older_experiments_keep_their_digests():
    stored = {(r["label"], r["env"]): r for r in load_records("table5-quick") if r["seed"] == 0}
    mine = {(label(c.method, c.cfg), c.env): c for c in plan(5, labels=("bc-al", "vpt", "clam-mlp", "clam-transformer", "bc-expert"))}
    assert len(stored.keys() & mine.keys()) >= 15
    for k in stored.keys() & mine.keys(): assert (stored[k]["experiment"], stored[k]["config_digest"]) == (experiment_digest(mine[k].method, mine[k].cfg), mine[k].cfg.digest)

def test_the_toy_table():
    cells = {name: p for (name, _), p in table_cells(load_records("toy-methods")).items()}
    assert set(cells) == {"clam-mlp", "clam-mlp-unjoint", "clam-mlp-vq-repo", "clam-mlp-vq-repo-unjoint", "bc-al", "bc-expert", "vpt", *OURS}
    assert all(len(p.seeds) == 3 and p.interval.n == 150 for p in cells.values())
    rate = {k: p.interval.mean for k, p in cells.items()}
    assert rate["clam-mlp"] > .9 > rate["clam-mlp-unjoint"] and max(rate[m] for m in ("bc-al", "lapa", "dynamo")) < .5
