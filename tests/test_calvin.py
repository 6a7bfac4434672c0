"""Pins the CALVIN environment against a small tree of our own that keeps calvin_env's contract (configuration, simulator, cameras,
oracle), in a process of its own; and against a real checkout where CALVIN_ROOT names one."""
import os, subprocess, sys, textwrap
from pathlib import Path
import numpy as np, pytest
from clam.core import EnvError
from clam.envs.base import make_env
from clam.envs.calvin import STARTS, TABLE, calvin_root, draw_scene, obs_layout

ROOT = Path(__file__).resolve().parent.parent

TREE = {
    "conf/config_data_collection.yaml": "",
    "hydra/__init__.py": '''
        import contextlib
        from types import SimpleNamespace as N
        SEEN = []
        @contextlib.contextmanager
        def initialize_config_dir(d, version_base=None): SEEN.append(d); yield
        def compose(name, overrides):
            SEEN.append((name, sorted(overrides))); from calvin_env.envs import play_table_env as p
            return N(cameras={"static": N(make=p.Camera, width=200, height=200), "gripper": N(make=p.Camera, width=84, height=84)}, env=N(make=p.PlayTableSimEnv, cameras="both"), tasks=N(make=p.Tasks))
    ''',
    "hydra/utils.py": "def instantiate(cfg, **kw): return cfg.make(cfg, **kw)\n",
    "calvin_env/__init__.py": "", "calvin_env/envs/__init__.py": "",
    "calvin_env/envs/play_table_env.py": '''
        import numpy as np
        def get_git_commit_hash(path): raise RuntimeError("not a git repository")
        class Camera:
            def __init__(self, cfg, cid, robot_id, objects): self.n = cfg.height, cfg.width; assert (cid, robot_id, objects) == (7, 3, ["blocks"])
            def render(self): return np.full((*self.n, 3), 90, np.uint8), np.zeros(self.n)
        class Robot: robot_uid = 3
        class Scene:
            def get_objects(self): return ["blocks"]
        class PlayTableSimEnv:
            cid, robot, scene, ownsPhysicsClient = 7, Robot(), Scene(), True
            def __init__(self, cfg): assert cfg.cameras == {}, "cameras would be drawn at every step"; get_git_commit_hash(__file__)
            def reset(self, robot_obs=None, scene_obs=None): self.r = np.zeros(15) if robot_obs is None else np.array(robot_obs, float); self.s = np.array(scene_obs, float); self.sent = []
            def get_state_obs(self): return {"robot_obs": self.r.copy(), "scene_obs": self.s.copy()}
            def get_info(self): return {"scene_info": self.s.copy()}
            def step(self, a):
                assert a.shape == (7,) and a.dtype == np.float64 and a[6] in (-1, 1); self.sent.append(a)
                self.r[:3] += .02*a[:3]; self.s[1] = max(0., self.s[1]-.05*(a[0] > .5)); return {}, 0, False, self.get_info()
            def close(self): self.closed = True
        class Tasks:
            def __init__(self, cfg): pass
            def get_task_info_for_set(self, start, end, only): return {t for t in only if t == "close_drawer" and start["scene_info"][1]-end["scene_info"][1] > .12}
    '''}

@pytest.fixture
def tree(tmp_path):
    for n, text in TREE.items(): (tmp_path/n).parent.mkdir(parents=True, exist_ok=True); (tmp_path/n).write_text(textwrap.dedent(text))
    return tmp_path

def run(code, root, **env):
    env = os.environ | {"CALVIN_ROOT": str(root), "PYTHONPATH": str(ROOT)} | env
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, env=env); assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout

def test_the_contract(tree):
    run('''
        import numpy as np
        from clam.envs.base import Env, make_env
        with make_env("calvin/close-drawer", render_size=32) as env:
            assert isinstance(env, Env) and env.spec.obs_dim == 39 and env.spec.act_dim == 7
            import hydra; folder, (name, over) = hydra.SEEN; assert folder.endswith("conf") and name == "config_data_collection" and {"use_vr=false", "env.use_egl=false", "scene=calvin_scene_D_eval"} <= set(over)
            o = env.reset(5); assert o.dtype == np.float32 and o.shape == (39,) and .18 <= o[env.obs_slices["drawer"]][0] <= .22 and (env.reset(5) == o).all() and (env.reset(6) != o).any()
            env.reset(5); steps = [env.step([1, 0, 0, 0, 0, 0, g]) for g in (.2, -.2, 0, 1)]
            assert [a[6] for a in env.sim.sent] == [1, -1, 1, 1]                                  # the gripper command is a sign
            assert [s.success for s in steps] == [False, False, True, True] and [s.reward for s in steps] == [0, 0, 1, 0]     # .05 each: past .12 at the third; reward once
            assert np.allclose(steps[-1].obs[:3], [.08, 0, 0]) and env.render().shape == (32, 32, 3)
            moment = env.get_state(); a = env.step([0, 1, 0, 0, 0, 0, 1]); back = env.set_state(moment); assert (back == moment["obs"].astype(np.float32)).all(); b = env.step([0, 1, 0, 0, 0, 0, 1]); assert (a.obs == b.obs).all() and a.success == b.success
            sim = env.sim
        assert sim.closed and env.sim is None
        with make_env("calvin/close-drawer", max_steps=2) as env: env.reset(0); env.step(np.zeros(7)); assert env.step(np.zeros(7)).done
    ''', tree)

def test_what_is_missing_is_said(tree, monkeypatch):
    monkeypatch.delenv("CALVIN_ROOT", raising=False)
    with pytest.raises(EnvError, match="CALVIN is not part.*CALVIN_ROOT"): make_env("calvin/close-drawer")
    with pytest.raises(EnvError, match="not a checkout of calvin_env"): calvin_root(tree/"conf")
    assert calvin_root(tree) == tree
    (tree/"calvin_env"/"envs"/"play_table_env.py").write_text("import pybullet_that_nobody_has\n")
    said = run('''
        from clam.core import EnvError
        from clam.envs.base import make_env
        try: make_env("calvin/close-drawer")
        except EnvError as e: print(e)
    ''', tree); assert "pybullet_that_nobody_has" in said and "pip install" in said

@pytest.mark.parametrize("task", STARTS)
def test_every_start_is_possible_and_its_own(task):
    lay, seen = obs_layout(), set()
    for k in range(50):
        o = np.r_[np.zeros(15), draw_scene(task, k)]; seen.add(o.tobytes()); at = lambda n: o[lay[n]]
        if task == "close-drawer": assert at("drawer")[0] > .12
        elif task == "open-drawer": assert at("drawer")[0] == 0
        if task == "move-slider-right": assert at("slider")[0] > .15
        elif task == "move-slider-left": assert at("slider")[0] <= .28-.15
        xy = np.stack([at(f"{b}_xyz")[:2] for b in ("red", "blue", "pink")]); assert (xy >= TABLE[0]).all() and (xy <= TABLE[1]).all() and min(np.linalg.norm(xy[i]-xy[j]) for i in range(3) for j in range(i)) >= .1
    assert len(seen) == 50

@pytest.mark.skipif("CALVIN_ROOT" not in os.environ, reason="CALVIN_ROOT names no checkout of calvin_env")
@pytest.mark.slow
def test_a_real_checkout():
    run('''
        import numpy as np
        from clam.envs.base import make_env
        for task, joint, to in (("close-drawer", 16, 0.), ("move-slider-left", 15, .25), ("open-drawer", 16, .2), ("move-slider-right", 15, 0.)):
            with make_env(f"calvin/{task}") as env:
                o = env.reset(1); assert (env.reset(1) == o).all() and env.render().std() > 20
                s = env.step(np.r_[1., np.zeros(5), 1.]); assert not s.success and .005 < s.obs[0]-o[0] < .03
                m = env.get_state(); back = env.set_state(m); assert abs(back-m["obs"]).max() < 5e-3
                m["obs"][joint] = to; env.set_state(m); s = env.step(np.r_[np.zeros(6), 1.]); assert s.success and s.reward == 1, (task, s)
    ''', os.environ["CALVIN_ROOT"], PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
