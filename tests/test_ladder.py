"""The failure ladder names the stage that was spoilt, for each planted fault (five seeds in `make soak`), and says nothing about a healthy run;
the environment is put back exactly; `clam ladder` gives strict JSON."""
import json, os, shutil
import numpy as np, pytest, torch
from clam.cli.shell import main
from clam.collect.recipes import recipe_for
from clam.config import preset
from clam.core import EnvError
from clam.data.store import EpisodeStore, write_store
from clam.envs.base import make_env
from clam.evaluate.ladder import driven, ladder, missed, replayed
from clam.models.lam import LAM, REGISTRY
from clam.models.mlp import MLPFDM, MLPIDM
from clam.toy import ToyWorld, toy_episodes
from clam.train.baselines import train_method
from clam.train.checkpoint import Run

CFG = preset("tiny").replace(stage1__updates=1000, stage2__updates=800, split__n_labelled=40, split__n_expert=40)

class Dice(MLPIDM):
    "Latents that depend on the window only as dice do on the hand."
    def forward(self, win, t=None):
        z = super().forward(win, t); return torch.sin(1e4*win.flatten(1).sum(1)[:, None, None]*(1+torch.arange(z.shape[-1])))+0*z
class Mute(MLPIDM):
    "Latents that are always zero."
    def forward(self, win, t=None): return 0*super().forward(win, t)

