"""Pins the policy of Appendix F in training and rollouts: targets of chunks stay within their episode, weights come from a local file
that executes nothing, every method of Table 3 trains and acts with it, agents average as the arm's runner does, one Stage 1 serves
several tasks, and nothing older changes its digest."""
import pickle
import numpy as np, pytest, torch
from clam.config import HeadConfig, SplitConfig, identity, preset
from clam.core import CheckpointError, ConfigError, Ensembler
from clam.data.splits import make_splits
from clam.data.store import EpisodeStore, write_store
from clam.evaluate.rollout import evaluate, rollout
from clam.evaluate.tables import KITCHEN, kitchen_config, plan
from clam.models.act import ResNet18
from clam.toy import ToyWorld, toy_episodes
from clam.train import stage2
from clam.train.agents import load_agent
from clam.train.checkpoint import Run, load_foreign
from clam.train.latent_baselines import METHODS, adopt, train_method

@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(n)

@pytest.fixture(scope="module")
def films(tmp_path_factory): # pictures of 32 pixels; every other episode belongs to task b
    eps = [e.replace(meta=e.meta | {"task": "ab"[i % 2]}) for i, e in enumerate(toy_episodes(40, seed=0, frames=True))]
    return EpisodeStore(write_store(tmp_path_factory.mktemp("films")/"films", eps, {"name": "films", "spec": ToyWorld().spec}))

ACT = dict(policy__image_encoder="act", policy__image_width=1, policy__embed_dim=32, policy__hidden_dim=32, policy__n_hidden=1, policy__chunk=4)
FEW = dict(stage1__updates=4, stage2__updates=4, bc__updates=4, idm__updates=4, stage1__batch=8, stage1__labelled_batch=8, stage2__batch=8, bc__batch=8, idm__batch=8)
def config(**kw): return preset("tiny", "space_time").replace(**{"split__n_expert": 4, "split__n_labelled": 4, "eval__episodes": 2, "eval__workers": 1, "eval__videos": 0, **ACT, **FEW, **kw})

# ---------------------------------------------------------------- nothing older changes
def test_older_digests_stay():
    now = {(p, m): preset(p, m).digest for p in ("tiny", "quick", "repo", "paper") for m in ("mlp", "space_time")}
    assert now == {("tiny", "mlp"): "08949da789e3", ("tiny", "space_time"): "14e8a4383bdb", ("quick", "mlp"): "14db78537d58", ("quick", "space_time"): "06368c98b478",
        ("repo", "mlp"): "0bfbb870e9ee", ("repo", "space_time"): "4fb9c2cf0d04", ("paper", "mlp"): "71d6aaceaf1e", ("paper", "space_time"): "23244869217e"}
    assert "task" not in identity(SplitConfig()) and "chunk" not in identity(HeadConfig()) and identity(HeadConfig(image_encoder="act", chunk=5))["chunk"] == 5

# ---------------------------------------------------------------- training
@pytest.mark.parametrize("method", [m for m in METHODS if m != "dynamo"])
def test_every_method_trains_and_acts(films, tmp_path, method):
    run = train_method(method, films, config(), tmp_path/"r", quiet=True); agent = load_agent(run)
    assert agent.ensembler is not None and run.policy().k == 4
    a, z = agent.plan(films[0].frames[0]); assert a.shape == (4, 2) and np.abs(a).max() <= 1 and (z is None) == (not run.latent)
    one, two = (rollout(ToyWorld(), agent, 1_000_000) for _ in range(2)); np.testing.assert_array_equal(one.act, two.act)     # reset forgets the plans
    assert evaluate(run, "toy", run.config.eval, quiet=True).record["episodes"] == 2

def test_targets_of_chunks_stay_in_their_episode(films, tmp_path, monkeypatch):
    seen = {}
    def spy(module, draw, n, *a, **kw): seen["y"] = draw(torch.arange(n))[1]; return stage2_regression(module, draw, n, *a, **kw)
    stage2_regression = stage2.regression; monkeypatch.setattr(stage2, "regression", spy)
    run = train_method("bc-expert", films, config(), tmp_path/"r", quiet=True); got, row = seen["y"].numpy(), 0
    for i in run.splits.expert:
        act = films[int(i)].act
        for t in range(len(act)):
            np.testing.assert_array_equal(got[row], [act[min(t+j, len(act)-1)] for j in range(4)]); row += 1
    assert row == len(got)

def test_resumes_exactly(films, tmp_path):
    whole = train_method("clam", films, config(), tmp_path/"whole", quiet=True)
    class Stop:
        def on_start(self, *a): ...
        def on_log(self, *a): ...
        def on_end(self): ...
        def on_update(self, i): return i == 2
    train_method("clam", films, config(), tmp_path/"parts", callbacks=[Stop()], quiet=True)
    for _ in range(3): parts = train_method("clam", films, config(), tmp_path/"parts", resume=True, quiet=True)
    assert parts.weights_digest("policy") == whole.weights_digest("policy")

def test_what_does_not_fit_is_refused(films, tmp_path):
    with pytest.raises(ConfigError, match="DynaMo has no such encoder"): train_method("dynamo", films, config(), tmp_path/"d", quiet=True)
    with pytest.raises(ConfigError, match="reads pictures"): train_method("bc-al", films, preset("tiny").replace(split__n_expert=4, split__n_labelled=4, policy__image_encoder="act"), tmp_path/"s", quiet=True)
    with pytest.raises(ConfigError, match="sees one moment"): train_method("clam", films, config(stage2__chunk=3), tmp_path/"c", quiet=True)
    with pytest.raises(ConfigError, match="belong to the policy of Appendix F"): HeadConfig(weights="resnet18.safetensors")

