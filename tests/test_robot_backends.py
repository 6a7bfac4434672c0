"""What holds on every backend alike: hostile requests break no limit, a recording replays on all of them, also after a journey through LeRobot's
format, an interrupted kernel holds, a late camera holds, and no command is missing from the log. Clocks are lock-step except in the kernel."""
import asyncio, json, queue, threading, time
import numpy as np, pytest
from clam.cli.robot import kitchen_arm
from clam.cli.shell import main
from clam.core import RobotError
from clam.data.formats import import_dataset
from clam.data.lerobot import write_lerobot
from clam.data.store import EpisodeStore
from clam.robot.base import LIMITS_RAD, POSES, LiveCamera
from clam.robot.bridge import BridgeArm, BridgeStub
from clam.robot.kinematics import DOWN, FreeArm, forward_chain, inverse, make_pose
from clam.robot.kitchen import Kitchen
from clam.robot.recorder import RobotRecorder, from_unit, replay
from clam.robot.runner import PolicyRunner
from clam.robot.safety import Lease, SafeArm, SafetyConfig, SafetyFilter, deadman, hostile_actions, violations
from clam.robot.sim import SimArm, expert, observe

DT = .02        # fifty requests a second: each is short, so that ten thousand are not long (`make soak`; `make test` makes 2,000)

class Told: # what a backend was really told, beside what the filter says it sent
    def __init__(self, cfg): self.cfg, self.broken, self.n, self.pose, self.back = cfg, [], 0, None, 0
    def hand(self, pose): # a hand pose that arrived
        self.n += 1; self.pose = pose
        if not np.isfinite(pose).all() or not self.cfg.box.contains(pose[:3, 3], 1e-3): self.broken.append(f"told outside: {pose[:3, 3]}")
    def step(self, sent, start): # after a control step that began at the joint angles `start`
        pose, self.pose = self.pose, None
        if sent.hold: self.broken += ["told to move while holding"]*(pose is not None); return
        if pose is None: self.broken.append("nothing arrived"); return
        if (m := np.linalg.norm(pose[:3, 3]-forward_chain(start)[:3, 3])) > self.cfg.speed_m_s*DT+1e-4: self.broken.append(f"told too fast: {m*100:.2f} cm in a step")

def attack(safe, n, seed, told): # what broke, which rules spoke, where the hand was
    broken, kinds, hands = [], set(), []
    for a in hostile_actions(n, seed, safe.filter.cfg.space):
        before = None if safe.last is None or safe.last.hold else safe.last.q_target_rad
        sent = safe.step(a, DT); kinds |= set(sent.kinds); start = sent.anchor_rad if before is None or "lag" in sent.kinds else before
        told.step(sent, start); v, far = violations(sent, safe.filter.cfg, start, DT), safe.filter.cfg.box.distance
        if v and v[0].startswith("box") and len(v) == 1 and far(sent.ee[:3, 3]) < far(forward_chain(start)[:3, 3]): told.back += 1; v = []      # it had overshot, and 20 ms are too short to come back in one step
        broken += v; hands.append(safe.log[-1].state.ee[:3, 3])
    return broken, kinds, np.array(hands)

def sound(broken, kinds, hands, told, box): # of what `attack` gave
    assert not broken and not told.broken, (broken[:3], told.broken[:3]); assert {"finite", "shape", "clip", "speed", "box"} <= kinds and told.n > len(hands)//10 and told.back < 10
    assert hands.std(0).min() > .012 and max(box.distance(p) for p in hands) < .015, "it was pushed around, and the arm itself stayed inside"

@pytest.mark.soak
def test_hostile_actions_in_the_simulation(many):
    arm = SimArm(Kitchen(1, "play")); safe = SafeArm(arm); told = Told(safe.filter.cfg); command = arm.command
    def listen(q, g, t): told.hand(forward_chain(q)); told.broken += [f"told outside the joint limits: {q}"]*bool(((q < LIMITS_RAD[:, 0]) | (q > LIMITS_RAD[:, 1])).any()); command(q, g, t)
    arm.go(POSES["neutral"]); arm.command = listen
    sound(*attack(safe, many(10_000), 31, told), told, safe.filter.cfg.box)

