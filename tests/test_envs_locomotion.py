"""Pins the locomotion environments: equal to Gymnasium and dm_control themselves, seeded in any process, restorable in another
environment, every observation number named once; a fall ends an episode only where asked, and the rollout loop and the store take the
shorter episode; frames drawn later from stored positions; worlds of all families drawn in turns never mix."""
import hashlib, os, subprocess, sys, textwrap
from pathlib import Path
import numpy as np
import pytest
from clam.core import EnvError, Spec, check_episode
from clam.data.store import EpisodeStore, write_store
from clam.envs import rendering
from clam.envs.base import Env, env_names, make_env
from clam.envs.dmc import ALL_TASKS, DmcEnv, _suite, flatten
from clam.envs.gym import BODIES, IDS, REFERENCE, GymEnv, action_range
from clam.evaluate.rollout import episode_record, rollout, summarise

ROOT = Path(__file__).resolve().parent.parent
SOME = ("mujoco/hopper", "mujoco/halfcheetah", "mujoco/humanoid", "mujoco/ant", "dmc/cheetah-run", "dmc/hopper-hop", "dmc/point_mass-hard", "dmc/quadruped-escape")
needs_gl = pytest.mark.skipif(rendering.choose_gl() is None, reason="no driver can draw here")

def python(code, **env): # run code in a fresh interpreter -> (stdout, stderr)
    env = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "CLAM_GL", "PYOPENGL_PLATFORM")} | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, env=env)
    assert out.returncode == 0, out.stderr[-2000:]
    return out.stdout.strip(), out.stderr
def acts(env, n, seed=0): return np.random.default_rng(seed).uniform(-1, 1, (n, env.spec.act_dim)).astype(np.float32)
def follow(env, actions): return [env.step(a) for a in actions]
def same(xs, ys):
    for x, y in zip(xs, ys, strict=True): np.testing.assert_array_equal(x.obs, y.obs); assert (x.reward, x.success, x.done) == (y.reward, y.success, y.done)
class Noise: # an agent
    def __init__(self, A): self.rng, self.A = np.random.default_rng(0), A
    def act(self, obs): return self.rng.uniform(-1, 1, self.A), None

# ---------------------------------------------------------------- the same numbers
@pytest.mark.parametrize("body", IDS)
def test_equal_to_gymnasium(body):
    import gymnasium
    with gymnasium.make(body) as theirs, make_env(f"mujoco/{body}") as ours:
        theirs.reset(seed=1); o, _ = theirs.reset(seed=5); np.testing.assert_array_equal(ours.reset(5), o.astype(np.float32))
        half = (theirs.action_space.high-theirs.action_space.low)/2
        for a in acts(ours, 120):
            o, r, fell, late, info = theirs.step(a*half); s = ours.step(a)
            np.testing.assert_array_equal(s.obs, o.astype(np.float32)); assert s.reward == float(r) and s.done == bool(fell) and not late and s.success is False
            assert s.info["x_velocity"] == info["x_velocity"] if "x_velocity" in info else True
            if fell: break

@pytest.mark.parametrize("task", ["cheetah-run", "hopper-hop", "fish-swim", "ball_in_cup-catch", "manipulator-bring_ball", "humanoid_CMU-run"])
def test_equal_to_dm_control(task):
    theirs = _suite().load(*task.split("-"), task_kwargs={"random": np.random.RandomState(6)}); ours = make_env(f"dmc/{task}")
    ts = theirs.reset(); np.testing.assert_array_equal(ours.reset(6), flatten(ts.observation).astype(np.float32))
    for a in acts(ours, 60): ts = theirs.step(a); s = ours.step(a); np.testing.assert_array_equal(s.obs, flatten(ts.observation).astype(np.float32)); assert s.reward == float(ts.reward)

