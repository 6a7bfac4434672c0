"""Pins what a run directory promises: resuming is exact to the last bit (weights, both optimisers, schedules, samplers, every random
generator, the alternation counter), at least twenty kill -9 at random moments never cost more than the updates since the last state,
damage is found and named, nothing loaded runs code, and one run has one owner."""
import json, multiprocessing, os, pickle, random, re, signal, threading, time
from pathlib import Path
import numpy as np, pytest, torch
from clam.config import preset
from clam.core import CheckpointError, ClamError, file_digest, seed_everything
from clam.data.store import EpisodeStore, write_store
from clam.toy import ToyWorld, toy_episodes
from clam.train.baselines import train_method
from clam.train.checkpoint import Run, load_state, load_tensors, load_weights
from clam.train.loop import Callback, WindowData
from clam.train.stage1 import JointStep, train_stage1

@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(n)

@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return EpisodeStore(write_store(tmp_path_factory.mktemp("data")/"toy", toy_episodes(60, seed=0), {"name": "toy", "spec": ToyWorld().spec}))

def config(model="mlp", **kw):
    return preset("tiny", model).replace(split__n_expert=8, split__n_labelled=8, **kw)

class StopAt(Callback):
    def __init__(self, at): self.at = at
    def on_update(self, i): return i == self.at

def state_files(run, stage="stage1"): # content of the newest state
    d = run.states(stage)[0]
    return load_tensors(d/"tensors.safetensors"), json.loads((d/"state.json").read_text())

