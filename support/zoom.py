"""
Phase A seen from nearer by: the split `zoom`, and the pushes that its clips look like.

What is seen from nearer by moves further, as if pushed harder. How much harder, an inverse dynamics that
knows only A reads from clips at the smallest factor. M, what it makes of the given pushes, applied twice is
zooming in twice.
"""
import math
import types

import numpy as np
import torch
from tqdm import tqdm

import data
from hope import ActionMemory

ZOOM = 1.2                # a quarter of the clips is seen by each of the factors 1.2, 1.2^2, 1.2^3 and 1.2^4
ZOOMS = 4
FEWEST_CLIPS = 64         # of train: with fewer, no push can be read
INVERSE_BATCHES = 4000    # after too few, all pushes are read too weak
INVERSE_CLIPS = 64        # in each of them
LEAST_READ = 0.98         # zoomed clips are used if this share of the pushes of val is read,
LEAST_EXPLAINED = 0.9     # and M explains this share of theirs


def zoom_levels(clips):
    """How often each of so many clips is zoomed in by ZOOM, in rising order → (clips,) int, 1..ZOOMS."""
    return 1 + np.arange(clips) * ZOOMS // clips


def train_inverse(features, actions, seed, device):
    """An ActionMemory whose inverse dynamics learns from stored features (n,T,N,D), actions (n,T,A) alone."""
    clips, steps, patches, dim = features.shape
    grid = 2 * (math.isqrt(patches),)
    sizes = types.SimpleNamespace(steps=steps, grid=grid, feature_dim=dim, action_dim=actions.shape[-1])
    torch.manual_seed(seed)
    memory = ActionMemory(sizes).to(device)
    memory.scale.fill_(data.mean_push(actions))
    optimizer = torch.optim.AdamW(memory.parameters(), lr=2e-3, betas=(0.9, 0.99))
    batches = min(INVERSE_BATCHES, 2 * clips)
    for i in tqdm(range(batches), 'inverse dynamics', disable=None):
        warmup = min(1, (i + 1) / (0.04 * batches))
        decay = min(1, (batches - i) / (0.7 * batches))
        optimizer.param_groups[0]['lr'] = 2e-3 * warmup * decay
        indices = data.batch_indices(clips, INVERSE_CLIPS, seed, i)
        z = data.normed(torch.from_numpy(features[indices])).to(device)
        a = torch.from_numpy(actions[indices]).to(device)
        optimizer.zero_grad()
        memory.loss(z, a).backward()
        torch.nn.utils.clip_grad_norm_(memory.parameters(), 1.0)
        optimizer.step()
    return memory


@torch.no_grad()
def read_pushes(memory, features):
    """The pushes (n,A) in N·s that the inverse dynamics reads from stored features (n,T,N,D) float16."""
    pushes = []
    for part in np.split(features, range(INVERSE_CLIPS, len(features), INVERSE_CLIPS)):
        z = data.normed(torch.from_numpy(part.copy()))
        pushes.append(memory.scale * memory.inverse(z.to(memory.scale.device)))
    return torch.cat(pushes).cpu()


def read_zoomed(train, val, zoomed, seed, device):
    """
    The pushes (n,A) float64 that zoomed clips look like, and what meta.json says of them, a dict. train, val,
    zoomed: each (features, actions); zoomed in the order of zoom_levels, its pushes as given.
    """
    features, actions = zoomed
    given = torch.from_numpy(actions[:, 0]).double()
    levels = torch.from_numpy(zoom_levels(len(given)))
    # Harder pushes look like none that A showed.
    hardest = np.linalg.norm(train[1][:, 0], axis=1).max() / ZOOM ** 1.5
    readable = (levels == 1) & (given.norm(dim=1) <= hardest)
    memory = train_inverse(*train, seed, device)
    pushed = torch.from_numpy(val[1][:, 0])
    error = read_pushes(memory, val[0]) - pushed
    share = 1 - (error.square().sum() / pushed.square().sum()).item()
    seen = read_pushes(memory, features[readable.numpy()]).double()
    memory = memory.cpu().double()
    key, length = memory.key(given[readable])
    state = memory.WRITE_RATE * key.T @ torch.cat([key, seen / length], -1)        # (2A,3A)
    M = memory.matrix(state[None])[0]                                              # (A,2A)
    pushes = given.clone()
    for level in range(1, ZOOMS + 1):
        key, length = memory.key(pushes)
        pushes = torch.where(levels[:, None] >= level, length * (key @ M.mT), pushes)
    explained = 1 - ((pushes[readable] - seen).square().sum() / seen.square().sum()).item()
    used = share >= LEAST_READ and explained >= LEAST_EXPLAINED
    return pushes, dict(factor=ZOOM, M=M.tolist(), share_read=share, explained=explained, used=used)
