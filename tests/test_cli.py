"""Pins the command line: help, --json on the last line, exit codes, one-line errors that say what to do, and that a refused command
leaves the disk as it was. Most commands run in this process (`main`), a few as programs."""
import contextlib, hashlib, io, json, os, shutil, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from clam.cli.shell import main
from clam.core import locked

ROOT = Path(__file__).resolve().parent.parent
FAST = ["--preset", "tiny", "--stage1.updates", "60", "--split.n-expert", "8", "--split.n-labelled", "8"]

def tree(folder) -> str: # digest of every name and byte below `folder`
    h = hashlib.sha256()
    for p in sorted(Path(folder).rglob("*")):
        h.update(str(p.relative_to(folder)).encode())
        if p.is_file(): h.update(p.read_bytes())
    return h.hexdigest()

@pytest.fixture
def clam(capsys, monkeypatch): # run a command in this process: (exit code, last line of stdout as JSON or the text, stderr)
    def run(*argv, data):
        monkeypatch.setenv("CLAM_DATA", str(data)); capsys.readouterr()
        code = main([str(a) for a in argv]); said = capsys.readouterr()
        return code, json.loads(said.out.splitlines()[-1]) if "--json" in argv and said.out.strip() else said.out, said.err
    return run

def program(*argv, **env): # run a command as a program
    return subprocess.run([sys.executable, "-m", "clam", *map(str, argv)], cwd=ROOT, capture_output=True, text=True, env=os.environ | {k: str(v) for k, v in env.items()})

def refused(result, *words): # one line, exit code 2
    code, _, err = result
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    for w in words: assert w in err, f"{w!r} not in {err!r}"

# ---------------------------------------------------------------- help and parsing
COMMANDS = [["data", "list"], ["data", "info"], ["data", "check"], ["data", "card"], ["data", "make"], ["params"], ["demo"], ["train"], ["policy"], ["baseline"], ["eval"], ["health"], ["ladder"], ["table"], ["bench"], ["lab"], ["robot", "check"], ["robot", "demo"], ["robot", "bench"], ["robot", "serve-sim"]]

def test_help_is_fast_and_exits_with_0():
    done = program("--help")
    assert done.returncode == 0 and done.stderr == ""
    for c in {c[0] for c in COMMANDS}: assert c in done.stdout

@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop: main([*command, "--help"])
    text = capsys.readouterr().out
    assert not stop.value.code and "--json" in text and "--debug" in text

def test_every_flag_explains_itself(): # the comment of a dataclass field is its help text, so each must have one
    import importlib, inspect, pkgutil, clam.cli
    for module in map(importlib.import_module, ["clam.config", *(f"clam.cli.{m.name}" for m in pkgutil.iter_modules(clam.cli.__path__))]):
        for cls in vars(module).values():
            if not (inspect.isclass(cls) and cls.__module__ == module.__name__ and hasattr(cls, "__dataclass_fields__")): continue
            assert cls.__doc__ and not cls.__doc__.startswith(cls.__name__+"("), cls
            for line in inspect.getsource(cls).splitlines():
                if ": " in line and line.startswith("    ") and line[4].islower() and "(" not in line.split(":")[0] and line.split(":")[0].strip().isidentifier():
                    name = line.split(":")[0].strip()
                    if name in cls.__dataclass_fields__ and "Config" not in line: assert "#" in line, f"{cls.__name__}.{name} has no comment"

def test_model_and_preset_choices_exist(): # the registry also holds models of images, which `train` does not offer yet
    from typing import get_args
    from clam.cli.command import Model, Preset
    from clam.config import PRESETS
    from clam.models.lam import REGISTRY
    assert set(get_args(Model)) <= set(REGISTRY) and get_args(Preset) == PRESETS

