"""The options beyond the paper: off by default and absent from digests, each trained for five updates on fakes and to the end on the toy,
gradients where they belong; and the parts whose numbers were not compared before, against plain formulas with gradients: heads,
DynaMo, Gaussian latents and the straight-through step of every quantiser."""
import numpy as np, pytest, torch
from torch.nn import functional as F
from clam.config import HeadConfig, LAMConfig, Stage1Config, Stage2Config, identity, preset
from clam.core import ConfigError, DatasetError, seed_everything
from clam.data.store import EpisodeStore, write_store
from clam.models.dynamo import DynaMo
from clam.models.heads import ActionDecoder, BCPolicy, LatentPolicy
from clam.models.lam import ActionIDM, IDMPolicy, build_lam
from clam.models.policies import ChunkPolicy, FlowPolicy
from clam.testing import fake_episodes
from clam.toy import ToyWorld, toy_episodes
from clam.train.agents import load_agent
from clam.train.baselines import train_method

OPTIONS = {"gaussian": dict(lam__gaussian=True), "k-step": dict(stage1__predict_steps=3), "horizon": dict(stage1__horizon=3), "features": dict(stage1__feature_weight=1.),
    "reversal": dict(stage1__reversal_weight=.1), "additivity": dict(stage1__additivity_weight=.1), "chunk": dict(stage2__chunk=3), "flow": dict(stage2__flow_steps=4),
    "decoder-obs": dict(stage1__decoder_obs=True), "mask": dict(stage1__outside_weight=.2)}
OLDER = {"difference": dict(lam__idm_input="difference"), "delta": dict(lam__fdm_target="delta")} # options from before records were stored, so their fields are in every digest
FEW = dict(stage1__updates=5, stage2__updates=5, stage1__batch=8, stage1__labelled_batch=8, stage2__batch=8)

@pytest.fixture(scope="module")
def store(tmp_path_factory): return EpisodeStore(write_store(tmp_path_factory.mktemp("s")/"toy", toy_episodes(150, seed=0), {"name": "toy", "spec": ToyWorld().spec}))

@pytest.fixture(scope="module")
def films(tmp_path_factory): return EpisodeStore(write_store(tmp_path_factory.mktemp("f")/"films", [e.replace(mask=e.frames[..., 0] > 99) for e in fake_episodes(12, T=8, frames=16)]))

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
    if not images and name == "mask":
        with pytest.raises(ConfigError, match="outside_weight is for pictures"): train_method("clam", store, cfg, tmp_path/"r", quiet=True)
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

@pytest.mark.parametrize("f", [lambda: LAMConfig(gaussian=True, quantise="fsq"), lambda: Stage1Config(horizon=0), lambda: Stage1Config(reversal_weight=-1.), lambda: Stage2Config(chunk=2, flow_steps=2), lambda: Stage2Config(flow_steps=2, decoded_weight=1.),
    lambda: Stage1Config(outside_weight=1.5), lambda: Stage1Config(outside_weight=.5, predict_steps=2), lambda: preset("quick").replace(stage1__decoder_obs=True)])
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

def test_decoder_that_sees_the_observation_as_plain_formulas():
    with seed_everything(0): m = ActionDecoder(4, 2, HeadConfig(embed_dim=8, hidden_dim=16, n_hidden=2), obs=6).double(); z, win = torch.randn(5, 4).double(), torch.randn(5, 3, 6).double()
    P = weights(m); same_gradients(m, P, m(z, *m.beside(win)), torch.tanh(plain_net(P, torch.cat([z, win[:, 1]], 1), [k.removesuffix(".weight") for k in P if k.endswith(".weight")], True)))

@pytest.mark.parametrize("model", ["mlp", "transformer"])
def test_vpt_as_plain_formulas(model):
    from test_models import plain_mlp, plain_transformer
    with seed_everything(0): m = ActionIDM(3, 6, 2, LAMConfig(model=model, hidden_dim=16, d_model=8, n_heads=2, n_layers=1, d_ff=12, dropout=0., max_positions=50)).double(); win, t = torch.randn(3, 3, 6).double(), torch.tensor([0, 1, 30])
    P = weights(m) | {"idm.step_std": m.idm.step_std}; fdm = build_lam(LAMConfig(model=model, latent_dim=2, hidden_dim=16, d_model=8, n_heads=2, n_layers=1, d_ff=12, max_positions=50), 6).double().state_dict() # the plain function also predicts; that half is not looked at
    plain = torch.stack([{"mlp": plain_mlp, "transformer": plain_transformer}[model]({**fdm, **P}, m.idm.cfg, w, int(s))[0][-1] for w, s in zip(win, t)]); same_gradients(m, P, m(win, t), plain)

