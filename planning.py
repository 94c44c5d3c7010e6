"""
What a world model is for: choosing the push that brings the object to a goal picture.

    goals = make_goals(open_split('slide', 'test_B'), 'B', range(200), 'cpu')
    pushes = plan_pushes(predict, goals, largest)       # predict(z (b,1,N,D), push (b,2)) → features (b,N,D)
    metres = reached(goals, pushes)                     # (200,): how far from the goal the object then is

Start and goal are the first and the last picture of a held-out clip, and their features are all that the planner sees.
It chooses the push whose predicted last step is nearest to the goal's, in L1, by the cross-entropy method: one jump for
each candidate, no rollout. Then the physics of the domain pushes the object.

"At the goal" means at the end of the clip, SECONDS after the push: the moment that the goal picture shows. Three out of
four objects are still sliding then in A, and nearly all in B.
"""
import math
import time
import typing

import numpy as np
import torch

from configurator import Refusal
from data import DOMAINS, FPS, FRAMES, TUBELET, Physics, displacement, turn
from model import feature_loss

# From the push to the last frame of a clip.
SECONDS = (FRAMES - TUBELET) / FPS
# The cross-entropy method. The first round has so many candidates that one comes near any goal: far from it, where the
# object covers no part of the goal's, the features do not say which push is better.
FIRST = 128
# Candidates of each later round, and how many of the best the next round looks around.
CANDIDATES = 16
ELITES = 3
ROUNDS = 5
SEED = 1
# Numbers in the features that are predicted at once: 1 MiB.
AT_ONCE = 2 ** 18
# How many plans are timed.
TIMED = 5


class Goals(typing.NamedTuple):
    """G goals: what the planner sees, and what only the simulator knows."""

    # Features of the start, (G,1,N,D), and of the goal, (G,N,D)
    z: torch.Tensor
    target: torch.Tensor
    # Position in metres, (G,2)
    start: np.ndarray
    end: np.ndarray
    # Its mu and mass are (G,1).
    physics: Physics


def make_goals(split, domain, indices, device):
    """
    The Goals of clips of a data.Split, which shows this domain of data.DOMAINS, on a device.

    Raises Refusal where the split has no physics in which a push could be tried.
    """
    if 'mu' not in split.physics or domain not in DOMAINS:
        raise Refusal(f'planning: {split.name} was not simulated, so no push can be tried there; use a data set of the '
                      'built-in physics')
    indices = np.asarray(indices)
    # One clip at a time: only two of its steps are kept.
    z = [split[[i]][0][:, [0, -1]] for i in indices]
    z = torch.cat(z).to(device)                                        # (G,2,N,D)
    mu = split.physics['mu'][indices, None]
    mass = split.physics['mass'][indices, None]
    position = split.physics['position'][indices]
    physics = Physics(mu, mass, DOMAINS[domain].camera)
    return Goals(z[:, :1], z[:, 1], position[:, 0], position[:, -1], physics)


def pushed(start, pushes, physics, seconds=SECONDS):
    """Where objects at `start` (...,2), in metres, are `seconds` after pushes (...,2) in N·s → (...,2)."""
    size = np.linalg.norm(pushes, axis=-1, keepdims=True)
    heading = turn(pushes, physics.camera) / np.maximum(size, 1e-12)
    return start + displacement(size, physics, seconds) * heading


def reached(goals, pushes):
    """How far from its goal each push (G,2) in N·s brings the object by the end of the clip → (G,) metres."""
    end = pushed(goals.start, pushes, goals.physics)
    return np.linalg.norm(end - goals.end, axis=-1)


def spread(largest):
    """Pushes (FIRST,2), spread evenly over all of at most `largest`, as seeds are in a sunflower."""
    k = torch.arange(FIRST, dtype=torch.float64)
    size = largest * ((k + 0.5) / FIRST).sqrt()
    angle = k * math.pi * (3 - math.sqrt(5))
    return torch.stack([size * angle.cos(), size * angle.sin()], -1)


def cross_entropy(cost, goals, largest):
    """
    Pushes of low cost for so many goals, none larger than `largest`, by the cross-entropy method (Rubinstein, 1999) →
    (goals,2) float64.

    cost: pushes (goals,k,2) → (goals,k). All goals and all calls share the same random numbers.
    """
    generator = torch.Generator().manual_seed(SEED)
    tried = spread(largest).expand(goals, FIRST, 2)
    for _ in range(ROUNDS):
        best = cost(tried).topk(ELITES, dim=1, largest=False).indices  # (goals,ELITES)
        elites = tried.gather(1, best[..., None].expand(-1, -1, 2))    # (goals,ELITES,2)
        mean = elites.mean(1, keepdim=True)
        std = elites.std(1, keepdim=True)
        noise = torch.randn(CANDIDATES - ELITES, 2, generator=generator, dtype=torch.float64)
        drawn = mean + std * noise
        # A push that is too large is shortened.
        size = drawn.norm(dim=-1, keepdim=True)
        drawn = drawn * (largest / size.clamp(min=largest))
        # Elites stay: where only one of them is near the goal, the Gaussian around their mean may miss it.
        tried = torch.cat([elites, drawn], 1)
    return mean[:, 0]


@torch.no_grad()
def plan_pushes(predict, goals, largest):
    """
    For each of the Goals, the push of at most `largest` N·s whose predicted last step is nearest to the goal's, in L1 →
    (G,2) array.

    predict: features of the start (b,1,N,D) and pushes (b,2) → features of the last step (b,N,D).
    """
    G, N, D = goals.target.shape

    def cost(tried):
        """The loss of candidates (G,k,2) → (G,k)."""
        k = tried.shape[1]
        at_once = max(1, AT_ONCE // (k * N * D))
        losses = []
        for first in range(0, G, at_once):
            some = slice(first, first + at_once)
            push = tried[some].flatten(0, 1).float().to(goals.z.device)
            z = goals.z[some].repeat_interleave(k, 0)
            target = goals.target[some].repeat_interleave(k, 0)
            losses.append(feature_loss(predict(z, push), target))
        return torch.cat(losses).view(G, k).cpu()
    return cross_entropy(cost, G, largest).numpy()


def plan_with_simulator(goals, largest):
    """plan_pushes with the physics as predictor and metres as loss → (G,2) array: what the planner itself can do."""
    def by_candidate(array):
        """(G,k) → (G,1,k)."""
        return array[:, None]
    physics = Physics(by_candidate(goals.physics.mu), by_candidate(goals.physics.mass), goals.physics.camera)

    def cost(tried):
        """How far from the goal candidates (G,k,2) come → (G,k)."""
        end = pushed(by_candidate(goals.start), tried.numpy(), physics)
        return torch.from_numpy(np.linalg.norm(end - by_candidate(goals.end), axis=-1))
    return cross_entropy(cost, len(goals.start), largest).numpy()


def milliseconds(predict, goals, largest):
    """How long it takes to plan for one goal alone, the median of some."""
    seconds = []
    for i in range(min(TIMED, len(goals.start))):
        one = goals._replace(z=goals.z[i:i + 1], target=goals.target[i:i + 1])
        started = time.perf_counter()
        plan_pushes(predict, one, largest)
        seconds.append(time.perf_counter() - started)
    return 1000 * float(np.median(seconds))
