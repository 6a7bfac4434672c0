"""The worked example of CONTRIBUTING.md, run as it stands there, and what a model is then good for."""
import re
from pathlib import Path
import numpy as np

TEXT = (Path(__file__).resolve().parent.parent/"CONTRIBUTING.md").read_text()

def test_a_new_model_takes_one_notebook_and_one_line(tmp_path, monkeypatch):
    from clam.collect.recipes import make_dataset
    from clam.evaluate.health import health
    from clam.models import lam
    from clam.train.agents import load_agent
    from clam.train.relabel import relabel
    from clam.train.stage2 import train_stage2
    monkeypatch.setenv("CLAM_DATA", str(tmp_path)); monkeypatch.setattr(lam, "REGISTRY", dict(lam.REGISTRY))
    make_dataset("toy", 100, 0, tmp_path/"episodes"/"toy", 1)
    blocks = re.findall(r"```python\n(.*?)```", TEXT.split("## A worked example: a new model")[1], re.S); assert len(blocks) == 3
    scope = {}
    for b in blocks: exec(b, scope)                                 # the page itself
    run = scope["run"]
    assert run.finished("lam", "decoder") and run.config.lam.model == "linear"
    logs = run.metrics("stage1"); assert logs[-1]["recon_loss"] < logs[0]["recon_loss"]
    experts = run.splits.expert_view(run.dataset()); z = relabel(run, experts); assert len(z) == len(experts) and np.isfinite(z[0]).all()
    train_stage2(run, quiet=True); a, latent = load_agent(run).act(experts[0].obs[0]); assert a.shape == (2,) and latent.shape == (run.config.lam.latent_dim,)
    assert health(run).verdict in ("ready", "leaking", "collapsed", "not decodable")