def test_as_a_program(tmp_path):
    assert program("data", "list", "--json", CLAM_DATA=tmp_path).returncode == 0
    done = program("data", "info", "nope", CLAM_DATA=tmp_path)
    refused((done.returncode, done.stdout, done.stderr), "unknown dataset", "clam data make nope")
    assert done.stdout == ""
    debug = program("data", "info", "nope", "--debug", CLAM_DATA=tmp_path)
    assert debug.returncode == 2 and "Traceback" in debug.stderr and debug.stderr.splitlines()[-1].startswith("error: ")

def test_a_fault_of_ours_is_one_line_and_1(clam, tmp_path, monkeypatch):
    import clam.data.store as store
    def broken(*a): raise ZeroDivisionError("oops")
    monkeypatch.setattr(store, "open_dataset", broken)
    code, _, err = clam("data", "info", "toy", data=tmp_path)
    assert code == 1 and err.count("\n") == 1 and "ZeroDivisionError: oops" in err and "--debug" in err

def test_a_full_disk_is_no_fault_of_ours(clam, tmp_path, monkeypatch):
    import clam.data.store as store
    def full(*a): raise OSError(28, "No space left on device", "obs.npy")
    monkeypatch.setattr(store, "open_dataset", full)
    refused(clam("data", "info", "toy", data=tmp_path), "obs.npy: No space left on device", "make room")

def test_an_interruption_is_130(clam, tmp_path, monkeypatch):
    import clam.data.store as store
    def interrupted(*a): raise KeyboardInterrupt
    monkeypatch.setattr(store, "open_dataset", interrupted)
    code, _, err = clam("data", "info", "toy", data=tmp_path)
    assert code == 130 and err == "interrupted; run the same command again to go on\n"

@pytest.mark.parametrize("argv, word", [([], "Expected one of"), (["trian"], "trian"), (["data", "make"], "recipe"), (["data", "make", "toy", "--episodes", "few"], "few"), (["train"], "--data"),
    (["train", "--data", "toy", "--preset", "fast"], "'quick'"), (["train", "--data", "toy", "--model", "cnn"], "'transformer'"), (["train", "--data", "toy", "--lam.latent-dim", "0"], "must be positive"),
    (["train", "--data", "toy", "--lam.d-model", "250"], "multiple of n_heads"), (["baseline", "gail", "--data", "toy"], "'lapa'"), (["params", "--speed", "3"], "--speed"), (["eval"], "--run")])
def test_words_that_cannot_be_read(clam, tmp_path, argv, word): refused(clam(*argv, data=tmp_path), word)

# ---------------------------------------------------------------- the small story
@pytest.fixture(scope="module")
def story(tmp_path_factory): # toy data and a run of every kind, made once through the command line
    data = tmp_path_factory.mktemp("data"); said = {}
    def run(name, *argv, how):
        code, out, err = how(*argv, "--json")
        assert code == 0 and err == "", err                        # nothing on stderr when all is well and nobody watches
        said[name] = json.loads(out.splitlines()[-1])
    def typed(*argv): done = program(*argv, CLAM_DATA=data, OMP_NUM_THREADS=1); return done.returncode, done.stdout, done.stderr
    def here(*argv):
        with pytest.MonkeyPatch.context() as mp, contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            mp.setenv("CLAM_DATA", str(data)); return main([str(a) for a in argv]), out.getvalue(), err.getvalue()
    run("make", "data", "make", "toy", "--episodes", 60, "--seed", 1, how=here)
    run("train", "train", "--data", "toy", "--run", "r1", *FAST, how=typed)
    shutil.copytree(data/"runs"/"r1", data/"runs"/"stage1-only")
    run("policy", "policy", "--run", "r1", how=here)
    run("eval", "eval", "--run", "r1", "--episodes", 4, "--workers", 1, how=typed)
    run("health", "health", "--run", "r1", "--limit", 500, how=here)
    return data, said

