"""
Make a folder of clips in the layout of docs/own_data.md, from the built-in physics:

    python tests/thesis_folder.py clips                                              features, 7,000 clips
    python tests/thesis_folder.py clips --content=both --train=300 --test=40 --size=32         and pictures

All show one object that starts near the middle, and nothing slides further in B than in A.
"""
import os
import sys

import numpy as np
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data
from prepare import cosine_basis, patch_encode

# Number of its first clip: domain of a phase, weakest and strongest push in N·s
PHASES = {17000: ('A', 0.25, 0.80), 22000: ('B', 0.20, 0.36), 23000: ('A', 0.25, 0.80)}
# How near by it is seen from; its radius, and how far off the middle it may start, in metres
ZOOM, RADIUS, SCATTER = 1.6, 0.12, 0.02
# Side in pixels: frequencies that are kept
DIM = {32: 24, 64: 48, 256: 1024}


def simulate(number, clips, seed=1):
    """Clips of the phase that begins with a number: see data.simulate."""
    domain, *impulse = PHASES[number]
    usual, data.IMPULSE = data.IMPULSE, impulse
    drawn = data.simulate(domain, clips, seed, f'thesis_{number}', ZOOM)
    data.IMPULSE = usual
    drawn['corners'][:], drawn['radius'][:], drawn['colour'][:] = 64, RADIUS, (0.9, 0.5, 0.3)
    start = data.WORLD / 2 + np.random.default_rng([seed, number]).uniform(-SCATTER, SCATTER, (clips, 1, 2))
    drawn['position'] += start - drawn['position'][:, :1]
    return drawn


def write_clip(folder, impulse, frames, features):
    """One clip: a push (2,), frames (16,H,W,3) uint8 and features (T,N,D), of which either may be None."""
    arrays = {'actions_states/actions.npy': np.pad([impulse], ((1, 14), (0, 0))),
              'feature_maps/vjepa2_vitl16.npy': features}
    for name, array in arrays.items():
        if array is not None:
            os.makedirs(os.path.dirname(f'{folder}/{name}'))
            np.save(f'{folder}/{name}', array)
    for i, frame in enumerate(() if frames is None else frames, 1):
        os.makedirs(f'{folder}/rgb', exist_ok=True)
        Image.fromarray(frame).save(f'{folder}/rgb/frame_{i:05d}.png')


def make_folder(folder, content='features', train=5000, test=1000, size=64):
    """Write clips of A, and test clips of B and of A2; features, pictures or both, of size x size pixels."""
    basis = cosine_basis(DIM[int(size)])
    for number in PHASES:
        drawn = simulate(number, int(train if number == 17000 else test))
        for i in range(len(drawn['mu'])):
            frames = data.render({key: values[i:i + 1] for key, values in drawn.items()}, int(size))
            features = patch_encode(frames, basis)[0].half().numpy() if content != 'pictures' else None
            pictures = frames[0].numpy() if content != 'features' else None
            write_clip(f'{folder}/clip_{number + i}', drawn['impulse'][i], pictures, features)


if __name__ == '__main__':
    make_folder(sys.argv[1], **dict(arg[2:].split('=') for arg in sys.argv[2:]))
