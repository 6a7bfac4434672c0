"""Pins the models that see pictures and the quantised latents: the same numbers and gradients as plain formulas written a second time,
exact parameter counts, no path from a later frame or latent to an earlier prediction (bit for bit), and the official code's faults
(float mask, joint norm, batch statistics and codebooks moved by labelled windows, skips that fit 84 pixels only, dropout while
labelling), each planted and found."""
import contextlib, itertools, math
import pytest, torch
from torch.nn import functional as F
import clam.models.conv, clam.models.lam, clam.models.space_time
from clam.config import IMAGE_MODELS, PRESETS, HeadConfig, LAMConfig, identity, preset
from clam.core import ConfigError, seed_everything
from clam.models.conv import NatureEncoder
from clam.models.heads import ActionDecoder, BCPolicy, LatentPolicy
from clam.models.lam import ActionIDM, build_lam
from clam.models.nets import count_params
from clam.models.params import params_rows, params_table
from test_models import attention, gelu, leaky, lin

SIDE = 16
BASE = dict(latent_dim=8, d_model=16, n_heads=2, n_layers=2, d_ff=24, dropout=0., patch=8, max_positions=50, conv_width=1)
KINDS = ("vq-repo", "vq-lapo", "fsq", "residual")

def make(model, seed=0, obs=None, **kw):
    with seed_everything(seed): return build_lam(LAMConfig(model=model, **(BASE | kw)), obs or ((3, SIDE, SIDE) if model in IMAGE_MODELS else 6)).eval()

def windows(H=1, n=6, side=SIDE, seed=0): # pictures, steps, hand states
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, H+2, 3, side, side, generator=g), torch.randint(0, 45, (n,), generator=g), torch.randn(n, H+2, 4, generator=g)

