"""What the model notebooks cannot say about themselves: the same numbers as an independent re-implementation written as plain
formulas from the paper's appendix, exact parameter counts, no path from o_{t+1} to its prediction but through z (for every
option), batches of one, determinism in eval mode, exact gradients routes, a few training steps, and errors raised before any tensor operation."""
import dataclasses, itertools, math
import numpy as np, pytest, torch
from torch.nn import functional as F
from clam.config import HeadConfig, LAMConfig, preset
from clam.core import ConfigError, seed_everything
from clam.models.heads import ActionDecoder, BCPolicy, LatentPolicy
from clam.models.lam import LAM, ActionIDM, build_lam
from clam.models.nets import count_params
from clam.models.params import PAPER, PARTS, params_rows, params_table
from clam.testing import fake_episode

S, STATES = 6, ("mlp", "transformer")
BASE = dict(latent_dim=4, hidden_dim=32, d_model=32, n_heads=4, n_layers=2, d_ff=48, dropout=0., max_positions=50)
OPTIONS = [dict(n_extra_context=h, position=p, cross_mask=c, idm_input=i, fdm_target=f, linear_skip=s)
           for h, p, (c, i, f, s) in itertools.product((0, 1, 2), ("absolute", "relative"),
               (("causal", "frames", "absolute", False), ("none", "frames", "delta", True), ("causal", "difference", "delta", True), ("causal", "difference", "absolute", False)))]

def make(model, seed=0, **kw) -> LAM:
    with seed_everything(seed): return build_lam(LAMConfig(model=model, **(BASE | kw)), S).eval()

def windows(H, n=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, H+2, S, generator=g), torch.randint(0, 45, (n,), generator=g)

# ---- independent re-implementation: plain formulas over a dictionary of weights, one window and one head at a time ----
def lin(P, name, x): return x @ P[name+".weight"].T + P[name+".bias"]
def leaky(x): return torch.where(x > 0, x, .2*x)
def gelu(x): return x*.5*(1+torch.erf(x/math.sqrt(2)))
def norm(P, name, x):
    m = x.mean(-1, keepdim=True); v = ((x-m)**2).mean(-1, keepdim=True)
    return (x-m)/torch.sqrt(v+1e-5)*P[name+".weight"] + P[name+".bias"]

def attention(P, name, q, k, v, heads, allowed):
    q, k, v = lin(P, name+".q", q), lin(P, name+".k", k), lin(P, name+".v", v)
    e = q.shape[-1]//heads; out = []
    for h in range(heads):
        sl = slice(h*e, (h+1)*e); rows = []
        for i in range(len(q)):
            seen = [j for j in range(len(k)) if allowed(i, j)]
            score = torch.exp(torch.stack([q[i, sl] @ k[j, sl] for j in seen])/math.sqrt(e))
            rows.append(sum(s*v[j, sl] for s, j in zip(score/score.sum(), seen)))
        out.append(torch.stack(rows))
    return lin(P, name+".out", torch.cat(out, -1))

def plain_transformer(P, cfg, win, t):
    "One window [W, S] at step t -> z [K, Z], predictions [K, S]."
    W, H = cfg.window, cfg.n_extra_context
    rows = [i if cfg.position == "relative" else max(0, t-H+i) for i in range(W)]
    step = P["idm.step_std"]
    diff = torch.stack([(win[i]-win[max(i-1, 0)])/step for i in range(W)])
    x = leaky(lin(P, "idm.embed.0", torch.cat([win, diff], -1) if cfg.idm_input == "difference" else win))
    pos = P["idm.pos.weight"][rows]
    for n in range(cfg.n_layers):
        b = f"idm.blocks.{n}"
        x = norm(P, b+".norm1", x + attention(P, b+".attn", x+pos, x+pos, x, cfg.n_heads, lambda i, j: True))
        x = norm(P, b+".norm2", x + lin(P, b+".ff.3", gelu(lin(P, b+".ff.0", x))))
    z = lin(P, "idm.head", x)[1:]
    if cfg.linear_skip:
        flat = torch.cat([win[-2:-1], diff[1:]]) if cfg.idm_input == "difference" else win
        z = z + (P["idm.skip.weight"] @ flat.flatten()).reshape(W-1, -1)
    x, memory = leaky(lin(P, "fdm.embed.0", win[:-1])), lin(P, "fdm.embed_z", z)
    pos, pos_z = P["fdm.pos.weight"][rows[:-1]], P["fdm.pos_z.weight"][rows[1:]]
    causal = lambda i, j: j <= i
    for n in range(cfg.n_layers):
        b = f"fdm.blocks.{n}"
        x = norm(P, b+".norm1", x + attention(P, b+".attn", x+pos, x+pos, x, cfg.n_heads, causal))
        x = norm(P, b+".norm2", x + attention(P, b+".cross", x+pos, memory+pos_z, memory, cfg.n_heads, causal if cfg.cross_mask == "causal" else lambda i, j: True))
        x = norm(P, b+".norm3", x + lin(P, b+".ff.3", gelu(lin(P, b+".ff.0", x))))
    pred = lin(P, "fdm.head", norm(P, "fdm.norm", x))
    return z, pred*step + win[:-1] if cfg.fdm_target == "delta" else pred

