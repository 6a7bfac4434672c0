"""Pins the environments: MetaWorld is really seeded (in this process, in another, after anything), equal to MetaWorld itself, restorable
at any moment on many tasks; drivers that crash or hang cannot hurt; renderers of two worlds do not mix; a state-only run opens no graphics."""
import os, subprocess, sys, textwrap
from pathlib import Path
import numpy as np
import pytest
from clam.core import EnvError
from clam.envs.base import Env, FakeEnv, env_names, make_env
from clam.envs.metaworld import ALL_TASKS, OBS_SLICES, TASKS, MetaWorldEnv
from clam.envs import rendering

ROOT = Path(__file__).resolve().parent.parent
def python(code, timeout=60, **env): # run code in a fresh interpreter -> stdout
    env = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "CLAM_GL", "PYOPENGL_PLATFORM")} | {"PYTHONPATH": str(ROOT)} | env
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=timeout, env=env)
    assert out.returncode == 0, out.stderr[-2000:]
    return out.stdout.strip()
def acts(n, seed=0): return np.random.default_rng(seed).uniform(-1, 1, (n, 4)).astype(np.float32)
def follow(env, actions): return [env.step(a) for a in actions]

# ---------------------------------------------------------------- seeding
@pytest.mark.parametrize("task", TASKS)
def test_seed_determines_everything(task):
    a, b = MetaWorldEnv(task), MetaWorldEnv(task)
    first = a.reset(5); run = follow(a, acts(20))
    b.reset(77); follow(b, acts(35, seed=1)); b.reset(6)               # another history
    np.testing.assert_array_equal(first, b.reset(5))
    for x, y in zip(run, follow(b, acts(20))): np.testing.assert_array_equal(x.obs, y.obs); assert x.reward == y.reward and x.success == y.success
    assert not np.array_equal(first, b.reset(6))

def test_seeds_spread_over_the_workspace():
    env = make_env("metaworld/shelf-place")
    obs = np.stack([env.reset(s) for s in range(20)])
    assert len(np.unique(obs[:, OBS_SLICES["goal"]], axis=0)) == len(np.unique(obs[:, OBS_SLICES["object"]], axis=0)) == 20
    assert np.ptp(obs[:, OBS_SLICES["goal"]][:, 0]) > .12

def test_another_process_sees_the_same_world():
    code = "import numpy as np; from clam.envs.base import make_env; e = make_env('metaworld/peg-insert-side'); e.reset(3); print(e.step([.5, -.5, .1, 1]).obs.tobytes().hex())"
    env = make_env("metaworld/peg-insert-side"); env.reset(3)
    assert python(code) == env.step([.5, -.5, .1, 1]).obs.tobytes().hex()

def test_global_generator_is_untouched():
    np.random.seed(1); before = np.random.get_state()[1].copy()
    env = make_env("metaworld/assembly"); env.reset(0); env.step(np.zeros(4))
    np.testing.assert_array_equal(before, np.random.get_state()[1])

# ---------------------------------------------------------------- like MetaWorld, and restorable
@pytest.mark.parametrize("task", ["assembly", "peg-insert-side", "hammer", "stick-push", "reach"])
def test_equal_to_metaworld_itself(task):
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
    plain = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-v3-goal-observable"](seed=0)
    plain._freeze_rand_vec, plain.seeded_rand_vec = False, True
    plain.seed(9); o, _ = plain.reset(); env = MetaWorldEnv(task)
    np.testing.assert_array_equal(env.reset(9), o.astype(np.float32))
    for a in acts(30):
        _, r1, *_ = plain.step(a); o, r2, _, _, info = plain.step(a); s = env.step(a)
        np.testing.assert_array_equal(s.obs, o.astype(np.float32)); assert s.reward == float(r1+r2) and s.info["success_last"] == bool(info["success"])

