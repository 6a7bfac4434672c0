"""The arm's panel on its state: keys that stop counting, silence that holds, Stop during a policy, recordings and scores, threads and
models given back; and `clam robot` from the command line. Lock-step clocks where they serve; waits have wide margins."""
import asyncio, gc, json, os, signal, subprocess, sys, threading, time, weakref
from pathlib import Path
import numpy as np, pytest
from ipywidgets.widgets.widget import _instances
from clam.cli.shell import main
from clam.core import RobotError, data_dir
from clam.data.store import check_store
from clam.robot.base import POSES, FreePlant, Teleop
from clam.robot.bridge import BridgeArm, BridgeClient, BridgeStub
from clam.robot.dynamixel import DynamixelArm
from clam.robot.kinematics import DOWN, FreeArm, inverse, log_so3, make_pose
from clam.robot.kitchen import Kitchen
from clam.robot.safety import Lease, SafeArm
from clam.robot.servos import DxlBus, TABLE
from clam.robot.sim import SimArm, expert, observe
from clam.widgets import robot
from clam.widgets.robot import JOGS, ArmPad, ArmPanel, PadSource

@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path): monkeypatch.setenv("CLAM_DATA", str(tmp_path/"data"))       # a real arm's panel writes a journal there

def until(fn, what, seconds=30.):
    end = time.monotonic()+seconds
    while not (v := fn()):
        assert time.monotonic() < end, what
        time.sleep(.01)
    return v
def threads(): return sorted(t.name for t in threading.enumerate() if t.name.startswith("clam-") or t.name == "SimArm")
def page(p, *held, on=True, **kw): p.hear({"kind": "pad", "page": 1, "at": p.pad.clock()*1000, "on": on, "held": list(held)} | kw)
def hand(p): return p.safe.read().ee[:3, 3]

@pytest.fixture
def free(tmp_path): # a panel on a lock-step arm without physics; every tick is a control step
    p = ArmPanel(FreeArm(inverse(make_pose(DOWN, (.25, 0, .15)), restarts=10).q_rad, frame_px=16), lambda s, f, t: np.r_[.2, 0, 0, 0, 0, 0, 1.], recorder=tmp_path/"session", thread=False); p.connect(); yield p; p.close()

# ---------------------------------------------------------------- steering
@pytest.mark.parametrize("jog", [j for j in JOGS if j[-1] in "+-"])
def test_every_jog_moves_its_own_axis(free, jog):
    a = free.safe.read().ee
    for _ in range(4): page(free, jog); free.tick()
    b, i, sign = free.safe.read().ee, robot.AXES.index(jog[:-1]), 1 if jog[-1] == "+" else -1
    if i < 3: d = b[:3, 3]-a[:3, 3]; assert sign*d[i] > .02 and np.abs(np.delete(d, i)).max() < .01
    else:
        w = log_so3(b[:3, :3] @ a[:3, :3].T); assert sign*w[i-3] > .1 and np.abs(np.delete(w, i-3)).max() < .06, w
    assert all(not e.sent.hold for e in free.safe.log)

def test_gripper_jogs(free):
    grip = lambda: free.safe.last.gripper
    for names, want in ((("close",), 0.), ((), None), (("open",), 1.), ((), None), (("toggle",), 0.)):
        page(free, *names); free.tick(); assert want is None or grip() == want
    n = len(free.safe.log); page(free, "toggle"); free.tick(); page(free, "toggle"); free.tick(); assert grip() == 0. and len(free.safe.log) == n, "a held key is one press"

def test_no_heartbeat_no_motion(free):
    page(free, "x+"); free.tick(); free.arm.wait(.4); n = len(free.safe.log)          # 0.3 s of the arm's clock went by
    for _ in range(3): free.tick()
    assert len(free.safe.log) == n

def test_giving_up_the_controls_is_at_once(free):
    page(free, "x+"); page(free, on=False); free.tick(); assert len(free.safe.log) == 0 and not free.lease.held

def test_old_messages_are_no_hand_on_the_keys(free):
    at = lambda late, *held: free.hear({"kind": "pad", "page": 1, "at": (free.pad.clock()-late)*1000, "on": True, "held": list(held)})
    at(0.); free.arm.wait(.4)
    for late in (9., 5., 1., .5): at(late, "x+")                                      # a cell blocked the kernel for ten seconds
    free.tick(); assert len(free.safe.log) == 0
    at(.05, "x+"); free.tick(); assert len(free.safe.log) == 1
    free.hear({"kind": "pad", "page": 2, "at": 0., "on": True, "held": ["x+"]}); free.tick(); assert len(free.safe.log) == 2      # another page has its own clock