def plain_mlp(P, cfg, win, t):
    "One window [W, S] -> z [1, Z], prediction [1, S]."
    def net(name, x):
        for n in range(cfg.n_hidden): x = leaky(lin(P, f"{name}.{2*n}", x))
        return lin(P, f"{name}.{2*cfg.n_hidden}", x)
    flat, step = win.flatten(), P["idm.step_std"]
    if cfg.idm_input == "difference": flat = torch.cat([win[-2], *((win[i+1]-win[i])/step for i in range(cfg.window-1))])
    z = net("idm.net", flat) + (P["idm.skip.weight"] @ flat if cfg.linear_skip else 0)
    pred = net("fdm.net", torch.cat([win[:-1].flatten(), z]))
    return z[None], (pred*step + win[-2] if cfg.fdm_target == "delta" else pred)[None]

@pytest.mark.parametrize("model,plain", [("mlp", plain_mlp), ("transformer", plain_transformer)])
@pytest.mark.parametrize("opt", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_same_numbers_as_plain_formulas(model, plain, opt):
    lam = make(model, **opt, step_units=opt["idm_input"] == "difference").double(); win, t = windows(opt["n_extra_context"], n=4); win = win.double(); t[0] = 0
    lam.fit_steps(win*torch.linspace(.5, 3, S))
    P = lam.state_dict(); out = lam(win, t)
    for b in range(4):
        z, pred = plain(P, lam.cfg, win[b], int(t[b]))
        assert z.shape == out.z[b].shape and pred.shape == out.pred[b].shape
        assert (z-out.z[b]).abs().max() < 1e-10 and (pred-out.pred[b]).abs().max() < 1e-10
    P = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in P.items()}      # and backwards
    loss = lambda z, pred: z.square().sum() + pred.square().sum()
    loss(out.z, out.pred).backward(); sum(loss(*plain(P, lam.cfg, win[b], int(t[b]))) for b in range(4)).backward()
    for k, p in lam.named_parameters(): assert (p.grad-P[k].grad).abs().max() < 1e-8, k

def test_blocks_agree_with_torch_layers_when_positions_are_zero():
    "Without positions the post-norm blocks are PyTorch's own layers."
    from clam.models.nets import DecoderBlock, EncoderBlock, causal_mask
    def pack(block, names):
        sd = block.state_dict(); out = {}
        for ours, theirs in names.items():
            for p in ("weight", "bias"): out[f"{theirs}.in_proj_{p}"] = torch.cat([sd[f"{ours}.{n}.{p}"] for n in "qkv"]); out[f"{theirs}.out_proj.{p}"] = sd[f"{ours}.out.{p}"]
        for ours, theirs in (("ff.0", "linear1"), ("ff.3", "linear2"), ("norm1", "norm1"), ("norm2", "norm2"), ("norm3", "norm3")):
            for p in ("weight", "bias"):
                if f"{ours}.{p}" in sd: out[f"{theirs}.{p}"] = sd[f"{ours}.{p}"]
        return out
    kw = dict(dim_feedforward=48, dropout=0., activation="gelu", batch_first=True)
    x, mem = torch.randn(3, 4, 32), torch.randn(3, 4, 32); zero = torch.zeros(4, 32)
    enc, ref = EncoderBlock(32, 4, 48), torch.nn.TransformerEncoderLayer(32, 4, **kw); ref.load_state_dict(pack(enc, {"attn": "self_attn"}))
    assert (enc(x, zero)-ref(x)).abs().max() < 1e-5
    dec, ref = DecoderBlock(32, 4, 48), torch.nn.TransformerDecoderLayer(32, 4, **kw); ref.load_state_dict(pack(dec, {"attn": "self_attn", "cross": "multihead_attn"}))
    m = causal_mask(4)
    assert (dec(x, zero, mem, zero, m, m)-ref(x, mem, tgt_mask=~m, memory_mask=~m)).abs().max() < 1e-5

