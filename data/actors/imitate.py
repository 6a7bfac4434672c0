"""Snapshots of an agent that imitates another one, in minutes on one core; with the workbench's own environment.

    .venv/bin/python data/actors/imitate.py dmc/hopper-hop checkpoint.pt --out raw
    .venv/bin/python -c "from clam.collect.actors import pack_actors; pack_actors('raw/hopper-hop', 'hopper-hop', 'dmc/hopper-hop', medium=150.)"

Who lies on the floor earns nothing in hopper-hop, and our SAC (train.py) had found no hop after as many processor seconds as we had. The teacher
is the PPO expert of github.com/dunnolab/laom (Apache-2.0), scripts/data_collection/checkpoints/hopper-hop-expert/checkpoint.pt, which is not part
of this repository. It is shown disturbed by noise and asked what it would do, so that the pupil learns to recover. Steps are gradient updates.
"""
import argparse, importlib.metadata, json, os, platform, time
os.environ.setdefault("OMP_NUM_THREADS", "1")
from pathlib import Path
import numpy as np, torch, torch.nn as nn
from clam.collect.actors import Actor
from clam.collect.recipes import play
from clam.envs.base import make_env

def teacher(path): # (observation [S] -> action [A] in [-1, 1], log deviations [A]), of a checkpoint of LAOM's PPO: normalised observations, two layers with tanh
    w = {k: v.numpy() for k, v in torch.load(path, weights_only=True, map_location="cpu").items()}
    def act(o):
        x = np.clip((o-w["obs_rms.mean"])/np.sqrt(w["obs_rms.var"]+1e-8), -10, 10)
        for i in (0, 2): x = np.tanh(x @ w[f"actor_mean.{i}.weight"].T+w[f"actor_mean.{i}.bias"])
        return np.clip(x @ w["actor_mean.4.weight"].T+w["actor_mean.4.bias"], -1, 1).astype(np.float32)
    return act, w["actor_logstd"][0]

def demonstrations(env, act, episodes, rng, noise=(0., .25, .5, 1.)): # observations [N, S], the teacher's actions there [N, A], {noise: mean return}
    obs, acts, returns = [], [], {s: [] for s in noise}
    for i in range(episodes):
        s = noise[i % len(noise)]; e = play(env, lambda o, t: act(o)+s*rng.normal(size=env.spec.act_dim), 800_000+i)
        obs.append(e.obs[:-1]); acts.append(np.stack([act(o) for o in e.obs[:-1]])); returns[s].append(e.total_reward)
    return np.concatenate(obs), np.concatenate(acts), {f"noise {s}": round(float(np.mean(R)), 1) for s, R in returns.items() if R}

def weights(net, mean, std, logstd) -> dict: # as `clam.collect.actors.Actor` reads them; the normalisation goes into the first layer
    lin = [l for l in net if isinstance(l, nn.Linear)]; out = {f"Dense_{i}.kernel": l.weight.detach().numpy().T.copy() for i, l in enumerate(lin)} | {f"Dense_{i}.bias": l.bias.detach().numpy().copy() for i, l in enumerate(lin)}
    k = out["Dense_0.kernel"]; out["Dense_0.bias"] = out["Dense_0.bias"]-(mean/std)@k; out["Dense_0.kernel"] = k/std[:, None]
    return out | {"Dense_3.kernel": np.zeros_like(out["Dense_2.kernel"]), "Dense_3.bias": logstd.astype(np.float32)}

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("env"); p.add_argument("checkpoint"); p.add_argument("--episodes", type=int, default=24); p.add_argument("--seed", type=int, default=0); p.add_argument("--out", default="raw"); a = p.parse_args()
    out = Path(a.out)/a.env.partition("/")[2]; out.mkdir(parents=True, exist_ok=True); rng = np.random.default_rng(a.seed); torch.manual_seed(a.seed); torch.set_num_threads(1)
    settings = dict(loss="squared error of the action", net_arch=[128, 128], batch=256, learning_rate=1e-3, demonstrations=a.episodes); keep = (0, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120)
    env = make_env(a.env); act, logstd = teacher(a.checkpoint); start = time.process_time(); O, A, shown = demonstrations(env, act, a.episodes, rng); print(len(O), shown, flush=True)
    mean, std = O.mean(0), O.std(0)+1e-3; X, Y = torch.from_numpy((O-mean)/std), torch.from_numpy(A)
    net = nn.Sequential(nn.Linear(O.shape[1], 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, A.shape[1])); opt = torch.optim.Adam(net.parameters(), lr=settings["learning_rate"]); (out/"curve.jsonl").unlink(missing_ok=True)
    (out/"args.json").write_text(json.dumps({"algorithm": "imitation of the PPO agent of LAOM", "teacher": "github.com/dunnolab/laom, hopper-hop-expert, Apache-2.0", "teacher_returns": shown, "seed": a.seed, "settings": settings, "unit": "gradient updates", "licence": "as the workbench; its teacher: Apache-2.0",
        "packages": {n: importlib.metadata.version(n) for n in ("torch", "mujoco", "dm_control", "numpy")}, "machine": f"one thread, {platform.machine()}"}))
    for step in range(keep[-1]+1):
        if step in keep:
            w = weights(net, mean, std, logstd); np.savez(out/f"actor-{step:07d}.npz", **w); R = [play(env, lambda o, t, actor=Actor(w): actor(o), 90_000+i).total_reward for i in range(2)]
            if step:
                with open(out/"curve.jsonl", "a") as f: f.write(json.dumps({"step": step, "mean": float(np.mean(R)), "returns": R, "cpu_s": round(time.process_time()-start)})+"\n")
            print(step, np.round(R, 1), flush=True)
        i = torch.from_numpy(rng.integers(0, len(X), 256)); loss = (torch.tanh(net(X[i]))-Y[i]).square().mean(); opt.zero_grad(); loss.backward(); opt.step()