@pytest.mark.parametrize("image_encoder", ["conv", "impala"])
@pytest.mark.parametrize("kind", [ActionDecoder, LatentPolicy, BCPolicy, FlowPolicy, ChunkPolicy])
def test_what_sees_pictures_as_plain_formulas(kind, image_encoder):
    "Encoder by shifted matrix products, then linear layers: policies, and the decoder that sees the picture."
    from test_models_image import conv, group_norm, halved, residual
    cfg = HeadConfig(embed_dim=8, hidden_dim=16, n_hidden=1, image_width=1, image_encoder=image_encoder); more = {ChunkPolicy: (2,), FlowPolicy: (3,)}.get(kind, ())
    with seed_everything(0): m = (ActionDecoder(4, 3, cfg, (3, 16, 16)) if kind is ActionDecoder else kind((3, 16, 16), 3, *more, cfg)).double(); x, z = torch.rand(2, 3, 16, 16).double(), torch.randn(2, 4).double()
    P = weights(m); eyes = "eyes" if kind in (ActionDecoder, FlowPolicy) else "net.0"
    def look(v): # [3, 16, 16] -> [8]
        for i in range(4 if image_encoder == "conv" else 3):
            b = f"{eyes}.down.{i}"
            if image_encoder == "conv": v = leaky(halved(residual(P, b+".2", group_norm(P, b+".1", conv(P, b+".0", v)))))
            else:
                v = conv(P, b+".0", v); n = (v.shape[1]+1)//2; y = F.pad(v, (1, 1, 1, 1), value=-torch.inf)
                v = residual(P, b+".3", residual(P, b+".2", torch.stack([y[:, r:r+2*n-1:2, c:c+2*n-1:2] for r in range(3) for c in range(3)]).amax(0)))
        return P[eyes+".head.weight"] @ (v if image_encoder == "conv" else v.clamp(min=0)).flatten()+P[eyes+".head.bias"]
    h = torch.stack([look(v) for v in x]); layers = [k.removesuffix(".weight") for k in P if k.startswith("net.") and P[k].ndim == 2 and ".head" not in k and ".down" not in k and k.endswith(".weight")]
    net = lambda v, embed=False: plain_net(P, v, layers, embed)
    if kind is FlowPolicy:
        want = torch.zeros(2, 3).double()
        for i in range(3): want = want+net(torch.cat([h, want, torch.full((2, 1), i/3).double()], 1), True)/3
    else: want = net(torch.cat([z, h], 1), True) if kind is ActionDecoder else net(h)
    if kind in (ActionDecoder, BCPolicy): want = torch.tanh(want)
    out = m(z, x) if kind is ActionDecoder else m.plan(x).flatten(1) if kind is ChunkPolicy else m(x); same_gradients(m, P, out, want)

@pytest.mark.parametrize("model", ["conv", "space_time"])
def test_policy_through_an_inverse_model_as_plain_formulas(model):
    "A still window, the inverse model's features, LeakyReLU layers; the features themselves are compared in test_models_image through z."
    lam = LAMConfig(model=model, latent_dim=4, d_model=8, n_heads=2, n_layers=1, d_ff=12, dropout=0., patch=8, max_positions=50, conv_width=1)
    with seed_everything(0): idm = build_lam(lam, (3, 16, 16)).idm.double(); m = IDMPolicy(idm.float(), (3, 16, 16), 4, lam, HeadConfig(embed_dim=8, hidden_dim=16, n_hidden=1), frozen=False).double(); x = torch.rand(2, 3, 16, 16).double()
    P = weights(m); h = m.idm.features(torch.stack([x, x, x], 1), torch.zeros(2, dtype=torch.long)); out = m(x); (out.square().mean()).backward(); mine = {k: p.grad.clone() for k, p in m.named_parameters() if k.startswith("net")}
    plain = plain_net(P, h.detach(), [k.removesuffix(".weight") for k in P if k.startswith("net") and k.endswith(".weight")]); plain.square().mean().backward()
    assert (plain-out).abs().max() < 1e-9 and all((g-P[k].grad).abs().max() < 1e-9 for k, g in mine.items())

def test_rotation_trick_and_commitment_by_hand():
    "`vq-repo`: the gradient is turned and scaled as the latent was turned and scaled onto its code; commitment 1."
    with seed_everything(0): q = build_lam(LAMConfig(hidden_dim=16, latent_dim=8, quantise="vq-repo"), 6).train().quantiser; e, g = torch.randn(6, 8), torch.randn(6, 8)
    z = e[:, None].clone().requires_grad_(); book = q.net.codebook.clone(); out = q(z, learn=True); got, = torch.autograd.grad((out.z[:, 0]*g).sum(), z, retain_graph=True)
    for i in range(6):
        c = book[((book-e[i])**2).sum(1).argmin()]; a, b = e[i]/e[i].norm(), c/c.norm(); r = (a+b)/(a+b).norm(); scale = c.norm()/e[i].norm()
        assert (out.z[i, 0]-c).abs().max() < 1e-5 and (got[i, 0]-scale*(g[i]-2*r*(r@g[i])+2*a*(b@g[i]))).abs().max() < 1e-4
    near = torch.stack([book[((book-x)**2).sum(1).argmin()] for x in e]); assert torch.isclose(out.loss, (e-near).square().mean(), atol=1e-5)