# ---- counts ----
@pytest.mark.parametrize("S_,kw,want", [
    (39, dict(model="transformer", latent_dim=16), 8_874_551), (39, dict(model="transformer", latent_dim=8), 8_870_447), (39, dict(model="transformer", max_positions=100), 8_797_751),
    (11, dict(model="transformer"), 8_853_019), (17, dict(model="transformer"), 8_857_633), (39, dict(model="transformer", d_model=512, n_heads=8, n_layers=6), 44_524_599),
    (39, dict(model="mlp", latent_dim=8), 2_357_295), (39, dict(model="mlp", latent_dim=16), 2_373_687)])
def test_lam_counts(S_, kw, want):
    with torch.device("meta"): assert count_params(build_lam(LAMConfig(**kw), S_)) == want

def test_head_and_vpt_counts():
    c = preset("paper")
    assert count_params(BCPolicy(39, 7, c.policy)) == 1_602_567 and count_params(BCPolicy(39, 4, c.policy)) == 1_599_492
    assert [count_params(LatentPolicy(39, z, c.policy)) for z in (8, 16)] == [1_603_592, 1_611_792]
    assert count_params(ActionDecoder(16, 4, c.decoder)) == 2_637_316
    with torch.device("meta"): assert count_params(ActionIDM(3, 39, 4, preset("paper", "transformer").lam)) == 4_007_684

def test_params_table_has_the_keys_and_checks_its_own_verdicts():
    table = params_table()
    assert set(table) >= {"mlp", "transformer", "transformer_calvin", "bc_policy", "latent_policy", "decoder"} and set(PAPER) >= set(PARTS)
    assert table["transformer"]["paper"] == 8_874_551 and all(n > 0 for row in table.values() for n in row.values())
    exact = [(m, n, figure) for m, p, n, figure, verdict in params_rows() if verdict.startswith("exact")]
    assert exact and all(f"{n:,}" == figure for _, n, figure in exact)

