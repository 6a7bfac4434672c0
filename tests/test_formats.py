"""Pins the importers and exporters: alignment of every format under independent random actions, exact round trips, no code run from a
dataset, and more than 300 damaged files of which each loads right or raises DatasetError and leaves nothing. The damaged files are
tried in a child process (`python tests/test_formats.py FORMAT FOLDER`), so that a crash is seen as one."""
import json, os, pickle, shutil, subprocess, sys, warnings
from pathlib import Path
import numpy as np, pytest
from clam.core import ConfigError, DatasetError, Episode, Spec
from clam.data.formats import export_dataset, find_format, format_names, fresh_folder, import_dataset, safe_unpickle
from clam.data.store import EpisodeStore, check_store, write_store
from clam.testing import fake_episode

ROOT = Path(__file__).resolve().parent.parent
FORMATS = ("d4rl", "laom", "robomimic", "tdmpc2", "calvin", "bridge", "minari", "lerobot2", "lerobot3")
LENGTHS = (9, 4, 6)

# ---- a world with a known rule, written in every layout by the format's own library
def world(S=6, A=2, lengths=LENGTHS, frames=8): return [fake_episode(T, S, A, seed=10+i, frames=frames) for i, T in enumerate(lengths)]
def off(ep, scale=1.): # how far an episode is from the rule o' = .9 o + a M
    M = np.random.default_rng(123).normal(0, .5, (ep.act.shape[1], ep.obs.shape[1])).astype(np.float32)
    return float(np.abs(ep.obs[1:]-.9*ep.obs[:-1]-ep.act/scale @ M).max())

def put_d4rl(root, eps, shift=0):
    import h5py
    cat = lambda g: np.concatenate([g(e) for e in eps]); ends = np.cumsum([len(e) for e in eps])-1
    with h5py.File(root/"set.hdf5", "w") as f:
        f["observations"], f["actions"], f["rewards"] = cat(lambda e: e.obs[:-1]), np.roll(cat(lambda e: e.act), shift, 0), cat(lambda e: e.reward)
        f["next_observations"] = cat(lambda e: e.obs[1:]); f["infos/goal_achieved"] = cat(lambda e: e.success)
        f["terminals"], f["timeouts"] = np.arange(ends[-1]+1) == ends[0], np.arange(ends[-1]+1) == ends[1]
    return root/"set.hdf5"

def put_laom(root, eps, shift=0):
    import h5py
    with h5py.File(root/"set.hdf5", "w") as f:
        f.attrs.update(domain_name="cheetah", task_name="run")
        for i, e in enumerate(eps):
            g = f.create_group(str(i)); g["obs"], g["states"], g["actions"] = e.frames[:-1], e.obs[:-1], np.roll(e.act, shift, 0); g.attrs["traj_return"] = e.total_reward
    return root/"set.hdf5"

def put_robomimic(root, eps, shift=0):
    import h5py
    with h5py.File(root/"set.hdf5", "w") as f:
        f.create_group("data").attrs["env_args"] = '{"env_name": "Lift"}'
        for i, e in enumerate(eps):
            g = f.create_group(f"data/demo_{i}"); g["actions"], g["rewards"], g["dones"] = np.roll(e.act, shift, 0), (np.arange(len(e)) == len(e)-1).astype(float), np.arange(len(e)) == len(e)-1
            for where, rows in (("obs", slice(None, -1)), ("next_obs", slice(1, None))): g[f"{where}/a_pos"], g[f"{where}/b_object"], g[f"{where}/cam_image"] = e.obs[rows, :3], e.obs[rows, 3:], e.frames[rows]
    return root/"set.hdf5"

def put_tdmpc2(root, eps, shift=0):
    import torch; from tensordict import TensorDict
    pad = lambda a: np.concatenate([np.full_like(a[:1], np.nan), np.roll(a, shift, 0)])
    rows = {"obs": np.concatenate([e.obs for e in eps]), "action": np.concatenate([np.c_[pad(e.act), np.r_[np.nan, np.zeros(len(e))]] for e in eps]).astype(np.float32), "reward": np.concatenate([pad(e.reward) for e in eps]),
            "episode": np.repeat(np.arange(len(eps)), [len(e)+1 for e in eps]), "image": np.concatenate([np.moveaxis(e.frames, -1, 1) for e in eps])}
    torch.save(TensorDict({k: torch.tensor(v) for k, v in rows.items()}, [len(rows["obs"])]), root/"buffer_mw-assembly.pt")
    return root/"buffer_mw-assembly.pt"

def put_calvin(root, eps, shift=0):
    t = root/"training"; (t/"lang_annotations").mkdir(parents=True); i, ids = 7, []
    for e in eps:
        ids.append((i, i+len(e))); act = np.roll(e.act, shift, 0)
        for k in range(len(e)+1): np.savez(t/f"episode_{i:07d}.npz", robot_obs=e.obs[k, :15], scene_obs=e.obs[k, 15:], rel_actions=act[k] if k < len(e) else np.zeros(7), actions=np.full(7, 3.), rgb_static=e.frames[k]); i += 1
    np.save(t/"ep_start_end_ids.npy", np.array(ids))
    np.save(t/"lang_annotations/auto_lang_ann.npy", np.array({"language": {"ann": ["close it"]*len(eps), "task": ["close_drawer"]*len(eps)}, "info": {"indx": ids}}, dtype=object), allow_pickle=True)
    return root