# ---------------------------------------------------------------- exact resume
@pytest.mark.parametrize("model, kw", [("mlp", dict(stage1__label_shift=.5)), ("mlp", dict(lam__quantise="vq-repo")), ("mlp", dict(lam__quantise="residual")), ("transformer", dict(lam__dropout=.1)), ("mlp", dict(stage1__decoder_every=3, lam__step_units=True, lam__idm_input="difference", lam__fdm_target="delta"))])
def test_100_updates_equal_50_resume_50(store, tmp_path, model, kw):
    cfg = config(model, stage1__updates=150, **kw)
    whole = train_stage1(store, cfg, tmp_path/"whole", [StopAt(100)], quiet=True, log_every=10)
    parts = train_stage1(store, cfg, tmp_path/"parts", [StopAt(50)], quiet=True, log_every=10)
    assert state_files(parts)[1]["step"] == 50
    random.seed(1); np.random.seed(2); torch.manual_seed(3)               # whatever else happened in between
    train_stage1(store, cfg, tmp_path/"parts", [StopAt(100)], resume=True, quiet=True, log_every=10)
    (a, ja), (b, jb) = state_files(whole), state_files(parts)
    assert ja == jb and ja["step"] == 100                                 # Python's and numpy's generators, the counter, the configuration
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for prefix in ("module.lam.", "module.decoder.", "optim.lam.", "optim.decoder.", "sampler.unlabelled", "sampler.labelled", "rng.torch"):
        assert any(k.startswith(prefix) for k in a), prefix
    K = cfg.stage1.decoder_every
    assert max(v.item() for k, v in a.items() if k.startswith("optim.decoder.") and k.endswith(".step")) == -(-100//K)  # the decoder's turn came every K-th time
    losses = lambda run: [{k: v for k, v in m.items() if k != "updates_per_second"} for m in run.metrics()]
    assert losses(whole) == losses(parts) and len(losses(whole)) == 10

@pytest.mark.parametrize("method", ["clam", "vpt", "bc-al"])
def test_resume_in_any_stage(store, tmp_path, method):
    cfg = config(stage1__updates=60, stage2__updates=40, bc__updates=40, idm__updates=40)
    whole = train_method(method, store, cfg, tmp_path/"whole", quiet=True)
    class Quit(Callback):
        left = 23
        def on_update(self, i): self.left -= 1; return self.left == 0
    for n in range(20):
        parts = train_method(method, store, cfg, tmp_path/"parts", [Quit()], resume=True, quiet=True)
        if parts.finished("policy"): break
    assert n >= 1 and parts.weights() == whole.weights()
    assert all(parts.weights_digest(w) == whole.weights_digest(w) for w in whole.weights())
    assert not list((parts.path/"state").iterdir())

def test_callers_generators_are_left_alone(store, tmp_path):
    torch.manual_seed(5); np.random.seed(5); random.seed(5); want = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(5); np.random.seed(5); random.seed(5)
    train_stage1(store, config(stage1__updates=5), tmp_path/"r", quiet=True)
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == want

# ---------------------------------------------------------------- kill -9
def kill_config(): return config(stage1__updates=70, stage2__updates=60)

class Tell(Callback): # leaves a file when training has begun
    def __init__(self, flag, pause=0.): self.flag, self.pause, self.told = flag, pause, False
    def on_update(self, i):
        if not self.told: self.flag.touch(); self.told = True
        time.sleep(self.pause)

def wait_for(flag, seconds=60):
    end = time.time()+seconds
    while not flag.exists() and time.time() < end: time.sleep(.003)
    return flag.exists()

def server(): # processes that need not import torch again
    ctx = multiprocessing.get_context("forkserver"); ctx.set_forkserver_preload(["clam.train.baselines", "torch._dynamo"])
    return ctx

def victim(data, path, flag): # trains with a state every 5 updates
    torch.set_num_threads(1)
    train_method("clam", EpisodeStore(data), kill_config(), path, [Tell(flag)], resume=True, quiet=True, save_every=5, log_every=7)

def check_recoverable(store, path): # what a user finds after the power came back
    run = Run(path)
    if not run.exists: return None                                         # killed before the record was complete: begins again
    run.config, run.splits, run.normaliser, run.metrics()
    for name in run.weights(): getattr(run, name)()
    if run.finished("lam"): return "stage2"
    step = resumed_step(store, run)
    assert step % 5 == 0
    return step

def resumed_step(store, run): # load the newest good state of Stage 1 into new objects
    u, l = (WindowData(v, run.normaliser) for v in (run.splits.unlabelled_view(store), run.splits.labelled_view(store)))
    with seed_everything(0): return load_state(run, "stage1", JointStep(run.new_lam(), run.new_decoder(), u, l, run.config.stage1, 0).state())

@pytest.mark.slow
def test_twenty_kills(store, tmp_path):
    whole = train_method("clam", store, kill_config(), tmp_path/"whole", quiet=True)
    rng, kills, runs, seen = random.Random(0), 0, 0, []
    while kills < 20 or not runs:
        path = tmp_path/f"run{runs}"
        while True:
            (flag := tmp_path/"begun").unlink(missing_ok=True)
            p = server().Process(target=victim, args=(store.path, path, flag)); p.start()
            if kills < 20:
                if rng.random() < .8: wait_for(flag)                           # else: perhaps before training began
                p.join(rng.uniform(0, .4))
                if p.is_alive(): os.kill(p.pid, signal.SIGKILL); kills += 1; p.join(); seen.append(check_recoverable(store, path)); continue
            p.join(120)
            assert p.exitcode == 0
            break
        run = Run(path); runs += 1
        assert run.finished("lam", "decoder", "policy")
        assert [run.weights_digest(w) for w in run.weights()] == [whole.weights_digest(w) for w in whole.weights()]   # byte for byte
        updates = [(m["stage"], m["update"]) for m in run.metrics()]
        assert len(updates) == len(set(updates)) and [u for s, u in updates if s == "stage1"] == list(range(7, 71, 7))
        assert not [p for p in run.path.rglob("*") if p.name.endswith(".tmp")]
    assert len({s for s in seen if isinstance(s, int)}) > 3                # they fell at different moments
    print(kills, "kills,", runs, "runs, found at", seen)

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_first(store, tmp_path, number):
    p = server().Process(target=signalled, args=(store.path, tmp_path/"r", tmp_path/"begun")); p.start()
    assert wait_for(tmp_path/"begun"); os.kill(p.pid, number); p.join(30)
    assert p.exitcode not in (0, None) and p.exitcode != -signal.SIGKILL
    assert Run(tmp_path/"r").states("stage1")                              # nothing but the signal had a reason to save

def signalled(data, path, flag):
    torch.set_num_threads(1)
    train_method("clam", EpisodeStore(data), config(stage1__updates=100_000), path, [Tell(flag, .01)], quiet=True, save_seconds=1e9)

def test_an_exception_in_a_callback_saves(store, tmp_path):
    class Quit(Callback):
        def on_update(self, i):
            if i == 13: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train_stage1(store, config(stage1__updates=50), tmp_path/"r", [Quit()], quiet=True)
    assert Run(tmp_path/"r").states("stage1")[0].name.endswith("-000000013")

def test_an_exception_inside_an_update_saves_nothing_half_done(store, tmp_path, monkeypatch):
    original = JointStep.__call__
    def broken(self, i):
        out = original(self, i)
        if i == 20: raise MemoryError
        return out
    monkeypatch.setattr(JointStep, "__call__", broken)
    with pytest.raises(MemoryError): train_stage1(store, config(stage1__updates=50), tmp_path/"r", quiet=True, save_every=8)
    assert [s.name[-2:] for s in Run(tmp_path/"r").states("stage1")] == ["16", "08"]
    monkeypatch.undo()
    a = train_stage1(store, config(stage1__updates=50), tmp_path/"r", resume=True, quiet=True); b = train_stage1(store, config(stage1__updates=50), tmp_path/"b", quiet=True)
    assert a.weights_digest("lam") == b.weights_digest("lam")

def test_divergence_keeps_the_last_good_state(store, tmp_path, monkeypatch):
    original = JointStep.__call__
    def poison(self, i):
        if i == 30: self.lam.fdm.net[0].weight.data.fill_(float("nan"))
        return original(self, i)
    monkeypatch.setattr(JointStep, "__call__", poison)
    for every, name in ((16, "a"), (31, "b")):                             # found by the log, and by the state that was about to be saved
        with pytest.raises(ClamError, match="training diverged"): train_stage1(store, config(stage1__updates=50), tmp_path/name, quiet=True, save_every=every, log_every=40)
        for s in Run(tmp_path/name).states("stage1"): assert all(v.isfinite().all() for v in load_tensors(s/"tensors.safetensors").values())

# ---------------------------------------------------------------- damage
@pytest.fixture
def halted(store, tmp_path): # a run with two states, at 20 and 10
    return train_stage1(store, config(stage1__updates=50), tmp_path/"halted", [StopAt(20)], quiet=True, save_every=10)

def test_any_flipped_or_missing_byte_of_a_state_is_noticed(store, halted):
    newest, older = halted.states("stage1"); rng = random.Random(0)
    for f in sorted(newest.iterdir()):
        content = f.read_bytes()
        for i in [0, len(content)-1, *(rng.randrange(len(content)) for _ in range(6))]:
            for damaged in (content[:i]+bytes([content[i] ^ (1 << rng.randrange(8))])+content[i+1:], content[:i]):
                f.write_bytes(damaged)
                a = resumed_step(store, halted)
                assert a in (10, 20) and (a == 10 or f.name == "manifest.json"), (f.name, i)       # a harmless bit of the manifest's spacing may go unnoticed
        f.unlink(); assert resumed_step(store, halted) == 10
        f.write_bytes(content); assert resumed_step(store, halted) == 20

def test_both_states_damaged_is_an_error_not_a_fresh_start(store, halted):
    for s in halted.states("stage1"): (s/"state.json").write_text("{")
    with pytest.raises(CheckpointError, match="no state of this run can be read"): train_stage1(store, halted.config, halted.path, resume=True, quiet=True)

def test_weights_written_but_not_listed_are_made_again(store, tmp_path):
    run = train_stage1(store, config(stage1__updates=30), tmp_path/"r", [StopAt(30)], quiet=True, save_every=10)
    want = run.weights_digest("lam")
    halted = train_stage1(store, config(stage1__updates=30), tmp_path/"h", [StopAt(25)], quiet=True)
    (halted.path/"lam.safetensors").write_bytes(b"half a file")            # killed while finishing
    assert not halted.finished("lam")
    assert train_stage1(store, config(stage1__updates=30), tmp_path/"h", resume=True, quiet=True).weights_digest("lam") == want

def test_killed_between_first_files_begins_again(store, tmp_path):
    (tmp_path/"r").mkdir(); (tmp_path/"r"/"splits.json").write_text("{"); (tmp_path/"r"/".config.json.x.tmp").write_text("{")
    run = train_stage1(store, config(stage1__updates=5), tmp_path/"r", quiet=True)
    assert run.finished("lam") and not list(run.path.glob(".*.tmp"))

def test_torn_metrics_line_is_dropped(store, tmp_path, halted):
    with open(halted.path/"metrics.jsonl", "a") as f: f.write('{"stage": "stage1", "update": 2')
    train_stage1(store, halted.config, halted.path, resume=True, quiet=True)
    assert [m["update"] for m in halted.metrics()] == list(range(1, 51))
    for line in (halted.path/"metrics.jsonl").read_text().splitlines(): json.loads(line)

# ---------------------------------------------------------------- trust
class Bomb:
    def __reduce__(self): return os.system, ("touch bomb_went_off",)

def test_a_pickle_is_refused_and_not_run(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train_stage1(store, config(stage1__updates=5), tmp_path/"r", quiet=True)
    f, m = run.path/"lam.safetensors", json.loads((run.path/"manifest.json").read_text())
    f.write_bytes(pickle.dumps(Bomb())); m["files"][f.name] = {"sha256": file_digest(f), "bytes": f.stat().st_size}
    (run.path/"manifest.json").write_text(json.dumps(m))                   # even with a manifest that vouches for it
    with pytest.raises(CheckpointError, match="not a readable safetensors file"): run.lam()
    assert not (tmp_path/"bomb_went_off").exists()

def test_no_loader_that_could_run_code():
    import clam.train
    bad = re.compile(r"(?<!safetensors\.)torch\.(load|save)\(|(?<!allow_)pickle|allow_pickle=True|(?<![\w.`])(eval|exec)\(")
    for f in Path(clam.train.__file__).parent.glob("*.py"):
        text = re.sub(r"torch\.load\([^()]*weights_only=True\)", "", f.read_text())      # refuses everything but tensors; tried with an evil file in test_act.py
        assert not bad.search(text), f"{f.name}: {bad.search(text)}"
    assert bad.search("torch.load(f)") and bad.search("import pickle") and not bad.search("safetensors.torch.load(f); m.eval()")

@pytest.mark.parametrize("content", [b"", b"\xff"*7, b"\xff"*64, (2**40).to_bytes(8, "little")+b"{}", b"\x02\0\0\0\0\0\0\0{}", b"\x10\0\0\0\0\0\0\0"+b'{"a":{"dtype":1}'])
def test_garbage_is_a_checkpoint_error(tmp_path, content):
    f = tmp_path/"x.safetensors"; f.write_bytes(content)
    with pytest.raises(CheckpointError): load_weights(torch.nn.Linear(2, 2), f)

# ---------------------------------------------------------------- one run, one owner, one configuration
def test_a_second_process_is_refused(store, halted):
    entered, leave = threading.Event(), threading.Event()
    def hold():
        with Run(halted.path).locked(): entered.set(); leave.wait(20)
    t = threading.Thread(target=hold); t.start(); entered.wait(20)
    try:
        with pytest.raises(CheckpointError, match="in use by another process"): train_stage1(store, halted.config, halted.path, resume=True)
    finally: leave.set(); t.join()
    train_stage1(store, halted.config, halted.path, [StopAt(21)], resume=True, quiet=True)

@pytest.mark.parametrize("change, words", [(dict(stage1__beta=2.), "stage1.beta: 1.0 -> 2.0"), (dict(lam__latent_dim=3), "lam.latent_dim: 8 -> 3"), (dict(lam__model="transformer"), "lam.model: mlp -> transformer"), (dict(seed=1), "seed: 0 -> 1")])
def test_resume_names_the_fields_that_differ(store, halted, change, words):
    with pytest.raises(CheckpointError) as e: train_stage1(store, halted.config.replace(**change), halted.path, resume=True)
    assert words in str(e.value)

def test_evaluation_settings_may_change(store, halted):
    assert train_stage1(store, halted.config.replace(eval__episodes=3), halted.path, resume=True, quiet=True).finished("lam")

def test_weights_of_another_shape_are_refused(store, tmp_path):
    a = train_stage1(store, config(stage1__updates=2), tmp_path/"a", quiet=True)
    wide = EpisodeStore(write_store(tmp_path/"wide", toy_episodes(60, seed=0, noise_dims=2), {"name": "toy", "spec": ToyWorld(2).spec}))
    b = train_stage1(wide, config(stage1__updates=2), tmp_path/"b", quiet=True)
    a.finish(lam=b.new_lam())
    with pytest.raises(CheckpointError, match="weights are of another model"): a.lam()
    with pytest.raises(CheckpointError, match="not the one this run was trained on"): train_stage1(wide, a.config, a.path, resume=True)

def test_nothing_is_overwritten_unasked(store, halted):
    before = {p: p.read_bytes() for p in halted.path.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match="run exists already"): train_stage1(store, halted.config, halted.path)
    assert {p: p.read_bytes() for p in halted.path.rglob("*") if p.is_file()} == before