def state_windows(n=64): return torch.randn(n, 3, 6, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 45

# ---- the same again in plain formulas over a dictionary of weights, one window at a time ----
def token_norm(x):
    m = x.mean(-1, keepdim=True); return (x-m)/torch.sqrt(((x-m)**2).mean(-1, keepdim=True)+1e-5)

def tokens(frame, p): # [C, side, side] -> [N, p*p*C]
    n = frame.shape[1]//p
    return torch.stack([frame[:, r*p:(r+1)*p, c*p:(c+1)*p].permute(1, 2, 0).flatten() for r in range(n) for c in range(n)])

def plain_block(P, b, cfg, x, pos, memory=None, mpos=None): # x, pos: lists over frames of lists over tokens
    h, T, N = cfg.n_heads, len(x), len(x[0])
    anyone, causal = lambda i, j: True, lambda i, j: j <= i
    x = [token_norm(f + attention(P, b+".space", f+p, f+p, f, h, anyone)) for f, p in zip(x, pos)]
    x, pos = torch.stack(x, 1), torch.stack(pos, 1)                                                    # [N, T, D]
    x = torch.stack([token_norm(f + attention(P, b+".time", f+p, f+p, f, h, anyone if memory is None else causal)) for f, p in zip(x, pos)])
    if memory is not None:
        seen = causal if cfg.cross_mask == "causal" else anyone
        x = torch.stack([token_norm(f + attention(P, b+".cross", f+p, memory+mpos, memory, h, seen)) for f, p in zip(x, pos)])
    x = token_norm(x + lin(P, b+".ff.3", gelu(lin(P, b+".ff.0", x))))
    return [x[:, i] for i in range(T)]

def plain_space_time(P, cfg, win, t, hand):
    W, H, p = cfg.window, cfg.n_extra_context, cfg.patch
    rows = [i if cfg.position == "relative" else max(0, t-H+i) for i in range(W)]
    def place(part, i, n): return P[f"{part}.places.time.weight"][rows[i]] + P[f"{part}.places.space.weight"][:n]
    def tell(part, x, i):
        if not cfg.hand_state: return x
        told = hand[i]
        if part == "idm" and cfg.idm_input == "difference": told = torch.cat([told, (told-hand[max(0, i-1)])/(P["idm.hand_std"].detach() if cfg.step_units else 1.)])
        h = lin(P, f"{part}.hand.embed", told); return lin(P, f"{part}.hand.mix", torch.cat([x, h.expand(len(x), -1)], -1))
    seen, unit = win, P["idm.step_std"].detach() if cfg.step_units else 1.
    if cfg.idm_input == "difference": seen = torch.stack([torch.cat([win[i], (win[i]-win[max(0, i-1)])/unit]) for i in range(W)])
    x = [torch.cat([P["idm.token"][0, 0], leaky(lin(P, "idm.embed.0", tokens(f, p)))]) for f in seen]
    x = [tell("idm", f, i) for i, f in enumerate(x)]; N = len(x[0])
    for n in range(cfg.n_layers): x = plain_block(P, f"idm.blocks.{n}", cfg, x, [place("idm", i, N) for i in range(W)])
    z = torch.stack([lin(P, "idm.head", f[0]) for f in x[1:]])
    memory, mpos = lin(P, "fdm.embed_z", z), P["fdm.pos_z.weight"][rows[1:]]
    x = [tell("fdm", lin(P, "fdm.embed", tokens(win[i], p)) + memory[i], i) for i in range(W-1)]
    for n in range(cfg.n_layers): x = plain_block(P, f"fdm.blocks.{n}", cfg, x, [place("fdm", i, N-1) for i in range(W-1)], memory, mpos)
    def picture(tok):
        n = SIDE//p; patches = tok.view(n, n, p, p, 3); out = torch.zeros(3, SIDE, SIDE, dtype=tok.dtype)
        for r, c in itertools.product(range(n), range(n)): out[:, r*p:(r+1)*p, c*p:(c+1)*p] = patches[r, c].permute(2, 0, 1)
        return out
    pred = torch.stack([picture(lin(P, "fdm.head", f)) for f in x])
    return z, pred*unit + win[:-1] if cfg.fdm_target == "delta" else pred

def conv(P, name, x): # 3x3 with padding: nine shifted matrix products
    w, (h, v) = P[name+".weight"], x.shape[1:]; y = F.pad(x, (1, 1, 1, 1))
    return sum(torch.einsum("oc,chv->ohv", w[:, :, i, j], y[:, i:i+h, j:j+v]) for i in range(3) for j in range(3)) + P[name+".bias"][:, None, None]
def grown(P, name, x): # transposed convolution of stride 2: every pixel paints its kernel
    w, (h, v) = P[name+".weight"], x.shape[1:]; k = w.shape[-1]; out = torch.zeros(w.shape[1], 2*h-2+k, 2*v-2+k, dtype=x.dtype)
    for i, j in itertools.product(range(h), range(v)): out[:, 2*i:2*i+k, 2*j:2*j+k] += torch.einsum("c,cokl->okl", x[:, i, j], w)
    return out + P[name+".bias"][:, None, None]
def group_norm(P, name, x):
    out = []
    for c in torch.split(x, 16 if len(x) >= 16 else len(x)): m = c.mean(); out.append((c-m)/torch.sqrt(((c-m)**2).mean()+1e-5))
    return torch.cat(out)*P[name+".weight"][:, None, None] + P[name+".bias"][:, None, None]
def strided(P, name, x, s): # without padding
    w = P[name+".weight"]; k = w.shape[-1]; n = (x.shape[1]-k)//s+1; end = s*(n-1)+1
    return sum(torch.einsum("oc,chv->ohv", w[:, :, i, j], x[:, i:i+end:s, j:j+end:s]) for i in range(k) for j in range(k)) + P[name+".bias"][:, None, None]
def folded(x, p): return torch.stack([x[c, i::p, j::p] for c in range(len(x)) for i in range(p) for j in range(p)])
def unfolded(x, p, C): # the inverse of `folded`
    out = x.new_zeros(C, p*x.shape[1], p*x.shape[2])
    for n, (c, i, j) in enumerate(itertools.product(range(C), range(p), range(p))): out[c, i::p, j::p] = x[n]
    return out
def residual(P, name, x): return x + conv(P, name+".net.3", conv(P, name+".net.1", x.clamp(min=0)).clamp(min=0))
def halved(x): h, v = x.shape[1]//2, x.shape[2]//2; return x[:, :2*h, :2*v].reshape(len(x), h, 2, v, 2).amax((2, 4))

def plain_conv(P, cfg, win, t, hand):
    steps, p, unit = int(math.log2(win.shape[-1])), cfg.conv_fold, P["idm.step_std"].detach() if cfg.step_units else 1.; W = cfg.window
    down = lambda b, x: leaky(halved(residual(P, b+".2", group_norm(P, b+".1", conv(P, b+".0", x)))))
    seen = win
    if cfg.idm_input == "difference": seen = torch.stack([torch.cat([win[i], (win[i]-win[max(0, i-1)])/unit]) for i in range(W)])
    x = seen.flatten(0, 1)
    if cfg.image_encoder == "conv":
        for i in range(steps): x = down(f"idm.encoder.down.{i}", x)
    else:
        for i in range(3):
            b = f"idm.encoder.down.{i}"; x = conv(P, b+".0", x); n = (x.shape[1]+1)//2; y = F.pad(x, (1, 1, 1, 1), value=-math.inf)
            x = torch.stack([y[:, r:r+2*n-1:2, c:c+2*n-1:2] for r in range(3) for c in range(3)]).amax(0)
            x = residual(P, b+".3", residual(P, b+".2", x))
        x = x.clamp(min=0)
    z = lin(P, "idm.head", lin(P, "idm.encoder.head", x.flatten()))
    frames = folded(win[:-1].flatten(0, 1), p); x = torch.cat([frames, z[:, None, None].expand(-1, *frames.shape[1:])]); skips = []
    for i in range(steps-int(math.log2(p))): x = down(f"fdm.down.{i}", x); skips.append(x)
    for i, skip in enumerate([z[:, None, None], *skips[-2::-1]]):
        b = f"fdm.up.{i}"; x = leaky(residual(P, b+".2", group_norm(P, b+".1", grown(P, b+".0", torch.cat([x, skip])))))
    y = unfolded(conv(P, "fdm.head", torch.cat([x, frames])), p, 3)
    if cfg.fdm_target == "delta" and cfg.step_units: return z[None], (win[-2]+y*unit)[None]
    y = torch.tanh(y)
    return z[None], (win[-2]+y if cfg.fdm_target == "delta" else (y+1)/2)[None]

ST = [dict(model="space_time", **kw) for kw in (dict(), dict(hand_state=True, position="relative"), dict(n_extra_context=0, cross_mask="none"),
      dict(n_extra_context=2, idm_input="difference", fdm_target="delta", hand_state=True), dict(idm_input="difference", fdm_target="delta", hand_state=True, step_units=True), dict(spare_weights=False, cross_mask="none", position="relative"))]
CONV = [dict(model="conv", **kw) for kw in (dict(), dict(image_encoder="impala", n_extra_context=0), dict(idm_input="difference", fdm_target="delta", conv_width=2), dict(n_extra_context=2),
      dict(idm_input="difference", fdm_target="delta", step_units=True, conv_fold=2), dict(conv_fold=4))]
named = lambda o: "-".join(str(v) for v in o.values())

@pytest.mark.parametrize("opt", ST+CONV, ids=named)
def test_same_numbers_and_gradients_as_plain_formulas(opt):
    lam = make(**opt).double(); win, t, hand = (v.double() if v.is_floating_point() else v for v in windows(opt.get("n_extra_context", 1), n=2)); t[0] = 0
    for p in lam.parameters(): p.data.add_(.1*torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))        # biases and near-zero heads too
    if lam.cfg.step_units: lam.fit_steps(win, hand); assert lam.step_std.ndim == 0 and lam.step_std != 1 and (not lam.cfg.hand_state or (lam.idm.hand_std != 1).all())
    P = {k: v.detach().clone().requires_grad_() for k, v in lam.state_dict().items()}
    out = lam(win, t, hand if lam.cfg.hand_state else None)
    plain = [{"space_time": plain_space_time, "conv": plain_conv}[opt["model"]](P, lam.cfg, win[b], int(t[b]), hand[b]) for b in range(2)]
    z, pred = (torch.stack(v) for v in zip(*plain))
    assert z.shape == out.z.shape and pred.shape == out.pred.shape and (z-out.z).abs().max() < 1e-9 and (pred-out.pred).abs().max() < 1e-9
    loss = lambda z, pred: z.square().mean() + (pred-win[:, -pred.shape[1]:]).square().mean()
    loss(out.z, out.pred).backward(); loss(z, pred).backward()
    for k, p in lam.named_parameters():
        if p.grad is None: assert ".cross." in k and k.startswith("idm") and P[k].grad is None; continue                        # the IDM's spare weights
        assert (p.grad-P[k].grad).abs().max() < 1e-9, k

