"""
Prepare features: simulate clips, encode them with a frozen encoder, write shards that train.py and adapt.py read.

    python prepare.py                                    the laptop default: data/slide, under a minute
    python prepare.py --name=slide256 --size=256 --dim=1024 --clips=1000        full-size tensors
    python prepare.py --name=x --clips=200 --test_clips=60                      a small set to play with

Interrupted, it goes on where it stopped; a finished set is left alone. data/<name>/clips.png shows clips of each
domain, data/<name>/displacement.png how far objects slide in A and B.
"""
import json
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

import data
from configurator import Refusal, configure

# what to make
name = 'slide'           # data set: data/<name> beside the code, or a folder if it contains a slash
clips = 12000            # clips in train [1..]
test_clips = 600         # clips in val, fit_B and each test_<domain> [1..]
seed = 1                 # every random number of the set follows from it [0..]
# how to encode
size = 64                # picture size in pixels, a multiple of 16 [16..]
dim = 48                 # D, features per patch: the lowest frequencies kept [3..1536]
# where
device = 'cpu'           # cpu, cuda or mps
settings = configure(globals())

PATCH = 16                   # pixels per patch side, as in ViT-L/16
SHARD_BYTES = 128 * 2**20    # an interrupted run loses at most one shard
SPLITS = {'train': ('A', clips), 'val': ('A', test_clips), 'fit_B': ('B', test_clips),
          **{f'test_{domain}': (domain, test_clips) for domain in data.DOMAINS}}
if size % PATCH:
    raise Refusal(f'--size={size}: must be a multiple of {PATCH}')