def put_bridge(root, eps, shift=0):
    from PIL import Image
    for i, e in enumerate(eps):
        d = root/f"2022-01-05_10-00-00/raw/traj_group0/traj{i}"; (d/"images0").mkdir(parents=True)
        (d/"obs_dict.pkl").write_bytes(pickle.dumps({"state": e.obs.astype(float), "time_stamp": [0.]*len(e.obs)}))
        (d/"policy_out.pkl").write_bytes(pickle.dumps([{"actions": 4.*a, "policy_type": "VR"} for a in np.roll(e.act, shift, 0)]))
        for k, f in enumerate(e.frames): Image.fromarray(f).save(d/f"images0/im_{k}.jpg")
    return root

def put_minari(root, eps, shift=0):
    import gymnasium as gym, minari; from minari.data_collector import EpisodeBuffer
    before = os.environ.get("MINARI_DATASETS_PATH"); os.environ["MINARI_DATASETS_PATH"] = str(root)
    buffers = [EpisodeBuffer(id=i, observations={"state": e.obs, "pixels": e.frames}, actions=np.roll(e.act, shift, 0), rewards=list(e.reward), terminations=[False]*len(e), truncations=[False]*(len(e)-1)+[True], infos={"success": np.r_[False, e.success]}) for i, e in enumerate(eps)]
    S, A, (h, w) = eps[0].obs.shape[1], eps[0].act.shape[1], eps[0].frames.shape[1:3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers("lab/set-v0", buffers, observation_space=gym.spaces.Dict({"state": gym.spaces.Box(-np.inf, np.inf, (S,)), "pixels": gym.spaces.Box(0, 255, (h, w, 3), np.uint8)}), action_space=gym.spaces.Box(-1, 1, (A,)))
    os.environ.pop("MINARI_DATASETS_PATH") if before is None else os.environ.update(MINARI_DATASETS_PATH=before)
    return root/"lab/set-v0"

def put_lerobot2(root, eps, shift=0, fps=10):
    import pyarrow as pa, pyarrow.parquet as pq
    for d in ("meta", "data/chunk-000"): (root/d).mkdir(parents=True)
    for i, e in enumerate(eps):
        T = len(e); pq.write_table(pa.table({"observation.state": list(e.obs[:-1]), "action": list(np.roll(e.act, shift, 0)), "next.reward": e.reward, "frame_index": np.arange(T), "episode_index": np.full(T, i), "index": np.arange(T), "task_index": np.zeros(T, int)}), root/f"data/chunk-000/episode_{i:06d}.parquet")
    vec = lambda n: {"dtype": "float32", "shape": [n], "names": None}
    (root/"meta/info.json").write_text(json.dumps({"codebase_version": "v2.1", "fps": fps, "chunks_size": 1000, "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet", "video_path": None, "features": {"observation.state": vec(6), "action": vec(2), "next.reward": vec(1)}}))
    (root/"meta/episodes.jsonl").write_text("".join(json.dumps({"episode_index": i, "tasks": ["reach"], "length": len(e)})+"\n" for i, e in enumerate(eps)))
    return root

def put_lerobot3(root, eps, shift=0): # with video; without our card, as another program would write it
    eps = [e.replace(act=np.roll(e.act, shift, 0), frames=np.repeat(np.repeat(e.frames, 2, 1), 2, 2)) for e in eps]
    store = EpisodeStore(write_store(root/"store", eps)); export_dataset("lerobot", store, root/"v3"); (root/"v3/meta/clam.json").unlink(); shutil.rmtree(root/"store")
    return root/"v3"

PUT = {k[4:]: v for k, v in list(globals().items()) if k.startswith("put_")}
SIZE = {"calvin": (39, 7), "bridge": (7, 7)}
OPTIONS = {"tdmpc2": {"odd": "keep"}, "calvin": {"camera": "rgb_static"}, "bridge": {"size": None}}
DROPS_LAST = {"laom", "lerobot2"}   # nowhere the observation after the last action; our LeRobot export writes it
def source(name, **kw): return world(*SIZE.get(name, (6, 2)), **kw)
def bring(name, path, out, **kw): return import_dataset(name.rstrip("23") if name.startswith("lerobot") else name, path, out, **{**OPTIONS.get(name, {}), **kw})


# ---- alignment and values
@pytest.mark.parametrize("name", FORMATS)
def test_alignment_and_values(name, tmp_path):
    eps = source(name); (tmp_path/"src").mkdir()
    s = EpisodeStore(bring(name, PUT[name](tmp_path/"src", eps), tmp_path/"out")); cut = 1 if name in DROPS_LAST else 0; scale = 4. if name == "bridge" else 1.
    assert check_store(s.path) == [] and [len(e) for e in s] == [len(e)-cut for e in eps]
    for a, b in zip(s, eps, strict=True):
        T = len(a); assert off(a, scale) < 1e-4
        assert np.allclose(a.obs, b.obs[:T+1], atol=1e-6) and np.allclose(a.act, scale*b.act[:T], atol=1e-6)
        if name in ("laom", "robomimic", "tdmpc2", "calvin", "minari"): assert np.array_equal(a.frames, b.frames[:T+1])
        if name in ("d4rl", "tdmpc2", "minari", "lerobot2", "lerobot3"): assert np.allclose(a.reward, b.reward[:T], atol=1e-6)
        if name in ("d4rl", "minari", "lerobot3"): assert np.array_equal(a.success, b.success[:T])
    assert s.spec.obs_dim == eps[0].obs.shape[1] and s.spec.act_dim == eps[0].act.shape[1] and s.spec.max_steps == max(s.lengths)
    assert s.meta["imported"]["format"] in format_names() and s.meta["imported"]["alignment"] in ("whole", "same", "led")

@pytest.mark.parametrize("name", FORMATS)
def test_an_action_one_step_late_is_seen(name, tmp_path):
    (tmp_path/"src").mkdir(); s = EpisodeStore(bring(name, PUT[name](tmp_path/"src", source(name), shift=1), tmp_path/"out"))
    assert min(off(e, 4. if name == "bridge" else 1.) for e in s) > .1

@pytest.mark.parametrize("name", ("laom", "robomimic", "bridge", "minari"))
def test_keys_that_sort_as_text(name, tmp_path): # 10 comes after 9, not after 1
    (tmp_path/"src").mkdir(); eps = source(name, lengths=[3]*12, frames=8)
    s = EpisodeStore(bring(name, PUT[name](tmp_path/"src", eps), tmp_path/"out"))
    assert all(np.allclose(a.obs, b.obs[:len(a)+1], atol=1e-6) for a, b in zip(s, eps, strict=True))

def test_same_source_same_bytes(tmp_path):
    (tmp_path/"src").mkdir(); p = put_d4rl(tmp_path/"src", world())
    a, b = (import_dataset("d4rl", p, tmp_path/n, name="x") for n in "ab"); assert EpisodeStore(a).digest == EpisodeStore(b).digest

def test_limit_name_overwrite_and_act_limit(tmp_path):
    (tmp_path/"src").mkdir(); eps = [e.replace(act=3*e.act) for e in world()]; p = put_robomimic(tmp_path/"src", eps)
    with pytest.raises(DatasetError, match=r"set.hdf5, episode demo_0: act is out of range"): import_dataset("robomimic", p, tmp_path/"a")
    s = EpisodeStore(import_dataset("robomimic", p, tmp_path/"a", act_limit=None, episodes=2, name="lab/lift")); assert len(s) == 2 and s.spec.name == s.name == "lab/lift" and s.meta["act_limit"] is None
    with pytest.raises(DatasetError, match="already exists"): import_dataset("robomimic", p, tmp_path/"a", act_limit=None)
    assert len(EpisodeStore(import_dataset("robomimic", p, tmp_path/"a", act_limit=None, overwrite=True))) == 3


# ---- round trips
def stores(tmp_path):
    eps = world(lengths=(5, 1, 7, 2), frames=16); keep = dict(zip("abcdef", (eps, [e.replace(reward=None) for e in eps], [e.replace(success=None, frames=None) for e in eps], [e.replace(obs=None) for e in eps],
        [e.replace(z=np.random.default_rng(0).normal(size=(len(e), 3)).astype(np.float32), meta={"seed": 3, "note": {"a": [1, "é"]}}) for e in eps], [e.replace(frames=None, act=50*e.act, reward=e.reward*np.float32(1e-7)) for e in eps])))
    for n, x in keep.items(): yield n, EpisodeStore(write_store(tmp_path/n, x, {"name": f"lab/{n}", "license": "ours", **({"spec": Spec(f"lab/{n}", 6, 2, max_steps=33, control_dt_s=1/30, return_range=(-1., 2.), history=((3, 0),))} if n in "ae" else {})}, act_limit=None if n == "f" else 1.0+1e-4))

def test_minari_round_trip_is_exact(tmp_path):
    for n, s in stores(tmp_path):
        back = EpisodeStore(import_dataset("minari", export_dataset("minari", s, tmp_path/f"{n}-v0"), tmp_path/f"{n}_back"))
        assert back.digest == s.digest and back.spec == s.spec and back.notes == s.notes and back.name == s.name and back.meta["license"] == "ours" and back.meta["act_limit"] == s.meta["act_limit"]

def test_lerobot_round_trip_states_exact_video_within_tolerance(tmp_path):
    for n, s in stores(tmp_path):
        exact = dict(crf=0, pixels="yuv444p")
        for label, options in (("default", {}), ("fine", exact)):
            back = EpisodeStore(import_dataset("lerobot", export_dataset("lerobot", s, tmp_path/f"{n}_{label}", **options), tmp_path/f"{n}_{label}_back"))
            for f in ("obs", "act", "reward", "success", "z"): assert (a := getattr(back, f)) is (b := getattr(s, f)) is None or np.array_equal(a, b), f
            assert back.spec == s.spec and back.notes == s.notes and back.name == s.name
            if s.frames is not None and label == "fine": assert np.abs(back.frames.astype(int)-s.frames).max() <= 6   # noise, the worst picture there is
    smooth = np.broadcast_to((np.arange(64)*3).astype(np.uint8)[None, None, :, None], (6, 48, 64, 3))
    s = EpisodeStore(write_store(tmp_path/"smooth", [fake_episode(5).replace(frames=smooth)]))
    back = EpisodeStore(import_dataset("lerobot", export_dataset("lerobot", s, tmp_path/"smooth3"), tmp_path/"smooth_back")); assert np.abs(back.frames.astype(int)-s.frames).mean() < 1.5

def test_lerobot_keeps_cameras_apart(tmp_path): # the recorder's frames hold them side by side, of any width
    wide = lambda T, seed: np.random.default_rng(seed).integers(0, 256, (T+1, 24, 40, 3), dtype=np.uint8)
    s = EpisodeStore(write_store(tmp_path/"two", [fake_episode(T, seed=T).replace(frames=wide(T, T)) for T in (5, 9)], {"name": "two", "views": {"external": 24, "shoulder": 16}}))
    export_dataset("lerobot", s, tmp_path/"v3", crf=0, pixels="yuv444p"); feats = json.loads((tmp_path/"v3/meta/info.json").read_text())["features"]
    assert {k: v["shape"] for k, v in feats.items() if v["dtype"] == "video"} == {"observation.images.external": [24, 24, 3], "observation.images.shoulder": [24, 16, 3]}
    assert sorted(p.parts[-3] for p in (tmp_path/"v3").rglob("*.mp4")) == ["observation.images.external", "observation.images.shoulder"]
    back = EpisodeStore(import_dataset("lerobot", tmp_path/"v3", tmp_path/"back")); assert back.meta["views"] == s.meta["views"] and np.abs(back.frames.astype(int)-s.frames).max() <= 6
    one = EpisodeStore(import_dataset("lerobot", tmp_path/"v3", tmp_path/"one", camera="observation.images.shoulder")); assert np.abs(one.frames.astype(int)-s.frames[:, :, 24:]).max() <= 6
    (tmp_path/"v3/meta/clam.json").unlink()                                      # as another program's
    both = EpisodeStore(import_dataset("lerobot", tmp_path/"v3", tmp_path/"both", camera="observation.images.shoulder,observation.images.external")); assert np.abs(both.frames.astype(int)-np.concatenate([s.frames[:, :, 24:], s.frames[:, :, :24]], 2)).max() <= 6
    assert EpisodeStore(import_dataset("lerobot", tmp_path/"v3", tmp_path/"first")).spec.frame_shape == (24, 24, 3)

def test_the_codec_that_lerobot_records_with(tmp_path): # AV1, two pictures between keyframes; decoded from anywhere in the film
    import av; from fractions import Fraction; from clam.data.lerobot import decode_video
    film = np.stack([np.full((64, 96, 3), 12*t, np.uint8) for t in range(20)])
    with av.open(str(tmp_path/"f.mp4"), "w") as c:
        s = c.add_stream("libsvtav1", rate=10); s.height, s.width, s.pix_fmt, s.options = 64, 96, "yuv420p", {"crf": "30", "g": "2"}
        for t, f in enumerate(film): p = av.VideoFrame.from_ndarray(f, format="rgb24"); p.pts, p.time_base = t, Fraction(1, 10); c.mux(s.encode(p))
        c.mux(s.encode(None))
    for start, n in ((0, 20), (7, 6), (19, 1)): assert np.abs(decode_video(tmp_path/"f.mp4", n, 10, start/10).astype(int)-film[start:start+n]).max() <= 6

def test_lerobot_cuts_files_between_episodes(tmp_path):
    eps = world(lengths=[6]*5, frames=16); s = EpisodeStore(write_store(tmp_path/"s", eps, {"name": "s"}))
    export_dataset("lerobot", s, tmp_path/"v3", most=1)                                          # a data file for each episode
    assert len(list((tmp_path/"v3/data").rglob("*.parquet"))) == 5
    back = EpisodeStore(import_dataset("lerobot", tmp_path/"v3", tmp_path/"b", camera="none")); assert np.array_equal(back.obs, s.obs) and back.frames is None
    small = EpisodeStore(import_dataset("lerobot", tmp_path/"v3", tmp_path/"c", size=8)); assert small.spec.frame_shape == (8, 8, 3)

def test_a_view_is_exported_as_what_it_is(tmp_path):
    s = EpisodeStore(write_store(tmp_path/"s", world(), {"name": "s"}))
    back = EpisodeStore(import_dataset("lerobot", export_dataset("lerobot", s.take([2, 0]).without_actions(), tmp_path/"v"), tmp_path/"b"))
    assert back.act is None and list(back.lengths) == [6, 9] and np.array_equal(back[0].obs, s[2].obs)
    with pytest.raises(DatasetError, match="needs actions"): export_dataset("minari", s.without_actions(), tmp_path/"m")
    assert not (tmp_path/"m").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["b", "s", "v"]

def test_minari_by_dataset_id(tmp_path, monkeypatch):
    import minari
    (tmp_path/"root").mkdir(); eps = world(); put_minari(tmp_path/"root", eps); monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path/"root")); monkeypatch.chdir(tmp_path)
    s = EpisodeStore(import_dataset("minari", "lab/set-v0", tmp_path/"out")); assert s.name == "lab/set-v0" and s.meta["source"] == "Minari: lab/set-v0" and all(np.array_equal(a.obs, b.obs) and np.array_equal(a.act, b.act) for a, b in zip(s, eps, strict=True))
    def absent(*a, **kw): raise ValueError("no such dataset on the server")
    monkeypatch.setattr(minari, "load_dataset", absent)                                           # and nothing is asked of the network here
    with pytest.raises(DatasetError, match="lab/other-v0.*no such dataset"): import_dataset("minari", "lab/other-v0", tmp_path/"no")
    for bad in ("lab/set", "../set-v0/..", ""):
        with pytest.raises(DatasetError, match="not a Minari dataset"): import_dataset("minari", bad, tmp_path/"no")
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(DatasetError, match="pip install minari"): import_dataset("minari", "lab/set-v0", tmp_path/"no")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "root"]