# ---- leaks ----
@pytest.mark.parametrize("model", ["mlp", "transformer"])
@pytest.mark.parametrize("opt", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_next_frame_reaches_its_prediction_only_through_z(model, opt):
    "Bit for bit with z held fixed, and by automatic differentiation through the whole model."
    lam = make(model, **opt); win, t = windows(opt["n_extra_context"]); z = lam.encode(win, t).detach()
    pred = lam.predict(win[:, :-1], z, t)
    moved = win.clone(); moved[:, -1] = 1e3*torch.randn(len(win), S)
    assert torch.equal(lam.predict(moved[:, :-1], z, t), pred)
    x = win.clone().requires_grad_()
    g, = torch.autograd.grad(lam.predict(x[:, :-1], z, t).sum(), x); assert g[:, -1].abs().max() == 0 and g[:, :-1].abs().sum() > 0
    g, = torch.autograd.grad(lam(x, t).pred[:, -1].sum(), x); assert (g[:, -1].abs().sum(-1) > 0).all()       # with z free the path exists
    assert not torch.equal(lam.predict(win[:, :-1], z+1, t)[:, -1], pred[:, -1])

@pytest.mark.parametrize("H", [1, 2])
@pytest.mark.parametrize("position", ["absolute", "relative"])
def test_transformer_fdm_is_causal(H, position):
    "Prediction k sees frames 0..k and latents 0..k, all of them, and nothing later."
    lam = make("transformer", n_extra_context=H, position=position); win, t = windows(H); ctx = win[:, :-1]
    z = lam.encode(win, t).detach(); pred = lam.predict(ctx, z, t)
    for j in range(H+1):
        c2, z2 = ctx.clone(), z.clone(); c2[:, j] += 1; z2[:, j] += 1
        for other in (lam.predict(c2, z, t), lam.predict(ctx, z2, t)):
            assert torch.equal(other[:, :j], pred[:, :j])
            assert all(not torch.equal(other[:, k], pred[:, k]) for k in range(j, H+1))

def test_cross_mask_none_lets_the_past_see_later_latents_but_never_later_frames():
    lam = make("transformer", cross_mask="none"); win, t = windows(1); ctx, z = win[:, :-1], lam.encode(win, t).detach()
    z2, c2 = z.clone(), ctx.clone(); z2[:, 1] += 1; c2[:, 1] += 1; pred = lam.predict(ctx, z, t)
    assert not torch.equal(lam.predict(ctx, z2, t)[:, 0], pred[:, 0]) and torch.equal(lam.predict(c2, z, t)[:, 0], pred[:, 0])

# ---- behaviour ----
@pytest.mark.parametrize("model", ["mlp", "transformer"])
@pytest.mark.parametrize("opt", OPTIONS[::3], ids=lambda o: "-".join(str(v) for v in o.values()))
def test_batch_of_one_and_shapes(model, opt):
    lam = make(model, **opt); H = opt["n_extra_context"]; win, t = windows(H); K = 1 if model == "mlp" else H+1
    out = lam(win, t)
    assert out.z.shape == (16, K, 4) and out.pred.shape == (16, K, S) and torch.equal(out.target(win), win[:, -K:]) and torch.equal(lam.label(win, t), out.z[:, -1])
    one = lam(win[3:4], t[3:4])
    assert one.z.shape == (1, K, 4) and (one.z-out.z[3:4]).abs().max() < 1e-5 and (one.pred-out.pred[3:4]).abs().max() < 1e-5

@pytest.mark.parametrize("model", STATES)
def test_eval_is_deterministic_and_dropout_lives_in_the_transformer_only(model):
    lam = make(model, dropout=.3); win, t = windows(1)
    assert torch.equal(lam(win, t).pred, lam(win, t).pred)
    lam.train(); torch.manual_seed(0)
    assert torch.equal(lam(win, t).pred, lam(win, t).pred) == (model == "mlp")
    a, b = (make(model, seed=5).state_dict() for _ in range(2)); assert all(torch.equal(a[k], b[k]) for k in a)   # same seed, same weights

@pytest.mark.parametrize("model", STATES)
def test_state_dict_round_trip(model):
    a, b = make(model, seed=1, linear_skip=True), make(model, seed=2, linear_skip=True); win, t = windows(1)
    assert not torch.equal(a(win, t).z, b(win, t).z)
    b.load_state_dict(a.state_dict()); assert torch.equal(a(win, t).pred, b(win, t).pred)

@pytest.mark.parametrize("model", STATES)
@pytest.mark.parametrize("autocast", [False, True])
def test_five_updates_on_a_fake_reduce_the_loss(model, autocast):
    obs = fake_episode(T=200, S=S, seed=3).obs
    win = torch.from_numpy(np.stack([obs[:-2], obs[1:-1], obs[2:]], 1)); t = torch.arange(1, 200) % 40
    lam = make(model, hidden_dim=128).train(); opt = torch.optim.Adam(lam.parameters(), 1e-3); losses = []
    for _ in range(6):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast): out = lam(win, t)
        loss = (out.pred.float()-out.target(win)).square().mean(); opt.zero_grad(); loss.backward(); opt.step(); losses.append(loss.item())
    assert all(b < a for a, b in zip(losses, losses[1:])), losses
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in lam.parameters())

