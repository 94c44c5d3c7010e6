"""Made-up worlds of phase A: what a predictor must have met to learn to adapt.

A stream is a few clips of A whose pushes are given in the terms of one made-up world, so the same motion has
another cause. Which world it is, only the clips of the stream can tell.

In a world a push g looks as this push does in A:  matrix (1 ± by looks) g - along + on top."""
from collections import namedtuple

import numpy as np
import torch
from scipy.stats import special_ortho_group

from hope import WorldHead

# Motion that goes far is the last that a predictor learns, so many worlds are light, with large gains.
LIGHT = 0.5
# Another camera is a turn or a mirror, a slope or wind a push on top, friction an amount along the push, a
# mass that depends on the object a gain by looks. Shares of the worlds, and standard deviations:
TURNED = 0.5                   # by any angle
SQUEEZED, SQUEEZE = 0.3, 0.4   # along some direction; of the logarithm
MIRRORED = 0.1
ON_TOP, PUSH_ON_TOP = 0.3, 0.32    # of each of its numbers, in mean pushes
ALONG, PUSH_ALONG = 0.3, 0.26      # in mean pushes
BY_LOOKS, LOOKS_GAIN = 0.4, 0.5    # of the logarithm

# Float32 tensors of S streams: matrix (S,A,A); on_top (S,1,A) and along (S,1,1), in mean pushes; direction
# (S,LOOKS), log_gain (S,1): objects on one side of this direction of looks have that gain, others minus it;
# sharp (S,1): whether the border between them is.
Worlds = namedtuple('Worlds', 'matrix on_top along direction log_gain sharp')


def draw_worlds(rng, streams, numbers, gain, plain):
    """A world for each stream from a numpy generator; pushes have so many numbers → Worlds.
    gain: the logarithm of the gain is uniform between minus and plus this, of light worlds from a third of it
    on. plain: share of worlds that are A."""
    def share(p):
        """A random share of the streams, as 0 or 1 (S,1)."""
        return (rng.random((streams, 1)) < p) * 1.0
    other = 1 - share(plain)
    matrix = np.empty((streams, numbers, numbers))
    least = np.where(share(LIGHT), gain / 3, -gain)
    gains = np.exp(other * rng.uniform(least, gain))
    turned, squeezed, mirrored = (other * share(p) for p in (TURNED, SQUEEZED, MIRRORED))
    for s in range(streams):
        turn, (axis, *_) = special_ortho_group.rvs(numbers, 2, rng)
        squeeze = np.exp(squeezed[s] * rng.normal(0, SQUEEZE))
        stretch = np.eye(numbers) + (squeeze - 1) * np.outer(axis, axis)
        stretch[:, 0] *= 1 - 2 * mirrored[s]
        matrix[s] = gains[s] * (turn if turned[s] else np.eye(numbers)) @ stretch
    worlds = Worlds(
        matrix,
        on_top=(other * share(ON_TOP) * rng.normal(0, PUSH_ON_TOP, (streams, numbers)))[:, None],
        along=(other * share(ALONG) * rng.normal(0, PUSH_ALONG, (streams, 1)))[:, None],
        direction=rng.normal(0, 1, (streams, WorldHead.LOOKS)),
        log_gain=other * share(BY_LOOKS) * rng.normal(0, LOOKS_GAIN, (streams, 1)),
        sharp=share(0.5))
    return Worlds(*(torch.from_numpy(array).float() for array in worlds))


def which_side(worlds, looks):
    """Where objects with looks (S,n,LOOKS) stand in worlds where looks count: from -1 to 1, (S,n)."""
    side = torch.einsum('snl,sl->sn', looks, worlds.direction)
    side = side / worlds.direction.norm(dim=-1, keepdim=True)
    return torch.where(worlds.sharp > 0, side.sign(), torch.tanh(2 * side))


def given_pushes(worlds, pushes, looks, mean_push):
    """Pushes (S,n,A) that in these worlds look as `pushes` do in A; looks (S,n,LOOKS): of WorldHead.looks."""
    push = pushes - mean_push * worlds.on_top
    size = push.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    # None becomes nothing at all, or turns round.
    push = push / size * (size + mean_push * worlds.along).clamp(min=0.1 * mean_push)
    push = push * torch.exp(-worlds.log_gain * which_side(worlds, looks))[..., None]
    return torch.linalg.solve(worlds.matrix[:, None], push[..., None])[..., 0]


def fitting(rng, worlds, pushes, looks, mean_push, usual, count):
    """Indices (S,count) of candidates' pushes (S,m,A) which are then given as strong as those of A, whose
    lengths are usual (n,): of each eighth of these equally many, as far as there are any. So in a world where
    pushes count for much, a stream has motion that goes far. Each strength is given to objects on both sides
    of the looks (S,m,LOOKS): if the heavy ones alone were pushed hard, the push would tell what is heavy."""
    length = given_pushes(worlds, pushes, looks, mean_push).norm(dim=-1).numpy()
    part = np.searchsorted(np.quantile(usual, np.linspace(0, 1, 9)), length)           # (S,m)
    side = (which_side(worlds, looks) > 0).numpy()
    same_part, same_side = (kind[:, :, None] == kind[:, None] for kind in (part, side))
    alike, others = (same_part & same_side).sum(2), (same_part & ~same_side).sum(2)
    fits = (part > 0) & (part < 9) & (others > 0)
    # The greatest of log w + Gumbel noise are a draw by the weights w.
    return np.argsort(np.log(alike) - 1e3 * fits - rng.gumbel(size=part.shape), axis=1)[:, :count]