@pytest.mark.parametrize("task", [*TASKS, "drawer-open", "coffee-push", "door-lock", "hammer", "pick-out-of-hole", "soccer"])
def test_a_saved_moment_comes_back(task):
    env = MetaWorldEnv(task); env.reset(2); follow(env, acts(15, seed=3)); saved = env.get_state()
    once = follow(env, acts(10))
    env.reset(4); follow(env, acts(5)); env.set_state(saved); twice = follow(env, acts(10))
    other = MetaWorldEnv(task); other.reset(0); obs = other.set_state(saved); thrice = follow(other, acts(10))     # even in another environment
    np.testing.assert_array_equal(obs, saved["obs"].astype(np.float32))
    for a, b, c in zip(once, twice, thrice):
        for x in (b, c): np.testing.assert_array_equal(a.obs, x.obs); assert (a.reward, a.success, a.done) == (x.reward, x.success, x.done)

@pytest.mark.slow
@pytest.mark.parametrize("task", ALL_TASKS)
def test_every_task_runs(task):
    with MetaWorldEnv(task, max_steps=5) as env:
        assert isinstance(env, Env) and env.reset(1).dtype == np.float32
        steps = follow(env, acts(5)); assert steps[-1].done and all(np.isfinite(s.obs).all() and s.obs.shape == (39,) for s in steps)

def test_time_ends_an_episode_and_nothing_else():
    env = make_env("metaworld/reach", max_steps=300); env.reset(0)     # 600 simulator steps: MetaWorld itself would raise at 500
    dones = [env.step(np.zeros(4)).done for _ in range(300)]
    assert dones == [False]*299 + [True]
    with pytest.raises(EnvError, match="after the episode's end"): env.step(np.zeros(4))

def test_success_counts_any_substep_and_repeat_sums_rewards():
    class Sim: # succeeds at the first of two simulator steps only
        n, dt = 0, .0125
        def step(self, a): self.n += 1; return np.zeros(39), 1.5, False, False, {"success": float(self.n % 2), "grasp_success": 0, "near_object": 0, "grasp_reward": 0, "in_place_reward": 0, "obj_to_target": 0}
    env = MetaWorldEnv("reach"); env.reset(0); env.sim = Sim(); s = env.step(np.zeros(4))
    assert s.success and s.info["success_last"] is False and s.reward == 3.

# ---------------------------------------------------------------- names and mistakes
def test_every_number_has_one_name():
    for task in TASKS:
        s = MetaWorldEnv(task).obs_slices; np.testing.assert_array_equal(np.concatenate([np.arange(39)[v] for v in s.values()]), np.arange(39))
    env = MetaWorldEnv("bin-picking"); o = env.reset(0); s = env.obs_slices
    np.testing.assert_allclose(o[s["hand"]], env.sim.get_endeff_pos(), atol=1e-6); np.testing.assert_allclose(o[s["goal"]], env.sim._target_pos, atol=1e-6); np.testing.assert_array_equal(o[s["prev_object"]], o[s["object"]])

@pytest.mark.parametrize("spoil, words", [(lambda s: s.pop("gripper"), "3: no name"), (lambda s: s.update(hand=slice(0, 4)), "3: hand and gripper"), (lambda s: s.update(goal=slice(36, 40)), "not there"), (lambda s: s.update(all=slice(None)), "not there"), (lambda s: s.update(none=slice(5, 5)), "not there")])
def test_a_table_of_names_with_a_fault_is_seen(monkeypatch, spoil, words):
    from clam.envs import metaworld
    table = dict(OBS_SLICES); spoil(table); monkeypatch.setattr(metaworld, "OBS_SLICES", table)
    with pytest.raises(EnvError, match=words): MetaWorldEnv("reach")

def test_names():
    assert {"toy", "fake", *(f"metaworld/{t}" for t in TASKS)} <= set(env_names())
    for bad in ("metaworld", "metaworld/", "metaworld/assembly-v3", "atari", "", "toy/x"):
        with pytest.raises(EnvError, match="unknown environment") as e: make_env(bad)
        assert "\n" not in str(e.value) and "metaworld/assembly" in str(e.value)

@pytest.mark.parametrize("action", [[0, 0, 0], [[0, 0, 0, 0]], [np.nan, 0, 0, 0], [np.inf, 0, 0, 0]])
def test_impossible_actions_are_refused(action):
    env = make_env("metaworld/assembly"); env.reset(0); saved = env.get_state()
    with pytest.raises(EnvError): env.step(action)
    assert env.get_state()["t"] == saved["t"]

