"""The first ten minutes of a stranger: mistakes typed into a real shell, a demo that is interrupted and killed and goes on from the last
finished stage, a machine that cannot draw and where nobody is root, and a line now and then where nobody watches a bar."""
import hashlib, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest
import clam.core as core
from clam.cli.shell import main
from clam.core import locked

ROOT = Path(__file__).resolve().parent.parent
FAST = ["--preset", "tiny", "--stage1.updates", "40", "--split.n-expert", "6", "--split.n-labelled", "6"]

def shell(*argv, **env): # as a person types it: a program of its own, nothing shared with this process
    done = subprocess.run([sys.executable, "-m", "clam", *map(str, argv)], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in env.items()}, timeout=300)
    return done.returncode, done.stdout, done.stderr

def tree(folder) -> dict: # every file below `folder` and what is in it; lock files are no data
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).rglob("*")) if p.is_file() and p.name != ".lock"}

@pytest.fixture(scope="module")
def made(tmp_path_factory): # a toy dataset and a run, and copies of both with one thing wrong each
    d = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as mp:
        mp.setenv("CLAM_DATA", str(d))
        for argv in (["data", "make", "toy", "--episodes", "40", "--seed", "1"], ["train", "--data", "toy", "--run", "sound", *FAST]): assert main(argv) == 0
    toy, runs = d/"episodes"/"toy", d/"runs"
    for n in ("nan", "short"): shutil.copytree(toy, d/"episodes"/n)
    a = np.load(d/"episodes"/"nan"/"act.npy"); a[5, 0] = np.nan; np.save(d/"episodes"/"nan"/"act.npy", a); core.write_manifest(d/"episodes"/"nan")      # as a tool would write it that knows no better
    f = d/"episodes"/"short"/"obs.npy"; f.write_bytes(f.read_bytes()[:-64])
    shutil.copytree(runs/"sound", runs/"other"); shutil.copy(runs/"sound"/"decoder.safetensors", runs/"other"/"lam.safetensors")
    return d

MISTAKES = {
    "unknown dataset": (["train", "--data", "no-such", *FAST], ["unknown dataset", "clam data make no-such"]),
    "wrong task name": (["demo", "--data", "metaworld/asembly", "--dir", "{d}/demo"], ["unknown recipe", "metaworld/assembly"]),
    "NaN in an action": (["train", "--data", "nan", *FAST], ["act.npy", "episode 0", "step 5", "not finite"]),
    "truncated file": (["baseline", "bc-al", "--data", "short", *FAST[:2]], ["obs.npy", "truncated"]),
    "checkpoint of another model": (["policy", "--run", "other"], ["lam.safetensors"]),
    "zero labelled trajectories": (["train", "--data", "toy", "--labels", "0", *FAST[:2]], ["labelled trajectory", "--labels 1"]),
    "run directory in use": (["policy", "--run", "sound"], ["in use", "--run"]),
}

@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do_and_harms_nothing(made, mistake):
    argv, words = MISTAKES[mistake]; busy = mistake == "run directory in use"; before = tree(made)
    with locked(made/"runs"/("sound" if busy else "nobody")): code, out, err = shell(*(a.format(d=made) if isinstance(a, str) else a for a in argv), CLAM_DATA=made)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in out+err, err
    for w in words: assert w in err, f"{w!r} not in {err!r}"
    assert tree(made) == before

