"""
Phase A seen from nearer by: the split `zoom`, and the pushes that its clips look like.

What is seen from nearer by moves further, so in terms of phase A it was pushed harder. How much harder is read from the
features, as in a new world: an inverse dynamics that knows only A reads a push from each clip at the smallest factor, and
an action memory M learns what the given pushes become. M applied twice is zooming in twice.
"""
import copy
import math
import types

import numpy as np
import torch

import data
from hope import ActionMemory
from support.shards import kept_clips, save
from support.terminal import progress

# A quarter of the clips is seen by each of the factors 1.2, 1.2^2, 1.2^3 and 1.2^4.
ZOOM = 1.2
ZOOMS = 4
# With fewer clips of train, no push can be read.
FEWEST_CLIPS = 64
# Most batches that the inverse dynamics is trained on, and clips per batch. After too few it reads all pushes too weak.
INVERSE_BATCHES = 4000
INVERSE_CLIPS = 64
# If it reads less than this share of the pushes of val, the pushes of zoomed clips are not to be trusted.
LEAST_READ = 0.98
# Nor if M explains less than this share of what was read from zoomed clips (0.99 for the built-in physics).
LEAST_EXPLAINED = 0.9


def zoom_levels(clips):
    """How often each of so many clips is zoomed in by ZOOM, in rising order → (clips,) int, 1..ZOOMS."""
    return 1 + np.arange(clips) * ZOOMS // clips


def why_not_zoomed(train, shape, content):
    """Why no clips can be zoomed in, in words; '' where they can. train: its Source; shape: [T, N, D]; content: of one clip."""
    if content.dtype != torch.uint8:
        return 'imported features cannot be cropped'
    if train.count < FEWEST_CLIPS:
        return f'train has fewer than {FEWEST_CLIPS} clips'
    if shape[0] < 3:
        return 'its clips have fewer than three steps'
    if train.several_pushes:
        return 'clips with several pushes cannot be zoomed in on'
    if train.states([0]) is not None:
        return 'clips with states cannot be zoomed in on'
    return ''


def new_inverse(shape, numbers, seed, device):
    """An untrained ActionMemory for features of shape [T, N, D] and pushes of so many numbers, and its optimiser."""
    steps, patches, dim = shape
    side = math.isqrt(patches)
    # Not model.Sizes: with a new default there, every data set would count as made by other code.
    sizes = types.SimpleNamespace(steps=steps, grid=[side, side], feature_dim=dim, action_dim=numbers)
    torch.manual_seed(seed)
    memory = ActionMemory(sizes).to(device)
    return memory, torch.optim.AdamW(memory.parameters(), lr=2e-3, betas=(0.9, 0.99))


def inverse_step(memory, optimizer, z, a):
    """One step of training an ActionMemory on clips z (B,T,N,D) and actions a (B,T,A)."""
    loss = memory.loss(z, a)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(memory.parameters(), 1.0)
    optimizer.step()


def inverse_batches(clips):
    """On how many batches the inverse dynamics is trained, with so many clips of train."""
    return min(INVERSE_BATCHES, 2 * clips)


def train_inverse(train, seed, device):
    """An ActionMemory whose inverse dynamics was trained on a data.Split, of phase A alone."""
    memory, optimizer = new_inverse(train.manifest['shape'], train.actions.shape[-1], seed, device)
    memory.scale.fill_(data.mean_push(train.actions))
    batches = inverse_batches(len(train))
    for i in progress(range(batches), 'inverse dynamics', 'batches'):
        warmup = min(1, (i + 1) / (0.04 * batches))
        decay = min(1, (batches - i) / (0.7 * batches))
        for group in optimizer.param_groups:
            group['lr'] = 2e-3 * warmup * decay
        z, a = train[data.batch_indices(len(train), INVERSE_CLIPS, seed, i)]
        inverse_step(memory, optimizer, z.to(device), a.to(device))
    return memory


@torch.no_grad()
def read_pushes(memory, clips, indices, device):
    """The pushes (n,A) in N·s that the inverse dynamics reads from clips of a data.Split."""
    pushes = torch.empty(len(indices), clips.actions.shape[-1])
    for start in range(0, len(indices), INVERSE_CLIPS):
        some = slice(start, start + INVERSE_CLIPS)
        z, _ = clips[indices[some]]
        z = z[:, :memory.inverse.steps].to(device)
        pushes[some] = (memory.scale * memory.inverse(z)).cpu()
    return pushes


