"""Pins compressed pictures: they read exactly like a plain array however they are indexed, from threads and other processes; a store goes
over to them by itself; every damaged byte is noticed; reading keeps no more in memory than it was asked for."""
import pickle, tracemalloc
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
import multiprocessing as mp
import numpy as np, pytest
import clam.data.store as store_module
from clam.core import DatasetError
from clam.data.store import GROUP, EpisodeStore, PackedFrames, check_store, describe, write_store
from clam.data.windows import window_index
from clam.testing import fake_episode
from clam.toy import draw

def films(lengths=(9, 1, 30, 4), size=16, seed=0): # smooth pictures with some noise, one film for each length
    rng = np.random.default_rng(seed)
    return [fake_episode(T, seed=T).replace(frames=np.stack([np.clip(draw(np.r_[np.cos(.3*t), np.sin(.2*t), 0, 0, .5, .5], size)+rng.integers(0, 3, (size, size, 3)), 0, 255).astype(np.uint8) for t in range(T+1)])) for T in lengths]

@pytest.fixture(scope="module")
def both(tmp_path_factory):
    d = tmp_path_factory.mktemp("films"); eps = films()
    return [EpisodeStore(write_store(d/n, eps, {"name": "films"}, pack=p)) for n, p in (("raw", False), ("packed", True))]

def test_every_index_reads_like_an_array(both):
    a, p = both[0].frames, both[1].frames; rng = np.random.default_rng(0); R = len(a)
    assert isinstance(p, PackedFrames) and p.shape == a.shape and p.dtype == a.dtype and p.ndim == 4 and p.nbytes == a.nbytes and len(p) == R
    for i in (0, -1, R-1, np.int64(7), [3], [], [5, 5, 2, R-1], rng.integers(0, R, (7, 3)), rng.random(R) > .5, slice(None), slice(3, 20), slice(None, None, -3), slice(40, 2), (3, slice(2, 5)), (slice(1, 9), 0, slice(None), 2), ([4, 1], slice(3)), (..., 0), ()):
        got = np.asarray(p[i]); assert got.dtype == np.uint8 and got.shape == a[i].shape and np.array_equal(got, a[i]), i
    for i in (R, -R-1, [R]):
        with pytest.raises(IndexError): p[i]
    part, want = p[5:40][::2][3:], a[5:40][::2][3:]
    assert isinstance(part, PackedFrames) and np.array_equal(part, want) and all(np.array_equal(x, y) for x, y in zip(part, want, strict=True))
    assert (p == a).all() and np.array_equal(p/2, a/2) and np.array_equal(np.maximum(p, 3), np.maximum(a, 3)) and p.mean() == a.mean() and np.array_equal(p.astype(int), a.astype(int)) and np.array_equal(np.concatenate([p[:3], a[3:5]]), a[:5])

def test_views_windows_and_processes(both):
    raw, packed = both
    for e, f in zip(packed, raw, strict=True): assert np.array_equal(e.frames, f.frames) and len(e) == len(f)
    v, w = packed.take([2, 0]).without_actions(), raw.take([2, 0]); rows = window_index(v.lengths).rows
    assert np.array_equal(v.frames[rows], w.frames[rows]) and np.array_equal(packed.frames[v.store_rows()][3], w.frames[3])
    assert np.array_equal(pickle.loads(pickle.dumps(packed[2].frames)), raw[2].frames) and np.array_equal(pickle.loads(pickle.dumps(v)).frames, w.frames)
    with ProcessPoolExecutor(1, mp_context=mp.get_context("spawn")) as pool: assert pool.submit(np.asarray, packed.frames[4:9]).result().tobytes() == raw.frames[4:9].tobytes()
    def read(seed): i = np.random.default_rng(seed).integers(0, len(raw.frames), 40); return np.array_equal(packed.frames[i], raw.frames[i])
    with ThreadPoolExecutor(4) as pool: assert all(pool.map(read, range(60)))
    assert isinstance(EpisodeStore(packed.path, resident=True).frames, np.ndarray) and describe(packed)["fields"] == describe(raw)["fields"] and check_store(packed.path) == []

def test_groups_never_cross_an_episode(both):
    o = both[1].frames.offsets; starts = set(both[1].obs_starts.tolist())
    assert starts <= set(o[:, 0].tolist()) and (np.diff(o[:, 0]) <= GROUP).all()