def test_shapes_of_the_paper():
    for name, S, A, dt in (("mujoco/hopper", 11, 3, .008), ("mujoco/halfcheetah", 17, 6, .05), ("dmc/hopper-hop", 15, 4, .02), ("dmc/cheetah-run", 17, 6, .01)):
        with make_env(name) as env:
            assert isinstance(env, Env) and (env.spec.obs_dim, env.spec.act_dim, env.spec.max_steps) == (S, A, 1000) and env.spec.control_dt_s == pytest.approx(dt)
            assert env.spec.name == name and env.reset(0).dtype == np.float32

# ---------------------------------------------------------------- seeds
@pytest.mark.parametrize("name", SOME)
def test_a_seed_is_an_episode(name):
    with make_env(name) as a, make_env(name) as b:
        b.reset(31); follow(b, acts(b, 9, seed=4))                                    # another history
        np.testing.assert_array_equal(a.reset(3), b.reset(3)); same(follow(a, acts(a, 15)), follow(b, acts(b, 15)))
        assert not np.array_equal(a.reset(3), a.reset(4))

def test_another_process_sees_the_same_episode():
    names = [n for n in SOME if n != "mujoco/ant"]
    code = f"""
    import hashlib, numpy as np
    from clam.envs.base import make_env
    for name in {names}:
        e = make_env(name); h = hashlib.sha256(e.reset(12).tobytes())
        for a in np.random.default_rng(0).uniform(-1, 1, (10, e.spec.act_dim)): s = e.step(a); h.update(s.obs.tobytes()); h.update(repr(s.reward).encode())
        print(h.hexdigest())
    """
    here = []
    for name in names:
        with make_env(name) as e:
            h = hashlib.sha256(e.reset(12).tobytes())
            for a in np.random.default_rng(0).uniform(-1, 1, (10, e.spec.act_dim)): s = e.step(a); h.update(s.obs.tobytes()); h.update(repr(s.reward).encode())
            here.append(h.hexdigest())
    assert python(code)[0].split() == here and len(set(here)) == len(names)

def test_the_global_generator_is_untouched():
    np.random.seed(1); before = np.random.get_state()[1].copy()
    for name in SOME[::3]:
        with make_env(name) as env: env.reset(0); env.step(np.zeros(env.spec.act_dim))
    np.testing.assert_array_equal(before, np.random.get_state()[1])

# ---------------------------------------------------------------- moments
def comes_back(name, warm=12, n=10):
    with make_env(name) as env, make_env(name) as other:
        env.reset(2); last = follow(env, acts(env, warm, seed=3))[-1]; saved = env.get_state(); once = follow(env, acts(env, n))
        other.reset(50)
        for e in (env, other):
            e.reset(77); np.testing.assert_array_equal(e.set_state(saved), last.obs); same(once, follow(e, acts(e, n)))

@pytest.mark.parametrize("name", [*(f"mujoco/{b}" for b in BODIES), *SOME[4:]])
def test_a_saved_moment_comes_back(name): comes_back(name)

@pytest.mark.slow
@pytest.mark.parametrize("task", ALL_TASKS)
def test_every_task_of_the_suite(task):
    comes_back(f"dmc/{task}", 5, 5)
    with make_env(f"dmc/{task}", max_steps=3) as env:
        env.reset(0); steps = follow(env, acts(env, 3)); assert [s.done for s in steps] == [False, False, True]
        assert task.startswith("lqr") or all(0 <= s.reward <= 1 for s in steps)

def test_what_would_be_lost_without_it(monkeypatch): # the restore test can fail: Humanoid without its stale arrays, a target without the model
    from clam.envs import gym
    monkeypatch.setattr(gym, "_STALE", ())
    with pytest.raises(AssertionError): comes_back("mujoco/humanoid")
    monkeypatch.setattr(gym.MujocoWorld, "_restore_model", lambda self, changed: None)
    with pytest.raises(AssertionError): comes_back("dmc/point_mass-hard")

def test_a_converged_task_goes_on():
    env = DmcEnv("lqr-lqr_2_1", max_steps=5); env.reset(0); env.sim.task.get_termination = lambda physics: 0.     # the suite would begin again after this
    obs = [s.obs for s in follow(env, np.zeros((5, env.spec.act_dim)))]
    assert env.spec.return_range is None and not any(np.allclose(a, env.reset(0)) for a in obs[1:])