# ---- counts ----
def test_nature_encoder_as_plain_formulas():
    with seed_everything(0): enc = NatureEncoder(2, 44, 5, width=1).double()
    x = torch.rand(2, 44, 44, dtype=torch.float64, generator=torch.Generator().manual_seed(0)); P, y = enc.state_dict(), x
    for i, s in ((0, 4), (2, 2), (4, 1)): y = strided(P, f"down.{i}", y, s).clamp(min=0)
    assert y.shape == (32, 2, 2) and (lin(P, "head", y.flatten())-enc(x[None])[0]).abs().max() < 1e-9

def test_pixels_without_step_units_are_stored_as_before():
    old = make("conv"); assert "idm.step_std" not in old.state_dict() and float(old.step_std) == 1 and "idm.step_std" in make("conv", step_units=True).state_dict()
    assert "conv_fold" not in identity(old.cfg)

@pytest.mark.parametrize("kw, want", [(dict(hand_state=True), 12_163_344), (dict(), 11_898_128), (dict(hand_state=True, latent_dim=8), 12_159_240), (dict(spare_weights=False), 11_108_624)])
def test_space_time_counts(kw, want):
    with torch.device("meta"): assert count_params(build_lam(LAMConfig(model="space_time", **kw), (3, 64, 64))) == want

