"""
Prepare features: simulate or import clips, encode them with a frozen encoder, write shards for train.py and adapt.py.

    python prepare.py                                           the laptop default: data/slide, under a minute
    python prepare.py --name=slide256 --size=256 --dim=1024 --clips=1000                    full-size tensors
    python prepare.py --name=mine --source=clips                                           your own clips (README)
    python prepare.py --name=slide_vitl --size=256 --encoder=vitl --weights=vitl.pt --clips=1000 --device=cuda

Interrupted, the same command goes on where it stopped; a finished set is left alone. data/<name>/clips.png shows clips
of each domain, data/<name>/displacement.png how far objects slide in A and B.
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
from model import load_vjepa2, pick_device

# what to make
name = 'slide'           # data set: data/<name> beside the code, or a folder if it contains a slash
source = 'physics'       # physics, or a folder <source>/<split>/<clip>/ of your own clips
clips = 30000            # physics: clips in train; fit_B, for the oracle, has a fifth of them [1..]
test_clips = 600         # physics: clips in val and in each test_<domain> [1..]
seed = 1                 # physics: every random number of the set follows from it [0..]
# how to encode
size = 64                # picture size in pixels, a multiple of 16; own videos are resized and centre-cropped [16..]
encoder = 'patch'        # frozen encoder: low spatial frequencies of each patch, or V-JEPA 2 [patch | vitl]
dim = 48                 # patch: D, the number of lowest frequencies kept [3..1536]
weights = ''             # vitl: path of the official vitl.pt
encode = 'step'          # vitl: each step's own frames, or all frames at once (then z_1 sees the future) [step | clip]
# where
device = 'auto'          # auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps or cpu
batch = 32               # clips encoded at once [1..]
settings = configure(globals())
device = pick_device(device)

PATCH = 16                   # pixels per patch side, as in ViT-L/16
SHARD_BYTES = 128 * 2**20    # an interrupted run loses at most one shard
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as V-JEPA 2 was trained
if size % PATCH:
    raise Refusal(f'--size={size}: must be a multiple of {PATCH}')


# ---- frozen encoders: uint8 frames (n,F,H,W,3) → features (n,T,N,D) --------------------------------------------------

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


def patch_encode(frames):
    """Patch encoder: lowest frequencies of every tubelet, (n,T,N,dim); no step sees another's frames."""
    blocks = data.tubelets(frames, PATCH)                              # (n,T,N,3,512)
    return (blocks @ basis).transpose(-1, -2).flatten(-2)[..., :dim]   # frequency-major, colours side by side