@pytest.mark.soak
def test_hostile_actions_over_the_bridge(many):
    sim = SimArm(Kitchen(1, "play"))
    with BridgeStub(sim) as stub, BridgeArm(port=stub.port, clock=sim, timeout_s={k: 30. for k in ("obs", "move", "hash", "gripper")}) as arm:
        stub.image_size = 8; safe = SafeArm(arm); told = Told(safe.filter.cfg); arm.go(POSES["neutral"]); ask = arm.client._ask
        def listen(m, *a): # every message that leaves this process
            if m.get("key") == "move" and m["payload"]["duration"] == DT: told.hand(m["payload"]["pose"])
            elif m["type"] == "act" and m["key"] not in ("move", "gripper"): told.broken.append(m["key"])
            return ask(m, *a)
        arm.client._ask = listen; sound(*attack(safe, many(10_000), 41, told), told, safe.filter.cfg.box)
        assert ((sim.kitchen.targets >= LIMITS_RAD[:, 0]) & (sim.kitchen.targets <= LIMITS_RAD[:, 1])).all()

@pytest.mark.parametrize("space", ["ee_delta", "joint_abs"])
def test_a_hand_outside_the_box_goes_back_before_anything_else(space): # a real arm overshoots; a sideways request must not spend the way back
    f = SafetyFilter(SafetyConfig(space=space)); b = f.cfg.box; arm = FreeArm(inverse(make_pose(DOWN, (.25, b.low[1]-.004, .15)), restarts=10).q_rad); s = arm.read(); assert not b.contains(s.ee[:3, 3])
    for a in ([.05, -.05, 0, .2, 0, 0, 1], [0]*7) if space == "ee_delta" else (np.r_[s.q_rad+[-.1, .1, 0, 0, 0, 0], 1.], np.r_[s.q_rad, 1.]):
        sent = f(a, s, dt_s=DT); assert not sent.hold and b.contains(sent.ee[:3, 3]) and sent.kinds[0] == "box" and not violations(sent, f.cfg, s.q_rad, DT), sent

# ---------------------------------------------------------------- replay
def test_a_recording_replays_on_every_backend_and_through_lerobot(tmp_path):
    k = Kitchen(3, "push-button"); safe = SafeArm(SimArm(k)); pi = expert("push-button")
    with RobotRecorder(safe, tmp_path/"session", "press") as rec:
        rec.begin(task="push-button")
        for t in range(60):
            safe.step(from_unit("ee_delta", pi(observe(k), t)))
            if k.score == 1.: break
        rec.end(); rec.accept(k.score); store = rec.finish(tmp_path/"press")
    assert k.score == 1.; write_lerobot(store, tmp_path/"lerobot", task="press the button", robot="widowx_250s"); back = EpisodeStore(import_dataset("lerobot", tmp_path/"lerobot", tmp_path/"back"))
    for name, ep in (("sim", store[0]), ("dynamixel", store[0]), ("bridge", store[0]), ("sim", back[0])):
        other = Kitchen(3, "push-button")
        with kitchen_arm(name, other) as arm: out = replay(SafeArm(arm), ep)
        assert np.abs(out["error_rad"]).max() < .05 and other.score == 1., (name, np.abs(out["error_rad"]).max(), other.score); other.close()

# ---------------------------------------------------------------- nothing is missing from the log
def test_every_command_is_in_the_journal(tmp_path):
    arm = FreeArm(POSES["neutral"]); safe = SafeArm(arm, lease=Lease(.5)); rec = RobotRecorder(safe, tmp_path/"s")
    safe.lease.beat(); safe.step([.01, 0, 0, 0, 0, 0, 1]); safe.step("forward"); safe.go(POSES["home"], 1.); safe.stop(); safe.resume()
    arm.wait = lambda s: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt): safe.lease.beat(); safe.step([0]*7)
    with deadman(safe, .01):
        safe.lease.beat(); safe.lease.ttl_s = .02; time.sleep(.1); safe.lease.beat(); end = time.monotonic()+20
        while not any(n.get("why") == "the lease ran out" for n in safe.notes): time.sleep(.01); assert time.monotonic() < end
    lines = rec.journal.lines(); rec.close(); steps = [l for l in lines if "event" not in l]; events = [(l["event"], l.get("why")) for l in lines if "event" in l]
    assert [l["requested"] for l in steps] == [[.01, 0, 0, 0, 0, 0, 1], "'forward'", [0]*7] and all(len(l["sent_q"]) == len(l["measured_q"]) == 6 for l in steps) and steps[1]["hold"] and "shape" in steps[1]["reasons"][0]
    for e in (("go", None), ("arrived", None), ("hold", "stop"), ("resume", None), ("hold", "KeyboardInterrupt"), ("hold", "the lease ran out")): assert e in events, events
    n = len(lines); safe.note("after"); assert len(rec.journal.lines()) == n, "a closed recorder listens no more"