# ---------------------------------------------------------------- names
def test_every_number_has_one_name():
    for env in [*map(GymEnv, BODIES), *(DmcEnv(t) for t in ALL_TASKS if not t.startswith("dog"))]:
        covered = np.concatenate([np.arange(env.spec.obs_dim)[s] for s in env.obs_slices.values()])
        np.testing.assert_array_equal(covered, np.arange(env.spec.obs_dim), err_msg=env.spec.name)

def test_slices_mean_what_they_say():
    with make_env("mujoco/walker2d") as env:
        obs, s = env.reset(1), env.obs_slices
        assert obs[s["pos_rootz"]] == np.float32(env.qpos[1]) and obs[s["vel_rootx"]] == np.float32(env.qvel[0]) and "pos_rootx" not in s
    with make_env("dmc/cheetah-run") as env:
        obs = env.reset(1); np.testing.assert_array_equal(obs[env.obs_slices["velocity"]], env.qvel.astype(np.float32)); np.testing.assert_array_equal(obs[env.obs_slices["position"]], env.qpos[1:].astype(np.float32))

def test_the_names():
    names = set(env_names()); assert {"mujoco/hopper", "mujoco/Hopper-v5", "mujoco/HalfCheetah-v5", "dmc/hopper-hop", "dmc/humanoid_CMU-run"} <= names
    for bad in ("mujoco", "mujoco/hopper-v5", "mujoco/Hopper-v4", "dmc", "dmc/cheetah", "dmc/cheetah/run", "gym/hopper"):
        with pytest.raises(EnvError, match="unknown environment"): make_env(bad)

def test_a_family_is_loaded_when_asked_for_and_opens_no_window():
    out, err = python("""
    import os, sys
    from clam.envs.base import make_env
    make_env("toy"); print(*(m in sys.modules for m in ("gymnasium", "dm_control", "metaworld")))
    e = make_env("mujoco/hopper"); e.reset(0); e.step([0]*3); print(*(m in sys.modules for m in ("gymnasium", "dm_control", "metaworld")))
    e = make_env("dmc/quadruped-escape"); e.reset(0); e.step([0]*12)
    print("dm_control._render.glfw_renderer" in sys.modules, "mujoco.egl" in sys.modules, "mujoco.osmesa" in sys.modules, os.environ.get("MUJOCO_GL"))
    """)
    assert out.split("\n") == ["False False False", "True False False", "False False False None"]

def test_actions_are_stretched():
    half, mid = action_range([-2, -1, -np.inf, 0], [4, 1, np.inf, np.inf]); np.testing.assert_array_equal(half, [3, 1, 1, 1]); np.testing.assert_array_equal(mid, [1, 0, 0, 0])
    with make_env("mujoco/humanoid") as env: env.reset(0); env.step(np.ones(17)); np.testing.assert_allclose(env.data.ctrl, .4)

# ---------------------------------------------------------------- scores
def test_reference_returns():
    from clam.data.hdf5 import REFERENCE as imported
    assert {b.removesuffix("-v5").lower(): r for b, r in REFERENCE.items() if "H" in b} == imported == {"hopper": (-20.272305, 3234.3), "halfcheetah": (-280.178953, 12135.0)}
    spec = make_env("mujoco/hopper").spec; assert spec.return_range == REFERENCE["Hopper-v5"]
    assert spec.normalised_return(3234.3) == 1 and spec.normalised_return(-20.272305) == 0 and make_env("mujoco/swimmer").spec.return_range is None