# ---------------------------------------------------------------- weights from a file
def test_weights_come_from_a_local_file(films, tmp_path, monkeypatch):
    monkeypatch.setenv("CLAM_DATA", str(tmp_path)); (tmp_path/"weights").mkdir()
    net = ResNet18(16); torch.save(net.state_dict() | {"fc.weight": torch.zeros(1000, 128), "fc.bias": torch.zeros(1000)}, tmp_path/"weights"/"small.pth")
    cfg = config(policy__weights="small.pth", bc__optim__lr=1e-12, bc__optim__weight_decay=0.)      # next to no training: what is loaded stays
    run = train_method("bc-al", films, cfg, tmp_path/"r", quiet=True); eyes = run.policy().net[0].eyes
    torch.testing.assert_close(eyes.layer3[1].conv2.weight, net.layer3[1].conv2.weight, atol=1e-6, rtol=0)
    blind = train_method("bc-al", films, cfg.replace(policy__weights=""), tmp_path/"blind", quiet=True).policy().net[0].eyes
    assert not torch.allclose(blind.layer3[1].conv2.weight, net.layer3[1].conv2.weight, atol=1e-3)
    with pytest.raises(CheckpointError, match="missing"): train_method("bc-al", films, config(policy__weights="nowhere.pth"), tmp_path/"n", quiet=True)
    torch.save(ResNet18(8).state_dict(), tmp_path/"weights"/"other.pth")
    with pytest.raises(CheckpointError, match="not the weights of this ResNet-18"): train_method("bc-al", films, config(policy__weights="other.pth"), tmp_path/"o", quiet=True)

class Evil:
    def __reduce__(self): return (open, ("executed", "w"))

def test_a_file_that_would_execute_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); (tmp_path/"evil.pth").write_bytes(pickle.dumps({"conv1.weight": Evil()}))
    with pytest.raises(CheckpointError, match="not readable as plain weights"): load_foreign(tmp_path/"evil.pth")
    torch.save([1, 2], tmp_path/"list.pth")
    with pytest.raises(CheckpointError, match="not a state dict"): load_foreign(tmp_path/"list.pth")
    assert not (tmp_path/"executed").exists()

# ---------------------------------------------------------------- acting
def test_agent_and_runner_average_alike(films, tmp_path):
    agent = load_agent(train_method("vpt", films, config(), tmp_path/"r", quiet=True)); frames = films[3].frames
    other, got = Ensembler(.5, "old"), []
    for t in range(8): got.append(agent.act(frames[t])[0])
    for t in range(8): other.add(t, agent.plan(frames[t])[0]); np.testing.assert_allclose(other.action(t), got[t], atol=1e-6)
    plans = [agent.plan(f)[0] for f in frames[:8]]
    for t in range(8): # and as the formula says: exp(-m i), i = 0 the oldest
        said = [plans[s][t-s] for s in range(max(0, t-3), t+1)]; w = np.exp(-.5*np.arange(len(said)))
        np.testing.assert_allclose(got[t], (w[:, None]*said).sum(0)/w.sum(), atol=1e-6)

# ---------------------------------------------------------------- Table 3
def test_one_stage_1_for_all_tasks(films, tmp_path):
    a, b = config(split__task="a"), config(split__task="b")
    train_method("lapa", films, a, tmp_path/"a", quiet=True); assert adopt("lapa", tmp_path/"a", films, b, tmp_path/"b")
    shared, alone = train_method("lapa", films, b, tmp_path/"b", resume=True, quiet=True), train_method("lapa", films, b, tmp_path/"alone", quiet=True)
    assert {w: shared.weights_digest(w) for w in shared.weights()} == {w: alone.weights_digest(w) for w in alone.weights()} and set(shared.weights()) == {"lam", "namer", "policy"}
    with pytest.raises(CheckpointError, match="another kind"): adopt("lapa", tmp_path/"a", films, b.replace(seed=1), tmp_path/"c")
    assert not Run(tmp_path/"a").splits.expert.tolist() == shared.splits.expert.tolist() and make_splits(films, b.split).labelled.tolist() == shared.splits.labelled.tolist()

def test_table_3_is_the_protocol_of_appendix_f():
    for env in KITCHEN:
        for p in ("quick", "paper"):
            c = kitchen_config(p, env); assert (c.eval.episodes, c.policy.chunk, c.policy.ensemble_m, c.policy.image_encoder, c.split.labelled, c.lam.model) == (10, 5, .5, "act", "random", "space_time")
            assert c.split.n_expert == (50 if "pot" in env else 30) and env.endswith(c.split.task)
    assert [c.method for c in plan(3)][:4] == ["bc-al", "lapa", "vpt", "clam"]

def test_table_3_on_the_command_line(tmp_path, monkeypatch, capsys):
    from clam.cli.evaluate import Table
    from clam.evaluate.experiments import save_record
    monkeypatch.setenv("CLAM_DATA", str(tmp_path))
    for label, returns in (("scripted", [1.]*10), ("clam-space_time", [1., .5]+[0.]*8)):
        save_record("table3-sim", {"label": label, "env": KITCHEN[1], "seed": 0, "experiment": label, "data_digest": "d", "first_seed": 0, "successes": [r == 1. for r in returns], "returns": returns})
    rows = {r["method"]: r for r in Table(number=3, run_missing=False).do()["cells"]}
    assert rows["scripted"]["success"] == 1. and "paper" not in rows["scripted"] and (rows["clam-space_time"]["success"], rows["clam-space_time"]["paper"]) == (.15, .85)
    assert rows["clam-space_time"]["success_ci95"][0] > 0 and "0.85" in capsys.readouterr().out