def test_the_small_story(story):
    data, said = story
    assert {"episodes", "transitions", "success_rate", "path"} <= said["make"].keys() and said["make"]["episodes"] == 60
    assert {"run", "updates", "updates_per_second", "recon_loss", "cheat_loss", "action_loss"} <= said["train"].keys() and said["train"]["updates"] == 60
    assert {"run", "latent_loss"} <= said["policy"].keys() and Path(said["policy"]["run"]) == data/"runs"/"r1"
    assert said["health"]["verdict"] in ("ready", "leaking", "collapsed", "not decodable") and "probe" in said["health"]["measures"]
    assert {"success", "success_ci95", "return_mean", "normalized_return", "episodes"} <= said["eval"].keys() and said["eval"]["episodes"] == 4
    lo, hi = said["eval"]["success_ci95"]; assert 0 <= lo <= said["eval"]["success"] <= hi <= 1
    assert all(np.isfinite(said["train"][k]) for k in ("recon_loss", "cheat_loss", "action_loss"))

@pytest.mark.parametrize("kind", ["bc-al", "bc-expert", "vpt", "lapo", "lapa", "dynamo"])
def test_baselines(clam, story, kind):
    data, _ = story
    code, said, err = clam("baseline", kind, "--data", "toy", "--preset", "tiny", "--bc.updates", 20, "--idm.updates", 20, *FAST[4:], "--run", kind, "--json", data=data)
    assert code == 0, err
    code, result, err = clam("eval", "--run", said["run"], "--episodes", 2, "--workers", 1, "--videos", 0, "--json", data=data)
    assert code == 0 and result["episodes"] == 2, err

def test_data_commands(clam, story):
    data, said = story
    code, listed, _ = clam("data", "list", "--json", data=data)
    assert code == 0 and [d["name"] for d in listed["datasets"]] == ["toy"] and listed["problems"] == [] and "toy" in listed["recipes"]
    code, info, _ = clam("data", "info", "toy", "--json", data=data)
    assert code == 0 and info["episodes"] == 60 and info["problems"] == []
    for name in ("toy", said["make"]["path"]):
        code, checked, _ = clam("data", "check", name, "--json", data=data)
        assert code == 0 and checked["problems"] == []

def test_same_seed_same_bytes(clam, story, tmp_path):
    data, said = story
    code, again, _ = clam("data", "make", "toy", "--episodes", 60, "--seed", 1, "--out", tmp_path/"again", "--json", data=data)
    assert code == 0
    for f in ("obs.npy", "act.npy", "episode_ends.npy"): assert (tmp_path/"again"/f).read_bytes() == (Path(said["make"]["path"])/f).read_bytes()

def test_params(clam, tmp_path):
    code, said, _ = clam("params", "--json", data=tmp_path)
    m = said["models"]
    assert code == 0 and m["transformer"]["paper"] == 8_874_551 and m["bc_policy"]["paper"] == 1_602_567 and {"mlp", "transformer_calvin", "latent_policy", "decoder"} <= m.keys()

# ---------------------------------------------------------------- bad input: one line, exit code 2, nothing harmed
@pytest.fixture
def unharmed(story): # the story's folder must be the same afterwards
    data, _ = story; before = tree(data)
    yield data
    assert tree(data) == before

def copy_of(data, tmp_path): # a writable copy of the toy dataset under another CLAM_DATA
    shutil.copytree(data/"episodes"/"toy", tmp_path/"episodes"/"toy"); return tmp_path

def test_unknown_dataset(clam, unharmed):
    refused(clam("train", "--data", "no-such", data=unharmed), "unknown dataset", "toy", "clam data make no-such")
    refused(clam("data", "check", "no-such", data=unharmed), "unknown dataset")

def test_wrong_task_name(clam, unharmed):
    refused(clam("data", "make", "metaworld/asembly", data=unharmed), "metaworld/assembly")
    refused(clam("data", "make", "toyy", data=unharmed), "toy")

def test_an_existing_dataset_is_not_overwritten(clam, unharmed): refused(clam("data", "make", "toy", "--episodes", 3, data=unharmed), "exists")
def test_no_episodes(clam, unharmed): refused(clam("data", "make", "toy", "--episodes", 0, "--out", unharmed/"episodes"/"none", data=unharmed), "at least 1")

