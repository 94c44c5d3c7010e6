"""
Phase A seen from nearer by: the split `zoom`, and the pushes that its clips look like.

What is seen from nearer by moves further, as if pushed harder. How much harder, an inverse dynamics that
knows only A reads at the smallest factor. M, what it makes of pushes, applied twice is zooming in twice.
"""
import math
import types

import numpy as np
import torch
from tqdm import tqdm

import data
from hope import InverseDynamics

ZOOM, ZOOMS = 1.2, 4      # a quarter of the clips is seen by each of the factors 1.2, 1.2^2, 1.2^3 and 1.2^4
FEWEST_CLIPS = 64         # of train: with fewer, no push can be read
BATCHES, CLIPS = 4000, 64     # of the inverse dynamics; after too few batches, pushes are read too weak
# Zoomed clips are used if this share of the pushes of val is read, and M explains this share of theirs.
LEAST_READ, LEAST_EXPLAINED = 0.98, 0.9
CLIP_WEIGHT = 30          # of each clip in the fit of M, against 1 of the M that leaves pushes as they are


def zoom_levels(clips):
    """How often each of so many clips is zoomed in by ZOOM, in rising order → (clips,) int, 1..ZOOMS."""
    return 1 + np.arange(clips) * ZOOMS // clips


def train_inverse(features, actions, seed, device):
    """An InverseDynamics that learns from stored features (n,T,N,D) and actions (n,T,A) alone."""
    clips, steps, patches, dim = features.shape
    grid = 2 * (math.isqrt(patches),)
    torch.manual_seed(seed)
    inverse = InverseDynamics(types.SimpleNamespace(
        steps=steps, grid=grid, feature_dim=dim, action_dim=actions.shape[-1])).to(device)
    inverse.scale.fill_(data.mean_push(actions))
    optimizer = torch.optim.AdamW(inverse.parameters(), lr=2e-3, betas=(0.9, 0.99))
    batches = min(BATCHES, 2 * clips)
    for i in tqdm(range(batches), 'inverse dynamics', disable=None):
        rate = min(1, (i + 1) / (0.04 * batches), (batches - i) / (0.7 * batches))
        optimizer.param_groups[0]['lr'] = 2e-3 * rate
        indices = data.batch_indices(clips, CLIPS, seed, i)
        z = data.normed(torch.from_numpy(features[indices])).to(device)
        optimizer.zero_grad()
        inverse.loss(z, torch.from_numpy(actions[indices]).to(device)).backward()
        torch.nn.utils.clip_grad_norm_(inverse.parameters(), 1.0)
        optimizer.step()
    return inverse


@torch.no_grad()
def read_pushes(inverse, features):
    """The pushes (n,A) in N·s that the inverse dynamics reads from stored features (n,T,N,D) float16."""
    parts = np.split(features, range(CLIPS, len(features), CLIPS))
    z = (data.normed(torch.from_numpy(part.copy())).to(inverse.scale.device) for part in parts)
    return torch.cat([inverse(part)[0] for part in z]).cpu()


def keys(a, scale):
    """Pushes a (n,A) → what M multiplies, (n,2A): a, and `scale` along it, as friction takes a constant."""
    return torch.cat([a, scale * a / a.norm(dim=1, keepdim=True)], 1)


def read_zoomed(train, val, zoomed, seed, device):
    """
    The pushes (n,A) float64 that zoomed clips look like, and what meta.json says of them, a dict. train, val,
    zoomed: each (features, actions); zoomed in the order of zoom_levels, its pushes as given.
    """
    inverse = train_inverse(*train, seed, device)
    scale = inverse.scale.item()
    pushed = torch.from_numpy(val[1][:, 0])
    error = read_pushes(inverse, val[0]) - pushed
    share = 1 - (error.square().sum() / pushed.square().sum()).item()
    given = torch.from_numpy(zoomed[1][:, 0]).double()
    levels = torch.from_numpy(zoom_levels(len(given)))
    # Harder pushes look like none that A showed.
    hardest = np.linalg.norm(train[1][:, 0], axis=1).max() / ZOOM ** 1.5
    readable = (levels == 1) & (given.norm(dim=1) <= hardest)
    seen = read_pushes(inverse, zoomed[0][readable.numpy()]).double()
    # M (A,2A): ridge regression towards (I, 0), in which each clip has the weight of a key of unit length.
    key = keys(given[readable], scale)
    weighted = CLIP_WEIGHT * key / key.square().sum(1, keepdim=True)
    identity = torch.eye(key.shape[1], dtype=key.dtype)
    start = identity[:, :given.shape[1]]
    M = torch.linalg.solve(identity + weighted.T @ key, start + weighted.T @ seen).T
    pushes = given
    for level in range(1, ZOOMS + 1):
        pushes = torch.where(levels[:, None] >= level, keys(pushes, scale) @ M.T, pushes)
    explained = 1 - ((pushes[readable] - seen).square().sum() / seen.square().sum()).item()
    used = share >= LEAST_READ and explained >= LEAST_EXPLAINED
    return pushes, dict(factor=ZOOM, M=M.tolist(), share_read=share, explained=explained, used=used)