@torch.inference_mode()
def vitl_encode(frames):
    """V-JEPA 2: (n,T,N,D), each step's frames encoded alone (encode='step') or the whole clip at once ('clip')."""
    n, steps = len(frames), frames.shape[1] // data.TUBELET
    video = (frames.permute(0, 4, 1, 2, 3).float() / 255 - stats[0]) / stats[1]         # n,3,F,H,W
    if encode == 'step':
        video = video.unflatten(2, (steps, data.TUBELET)).movedim(2, 1).flatten(0, 1)   # n*T,3,t,H,W
    with torch.autocast('cuda', torch.bfloat16, enabled=str(device).startswith('cuda')):
        return vitl(video).float().view(n, steps, (size // PATCH) ** 2, -1)


# ---- sources: a split is (number of clips, actions (n,T,A), physics, frames(i,j) or features(i,j)) -------------------

def cut(clips, start, end):
    """The clips start..end of a dict of arrays."""
    return {key: value[start:end] for key, value in clips.items()}


def physics_split(split, domain, count):
    """A split of simulated clips."""
    drawn = data.simulate(domain, count, seed, split)
    actions = np.zeros((count, data.FRAMES // data.TUBELET, 2), np.float32)
    actions[:, 0] = drawn['impulse']
    return count, actions, drawn, lambda i, j: data.render(cut(drawn, i, j), size, device)


def read_array(path):
    """A .npy file, never executing anything; raises Refusal by name."""
    try:
        return np.load(path, mmap_mode='r', allow_pickle=False)
    except (OSError, ValueError) as error:
        raise Refusal(f'{path}: not a readable .npy file ({error})') from None


def read_content(folder):
    """Features (T,N,D) of feature_maps/*.npy, stored as (T*256,D) or (T,N,D), or frames (F,size,size,3) of video.npy."""
    maps = os.path.join(folder, 'feature_maps')
    if os.path.isdir(maps):
        files = sorted(f for f in os.listdir(maps) if f.endswith('.npy'))
        if not files:
            raise Refusal(f'{maps}: holds no .npy file')
        z = read_array(os.path.join(maps, files[0]))
        return torch.tensor(z.reshape(-1, 256, z.shape[-1]) if z.ndim == 2 else z)
    video = read_array(os.path.join(folder, 'video.npy'))
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or len(video) % data.TUBELET:
        raise Refusal(f'{folder}/video.npy: must be (frames,height,width,3) uint8 with an even number of frames, '
                      f'not {video.shape} {video.dtype}')
    x = torch.tensor(video).permute(0, 3, 1, 2).float()                # F,3,H,W
    scale = size / min(x.shape[-2:])
    x = F.interpolate(x, [round(scale * s) for s in x.shape[-2:]], mode='bilinear', antialias=True)
    top, left = (x.shape[-2] - size) // 2, (x.shape[-1] - size) // 2
    return x[..., top:top + size, left:left + size].clamp(0, 255).round().byte().permute(0, 2, 3, 1)


def read_actions(folder, steps):
    """Actions (steps,A) from actions_states/actions.npy or actions.npy (rows,A): its first non-zero row, at step 1."""
    files = [os.path.join(folder, *f) for f in (('actions_states', 'actions.npy'), ('actions.npy',))]
    rows = read_array(next((f for f in files if os.path.exists(f)), files[-1])).astype(np.float32)
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise Refusal(f'{folder}: actions must be finite, (rows,A), not {rows.shape}')
    actions = np.zeros((steps, rows.shape[1]), np.float32)
    actions[0] = rows[np.argmax(rows.any(1))]
    return actions


def folder_split(split):
    """A split of own clips: every folder in <source>/<split>, in order of name."""
    folders = sorted(f.path for f in os.scandir(os.path.join(source, split)) if f.is_dir())
    first = read_content(folders[0])
    steps = len(first) if first.dtype != torch.uint8 else len(first) // data.TUBELET

    def content(i, j):
        parts = [read_content(f) for f in folders[i:j]]
        odd = next((f for f, p in zip(folders[i:j], parts) if p.shape != first.shape), None)
        if odd:
            raise Refusal(f'{odd}: its shape differs from {tuple(first.shape)} of {folders[0]}')
        return torch.stack(parts).to(device)
    return len(folders), np.stack([read_actions(f, steps) for f in folders]), {}, content


# ---- files -----------------------------------------------------------------------------------------------------------

def save_manifest():
    data.write_atomically(manifest_path, lambda f: f.write(json.dumps(manifest, indent=1).encode()))


def save(file, write):
    """Write a file of the set atomically by calling write(file object), and note its sha256 in the manifest."""
    path = os.path.join(folder, file)
    data.write_atomically(path, write)
    manifest['sha256'][file] = data.sha256(path)


def fit_decoder(frames):
    """
    Least squares from layer-normed features to a tubelet's pixels → float32 (D+1, 3*512), the last row the bias.
    It turns predicted features back into pictures (data.pictures), whatever the encoder was.
    """
    stored = np.load(os.path.join(folder, manifest['splits']['train']['shards'][0]['file']), mmap_mode='r')
    xx, xy = 0, 0
    for start in range(0, min(512, len(stored)), 32):
        z = torch.tensor(stored[start:start + 32]).float().to(device)
        x = F.pad(F.layer_norm(z, z.shape[-1:]), (0, 1), value=1.0).flatten(0, 2).double()
        y = data.tubelets(frames(start, start + len(z)), PATCH).flatten(3).flatten(0, 2).double()
        xx, xy = xx + x.T @ x, xy + x.T @ y
    ridge = 1e-6 * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    return torch.linalg.solve(xx + ridge, xy).float().cpu().numpy()


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
    fig, axes = plt.subplots(len(data.DOMAINS), shown, figsize=(shown * 1.3, len(data.DOMAINS) * 1.4))
    for row, (domain, (mu, mass)) in zip(axes, data.DOMAINS.items()):
        drawn = data.simulate(domain, shown, seed, 'test_A')  # the same draws in every row: only the physics differs
        frames = data.render(drawn, 128).float() / 255
        ghost = torch.stack([0.4 * frames[:, 0], 0.65 * frames[:, data.FRAMES // 2], frames[:, -1]]).amax(0)
        for ax, picture in zip(row, ghost):
            ax.imshow(picture.numpy())
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
    ax.set(xscale='log', xlabel='displacement over the clip [cm]', ylabel='clips')
    ax.set_title(f'{np.mean(b <= a.max()):.0%} of B slide no further than some clip of A; the rest, right of the dashed '
                 f'line,\nmove as A never showed. Median displacement B / A = {np.median(b / a):.2f}', fontsize=9)
    ax.set_xticks(ticks := [2, 5, 10, 20, 50], [str(t) for t in ticks])
    ax.minorticks_off(), ax.legend()
    fig.tight_layout()
    fig.savefig(os.path.join(folder, 'displacement.png'), dpi=90)
    plt.close(fig)


# ---- what there is to do ---------------------------------------------------------------------------------------------
if source == 'physics':
    domains = {'train': 'A', 'val': 'A', 'fit_B': 'B', **{f'test_{domain}': domain for domain in data.DOMAINS}}
    count = {'train': clips, 'fit_B': max(test_clips, clips // 5)}
    splits = {s: physics_split(s, domain, count.get(s, test_clips)) for s, domain in domains.items()}
else:
    if not os.path.isdir(source):
        raise Refusal(f'--source={source}: neither "physics" nor a folder')
    domains = {s: s.removeprefix('test_') for s in sorted(os.listdir(source)) if os.path.isdir(os.path.join(source, s))}
    empty = [s for s in domains if not any(f.is_dir() for f in os.scandir(os.path.join(source, s)))]
    if empty or 'train' not in domains:
        raise Refusal(f'--source={source}: needs clip folders in {source}/train and in every other split'
                      + (f'; {empty[0]} has none' if empty else ''))
    splits = {s: folder_split(s) for s in domains}
example = splits['train'][3](0, 1)
if example.dtype != torch.uint8:                                       # features: taken as they are
    encoder, encode_clips = 'none', lambda z: z
elif encoder == 'patch':
    basis, encode_clips = cosine_basis(), patch_encode
else:
    vitl, encode_clips = load_vjepa2(weights).to(device), vitl_encode
    stats = [torch.tensor(x, device=device).view(3, 1, 1, 1) for x in (MEAN, STD)]
    if encode == 'clip':
        print("encode='clip': all frames attend to each other, so z_1 has seen the whole clip and a jump from it is easy")
shape = list(encode_clips(example).shape[1:])                          # T, N, D
side = round(shape[1] ** 0.5)

folder = data.folder_of(name)
manifest_path = os.path.join(folder, 'manifest.json')
made_from = {'source': source, 'encoder': encoder, 'encode': encode, 'weights': weights, 'seed': seed, 'size': size,
             'fps': data.FPS, 'world_m': data.WORLD, 'domains': {k: list(v) for k, v in data.DOMAINS.items()},
             'clips': {s: parts[0] for s, parts in splits.items()}}
manifest = {'complete': False, 'made_from': made_from, 'shape': shape, 'dtype': 'float16', 'grid': [side, side],
            'patch': PATCH, 'sha256': {}, 'splits': {s: {'domain': d, 'shards': []} for s, d in domains.items()}}
if os.path.exists(manifest_path):
    with open(manifest_path, encoding='utf-8') as f:
        found = json.load(f)
    if (found['made_from'], found['shape']) != (made_from, shape):
        raise Refusal(f'{folder} holds a set made with other settings; choose another --name or delete the folder')
    if found['complete']:
        print(f'{folder} is complete; nothing to do')
        sys.exit(0)
    manifest = found
os.makedirs(folder, exist_ok=True)
shard_clips = max(1, SHARD_BYTES // (2 * int(np.prod(shape))))
print(f'{folder}: {sum(made_from["clips"].values()):,} clips of {shape[0]} steps x {shape[1]} patches x {shape[2]}')

# ---- do it -----------------------------------------------------------------------------------------------------------
start = time.time()
for split, (count, actions, physics, content) in splits.items():
    shards = manifest['splits'][split]['shards']
    for number, first in enumerate(range(0, count, shard_clips)):
        if number < len(shards):
            continue  # done before an interruption
        z = np.empty((min(shard_clips, count - first), *shape), np.float16)
        for i in data.progress(range(len(z)), split + (f', shard {number + 1}' if count > shard_clips else ''), 'clips'):
            if i % batch == 0:
                j = min(i + batch, len(z))
                z[i:j] = encode_clips(content(first + i, first + j)).half().cpu()
        file = f'{split}_{number:05d}.npy'
        save(file, lambda f: np.save(f, z))
        shards.append({'file': file, 'clips': len(z)})
        save_manifest()
    save(f'{split}_actions.npy', lambda f: np.save(f, actions))
    if physics:
        save(f'{split}_physics.npz', lambda f: np.savez(f, **physics))
if example.dtype == torch.uint8:
    manifest['decoder'] = 'decoder.npy'
    decoder = fit_decoder(splits['train'][3])
    save('decoder.npy', lambda f: np.save(f, decoder))
if source == 'physics':
    draw_pictures()
manifest['complete'] = True
save_manifest()
print(f'done in {time.time() - start:.0f} s' + (f'; pictures: {folder}/clips.png' if source == 'physics' else ''))