@pytest.fixture(scope="module", autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(n)

@pytest.fixture(scope="module")
def toy(tmp_path_factory): # (folder, dataset)
    d = tmp_path_factory.mktemp("ladder")
    return d, EpisodeStore(write_store(d/"episodes"/"toy", toy_episodes(300, seed=0), {"name": "toy", "spec": ToyWorld().spec}))

def trained(toy, name, method="clam", store=None, **changes) -> Run: # kept for the tests that share it
    return train_method(method, store or toy[1], CFG.replace(**changes), toy[0]/"runs"/name, resume=True, quiet=True)

def copied(toy, run, name, **parts) -> Run: # the same run with other weights for some parts
    shutil.copytree(run.path, toy[0]/"runs"/name); copy = Run(toy[0]/"runs"/name); copy.finish(**parts); return copy

def shaken(module, scale, seed): # noise on the weights
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters(): p.add_(scale*p.std()*torch.randn(p.shape, generator=g))
    return module

SEEDS = lambda test: pytest.mark.soak(pytest.mark.parametrize("seed", range(5 if os.environ.get("CLAM_SOAK") else 1))(test))

# ---------------------------------------------------------------- the verdict
@SEEDS
def test_a_healthy_run_loses_nothing(toy, seed):
    r = ladder(trained(toy, f"healthy{seed}", seed=seed), toy[1], seed=seed, quiet=True)
    assert r.stage == "nothing" and r["policy"].success.mean >= .9 and r["decoded"].missed.mean < .1, r
    assert r["replay"].success.mean < r["decoded"].success.mean and "informational" in r.notes[0]          # drift is told and accuses nobody

@SEEDS
@pytest.mark.parametrize("scale", [1., 2.])
def test_a_noisy_decoder(toy, seed, scale):
    run = trained(toy, f"healthy{seed}", seed=seed)
    r = ladder(copied(toy, run, f"noisy{seed}-{scale}", decoder=shaken(run.decoder(), scale, seed)), toy[1], seed=seed, quiet=True)
    assert r.stage == "decoder" and r["all_labels"].success.mean >= .9 and r.checks["own_labels"] > .8, r

@SEEDS
def test_a_policy_that_is_too_small(toy, seed):
    r = ladder(trained(toy, f"small{seed}", seed=seed, policy__hidden_dim=1, policy__n_hidden=1), toy[1], seed=seed, quiet=True)
    assert r.stage == "policy" and r.checks["latents_missed"].mean < .1, r

@SEEDS
def test_a_policy_that_was_not_trained(toy, seed):
    run = trained(toy, f"healthy{seed}", seed=seed); torch.manual_seed(seed)
    r = ladder(copied(toy, run, f"untrained{seed}", policy=run.new_policy()), toy[1], seed=seed, quiet=True)
    assert r.stage == "policy" and r.checks["latents_missed"].mean < .1, r

@SEEDS
def test_too_few_labels(toy, seed):
    r = ladder(trained(toy, f"labels{seed}", seed=seed, split__n_labelled=1), toy[1], seed=seed, quiet=True)
    assert r.stage == "labels" and r["all_labels"].success.mean > r["policy"].success.mean+.3, r

@pytest.mark.parametrize("model,seed", [(Dice, 0), *(pytest.param(Dice, s, marks=pytest.mark.soak_only) for s in (1, 2)), (Mute, 0)])
def test_an_inverse_model_that_knows_nothing(toy, model, seed, monkeypatch):
    monkeypatch.setitem(REGISTRY, "spoilt", lambda cfg, S: LAM(cfg, S, model(cfg, S), MLPFDM(cfg, S)))
    r = ladder(trained(toy, f"{model.__name__}{seed}", seed=seed, lam__model="spoilt"), toy[1], seed=seed, quiet=True)
    assert r.stage == "inverse model" and r.checks["latents_missed"].mean > .9, r
    assert r["decoded"].success.mean > .7                      # the kind rung: restored at each step, even dice succeed

def test_two_faults_and_the_first_is_named(toy):
    run = trained(toy, "small0", policy__hidden_dim=1, policy__n_hidden=1)
    assert ladder(copied(toy, run, "both", decoder=shaken(run.decoder(), 2., 0)), toy[1], quiet=True).stage == "decoder"
    assert ladder(run, toy[1], quiet=True).stage == "policy"                                        # after the repair

def test_an_environment_that_is_not_the_datasets(toy, monkeypatch):
    run = trained(toy, "healthy0")
    with monkeypatch.context() as m:
        m.setattr("clam.toy.PUSH_MPS", .25)
        r = ladder(run, toy[1], quiet=True); assert r.stage == "environment" and "deviations away" in r.verdict and len(r.rungs) == 1, r
    with monkeypatch.context() as m:
        m.setattr("clam.toy.RADIUS_M", .03)                                                                # the same motion, a stricter task
        r = ladder(run, toy[1], quiet=True); assert r.stage == "environment" and "of their success" in r.verdict, r

def test_other_methods_have_shorter_ladders(toy):
    vpt = ladder(trained(toy, "vpt", "vpt"), toy[1], quiet=True); assert (vpt.stage, len(vpt.rungs)) == ("nothing", 4), vpt
    blind = ladder(trained(toy, "blind", "vpt", idm__updates=3), toy[1], quiet=True); assert blind.stage == "inverse model", blind
    al, ex = (ladder(trained(toy, m, m, bc__updates=800), toy[1], quiet=True) for m in ("bc-al", "bc-expert"))
    assert (al.stage, ex.stage, len(al.rungs)) == ("policy", "nothing", 2), (al, ex)

def test_a_task_without_success_is_judged_by_its_return(toy):
    store = EpisodeStore(write_store(toy[0]/"returns", (e.replace(success=None) for e in toy[1]), {"name": "toy", "spec": ToyWorld().spec}))
    good, bad = (ladder(trained(toy, n, store=store, stage2__updates=u), store, quiet=True) for n, u in (("return-good", 800), ("return-bad", 5)))
    assert (good.measure, good.stage, bad.stage) == ("return", "nothing", "policy"), (good, bad)

# ---------------------------------------------------------------- the parts
def test_nothing_is_put_back_after_the_experts_success(monkeypatch):
    env, ep = ToyWorld(), next(e for e in toy_episodes(30, seed=0) if e.succeeded); track = replayed(env, ep)
    restored, put = [], env.set_state; env.set_state = lambda s: restored.append(s["t"]) or put(s)
    for every, want in ((1, range(track.first+1)), (5, range(0, track.first+1, 5)), (0, [0])):
        restored.clear(); assert np.array_equal(driven(env, track, ep.act, every).obs, ep.obs) and restored == list(want)

def test_each_episode_has_one_voice():
    env, eps = ToyWorld(), [e for e in toy_episodes(60, seed=0) if e.succeeded]
    small, big = (f(eps, key=lambda e: (e.act**2).sum()) for f in (min, max))
    tracks = [replayed(env, e) for e in (big, small)]; dull = np.concatenate([big.act, small.act]).mean(0)
    half = [missed(env, tracks, [np.tile(dull, (40, 1)) if i == k else t.ep.act for i, t in enumerate(tracks)]).mean for k in (0, 1)]
    assert np.allclose(half, .5)

def test_metaworld_is_put_back_exactly():
    ep = recipe_for("metaworld/assembly").collector("metaworld/assembly", 20, 0)(19)
    with make_env("metaworld/assembly") as env:
        track = replayed(env, ep); assert track.drift == 0
        assert np.array_equal(driven(env, track, ep.act, 7, 100).obs, ep.obs)
        assert missed(env, [track], [np.zeros_like(ep.act)]).mean > .3

# ---------------------------------------------------------------- the command
def test_command(toy, capsys, monkeypatch):
    trained(toy, "healthy0"); monkeypatch.setenv("CLAM_DATA", str(toy[0]))
    assert main(["ladder", "--run", "healthy0", "--episodes", "6", "--seed", "1", "--json"]) == 0
    shown = capsys.readouterr().out.splitlines(); out = json.loads(shown[-1], parse_constant=pytest.fail)
    assert out["stage"] == "nothing" and out["verdict"] in "\n".join(shown[:-1]) and out["episodes"] == len(out["seeds"]) == 6
    assert [r["name"] for r in out["rungs"]] == ["expert", "decoded", "replay", "all_labels", "policy"]
    assert all(len(r["successes"]) == len(r["returns"]) == 6 and r["success_ci95"][0] <= r["success"] <= r["success_ci95"][1] for r in out["rungs"])
    for argv, word in ((["--run", "healthy0", "--episodes", "1"], "two episodes"), (["--run", "none"], "no run here"), (["--run", "healthy0", "--env", "moon"], "unknown environment")):
        assert main(["ladder", *argv]) == 2 and word in (err := capsys.readouterr().err) and err.startswith("error: ") and err.count("\n") == 1