def test_presets_meet_the_printed_count():
    with torch.device("meta"):
        for p in ("paper", "repo"): assert count_params(build_lam(preset(p, "space_time").replace(lam__hand_state=True).lam, (3, 64, 64))) == 12_163_344
    assert not preset("paper", "space_time").lam.hand_state                      # off unless asked for

@pytest.mark.parametrize("kw, c, want", [(dict(latent_dim=8), 3, 8_866_813), (dict(latent_dim=16), 3, 8_878_341), (dict(latent_dim=16), 9, 8_890_011), (dict(latent_dim=16, conv_norm="batch"), 3, 8_878_341)])
def test_conv_counts(kw, c, want):
    with torch.device("meta"): assert count_params(build_lam(LAMConfig(model="conv", **kw), (c, 84, 84))) == want

@pytest.mark.parametrize("c, side, enc, want", [(3, 84, "impala", 11_060_996), (3, 64, "impala", 7_325_444), (3, 84, "conv", 4_360_340), (9, 84, "conv", 4_362_068)])
def test_image_policy_counts(c, side, enc, want):
    with torch.device("meta"): assert count_params(BCPolicy((c, side, side), 4, HeadConfig(image_encoder=enc))) == want

def test_params_lists_every_model_and_preset():
    table = params_table(); assert {"space_time", "conv", "lapo", "vpt_idm", "bc_policy_image"} <= set(table) and table["space_time"]["paper"] == 12_163_344
    assert all(v for m, p, n, figure, v in params_rows() if p == "paper") and {p for m in table.values() for p in m} == set(PRESETS)

# ---- leaks ----
def leak(lam, H): # largest change of an earlier prediction when frame j or latent j moves
    win, t, hand = windows(H); hand = hand if lam.cfg.hand_state else None; ctx, h = win[:, :-1], hand if hand is None else hand[:, :-1]
    z = lam.encode(win, t, hand).detach(); pred = lam.predict(ctx, z, t, h); worst = 0.
    for j in range(1, H+1):
        c2, z2 = ctx.clone(), z.clone(); c2[:, j] = 1-c2[:, j]; z2[:, j] += 1
        for new in (lam.predict(c2, z, t, h), lam.predict(ctx, z2, t, h)):
            worst = max(worst, (new[:, :j]-pred[:, :j]).abs().max().item())
            assert all(not torch.equal(new[:, k], pred[:, k]) for k in range(j, H+1))
        if h is not None: h2 = h.clone(); h2[:, j] += 1; worst = max(worst, (lam.predict(ctx, z, t, h2)[:, :j]-pred[:, :j]).abs().max().item())
    return worst

@pytest.mark.parametrize("H, position, hand, target", [(1, "absolute", False, "absolute"), (1, "relative", True, "delta"), (2, "absolute", True, "absolute"), (2, "relative", False, "delta")])
def test_space_time_is_causal_bit_for_bit(H, position, hand, target):
    lam = make("space_time", n_extra_context=H, position=position, hand_state=hand, fdm_target=target)
    torch.nn.init.normal_(lam.fdm.head.weight); assert leak(lam, H) == 0
    lam.train(); torch.manual_seed(0); assert leak(lam, H) == 0                   # training mode too

