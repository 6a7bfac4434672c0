"""Pins the toy world: exact physics under any action, seeding that depends on nothing but the seed, replay-like data that the splits
need (all kinds present, play worth less than half an expert), and measures that name every planted fault whatever the seed."""
import subprocess, sys
import numpy as np
import pytest
from clam.core import check_episode
from clam.toy import KINDS, RADIUS_M, ToyWorld, draw, expert_action, lam_measures, linear_lam, physics, toy_episode, toy_episodes, transitions, true_action, verdict


def test_exact_inverse_dynamics_for_random_states_and_actions():
    rng = np.random.default_rng(0)
    o, a = rng.normal(size=(1000, 6)), rng.uniform(-1, 1, (1000, 2))
    assert np.abs(true_action(o, physics(o, a))-a).max() < 1e-12


def test_alignment_is_not_off_by_one():
    o, n, a = transitions(toy_episodes(10, skill=0.))
    right, late = np.abs(true_action(o, n)-a).max(), np.abs(true_action(o[1:], n[1:])-a[:-1]).mean()
    assert right < 1e-5 and late > .1


def test_an_episode_depends_on_its_seed_alone():
    a, b = toy_episodes(5, seed=3), toy_episodes(2, seed=3)
    for x, y in zip(a, b): assert np.array_equal(x.obs, y.obs) and np.array_equal(x.act, y.act) and x.meta == y.meta
    np.random.seed(0); one = toy_episode(7); np.random.rand(5); assert np.array_equal(one.obs, toy_episode(7).obs)
    state = np.random.get_state()[1].copy(); toy_episodes(3); assert np.array_equal(state, np.random.get_state()[1])


def test_state_is_restored_with_its_noise():
    env = ToyWorld(noise_dims=4); env.reset(0); env.step([.1, .2])
    s = env.get_state(); first = [env.step([.5, -.5]).obs for _ in range(3)]
    env.set_state(s); again = [env.step([.5, -.5]).obs for _ in range(3)]
    assert np.array_equal(first, again)


def test_expert_always_succeeds_and_random_almost_never():
    def success(act, seed):
        env = ToyWorld(); obs, hit = env.reset(seed), False
        while True:
            s = env.step(act(obs)); obs = s.obs; hit |= s.success
            if s.done: return hit, s.info["distance_m"]
    ends = [success(expert_action, s) for s in range(100)]
    assert all(h for h, _ in ends) and max(d for _, d in ends) < RADIUS_M
    rng = np.random.default_rng(0)
    assert np.mean([success(lambda o: rng.uniform(-1, 1, 2), s)[0] for s in range(100)]) < .1


@pytest.mark.parametrize("seed", range(3))
def test_data_look_like_a_replay_buffer(seed):
    eps = toy_episodes(200, seed); kinds = [e.meta["policy"] for e in eps]
    for e in eps: check_episode(e)
    assert min(kinds.count(k) for k in ("random", "learner", "expert")) >= 5
    good = np.median([e.total_reward for e in eps if e.succeeded])
    assert sum(e.total_reward < .5*good for e in eps) >= 40        # enough for twenty labelled episodes


def test_pictures_move_with_the_state():
    o = np.array([0., 0, 0, 0, .8, .8])
    assert draw(o).shape == (32, 32, 3) and draw(o, 64).shape == (64, 64, 3) and draw(o).dtype == np.uint8
    assert draw(o+[.3, 0, 0, 0, 0, 0])[16, 19, 0] == 230            # .3 m to the right is 3.4 pixels
    assert draw(o+[0, .3, 0, 0, 0, 0])[12, 16, 0] == 230            # up is up


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_planted_faults_are_named_for_every_seed(kind, seed):
    noise = 6 if kind == "distracted" else 0
    lam = linear_lam(kind, toy_episodes(80, 100+seed, noise_dims=noise))
    m = lam_measures(lam, toy_episodes(40, 200+seed, noise_dims=noise), seed)
    assert verdict(m)[0] == kind, m
    assert np.isfinite(list(m.values())).all()


def test_imports_numpy_only():
    heavy = "torch metaworld mujoco matplotlib plotly sklearn".split()
    code = f"import sys, clam.toy; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