def cosine_basis():
    """
    The lowest frequencies of the orthonormal 3D cosine basis (DCT-II) of a TUBELET x 16 x 16 block →
    (TUBELET*16*16, ceil(dim/3)) float32, columns by rising frequency in cycles; each serves the three colours.
    """
    def axis(n):
        k, i = np.arange(n)[:, None], np.arange(n)[None]
        return np.cos(np.pi * k * (2 * i + 1) / (2 * n)) * np.where(k == 0, 1, np.sqrt(2)) / np.sqrt(n)  # (k,i)
    shape = data.TUBELET, PATCH, PATCH
    basis = np.einsum('ai,bj,ck->abcijk', *map(axis, shape)).reshape(np.prod(shape), np.prod(shape))
    frequency = sum((k / n) ** 2 for k, n in zip(np.indices(shape), shape)).ravel()
    lowest = np.argsort(frequency, kind='stable')[:-(-dim // 3)]
    return torch.from_numpy(basis[lowest].T.astype(np.float32)).to(device)


def patch_encode(blocks):
    """Frozen `patch` encoder: pixels of tubelets (n,T,N,3,512) → features (n,T,N,dim); no step sees another's frames."""
    return (blocks @ basis).transpose(-1, -2).flatten(-2)[..., :dim]  # frequency-major, colours side by side


def fit_decoder(clips):
    """
    Least squares from layer-normed features to a tubelet's pixels → float32 (D+1, 3*512), the last row the bias.
    It turns predicted features back into pictures (data.pictures), whatever the encoder was.
    """
    xx, xy = 0, 0
    for start in range(0, len(clips['mu']), 64):
        blocks = data.tubelets(data.render(cut(clips, start, start + 64), size, device), PATCH)
        x = F.pad(F.layer_norm(patch_encode(blocks), (dim,)), (0, 1), value=1.0).flatten(0, 2).double()
        xx, xy = xx + x.T @ x, xy + x.T @ blocks.flatten(3).flatten(0, 2).double()
    ridge = 1e-6 * xx.diagonal().mean() * torch.eye(dim + 1, dtype=xx.dtype, device=xx.device)
    return torch.linalg.solve(xx + ridge, xy).float().cpu().numpy()


def cut(clips, start, end):
    """The clips start..end of a dict of arrays."""
    return {key: value[start:end] for key, value in clips.items()}


def save_manifest():
    data.write_atomically(manifest_path, lambda f: f.write(json.dumps(manifest, indent=1).encode()))


def save_array(file, array):
    """Write an array atomically → its sha256."""
    path = os.path.join(folder, file)
    data.write_atomically(path, lambda f: np.save(f, array))
    return data.sha256(path)


def draw_pictures():
    """clips.png: first, middle and last frame of clips of each domain; displacement.png: how far A and B slide."""
    try:
        import matplotlib
        matplotlib.use('Agg')
        import matplotlib.pyplot as plt
    except ImportError:
        print('no pictures: pip install matplotlib')
        return
    shown = 8
    fig, axes = plt.subplots(len(data.DOMAINS), shown, figsize=(shown * 1.3, len(data.DOMAINS) * 1.5))
    for row, (domain, (mu, mass)) in zip(axes, data.DOMAINS.items()):
        drawn = data.simulate(domain, shown, seed, 'test_A')  # the same draws in every row: only the physics differs
        frames = data.render(drawn, 128).float() / 255
        ghost = torch.stack([0.4 * frames[:, 0], 0.65 * frames[:, data.FRAMES // 2], frames[:, -1]]).amax(0)
        for ax, picture in zip(row, ghost):
            ax.imshow(picture)
            ax.set_xticks([]), ax.set_yticks([])
        row[0].set_ylabel(f'{domain}\nμ {mu}, {mass} kg')
    fig.suptitle('The same impulses in every domain: first (dim), middle and last (bright) frame in one picture')
    fig.tight_layout()
    fig.savefig(os.path.join(folder, 'clips.png'), dpi=90)
    plt.close(fig)

    def slid(domain):
        position = data.simulate(domain, clips, seed, 'train')['position']
        return 100 * np.linalg.norm(position[:, -1] - position[:, 0], axis=1)
    fig, ax = plt.subplots(figsize=(7, 3))
    a, b = slid('A'), slid('B')
    edges = np.geomspace(a.min(), b.max(), 40)
    ax.hist(a, edges, alpha=0.6, label='A'), ax.hist(b, edges, alpha=0.6, label='B')
    ax.axvline(a.max(), color='k', lw=1, ls='--')
    ax.set(xscale='log', xlabel='displacement over the clip [cm]', ylabel='clips',
           title=f'{np.mean(b <= a.max()):.0%} of B slide no further than some clip of A; the rest, right of the dashed '
                 f'line,\nmove as A never showed. Mean displacement B / A = {b.mean() / a.mean():.2f}')
    ax.title.set_fontsize(9)
    ax.set_xticks(ticks := [2, 5, 10, 20, 50], [str(t) for t in ticks])
    ax.minorticks_off(), ax.legend()
    fig.tight_layout()
    fig.savefig(os.path.join(folder, 'displacement.png'), dpi=90)
    plt.close(fig)


folder = data.folder_of(name)
manifest_path = os.path.join(folder, 'manifest.json')
steps, patches = data.FRAMES // data.TUBELET, (size // PATCH) ** 2
made_from = {'source': 'physics', 'encoder': 'patch', 'seed': seed, 'size': size, 'fps': data.FPS,
             'world_m': data.WORLD, 'domains': {k: list(v) for k, v in data.DOMAINS.items()},
             'clips': {split: count for split, (_, count) in SPLITS.items()}}
manifest = {'complete': False, 'made_from': made_from, 'shape': [steps, patches, dim], 'dtype': 'float16',
            'grid': [size // PATCH] * 2, 'patch': PATCH, 'decoder': 'decoder.npy', 'sha256': {},
            'splits': {split: {'domain': domain, 'shards': []} for split, (domain, _) in SPLITS.items()}}
if os.path.exists(manifest_path):
    with open(manifest_path, encoding='utf-8') as f:
        found = json.load(f)
    if (found['made_from'], found['shape']) != (made_from, manifest['shape']):
        raise Refusal(f'{folder} holds a set made with other settings; choose another --name or delete the folder')
    if found['complete']:
        print(f'{folder} is complete; nothing to do')
        sys.exit(0)
    manifest = found
os.makedirs(folder, exist_ok=True)
shard_clips = max(1, SHARD_BYTES // (2 * steps * patches * dim))
print(f'{folder}: {sum(n for _, n in SPLITS.values())} clips of {steps} steps x {patches} patches x {dim}')

start = time.time()
basis = cosine_basis()
for split, (domain, count) in SPLITS.items():
    all_clips, entry = data.simulate(domain, count, seed, split), manifest['splits'][split]
    for number, first in enumerate(range(0, count, shard_clips)):
        if number < len(entry['shards']):
            continue  # done before an interruption
        clips_here = min(shard_clips, count - first)
        z = np.empty((clips_here, steps, patches, dim), np.float16)
        label = f'{split} (domain {domain})' + (f' shard {number + 1}' if count > shard_clips else '')
        for i in data.progress(range(clips_here), label):
            if i % 32 == 0:
                part = cut(all_clips, first + i, first + min(i + 32, clips_here))
                z[i:i + 32] = patch_encode(data.tubelets(data.render(part, size, device), PATCH)).half().cpu()
        file = f'{split}_{number:05d}.npy'
        entry['shards'].append({'file': file, 'clips': clips_here, 'sha256': save_array(file, z)})
        save_manifest()
    actions = np.zeros((count, steps, 2), np.float32)
    actions[:, 0] = all_clips['impulse']
    manifest['sha256'][f'{split}_actions.npy'] = save_array(f'{split}_actions.npy', actions)
    data.write_atomically(os.path.join(folder, f'{split}_physics.npz'), lambda f: np.savez(f, **all_clips))
manifest['sha256']['decoder.npy'] = save_array('decoder.npy', fit_decoder(data.simulate('A', min(clips, 512), seed, 'train')))
draw_pictures()
manifest['complete'] = True
save_manifest()
print(f'done in {time.time() - start:.0f} s; pictures of the clips: {os.path.join(folder, "clips.png")}')
