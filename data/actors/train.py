"""Train the agents whose snapshots lie beside this file; hours on one core, resumable. Needs an environment of its own:

    python -m venv sac && sac/bin/pip install sbx-rl==0.28.0 gymnasium mujoco==3.3.0 dm_control==1.0.28 imageio packaging
    sac/bin/python data/actors/train.py HalfCheetah-v5 --out raw            # or Hopper-v5, cheetah-run
    sac/bin/python data/actors/train.py hopper-hop --out raw --teacher checkpoint.pt --layer-norm --width 128 --batch 128
    .venv/bin/python -c "from clam.collect.actors import pack_actors; pack_actors('raw/HalfCheetah-v5', 'HalfCheetah-v5', 'mujoco/HalfCheetah-v5', medium=4800.)"

Who falls in hopper-hop earns nothing, so by itself SAC finds its first hop late. `--teacher` puts episodes of another agent, at several levels of
noise, into the replay buffer before training: the PPO expert of github.com/dunnolab/laom (Apache-2.0; scripts/data_collection/checkpoints/
hopper-hop-expert/checkpoint.pt), which is not part of this repository. Reading it needs torch.
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

def teacher(path): # observation [S] -> action [A], of a checkpoint of LAOM's PPO: normalised observations, two layers with tanh
    import torch
    w = {k: v.numpy() for k, v in torch.load(path, weights_only=True, map_location="cpu").items()}
    def act(o):
        x = np.clip((o-w["obs_rms.mean"])/np.sqrt(w["obs_rms.var"]+1e-8), -10, 10)
        for i in (0, 2): x = np.tanh(x @ w[f"actor_mean.{i}.weight"].T+w[f"actor_mean.{i}.bias"])
        return x @ w["actor_mean.4.weight"].T+w["actor_mean.4.bias"]
    return act

def demonstrate(model, env, act, episodes, rng, noise=(0., .25, .5, 1.)) -> dict: # episodes of `act` with normal noise of each level in turn, into the replay buffer; mean returns
    returns = {s: [] for s in noise}
    for i in range(episodes):
        (o, _), total, over = env.reset(seed=80_000+i), 0., False
        while not over:
            a = np.clip(act(o)+noise[i % len(noise)]*rng.normal(size=env.action_space.shape), -1, 1).astype(np.float32)
            new, r, end, late, _ = env.step(a); over = end or late; total += r
            model.replay_buffer.add(o[None], new[None], a[None], np.array([r]), np.array([over]), [{"TimeLimit.truncated": late}]); o = new
        returns[noise[i % len(noise)]].append(total)
    return {f"noise {s}": round(float(np.mean(R)), 1) for s, R in returns.items() if R}

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
    p.add_argument("task"); p.add_argument("--steps", type=int, default=1_000_000); p.add_argument("--seed", type=int, default=0); p.add_argument("--out", default="raw")
    p.add_argument("--teacher", help="checkpoint whose episodes are in the replay buffer from the start"); p.add_argument("--demos", type=int, default=48, help="how many")
    p.add_argument("--layer-norm", action="store_true", help="in the critics"); p.add_argument("--width", type=int, default=256); p.add_argument("--batch", type=int, default=256); a = p.parse_args()
    out = Path(a.out)/a.task; out.mkdir(parents=True, exist_ok=True); env = make(a.task)
    settings = dict(learning_rate=3e-4, buffer_size=500_000, learning_starts=500 if a.teacher else 5_000, batch_size=a.batch, train_freq=32, gradient_steps=32, gamma=.99)
    if (out/"model.zip").exists(): model = SAC.load(out/"model.zip", env=env); model.load_replay_buffer(out/"buffer.pkl")
    else:
        model = SAC("MlpPolicy", env, policy_kwargs=dict(net_arch=[a.width, a.width], layer_norm=a.layer_norm), seed=a.seed, **settings); np.savez(out/"actor-0000000.npz", **weights(model))
        demos = {"agent": "dunnolab/laom, hopper-hop-expert (PPO, Apache-2.0)", "episodes": a.demos, "returns": demonstrate(model, make(a.task), teacher(a.teacher), a.demos, np.random.default_rng(a.seed))} if a.teacher else None
        packages = {n: importlib.metadata.version(n) for n in ("sbx-rl", "jax", "gymnasium", "mujoco", "dm_control", "numpy")}
        (out/"args.json").write_text(json.dumps({"algorithm": f"SAC (SBX {packages['sbx-rl']}){', shown episodes of the PPO agent of LAOM,' if demos else ''}", "seed": a.seed, "settings": {**settings, "net_arch": [a.width, a.width], "layer_norm": a.layer_norm}, **({"demonstrations": demos} if demos else {}), "packages": packages, "machine": f"one thread, {platform.machine()}"}))
    model.learn(a.steps-model.num_timesteps, callback=Keep(out, a.task, 9_984), reset_num_timesteps=False)