def test_a_spread_is_divided_not_shifted():
    spec = make_env("mujoco/halfcheetah").spec; returns = np.random.default_rng(0).normal(4000, 900, 30)
    assert spec.normalised_spread(returns.std()) == pytest.approx(spec.normalised_return(returns).std()) and spec.normalised_spread(0) == 0
    assert spec.normalised_return(returns.std()) != pytest.approx(spec.normalised_return(returns).std(), abs=.01)      # the official code's number
    assert Spec("x", 1, 1).normalised_spread(1.) is None
    r = summarise([{"seed": i, "return": x, "success": False, "success_last": False} for i, x in enumerate(returns)], spec)
    width = lambda ci: ci[1]-ci[0]
    assert width(r["normalized_return_ci95"]) == pytest.approx(float(spec.normalised_spread(width(r["return_ci95"]))))

# ---------------------------------------------------------------- falls
@pytest.mark.parametrize("body", BODIES.values())
def test_who_falls(body):
    short = body.removesuffix("-v5").lower(); can_fall = short in ("ant", "hopper", "humanoid", "walker2d")
    def steps(**kw):
        with GymEnv(**kw, max_steps=250) as env:
            env.reset(0); n, done = 0, False
            for a in acts(env, 250):
                s = env.step(a); n += 1
                if s.done: break
            return n, s.info["healthy"], env
    assert steps(task=short)[0] == 250 == steps(task=body, terminate_when_unhealthy=False)[0]
    n, healthy, env = steps(task=body); assert (n, healthy) == steps(task=short, terminate_when_unhealthy=True)[:2]
    if can_fall and body != "Ant-v5":
        assert n < 250 and not healthy
        with pytest.raises(EnvError, match=f"at most {n} steps"): env.step(np.zeros(env.spec.act_dim))
        saved = env.get_state(); env.reset(1); assert not env.step(np.zeros(env.spec.act_dim)).done                   # a new episode, a new life
        env.set_state(saved)
        with pytest.raises(EnvError, match="after the episode's end"): env.step(np.zeros(env.spec.act_dim))
    if not can_fall: assert n == 250 and healthy

def test_short_episodes_through_rollout_and_store(tmp_path):
    with make_env("mujoco/Hopper-v5") as env:
        eps = [check_episode(rollout(env, Noise(3), seed)) for seed in range(4)]; spec = env.spec
    assert all(0 < len(e) < spec.max_steps for e in eps) and len({len(e) for e in eps}) > 1
    store = EpisodeStore(write_store(tmp_path/"hops", eps, {"name": "hops", "spec": spec}))
    assert [len(e) for e in store] == [len(e) for e in eps] and store.spec.max_steps == 1000 and store.spec.return_range == spec.return_range
    for a, b in zip(store, eps): np.testing.assert_array_equal(a.obs, b.obs); np.testing.assert_array_equal(a.act, b.act)
    r = summarise([episode_record(e) for e in eps], spec); assert r["success"] == 0 and -.1 < r["normalized_return"] < .1
    with make_env("mujoco/hopper", max_steps=60) as env: assert len(rollout(env, Noise(3), 0)) == 60

def test_a_broken_simulation_is_one_sentence(monkeypatch):
    env = make_env("mujoco/hopper"); env.reset(0); monkeypatch.setattr(env.sim, "step", lambda a: (np.full(11, np.nan), 0., False, False, {}))
    with pytest.raises(EnvError, match="unstable"): env.step(np.zeros(3))
    env = make_env("dmc/cheetah-run"); env.reset(0); env.data.qvel[:] = 1e12
    with pytest.raises(EnvError, match="unstable") as e: follow(env, acts(env, 5))
    assert "\n" not in str(e.value)

# ---------------------------------------------------------------- frames
@needs_gl
@pytest.mark.parametrize("name", ["mujoco/hopper", "mujoco/humanoid", "dmc/hopper-hop", "dmc/cheetah-run"])
def test_frames_drawn_later(name):
    with make_env(name) as env, make_env(name) as later:
        env.reset(4); stored, live = [(env.qpos, env.qvel)], [env.render()]
        for s in map(env.step, acts(env, 12)): stored.append((s.info["qpos"], s.info["qvel"])); live.append(env.render())
        later.reset(9); before = later.get_state()
        for (q, v), img in zip(stored, live): np.testing.assert_array_equal(later.render_from(q, v), img)
        np.testing.assert_array_equal(later.get_state()["physics"], before["physics"])
        assert img.shape == (84, 84, 3) and img.dtype == np.uint8 and not np.array_equal(live[0], live[-1]) and env.render_settings["fast"]
        with pytest.raises(EnvError, match="qpos has the wrong shape"): later.render_from(q[:-1])

