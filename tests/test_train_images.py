"""Pins frames through the whole pipeline: windows of pictures are the stored bytes and nothing else, every image model and method trains
and resumes exactly, actions stay hidden, labelled passes leave statistics alone, where a policy's encoder comes from, agents and rollouts
that see what they were trained on, diagnostics in pixels, old digests, and one clear line for frames that are missing or do not fit."""
import json
from pathlib import Path
import numpy as np, pytest, torch
import clam.evaluate.rollout as rollouts
from clam.cli.shell import main
from clam.collect.recipes import make_dataset
from clam.config import IMAGE_MODELS, EvalConfig, identity, preset
from clam.core import CheckpointError, ConfigError, DatasetError, EnvError, digest, project_root
from clam.data.normalise import Pictures
from clam.data.store import Episodes, EpisodeStore, write_store
from clam.evaluate.experiments import Cell, experiment_digest, label, run_method, run_table
from clam.evaluate.health import VERDICTS, _thinner, health, subject_of_episodes
from clam.evaluate.inspection import inspect_run
from clam.evaluate.ladder import ladder
from clam.evaluate.probes import decoded_action_r2, inferred_actions, linear_probe, recon_vs_cheat
from clam.evaluate.rollout import evaluate, rollout
from clam.toy import ToyWorld, draw, toy_episodes
from clam.train.agents import Agent, load_agent
from clam.train.baselines import METHODS, train_method
from clam.train.checkpoint import Run, load_tensors
from clam.train.loop import Callback, WindowData
from clam.train.relabel import label_windows, relabel
from clam.train.stage1 import train_stage1
from clam.train.stage2 import train_stage2

@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(n)

SIDE, T = 16, 20
def painted(episodes, side=SIDE): return [e.replace(frames=np.stack([draw(o, side) for o in e.obs])) for e in episodes]
EPISODES = painted(toy_episodes(50, seed=0, T=T))
def toy_store(path, episodes=EPISODES): return EpisodeStore(write_store(path, episodes, {"name": "toy", "spec": ToyWorld(max_steps=T).spec}))
@pytest.fixture(scope="module")
def store(tmp_path_factory): return toy_store(tmp_path_factory.mktemp("data")/"toy")
FEW = dict(split__n_expert=2, split__n_labelled=4, split__heldout_fraction=.2, stage1__updates=5, stage2__updates=5, bc__updates=5, idm__updates=5, stage1__batch=8, stage1__labelled_batch=8, stage2__batch=8, bc__batch=8, idm__batch=8)
def config(model="conv", **kw): return preset("tiny", model).replace(**(FEW | kw))
def train(store, path, method="clam", model="conv", **kw): return train_method(method, store, config(model, **kw), path, quiet=True)
@pytest.fixture(scope="module")
def trained(store, tmp_path_factory): return {m: train(store, tmp_path_factory.mktemp("runs")/m, model=m) for m in IMAGE_MODELS}

# ---------------------------------------------------------------- windows
@pytest.mark.parametrize("stack", [1, 3])
def test_windows_are_the_stored_bytes(store, stack):
    d = WindowData(store, Pictures((SIDE, SIDE, 3), stack), 1); b = d.batch(torch.arange(len(d))); n = 0
    assert d.obs.dtype == torch.uint8 and b.win.shape == (len(d), 3, 3*stack, SIDE, SIDE) and 0 <= b.win.min() and b.win.max() <= 1
    for ep in EPISODES[:5]:
        for t in range(T):
            for w, i in enumerate((t-1, t, t+1)):
                want = np.concatenate([ep.frames[max(0, i-k)] for k in range(stack-1, -1, -1)], -1) if i >= 0 else np.concatenate([ep.frames[0]]*stack, -1)
                assert np.array_equal(np.round(b.win[n, w].numpy()*255), want.transpose(2, 0, 1)), (n, w)
            assert torch.equal(d.current(torch.tensor([n]))[0], b.win[n, 1]) and np.array_equal(b.act[n], ep.act[t]); n += 1