@pytest.mark.parametrize("model", IMAGE_MODELS)
def test_next_frame_reaches_its_prediction_only_through_z(model):
    lam = make(model); win, t, _ = windows(); z = lam.encode(win, t).detach(); pred = lam.predict(win[:, :-1], z, t)
    moved = win.clone(); moved[:, -1] = torch.rand_like(moved[:, -1]); assert torch.equal(lam.predict(moved[:, :-1], z, t), pred)
    x = win.clone().requires_grad_(); g, = torch.autograd.grad(lam(x, t).pred[:, -1].sum(), x); assert (g[:, -1].abs().sum((1, 2, 3)) > 0).all()
    assert not torch.equal(lam.predict(win[:, :-1], z+1, t)[:, -1], pred[:, -1])

def test_hand_at_the_next_frame_reaches_the_idm_and_not_the_fdm():
    lam = make("space_time", hand_state=True); win, t, hand = windows(); z = lam.encode(win, t, hand); moved = hand.clone(); moved[:, -1] += 1
    assert not torch.equal(lam.encode(win, t, moved), z) and torch.equal(lam.predict(win[:, :-1], z, t, moved[:, :-1]), lam.predict(win[:, :-1], z, t, hand[:, :-1]))

FLOAT_MASK = ("causal_mask", lambda n, device=None: torch.ones(n, n).tril())
JOINT_NORM = ("token_norm", lambda x: F.layer_norm(x, x.shape[1:]))
@pytest.mark.parametrize("faults", [[FLOAT_MASK], [JOINT_NORM], [FLOAT_MASK, JOINT_NORM]], ids=["float mask", "joint norm", "both"])
def test_leak_test_finds_the_official_faults(monkeypatch, faults):
    lam = make("space_time"); assert leak(lam, 1) == 0
    for name, fault in faults: monkeypatch.setattr(clam.models.space_time, name, fault)
    assert leak(lam, 1) > 1e-4

# ---- labelled windows leave no trace ----
def moved_by_labelling(lam, win, t): # names of what a labelled pass in training mode changes
    lam.train(); before = {k: v.clone() for k, v in lam.state_dict().items()}; lam.label(win, t)
    return {k for k, v in lam.state_dict().items() if not torch.equal(v, before[k])}

def test_labelled_pass_leaves_batch_statistics_alone(monkeypatch):
    lam = make("conv", conv_norm="batch"); win, t, _ = windows(); lam.train()(win, t)
    assert moved_by_labelling(lam, win*.3, t) == set() and all(m.training for m in lam.modules())
    assert torch.allclose(lam.train().label(win, t), lam.eval().label(win, t))    # labels with what relabelling will use
    lam.train(); before = lam.idm.encoder.down[0][1].running_mean.clone(); lam(win*.3, t); assert not torch.equal(lam.idm.encoder.down[0][1].running_mean, before)     # the unlabelled pass moves them
    monkeypatch.setattr(clam.models.lam, "frozen_statistics", contextlib.nullcontext)
    assert any("running_mean" in k for k in moved_by_labelling(lam, win*.3, t))   # the fault is found

def test_default_model_has_no_statistics():
    for model in IMAGE_MODELS:
        lam = make(model); assert [k for k, _ in lam.named_buffers()] == ["idm.step_std"]      # the unit of change, which training does not move
        before = lam.step_std.clone(); lam.train()(*windows()[:2]); assert torch.equal(lam.step_std, before)

@pytest.mark.parametrize("kind", KINDS)
def test_labelled_pass_leaves_the_codebook_alone(kind, monkeypatch):
    lam = make("mlp", quantise=kind); win, t = state_windows(); lam.train()(win, t)
    assert moved_by_labelling(lam, win+5, t) == set()
    forward = type(lam.quantiser).forward
    monkeypatch.setattr(type(lam.quantiser), "forward", lambda self, z, learn=False: forward(self, z, True))
    found = moved_by_labelling(lam, win+5, t); assert found == set() if kind == "vq-lapo" else found      # vq-lapo labels before it quantises