# ---------------------------------------------------------------- the demo, interrupted
def start_demo(d, *more): # in a process group of its own, as a terminal starts it
    return subprocess.Popen([sys.executable, "-m", "clam", "demo", "--data", "toy", "--preset", "tiny", "--episodes", "60", "--dir", str(d), "--workers", "2", "--json", *more], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

def until(fn, what, seconds=600.):
    end = time.monotonic()+seconds
    while not (v := fn()):
        assert time.monotonic() < end, what
        time.sleep(.05)
    return v

def group(p) -> list[int]: # living processes of the demo's session
    out = []
    for f in Path("/proc").glob("[0-9]*/stat"):
        try: s = f.read_text().rpartition(")")[2].split()
        except OSError: continue
        if int(s[3]) == p.pid and s[0] != "Z": out.append(int(f.parent.name))
    return out

@pytest.mark.slow
def test_a_demo_goes_on_from_the_last_finished_stage(tmp_path):
    d = tmp_path/"demo"; data = d/"episodes"/"toy"; lam = d/"runs"/"clam"/"lam.safetensors"; p = start_demo(d)
    try:
        until(lambda: list((d/"runs").glob("*/metrics.jsonl")), "no training began"); os.killpg(p.pid, signal.SIGINT)          # Ctrl-C reaches all of them
        _, err = p.communicate(timeout=300); assert p.returncode == 130 and "go on" in err and "Traceback" not in err, err
        until(lambda: not group(p), "workers outlive a demo that was interrupted", 60); kept = tree(data); assert "manifest.json" in kept and not (d/"report.html").exists()
        p = start_demo(d); until(lambda: lam.exists() or p.poll() is not None, "Stage 1 does not end"); first = lam.stat().st_mtime_ns, lam.read_bytes()
        os.kill(p.pid, signal.SIGKILL); p.wait(30); until(lambda: not group(p), "workers outlive their parent", 120); p.stdout.close(); p.stderr.close()
        p = start_demo(d); out, err = p.communicate(timeout=600); assert p.returncode == 0, err
    finally:
        for k in group(p): os.kill(k, signal.SIGKILL)
    said = json.loads(out.splitlines()[-1]); assert set(said["success"]) == {"clam", "vpt", "bc-expert", "bc-al"} and "collecting" not in out and Path(said["report"]).is_file()
    assert tree(data) == kept and (lam.stat().st_mtime_ns, lam.read_bytes()) == first, "a finished stage was run again"
    code, _, err = shell("demo", "--data", "toy", "--preset", "tiny", "--episodes", 50, "--dir", d); assert code == 2 and "60 episodes" in err and "--dir" in err and err.count("\n") == 1 and tree(data) == kept

# ---------------------------------------------------------------- a machine that cannot draw
@pytest.mark.skipif(not (ROOT/".venv/bin/python").exists(), reason="no environment made by `make setup`")
def test_without_root_and_without_a_driver_the_one_command_is_printed(tmp_path):
    (tmp_path/"id").write_text("#!/bin/sh\necho 1000\n"); (tmp_path/"id").chmod(0o755)
    for n in ("apt-get", "sudo"): (tmp_path/n).write_text(f"#!/bin/sh\ntouch {tmp_path}/{n}-was-called\n"); (tmp_path/n).chmod(0o755)
    done = subprocess.run([ROOT/".ci/gl"], capture_output=True, text=True, timeout=120, env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CLAM_GL": "off"})
    assert done.returncode == 0 and done.stdout == "" and done.stderr.count("\n") == 1 and "there will be no videos" in done.stderr and "sudo apt-get install -y libegl1 libosmesa6" in done.stderr
    assert not list(tmp_path.glob("*-was-called")), "nobody asked for rights"

# ---------------------------------------------------------------- nobody watches
def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.delenv("CLAM_QUIET", raising=False); monkeypatch.delitem(sys.modules, "ipykernel", raising=False); assert core.LINE_S == 30
    def work():
        with core.progress(desc="demo", total=40) as bar:
            for k in range(40): time.sleep(.01); bar.update(); bar.set_postfix_str(f"step {k}"); bar.set_postfix({"loss": k})
        return capsys.readouterr().err
    assert work() == ""                                     # shorter than half a minute: silence
    monkeypatch.setattr(core, "LINE_S", .1); start = time.monotonic(); said = work(); most = (time.monotonic()-start)/.1; lines = said.splitlines()
    assert 2 <= len(lines) <= most and "\r" not in said and all(l.startswith("demo: ") and "/40, " in l and "gone" in l and ("loss=" in l or "step " in l) for l in lines), said
    monkeypatch.setenv("CLAM_QUIET", "1"); assert work() == ""

def test_an_orphaned_worker_ends(tmp_path):
    code = "import multiprocessing as mp, os, sys, time\nfrom concurrent.futures import ProcessPoolExecutor\nfrom clam.core import die_with_parent\nif __name__ == '__main__':\n    pool = ProcessPoolExecutor(1, mp_context=mp.get_context('spawn'), initializer=die_with_parent)\n    print(pool.submit(os.getpid).result(), flush=True); pool.submit(time.sleep, 300); time.sleep(300)\n"
    (tmp_path/"parent.py").write_text(code); p = subprocess.Popen([sys.executable, tmp_path/"parent.py"], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    worker = int(p.stdout.readline()); p.kill(); p.wait(); p.stdout.close()
    alive = lambda: Path(f"/proc/{worker}/stat").exists() and Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    try: until(lambda: not alive(), "the worker outlives its parent", 120)
    finally:
        if alive(): os.kill(worker, signal.SIGKILL)
