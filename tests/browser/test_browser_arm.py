"""Pins that a person can drive the arm from the page: connect, jog by button and by key, let go by leaving, stop while a cell runs,
record, score and accept. The arm is the simulation in real time."""
import re
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