@pytest.mark.parametrize("name", FORMATS)
def test_source_and_licence_are_known(name, tmp_path):
    (tmp_path/"src").mkdir(); p = PUT[name](tmp_path/"src", source(name)); s = EpisodeStore(bring(name, p, tmp_path/"a")); assert s.meta["source"].endswith(f": {p.name}") and s.meta["licence"] == "not stated"
    t = EpisodeStore(bring(name, p, tmp_path/"b", source="doi:10.1/x", licence="CC-BY-4.0")); assert (t.meta["source"], t.meta["licence"]) == ("doi:10.1/x", "CC-BY-4.0") and t.digest == s.digest

def test_minari_opens_what_we_write(tmp_path, monkeypatch):
    import minari
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path)); eps = world(); s = EpisodeStore(write_store(tmp_path/"s", eps, {"name": "lab/reach"})); export_dataset("minari", s, tmp_path/"lab/reach-v0")
    d = minari.load_dataset("lab/reach-v0"); assert len(d) == 3 and d.total_steps == sum(LENGTHS) and "lab/reach-v0" in minari.list_local_datasets()
    for a, b in zip(d, eps): assert np.array_equal(a.observations["state"], b.obs) and np.array_equal(a.observations["pixels"], b.frames) and np.array_equal(a.actions, b.act) and d.action_space.contains(a.actions[0])


