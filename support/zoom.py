"""
Phase A seen from nearer by: the split `zoom`, and the pushes that its clips look like.

What is seen from nearer by moves further, so in terms of A it was pushed harder. How much harder is read from
the features: an inverse dynamics that knows only A reads a push from each clip at the smallest factor, and an
action memory M learns what the given pushes become. M applied twice is zooming in twice.
"""
import math
import types

import numpy as np
import torch
from tqdm import tqdm

import data
from hope import ActionMemory

# A quarter of the clips is seen by each of the factors 1.2, 1.2^2, 1.2^3 and 1.2^4.
ZOOM, ZOOMS = 1.2, 4
# With fewer clips of train no push can be read, and after too few batches all are read too weak.
FEWEST_CLIPS, INVERSE_BATCHES, INVERSE_CLIPS = 64, 4000, 64
# Zoomed clips are used if this share of the pushes of val is read, and M explains this share of theirs.
LEAST_READ, LEAST_EXPLAINED = 0.98, 0.9


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
    for start in range(0, len(features), INVERSE_CLIPS):
        z = data.normed(torch.from_numpy(features[start:start + INVERSE_CLIPS].copy()))
        pushes.append(memory.scale * memory.inverse(z.to(memory.scale.device)))
    return torch.cat(pushes).cpu()


def association(memory, given, seen):
    """M (A,2A) of an ActionMemory that forgets nothing, shown pushes given and seen, each (n,A) float64."""
    key, length = memory.key(given)
    pair = torch.cat([key, seen / length], -1)
    state = memory.WRITE_RATE * key.T @ pair                           # (2A,3A)
    return memory.matrix(state[None])[0]


def zoomed_pushes(memory, M, pushes, levels):
    """Pushes (n,A) as they look after zooming in levels (n,) times, each time by M (A,2A)."""
    zoomed = pushes.clone()
    for level in range(1, ZOOMS + 1):
        key, length = memory.key(zoomed)
        zoomed = torch.where(levels[:, None] >= level, length * (key @ M.mT), zoomed)
    return zoomed


def read_zoomed(train, val, zoomed, seed, device):
    """
    The pushes (n,A) float64 that zoomed clips look like, and what meta.json says of them, a dict.

    train, val, zoomed: each (features, actions); zoomed in the order of zoom_levels, its pushes as given.
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
    # At most 1, as for the share that M explains.
    share = 1 - (error.square().sum() / pushed.square().sum()).item()
    seen = read_pushes(memory, features[readable.numpy()]).double()
    memory = memory.cpu().double()
    M = association(memory, given[readable], seen)
    pushes = zoomed_pushes(memory, M, given, levels)
    explained = 1 - ((pushes[readable] - seen).square().sum() / seen.square().sum()).item()
    used = share >= LEAST_READ and explained >= LEAST_EXPLAINED
    says = {'factor': ZOOM, 'M': M.tolist(), 'share_read': share, 'explained': explained, 'used': used}
    return pushes, says
