"""
Prepare features: simulate or import clips, encode them with a frozen encoder, write shards for train.py and adapt.py.

    python prepare.py                                           the laptop default: data/slide, a minute or two
    python prepare.py --name=slide256 --size=256 --dim=1024 --clips=1000                    full-size tensors
    python prepare.py --name=mine --source=clips                                           your own clips (README)
    python prepare.py --name=slide_vitl --encoder=vitl --clips=1000       with V-JEPA 2; downloads its weights once

The split `zoom` is phase A seen from nearer by, where the same motion goes further across the picture than A ever shows.
An inverse dynamics trained on A reads which push each of its clips looks like; train.py trains on it beside `train`.

After an interruption, the same command goes on where it stopped; a finished set is left as it is. A set that was made with
other settings, or by other code for the world or the encoder, is refused. data/<name>/clips.png shows clips of each domain,
data/<name>/displacement.png how far objects slide in A and B.
"""
import functools
import itertools
import json
import math
import os
import time
import types

import numpy as np
import torch
import torch.nn.functional as F

import data
from configurator import Refusal, configure
from hope import ActionMemory
from model import pick_device
from support import own_clips, plots
from support.files import claim, folder_of, intact, parse_manifest, sha256, write_atomically, write_manifest
from support.made_from import depends_on
from vjepa2 import MODELS, VideoEncoder, load_vjepa2, official_weights

# what to make
name = 'slide'           # data set: data/<name> beside the code, or a folder if it contains a slash
source = 'physics'       # physics, or a folder of your own clips: <source>/<split>/<clip>, or <source>/<clip> with --split
split = ''               # own clips by their numbers: train:17000-21999,B:22000-22999,A2:23000-23999; '' = by folder
skip_bad = False         # own clips: leave out what cannot be read, name it and count it
clips = 30000            # physics: clips in train; fit_B, for the oracle, has a fifth of them [1..]
test_clips = 600         # physics: clips in val and in each test_<domain> [1..]
zoom = True              # also phase A seen from nearer by, half as many clips, which teaches far motion
seed = 1                 # of the physics, and of the inverse dynamics that reads the pushes of zoomed clips [0..]
# how to encode
size = 0                 # picture size in pixels, a multiple of 16; 0 = 64 for patch, that of the V-JEPA 2 model else [0..]
encoder = 'patch'        # frozen: low frequencies of each patch, or V-JEPA 2 [patch | vitl | vith | vitg | vitg384 | vitb2.1 | vitl2.1 | vitg2.1 | vitG2.1]
dim = 48                 # patch: D, the number of lowest frequencies kept [3..1536]
weights = ''             # V-JEPA 2: official .pt, .safetensors or Hugging Face folder; '' = download once to torch's cache
part = ''                # V-JEPA 2: encoder in an official .pt; '' = the published one [ | target_encoder | encoder | ema_encoder]
encode = 'step'          # V-JEPA 2: each step's own frames, or all at once (then z_1 sees the future) [step | clip]
# where
device = 'auto'          # auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps or cpu
batch = 32               # clips encoded at once [1..]
# When this file is imported, as by the tests, the knobs keep their defaults and nothing is done.
settings = configure(globals()) if __name__ == '__main__' else {}

# Pixels per patch side, as in ViT-L/16.
PATCH = 16
# An interrupted run loses at most one shard.
SHARD_BYTES = 128 * 2**20
# The split `zoom` shows phase A from nearer by, a quarter of its clips by each of the factors 1.2, 1.2^2, 1.2^3 and 1.2^4.
ZOOM = 1.2
ZOOMS = 4
# With fewer clips of train, no push can be read.
FEWEST_CLIPS = 64
# Most batches that the inverse dynamics is trained on, and clips per batch. After too few it reads all pushes too weak.
INVERSE_BATCHES = 4000
INVERSE_CLIPS = 64
# If it reads less than this share of the pushes of val, the pushes of zoomed clips are not to be trusted.
LEAST_READ = 0.98
# Tokens that V-JEPA 2 encodes at once, which bounds its memory for any batch.
TOKENS = 2**14
# Mean and standard deviation of ImageNet's colours, by which V-JEPA 2 normalises pictures.
MEAN = 0.485, 0.456, 0.406
STD = 0.229, 0.224, 0.225


