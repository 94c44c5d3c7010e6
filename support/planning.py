"""
The object's position, read out of features, and what a world model is for: pushes that reach a goal picture.

    readout = fit_readout(Clips('slide', 'train'), 'cpu')     # features z (...,N,D) → (...,2) metres
    goals = make_goals(Clips('slide', 'test_B'), 'B', range(200), 'cpu')
    metres, ms = plan(predict, goals, largest)                # predict: z (b,1,N,D), push (b,2) → (b,N,D)

The read-out is fitted to true features of training clips of A. A goal is the last picture of a held-out clip.
The planner sees features only, and chooses the push whose predicted last step is nearest to the goal's in L1.
"""
import functools
import time
from collections import namedtuple

import numpy as np
import torch
import torch.nn as nn
from scipy.optimize import differential_evolution

from data import DOMAINS, FPS, FRAMES, TUBELET, WORLD, batch_indices, slide
from model import feature_loss

SEED = 1
KEPT = 2048      # numbers of a picture that the read-out reads: a linear map of each patch, then an MLP
STEPS, BATCH, RATE = 1500, 16, 3e-3
SECONDS = (FRAMES - TUBELET) / FPS       # from the push to the last frame of a clip


def positions(clips, indices):
    """Where the objects of data.Clips are at the last frame of each time step → (n,T,2) metres."""
    position = clips.physics['position'][indices]
    return torch.from_numpy(position[:, TUBELET - 1::TUBELET]).float()


def fit_readout(clips, device):
    """What reads positions out of features, (...,N,D) → (...,2) metres, fitted by L1 to data.Clips."""
    _, N, D = clips.meta['shape']
    kept = min(D, max(1, KEPT // N))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        net = nn.Sequential(nn.Linear(D, kept), nn.Flatten(-2), nn.Linear(N * kept, 128), nn.GELU(),
                            nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 2)).to(device)

    def readout(z):
        return (net(z.float()) + 1) * (WORLD / 2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE)
    steps = min(STEPS, len(clips))
    for i in range(steps):
        optimizer.param_groups[0]['lr'] = RATE * (1 - i / steps)
        indices = batch_indices(len(clips), BATCH, SEED, i)
        z, _ = clips[indices]
        loss = (readout(z.to(device)) - positions(clips, indices).to(device)).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.requires_grad_(False)
    return readout


# G goals. The planner sees features: z (G,1,N,D) of the start, target (G,N,D). The simulator knows start and
# end (G,2) in metres, and the physics, whose mu and mass are (G,1).
Goals = namedtuple('Goals', 'z target start end physics')


def make_goals(clips, domain, indices, device):
    """The Goals of some data.Clips, which show this domain of data.DOMAINS, on a device."""
    assert 'mu' in clips.physics, f'planning: {clips.name} was not simulated, so no push can be tried there'
    indices = np.asarray(indices)
    z = clips[indices][0].to(device)
    position = clips.physics['position'][indices]
    mu, mass = (clips.physics[name][indices, None] for name in ('mu', 'mass'))
    physics = DOMAINS[domain]._replace(mu=mu, mass=mass)
    return Goals(z[:, :1], z[:, -1], position[:, 0], position[:, -1], physics)


def reached(goals, pushes):
    """How far from its goal each push (...,G,2) brings the object by the clip's end → (...,G) metres."""
    return np.linalg.norm(goals.start + slide(pushes, goals.physics, SECONDS) - goals.end, axis=-1)


def search(cost, largest):
    """A push (2,) of low cost, pushes (k,2) → (k,), and at most `largest` long, by differential evolution."""
    def push(polar):
        return np.stack([polar[0] * np.cos(polar[1]), polar[0] * np.sin(polar[1])], -1)
    # The first candidates are so many that one comes near any goal: where the object covers no part of the
    # goal's, the features do not say which push is better.
    found = differential_evolution(
        lambda polar: cost(push(polar)), [(0, largest), (0, 2 * np.pi)], init='sobol', popsize=64, maxiter=4,
        tol=0, vectorized=True, updating='deferred', polish=False, seed=SEED)
    return push(found.x)


@torch.no_grad()
def plan_pushes(predict, goals, largest):
    """For each goal the push, of at most `largest` N·s, whose predicted last step is nearest in L1, (G,2)."""
    def cost(tried, z, target):
        pushes = torch.from_numpy(tried).float().to(z.device)
        return feature_loss(predict(z.expand(len(pushes), 1, -1, -1), pushes), target).cpu().numpy()
    return np.stack([search(functools.partial(cost, z=z, target=target), largest)
                     for z, target in zip(goals.z, goals.target)])


def plan(predict, goals, largest):
    """plan_pushes → how far from its goal each push brings the object, (G,) metres, and ms of a plan."""
    started = time.perf_counter()
    pushes = plan_pushes(predict, goals, largest)
    seconds = time.perf_counter() - started
    return reached(goals, pushes), 1000 * seconds / len(pushes)