# ---------------------------------------------------------------- a mask of the agent
def test_mask_weighs_exactly_the_pixels_of_the_target(films, tmp_path):
    from clam.train.checkpoint import Run
    from clam.train.loop import WindowData
    from clam.train.stage1 import JointStep
    run, cfg = Run(tmp_path/"r"), preset("tiny", "conv").replace(**FEW, split__n_expert=2, split__n_labelled=2, split__return_fraction=.9, stage1__outside_weight=.25)
    with run.locked(): run.begin(films, cfg, "clam")
    view = run.splits.unlabelled_view(films); data = WindowData(view, run.normaliser, 1, "cpu", .25)
    with seed_everything(0): step = JointStep(run.new_lam(), run.new_decoder(), data, None, cfg.stage1, 0)
    here = step.draw.state(); recon, cheat, *_ = step.reconstruct(); step.draw.load(here); idx = step.draw.next(); b = data.batch(idx); pred = step.lam(*b.inputs).pred[:, 0]
    num = den = still = 0.
    for i, n in enumerate(idx.tolist()):
        e, t = divmod(n, 8); w = np.where(view[e].mask[t+1], 1., .25)[None]; target = view[e].frames[t+1].transpose(2, 0, 1)/255.
        num += (w*(pred[i].detach().numpy()-target)**2).sum(); den += 3*w.sum(); still += (w*(view[e].frames[t].transpose(2, 0, 1)/255.-target)**2).sum()
    assert abs(recon.item()-num/den) < 1e-5 and abs(cheat.item()-still/den) < 1e-5
    blind = EpisodeStore(write_store(tmp_path/"blind", [e.replace(mask=None) for e in films]))
    with pytest.raises(DatasetError, match="no masks of the agent.*--masks"): train_method("clam", blind, cfg, tmp_path/"n", quiet=True)

def test_what_the_mask_leaves_out_teaches_nothing(films, tmp_path):
    "With weight 0 outside, other pixels there in the target change no gradient of the forward model's last layer; with weight 1 they do."
    from clam.train.losses import recon_loss
    with seed_everything(0): lam = build_lam(preset("tiny", "conv").lam, (3, 16, 16)); win, mask = torch.rand(4, 3, 3, 16, 16), torch.rand(4, 3, 1, 16, 16) > .5; z = lam.encode(win).detach()
    other = torch.where(mask, win, 1-win); head = lam.fdm.head.weight
    grad = lambda w, outside: torch.autograd.grad(recon_loss(lam.predict(win[:, :-1], z), w, 1., torch.where(mask, 1., outside)), head)[0]
    assert torch.equal(grad(win, 0.), grad(other, 0.)) and not torch.equal(grad(win, 1.), grad(other, 1.))

@pytest.mark.parametrize("images", [False, True])
def test_every_tool_reads_a_decoder_that_sees_the_observation(store, tmp_path, images):
    from clam.evaluate.health import health
    from clam.evaluate.inspection import inspect_run
    from clam.evaluate.ladder import ladder
    from clam.evaluate.probes import decoded_action_r2
    films = EpisodeStore(write_store(tmp_path/"films", toy_episodes(30, seed=0, frames=True), {"name": "toy", "spec": ToyWorld().spec})) if images else store
    cfg = preset("tiny", "conv" if images else "mlp").replace(**FEW, split__n_expert=2, split__n_labelled=4, split__heldout_fraction=.2, stage1__decoder_obs=True)
    run = train_method("clam", films, cfg, tmp_path/"r", quiet=True); agent = load_agent(run); o = films[0].frames[:2] if images else films[0].obs[:2]; a, z = agent.act(o)
    x = run.normaliser.apply(torch.from_numpy(np.array(o))[:, None]) if images else torch.from_numpy(run.normaliser.apply(o))
    assert np.allclose(a, run.decoder()(torch.from_numpy(z), x), atol=1e-6) and np.allclose(agent.act(o[0])[0], a[0], atol=1e-5)
    assert np.isfinite(decoded_action_r2(run, films)["heldout"]["r2"]) and run.z_decoder() is None and inspect_run(run, films).decoded is None and health(run, films).verdict
    if not images: assert len(ladder(run, films, episodes=2, view="expert", quiet=True).rungs) == 5

# ---------------------------------------------------------------- on the toy, from the committed records
def test_no_option_breaks_the_toy():
    from clam.evaluate.experiments import load_records, table_cells
    cells = {n: c for (n, _), c in table_cells(load_records("toy-options")).items()}
    assert len(cells) == 1+len(OPTIONS)-1+len(OLDER) and all(len(c.seeds) == 3 and c.interval.n == 150 and c.interval.mean > .8 for c in cells.values())
