"""Pins that a person can drive the arm from the page: connect, jog by button and by key, let go by leaving, stop while a cell runs,
record, score and accept. The arm is the simulation in real time. The pad alone, with a made-up gamepad, needs no kernel."""
import re
from clam.widgets.robot import JOGS, PadSource, _PAD
from lab import until

ARM = '''import asyncio
from clam.core import data_dir
from clam.robot.kitchen import Kitchen
from clam.robot.sim import SimArm, expert, observe
from clam.widgets.robot import ArmPanel
kitchen = Kitchen(3, "reach-block"); arm = SimArm(kitchen, clock="realtime", frame_px=96)
def pi(state, frames, t):
    if t == 0: pi.it = expert("reach-block", top=.5)
    return pi.it(observe(kitchen), t)
panel = ArmPanel(arm, pi, recorder=data_dir("recordings", "browser")); panel'''
HAND = "[float(x) for x in panel.safe.read().ee[:3, 3]]"

def hand(b): return b.ask(HAND)
def jog(b, name): return b.at(f'[data-jog="{name}"]')
def said(b): return b.shows("clam-arm-health")
def connected(b): b.run_all(); b.button("clam-arm-connect"); until(lambda: "ok" in said(b), 20, "no health"); b.at("clam-arm-pad").scroll_into_view_if_needed(); return b
def wait(b, ms): b.page.wait_for_timeout(ms)

def test_connect_and_jog_by_button(book):
    b = book([ARM]); b.run_all(); assert said(b) == "not connected" and b.all("clam-arm-record").first.is_disabled() and not b.ask("panel.connected")
    b.button("clam-arm-connect"); until(lambda: "sim · ok" in said(b), 20, "no health"); eye = lambda: (b.picture("clam-arm-camera-external"), b.picture("clam-arm-camera-shoulder"))
    first = until(lambda: (v := eye())[0].startswith("blob:") and v, 20, "no pictures"); a = hand(b); jog(b, "x+").hover(); b.page.mouse.down()
    until(lambda: hand(b)[0]-a[0] > .04, 30, "the button does not jog"); assert "clam-on" in jog(b, "x+").get_attribute("class"); b.shot("arm-jog"); jog(b, "x+").hover(); b.page.mouse.up(); wait(b, 900); c = hand(b)
    wait(b, 900); d = hand(b); assert abs(d[0]-c[0]) < .003, "it goes on after the button was let go"; until(lambda: all(x != y for x, y in zip(eye(), first)), 10, "the pictures stand still")
    jog(b, "close").click(); until(lambda: b.ask("panel.safe.read().gripper") < .3, 20, "a click does not close the gripper"); assert "+1.2 0 0 cm" in b.shows("clam-arm-log")

def test_jog_by_key_and_let_go(book):
    b = connected(book([ARM])); cells = b.page.locator(".jp-Notebook .jp-Cell").count(); a = hand(b); b.at("clam-arm-pad-said").click(); until(lambda: "live" in b.shows("clam-arm-pad-said"), 10, "the pad did not take the focus")
    b.page.keyboard.down("a"); until(lambda: hand(b)[1]-a[1] > .03, 30, "the key does not jog"); b.page.keyboard.up("a")
    for k in "ddxx": b.page.keyboard.press(k)
    wait(b, 600); assert b.page.locator(".jp-Notebook .jp-Cell").count() == cells, "JupyterLab took the keys"
    b.page.keyboard.down("z"); until(lambda: b.ask("'z+' in panel.pad.held"), 10, "the key did not arrive"); b.page.locator(".jp-Notebook .jp-Cell").last.locator(".jp-InputArea-prompt").click()      # the key is still down
    until(lambda: not b.ask("panel.lease.held or bool(panel.pad.held)"), 10, "leaving the pad did not let go"); wait(b, 800); c = hand(b); wait(b, 800); assert max(abs(x-y) for x, y in zip(hand(b), c)) < .003; b.page.keyboard.up("z")
    b.at("clam-arm-pad-said").click(); b.page.keyboard.press("Escape"); until(lambda: "STOPPED" in said(b), 10, "Escape is not Stop"); b.shot("arm-stopped")
    c = hand(b); b.page.keyboard.down("w"); wait(b, 900); b.page.keyboard.up("w"); assert abs(hand(b)[0]-c[0]) < .003 and "stop: call resume" in b.shows("clam-arm-log")
    b.button("clam-arm-resume"); b.at("clam-arm-pad-said").click(); b.page.keyboard.down("w"); until(lambda: hand(b)[0]-c[0] > .02, 30, "it does not move again"); b.page.keyboard.up("w")

def test_stop_while_a_cell_runs(book):
    b = book([ARM, "panel.connect(); swing = lambda s, f, t: [.3*(-1)**(t//6), 0, 0, 0, 0, 0, 1.]\npanel.runner.policy = swing\nticks = await panel.step(10_000)"]); b.run_all(wait=False)
    until(lambda: b.all("clam-arm-log").count() and b.all(".clam-arm-log tr").count() > 6, 40, "the cell moves nothing"); assert b.running(), "the cell has ended"
    b.button("clam-arm-stop"); b.finish(20); n = b.ask("len(ticks)"); assert 5 < n < 1000 and b.ask("panel.stopped") and b.ask("panel.mode") == "idle"; wait(b, 800); a = hand(b); wait(b, 600); assert max(abs(x-y) for x, y in zip(hand(b), a)) < .003

