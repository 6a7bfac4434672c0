"""The options beyond the paper: off by default and absent from digests, each trained for five updates on fakes and to the end on the toy,
gradients where they belong; and the parts whose numbers were not compared before, against plain formulas with gradients: heads,
DynaMo, Gaussian latents and the straight-through step of every quantiser."""
import numpy as np, pytest, torch
from torch.nn import functional as F
from clam.config import HeadConfig, LAMConfig, Stage1Config, Stage2Config, identity, preset
from clam.core import ConfigError, seed_everything
from clam.data.store import EpisodeStore, write_store
from clam.models.dynamo import DynaMo
from clam.models.heads import ActionDecoder, BCPolicy, LatentPolicy
from clam.models.lam import ActionIDM, build_lam
from clam.testing import fake_episodes
from clam.toy import ToyWorld, toy_episodes
from clam.train.agents import load_agent
from clam.train.baselines import train_method

OPTIONS = {"gaussian": dict(lam__gaussian=True), "k-step": dict(stage1__predict_steps=3), "horizon": dict(stage1__horizon=3), "features": dict(stage1__feature_weight=1.),
    "reversal": dict(stage1__reversal_weight=.1), "additivity": dict(stage1__additivity_weight=.1), "chunk": dict(stage2__chunk=3), "flow": dict(stage2__flow_steps=4)}
FEW = dict(stage1__updates=5, stage2__updates=5, stage1__batch=8, stage1__labelled_batch=8, stage2__batch=8)

@pytest.fixture(scope="module")
def store(tmp_path_factory): return EpisodeStore(write_store(tmp_path_factory.mktemp("s")/"toy", toy_episodes(150, seed=0), {"name": "toy", "spec": ToyWorld().spec}))

@pytest.fixture(scope="module")
def films(tmp_path_factory): return EpisodeStore(write_store(tmp_path_factory.mktemp("f")/"films", fake_episodes(12, T=8, frames=16)))

def test_off_by_default_and_absent_from_digests():
    for p in ("tiny", "quick", "repo", "paper"):
        seen = identity(preset(p)); names = {*seen["lam"], *seen["stage1"], *seen["stage2"]}
        assert not names & {k.split("__")[1] for kw in OPTIONS.values() for k in kw} and "kl_weight" not in names
    for kw in OPTIONS.values(): assert preset("tiny").replace(**kw).digest != preset("tiny").digest

@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("model", ["mlp", "transformer", "conv", "space_time"])
def test_five_updates(store, films, tmp_path, name, model):
    images = model in ("conv", "space_time"); small = dict(split__n_expert=2, split__n_labelled=2, split__return_fraction=.9) if images else {}
    cfg = preset("tiny", model).replace(**FEW, **small, **OPTIONS[name])
    if images and name == "flow":
        with pytest.raises(ConfigError, match="flow_steps is for states"): train_method("clam", films, cfg, tmp_path/"r", quiet=True)
        return
    run = train_method("clam", films if images else store, cfg, tmp_path/"r", quiet=True); last = run.metrics("stage1")[-1]
    key = {"gaussian": "kl", "k-step": "steps_loss", "features": "feature_loss", "reversal": "reversal_loss", "additivity": "additivity_loss"}.get(name)
    assert run.finished("lam", "decoder", "policy") and (key is None or np.isfinite(last[key]))
    agent = load_agent(run); obs = np.zeros((16, 16, 3), np.uint8) if images else store[0].obs[0]
    a, z = agent.act(obs); assert np.abs(a).max() <= 1 and z.shape == (cfg.lam.latent_dim,) and np.array_equal(agent.act(obs)[1], z)

def test_features_teach_z_and_the_fdm_only_follows(store, tmp_path):
    "With the feature target the inverse model gets no gradient from the reconstruction, without it it does."
    from clam.models.options import Extras
    from clam.train.checkpoint import Run
    from clam.train.loop import WindowData
    run = Run(tmp_path/"r")
    with run.locked(): run.begin(store, preset("tiny"), "clam")
    data = WindowData(run.splits.unlabelled_view(store), run.normaliser); idx = torch.arange(8); b = data.batch(idx)
    for weight in (0., 1.):
        lam = run.new_lam(); out, terms = Extras(Stage1Config(feature_weight=weight, horizon=1), 6, 8)(lam, data, idx, b)
        g = torch.autograd.grad(out.pred.square().sum(), lam.idm.net[0].weight, retain_graph=True, allow_unused=True)[0]; assert (g is None) == (weight > 0)
        if terms: assert torch.autograd.grad(terms["feature_loss"], lam.idm.net[0].weight)[0].abs().sum() > 0

def test_resume_with_extras_is_exact(store, tmp_path):
    from clam.train.loop import Callback
    class StopAt(Callback):
        def on_update(self, i): return i == 2
    cfg = preset("tiny").replace(**FEW, lam__gaussian=True, stage1__feature_weight=1., stage1__horizon=2, stage1__predict_steps=2)
    a = train_method("clam", store, cfg, tmp_path/"a", quiet=True)
    train_method("clam", store, cfg, tmp_path/"b", callbacks=[StopAt()], quiet=True); b = train_method("clam", store, cfg, tmp_path/"b", resume=True, quiet=True)
    assert all(torch.equal(v, b.lam().state_dict()[k]) for k, v in a.lam().state_dict().items())