@pytest.mark.parametrize("model", ["transformer", "space_time"])
def test_dropout_while_labelling_is_found(model):
    lam = make(model, dropout=.3); win, t = (state_windows() if model == "transformer" else windows()[:2])
    def repeats(): return torch.equal(lam.label(win, t), lam.label(win, t))
    assert repeats() and not (lam.train() and repeats()) and (lam.eval() and repeats())

# ---- sizes ----
@pytest.mark.parametrize("side", [16, 32, 64, 84, 99])
def test_conv_skips_fit_every_size(side):
    lam = make("conv", obs=(3, side, side)); win, t, _ = windows(n=1, side=side); assert lam(win, t).pred.shape == (1, 1, 3, side, side)

def test_skips_written_for_84_pixels_are_found(monkeypatch):
    kernels = dict(zip([1, 2, 5, 10, 21, 42], [2, 3, 2, 3, 2, 2])); right = clam.models.conv.up
    def fixed(c_in, c_out, norm, h, H): k = list(kernels.values())[int(math.log2(h))]; return right(c_in, c_out, norm, h, 2*h-2+k)
    monkeypatch.setattr(clam.models.conv, "up", fixed)
    assert make("conv", obs=(3, 84, 84))(windows(n=1, side=84)[0]).pred.shape[-1] == 84
    with pytest.raises(RuntimeError): make("conv", obs=(3, 64, 64))(windows(n=1, side=64)[0])

@pytest.mark.parametrize("shape", [(3, 84, 84), (3, 20, 20)])
def test_patches_must_tile(shape):
    with pytest.raises(ConfigError, match="patches do not tile"): make("space_time", obs=shape, patch=16)

# ---- training ----
@pytest.mark.parametrize("model", ["mlp", "transformer", *IMAGE_MODELS])
@pytest.mark.parametrize("quantise", ["none", *KINDS])
def test_five_updates_of_every_model_and_arm(model, quantise):
    "Joint training, one optimiser over everything: losses fall, every weight that can has a gradient, the aux numbers are logged."
    images = model in IMAGE_MODELS; win, t = windows(n=16)[:2] if images else state_windows()
    with seed_everything(1): lam, dec = make(model, quantise=quantise, spare_weights=False, fdm_target="delta").train(), ActionDecoder(8, 2, HeadConfig(embed_dim=0, hidden_dim=16))
    act = torch.tanh(win.flatten(1)[:, :2]); opt = torch.optim.AdamW([*lam.parameters(), *dec.parameters()], 2e-3); recon = []
    for i in range(5):
        out = lam(win, t); recon.append((out.pred-out.target(win)).square().mean())
        loss = recon[-1] + out.aux.get("vq_loss", 0.) + (dec(lam.label(win, t))-act).square().mean()
        opt.zero_grad(); loss.backward(); opt.step()
        assert torch.isfinite(loss) and set(out.aux) == (set() if quantise == "none" else {"vq_loss", "perplexity", "dead_codes"})
    assert recon[-1] < recon[0] and all(p.grad is not None and torch.isfinite(p.grad).all() for p in [*lam.parameters(), *dec.parameters()])

@pytest.mark.parametrize("model", IMAGE_MODELS)
def test_bfloat16_and_vpt(model):
    lam = make(model).train(); win, t, _ = windows()
    with torch.autocast("cpu", torch.bfloat16): out = lam(win, t)
    (out.pred.float()-out.target(win)).square().mean().backward(); assert all(torch.isfinite(p.grad).all() for p in lam.parameters() if p.grad is not None)
    vpt = ActionIDM(3, (3, SIDE, SIDE), 2, LAMConfig(model=model, quantise="vq-lapo", **BASE)).eval(); assert vpt(win, t).shape == (6, 2)
    with pytest.raises(ConfigError, match="wrong shape"): vpt(win[:, 1:], t)

@pytest.mark.parametrize("model", IMAGE_MODELS)
@pytest.mark.parametrize("name", ["tiny", "quick"])
def test_small_presets_run_and_labels_repeat(model, name):
    lam = build_lam(preset(name, model).lam, (3, 32, 32)).eval(); win, t, _ = windows(n=4, side=32); t = t % 5
    assert torch.equal(lam.label(win, t), lam.label(win, t)) and (lam(win[:1], t[:1]).pred-lam(win, t).pred[:1]).abs().max() < 1e-5