# ---------------------------------------------------------------- cameras
def test_a_camera_that_freezes_stops_the_policy():
    frozen, held = threading.Event(), []
    def grab():
        while frozen.is_set(): time.sleep(.01)
        time.sleep(.005); return np.zeros((8, 8, 3), np.uint8)
    cam = LiveCamera(grab, "external", stale_s=.3); arm = FreeArm(POSES["neutral"]); arm.cameras = lambda: {"external": cam()}; hold = arm.hold; arm.hold = lambda: (held.append(1), hold())
    def policy(s, frames, t):
        if t == 3: frozen.set(); time.sleep(.5)
        return np.r_[.2, 0, 0, 0, 0, 0, 1.]
    runner = PolicyRunner(SafeArm(arm), policy)
    with pytest.raises(RobotError, match="external.*no fresh picture"): asyncio.run(runner.steps(50))
    assert len(runner.ticks) == 4 and held; frozen.clear(); cam.close()

# ---------------------------------------------------------------- a real kernel
DRIVE = """import numpy as np
from clam.robot.safety import SafetyConfig
from clam.widgets.robot import ArmPanel
panel = ArmPanel("sim", lambda s, f, t: np.r_[.3*(-1)**(t//6), 0, 0, 0, 0, 0, 1.], recorder=FOLDER, arm_kw={"frame_px": 0}); panel.connect()"""
BLOCKING = """print("moving", flush=True)
for t in range(10_000): panel.lease.beat(); panel.safe.step([.02*(-1)**(t//6), 0, 0, 0, 0, 0, 1.])"""
AWAITING = """print("moving", flush=True)
await panel.step(10_000)"""
ASKING = """import json, time
time.sleep(.6); a = panel.safe.read().q_rad; time.sleep(.5)
print(json.dumps([float(np.abs(panel.safe.read().q_rad-a).max()), panel.lease.held, [n["event"] for n in panel.safe.notes][-1], panel.mode, len(panel.safe.log)]))"""

@pytest.mark.slow
def test_interrupting_the_kernel_holds_the_arm(tmp_path):
    from jupyter_client.manager import start_new_kernel
    km, kc = start_new_kernel(kernel_name="python3", startup_timeout=120)
    def run(code, interrupt=False, seconds=120): # what was printed; with `interrupt`, as soon as it moves
        mine, said, end = kc.execute(code), [], time.monotonic()+seconds
        while time.monotonic() < end:
            try: m = kc.get_iopub_msg(timeout=1)
            except queue.Empty: continue
            if m["parent_header"].get("msg_id") != mine: continue
            if m["msg_type"] == "stream": said.append(m["content"]["text"]); interrupt and m["content"]["name"] == "stdout" and (time.sleep(1.5), km.interrupt_kernel())
            if m["msg_type"] == "error": said.append(m["content"]["ename"])
            if m["msg_type"] == "status" and m["content"]["execution_state"] == "idle": return said
        pytest.fail(f"the cell does not end; it said {said}")
    try:
        assert run(DRIVE.replace("FOLDER", repr(str(tmp_path/"s")))) == []; seen = 0
        for cell in (BLOCKING, AWAITING):
            said = run(cell, interrupt=True); assert said[0] == "moving\n" and said[-1] in ("KeyboardInterrupt", "CancelledError"), said
            moved, leased, event, mode, steps = json.loads("".join(run(ASKING))); assert moved < 2e-3 and not leased and event == "hold" and mode == "idle" and steps > seen+2, (moved, leased, event, mode, steps); seen = steps
        run("panel.close()")
    finally: kc.stop_channels(); km.shutdown_kernel(now=True)

# ---------------------------------------------------------------- the benchmark
def test_the_benchmark_says_how_time_is_kept(capsys):
    assert main(["robot", "bench", "--seconds", "2", "--size", "32", "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1]); assert said["ticks"] == 10 and said["physics_times_real_time"] > 1 and {"period_error_p95", "think_p95_s", "overruns", "load", "processors", "ok"} <= said.keys()
    assert main(["robot", "bench", "--seconds", "0"]) == 2 and "--seconds 20" in capsys.readouterr().err