def test_a_store_goes_over_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "RAW_FRAMES", 25); eps = films((9, 9, 9, 4))                     # 10 + 10 + 10 > 25
    s = EpisodeStore(write_store(tmp_path/"a", iter(eps))); assert not (tmp_path/"a/frames.npy").exists() and isinstance(s.frames, PackedFrames)
    for e, f in zip(s, eps, strict=True): assert np.array_equal(e.frames, f.frames)
    direct = EpisodeStore(write_store(tmp_path/"b", eps, {"name": "a"}, pack=True)); assert direct.digest == s.digest      # the same bytes
    few = EpisodeStore(write_store(tmp_path/"c", eps[:2])); assert isinstance(few.frames, np.ndarray) and isinstance(EpisodeStore(write_store(tmp_path/"d", eps, pack=False)).frames, np.ndarray)
    eps[3].act[1, 0] = np.nan
    with pytest.raises(DatasetError, match="episode 3"): write_store(tmp_path/"e", eps)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c", "d"]

def test_every_damaged_byte_is_noticed(tmp_path):
    eps = films((9, 5)); want = np.concatenate([e.frames for e in eps]); path = write_store(tmp_path/"s", eps, pack=True); rng = np.random.default_rng(0); seen = 0
    for name in ("frames.zst", "offsets.npy"):
        good = (path/name).read_bytes()
        for i in rng.choice(len(good), min(len(good), 400), replace=False):
            bad = bytearray(good); bad[i] ^= int(rng.integers(1, 256)); (path/name).write_bytes(bad)
            assert check_store(path), (name, i)                                                         # the manifest's sum
            try: got = np.asarray(EpisodeStore(path).frames); assert np.array_equal(got, want), (name, i)                     # or an error, but never wrong pictures
            except DatasetError as e: seen += name in str(e) or "frames.zst" in str(e)
        (path/name).write_bytes(good)
    assert seen > 300
    for cut in (0, 10, 200):
        for name in ("frames.zst", "offsets.npy"):
            good = (path/name).read_bytes(); (path/name).write_bytes(good[:cut])
            with pytest.raises(DatasetError, match=name): EpisodeStore(path)
            with pytest.raises(DatasetError): PackedFrames(path, (16, 16, 3))
            (path/name).write_bytes(good)
    assert np.array_equal(EpisodeStore(path).frames, want)

def test_reading_keeps_only_what_was_asked_for(tmp_path):
    s = EpisodeStore(write_store(tmp_path/"s", films([60]*20, size=32), pack=True)); view = s.take(range(1, 20)).without_actions(); frames, rows = view.frames, window_index(view.lengths).rows
    rng = np.random.default_rng(0); batch = frames[rows[:8]]; size = batch.nbytes; tracemalloc.start(); base = tracemalloc.get_traced_memory()[0]
    for _ in range(40): frames[rows[rng.integers(0, len(rows), 8)]]
    peak = tracemalloc.get_traced_memory()[1]-base; tracemalloc.stop()
    assert frames.nbytes > 40*size and peak < 6*size, (peak, size)

def test_compressed_pictures_are_shown_and_exported(both, tmp_path):
    from clam.data.formats import export_dataset, import_dataset
    from clam.widgets.video import film_of, overlay
    raw, packed = both
    assert np.array_equal(overlay(packed[2].frames, packed[2].act), overlay(raw[2].frames, raw[2].act)) and np.array_equal(film_of(packed[0]).frames, film_of(raw[0]).frames)
    a, b = (EpisodeStore(import_dataset("minari", export_dataset("minari", s, tmp_path/f"{n}-v0"), tmp_path/n)) for n, s in (("raw", raw), ("packed", packed))); assert a.digest == b.digest == raw.digest
    c = EpisodeStore(import_dataset("lerobot", export_dataset("lerobot", packed, tmp_path/"v3", crf=0, pixels="yuv444p"), tmp_path/"c")); assert np.abs(c.frames.astype(int)-raw.frames).max() <= 4
    again = EpisodeStore(write_store(tmp_path/"again", packed, {"name": "films"}, pack=True)); assert again.digest == packed.digest