# ---- frozen encoders: uint8 frames (n,F,H,W,3) → features (n,T,N,D) --------------------------------------------------

def cosines(n):
    """The orthonormal cosine basis (DCT-II) of n samples → (n,n) float64, a row per frequency."""
    k = np.arange(n)[:, None]
    i = np.arange(n)[None]
    scale = np.where(k == 0, 1, np.sqrt(2))
    return np.cos(np.pi * k * (2 * i + 1) / (2 * n)) * scale / np.sqrt(n)


def cosine_basis(dim):
    """
    The lowest frequencies of the cosine basis of a TUBELET x 16 x 16 block → (TUBELET*16*16*3, dim) float32, columns by
    rising frequency in cycles, each frequency once per colour.
    """
    shape = data.TUBELET, PATCH, PATCH
    size = math.prod(shape)
    basis = np.einsum('ai,bj,ck->abcijk', *map(cosines, shape))        # (frequencies t,y,x, pixels t,y,x)
    basis = basis.reshape(size, size)                                  # (frequencies, pixels)
    t, y, x = np.indices(shape)
    frequency = (t / shape[0]) ** 2 + (y / shape[1]) ** 2 + (x / shape[2]) ** 2
    lowest = np.argsort(frequency.ravel(), kind='stable')[:math.ceil(dim / 3)]
    coloured = np.kron(basis[lowest].T, np.eye(3))                     # (pixels*3, frequencies*3)
    return torch.from_numpy(coloured[:, :dim].astype(np.float32))


def patch_encode(frames, basis):
    """Patch encoder: lowest frequencies of every tubelet, (n,T,N,dim). Each step is encoded from its own frames alone."""
    blocks = data.tubelets(frames, PATCH).mT.flatten(-2)               # (n,T,N,512*3)
    return blocks @ basis