def test_image_policies():
    cfg = HeadConfig(embed_dim=8, hidden_dim=16, image_width=1); x = torch.rand(4, 3, 20, 20)
    assert LatentPolicy((3, 20, 20), 5, cfg)(x).shape == (4, 5) and BCPolicy((3, 20, 20), 2, cfg)(50*x).abs().max() <= 1

# ---- quantisers ----
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_latents_are_few_and_survive_a_round_trip(kind):
    a, b = (make("transformer", seed=s, quantise=kind) for s in (1, 2)); win, t = state_windows(); a.train()(win, t); a.eval()
    b.load_state_dict(a.state_dict()); out = a.quantiser(a.idm(win, t))
    assert torch.equal(a(win, t).pred, b(win, t).pred) and torch.equal(a.encode(win, t), out.z) and out.codes.dtype == torch.int64
    vectors, codes = out.z.flatten(0, 1), out.codes.flatten(0, 1); same = (codes[:, None] == codes[None]).all(-1)
    assert (vectors[:, None]-vectors[None]).abs().amax(-1)[same].max() < 1e-5                       # one name, one vector

def test_nearest_code_by_hand_and_lapo_layout():
    "VQ against a search by hand; LAPO cuts z as (codebook, width, part), each codebook's four parts sharing its codes."
    q = make("mlp", quantise="vq-repo").quantiser; z = torch.randn(9, 1, 8); book = q.net.codebook
    want = torch.stack([min(book, key=lambda c: ((c-x)**2).sum().item()) for x in z[:, 0]]); assert (q(z).z[:, 0]-want).abs().max() < 1e-6
    q = make("mlp", quantise="vq-lapo", latent_dim=16).quantiser; z = torch.randn(9, 1, 16); cut = z.view(9, 2, 2, 4); want = torch.empty_like(cut)     # 2 books, width 2, 4 parts
    for b, n, part in itertools.product(range(9), range(2), range(4)): want[b, n, :, part] = min(q.net.codebook[n], key=lambda c: ((c-cut[b, n, :, part])**2).sum().item())
    assert (q(z).z-want.view(9, 1, 16)).abs().max() < 1e-6

def test_lapo_preset_is_the_original():
    q = make("mlp", quantise="vq-lapo", latent_dim=128).quantiser; book = q.net._codebook
    assert q.net.codebook.shape == (2, 64, 16) and book.decay == .999 and q.net.commitment_weight == .05 and not q.net.rotation_trick and not book.has_dead_code_replacement
    assert book.embed.abs().max() <= 5/64 and q(torch.randn(3, 1, 128)).codes.shape == (3, 1, 8) and q.labels_before
    r = make("mlp", quantise="vq-repo").quantiser.net; assert (r.codebook_size, r._codebook.decay, r.commitment_weight, r._codebook.threshold_ema_dead_code, r.rotation_trick) == (128, .99, 1., 2, True)

def test_continuous_model_has_no_quantiser_and_needs_no_library(monkeypatch):
    import sys; monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    assert make("mlp").quantiser is None
    with pytest.raises(ImportError): make("mlp", quantise="fsq")

# ---- errors ----
@pytest.mark.parametrize("f, words", [
    (lambda: build_lam(LAMConfig(), (3, 64, 64)), "mlp reads states"), (lambda: build_lam(LAMConfig(model="conv"), 39), "conv reads square pictures"), (lambda: make("space_time", obs=(3, 16, 32)), "square pictures"),
    (lambda: make("space_time", linear_skip=True), "linear_skip is for states"), (lambda: make("conv", hand_state=True), "sees pictures only"),
    (lambda: make("mlp", quantise="vq-lapo", latent_dim=12), "multiple of 8"), (lambda: make("space_time").encode(windows()[0][:, 1:]), "window has the wrong shape; got .*3, 16, 16"),
    (lambda: make("space_time", hand_state=True)(*windows()[:2]), "got none"), (lambda: make("space_time", hand_state=True)(*windows()[:2], windows()[2][..., :3]), "hand has the wrong shape"),
    (lambda: make("space_time").encode(windows()[0], torch.full((6,), 49)), "max_positions=50")])
def test_mistakes_are_named(f, words):
    with pytest.raises(ConfigError, match=words): f()