def share_read(memory, clips, device):
    """The share of the pushes of a data.Split, as the mean of their squares, that the inverse dynamics reads; at most 1."""
    given = torch.from_numpy(clips.actions[:, 0])
    error = read_pushes(memory, clips, range(len(clips)), device) - given
    return 1 - (error.square().sum() / given.square().sum()).item()


def association(memory, given, seen):
    """
    M (A,2A), which makes the pushes `seen` of the pushes `given`, each (n,A) float64, by least squares.

    It is what an action memory holds that was shown all of them and has forgotten none (see hope.ActionMemory).
    """
    key, length = memory.key(given)
    pair = torch.cat([key, seen / length], -1)
    state = memory.WRITE_RATE * key.T @ pair                           # (2A,3A)
    return memory.matrix(state[None])[0]


def zoomed_pushes(memory, M, pushes, levels):
    """Pushes (n,A) as they look after zooming in levels (n,) times, each time by M (A,2A)."""
    zoomed = pushes.clone()
    for level in range(1, ZOOMS + 1):
        key, length = memory.key(zoomed)
        further = length * (key @ M.mT)
        zoomed = torch.where(levels[:, None] >= level, further, zoomed)
    return zoomed


def pushes_of_zoomed(train, clips, levels, seed, device):
    """
    The pushes that zoomed clips look like, read with an inverse dynamics that is trained on `train` → (pushes (n,A) float64,
    M (A,2A), the share of what was read that M explains, the ActionMemory). train, clips: data.Splits, clips with the pushes
    that were given; levels (n,) int.
    """
    memory = train_inverse(train, seed, device)
    given = torch.from_numpy(clips.actions[:, 0]).double()
    size = given.norm(dim=1)
    # Harder pushes look like none that A showed.
    hardest = np.linalg.norm(train.actions[:, 0], axis=1).max() / ZOOM ** 1.5
    readable = ((levels == 1) & (size <= hardest)).nonzero()[:, 0]
    seen = read_pushes(memory, clips, readable, device).double()
    exact = copy.deepcopy(memory).cpu().double()
    M = association(exact, given[readable], seen)
    pushes = zoomed_pushes(exact, M, given, levels)
    unexplained = (pushes[readable] - seen).square().sum() / seen.square().sum()
    return pushes, M, 1 - unexplained.item(), memory


def doubts(share_read, explained):
    """Why the pushes of zoomed clips are not to be trusted, in words; '' where they are. Both are shares, at most 1."""
    if share_read < LEAST_READ:
        return f'there are too few clips to read their pushes well (only {max(0, share_read):.1%} of those of val)'
    if explained < LEAST_EXPLAINED:
        return (f'the pushes read from them do not go with those given (only {max(0, explained):.0%}), as where all objects '
                'start in one place')
    return ''


def write_zoomed_pushes(folder, manifest, source, seed, device):
    """Replace the actions of the split `zoom`, which are the pushes that were given, by those that its clips look like."""
    train = data.Split(folder, 'train', manifest=manifest)
    clips = data.Split(folder, 'zoom', manifest=manifest)
    val = data.Split(folder, 'val', manifest=manifest)
    levels = torch.from_numpy(zoom_levels(source.count)[kept_clips(manifest, 'zoom', source)])
    pushes, M, explained, memory = pushes_of_zoomed(train, clips, levels, seed, device)
    share = share_read(memory, val, device)
    actions = np.zeros_like(clips.actions)
    actions[:, 0] = pushes.numpy()
    save(folder, manifest, 'zoom_actions.npy', lambda f: np.save(f, actions))
    size = np.linalg.norm(clips.actions[:, 0], axis=1)
    gains = []
    for level in range(1, ZOOMS + 1):
        members = (levels == level).numpy()
        gain = np.linalg.norm(pushes[members], axis=1).mean() / size[members].mean()
        gains.append(f'{gain:.2f}')
    print(f'zoomed clips: pushes read x {", ".join(gains)} (mean) of what was given')
    why_not = doubts(share, explained)
    if why_not:
        print(f'zoomed clips: {why_not}; train.py will leave them out')
    manifest['zoom'] = {'factor': ZOOM, 'M': M.tolist(), 'share_read': share, 'explained': explained, 'used': not why_not}
