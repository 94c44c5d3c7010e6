"""
The object's position in metres, read out of features: an error that a person can picture.

    readout = fit_readout(open_split('slide', 'train'), 'cpu')      # a few seconds
    place = readout(z)                                              # z (...,N,D) → (...,2) metres
    floor = readout_error(readout, open_split('slide', 'test_B'), range(200))

It is fitted to true features of training clips of phase A alone, and no method has a part in it. The floor is its error
on true features; a prediction cannot be told to be better than that. A linear read-out will not do: it is 8 cm off.
"""
import numpy as np
import torch
import torch.nn as nn

from configurator import Refusal
from data import TUBELET, WORLD, batch_indices

# Numbers of a picture, in all its patches together, that are read.
KEPT = 2048
HIDDEN = 128
# How it is fitted: so often clips are read, and after each time so many steps are taken, on so many pictures each.
READS = 30
STEPS = 50
PICTURES = 64
RATE = 3e-3
SEED = 1
# Clips that are read at once: so many, and at most so many numbers in their features, 1 GiB.
CLIPS = 500
AT_ONCE = 2 ** 28


class Readout(nn.Module):
    """Features → position in metres: a linear map that all patches share, then an MLP over all of them."""

    def __init__(self, patches, dim):
        super().__init__()
        kept = min(dim, max(1, KEPT // patches))
        self.patch = nn.Linear(dim, kept)
        self.picture = nn.Sequential(
            nn.Linear(patches * kept, HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, 2),
        )

    def forward(self, z):
        """z (...,N,D) layer-normed → (...,2) metres, from the upper left corner to the right and down."""
        x = self.patch(z.float()).flatten(-2)                          # (...,N*kept)
        return (self.picture(x) + 1) * (WORLD / 2)


def positions(split, indices):
    """
    Where the objects of clips of a data.Split are at each time step → (n,T,2) metres.

    The features of a step are those of its last frame. Raises Refusal where positions are not known.
    """
    if 'position' not in split.physics:
        raise Refusal(f'{split.name} has no positions of an object, so none can be read out')
    position = split.physics['position'][indices]
    return torch.from_numpy(position[:, TUBELET - 1::TUBELET]).float()


def fit_readout(split, device):
    """
    The Readout of a data.Split, on a device, fitted by L1 to true features.

    Clips are read from disk some at a time. The result depends on the split alone; no global random state is touched.
    Raises Refusal where positions are not known.
    """
    T, N, D = split.manifest['shape']
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        readout = Readout(N, D).to(device)
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(readout.parameters(), lr=RATE)
    clips = max(1, min(CLIPS, len(split), AT_ONCE // (T * N * D)))
    steps = STEPS * max(1, min(READS, len(split) // 48))
    for i in range(steps):
        if i % STEPS == 0:
            indices = batch_indices(len(split), clips, SEED, i // STEPS)
            true = positions(split, indices).flatten(0, 1).to(device)  # (clips*T,2)
            z, _ = split[indices]
            z = z.flatten(0, 1).to(device)                             # (clips*T,N,D)
        for group in optimizer.param_groups:
            group['lr'] = RATE * (1 - i / steps)
        drawn = torch.randint(len(z), (PICTURES,), generator=generator).to(device)
        loss = (readout(z[drawn]) - true[drawn]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return readout.requires_grad_(False)


def readout_error(readout, split, indices):
    """Mean error in metres of a Readout on the true features of clips of a data.Split, over all their time steps."""
    device = next(readout.parameters()).device
    T, N, D = split.manifest['shape']
    at_once = max(1, AT_ONCE // (T * N * D))
    indices = np.asarray(indices)
    errors = []
    for first in range(0, len(indices), at_once):
        some = indices[first:first + at_once]
        z, _ = split[some]
        off = readout(z.to(device)).cpu() - positions(split, some)
        errors.append(off.norm(dim=-1))
    return torch.cat(errors).mean().item()