# ---- packages, code, interruption
@pytest.mark.parametrize("name, package", [("d4rl", "h5py"), ("minari", "h5py"), ("lerobot2", "pyarrow"), ("lerobot3", "av")])
def test_an_absent_package_is_named(name, package, tmp_path, monkeypatch):
    (tmp_path/"src").mkdir(); p = PUT[name](tmp_path/"src", world())
    for m in [m for m in sys.modules if m == package or m.startswith(package+".")]: monkeypatch.delitem(sys.modules, m)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DatasetError, match=f"pip install {package}.*clam-workbench\\[formats\\]"): bring(name, p, tmp_path/"out")
    assert not (tmp_path/"out").exists()

def test_importing_stays_light():
    code = "import sys, clam.data.formats as f\nfor n in f.format_names(): f.find_format(n)\nprint([m for m in ('h5py', 'pyarrow', 'av', 'minari', 'torch', 'tensordict', 'gymnasium', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"

class Attack:
    def __init__(self, flag): self.flag = str(flag)
    def __reduce__(self): return os.mkdir, (self.flag,)

def attacks(flag): # pickles that would make a folder, by every road
    yield pickle.dumps(Attack(flag)); yield pickle.dumps({"state": [Attack(flag)]}, 2)
    for module, name, args in (("builtins", "eval", f"__import__('os').mkdir({str(flag)!r})"), ("builtins", "getattr", "x"), ("numpy", "load", "x"), ("os", "system", "true"), ("numpy.core.multiarray", "fromfile", "x")):
        yield f"c{module}\n{name}\n(V{args}\ntR.".encode()
    yield b"cnumpy.core.multiarray\n_reconstruct\n(cbuiltins\nexec\n(I0\ntVb\ntR."
    yield b"cnumpy\nndarray\n((I5\ntVO\ntR."                                                     # an array of wild pointers
    yield b"\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n(X\x02\x00\x00\x00O8K\x00K\x01tRX\x08\x00\x00\x00AAAAAAAA\x86R."