def test_the_hand_goes_with_its_frame(tmp_path):
    rng = np.random.default_rng(0); eps = [e.replace(obs=rng.normal(size=(T+1, 39)).astype(np.float32), act=np.repeat(e.act, 2, 1)) for e in EPISODES]
    s = EpisodeStore(write_store(tmp_path/"mw", eps, {"name": "metaworld/assembly"}))
    run = train_stage1(s, config("space_time", lam__hand_state=True), tmp_path/"r", quiet=True)
    b = WindowData(s.take([3]), run.normaliser).batch(torch.tensor([0, 5])); assert np.array_equal(b.hand[1], eps[3].obs[4:7, :4]) and np.array_equal(b.hand[0], eps[3].obs[[0, 0, 1], :4])
    train_stage2(run, s, quiet=True); assert run.finished("policy") and np.isfinite(recon_vs_cheat(run, s)["ratio"])
    assert inferred_actions(run, s.take([3])).shape == (T, 4) and load_agent(run.path).act(eps[0].frames[0])[0].shape == (4,)  # the policy sees the picture alone

# ---------------------------------------------------------------- training
@pytest.mark.parametrize("model", IMAGE_MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_acts(store, tmp_path, method, model):
    run = train(store, tmp_path/"r", method, model); agent = load_agent(run.path)
    assert run.finished("policy") and run.reads == agent.reads == "frames" and run.observed == (3, SIDE, SIDE) and agent.side == SIDE
    frames = EPISODES[0].frames[:3]; A, Z = agent.act(frames); assert A.shape == (3, 2) and np.abs(A).max() <= 1 and (Z is not None) == (method == "clam")
    x = torch.from_numpy(frames.transpose(0, 3, 1, 2)/np.float32(255)); out = run.policy()(x); assert np.allclose(A, run.decoder()(out) if method == "clam" else out, atol=1e-6)
    for i in range(3): assert np.allclose(agent.act(frames[i])[0], A[i], atol=1e-5)

def test_the_hand_lies_where_the_state_names_it():
    from clam.data.normalise import HAND
    from clam.envs.metaworld import OBS_SLICES
    from clam.robot.sim import SLICES
    for family, slices in {"metaworld": OBS_SLICES, "widowx": SLICES}.items():
        lo, hi = HAND[family]; assert {n for n, s in slices.items() if lo <= s.start and s.stop <= hi} == {"hand", "gripper"} and hi-lo == 4

@pytest.mark.parametrize("model, updates, recon, act", [("conv", 100, .9, .6), ("space_time", 60, .99, 1.2)]) # the attention model needs thousands of updates before it sees the push
def test_a_short_training_lowers_the_losses(store, tmp_path, model, updates, recon, act):
    m = train_stage1(store, config(model, stage1__updates=updates, stage1__batch=16, stage1__labelled_batch=32), tmp_path/"r", quiet=True, log_every=updates//10).metrics("stage1")
    ratio = [r["recon_loss"]/r["cheat_loss"] for r in m]; assert ratio[-1] < recon*ratio[0] and m[-1]["action_loss"] < act*m[0]["action_loss"]

class StopAt(Callback):
    def __init__(self, at): self.at = at
    def on_update(self, i): return i == self.at

@pytest.mark.parametrize("model, kw", [("conv", dict(lam__conv_norm="batch", lam__frame_stack=2)), ("space_time", dict(lam__dropout=.1))])
def test_resume_is_exact(store, tmp_path, model, kw):
    cfg = config(model, stage1__updates=12, **kw)
    whole, parts = (train_stage1(store, cfg, tmp_path/n, [StopAt(at)], quiet=True) for n, at in (("whole", 10), ("parts", 4)))
    torch.manual_seed(7); train_stage1(store, cfg, tmp_path/"parts", [StopAt(10)], resume=True, quiet=True)
    a, b = (load_tensors(r.states("stage1")[0]/"tensors.safetensors") for r in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and any("sampler" in k for k in a)

@pytest.mark.parametrize("method", METHODS)
def test_actions_stay_hidden(store, tmp_path, method, monkeypatch):
    reads, original = [], Episodes.act.fget
    monkeypatch.setattr(Episodes, "act", property(lambda self: (reads.append(set(self.index.tolist())), original(self))[1]))
    run = train(store, tmp_path/"a", method); allowed = set((run.splits.expert if method == "bc-expert" else run.splits.labelled).tolist())
    assert reads and all(r <= allowed for r in reads); monkeypatch.undo()
    rng = np.random.default_rng(9); other = [e if i in allowed else e.replace(act=rng.uniform(-1, 1, e.act.shape).astype(np.float32)) for i, e in enumerate(EPISODES)]
    again = train(toy_store(tmp_path/"data", other), tmp_path/"b", method)
    assert all(run.weights_digest(w) == again.weights_digest(w) for w in run.weights())

def test_labelled_windows_leave_statistics_alone(store, tmp_path):
    run = train_stage1(store, config(lam__conv_norm="batch"), tmp_path/"r", quiet=True); lam, view = run.lam().train(), run.splits.labelled_view(store)
    stats = lambda: [b.clone() for b in lam.buffers()]
    before = stats(); lam.label(*WindowData(view, run.normaliser).batch(torch.arange(8)).inputs); assert all(map(torch.equal, before, stats()))
    lam(*WindowData(view, run.normaliser).batch(torch.arange(8)).inputs); assert not all(map(torch.equal, before, stats()))     # a pass that learns does move them

def test_relabelling_does_not_depend_on_the_batch(store, trained):
    for run in trained.values():
        view, lam = run.splits.expert_view(store), run.lam(); d = WindowData(view, run.normaliser)
        assert np.allclose(label_windows(lam, lam.label, d, 5), np.concatenate(relabel(run, view)), atol=1e-5)
    big = WindowData(store, Pictures((SIDE, SIDE, 3), 3)); assert big.chunk*3*9*SIDE**2 <= 2**22 and WindowData(store, Pictures((SIDE, SIDE, 3))).chunk > big.chunk

# ---------------------------------------------------------------- whose eyes
@pytest.mark.parametrize("model", IMAGE_MODELS)
def test_where_the_policys_encoder_comes_from(store, tmp_path, model):
    for init in ("scratch", "idm-frozen", "idm-finetuned"):      # frozen: not even its statistics move
        run = train(store, tmp_path/init, model=model, stage2__policy_init=init, lam__conv_norm="batch"); eyes, mine = run.lam().idm.state_dict(), run.policy().state_dict()
        same = [torch.equal(v, mine[f"idm.{k}"]) for k, v in eyes.items() if f"idm.{k}" in mine]
        assert {"scratch": not same, "idm-frozen": len(same) == len(eyes) and all(same), "idm-finetuned": len(same) == len(eyes) and not all(same)}[init]
        assert rollout(ToyWorld(max_steps=3, render_size=SIDE), load_agent(run.path), 5).z.shape == (3, 8)
    assert len({Run(tmp_path/i).record["digest"] for i in ("scratch", "idm-frozen", "idm-finetuned")}) == 3

# ---------------------------------------------------------------- agents and rollouts
def test_history_begins_anew_with_each_episode(store, tmp_path):
    run = train(store, tmp_path/"r", "bc-al", lam__frame_stack=3); agent = load_agent(run.path); assert run.observed == (9, SIDE, SIDE)
    env = ToyWorld(max_steps=6, render_size=SIDE); a, _, c = rollout(env, agent, 1), rollout(env, agent, 2), rollout(env, agent, 1)
    assert np.array_equal(a.act, c.act) and np.array_equal(a.obs, c.obs)
    agent.reset(); first = agent.act(EPISODES[0].frames[0])[0]; later = agent.act(EPISODES[1].frames[3])[0]; agent.reset()
    assert not np.array_equal(later, agent.act(EPISODES[1].frames[3])[0]); agent.reset(); assert np.array_equal(first, agent.act(EPISODES[0].frames[0])[0])
    data = WindowData(store.take([0]), run.normaliser, 0); agent.reset()                             # what it is asked is what it was trained on
    for t in range(5): assert np.allclose(agent.act(EPISODES[0].frames[t])[0], run.policy()(data.current(torch.tensor([t])))[0], atol=1e-6)

def test_evaluation_sees_frames_of_the_training_size(store, trained):
    run = trained["conv"]; cfg = EvalConfig(episodes=2, videos=1); r = evaluate(run.path, "toy", cfg, workers=1, quiet=True)
    assert r.episodes[0].frames is None and len(r.episodes[0]) == 40 and r.videos[0].frames.shape[1:] == (SIDE, SIDE, 3)          # a film of such an agent shows what it saw
    agent, ep = load_agent(run.path), r.videos[0]; assert np.allclose(agent.act(ep.frames[7])[0], ep.act[7], atol=1e-5)
    with pytest.raises(EnvError, match="render_size=agent.side"): rollout(ToyWorld(), agent, 0)

def test_the_world_is_drawn_as_the_agent_asks():
    seer = Agent(None, Pictures((24, 24, 3))); assert rollouts._world("fake", seer).render_size == 24 and rollouts._world("fake", seer, render=True).render_size == 24
    blind = type("Blind", (), {})(); assert rollouts._world("fake", blind).render_size == 16 and rollouts._world("fake", blind, True).render_size == rollouts.FILM_PX

# ---------------------------------------------------------------- diagnostics
@pytest.mark.parametrize("model", IMAGE_MODELS)
def test_diagnostics_in_pixels(store, trained, model):
    run = trained[model]; rec = recon_vs_cheat(run, store); held = [EPISODES[i].frames/255. for i in run.splits.heldout]
    step = [np.diff(f, axis=0) for f in held]; assert abs(rec["cheat"]-np.mean([s**2 for s in step])) < 1e-6
    moving = [(x**2)[np.broadcast_to(np.abs(x).max(-1, keepdims=True) > 7.5/255, x.shape)].mean() if np.abs(x).max() > 7.5/255 else 0. for s in step for x in s]
    assert abs(rec["slices"]["moving"]["cheat"]-np.mean(moving)) < 1e-5 and len(rec["per_dim"]["recon"]) == 1; json.dumps(rec)
    lam, d = run.lam(), WindowData(store.take(run.splits.heldout), run.normaliser); b = d.batch(torch.arange(len(d)))
    with torch.no_grad(): miss = (lam(*b.inputs).pred[:, -1]-b.win[:, -1]).square()
    mask = ((b.win[:, -1]-b.win[:, -2]).abs().amax(1, keepdim=True) > 7.5/255).expand_as(miss); per = [m[k].mean().item() if k.any() else 0. for m, k in zip(miss, mask)]
    assert abs(rec["recon"]-miss.mean().item()) < 1e-6 and abs(rec["slices"]["moving"]["recon"]-np.mean(per)) < 1e-5
    assert "floor" not in (dec := decoded_action_r2(run, store)) and np.isfinite(dec["heldout"]["r2"]) and np.isfinite(linear_probe(run, store)["gain"])

def test_ladder_climbs_with_pictures(tmp_path):
    s = EpisodeStore(write_store(tmp_path/"toy", painted(toy_episodes(30, seed=1)), {"name": "toy", "spec": ToyWorld().spec}))
    r = ladder(train(s, tmp_path/"r").path, s, episodes=2, view="expert", quiet=True); assert r.stage != "environment" and len(r.rungs) == 5

# ---------------------------------------------------------------- old records, and what goes wrong
def test_stored_results_stay_valid():
    f = next((project_root()/"data"/"results"/"table5-quick").glob("clam-mlp-metaworld-assembly-seed0.json")); r = json.loads(f.read_text())
    cfg = preset(r["preset"], r["model"], r["seed"]); assert experiment_digest(r["method"], cfg) == r["experiment"]
    assert experiment_digest(r["method"], cfg.replace(stage2__policy_init="idm-frozen")) != r["experiment"] != experiment_digest(r["method"], cfg.replace(lam__frame_stack=2))
    assert "frame_stack" not in identity(cfg)["lam"] and cfg.digest == digest(identity(cfg)) and label("vpt", config()) == "vpt-conv" and label("vpt", cfg) == "vpt"

def test_runs_written_before_the_new_fields_resume(store, tmp_path):
    run = train(store, tmp_path/"r", "bc-al"); record = run.record
    del record["config"]["lam"]["frame_stack"], record["config"]["stage2"]["policy_init"]; (run.path/"config.json").write_text(json.dumps(record))
    assert train_method("bc-al", store, config(), run.path, resume=True).finished("policy") and load_agent(run.path).reads == "frames"
    with pytest.raises(CheckpointError, match="lam.frame_stack: 1 -> 2"): train_method("bc-al", store, config(lam__frame_stack=2), run.path, resume=True)

def test_frames_that_are_missing_or_do_not_fit(store, tmp_path):
    blind = EpisodeStore(write_store(tmp_path/"blind", [e.replace(frames=None) for e in EPISODES], {"name": "toy"}))
    odd = toy_store(tmp_path/"odd", painted(toy_episodes(50, seed=0, T=T), 20))
    for s, cfg, why in ((blind, config(), "dataset has no frames.*make it with `clam data make toy --frames`"), (odd, config("space_time"), "patches do not tile the frames.*--frame-size 16"),
                        (store, config("space_time", lam__hand_state=True), "nobody knows where these states hold the hand"), (store, preset("tiny").replace(**FEW, stage2__policy_init="idm-frozen"), "policy_init is for pictures"),
                        (store, config(stage1__label_shift=1.), "label_shift is for states"), (store, config("space_time", lam__hand_state=True, stage2__policy_init="idm-frozen"), "this inverse model also the hand")):
        with pytest.raises((DatasetError, ConfigError), match=why) as e: train_stage1(s, cfg, tmp_path/"r", quiet=True)
        assert "\n" not in str(e.value) and not (tmp_path/"r"/"config.json").exists()
    assert train(odd, tmp_path/"c").finished("policy")                                                 # conv takes any side
    wide = EpisodeStore(write_store(tmp_path/"wide", [e.replace(frames=e.frames[:, :8]) for e in EPISODES], {"name": "toy"}))
    with pytest.raises(DatasetError, match="not square"): train_stage1(wide, config(), tmp_path/"w", quiet=True)

def test_recipes_draw_the_size_that_is_asked(tmp_path):
    s = EpisodeStore(make_dataset("toy", 3, seed=1, out=tmp_path/"a", workers=1, frames=24, quiet=True)); plain = EpisodeStore(make_dataset("toy", 3, seed=1, out=tmp_path/"b", workers=1, frames=True, quiet=True))
    assert s.spec.frame_shape == (24, 24, 3) and plain.spec.frame_shape == (32, 32, 3) and np.array_equal(s.obs, plain.obs)
    with pytest.raises(DatasetError, match="no frames of this size"): make_dataset("toy", 3, out=tmp_path/"c", workers=1, frames=4)

def test_command_line_end_to_end(tmp_path, capsys):
    def clam(*argv): code = main([*map(str, argv), "--json"]); out, err = capsys.readouterr(); return code, json.loads(out.splitlines()[-1]) if code == 0 else err
    data, run = tmp_path/"toy", tmp_path/"run"
    assert clam("data", "make", "toy", "--episodes", 30, "--frames", "--frame-size", 16, "--out", data, "--workers", 1)[0] == 0
    few = ["--split.n-expert", 2, "--split.n-labelled", 4]
    code, out = clam("train", "--data", data, "--model", "conv", "--preset", "tiny", "--run", run, *few, "--stage1.updates", 4, "--stage1.batch", 8); assert code == 0 and out["updates"] == 4
    code, out = clam("eval", "--run", run, "--episodes", 1); assert code == 2 and "policy" in out
    code, out = clam("baseline", "bc-al", "--model", "space_time", "--data", data, "--preset", "tiny", "--run", tmp_path/"bc", *few, "--bc.updates", 3); assert code == 0 and Run(tmp_path/"bc").reads == "frames"
    code, out = clam("eval", "--run", tmp_path/"bc", "--episodes", 2, "--workers", 1, "--videos", 0); assert code == 0 and out["episodes"] == 2
    assert clam("data", "make", "toy", "--episodes", 30, "--out", tmp_path/"blind", "--workers", 1)[0] == 0
    code, err = clam("train", "--data", tmp_path/"blind", "--model", "space_time", "--preset", "tiny", "--run", tmp_path/"no", *few); assert code == 2 and err.startswith("error: ") and "dataset has no frames" in err and err.count("\n") == 1

@pytest.mark.parametrize("model, stack", [("conv", 2), ("space_time", 1)])
def test_health_and_inspection_of_pictures(store, tmp_path, model, stack):
    run = train(store, tmp_path/"r", model=model, lam__frame_stack=stack); report = health(run, store); rec = recon_vs_cheat(run, store)
    assert report.verdict in VERDICTS and report.transitions == T*len(run.splits.heldout) and (stack > 1 or abs(report["recon_cheat"].value-rec["ratio"]) < 1e-4); json.dumps(report.to_dict())
    ins = inspect_run(run, store); n = 7; e, t = ins.where(n); assert ins.z.shape == (len(ins), 8) and ins.decoded.shape == (len(ins), 2) and np.array_equal(ins.frame(e, t), ins.episodes[e].frames[t])
    b = WindowData(store.take([int(run.splits.heldout[0])]), run.normaliser).batch(torch.tensor([n])); assert np.allclose(ins.z[n], run.lam().label(*b.inputs)[0], atol=1e-5)
    assert ins.predict([n]).shape == (1, SIDE, SIDE, 3) and ins.predict([n]).dtype == np.uint8 and len(ins.neighbours(n)) == 8
    with pytest.raises(DatasetError, match="reads frames, and these episodes have none"): subject_of_episodes(run.lam(), [e.replace(frames=None) for e in EPISODES[:3]], normaliser=run.normaliser)
    assert _thinner(Pictures((64, 64, 3)), 1, 10_000) < 2000 and _thinner(run.normaliser, 1, 50) == 50

# ---------------------------------------------------------------- the image run
def test_arms_take_over_one_stage_1(store, tmp_path):
    cfg = config(eval__episodes=2, eval__videos=0, eval__workers=1); arm = cfg.replace(stage2__policy_init="idm-frozen"); first = str(tmp_path/"first")
    cells = [Cell("clam", str(store.path), arm, str(tmp_path/"arm"), shared=first), Cell("clam", str(store.path), cfg, first)]      # the arm stands first and must wait
    a, b = run_table("t", cells, root=tmp_path, quiet=True, threads=1)
    assert (a["label"], b["label"]) == ("clam-conv-idm-frozen", "clam-conv") and a["shared"] == "first" and "shared" not in b and a["experiment"] != b["experiment"]
    assert a["diagnostics"] == b["diagnostics"] and b["diagnostics"]["recon"]["cheat"] > 0 and "stage1" not in a["seconds"] and Run(tmp_path/"arm").weights_digest("lam") == Run(first).weights_digest("lam")
    assert not Run(tmp_path/"arm").metrics("stage1") and Run(tmp_path/"arm").metrics("stage2")
    assert run_table("t", cells, root=tmp_path, quiet=True, threads=1) == [a, b]
    with pytest.raises(CheckpointError, match="another kind"): run_method("clam", store, arm.replace(stage1__beta=2.), tmp_path/"other", quiet=True, shared=first)

@pytest.mark.parametrize("model", IMAGE_MODELS)
def test_pixels_have_one_unit_of_change(store, tmp_path, model):
    plain, kw = dict(lam__idm_input="difference", lam__fdm_target="delta"), dict(lam__step_units=True)
    run = train(store, tmp_path/"r", model=model, **plain, **kw); data = WindowData(run.splits.unlabelled_view(store), run.normaliser, 1)
    change = data.batch(torch.arange(len(data))).win[:, -2:].diff(dim=1); assert abs(float(run.lam().step_std)/float(change.std())-1) < 1e-4          # few pictures: the sample is all of them
    r, c = run.metrics("stage1")[0]["recon_loss"], run.metrics("stage1")[0]["cheat_loss"]; assert .5 < c < 2 and abs(r/c-1) < .1                    # losses are counted in it, and begin at the cheat
    raw = recon_vs_cheat(run, store); assert raw["cheat"] < .2 and raw["cheat"] == recon_vs_cheat(train(store, tmp_path/"p", model=model, **plain), store)["cheat"]     # diagnostics stay in pixels
    assert Run(train(store, tmp_path/"v", "vpt", model, **plain, **kw)).idm().idm.step_std != 1
