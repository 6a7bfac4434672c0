"""Pins the agents that learned: the committed snapshots give the returns that their record states, a dataset is a function of its seed
alone, its parts are in order of age, and the whole pipeline runs on a task that has returns but no success."""
import json, shutil
import numpy as np, pytest
from clam.cli.shell import main
from clam.collect.actors import RECIPES, Actor, Learner, actors_dir, draw_frames, load_actors, measured_return, pack_actors
from clam.collect import actors
from clam.collect.recipes import collect, make_dataset, recipe_names
from clam.config import SplitConfig
from clam.core import DatasetError
from clam.data.splits import make_splits
from clam.data.store import EpisodeStore, check_store, write_store
from clam.envs import rendering
from clam.envs.base import make_env

HERE = [n for n, r in RECIPES.items() if (actors_dir()/r.body/"actors.json").is_file()]

def test_the_paper_bodies_are_here(): assert {"mujoco/halfcheetah", "mujoco/hopper"} <= set(HERE)

def test_size_and_record():
    assert sum(p.stat().st_size for p in actors_dir().rglob("*") if p.is_file()) < 8e6
    for n in HERE:
        rec, actors = load_actors(RECIPES[n].body)
        assert {"algorithm", "seed", "settings", "packages", "machine", "curve", "snapshots", "medium"} <= set(rec) and len(actors) == len(rec["snapshots"]) >= 4
        assert rec["snapshots"][0]["step"] == 0 and all(np.isfinite(c["mean"]) for c in rec["curve"]) and [s["step"] for s in rec["snapshots"]] == sorted(actors)

@pytest.mark.parametrize("name", HERE)
def test_the_best_snapshot_returns_what_its_record_says(name):
    rec, actors = load_actors(RECIPES[name].body); best = max(rec["snapshots"], key=lambda s: s["return"])
    R = measured_return(rec["environment"], actors[best["step"]], episodes=2)
    assert abs(np.mean(R)-best["return"]) < 4*best["std"]+.02*abs(best["return"]), (R, best)

def test_same_seed_same_bytes(tmp_path):
    one, two = (EpisodeStore(make_dataset("mujoco/halfcheetah", 18, seed=4, out=tmp_path/str(w), workers=w, quiet=True)) for w in (1, 2))
    assert one.digest == two.digest and one.success is None
    for f in sorted(p.name for p in (tmp_path/"1").iterdir()): assert (tmp_path/"1"/f).read_bytes() == (tmp_path/"2"/f).read_bytes(), f
    kinds = [n["policy"] for n in one.notes]; assert kinds == sorted(kinds, key=["random", "learner", "expert"].index) and kinds.count("expert") == round(.3*18) and "random" in kinds
    R = one.returns; part = lambda k: np.mean([r for r, x in zip(R, kinds) if x == k]); assert part("random") < part("learner") < part("expert")
    s = make_splits(one, SplitConfig(n_expert=4, n_labelled=5)); assert R[s.expert].min() >= np.sort(R)[-6] and {kinds[i] for i in s.labelled} <= {"random", "learner"}
    ep = one[3]; assert ep.state.shape == (len(ep)+1, 18) and np.abs(ep.state[:, 1:9]-ep.obs[:, :8]).max() < 1e-5          # HalfCheetah shows all positions but the way travelled

def test_from_make_to_eval(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLAM_DATA", str(tmp_path)); monkeypatch.setenv("CLAM_QUIET", "1")
    def clam(*argv):
        code = main([str(a) for a in argv]+["--json"]); return code, json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    code, said = clam("data", "make", "mujoco/hopper", "--episodes", 16); assert code == 0 and said["episodes"] == 16 and said["success_rate"] is None
    fast = ["--preset", "tiny", "--stage1.updates", 30, "--split.n-expert", 3, "--labels", 4]
    assert clam("train", "--data", "mujoco/hopper", "--run", "r", *fast)[0] == 0 and clam("policy", "--run", "r")[0] == 0
    code, said = clam("eval", "--run", "r", "--episodes", 2, "--videos", 0); assert code == 0 and np.isfinite([said["return_mean"], said["normalized_return"]]).all(), said

@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in HERE if n != "mujoco/halfcheetah"])
def test_same_seed_same_bytes_of_every_agent(name, tmp_path):
    one, two = (make_dataset(name, 9, seed=2, out=tmp_path/str(w), workers=w, quiet=True) for w in (1, 2)); files = sorted(p.name for p in one.iterdir())
    assert files == sorted(p.name for p in two.iterdir()) and all((one/f).read_bytes() == (two/f).read_bytes() for f in files)
    assert EpisodeStore(make_dataset(name, 9, seed=3, out=tmp_path/"other", workers=1, quiet=True)).digest != EpisodeStore(one).digest