def test_escape_and_stop_latch(free):
    free.hear({"kind": "stop"}); assert free.stopped and free.safe.stopped; a = hand(free)
    for _ in range(3): page(free, "x+"); free.tick()
    assert np.abs(hand(free)-a).max() < 1e-6 and free.safe.log[-1].sent.kinds == ("stop",)
    free.go("home"); assert "resume" in free.message and free.mode == "idle"
    free.resume(); page(free, "x+"); free.tick(); assert not free.safe.log[-1].sent.hold

def test_another_source_steers(tmp_path):
    class Headset:
        def __init__(self): self.n = 0
        def poll(self, state): self.n += 1; return Teleop(np.array([0, .01, 0, 0, 0, 0]), 0., self.n > 2, "discard" if self.n == 6 else "")
    p = ArmPanel(FreeArm(POSES["neutral"]), source=Headset(), recorder=tmp_path, thread=False); p.connect(); p.record(); a = hand(p)
    for _ in range(5): p.tick()
    assert len(p.safe.log) == 3 and hand(p)[1]-a[1] > .015 and p.recording == "running"
    p.tick(); assert p.recording == ""; p.close()

def test_silence_holds_a_real_time_arm_within_a_moment():
    p = ArmPanel("sim", arm_kw={"frame_px": 0}); p.connect(); a = hand(p)
    end = time.monotonic()+20
    while np.abs(hand(p)-a).max() < .03: page(p, "y+"); time.sleep(.05); assert time.monotonic() < end, "jogging does not move the arm"
    until(lambda: not p.lease.held, "the lease does not run out"); until(lambda: p.safe.last is None, "the dead-man's switch did not hold"); time.sleep(.5); b = hand(p); n = len(p.safe.log); time.sleep(.6)
    assert np.abs(hand(p)-b).max() < 2e-3 and len(p.safe.log) == n; p.close(); assert threads() == []

# ---------------------------------------------------------------- policies
def test_a_policy_needs_no_hand_and_no_page_can_drop_its_lease(free):
    page(free, "y+")
    async def cell():
        t = asyncio.ensure_future(free.step(8)); await asyncio.sleep(0); page(free, on=False); page(free, "z+"); return await t
    ticks = asyncio.run(cell()); assert len(ticks) == 8 and not any(k.sent.hold for k in ticks) and free.mode == "idle"
    n = len(free.safe.log); free.tick(); assert len(free.safe.log) == n, "what was held before the policy is forgotten"

def test_a_policy_that_stalls_is_held():
    arm = FreeArm(POSES["neutral"])
    def slow(s, f, t):
        if t == 2: arm.wait(1.5)
        return np.r_[.2, 0, 0, 0, 0, 0, 1.]
    p = ArmPanel(arm, slow, thread=False); p.connect(); ticks = asyncio.run(p.step(5)); p.close()
    assert [k.sent.kinds for k in ticks] == [(), (), ("lease",), (), ()]

def test_buttons_of_the_policy_and_their_errors():
    p = ArmPanel(FreeArm(POSES["neutral"]), lambda s, f, t: 1/0 if t == 3 else np.zeros(7), thread=False); p.view(); b = p.buttons; b["step-1"].click(); p._task.join(10)
    assert "not connected" in p.message; b["connect"].click(); b["step-1"].click(); p._task.join(10); assert len(p.runner.ticks) == 1 and p.message == ""
    b["step-5"].click(); p._task.join(10); assert "division" in p.message and p.mode == "idle" and len(p.runner.ticks) == 3
    p.close(); none = ArmPanel(FreeArm(), thread=False); none.connect()
    with pytest.raises(RobotError, match="no policy"): asyncio.run(none.step())
    none.close()