@torch.inference_mode()
def vjepa2_encode(frames, net, encode):
    """V-JEPA 2: (n,T,N,D), each step's frames encoded alone (encode='step') or the whole clip at once ('clip')."""
    n, count, height, width, _ = frames.shape
    steps = count // data.TUBELET
    patches = (height // PATCH) * (width // PATCH)
    mean = torch.tensor(MEAN, device=frames.device).view(3, 1, 1, 1)
    std = torch.tensor(STD, device=frames.device).view(3, 1, 1, 1)
    video = frames.permute(0, 4, 1, 2, 3).float()                      # (n,3,F,H,W)
    video = (video / 255 - mean) / std
    if encode == 'step':
        video = video.unflatten(2, (steps, data.TUBELET))              # (n,3,T,t,H,W)
        video = video.movedim(2, 1).flatten(0, 1)                      # (n*T,3,t,H,W)
    tokens = video.shape[2] // data.TUBELET * patches
    at_once = max(1, TOKENS // tokens)
    encoded = []
    with torch.autocast('cuda', torch.bfloat16, enabled=frames.device.type == 'cuda'):
        for videos in video.split(at_once):
            encoded.append(net(videos).float())                        # (b,N,D), or (b,T*N,D) for 'clip'
    return torch.cat(encoded).view(n, steps, patches, -1)


def as_they_are(features):
    """Imported features (n,T,N,D), which need no encoder."""
    return features


def load_vjepa2_encoder(encoder, weights, part, size, encode, device):
    """vjepa2_encode with the weights of a file, or the official ones; prints what the user should know about them."""
    path = weights or official_weights(encoder)
    net = load_vjepa2(path, part).to(device)
    if net.version == '2.1':
        print(f'V-JEPA 2.1: the {part} of {path}')
        if size == PATCH:
            raise Refusal(f'--size={size}: V-JEPA 2.1 needs two rows and two columns of patches, {2 * PATCH} pixels')
    if encode == 'clip':
        print("encode='clip': all frames attend to each other, so z_1 contains the whole clip and a jump from it is easy")
    return functools.partial(vjepa2_encode, net=net, encode=encode)


# ---- sources -----------------------------------------------------------------------------------------------------------
# A Source gives the clips of one split. There are two, PhysicsClips below and OwnClips in support/own_clips.py:
#   count                number of clips
#   domain               the domain that they come from
#   physics              the dict of arrays of simulate(); empty for own clips
#   actions(indices)     float32 (n,T,A) of these clips
#   content(start, end)  the readable ones among clips start..end-1 as frames (n,F,H,W,3) uint8 or as features (n,T,N,D),
#                        and the list of their indices
#   example()            the content of one clip, whose shape all others must have
#   zoomed(zooms)        the Source of so many clips seen from nearer by, clip i by the factor zooms[i]

class PhysicsClips:
    """A Source of simulated clips."""

    def __init__(self, split, domain, count, seed, size, device, zooms=1):
        self.count, self.domain, self.seed, self.size, self.device = count, domain, seed, size, device
        self.physics = data.simulate(domain, count, seed, split, zooms)

    def zoomed(self, zooms):
        """Other clips of this domain, seen from nearer by."""
        return PhysicsClips('zoom', self.domain, len(zooms), self.seed, self.size, self.device, zooms)

    def actions(self, indices):
        """The impulse of each clip, given at step 1: (n,T,2)."""
        actions = np.zeros((len(indices), data.FRAMES // data.TUBELET, 2), np.float32)
        actions[:, 0] = self.physics['impulse'][indices]
        return actions

    def content(self, start, end):
        """Frames (n,F,size,size,3) of clips start..end-1, and their indices."""
        drawn = {key: values[start:end] for key, values in self.physics.items()}
        return data.render(drawn, self.size, self.device), list(range(start, end))

    def example(self):
        """Frames of the first clip."""
        return self.content(0, 1)[0]


def physics_sources(clips, test_clips, seed, size, device):
    """Every split of the built-in physics → {split: PhysicsClips}. The oracle is trained on fit_B."""
    domains = {'train': 'A', 'val': 'A', 'fit_B': 'B'}
    for domain in data.DOMAINS:
        domains[f'test_{domain}'] = domain
    count = {'train': clips, 'fit_B': max(test_clips, clips // 5)}
    sources = {}
    for split, domain in domains.items():
        sources[split] = PhysicsClips(split, domain, count.get(split, test_clips), seed, size, device)
    return sources


# ---- files -----------------------------------------------------------------------------------------------------------

def save(folder, manifest, file, write):
    """Write a file of the set atomically by calling write(file object), and put its sha256 into the manifest."""
    path = os.path.join(folder, file)
    write_atomically(path, write)
    manifest['sha256'][file] = sha256(path)


def take_over(folder, manifest):
    """
    Claim the folder of a set for this run → the manifest to continue from: the given one for a new set, else that of an
    earlier run without its damaged shards and those after them. 'complete' stays true where nothing is left to do. Raises
    Refusal where another run is at work, or for a set that was made with other settings.
    """
    path = os.path.join(folder, 'manifest.json')
    os.makedirs(folder, exist_ok=True)
    if not os.path.exists(path):
        claim(folder)
        return manifest
    # Of a run that was killed. claim() removes them.
    half_written = [f.path.removesuffix('.tmp') for f in os.scandir(folder) if f.name.endswith('.tmp')]
    claim(folder, *half_written)
    found = parse_manifest(path)
    if (found['made_from'], found['shape']) != (manifest['made_from'], manifest['shape']):
        raise Refusal(f'{folder} holds a set made with other settings; choose another --name or delete the folder')
    damaged = [file for file in found['sha256'] if not intact(folder, found, file)]
    if found['complete'] and not damaged:
        return found
    found['complete'] = False
    for entry in found['splits'].values():
        whole = itertools.takewhile(lambda shard: shard['file'] not in damaged, entry['shards'])
        entry['shards'] = list(whole)
    if damaged:
        print(f'{", ".join(damaged)}: damaged or missing, made again')
    return found


def write_split(folder, manifest, split, source, encode_clips, batch, shard_clips):
    """
    Encode and write the shards of a split that are still missing, then its actions and physics.

    encode_clips: content of n clips → features (n,T,N,D). batch: clips encoded at once. Returns the number of clips that
    were left out; raises Refusal where that is all of them.
    """
    shards = manifest['splits'][split]['shards']
    done = min(source.count, len(shards) * shard_clips)
    # Each further next() counts one clip as done.
    bar = data.progress(range(done, source.count), split)
    next(bar, None)
    for shard_start in range(done, source.count, shard_clips):
        shard_end = min(shard_start + shard_clips, source.count)
        # Filled batch by batch. Small arrays, allocated between the encoder's large ones, would keep gigabytes of freed
        # memory from being returned to the system.
        z = np.empty((shard_end - shard_start, *manifest['shape']), np.float16)
        kept = []
        for start in range(shard_start, shard_end, batch):
            end = min(start + batch, shard_end)
            content, readable = source.content(start, end)
            if readable:
                features = encode_clips(content).half().cpu().numpy()
                z[len(kept):len(kept) + len(readable)] = features
            kept += readable
            for _ in range(start, end):
                next(bar, None)
        file = f'{split}_{len(shards):05d}.npy'
        save(folder, manifest, file, lambda f: np.save(f, z[:len(kept)]))
        left_out = sorted(set(range(shard_start, shard_end)) - set(kept))
        shards.append({'file': file, 'clips': len(kept), 'skipped': left_out})
        write_manifest(folder, manifest)
    kept = kept_clips(manifest, split, source)
    if not kept:
        raise Refusal(f'split {split}: none of its {source.count} clips can be read')
    actions = source.actions(kept)
    save(folder, manifest, f'{split}_actions.npy', lambda f: np.save(f, actions))
    if source.physics:
        save(folder, manifest, f'{split}_physics.npz', lambda f: np.savez(f, **source.physics))
    return source.count - len(kept)


def kept_clips(manifest, split, source):
    """The indices of the clips of a Source that a written split holds."""
    skipped = {index for shard in manifest['splits'][split]['shards'] for index in shard['skipped']}
    return [index for index in range(source.count) if index not in skipped]


def stored(folder, manifest, clips, steps):
    """The first clips of train as they were stored, layer-normed as in data.Split → (n,steps,N,D) float32."""
    arrays = []
    missing = clips
    for shard in manifest['splits']['train']['shards']:
        z = np.load(os.path.join(folder, shard['file']), mmap_mode='r')[:missing, :steps]
        arrays.append(z)
        missing -= len(z)
        if missing == 0:
            break
    z = np.concatenate(arrays)
    return F.layer_norm(torch.from_numpy(z).float(), z.shape[-1:])


def fit_decoder(folder, manifest, source, device):
    """
    Least squares from layer-normed features to a tubelet's pixels → float32 (D+1, 3*512), the last row the bias.

    data.pictures turns predicted features back into pictures with it, for any encoder. source: that of train.
    """
    xx = xy = 0
    done = 0
    steps = manifest['shape'][0]
    first_shard = manifest['splits']['train']['shards'][0]
    z = stored(folder, manifest, min(512, first_shard['clips']), steps)
    tried = first_shard['clips'] + len(first_shard['skipped'])
    for start in range(0, tried, 32):
        if done == len(z):
            break
        frames, _ = source.content(start, min(start + 32, tried))
        frames = frames[:len(z) - done]
        x = F.pad(z[done:done + len(frames)].to(device), (0, 1), value=1.0)             # (n,T,N,D+1)
        x = x.flatten(0, 2).double()                                                    # (n*T*N,D+1)
        y = data.tubelets(frames, PATCH).flatten(3).flatten(0, 2).double()              # (n*T*N,3*512)
        xx = xx + x.T @ x
        xy = xy + x.T @ y
        done += len(frames)
    ridge = 1e-6 * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    return torch.linalg.solve(xx + ridge, xy).float().cpu().numpy()


# ---- zoomed clips ------------------------------------------------------------------------------------------------------
# What is seen from nearer by moves further, so in terms of phase A it was pushed harder. How much harder is read from the
# features, as in a new world: an inverse dynamics that knows only A reads a push from each clip at the smallest factor, and
# an action memory M learns what the given pushes become. M applied twice is zooming in twice.

def zoom_levels(clips):
    """How often each of so many clips is zoomed in by ZOOM, in rising order → (clips,) int, 1..ZOOMS."""
    return 1 + np.arange(clips) * ZOOMS // clips


def why_not_zoomed(train, shape, encode_clips):
    """Why no clips can be zoomed in, in words; '' where they can. train: its Source; shape: [T, N, D]."""
    if encode_clips is as_they_are:
        return 'imported features cannot be cropped'
    if train.count < FEWEST_CLIPS:
        return f'train has fewer than {FEWEST_CLIPS} clips'
    if shape[0] < 3:
        return 'its clips have fewer than three steps'
    return ''


def train_inverse(train, seed, device):
    """An ActionMemory whose inverse dynamics was trained on a data.Split, of phase A alone."""
    steps, _, dim = train.manifest['shape']
    # Not model.Sizes: with a new default there, every data set would count as made by other code.
    sizes = types.SimpleNamespace(steps=steps, grid=train.manifest['grid'], feature_dim=dim,
                                  action_dim=train.actions.shape[-1])
    torch.manual_seed(seed)
    memory = ActionMemory(sizes).to(device)
    memory.scale.fill_(data.mean_push(train.actions))
    optimizer = torch.optim.AdamW(memory.parameters(), lr=2e-3, betas=(0.9, 0.99))
    batches = min(INVERSE_BATCHES, 2 * len(train))
    for i in data.progress(range(batches), 'inverse dynamics', 'batches'):
        warmup = min(1, (i + 1) / (0.04 * batches))
        decay = min(1, (batches - i) / (0.7 * batches))
        for group in optimizer.param_groups:
            group['lr'] = 2e-3 * warmup * decay
        z, a = train[data.batch_indices(len(train), INVERSE_CLIPS, seed, i)]
        loss = memory.loss(z.to(device), a.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(memory.parameters(), 1.0)
        optimizer.step()
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


def write_zoomed_pushes(folder, manifest, source, seed, device):
    """Replace the actions of the split `zoom`, which are the pushes that were given, by those that its clips look like."""
    train = data.Split(folder, 'train', manifest=manifest)
    clips = data.Split(folder, 'zoom', manifest=manifest)
    val = data.Split(folder, 'val', manifest=manifest)
    memory = train_inverse(train, seed, device)
    share = share_read(memory, val, device)
    levels = torch.from_numpy(zoom_levels(source.count)[kept_clips(manifest, 'zoom', source)])
    given = torch.from_numpy(clips.actions[:, 0]).double()
    size = given.norm(dim=1)
    # Harder pushes look like none that A showed.
    hardest = np.linalg.norm(train.actions[:, 0], axis=1).max() / ZOOM ** 1.5
    readable = ((levels == 1) & (size <= hardest)).nonzero()[:, 0]
    seen = read_pushes(memory, clips, readable, device).double()
    memory = memory.cpu().double()
    M = association(memory, given[readable], seen)
    manifest['zoom'] = {'factor': ZOOM, 'M': M.tolist(), 'share_read': share}
    pushes = zoomed_pushes(memory, M, given, levels)
    actions = np.zeros_like(clips.actions)
    actions[:, 0] = pushes.numpy()
    save(folder, manifest, 'zoom_actions.npy', lambda f: np.save(f, actions))
    gains = []
    for level in range(1, ZOOMS + 1):
        members = levels == level
        gain = pushes[members].norm(dim=1).mean() / size[members].mean()
        gains.append(f'{gain:.2f}')
    print(f'zoomed clips: pushes read x {", ".join(gains)} (mean) of what was given')
    if share < LEAST_READ:
        print(f'zoomed clips: too few clips to read their pushes well (only {max(0, share):.1%} of those of val); make '
              'more, or train without them: train.py --zoom=False')


# ---- figures and pictures ----------------------------------------------------------------------------------------------

def print_read_out(folder, manifest, position):
    """
    Print how much of the displacement over the clip z_1 alone explains. position: (clips,F,2) of train.

    z_1 is seen before the push and can tell only how much room there is to slide. More than that would have leaked into
    z_1 from the future.
    """
    _, patches, dim = manifest['shape']
    # At most 512 MiB of float32.
    clips = min(1600, 2**27 // (patches * dim))
    z_1 = stored(folder, manifest, clips, 1)
    position = position[:len(z_1)]
    displacement = torch.from_numpy(position[:, -1] - position[:, 0])
    explained = data.explained(z_1.flatten(1), displacement)
    print(f'z_1 alone explains {explained:.0%} of the displacement (linear read-out, {len(z_1):,} clips left out in turn)')


def draw_pictures(folder, clips, seed):
    """clips.png: first, middle and last frame of clips of each domain; displacement.png: how far A and B slide."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print('no pictures: pip install matplotlib')
        return
    rows = {}
    for domain, physics in data.DOMAINS.items():
        # With the same random numbers in every row, only the physics differs.
        drawn = data.simulate(domain, 8, seed, 'test_A')
        mu, mass, camera = physics[:3]
        turned = f', {camera}°' if camera else ''
        label = f'{domain}\nμ {mu}, {mass} kg{turned}'
        rows[label] = data.render(drawn, 128).float().div(255).numpy()
    plots.draw_domains(os.path.join(folder, 'clips.png'), rows)
    slid = {}
    for domain in ('A', 'B'):
        position = data.simulate(domain, clips, seed, 'train')['position']
        slid[domain] = 100 * np.linalg.norm(position[:, -1] - position[:, 0], axis=1)
    plots.draw_displacement(os.path.join(folder, 'displacement.png'), slid['A'], slid['B'])


# ---- the run -----------------------------------------------------------------------------------------------------------

def check_settings(size, source, split):
    """Raise Refusal for settings that do not go together."""
    if size % PATCH:
        raise Refusal(f'--size={size}: must be a multiple of {PATCH}')
    if split and source == 'physics':
        raise Refusal(f'--split={split}: is for clips of your own; name their folder with --source')


def code_of_set(encoder, sources):
    """The functions and classes that the files of a set depend on. made_from.depends_on follows the names in them."""
    code = [type(sources['train'])]
    if encoder == 'patch':
        code += [cosine_basis, patch_encode, fit_decoder]
    elif encoder != 'none':
        code += [vjepa2_encode, VideoEncoder, fit_decoder]
    if 'zoom' in sources:
        code += [write_zoomed_pushes]
    return code


def new_manifest(shape, sources, made_from):
    """The manifest of a new set. shape: [T, N, D]. Raises Refusal where N is not a square number."""
    side = math.isqrt(shape[1])
    if side ** 2 != shape[1]:
        raise Refusal(f'{shape[1]} patches per step are not a square grid')
    splits = {split: {'domain': source.domain, 'shards': []} for split, source in sources.items()}
    return {'complete': False, 'made_from': made_from, 'shape': shape, 'dtype': 'float16', 'grid': [side, side],
            'patch': PATCH, 'sha256': {}, 'splits': splits}


def write_set(folder, manifest, sources, encode_clips, batch, seed, device):
    """Write what is missing of a set; returns the number of clips that were left out. See write_split."""
    clip_bytes = 2 * math.prod(manifest['shape'])
    shard_clips = max(1, SHARD_BYTES // clip_bytes)
    skipped = 0
    for split, source in sources.items():
        left_out = write_split(folder, manifest, split, source, encode_clips, batch, shard_clips)
        # Own clips that are zoomed in are those of train once more.
        if split != 'zoom':
            skipped += left_out
    if 'zoom' in sources:
        write_zoomed_pushes(folder, manifest, sources['zoom'], seed, device)
    if encode_clips is not as_they_are:
        manifest['decoder'] = 'decoder.npy'
        decoder = fit_decoder(folder, manifest, sources['train'], device)
        save(folder, manifest, 'decoder.npy', lambda f: np.save(f, decoder))
    return skipped


if __name__ == '__main__':
    device = pick_device(device)
    official = MODELS.get(encoder)
    if official:
        size = size or official.pixels
        part = part or official.part
    size = size or 64
    check_settings(size, source, split)

    # The clips
    if source == 'physics':
        sources = physics_sources(clips, test_clips, seed, size, device)
    else:
        short = size
        if encoder != 'patch':
            # V-JEPA 2 was trained on the middle of pictures whose short side is 256/224 of the crop.
            short = int(size * 256 / 224)
        crop = own_clips.Crop(size, short, data.TUBELET)
        sources = own_clips.open_sources(source, split, crop, skip_bad, device)

    # The encoder
    example = sources['train'].example()
    if example.dtype != torch.uint8:
        encoder, encode_clips = 'none', as_they_are
    elif encoder == 'patch':
        encode_clips = functools.partial(patch_encode, basis=cosine_basis(dim).to(device))
    else:
        encode_clips = load_vjepa2_encoder(encoder, weights, part, size, encode, device)
    shape = list(encode_clips(example).shape[1:])                      # T, N, D

    # Phase A seen from nearer by
    if zoom:
        obstacle = why_not_zoomed(sources['train'], shape, encode_clips)
        if obstacle:
            print(f'no zoomed clips: {obstacle}; far motion is then not taught')
        else:
            sources['zoom'] = sources['train'].zoomed(ZOOM ** zoom_levels(sources['train'].count // 2))

    # What the set is made from. A set that was made from anything else is refused.
    counts = {key: sources[key].count for key in sources}
    code = depends_on(code_of_set(encoder, sources))
    made_from = {'source': source, 'split': split, 'encoder': encoder, 'encode': encode, 'weights': weights, 'part': part,
                 'seed': seed, 'size': size, 'skip_bad': skip_bad, 'zoom': zoom, 'clips': counts, **code}
    # As it is read back from JSON, where tuples are lists.
    made_from = json.loads(json.dumps(made_from))
    folder = folder_of(name)
    manifest = take_over(folder, new_manifest(shape, sources, made_from))
    if manifest['complete']:
        print(f'{folder} is complete and undamaged; nothing to do')
        raise SystemExit

    print(f'{folder}: {sum(counts.values()):,} clips of {shape[0]} steps x {shape[1]} patches x {shape[2]}')
    began = time.time()
    skipped = write_set(folder, manifest, sources, encode_clips, batch, seed, device)
    if source == 'physics':
        print_read_out(folder, manifest, sources['train'].physics['position'])
        draw_pictures(folder, clips, seed)
    manifest['complete'] = True
    write_manifest(folder, manifest)
    message = f'done in {time.time() - began:.0f} s'
    if source == 'physics':
        message += f'; pictures: {folder}/clips.png'
    if skip_bad:
        message += f'; {skipped} clips skipped'
    print(message)
