"""Pins the dataset cards: every recipe has a committed one, its numbers are those of a dataset made again from its seed, and a card tells
the truth about sets without rewards, success or size."""
import json
import numpy as np, pytest
from pathlib import Path
from clam.collect.cards import card, card_folder, write_card
from clam.collect.recipes import make_dataset, recipe_names
from clam.data.store import EpisodeStore, write_store
from clam.testing import fake_episodes

CARDS = Path(__file__).resolve().parent.parent/"data"/"cards"
def committed(name): return json.loads((card_folder(name, CARDS)/"card.json").read_text())

@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_card(name):
    c = committed(name); assert c["name"] == name and c["episodes"] >= 10 and c["licence"] != "not stated" and c["source"] != "not stated" and sum(c["who"].values()) == c["episodes"]
    assert len(c["return_by_decile"]) == 10 and (card_folder(name, CARDS)/"card.png").read_bytes()[:4] == b"\x89PNG" and ("thresholds" in c["splits"]) == (name != "widowx/play")    # play has no experts

def test_a_card_is_what_the_seed_gives(tmp_path):
    c = committed("toy"); store = EpisodeStore(make_dataset("toy", c["episodes"], seed=c["seed"], out=tmp_path/"toy", quiet=True)); now = json.loads(json.dumps(card(store)))
    assert {k: v for k, v in now.items() if k != "packages"} == {k: v for k, v in c.items() if k != "packages"}

def test_planted_changes_are_seen(tmp_path):
    eps = fake_episodes(40, T=9); one = card(EpisodeStore(write_store(tmp_path/"a", eps, {"name": "x"}))); worse = [e.replace(reward=e.reward-(k >= 36)) for k, e in enumerate(eps)]
    two = card(EpisodeStore(write_store(tmp_path/"b", worse, {"name": "x"}))); assert one["digest"] != two["digest"]
    assert np.argwhere(~np.isclose(one["return_by_decile"], two["return_by_decile"])).ravel().tolist() == [9] and abs(one["return_by_decile"][9]-two["return_by_decile"][9]-9) < 2e-3

def test_what_is_not_there_is_said(tmp_path):
    c = write_card(EpisodeStore(write_store(tmp_path/"a", [e.replace(reward=None, success=None, act=None) for e in fake_episodes(2)], {"name": "bare"})), tmp_path/"cards")
    assert c["return_by_decile"] is c["success_by_decile"] is c["return_quartiles"] is None and c["licence"] == c["source"] == "not stated" and "neither rewards nor success" in c["splits"]["impossible"] and (tmp_path/"cards"/"card.png").is_file()
