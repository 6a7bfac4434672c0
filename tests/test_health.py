"""The health report's verdicts: right for every planted fault of the toy (over twenty seeds in `make soak`), and for faults of trained models;
strict JSON, seeded, silent about what it cannot know, and fast on ten thousand transitions."""
import json, time
import numpy as np, pytest, torch
from clam.config import preset
from clam.core import DatasetError
from clam.data.store import EpisodeStore, write_store
from clam.evaluate.health import VERDICTS, effective_rank, health, partners
from clam.models.lam import LAM, REGISTRY
from clam.models.mlp import MLPFDM, MLPIDM
from clam.toy import ToyWorld, linear_lam, toy_episodes
from clam.train.stage1 import train_stage1

WANT = {"healthy": "ready", "ungrounded": "not decodable", "distracted": "not decodable", "leaking": "leaking", "collapsed": "collapsed"}

@pytest.mark.soak
@pytest.mark.parametrize("kind", WANT)
def test_planted_faults_of_linear_models_over_many_seeds(kind, many):
    noise, got = 6 if kind == "distracted" else 0, []
    for seed in range(many(20)):
        lam = linear_lam(kind, toy_episodes(60, seed=1000+seed, noise_dims=noise), toy_episodes(5, seed=2000+seed, skill=0.))
        got.append(health(lam, toy_episodes(24, seed=3000+seed, noise_dims=noise)).verdict)
    assert got == [WANT[kind]]*many(20)

class Mute(MLPIDM):
    "An inverse model that always says zero."
    def forward(self, win, t=None): return 0*super().forward(win, t)

@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    "A toy dataset without and one with exogenous noise."
    d = tmp_path_factory.mktemp("health")
    make = lambda noise: EpisodeStore(write_store(d/f"toy{noise}", toy_episodes(200, seed=0, noise_dims=noise), {"name": "toy", "spec": ToyWorld(noise).spec}))
    return d, {0: make(0), 6: make(6)}

def trained(toys, name, noise=0, seed=0, **changes):
    d, stores = toys
    return train_stage1(stores[noise], preset("tiny", seed=seed).replace(**changes), d/name, quiet=True, resume=True), stores[noise]

@pytest.mark.parametrize("seed", [0, 1])
def test_trained_and_healthy(toys, seed):
    report = health(*trained(toys, f"healthy{seed}", seed=seed))
    assert report.verdict == "ready", report
    assert report["decoder"].value > .9 > report["probe"].baseline and report["uses_z"].band == report["recon_cheat"].band == "pass"

@pytest.mark.parametrize("seed", [0, 1])
def test_trained_and_leaking(toys, seed): # a wide latent, no labels in training
    report = health(*trained(toys, f"leaking{seed}", seed=seed, lam__latent_dim=32, stage1__joint=False))
    assert report.verdict == "leaking", report
    assert report["recon_cheat"].value < .1                    # and the paper's own check finds nothing wrong

def test_trained_and_collapsed(toys, monkeypatch):
    monkeypatch.setitem(REGISTRY, "mute", lambda cfg, S: LAM(cfg, S, Mute(cfg, S), MLPFDM(cfg, S)))
    report = health(*trained(toys, "collapsed", lam__model="mute"))
    assert report.verdict == "collapsed", report
    assert report["recon_cheat"].value < 1                     # it beats "nothing moves" without any latent

def test_trained_and_distracted(toys): # two numbers, six dimensions of noise to spend them on
    report = health(*trained(toys, "distracted", noise=6, lam__latent_dim=2, stage1__joint=False))
    assert report.verdict == "not decodable", report

def test_a_bad_decoder_is_told_from_a_bad_latent(toys):
    run, store = trained(toys, "healthy0"); lam, norm, held = run.lam(), run.normaliser, run.splits.heldout_with_actions(store)
    shuffled = run.decoder(); first = next(shuffled.parameters()); first.copy_(first[torch.randperm(len(first), generator=torch.Generator().manual_seed(0))])
    report = health(lam, held, normaliser=norm, decode=shuffled)
    assert report.verdict == "not decodable" and any("the action is there" in r for r in report.reasons), report

def test_two_latents_a_window(toys): # the transformer: K = 2
    run, store = trained(toys, "transformer", lam__model="transformer", stage1__updates=60)
    report = health(run, store); assert report.verdict in VERDICTS and np.isfinite(report["transplant"].value)

def test_report_is_seeded_strict_json_and_shows_itself(toys):
    run, store = trained(toys, "healthy0"); a, b = health(run, store), health(str(run.path))
    assert a.to_dict() == b.to_dict() and json.loads(json.dumps(a.to_dict(), allow_nan=False))["measures"]["decoder"]["group"] == "action"
    assert a.markdown().count("\n|") == len(a.rows)+2 and "<script" not in a._repr_html_() and "true actions" in a._repr_html_()
    json.dumps(health(linear_lam("collapsed"), toy_episodes(4)).to_dict(), allow_nan=False)

def test_says_undecided_without_actions_and_refuses_one_episode():
    eps = [e.without_actions() for e in toy_episodes(10)]
    r = health(linear_lam(), eps); assert r.verdict == "undecided" and all(m.group != "action" for m in r.rows)
    assert health(linear_lam("collapsed"), eps).verdict == "collapsed" and health(linear_lam("leaking"), eps).verdict == "leaking"
    with pytest.raises(DatasetError, match="at least two"): health(linear_lam(), eps[:1])

def test_odd_lengths_and_partners():
    eps = [toy_episodes(1, seed=i, T=T)[0] for i, T in enumerate((1, 2, 7, 40, 40, 3))]
    assert health(linear_lam(), eps).verdict in VERDICTS
    t = np.concatenate([np.arange(len(e)) for e in eps]); p = partners(t)
    assert sorted(p) == list(range(len(t))) and (p != np.arange(len(t))).all()

def test_rank_does_not_depend_on_scale_or_rotation():
    z = np.random.default_rng(0).normal(size=(1000, 4))*[3, 2, 1, .1]; ep = np.repeat(np.arange(10), 100); q = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    a, b = effective_rank(z, ep), effective_rank(1e-4*z@q+5, ep)
    assert abs(a.mean-b.mean) < 1e-6 and 1 < a.low < a.mean < a.high < 4

def test_ten_thousand_transitions_in_seconds():
    tick = time.process_time(); r = health(linear_lam(), toy_episodes(300, seed=5))
    assert r.transitions == 10_000 and r.notes and time.process_time()-tick < 20