def test_actions_are_clipped():
    a, b = FakeEnv(), FakeEnv(); a.reset(0); b.reset(0)
    np.testing.assert_array_equal(a.step([5, -5]).obs, b.step([1, -1]).obs)

# ---------------------------------------------------------------- graphics
def test_states_need_no_graphics():
    assert python("import sys; from clam.envs.base import make_env; e = make_env('metaworld/assembly'); e.reset(0); e.step([0]*4); e.close(); print('mujoco.egl' in sys.modules, 'mujoco.osmesa' in sys.modules)", CLAM_GL="off") == "False False"

def test_no_driver_gives_the_command():
    code = """
    from clam.core import EnvError
    from clam.envs.base import make_env
    from clam.envs.rendering import apt_command
    e = make_env("metaworld/assembly"); e.reset(0)
    try: e.render()
    except EnvError as err: print(apt_command() in str(err), chr(10) not in str(err)); e.close()
    """
    assert python(code, CLAM_GL="off") == "True True"

def test_a_crashing_or_hanging_driver_is_only_not_chosen(monkeypatch):
    monkeypatch.setattr(rendering, "_PROBE", "import os; {gl!r}; os.abort()"); assert not rendering.gl_works("egl")
    monkeypatch.setattr(rendering, "_PROBE", "import time; {gl!r}; time.sleep(60)"); assert not rendering.gl_works("egl", timeout_s=.5)
    monkeypatch.setattr(rendering, "_PROBE", "import os; {gl!r}; print('drawn') if os.environ['MUJOCO_GL'] == 'osmesa' else os.abort()")
    monkeypatch.setattr(rendering, "_choice", [])
    for v in ("CLAM_GL", "MUJOCO_GL"): monkeypatch.setenv(v, "x"); monkeypatch.delenv(v)    # and put back afterwards
    assert rendering.choose_gl() == "osmesa" and os.environ["MUJOCO_GL"] == "osmesa" == os.environ["CLAM_GL"]

def test_mujoco_gl_of_the_user_stays():
    assert python("import os; from clam.envs.rendering import choose_gl; choose_gl(); print(os.environ['MUJOCO_GL'])", MUJOCO_GL="osmesa") == "osmesa"

needs_gl = pytest.mark.skipif(rendering.choose_gl() is None, reason="no driver can draw here")
@needs_gl
@pytest.mark.parametrize("task", TASKS)
def test_a_frame_shows_the_scene_and_says_how(task):
    with MetaWorldEnv(task) as env:
        env.reset(1); img = env.render()
        assert img.shape == (84, 84, 3) and img.dtype == np.uint8 and len(np.unique(img)) > 60
        red = (img[..., 0] > 80) & (img[..., 1] < 50)                  # the arm is red and enters from the top
        assert red[:42].sum() > 60
        np.testing.assert_array_equal(img, env.render())
        assert env.render_settings["fast"] and env.render_settings["shadowsize"] == 0 and env.render_settings["reflection"] is False

@needs_gl
def test_two_worlds_do_not_mix():
    with MetaWorldEnv("assembly") as a, MetaWorldEnv("bin-picking", render_size=64) as b:
        a.reset(0); b.reset(0); alone = a.render(); other = b.render()
        np.testing.assert_array_equal(alone, a.render()); np.testing.assert_array_equal(other, b.render())
        b.close(); np.testing.assert_array_equal(alone, a.render())

@needs_gl
def test_drawing_changes_no_physics():
    with MetaWorldEnv("assembly") as a, MetaWorldEnv("assembly") as b:
        a.reset(0); b.reset(0)
        for act in acts(5): a.render(); np.testing.assert_array_equal(a.step(act).obs, b.step(act).obs)

@needs_gl
def test_drivers_agree():
    if not all(map(rendering.gl_works, ("egl", "osmesa"))): pytest.skip("one driver only")
    code = "from clam.envs.base import make_env; e = make_env('metaworld/assembly'); e.reset(0); print(e.render().tobytes().hex()); e.close()"
    a, b = (np.frombuffer(bytes.fromhex(python(code, CLAM_GL=g)), np.uint8).astype(int) for g in ("egl", "osmesa"))
    assert np.abs(a-b).mean() < 2
