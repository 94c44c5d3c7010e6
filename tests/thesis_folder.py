"""
Make a folder of clips in the user's layout (docs/own_data.md), from the built-in physics:

    python tests/thesis_folder.py clips                                                    features, 7,000 clips
    python tests/thesis_folder.py clips --content=both --train=300 --test=40 --size=32

clip_17000, ... are of domain A, clip_22000, ... of B, clip_23000, ... of A again. All show the same object, which starts near
the middle, and the pushes of B are so weak that nothing slides further than in A. A few hundred clips then suffice to learn
what a push does.
"""
import argparse
import os
import sys

import numpy as np
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if __name__ == '__main__':
    sys.path.insert(0, ROOT)

import data
from prepare import cosine_basis, patch_encode

# Number of the first clip of a phase: domain, weakest and strongest push in N·s.
PHASES = {17000: ('A', 0.25, 0.80), 22000: ('B', 0.20, 0.36), 23000: ('A', 0.25, 0.80)}
# How near by the object is seen from: see data.simulate.
ZOOM = 1.6
# Of the object in the picture, whose side counts as data.WORLD, in metres.
RADIUS = 0.12
# It starts at most so far from the middle, across and down.
SCATTER = 0.02
# Size of the pictures in pixels: lowest frequencies of a patch that are kept. 48 is the default of prepare.py, 1024 is ViT-L's.
DIM = {32: 24, 64: 48, 256: 1024}


def simulate(number, clips, seed=1):
    """Clips of the phase that begins with a number: see data.simulate."""
    domain, weakest, strongest = PHASES[number]
    usual = data.IMPULSE
    data.IMPULSE = weakest, strongest
    try:
        drawn = data.simulate(domain, clips, seed, f'thesis_{number}', ZOOM)
    finally:
        data.IMPULSE = usual
    drawn['corners'][:] = 64
    drawn['radius'][:] = RADIUS
    drawn['colour'][:] = 0.9, 0.5, 0.3
    start = data.WORLD / 2 + np.random.default_rng([seed, number]).uniform(-SCATTER, SCATTER, (clips, 1, 2))
    drawn['position'] += start - drawn['position'][:, :1]
    return drawn


def write_clip(folder, impulse, frames=None, features=None):
    """One clip: a push (2,), frames (16,H,W,3) uint8, features (T,N,D) float16."""
    os.makedirs(os.path.join(folder, 'actions_states'))
    actions = np.zeros((16, 2), np.float32)
    actions[1] = impulse
    np.save(os.path.join(folder, 'actions_states', 'actions.npy'), actions)
    if features is not None:
        os.makedirs(os.path.join(folder, 'feature_maps'))
        np.save(os.path.join(folder, 'feature_maps', 'vjepa2_vitl16.npy'), features)
    if frames is not None:
        os.makedirs(os.path.join(folder, 'rgb'))
        for i, frame in enumerate(frames, 1):
            Image.fromarray(frame).save(os.path.join(folder, 'rgb', f'frame_{i:05d}.png'))


def make_folder(folder, content='features', train=5000, test=1000, size=64):
    """Write train clips of phase A and test clips of B and of A2. content: features, pictures or both; size in pixels."""
    basis = cosine_basis(DIM[size])
    for number in PHASES:
        count = train if number == 17000 else test
        drawn = simulate(number, count)
        for start in range(0, count, 32):
            some = {key: values[start:start + 32] for key, values in drawn.items()}
            frames = data.render(some, size)
            features = patch_encode(frames, basis).half()
            for i in range(len(frames)):
                write_clip(os.path.join(folder, f'clip_{number + start + i}'), some['impulse'][i],
                           None if content == 'features' else frames[i].numpy(),
                           None if content == 'pictures' else features[i].numpy())


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('folder')
    parser.add_argument('--content', choices=['features', 'pictures', 'both'], default='features')
    parser.add_argument('--train', type=int, default=5000)
    parser.add_argument('--test', type=int, default=1000)
    parser.add_argument('--size', type=int, choices=list(DIM), default=64)
    args = parser.parse_args()
    make_folder(**vars(args))
