"""Evaluation across processes: the same result whatever the number of workers, films that show the counted episodes,
evaluations and tables that go on where they stopped, and workers that die politely."""
import os, shutil
import numpy as np, pytest
from clam.config import EvalConfig, preset
from clam.core import EnvError
from clam.data.store import EpisodeStore, check_store, write_store
from clam.evaluate.experiments import Cell, finished_record, load_records, run_table
from clam.evaluate.probes import recon_vs_cheat
from clam.evaluate.rollout import evaluate, rollout
from clam.evaluate.stats import bootstrap_mean, rate, wilson
from clam.toy import ToyWorld, toy_episodes
from clam.train.baselines import train_method

CFG = preset("tiny").replace(bc__updates=150, eval__episodes=6, eval__videos=0, eval__workers=1)

class Expert:
    "The toy's expert as an agent; turns to NaN at step `nan_at`."
    def __init__(self, nan_at=None): self.nan_at, self.t = nan_at, 0
    def act(self, obs):
        from clam.toy import expert_action
        self.t += 1
        return (np.full(2, np.nan) if self.t-1 == self.nan_at else expert_action(obs)), None

def load_expert(run): return Expert()
def load_dying(run): os._exit(9)

@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "A toy dataset and a behaviour-cloning run on it."
    d = tmp_path_factory.mktemp("evaluate")
    store = EpisodeStore(write_store(d/"toy", toy_episodes(120, seed=0), {"name": "toy", "spec": ToyWorld().spec}))
    train_method("bc-al", store, CFG, d/"run", quiet=True, threads=1)
    return d, store

def test_workers_do_not_change_the_result(toy):
    d, _ = toy; cfg = EvalConfig(episodes=6, videos=0)
    one, two = (evaluate(d/"run", cfg=cfg, out=d/f"eval{w}", workers=w, quiet=True) for w in (1, 2))
    assert one.record["records"] == two.record["records"] and one.record["success_ci95"] == two.record["success_ci95"]
    assert np.array_equal(one.episodes.obs, two.episodes.obs) and np.array_equal(one.episodes.act, two.episodes.act)
    assert one.episodes.digest == two.episodes.digest and check_store(one.path/"episodes") == []
    assert one.record["method"] == "bc-al" and one.record["data_digest"] and one.record["provenance"]["packages"]["numpy"]

def test_films_show_the_counted_episodes(toy):
    d, _ = toy
    r = evaluate(d/"run", cfg=EvalConfig(episodes=6, videos=1, workers=1), quiet=True)
    assert r.videos is not None and 1 <= len(r.videos) <= 2
    by_seed = {e.meta["seed"]: e for e in r.episodes}
    for film in r.videos:
        assert film.frames.shape == (len(film)+1, 224, 224, 3) and np.array_equal(film.obs, by_seed[film.meta["seed"]].obs)

def test_an_unfinished_evaluation_is_done_again(toy):
    d, _ = toy; cfg = EvalConfig(episodes=3, videos=0, workers=1)
    r = evaluate(d/"run", cfg=cfg, quiet=True); before = r.record["records"]
    (r.path/"result.json").unlink()                                    # killed before the result was written
    assert evaluate(d/"run", cfg=cfg, quiet=True).record["records"] == before
    stamp = (r.path/"result.json").stat().st_mtime_ns
    evaluate(d/"run", cfg=cfg, quiet=True)
    assert (r.path/"result.json").stat().st_mtime_ns == stamp          # finished: returned as it is

def test_any_agent_can_be_evaluated(tmp_path):
    r = evaluate(tmp_path/"expert", "toy", EvalConfig(episodes=4, videos=0), load=load_expert, agent_id="expert", workers=2, quiet=True)
    assert r.record["success"] == 1. and r.record["normalized_return"] > .8

def test_a_dead_worker_is_one_sentence(tmp_path):
    with pytest.raises(EnvError, match="worker died.*fewer workers"):
        evaluate(tmp_path/"x", "toy", EvalConfig(episodes=2, videos=0), load=load_dying, agent_id="dying", workers=2, quiet=True)
    assert not (tmp_path/"x").exists() or not list((tmp_path/"x").rglob("result.json"))

@pytest.mark.parametrize("step", [0, 7])
def test_nan_action_names_the_step(step):
    with pytest.raises(EnvError, match=f"toy, seed 3, step {step}: the agent's action is not finite"): rollout(ToyWorld(), Expert(step), 3)

def test_reconstruction_reads_no_actions(toy, tmp_path, monkeypatch):
    _, store = toy
    run = train_method("clam", store, CFG.replace(stage1__updates=20, stage2__updates=20), tmp_path/"run", quiet=True, threads=1)
    plain = recon_vs_cheat(run, store)
    def asked(self): raise AssertionError("somebody asked for actions")
    for cls in type(store).__mro__:
        if "act" in vars(cls): monkeypatch.setattr(cls, "act", property(asked))
    with pytest.raises(AssertionError): store.act
    assert recon_vs_cheat(run, store) == plain

def test_a_table_goes_on_where_it_stopped(toy, tmp_path):
    d, store = toy; root = tmp_path/"results"
    cells = [Cell("bc-al", str(store.path), CFG.replace(seed=s, bc__updates=60), str(tmp_path/f"run{s}")) for s in (0, 1)]
    first = run_table("t", cells[:1], root=root, quiet=True, threads=1)
    assert finished_record("t", cells[0], root) == first[0] and finished_record("t", cells[1], root) is None
    shutil.rmtree(tmp_path/"run0")                                     # the record is enough
    both = run_table("t", cells, processes=2, root=root, quiet=True, threads=1)
    assert both[0] == first[0] and [r["seed"] for r in both] == [0, 1] and not (tmp_path/"run0").exists()
    assert load_records("t", root) == both

def test_processes_do_not_change_a_record(toy, tmp_path):
    _, store = toy; cfg = CFG.replace(bc__updates=60)
    cells = lambda where: [Cell("bc-al", str(store.path), cfg.replace(seed=s), str(tmp_path/where/str(s))) for s in (0, 1)]
    one, two = (run_table(w, cells(w), n, tmp_path, quiet=True, threads=1) for w, n in (("one", 1), ("two", 2)))
    assert [r["returns"] for r in one] == [r["returns"] for r in two]

def test_wilson_covers():
    rng = np.random.default_rng(0)
    for p in (.02, .3, .9):
        ks = rng.binomial(40, p, 3000); inside = np.mean([wilson(int(k), 40).low <= p <= wilson(int(k), 40).high for k in ks])
        assert inside > .92, (p, inside)

def test_intervals_contain_their_mean():
    rng = np.random.default_rng(1)
    for n in (1, 2, 7, 50):
        b, w = bootstrap_mean(rng.normal(size=n)), rate(rng.random(n) < .5)
        assert b.low <= b.mean <= b.high and 0 <= w.low <= w.mean <= w.high <= 1 and b.n == w.n == n