def test_no_pickle_runs_anything(tmp_path):
    flag = tmp_path/"ran"; bad = list(attacks(flag)); assert len(bad) >= 9
    for data in bad:
        with pytest.raises(DatasetError, match="pickle is"): safe_unpickle(data, "file.pkl")
    assert not flag.exists()
    pickle.loads(bad[0]); assert flag.exists()                                                   # the attack is real

def test_a_playlist_dressed_as_a_film_opens_nothing(tmp_path):
    (tmp_path/"src").mkdir(); p = put_lerobot3(tmp_path/"src", world()); film = next(p.rglob("*.mp4"))
    film.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n")
    with pytest.raises(DatasetError, match="cannot be read"): bring("lerobot3", p, tmp_path/"out")

def test_interruption_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path/"src").mkdir(); p = put_d4rl(tmp_path/"src", world()); import clam.data.hdf5 as h; real, seen = h.aligned, []
    def stop(*a, **kw):
        seen.append(1)
        if len(seen) == 3: raise KeyboardInterrupt
        return real(*a, **kw)
    monkeypatch.setattr(h, "aligned", stop)
    with pytest.raises(KeyboardInterrupt): import_dataset("d4rl", p, tmp_path/"out")
    assert [x.name for x in tmp_path.iterdir()] == ["src"]
    with pytest.raises(RuntimeError):
        with fresh_folder(tmp_path/"x") as t: (t/"half").write_text("1"); raise RuntimeError
    assert [x.name for x in tmp_path.iterdir()] == ["src"]

