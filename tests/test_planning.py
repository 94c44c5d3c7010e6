"""support/planning.py: the object's position read out of features, and pushes that reach a goal."""
import numpy as np
import pytest
import torch

from data import DOMAINS, WORLD, Clips, slide
from support import planning
from support.planning import SECONDS, make_goals, plan_pushes, reached


class Bright:
    """In place of Clips: one patch of 4 x 4 is bright and tells where in it the object is."""

    meta = {'shape': [2, 16, 3]}

    def __init__(self, clips, seed):
        rng = np.random.default_rng(seed)
        self.physics = {'position': rng.uniform(0, WORLD, (clips, 4, 2))}

    def __len__(self):
        return len(self.physics['position'])

    def __getitem__(self, indices):
        # Features of a step belong to its last frame.
        place = torch.tensor(self.physics['position'][indices][:, 1::2] / WORLD * 4).float()
        column, row = place.long().clamp(max=3).unbind(-1)
        z = torch.zeros(*place.shape[:2], 16, 3)
        shown = torch.cat([place % 1, torch.ones(*place.shape[:2], 1)], -1)
        z.scatter_(2, (4 * row + column)[..., None, None].expand(-1, -1, 1, 3), shown[:, :, None])
        return z, None


def test_the_readout_reads_the_position_of_the_last_frame_of_each_step():
    state = torch.random.get_rng_state()
    readout = planning.fit_readout(Bright(1000, 1), 'cpu')
    assert torch.equal(torch.random.get_rng_state(), state)
    other = Bright(200, 2)
    z, _ = other[np.arange(200)]
    off = readout(z) - planning.positions(other, range(200))
    assert off.norm(dim=-1).mean() < 0.04
    place = torch.tensor(other.physics['position'][7, 1::2]).float()
    assert torch.equal(planning.positions(other, [7])[0], place)


@pytest.fixture(scope='module')
def clips(tiny):
    return {domain: Clips(tiny, f'test_{domain}') for domain in DOMAINS}


@pytest.mark.parametrize('domain', ['B', 'turned', 'wind', 'varied', 'colour'])
def test_the_true_push_reaches_the_goal(clips, domain):
    split = clips[domain]
    goals = make_goals(split, domain, range(6), 'cpu')
    assert goals.z.shape == (6, 1, 4, 24) and torch.equal(goals.target, split[range(6)][0][:, -1])
    assert reached(goals, split.actions[:6, 0]).max() < 1e-6
    assert reached(goals, -split.actions[:6, 0]).min() > 0.01


def where_pushed(goals, wrong=1.0):
    """A predictor whose features are the position, and goals to match; pushes count `wrong` times as hard."""
    matching = goals._replace(z=torch.tensor(goals.start)[:, None, None].float(),
                              target=torch.tensor(goals.end)[:, None].float())
    physics = goals.physics._replace(mu=goals.physics.mu[:1], mass=goals.physics.mass[:1])

    def predict(z, push):
        assert push.norm(dim=-1).max() <= 0.8 + 1e-6 and not torch.is_grad_enabled()
        return z[:, 0] + torch.tensor(slide(wrong * push.numpy(), physics, SECONDS)).float()[:, None]
    return predict, matching


def test_with_a_perfect_predictor_goals_are_reached_and_a_wrong_one_misses(clips):
    predict, goals = where_pushed(make_goals(clips['B'], 'B', range(6), 'cpu'))
    pushes = plan_pushes(predict, goals, 0.8)
    assert reached(goals, pushes).max() < 0.02 and np.linalg.norm(pushes, axis=1).max() <= 0.8 + 1e-6
    off, ms = planning.plan(predict, goals, 0.8)
    assert np.array_equal(off, reached(goals, pushes)) and ms > 0
    predict, goals = where_pushed(goals, wrong=0.5)
    assert reached(goals, plan_pushes(predict, goals, 0.8)).mean() > 0.02


def test_a_goal_is_found_that_few_candidates_come_near():
    """As with features: far from the goal, where the object covers no part of it, all pushes are alike."""
    angle = np.random.default_rng(2).uniform(0, 2 * np.pi, 50)
    goals = 0.7 * np.stack([np.cos(angle), np.sin(angle)], -1)
    found = [planning.search(lambda tried: np.linalg.norm(tried - goal, axis=-1).clip(max=0.15), 0.8)
             for goal in goals]
    off = np.linalg.norm(found - goals, axis=-1)
    assert (off < 0.05).mean() >= 0.95 and np.linalg.norm(found, axis=-1).max() <= 0.8