def test_nan_in_an_action(clam, story, tmp_path):
    data = copy_of(story[0], tmp_path); f = data/"episodes"/"toy"/"act.npy"
    a = np.load(f); a[7, 1] = np.nan; np.save(f, a); before = tree(data)
    code, said, err = clam("data", "check", "toy", "--json", data=data)
    refused((code, said, err), "act.npy"); assert any("act.npy" in p for p in said["problems"]) and any("episode 0" in p and "step 7" in p for p in said["problems"])
    refused(clam("train", "--data", "toy", *FAST, data=data), "act.npy")
    assert tree(data) == before

def test_a_truncated_file(clam, story, tmp_path):
    data = copy_of(story[0], tmp_path); f = data/"episodes"/"toy"/"obs.npy"
    f.write_bytes(f.read_bytes()[:-100]); before = tree(data)
    for argv in (["data", "check", "toy"], ["data", "info", "toy"], ["train", "--data", "toy", *FAST], ["baseline", "bc-al", "--data", "toy"]): refused(clam(*argv, data=data), "obs.npy", "truncated")
    assert tree(data) == before

def test_no_labelled_trajectories(clam, unharmed):
    refused(clam("train", "--data", "toy", "--preset", "tiny", "--labels", 0, data=unharmed), "at least one labelled trajectory", "--labels")
    refused(clam("train", "--data", "toy", "--preset", "tiny", "--labels", 10_000, *FAST[4:6], data=unharmed), "label")

def test_an_unknown_run(clam, unharmed):
    for c in ("policy", "eval", "health"): refused(clam(c, "--run", "no-such", data=unharmed), "no-such")

def test_an_existing_run_is_not_overwritten(clam, unharmed): refused(clam("train", "--data", "toy", "--run", "r1", *FAST, data=unharmed), "r1", "--resume")

def test_a_checkpoint_of_another_model(clam, unharmed):
    refused(clam("train", "--data", "toy", "--run", "r1", "--resume", "--model", "transformer", *FAST, data=unharmed), "r1")

def test_weights_of_another_model(clam, story, tmp_path): # a file copied from another run
    data = copy_of(story[0], tmp_path); shutil.copytree(story[0]/"runs", data/"runs"); runs = data/"runs"
    shutil.copy(runs/"r1"/"decoder.safetensors", runs/"stage1-only"/"lam.safetensors")
    shutil.copy(runs/"r1"/"lam.safetensors", runs/"r1"/"policy.safetensors"); before = tree(data)
    refused(clam("policy", "--run", "stage1-only", data=data), "lam.safetensors")
    refused(clam("eval", "--run", "r1", "--episodes", 1, "--workers", 1, data=data), "policy.safetensors")
    assert tree(data) == before

def test_evaluation_before_stage_2(clam, unharmed): refused(clam("eval", "--run", "stage1-only", "--workers", 1, data=unharmed), "policy")

def test_a_run_directory_in_use(clam, story):
    data, _ = story
    with locked(data/"runs"/"r1"):
        before = tree(data)
        refused(clam("train", "--data", "toy", "--run", "r1", "--resume", *FAST, data=data), "in use")
        refused(clam("policy", "--run", "r1", data=data), "in use")
        assert tree(data) == before

def test_lab_writes_a_notebook_that_opens_the_run(clam, story):
    data, _ = story
    code, said, err = clam("lab", "r1", "--no-open", "--json", data=data); assert code == 0, err
    nb = json.loads(Path(said["notebook"]).read_text()); assert Path(said["notebook"]).parent == data/"runs"/"r1" and any("Workbench(" in "".join(c["source"]) for c in nb["cells"])
    refused(clam("lab", "no-such-run", "--no-open", data=data), "no run here"); assert not (data/"runs"/"no-such-run").exists()