def test_command_line(tmp_path, capsys):
    from clam.cli.shell import main
    (tmp_path/"src").mkdir(); p = put_d4rl(tmp_path/"src", world())
    assert main(["data", "import", "d4rl", str(p), "--out", str(tmp_path/"in"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1]); assert said["episodes"] == 3 and said["transitions"] == sum(LENGTHS) and said["path"] == str(tmp_path/"in") and 0 <= said["success_rate"] <= 1
    assert main(["data", "export", "minari", str(tmp_path/"in"), "--out", str(tmp_path/"set-v0"), "--json"]) == 0 and json.loads(capsys.readouterr().out.splitlines()[-1])["episodes"] == 3
    assert main(["data", "import", "minari", str(tmp_path/"set-v0"), "--out", str(tmp_path/"back"), "--episodes", "2", "--option", "camera=none", "--json"]) == 0 and json.loads(capsys.readouterr().out.splitlines()[-1])["episodes"] == 2
    for argv, word in ((["data", "import", "d4rl", str(tmp_path/"nowhere")], "file is missing"), (["data", "import", "rlds", "x"], "unknown format"), (["data", "import", "d4rl", str(p), "--option", "size"], "key=value"), (["data", "export", "d4rl", str(tmp_path/"in"), "--out", "x"], "only be imported")):
        assert main(argv) == 2 and word in (e := capsys.readouterr().err) and len(e.splitlines()) == 1, e


# ---- fuzz: (name, what it does to the folder, "error" | "ok" | "either")
def byte_cases(files, rng, required=True): # damage to bytes, of any file
    def cut(f, share): return lambda r: (r/f).write_bytes((r/f).read_bytes()[:int(share*(r/f).stat().st_size)])
    def flip(f, seed):
        def do(r):
            b, g = bytearray((r/f).read_bytes()), np.random.default_rng(seed)
            for i in g.integers(0, len(b), 1+seed % 8): b[i] ^= int(g.integers(1, 256))
            (r/f).write_bytes(bytes(b))
        return do
    for f in files:
        for share in (0., .03, .4, .9): yield f"{f} cut at {share}", cut(f, share), "error" if share < .5 else "either"
        yield f"{f} gone", lambda r, f=f: (r/f).unlink(), "error"
        yield f"{f} is text", lambda r, f=f: (r/f).write_text("not this\n"*9), "error"
        for s in rng.integers(0, 10**6, 4): yield f"{f} flipped {s}", flip(f, int(s)), "either"

def spoil(a, how): # an array with a fault
    a = np.array(a); g = np.random.default_rng(0); i = tuple(int(g.integers(1, n-1)) if k == 0 and n > 2 else int(g.integers(0, n)) for k, n in enumerate(a.shape))
    if how in ("nan", "inf", "huge"): a = a.astype(float); a[i] = {"nan": np.nan, "inf": np.inf, "huge": 1e30}[how]
    return {"text": lambda: np.full(a.shape, b"x", "S1"), "double": lambda: a.astype(float), "shorter": lambda: a[:-1], "longer": lambda: np.concatenate([a, a[-1:]]), "axis": lambda: a[None, None], "empty": lambda: a[:0], "scalar": lambda: np.float32(1)}.get(how, lambda: a)()

ERRORS = ("text", "nan", "inf", "huge", "shorter", "longer", "axis", "empty", "scalar")
def h5_cases(file, keys, optional=()): # damage to the fields of an HDF5 file; keys: {field: faults that do no harm}
    import h5py
    def change(key, how):
        def do(r):
            with h5py.File(r/file, "a") as f:
                a = f[key][()]; attrs = dict(f[key].attrs); del f[key]
                if how == "gone": return
                if how == "group": f.create_group(key); return
                if how == "elsewhere": f[key] = h5py.ExternalLink("/etc/hostname", "/x"); return
                f[key] = spoil(a, how); f[key].attrs.update(attrs)
        return do
    for k, harmless in keys.items():
        for how in (*ERRORS, "gone", "group", "elsewhere", "double"):
            yield f"{k} {how}", change(k, how), "ok" if how == "double" or (how == "gone" and k in optional) or how in harmless.split() else "error"

def d4rl_cases(rng):
    yield from byte_cases(["set.hdf5"], rng)
    yield from h5_cases("set.hdf5", {"observations": "", "actions": "", "rewards": "huge", "next_observations": "", "terminals": "", "timeouts": ""}, ("next_observations",))                  # without timeouts the episodes run together, and next_observations tells
def laom_cases(rng):
    import h5py
    yield from byte_cases(["set.hdf5"], rng); yield from h5_cases("set.hdf5", {"1/states": "", "1/actions": ""})
    def rename(r):
        with h5py.File(r/"set.hdf5", "a") as f: f.move("2", "10"); f.move("1", "9")
    yield "keys 0, 10, 9", rename, "ok"
    def pictures(r):
        with h5py.File(r/"set.hdf5", "a") as f: a = f["0/obs"][()]; del f["0/obs"]; f["0/obs"] = a.astype(np.float32)/255
    yield "float pictures", pictures, "error"
def robomimic_cases(rng):
    import h5py
    yield from byte_cases(["set.hdf5"], rng); yield from h5_cases("set.hdf5", {"data/demo_1/obs/a_pos": "", "data/demo_1/actions": "", "data/demo_2/next_obs/b_object": "nan inf huge", "data/demo_0/rewards": "huge"})
    def env(r):
        with h5py.File(r/"set.hdf5", "a") as f: f["data"].attrs["env_args"] = "{not json"
    yield "env_args", env, "error"
    def demo(r):
        with h5py.File(r/"set.hdf5", "a") as f: f.create_group("data/demo_10")
    yield "an empty demonstration", demo, "error"
def tdmpc2_cases(rng):
    import torch
    f = "buffer_mw-assembly.pt"; yield from byte_cases([f], rng)
    def change(key, how):
        def do(r):
            d = dict(torch.load(r/f, weights_only=False).items()); a = d.pop(key).numpy()
            if how == "object": d[key] = Attack(r.parent/"ran")
            elif how != "gone": d[key] = torch.tensor(spoil(a, how)) if how != "text" else ["x"]*len(a)
            torch.save(d, r/f)
        return do
    for key in ("obs", "action", "reward", "episode"):
        for how in (*ERRORS, "gone", "object", "double"):
            if (key, how) != ("obs", "gone"): yield f"{key} {how}", change(key, how), "ok" if how == "double" or (key, how) == ("reward", "huge") else "either" if key == "episode" and how in ("gone", "huge", "inf", "nan") else "error"
def calvin_cases(rng):
    npz, lang = "training/episode_0000009.npz", "training/lang_annotations/auto_lang_ann.npy"; yield from byte_cases([npz, lang], rng)
    def frame(key, how):
        def do(r):
            d = dict(np.load(r/npz)); a = d.pop(key)
            if how == "pickle": d[key] = np.array(Attack(r.parent/"ran"), dtype=object)
            elif how != "gone": d[key] = spoil(a, how)
            np.savez(r/npz, **d)
        return do
    for key in ("robot_obs", "rel_actions"):
        for how in (*ERRORS, "gone", "pickle", "double"): yield f"{key} {how}", frame(key, how), "ok" if how == "double" else "error"
    def notes(change):
        def do(r):
            d = {"language": {"ann": ["a"]*3, "task": ["t"]*3}, "info": {"indx": [(7, 16), (17, 21), (22, 28)]}}; change(d, r); np.save(r/lang, np.array(d, dtype=object), allow_pickle=True)
        return do
    for n, c, want in (("indx reversed", lambda d, r: d["info"].update(indx=[(16, 7)]*3), "error"), ("indx outside", lambda d, r: d["info"].update(indx=[(7, 999)]*3), "error"), ("empty segment", lambda d, r: d["info"].update(indx=[(7, 7)]*3), "error"), ("tasks too few", lambda d, r: d["language"].update(task=["t"]), "error"),
                       ("no language", lambda d, r: d.pop("language"), "error"), ("attack", lambda d, r: d.update(x=Attack(r.parent/"ran")), "error"), ("indx text", lambda d, r: d["info"].update(indx="abc"), "error"), ("no segments", lambda d, r: d.update(language={"ann": [], "task": []}, info={"indx": []}), "error"), ("sound", lambda d, r: None, "ok")): yield n, notes(c), want
def bridge_cases(rng):
    d = "2022-01-05_10-00-00/raw/traj_group0/traj1/"; yield from byte_cases([d+"policy_out.pkl", d+"images0/im_2.jpg"], rng); yield from [c for c in byte_cases([d+"obs_dict.pkl"], rng) if "gone" not in c[0]]
    def change(name, f): return lambda r: (r/d/name).write_bytes(pickle.dumps(f(pickle.loads((r/d/name).read_bytes()))))
    for how in (*ERRORS, "double"): yield f"state {how}", change("obs_dict.pkl", lambda o, how=how: o | {"state": spoil(o["state"], how)}), "ok" if how == "double" else "error"
    for how in ("text", "nan", "inf", "axis", "empty", "scalar"): yield f"action {how}", change("policy_out.pkl", lambda o, how=how: [o[0], {"actions": spoil(o[1]["actions"][None], how)[0] if how not in ("empty", "scalar") else spoil(o[1]["actions"], how)}, *o[2:]]), "error"
    for n, f, want in (("no actions", lambda o: [{}]*len(o), "error"), ("one too few", lambda o: o[1:], "error"), ("as many as rows", lambda o: o+o[-1:], "either"), ("none", lambda o: [], "error"), ("a dict", lambda o: {"a": 1}, "error"), ("number", lambda o: 3, "error")): yield f"policy_out {n}", change("policy_out.pkl", f), want
    for i, _ in enumerate(attacks("x")):
        for name in ("obs_dict.pkl", "policy_out.pkl"): yield f"attack {i} in {name}", lambda r, i=i, name=name: (r/d/name).write_bytes(list(attacks(r.parent/"ran"))[i]), "error"
def minari_cases(rng):
    m = "data/metadata.json"; yield from byte_cases(["data/main_data.hdf5", m], rng)
    yield from h5_cases("data/main_data.hdf5", {"episode_1/observations/state": "", "episode_1/actions": "", "episode_2/rewards": "huge"})
    def change(**kw): return lambda r: (r/m).write_text(json.dumps(json.loads((r/m).read_text()) | kw))
    for n, kw, want in (("storage", {"data_format": "zarr"}, "error"), ("as arrow", {"data_format": "arrow"}, "error"), ("more episodes", {"total_episodes": 9}, "error"), ("fewer", {"total_episodes": 2}, "error"), ("count is text", {"total_episodes": "x"}, "error"), ("space is text", {"observation_space": "{"}, "error"), ("discrete", {"action_space": '{"type": "Discrete", "n": 3}'}, "error"),
                       ("no space", {"observation_space": None}, "error"), ("other space", {"observation_space": '{"type": "Box", "shape": [6], "dtype": "float32", "low": [0], "high": [1]}'}, "error")): yield n, change(**kw), want
def lerobot2_cases(rng):
    import pyarrow as pa, pyarrow.parquet as pq
    f = "data/chunk-000/episode_000001.parquet"; yield from byte_cases([f, "meta/info.json", "meta/episodes.jsonl"], rng)
    def column(name, how):
        def do(r):
            t = pq.read_table(r/f); d = {c: t[c].to_pylist() for c in t.column_names}; a = np.array(d.pop(name))
            if how == "null": d[name] = [None, *list(a[1:])]
            elif how == "ragged": d[name] = [list(a[0])[:-1], *map(list, a[1:])]
            elif how not in ("gone",): a = spoil(a, how); d[name] = a.astype(str).tolist() if how == "text" else list(a) if a.ndim > 1 else a
            pq.write_table(pa.table(d), r/f)
        return do
    for name in ("observation.state", "action", "next.reward", "frame_index"):
        for how in ("text", "nan", "inf", "huge", "gone", "null", "double", *(("ragged",) if name in ("observation.state", "action") else ())):
            want = "ok" if how == "double" or (how == "huge" and name in ("action", "next.reward")) else "error"
            yield f"{name} {how}", column(name, how), want
    def rows(change): return lambda r: pq.write_table(change(pq.read_table(r/f)), r/f)
    for n, c in (("rows fewer", lambda t: t.slice(0, 2)), ("rows none", lambda t: t.slice(0, 0)), ("rows reversed", lambda t: t.take(list(range(len(t)))[::-1])), ("rows twice", lambda t: pa.concat_tables([t, t]))): yield n, rows(c), "error"
    def info(**kw): return lambda r: (r/"meta/info.json").write_text(json.dumps(json.loads((r/"meta/info.json").read_text()) | kw))
    for n, kw in (("version 1", {"codebase_version": "v1.0"}), ("version number", {"codebase_version": 3}), ("fps 0", {"fps": 0}), ("fps text", {"fps": "x"}), ("path up", {"data_path": "../../{episode_index}"}), ("path absolute", {"data_path": "/etc/hostname"}), ("path field", {"data_path": "{nobody}"}), ("no features", {"features": {}}), ("features list", {"features": [1]}), ("chunks 0", {"chunks_size": 0})): yield n, info(**kw), "error"
    def line(l): return lambda r: (r/"meta/episodes.jsonl").write_text(l)
    for n, l in (("empty", ""), ("a list", "[1]\n"), ("no length", '{"episode_index": 0}\n'), ("twice", '{"episode_index": 0, "tasks": [], "length": 8}\n'*2)): yield f"episodes {n}", line(l), "error"
def lerobot3_cases(rng):
    import pyarrow as pa, pyarrow.parquet as pq
    ep, film = "meta/episodes/chunk-000/file-000.parquet", "videos/observation.images.main/chunk-000/file-000.mp4"; yield from byte_cases(["data/chunk-000/file-000.parquet", ep, film, "meta/info.json"], rng)
    def change(name, f): return lambda r: pq.write_table(pa.Table.from_pylist([{**row, name: f(row[name])} for row in pq.read_table(r/ep).to_pylist()]), r/ep)
    v = "videos/observation.images.main/"
    for n, key, f, want in (("length more", "length", lambda x: x+1, "error"), ("length text", "length", lambda x: "x", "error"), ("another file", "data/file_index", lambda x: 5, "error"), ("film elsewhere", v+"file_index", lambda x: 3, "error"), ("film half a second later", v+"from_timestamp", lambda x: x+.05, "error"), ("film long after", v+"from_timestamp", lambda x: x+99., "error"),
                            ("film at nan", v+"from_timestamp", lambda x: float("nan"), "error"), ("numbers shifted", "episode_index", lambda x: x+1, "error"), ("tasks none", "tasks", lambda x: None, "ok"), ("same", "length", lambda x: x, "ok")): yield n, change(key, f), want
    def card(text): return lambda r: (r/"meta/clam.json").write_text(text)
    for n, t in (("text", "x"), ("list", "[]"), ("empty", "{}"), ("short", '{"meta": {}, "spec": {}, "episodes": [], "name": "x", "act_limit": null, "fields": []}')): yield f"card {n}", card(t), "error"

CASES = {k[:-6]: v for k, v in list(globals().items()) if k.endswith("_cases") and k not in ("byte_cases", "h5_cases")}

def fuzz(name: str, folder: Path): # in the child: one line for each case
    (folder/"base").mkdir(parents=True); path = PUT[name](folder/"base", source(name)).relative_to(folder/"base")
    inner = path if (folder/"base"/path).is_dir() else Path(".")                                # the cases name files below the dataset's folder
    for i, (label, damage, want) in enumerate(CASES[name](np.random.default_rng(0))):
        work = folder/f"case{i}"; shutil.copytree(folder/"base", work/"src"); print(json.dumps({"start": label}), flush=True)
        with warnings.catch_warnings(): warnings.simplefilter("ignore"); damage(work/"src"/inner)
        try:
            s = EpisodeStore(bring(name, work/"src"/path, work/"out")); got, said = "ok", check_store(s.path)
            if said: got = "unsound"
            elif want == "ok" and max(off(e, 4. if name == "bridge" else 1.) for e in s if e.obs is not None and np.abs(e.act).max() <= 4.001) > 1e-3: got = "misaligned"
        except DatasetError as e: got, said = "error", str(e)
        except BaseException as e: got, said = f"fault {type(e).__name__}", str(e)
        left = sorted(p.name for p in work.iterdir() if p.name not in ("src", "out")) + ([] if got == "ok" or not (work/"out").exists() else ["out"])
        print(json.dumps({"label": label, "want": want, "got": got, "said": str(said)[:300], "left": left}), flush=True)
        shutil.rmtree(work)

COUNTS = {}
@pytest.mark.parametrize("name", FORMATS)
def test_fuzz(name, tmp_path):
    r = subprocess.run([sys.executable, __file__, name, str(tmp_path/"f")], cwd=ROOT, capture_output=True, text=True, timeout=500, env=os.environ | {"PYTHONPATH": str(ROOT), "HDF5_USE_FILE_LOCKING": "FALSE"})
    lines = [json.loads(l) for l in r.stdout.splitlines() if l.startswith("{")]; done = [l for l in lines if "got" in l]
    assert r.returncode == 0, f"crash (code {r.returncode}) in {lines[-1] if lines else 'the beginning'}\n{r.stderr[-2000:]}"
    wrong = [l for l in done if l["left"] or l["got"] not in ("ok", "error") or (l["want"] != "either" and l["got"] != l["want"])]
    assert not wrong, "\n".join(map(str, wrong))
    assert all(l["said"] and ("set" in l["said"] or "/" in l["said"]) for l in done if l["got"] == "error")       # names a file
    COUNTS[name] = len(done); assert len(done) >= 15
    if len(COUNTS) == len(FORMATS): assert sum(COUNTS.values()) >= 300, COUNTS

if __name__ == "__main__": fuzz(sys.argv[1], Path(sys.argv[2]))