@pytest.mark.parametrize("model", STATES)
def test_gradient_routes(model):
    "The action loss reaches IDM and decoder, not the FDM; the reconstruction loss reaches IDM and FDM."
    with seed_everything(0): lam, dec = make(model), ActionDecoder(4, 2, HeadConfig(embed_dim=0, hidden_dim=16))
    win, t = windows(1)
    touched = lambda m: [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in m.parameters()]
    dec(lam.label(win, t)).square().sum().backward()
    assert any(touched(lam.idm)) and all(touched(dec)) and not any(touched(lam.fdm))
    lam.zero_grad(); dec.zero_grad(); out = lam(win, t); (out.pred-out.target(win)).square().sum().backward()
    assert any(touched(lam.idm)) and any(touched(lam.fdm)) and not any(touched(dec))

@pytest.mark.parametrize("embed", [0, 8])
def test_heads(embed):
    cfg = HeadConfig(embed_dim=embed, hidden_dim=16, n_hidden=2)
    with seed_everything(0): dec, bc, pi = ActionDecoder(4, 2, cfg), BCPolicy(S, 2, cfg), LatentPolicy(S, 4, cfg)
    z, o = torch.randn(256, 4), torch.randn(256, S)
    assert dec(z).abs().max() < 1 and dec(1e9*z).abs().max() <= 1 and bc(1e9*o).abs().max() <= 1
    assert dec(z[0]).shape == (2,) and dec(z.view(2, 128, 4)).shape == (2, 128, 2) and pi(o[:1]).shape == (1, 4) and pi(1e3*o).abs().max() > 1
    x = z                                                       # the same by hand
    for m in dec.net: x = leaky(x) if isinstance(m, torch.nn.LeakyReLU) else x @ m.weight.T + m.bias
    assert (torch.tanh(x)-dec(z)).abs().max() < 1e-5

def test_action_idm_is_linear_and_gives_one_action_per_window():
    for model in STATES:
        with seed_everything(0): vpt = ActionIDM(3, S, 2, LAMConfig(model=model, **BASE)).eval()
        win, t = windows(1); assert vpt(win, t).shape == (16, 2)
        for p in vpt.parameters(): p.data.mul_(3.)
        assert vpt(win*30, t).abs().max() > 1                   # no Tanh

# ---- errors come before tensors ----
def test_step_beyond_the_table_is_refused_before_the_embedding(monkeypatch):
    lam = make("transformer", max_positions=20); win, t = windows(1)
    def never(*a, **k): raise AssertionError("reached the embedding")
    monkeypatch.setattr(torch.nn.Embedding, "forward", never)
    for bad in (19, 20, 10**6, -1):
        with pytest.raises(ConfigError, match="max_positions=20"): lam.encode(win, torch.full((16,), bad))
        with pytest.raises(ConfigError, match="max_positions=20"): lam.predict(win[:, :-1], torch.zeros(16, 2, 4), torch.full((16,), bad))
    monkeypatch.undo()
    assert lam.encode(win, torch.full((16,), 18)).shape == (16, 2, 4)
    assert make("transformer", max_positions=20, position="relative").encode(win, torch.full((16,), 10**6)).shape == (16, 2, 4)

@pytest.mark.parametrize("model", STATES)
def test_wrong_shapes_are_refused_with_both_shapes(model):
    lam = make(model); win, t = windows(1); z = lam.encode(win, t)
    for f in (lambda: lam.encode(win[:, 1:], t), lambda: lam(win[..., :5], t), lambda: lam.label(win[0], t), lambda: lam.predict(win, z, t),
              lambda: lam.predict(win[:, :-1], z[..., 1:], t), lambda: lam.predict(win[:, :-1], z[:3], t), lambda: lam.predict(win[:, :-1], torch.cat([z, z], 1), t), lambda: ActionIDM(3, S, 2, lam.cfg)(win[:, 1:], t)):
        with pytest.raises(ConfigError, match="wrong shape; got .*; expected"): f()

def test_unknown_model_lists_the_registry():
    with pytest.raises(ConfigError, match="got nope; expected .*mlp.*transformer"): build_lam(dataclasses.replace(LAMConfig(), model="nope"), S)
    with pytest.raises(ConfigError, match="shorter than a window"): make("transformer", n_extra_context=2, max_positions=3)
    with pytest.raises(ConfigError, match="window does not fit"): ActionIDM(4, S, 2, LAMConfig())