@pytest.mark.skipif(rendering.choose_gl() is None, reason="no driver can draw here")
@pytest.mark.parametrize("name", ["mujoco/hopper", "mujoco/halfcheetah"])
def test_frames_drawn_from_the_store(name, tmp_path):
    ep = EpisodeStore(make_dataset(name, 2, out=tmp_path/"d", workers=1, quiet=True))[1]
    with make_env(name) as env, make_env(name) as later:
        later.reset(0); nq, shots = len(env.qpos), []; env.reset(ep.meta["seed"])
        for t in range(40):
            live, drawn = env.render().astype(int), later.render_from(ep.state[t, :nq], ep.state[t, nq:]).astype(int); shots.append(drawn)
            assert abs(live-drawn).mean() < .05, t                    # the store keeps single precision
            env.step(ep.act[t])
    assert abs(shots[39]-shots[0]).mean() > 1

@pytest.mark.skipif(rendering.choose_gl() is None, reason="no driver can draw here")
def test_a_store_is_drawn_later(tmp_path):
    whole = EpisodeStore(make_dataset("mujoco/hopper", 2, out=tmp_path/"whole", workers=1, quiet=True)); cut = lambda e, n: e.replace(**{f: getattr(e, f)[:n+(f in ("obs", "state"))] for f in ("obs", "act", "reward", "state")})
    eps = [cut(whole[1], 6), cut(whole[0], 4)]; store = EpisodeStore(write_store(tmp_path/"short", eps, whole.meta)); seen = EpisodeStore(draw_frames(store, tmp_path/"seen", 48))
    assert seen.frames.shape == (12, 48, 48, 3) and seen.meta["render"]["width"] == 48 and seen.meta["source"] == whole.meta["source"] and check_store(seen.path) == [] and all(np.array_equal(getattr(x, f), getattr(y, f)) for x, y in zip(seen, store, strict=True) for f in ("obs", "act", "reward", "state"))
    with make_env("mujoco/hopper", render_size=48) as env:
        for e, drawn in zip(eps, seen, strict=True):
            env.reset(e.meta["seed"])
            for t, a in enumerate(e.act): assert abs(env.render().astype(int)-drawn.frames[t]).mean() < .05, t; env.step(a)
    damaged = EpisodeStore(write_store(tmp_path/"bare", [e.replace(state=None) for e in eps], whole.meta))
    with pytest.raises(DatasetError, match="no simulator state"): draw_frames(damaged, tmp_path/"no")
    assert not (tmp_path/"no").exists()

def test_the_replay_part_ends_at_medium():
    for n in HERE:
        rec, _ = load_actors(RECIPES[n].body); way, (best, _) = RECIPES[n].stages(); seen = {c["step"]: c["mean"] for c in rec["curve"]}; age = [s["step"] for s, _ in way]
        assert age == sorted(age) and age[0] == 0 and best["return"] == max(s["return"] for s in rec["snapshots"]) and all(seen[a] < rec["medium"] for a in age[1:-1])
        if max(seen.values()) >= rec["medium"]: assert seen[age[-1]] >= rec["medium"]

# ---------------------------------------------------------------- planted faults
def test_what_cannot_be_made_is_not_offered(tmp_path, monkeypatch):
    assert set(HERE) <= set(recipe_names()); monkeypatch.setattr(actors, "actors_dir", lambda: tmp_path); load_actors.cache_clear()
    assert not set(RECIPES) & set(recipe_names()) and {"toy", "metaworld/assembly"} <= set(recipe_names())
    with pytest.raises(DatasetError, match="no snapshots of this agent"): make_dataset("mujoco/hopper", 2, out=tmp_path/"d", quiet=True)
    assert not list(tmp_path.iterdir()); load_actors.cache_clear()

def raw(folder, dims=(11, 3)):
    rng = np.random.default_rng(0); folder.mkdir(parents=True); (folder/"args.json").write_text('{"algorithm": "none", "seed": 0, "settings": {}, "packages": {}, "machine": "none"}')
    steps = [0, 10, 20]
    for s in steps: np.savez(folder/f"actor-{s:07d}.npz", **{f"params/Dense_{i}/{k}": rng.normal(size=x).astype(np.float32)*.1 for i, (n, m) in enumerate([(dims[0], 6), (6, 6), (6, dims[1]), (6, dims[1])]) for k, x in (("kernel", (n, m)), ("bias", (m,)))})
    (folder/"curve.jsonl").write_text("".join(json.dumps({"step": s, "mean": float(s)})+"\n" for s in steps[1:])); return folder

def test_packing(tmp_path):
    rec = pack_actors(raw(tmp_path/"raw"), "Hopper-v5", "mujoco/Hopper-v5", 15., tmp_path/"out", episodes=2); back, actors = load_actors("Hopper-v5", tmp_path/"out")
    assert back == json.loads(json.dumps(rec)) and sorted(actors) == [0, 10, 20] and all(s["return"] == pytest.approx(np.mean(measured_return("mujoco/Hopper-v5", actors[s["step"]], 2)), abs=.01) for s in back["snapshots"])
    (tmp_path/"out"/"Hopper-v5"/"0000010.safetensors").unlink(); load_actors.cache_clear()
    with pytest.raises(DatasetError, match="snapshots and record disagree"): load_actors("Hopper-v5", tmp_path/"out")
    (tmp_path/"out"/"Hopper-v5"/"0000020.safetensors").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match="cannot be read"): load_actors("Hopper-v5", tmp_path/"out")