def test_stop_wins_over_a_running_policy_on_real_packets():
    with DxlBus(FreePlant(POSES["neutral"]), torque=True) as bus:
        p = ArmPanel(DynamixelArm(bus.port, timeout_s=.5), lambda s, f, t: np.r_[.2*(-1)**(t//8), 0, 0, 0, 0, 0, 1.]); p.view(); p.connect(); assert p.connected, p.message
        async def cell():
            t = asyncio.ensure_future(p.step(10_000))
            while len(p.runner.ticks) < 4: await asyncio.sleep(.02)
            p.buttons["stop"].click(); return await asyncio.wait_for(t, 30)
        ticks = asyncio.run(cell()); assert 4 <= len(ticks) < 200 and p.stopped and "STOPPED" in until(lambda: "STOPPED" in p.health and p.health, "health does not say it")
        time.sleep(1.); assert np.abs(bus.plant.qd_rad_s).max() < .02 and "12.0 V" in p.health
        p.close(); assert bus.servos[2].get("torque_enable") == 1, "closing never drops the arm"
        lines = [json.loads(l) for l in data_dir("recordings", "dynamixel", "commands.jsonl").read_text().splitlines()]; assert sum("sent_q" in l for l in lines) >= len(ticks) and any(l.get("why") == "stop" for l in lines), "the journal is not whole"
    assert threads() == []

# ---------------------------------------------------------------- recording
def test_record_accept_discard_score(free, tmp_path):
    def steps(n):
        for _ in range(n): page(free, "y+"); free.tick()
    free.record(task="wave"); steps(3); free.record(); assert free.recording == "waiting" and free.score is None
    free.record(); assert "verdict" in free.message; free.accept(); assert "no score" in free.message; free.rate(.5); free.accept(); assert free.episodes == 1
    free.record(); steps(2); free.discard(); assert free.recording == "" and len(free.recorder) == 1
    free.record(); free.discard(); free.record(); free.record(); assert "no step" in free.message and free.recording == ""
    free.record(); asyncio.run(free.step(4)); free.record(); free.rate(1); free.accept()
    store = free.finish(tmp_path/"out"); assert check_store(tmp_path/"out") == [] and [len(e) for e in store] == [3, 4] and [e.meta["score"] for e in store] == [.5, 1.]
    assert store[0].frames.shape == (4, 16, 32, 3) and (store[0].act[:, 1] > .1).all() and store[0].meta["task"] == "wave"
    n = len(free.safe.log); page(free); free.tick(); assert len(free.safe.log) == n, "a hand at rest is not recorded when no episode runs"

def test_the_suggested_score_is_the_tasks_own(tmp_path):
    k = Kitchen(3, "reach-block"); arm = SimArm(k); pi = expert("reach-block"); p = ArmPanel(arm, lambda s, f, t: pi(observe(k), t), recorder=tmp_path/"s", thread=False); p.connect()
    p.record(); out = asyncio.run(p.run()); p.record(); assert p.score == 1. and out["ticks"] < 60; p.accept(); p.scene(); assert k.seed == 4 and p.message == ""
    p.record(); asyncio.run(p.step(2)); p.record(); assert p.score == 0.; p.close(); assert len(list((tmp_path/"s"/"parts").iterdir())) == 1, "what waited was not accepted"

# ---------------------------------------------------------------- what is given back
def test_closing_gives_everything_back(tmp_path):
    class Model:
        def __call__(self, s, f, t): return np.zeros(7)
    gc.collect(); before = (set(_instances), threads()); model = Model(); gone = weakref.ref(model)
    p = ArmPanel("sim", model, recorder=tmp_path/"s", arm_kw={"frame_px": 32}); p.view(); p.connect(); p.view_pad.visible = True; until(lambda: p.frames, "no pictures"); n = p.shown_at; until(lambda: p.shown_at > n+2, "the panel stands still")
    p.record(); kitchen = p.arm.kitchen; assert "clam-arm-panel" in threads() and "clam-deadman" in threads() and "SimArm" in threads()
    p.close(); p.close(); del model; gc.collect()
    assert threads() == before[1] and set(_instances) == before[0] and gone() is None and kitchen._renderers == {} and not p.connected
    p2 = ArmPanel(SafeArm(FreeArm()), thread=False); p2.connect(); p2.disconnect(); p2.connect(); assert p2.connected and p2.message == ""; p2.close()

def test_nobody_looks_nobody_draws(monkeypatch):
    p = ArmPanel(FreeArm(POSES["neutral"], frame_px=8), thread=False); p.view(); p.connect(); p.tick(); assert p.frames == {}
    p.view_pad.visible = True; p.tick(); assert set(p.frames) == {"external", "shoulder"}; p.close()

def test_a_dead_arm_is_a_sentence_and_recovers():
    with DxlBus(FreePlant(POSES["neutral"]), torque=True) as bus:
        p = ArmPanel(DynamixelArm(bus.port)); p.view(); p.connect(); assert p.message == "", p.message
        bus.unplug(); until(lambda: "lost contact" in p.health or "not open" in p.health or "no fresh" in p.health, "the fault is not shown"); page(p, "x+"); time.sleep(.5); assert p._thread.is_alive()
        bus.replug(); p.buttons["connect"].click(); assert p.message == "", p.message; until(lambda: "ok" in p.health, f"not recovered: {p.health}"); p.close()

def test_the_panel_on_a_bridge_server():
    sim = SimArm(seed=3, clock="realtime")
    with BridgeStub(sim) as stub:
        p = ArmPanel(BridgeArm(port=stub.port, timeout_s={"obs": 20., "move": 20., "gripper": 20., "hash": 20.}), lambda s, f, t: np.r_[.1, 0, 0, 0, 0, 0, 1.]); p.connect(); assert p.connected, p.message; a = hand(p)
        ticks = asyncio.run(p.step(6)); assert len(ticks) == 6 and not any(k.sent.hold for k in ticks), [k.sent.reasons for k in ticks]
        until(lambda: hand(p)[0]-a[0] > .015, "the arm did not move"); p.close()

# ---------------------------------------------------------------- command line
@pytest.fixture
def clam(capsys):
    def run(*argv):
        capsys.readouterr(); code = main([str(a) for a in argv]); said = capsys.readouterr()
        return code, json.loads(said.out.splitlines()[-1]) if "--json" in argv and code == 0 else said.out, said.err
    return run

def test_check_of_the_simulation_and_of_a_server(clam):
    code, said, _ = clam("robot", "check", "--json"); assert code == 0 and said["ok"] and said["arm"] == "sim"
    with BridgeStub(SimArm(seed=2)) as stub:
        code, said, _ = clam("robot", "check", "--arm", "bridge", "--port", stub.port, "--json"); assert code == 0 and said["ok"] and len(said["state"]) == 7 and stub.log == [], "looking asks for no action"
    with BridgeStub(SimArm(seed=2), initialised=False) as stub:
        code, _, err = clam("robot", "check", "--arm", "bridge", "--port", stub.port); assert code == 2 and "init" in err and err.count("\n") == 1

def test_check_of_servos_writes_nothing_and_names_the_fault(clam):
    with DxlBus(FreePlant(), torque=False) as bus:
        before = {i: bytes(s.table) for i, s in bus.servos.items()}; stable = slice(0, TABLE["present_current"].address)
        code, said, _ = clam("robot", "check", "--arm", "dynamixel", "--port", bus.port, "--json"); assert code == 0 and said["ok"] and [r["id"] for r in said["servos"]] == list(range(1, 10))
        assert all(bytes(s.table)[stable] == before[i][stable] for i, s in bus.servos.items())
        bus.servos[7].put("drive_mode", 4); code, out, err = clam("robot", "check", "--arm", "dynamixel", "--port", bus.port); assert code == 2 and "wrist_angle (ID 7): drive_mode is 4" in err and "wrist_angle" in out

@pytest.mark.parametrize("arm", ["sim", "dynamixel", "bridge"])
def test_demo(clam, arm, tmp_path):
    film = ["--film", tmp_path/"d.mp4"] if arm == "sim" else []
    code, said, err = clam("robot", "demo", "--task", "push-button", "--arm", arm, "--json", *film); assert code == 0 and said["ok"] and said["score"] == 1. and said["steps"] < 60, err
    assert not film or (tmp_path/"d.mp4").stat().st_size > 2000

@pytest.mark.parametrize("argv, word", [(["demo", "--task", "dance"], "'dance'"), (["demo", "--steps", "0"], "--steps"), (["demo", "--film", "x.gif"], "mp4"), (["check", "--arm", "ur5"], "'ur5'"),
    (["check", "--arm", "dynamixel", "--port", "nowhere"], "cannot open"), (["check", "--arm", "bridge", "--port", "tty"], "port number"), (["serve-sim", "--port", "99999"], "not a port"), (["serve-sim", "--seconds", "-1"], "not a time")])
def test_mistakes_are_one_line(clam, argv, word):
    code, _, err = clam("robot", *argv); assert code == 2 and word in err and err.startswith("error: ") and err.count("\n") == 1

def test_serve_sim_answers_until_it_is_interrupted():
    p = subprocess.Popen([sys.executable, "-m", "clam", "robot", "serve-sim", "--port", "0", "--no-images", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1], env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        port = int(p.stdout.readline().split("127.0.0.1:")[1].split(";")[0])
        with BridgeClient(port=port, timeout_s={"obs": 30., "step_action": 30., "hash": 30.}) as c: assert "move" in c.handshake()["action_keys"]; a = c.state(); c.step_action([.03, 0, 0, 0, 0, 0, 1]); until(lambda: c.state()[0]-a[0] > .01, "the served arm does not move")
        p.send_signal(signal.SIGINT); out, err = p.communicate(timeout=60)
    finally: p.kill(); p.wait()
    assert p.returncode == 0, err; said = json.loads(out.splitlines()[-1]); assert said["ok"] and said["port"] == port and said["requests"] == 1