@needs_gl
@pytest.mark.parametrize("name", ["metaworld/shelf-place", "mujoco/ant", "mujoco/Hopper-v5", "dmc/quadruped-run"])
def test_looking_changes_nothing(name):
    with make_env(name) as seen, make_env(name) as unseen:
        seen.reset(3); unseen.reset(3)
        for a in acts(seen, 12): seen.render(); same([seen.step(a)], [unseen.step(a)])

@needs_gl
def test_looking_changes_no_success(): # an episode that succeeds, drawn and not drawn
    from clam.collect.experts import ScriptedExpert
    class Looked: # draws before every step
        spec = property(lambda self: self.env.spec)
        def __init__(self, env): self.env = env; self.reset = env.reset
        def step(self, a): self.env.render(); return self.env.step(a)
    class Expert:
        def __init__(self): self.expert = ScriptedExpert("assembly")
        def act(self, obs): return self.expert(obs), None
    with make_env("metaworld/assembly", render_size=64) as seen, make_env("metaworld/assembly") as unseen:
        a, b = (rollout(e, Expert(), 900_000) for e in (Looked(seen), unseen))
    assert a.succeeded and a.success.sum() > 10
    for f in ("obs", "act", "reward", "success"): np.testing.assert_array_equal(getattr(a, f), getattr(b, f))

WORLDS = (("metaworld/assembly", 84, "paper"), ("metaworld/shelf-place", 64, "paper"), ("mujoco/halfcheetah", 84, None), ("dmc/hopper-hop", 64, None), ("metaworld/assembly", 84, "top"))
FILM = """
import hashlib, sys
from clam.envs.base import make_env
def worlds(which): return [make_env(n, render_size=s, **({"camera": c} if c else {})) for n, s, c in which]
def frame(env): img = env.render(); return hashlib.sha256(img.tobytes()+bytes(img.shape)).hexdigest()
"""
@needs_gl
def test_worlds_in_one_process_do_not_mix():
    scope = {}; exec(FILM, scope)
    def alone(w, n=3): # its frames, drawn by a process of its own
        return python(f"{FILM}\nenv, = worlds([{w!r}]); env.reset(1)\nfor _ in range({n}): print(frame(env)); env.step([.5]*env.spec.act_dim)", CLAM_GL=rendering.choose_gl())[0].split()
    want = [alone(w) for w in WORLDS]; assert len({h for f in want for h in f}) == 3*len(WORLDS)     # all different: a mixture would show
    envs = scope["worlds"](WORLDS); frame = scope["frame"]
    for e in envs: e.reset(1)
    for t in range(3):
        for e, f in zip(envs, want): assert frame(e) == f[t], (e.spec.name, t)
        for e, f in reversed(list(zip(envs, want))): assert frame(e) == f[t]; e.step([.5]*e.spec.act_dim) if t < 2 else None
    for i in (1, 0, 3):                                                                              # close one after the other
        envs[i].close()
        for j, (e, f) in enumerate(zip(envs, want)):
            if j in (2, 4): assert frame(e) == f[2], (e.spec.name, i)
    assert [frame(envs[i]) for i in (0, 1, 3)] == [want[i][2] for i in (0, 1, 3)]                    # a closed one draws again when asked
    for e in envs: e.close(); e.close()

@needs_gl
def test_new_terrain_is_drawn():
    with make_env("dmc/quadruped-escape") as env, make_env("dmc/quadruped-escape") as fresh:
        env.reset(0); first = env.render(); env.reset(1); fresh.reset(1); env.data.qpos[:] = fresh.data.qpos
        np.testing.assert_array_equal(env.render(), fresh.render()); assert not np.array_equal(first, env.render())