def test_record_score_accept(book):
    b = connected(book([ARM])); b.button("clam-arm-record"); until(lambda: "recording" in b.shows("clam-arm-count"), 10, "nothing is recorded"); b.button("clam-arm-step-1"); until(lambda: b.ask("len(panel.runner.ticks)") == 1, 20, "no step")
    b.button("clam-arm-run"); until(lambda: "score 1" in said(b), 60, "the expert did not reach the block"); until(lambda: b.ask("panel.mode") == "idle", 20, "the policy goes on")
    b.button("clam-arm-record"); until(lambda: "verdict" in b.shows("clam-arm-count"), 10, "no verdict is asked for"); assert b.ask("panel.score") == 1.; b.button("clam-arm-score-half"); until(lambda: b.ask("panel.score") == .5, 10, "the score did not arrive"); b.shot("arm-score")
    b.button("clam-arm-accept"); until(lambda: re.search("^1 kept", b.shows("clam-arm-count")), 20, "not accepted"); b.button("clam-arm-scene"); until(lambda: "score 0" in said(b), 20, "the scene is the old one")
    b.button("clam-arm-record"); jog(b, "y+").click(); until(lambda: b.ask("len(panel.recorder.running['act'])"), 20, "the jog is not in the episode"); b.button("clam-arm-discard"); until(lambda: b.shows("clam-arm-count") == "1 kept", 20, "not discarded")
    assert b.ask("(lambda e: [e.meta['score'], e.meta['task']])(panel.finish(data_dir('episodes', 'browser-arm'))[0])") == [.5, "reach-block"] and b.ask("panel.message") == ""

PAD = """async ([esm, jogs]) => {
  window.sent = []; window.pressed = new Array(16).fill(false); window.axes = [0, -1, 0, 0]; window.eyes = "visible";
  navigator.getGamepads = () => [{ connected: true, axes: window.axes, buttons: window.pressed.map((p) => ({ pressed: p })) }];
  Object.defineProperty(document, "visibilityState", { get: () => window.eyes });
  const { default: pad } = await import(URL.createObjectURL(new Blob([esm], { type: "text/javascript" }))), el = document.createElement("div"); document.body.append(el);
  pad.render({ el, model: { get: (k) => ({ jogs, visible: false })[k], set: () => {}, save_changes: () => {}, send: (m) => window.sent.push(m) } });
}"""

def test_gamepad_heartbeat_and_zero_on_blur(lab):
    page = lab.browser.new_page(); page.goto("about:blank"); page.evaluate(PAD, [_PAD, [list(j) for j in JOGS.items()]])
    do = lambda js: page.evaluate(f"() => {{ {js} }}"); now = lambda: page.evaluate("() => performance.now()/1000")
    def said(what, since): return until(lambda: [m for m in page.evaluate("() => window.sent")[since:] if m["kind"] == "pad" and what(m)], 20, "the pad is silent")
    def n(): return page.evaluate("() => window.sent.length")
    def let_go(since, why): # the last word was: nobody is there
        m = said(lambda m: not m["on"], since)[-1]; assert not m["held"] and not m["axes"], why; source = PadSource(clock=now); source.lease.beat(); source.hear(m); assert not source.poll(None if source.gripper else type("S", (), {"gripper": 1.})).enabled, why
    page.wait_for_timeout(300); assert not any(m["on"] for m in page.evaluate("() => window.sent")), "a stick alone, without the shoulder button, moves nothing"
    k = n(); do("window.pressed[4] = true"); until(lambda: sum(m["on"] for m in page.evaluate("() => window.sent")[k:]) > 8, 20, "no heartbeat"); beats = said(lambda m: m["on"], k); apart = sorted(b["at"]-a["at"] for a, b in zip(beats, beats[1:])); assert 80 < apart[len(apart)//2] < 250, apart
    source = PadSource(clock=now); fresh = said(lambda m: m["on"], n()-1)[-1]; assert source.hear(fresh); t = source.poll(type("S", (), {"gripper": 1.})); assert t.enabled and t.delta[0] > .01 and abs(t.delta[1:]).max() == 0
    k = n(); do("window.pressed[4] = false"); let_go(k, "the shoulder button was let go")
    do("window.pressed[5] = true"); said(lambda m: m["on"], n()-1); k = n(); do("window.eyes = 'hidden'; document.dispatchEvent(new Event('visibilitychange'))"); let_go(k, "the page is hidden"); do("window.eyes = 'visible'; window.pressed[5] = false")
    page.locator(".clam-arm-pad").focus(); k = n(); page.keyboard.down("w"); said(lambda m: m["held"] == ["x+"], k); k = n(); do("window.dispatchEvent(new Event('blur'))"); let_go(k, "the window lost the focus with a key down")
    k = n(); page.keyboard.down("a"); said(lambda m: "y+" in m["held"], k); k = n(); do("window.dispatchEvent(new Event('gamepaddisconnected'))"); let_go(k, "the gamepad was pulled out")
    page.close()
