"""planning.py: choosing the push that brings the object to a goal picture."""
import numpy as np
import pytest
import torch

import planning
from configurator import Refusal
from data import DOMAINS, open_split
from planning import make_goals, milliseconds, plan_pushes, plan_with_simulator, pushed, reached


@pytest.fixture(scope='module')
def goals(tiny):
    return {domain: make_goals(open_split(tiny, f'test_{domain}'), domain, range(6), 'cpu')
            for domain in ('A', 'B', 'turned')}


def largest(tiny):
    return np.linalg.norm(open_split(tiny, 'train').actions[:, 0], axis=1).max()


@pytest.mark.parametrize('domain', ['A', 'B', 'turned'])
def test_the_true_push_reaches_the_goal(tiny, goals, domain):
    split = open_split(tiny, f'test_{domain}')
    assert goals[domain].z.shape == (6, 1, 4, 24) and goals[domain].target.shape == (6, 4, 24)
    assert torch.equal(goals[domain].target, split[range(6)][0][:, -1])
    assert reached(goals[domain], split.actions[:6, 0]).max() < 1e-6
    assert reached(goals[domain], -split.actions[:6, 0]).min() > 0.01


def test_how_far_pushes_bring_an_object():
    physics = DOMAINS['A']
    start = np.array([[0.4, 0.4]])
    assert np.array_equal(pushed(start, np.zeros((1, 2)), physics), start)
    # At rest after v / (mu g) = 0.425 s, at v^2 / (2 mu g).
    rest = pushed(start, np.array([[0.5, 0]]), physics, seconds=10)
    assert rest == pytest.approx(start + [[0.25 / (2 * 0.12 * 9.81), 0]])
    # An array of pushes for each object, and physics of its own.
    own = physics._replace(mu=np.array([[0.1], [0.2]]), mass=np.array([[1.0], [2.0]]))
    ends = pushed(np.zeros((2, 2)), np.array([[0.3, 0.4], [0.3, 0.4]]), own, seconds=0.1)
    assert ends[0] == pytest.approx((0.05 - 0.5 * 0.981 * 0.01) * np.array([0.6, 0.8]))
    assert ends[1] == pytest.approx((0.025 - 0.5 * 1.962 * 0.01) * np.array([0.6, 0.8]))


@pytest.mark.parametrize('domain', ['A', 'B', 'turned'])
def test_with_the_simulator_every_goal_is_reached(tiny, goals, domain):
    pushes = plan_with_simulator(goals[domain], largest(tiny))
    assert pushes.shape == (6, 2)
    assert reached(goals[domain], pushes).max() < 0.02


def where_pushed(goals, wrong=1.0):
    """A predictor whose features are the position, and goals to match; it takes pushes for `wrong` times as hard."""
    matching = goals._replace(z=torch.tensor(goals.start)[:, None, None].float(),
                              target=torch.tensor(goals.end)[:, None].float())
    physics = goals.physics._replace(mu=goals.physics.mu[:1], mass=goals.physics.mass[:1])

    def predict(z, push):
        return torch.tensor(pushed(z[:, 0, 0].numpy(), wrong * push.numpy(), physics)).float()[:, None]
    return predict, matching


def test_a_perfect_predictor_plans_as_well_as_the_simulator_and_a_wrong_one_misses(tiny, goals, monkeypatch):
    predict, matching = where_pushed(goals['B'])
    metres = reached(matching, plan_pushes(predict, matching, 0.8))
    assert metres.max() < 0.02
    # In batches of any size, and each time alike.
    monkeypatch.setattr(planning, 'AT_ONCE', 1)
    assert reached(matching, plan_pushes(predict, matching, 0.8)) == pytest.approx(metres, abs=1e-6)
    predict, matching = where_pushed(goals['B'], wrong=0.5)
    assert reached(matching, plan_pushes(predict, matching, 0.8)).mean() > 0.02


def test_no_push_is_larger_than_allowed(goals):
    predict, matching = where_pushed(goals['B'])
    asked = []

    def noted(z, push):
        asked.append(push.norm(dim=-1).max().item())
        assert not torch.is_grad_enabled()
        return predict(z, push)
    pushes = plan_pushes(noted, matching, 0.1)
    assert max(asked) <= 0.1 + 1e-6
    assert np.linalg.norm(pushes, axis=1).max() <= 0.1 + 1e-6


def test_planning_leaves_the_random_state_alone_and_is_timed_for_one_goal(goals):
    predict, matching = where_pushed(goals['A'])
    sizes = []

    def noted(z, push):
        sizes.append(len(z))
        return predict(z, push)
    before = torch.random.get_rng_state()
    assert milliseconds(noted, matching, 0.8) > 0
    assert set(sizes) == {planning.FIRST, planning.CANDIDATES}
    assert torch.equal(torch.random.get_rng_state(), before)


def test_clips_that_were_not_simulated_are_refused(tiny):
    split = open_split(tiny, 'test_B')
    with pytest.raises(Refusal, match='was not simulated'):
        make_goals(split, 'no such domain', range(2), 'cpu')
    split.physics = {}
    with pytest.raises(Refusal, match='was not simulated'):
        make_goals(split, 'B', range(2), 'cpu')


def test_a_goal_is_found_that_few_candidates_come_near():
    """As with features: far from the goal, where the object covers no part of it, one push is as good as another."""
    generator = torch.Generator().manual_seed(2)
    angle = 2 * torch.pi * torch.rand(100, generator=generator)
    goal = 0.7 * torch.stack([angle.cos(), angle.sin()], -1)[:, None]

    def cost(tried):
        return (tried - goal).norm(dim=-1).clamp(max=0.15)
    found = planning.cross_entropy(cost, 100, 0.8)
    off = (found - goal[:, 0]).norm(dim=-1)
    assert (off < 0.05).float().mean() >= 0.95