@pytest.mark.parametrize("f", [lambda: LAMConfig(gaussian=True, quantise="fsq"), lambda: Stage1Config(horizon=0), lambda: Stage1Config(reversal_weight=-1.), lambda: Stage2Config(chunk=2, flow_steps=2), lambda: Stage2Config(flow_steps=2, decoded_weight=1.)])
def test_mistakes_are_named(f):
    with pytest.raises(ConfigError): f()

# ---------------------------------------------------------------- plain formulas, forward and backward
def leaky(x): return torch.where(x > 0, x, .2*x)
def weights(m): return {k: v.detach().clone().requires_grad_() for k, v in m.named_parameters()}
def same_gradients(m, P, out, plain):
    assert (out-plain).abs().max() < 1e-9
    out.square().mean().backward(); plain.square().mean().backward()
    for k, p in m.named_parameters(): assert (p.grad-P[k].grad).abs().max() < 1e-9, k
def plain_net(P, x, names, embed=False): # linear layers with LeakyReLU between, none after an embedding
    for i, n in enumerate(names):
        x = x @ P[n+".weight"].T + P[n+".bias"]
        if i < len(names)-1 and not (embed and i == 0): x = leaky(x)
    return x

@pytest.mark.parametrize("embed", [0, 8])
@pytest.mark.parametrize("kind", [ActionDecoder, LatentPolicy, BCPolicy])
def test_heads_as_plain_formulas(kind, embed):
    with seed_everything(0): m = kind(6, 3, HeadConfig(embed_dim=embed, hidden_dim=16, n_hidden=2)).double(); x = torch.randn(5, 6).double()
    P = weights(m); names = [k.removesuffix(".weight") for k in P if k.endswith(".weight")]
    plain = plain_net(P, x, names, bool(embed)); same_gradients(m, P, m(x), plain if kind is LatentPolicy else torch.tanh(plain))

def test_mlp_gradients_as_plain_formulas():
    with seed_everything(0): lam = build_lam(LAMConfig(hidden_dim=16, latent_dim=4), 6).double(); win = torch.randn(5, 3, 6).double()
    P = weights(lam); idm = [f"idm.net.{i}" for i in (0, 2, 4)]; fdm = [f"fdm.net.{i}" for i in (0, 2, 4)]
    z = plain_net(P, win.flatten(1), idm); same_gradients(lam, P, lam(win).pred[:, 0], plain_net(P, torch.cat([win[:, :2].flatten(1), z], 1), fdm))

def test_gaussian_latents_by_hand():
    with seed_everything(0): lam = build_lam(LAMConfig(hidden_dim=16, latent_dim=4, gaussian=True), 6); win = torch.randn(5, 3, 6)
    raw = lam.idm(win); mean, lv = raw[..., :4], raw[..., 4:]
    assert raw.shape[-1] == 8 and torch.equal(lam.label(win), mean[:, -1]) and torch.equal(lam.eval()(win).z, mean) and not torch.equal(lam.train()(win).z, mean)
    assert torch.isclose(lam(win).aux["kl"], .5*(mean**2+lv.exp()-1-lv).mean()) and ActionIDM(3, 6, 2, lam.cfg)(win).shape == (5, 2)

@pytest.mark.parametrize("kind", ["vq-repo", "vq-lapo", "fsq", "residual"])
def test_gradient_passes_a_quantiser(kind):
    with seed_everything(0): lam = build_lam(LAMConfig(hidden_dim=16, latent_dim=8, quantise=kind), 6).train(); z = torch.randn(6, 1, 8, requires_grad=True)
    out = lam.quantiser(z, learn=True); g, = torch.autograd.grad(out.z.sum(), z); assert torch.isfinite(g).all() and g.abs().sum() > 0
    if kind == "vq-lapo": assert torch.allclose(g, torch.ones_like(g), atol=1e-5)            # plain straight-through

def test_dynamo_as_plain_formulas():
    with seed_everything(0): net = DynaMo(6, LAMConfig(hidden_dim=16, latent_dim=4), HeadConfig(embed_dim=8, hidden_dim=16, n_hidden=1)).double(); win = torch.randn(5, 2, 6).double()
    P = weights(net); enc = [k.removesuffix(".weight") for k in P if k.startswith("encoder") and k.endswith(".weight")]
    h = plain_net(P, win, enc); z = plain_net(P, h.flatten(1), [f"dynamics.idm.net.{i}" for i in (0, 2, 4)])
    same_gradients(net, P, net(win)[1], plain_net(P, torch.cat([h[:, 0], z], 1), [f"dynamics.fdm.net.{i}" for i in (0, 2, 4)]))

# ---------------------------------------------------------------- on the toy, from the committed records
def test_no_option_breaks_the_toy():
    from clam.evaluate.experiments import load_records, table_cells
    cells = {n: c for (n, _), c in table_cells(load_records("toy-options")).items()}
    assert len(cells) == 1+len(OPTIONS) and all(len(c.seeds) == 3 and c.interval.n == 150 and c.interval.mean > .8 for c in cells.values())
