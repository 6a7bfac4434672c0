"""Train the agents whose snapshots lie beside this file; hours on one core, resumable. Needs an environment of its own:

    python -m venv sac && sac/bin/pip install sbx-rl==0.28.0 gymnasium mujoco==3.3.0 dm_control==1.0.28 imageio packaging
    sac/bin/python data/actors/train.py HalfCheetah-v5 --out raw            # or Hopper-v5, cheetah-run; hopper-hop: imitate.py
    .venv/bin/python -c "from clam.collect.actors import pack_actors; pack_actors('raw/HalfCheetah-v5', 'HalfCheetah-v5', 'mujoco/HalfCheetah-v5', medium=4800.)"
"""
import argparse, importlib.metadata, json, os, platform, time
os.environ.update(OMP_NUM_THREADS="1", JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
from pathlib import Path
import gymnasium as gym, jax, numpy as np
from sbx import SAC
from stable_baselines3.common.callbacks import BaseCallback

class Suite(gym.Env):
    "A dm_control task; observations side by side in sorted order of their names, as `clam.envs.dmc.flatten` has them."
    def __init__(self, task):
        from dm_control import suite
        self.env = suite.load(*task.split("-"), task_kwargs={"random": 0}); limits = self.env.action_spec(); o = self._flat(self.env.reset())
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, o.shape, np.float32)
        self.action_space = gym.spaces.Box(limits.minimum.astype(np.float32), limits.maximum.astype(np.float32))
    def _flat(self, step): return np.concatenate([np.ravel(v) for _, v in sorted(step.observation.items())]).astype(np.float32)
    def reset(self, *, seed=None, options=None):
        if seed is not None: self.env.task._random = np.random.RandomState(seed)
        return self._flat(self.env.reset()), {}
    def step(self, a): s = self.env.step(a); return self._flat(s), float(s.reward), False, s.last(), {}

def make(task): return gym.make(task) if "-v" in task else Suite(task)

def weights(model) -> dict: # flax's own names
    return {"/".join(str(k.key) for k in path): np.asarray(v) for path, v in jax.tree_util.tree_leaves_with_path(model.policy.actor_state.params)}

class Keep(BaseCallback):
    "Every `every` steps: five episodes without noise, a line in the curve, the actor's weights; every fifth time all that a restart needs."
    def __init__(self, out, task, every): super().__init__(); self.out, self.every, self.env, self.cpu = out, every, make(task), time.process_time()
    def score(self) -> list[float]:
        out = []
        for i in range(5):
            (o, _), total, over = self.env.reset(seed=90_000+i), 0., False
            while not over: o, r, end, late, _ = self.env.step(self.model.predict(o, deterministic=True)[0]); total += r; over = end or late
            out.append(total)
        return out
    def _on_step(self) -> bool:
        n = self.num_timesteps
        if n % self.every == 0:
            R = self.score(); np.savez(self.out/"new.npz", **weights(self.model)); (self.out/"new.npz").rename(self.out/f"actor-{n:07d}.npz")
            with open(self.out/"curve.jsonl", "a") as f: f.write(json.dumps({"step": n, "mean": float(np.mean(R)), "returns": R, "cpu_s": round(time.process_time()-self.cpu)})+"\n")
            print(self.out.name, n, round(float(np.mean(R)), 1), flush=True)
        if n % (5*self.every) == 0:
            self.model.save(self.out/"new.zip"); self.model.save_replay_buffer(self.out/"new.pkl"); (self.out/"new.zip").rename(self.out/"model.zip"); (self.out/"new.pkl").rename(self.out/"buffer.pkl")
        return True

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("task"); p.add_argument("--steps", type=int, default=1_000_000); p.add_argument("--seed", type=int, default=0); p.add_argument("--out", default="raw"); a = p.parse_args()
    out = Path(a.out)/a.task; out.mkdir(parents=True, exist_ok=True); env = make(a.task)
    settings = dict(learning_rate=3e-4, buffer_size=500_000, learning_starts=5_000, batch_size=256, train_freq=32, gradient_steps=32, gamma=.99)
    if (out/"model.zip").exists(): model = SAC.load(out/"model.zip", env=env); model.load_replay_buffer(out/"buffer.pkl")
    else:
        model = SAC("MlpPolicy", env, policy_kwargs=dict(net_arch=[256, 256]), seed=a.seed, **settings); np.savez(out/"actor-0000000.npz", **weights(model))
        packages = {n: importlib.metadata.version(n) for n in ("sbx-rl", "jax", "gymnasium", "mujoco", "dm_control", "numpy")}
        (out/"args.json").write_text(json.dumps({"algorithm": f"SAC (SBX {packages['sbx-rl']})", "seed": a.seed, "settings": {**settings, "net_arch": [256, 256]}, "packages": packages, "machine": f"one thread, {platform.machine()}"}))
    model.learn(a.steps-model.num_timesteps, callback=Keep(out, a.task, 9_984), reset_num_timesteps=False)
