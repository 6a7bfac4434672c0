"""Pins the table of panel times bad input: each cell is a sentence that says what is missing or what to do (or a panel that simply works),
never a traceback and never an unexpected error. Runs still being written and an absent umap: `test_widget_map`, `test_widget_rollouts`, 89."""
import html, re
import ipywidgets as W, numpy as np, pytest, torch
from clam.evaluate.inspection import inspect_episodes
from clam.toy import linear_lam, toy_episodes
from clam.widgets.base import Selection
from clam.widgets.bench import TABS, HealthPanel, Workbench
from clam.widgets.latent_map import LatentMap
from clam.widgets.reconstruction import ReconVsCheat
from clam.widgets.rollouts import Rollouts
from clam.widgets.steering import Steering

EPS = toy_episodes(2, seed=5, skill=0.)+toy_episodes(2, seed=6, skill=1.)

class Turned: # the healthy model with its latent turned into Z numbers; NaN where the hand is left of `sick`
    def __init__(self, Z=2, sick=-np.inf, constant=False): self.lam, self.P, self.sick, self.constant = linear_lam("healthy"), np.random.default_rng(0).normal(size=(2, Z)), sick, constant
    def encode(self, o, n): z = self.lam.encode(o, n)@self.P*(not self.constant); z[np.asarray(o)[:, 0] < self.sick] = np.nan; return z
    def predict(self, o, z): return self.lam.predict(o, np.asarray(z)@np.linalg.pinv(self.P))

def ins(eps=EPS, env="toy", **kw): return inspect_episodes(Turned(**kw), eps, H=0, env_name=env, decode=lambda z: torch.tanh(z[:, :1]).repeat(1, 2), name="bad")
BAD = {"one episode": lambda: ins(EPS[:1]), "constant latents": lambda: ins(constant=True), "some NaN": lambda: ins(sick=0.), "all NaN": lambda: ins(sick=np.inf), "no frames": lambda: ins(env=None),
       "one number": lambda: ins(Z=1), "64 numbers": lambda: ins(Z=64), "no actions": lambda: ins([e.replace(act=None) for e in EPS]), "nothing selected": ins}
PANELS = {"map": lambda i, s: LatentMap(i, s, method="pca"), "reconstruction": ReconVsCheat, "rollouts": Rollouts, "steering": Steering, "health": HealthPanel}
WORDS = {                   # what the view says; "" where it has nothing special to say
    "map":            {"one episode": "no other episode", "constant latents": "collapsed", "some NaN": "not finite and not on the map", "all NaN": "diverged", "no frames": "no pictures", "one number": "one dimension", "64 numbers": "", "no actions": "cannot be replayed", "nothing selected": "Click a point"},
    "reconstruction": {"one episode": "One episode", "constant latents": "ignores z", "some NaN": "not finite and are left out", "all NaN": "diverged", "no frames": "No pictures", "one number": "", "64 numbers": "", "no actions": "no action oracle", "nothing selected": "Click a point"},
    "rollouts":       {"one episode": "page 1 of 1", "constant latents": "", "some NaN": "", "all NaN": "", "no frames": "no simulator", "one number": "", "64 numbers": "", "no actions": "cannot be replayed", "nothing selected": ""},
    "steering":       {"one episode": "", "constant latents": "", "some NaN": "not finite", "all NaN": "not finite", "no frames": "no simulator", "one number": "", "64 numbers": "", "no actions": "True actions are not known", "nothing selected": "Choose a transition"},
    "health":         {"one episode": "at least two episodes", "constant latents": "z is the same for every transition", "some NaN": "not finite", "all NaN": "diverged", "no frames": "", "one number": "directions in which z varies, of 1", "64 numbers": "", "no actions": "without true actions", "nothing selected": ""}}

def said(w) -> str: # all words of a tree of widgets
    own = str(w.value) if isinstance(w, W.HTML) else " ".join(a.text or "" for a in w.layout.annotations) if hasattr(w, "add_trace") else ""
    return " ".join([own, *(said(c) for c in getattr(w, "children", ()))])

def settled(p): # the view with all work done, as text
    view = p.view()
    if isinstance(p, HealthPanel): p.examine()
    if (job := getattr(p, "job", None)) is not None and job._thread is not None: job._thread.join(120)
    for w in [*getattr(p, "_workers", ()), *([p.latest] if hasattr(p, "latest") else [])]: assert w.wait(120) and not w.errors, w.errors
    if hasattr(p, "wait"): p.wait()
    return html.unescape(re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", said(view))))

@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("panel", PANELS)
def test_each_cell_of_the_table(panel, what, tmp_path, monkeypatch):
    monkeypatch.setenv("CLAM_DATA", str(tmp_path)); i = BAD[what](); focus = None if what == "nothing selected" else int(np.argmin(i.obs[:, 0])) # far left: there `some NaN` has none
    p = PANELS[panel](i, Selection(focus=focus))
    try:
        words = settled(p); wanted = WORDS[panel][what]
        assert wanted in words, words[:1500]
        assert p.details == "" and "Traceback" not in words, (p.message, p.details)
        assert p.static() is not None if (panel, what) not in {("rollouts", "no frames"), ("rollouts", "no actions")} else p.message
        if not wanted: assert p.message == ""
    finally: p.close(); i.close()

@pytest.mark.parametrize("what", ["all NaN", "no frames"])
def test_a_bench_of_bad_input_fills_all_tabs(what, tmp_path, monkeypatch):
    monkeypatch.setenv("CLAM_DATA", str(tmp_path)); i = BAD[what](); b = Workbench(i, method="pca")
    try:
        b.view()
        for t in TABS: b.tab = t; assert b.details == "" and "Traceback" not in said(b._boxes[t]) and len(b._boxes[t].children), t
    finally: b.close()
