"""
Prepare features: simulate or import clips, encode them with a frozen encoder, write shards for train.py and adapt.py.

    python prepare.py                                           the laptop default: data/slide, a minute or two
    python prepare.py --name=slide256 --size=256 --dim=1024 --clips=1000                    full-size tensors
    python prepare.py --name=mine --source=clips                                           your own clips (README)
    python prepare.py --name=mine --source=clips --in_place=True             own features, read where they are: no copy
    python prepare.py --name=slide_vitl --encoder=vitl --clips=1000       with V-JEPA 2; downloads its weights once

The split `zoom` is phase A seen from nearer by, where the same motion goes further across the picture than A ever shows.
An inverse dynamics trained on A reads which push each of its clips looks like; train.py trains on it beside `train`.

After an interruption, the same command goes on where it stopped; a finished set is left as it is. A set that was made with
other settings, or by other code for the world or the encoder, is refused. data/<name>/clips.png shows clips of each domain,
data/<name>/displacement.png how far objects slide in A and B.
"""
import functools
import hashlib
import json
import math
import os
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F

import data
from configurator import ROOT, Refusal, configure, read_knobs
from model import autocast, pick_device
from support import plots
from support.files import folder_of, write_manifest
from support.made_from import depends_on
from support.own_clips import open_sources
from support.own_files import Crop
from support.running import keep_freed_memory
from support.shards import (check_folder, check_room, clips_done, clips_to_do, gibibytes, kept_clips, save, take_over,
                            to_store, write_split)
from support.terminal import duration
from vjepa2 import MODELS, VideoEncoder, load_vjepa2, official_weights
from zoomed import (INVERSE_CLIPS, ZOOM, inverse_batches, inverse_step, new_inverse, pushes_of_zoomed, share_read,
                    why_not_zoomed, write_zoomed_pushes, zoom_levels)

# what to make
name = 'slide'           # data set: data/<name> beside the code, or a folder if it contains a slash
source = 'physics'       # physics, or a folder of your own clips: <source>/<split>/<clip>, or <source>/<clip> with --split
split = ''               # own clips by their numbers: train:17000-21999,B:22000-22999,A2:23000-23999; '' = by folder
content = ''             # own clips: what is taken of clips that have both [ | features | pictures]
in_place = False         # own features: no copy, training reads them where they are
skip_bad = False         # own clips: leave out what cannot be read, name it and count it
clips = 30000            # physics: clips in train; fit_B, for the oracle, has a fifth of them [1..]
test_clips = 600         # physics: clips in val and in each test_<domain> [1..]
zoom = True              # also phase A seen from nearer by, half as many clips, which teaches far motion
seed = 1                 # of the physics, and of the inverse dynamics that reads the pushes of zoomed clips [0..]
# how to encode
size = 0                 # picture size in pixels, a multiple of 16; 0 = 64 for patch, that of the V-JEPA 2 model else [0..]
encoder = ''             # frozen: low frequencies of each patch ('' or patch), or V-JEPA 2 [ | patch | vitl | vith | vitg | vitg384 | vitb2.1 | vitl2.1 | vitg2.1 | vitG2.1]
dim = 48                 # patch: D, the number of lowest frequencies kept [3..1536]
weights = ''             # V-JEPA 2: official .pt, .safetensors or Hugging Face folder; '' = download once to torch's cache
part = ''                # V-JEPA 2: encoder in an official .pt; '' = the published one [ | target_encoder | encoder | ema_encoder]
encode = 'step'          # V-JEPA 2: each step's own frames, or all at once (then z_1 sees the future) [step | clip]
# where
device = 'auto'          # auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps or cpu
dtype = 'auto'           # V-JEPA 2 computes in bfloat16 where GPU or CPU has it, or as said here [auto | float32 | bfloat16]
batch = 32               # clips encoded at once [1..]
# When this file is imported, as by the tests, the knobs keep their defaults and nothing is done.
settings = configure(globals()) if __name__ == '__main__' else {}

# Pixels per patch side, as in ViT-L/16.
PATCH = 16
# Tokens that V-JEPA 2 encodes at once, which bounds its memory for any batch.
TOKENS = 2**14
# Bytes of frames that the patch encoder encodes at once: as floats they still fit into a processor's cache.
FRAME_BYTES = 2**19
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
    at_once = max(1, FRAME_BYTES // frames[0].numel())
    encoded = []
    for clips in frames.split(at_once):
        blocks = data.tubelets(clips, PATCH).mT.flatten(-2)            # (b,T,N,512*3)
        encoded.append(blocks @ basis)
    return torch.cat(encoded)


@torch.inference_mode()
def vjepa2_encode(frames, net, encode, dtype):
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
    with autocast(frames.device, dtype, net.width):
        for videos in video.split(at_once):
            encoded.append(net(videos).float())                        # (b,N,D), or (b,T*N,D) for 'clip'
    return torch.cat(encoded).view(n, steps, patches, -1)


def as_they_are(features):
    """Imported features (n,T,N,D), which need no encoder."""
    return features


def load_vjepa2_encoder(encoder, weights, part, size, encode, device, dtype='auto'):
    """vjepa2_encode with the weights of a file, or the official ones; prints what the user should know about them."""
    path = weights or official_weights(encoder)
    net = load_vjepa2(path, part).to(device)
    if net.version == '2.1':
        print(f'V-JEPA 2.1: the {part} of {path}')
        if size == PATCH:
            raise Refusal(f'--size={size}: V-JEPA 2.1 needs two rows and two columns of patches, {2 * PATCH} pixels')
    if encode == 'clip':
        print("encode='clip': all frames attend to each other, so z_1 contains the whole clip and a jump from it is easy")
    return functools.partial(vjepa2_encode, net=net, encode=encode, dtype=dtype)


# ---- sources -----------------------------------------------------------------------------------------------------------
# A Source gives the clips of one split. There are two, PhysicsClips below and OwnClips in support/own_clips.py:
#   count                number of clips
#   domain               the domain that they come from
#   physics              the dict of arrays of simulate(); empty for own clips
#   actions(indices)     float32 (n,T,A) of these clips
#   states(indices)      float32 (n,T,S) of these clips, or None
#   several_pushes       whether any clip has a push after step 1
#   content(start, end)  the readable ones among clips start..end-1 as frames (n,F,H,W,3) uint8 or as features (n,T,N,D),
#                        and the list of their indices
#   pictures(indices, size)   frames (n,F,size,size,3) of those of these clips that have any, and the list of their indices
#   stamp(start, end)    for own clips a checksum that changes when the files of clips start..end-1 do, else ''
#   example()            the content of one clip, whose shape all others must have
#   zoomed(zooms)        the Source of so many clips seen from nearer by, clip i by the factor zooms[i]

class PhysicsClips:
    """A Source of simulated clips."""

    several_pushes = False

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

    def states(self, indices):
        """There are none."""
        return None

    def content(self, start, end):
        """Frames (n,F,size,size,3) of clips start..end-1, and their indices."""
        return self.pictures(list(range(start, min(end, self.count))), self.size)

    def pictures(self, indices, size):
        """Frames (n,F,size,size,3) of these clips, and their indices."""
        drawn = {key: values[indices] for key, values in self.physics.items()}
        return data.render(drawn, size, self.device), indices

    def stamp(self, start, end):
        """No files are read, so none can change."""
        return ''

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


# ---- features back into pictures -----------------------------------------------------------------------------------------

def fit_decoder(train, kept, source, device):
    """
    Least squares from layer-normed features to a tubelet's pixels → float32 (D+1, 3*512), the last row the bias; None where
    no pictures are there. data.pictures turns predicted features back into pictures with it, for any encoder.

    train: a data.Split; source: its Source; kept: the index in the Source of each clip.
    """
    T, N, _ = train.manifest['shape']
    size = PATCH * math.isqrt(N)
    # So many steps' patches are enough, and so many fit into memory at once.
    clips = min(512, max(1, 2**16 // (T * N)), len(kept))
    at_once = min(32, max(1, 2**12 // (T * N)))
    xx = xy = fitted = 0
    for start in range(0, clips, at_once):
        indices = kept[start:min(start + at_once, clips)]
        frames, readable = source.pictures(indices, size)
        if not readable:
            continue
        z, _ = train[[start + indices.index(index) for index in readable]]
        x = F.pad(z.to(device), (0, 1), value=1.0)                                      # (n,T,N,D+1)
        x = x.flatten(0, 2).double()                                                    # (n*T*N,D+1)
        y = data.tubelets(frames, PATCH).flatten(3).flatten(0, 2).double()              # (n*T*N,3*512)
        xx = xx + x.T @ x
        xy = xy + x.T @ y
        fitted += len(readable)
    if not fitted:
        return None
    ridge = 1e-6 * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    return torch.linalg.solve(xx + ridge, xy).float().cpu().numpy()


# ---- figures and pictures ----------------------------------------------------------------------------------------------

def print_read_out(folder, manifest, position):
    """
    Print how much of the displacement over the clip z_1 alone explains. position: (clips,F,2) of train.

    z_1 is seen before the push and can tell only how much room there is to slide. More than that would have leaked into
    z_1 from the future.
    """
    _, patches, dim = manifest['shape']
    train = data.Split(folder, 'train', manifest=manifest)
    # At most 512 MiB of float32.
    clips = min(1600, 2**27 // (patches * dim), len(train))
    first_steps = []
    for start in range(0, clips, 32):
        z, _ = train[start:min(start + 32, clips)]
        first_steps.append(z[:, 0].clone())
    z_1 = torch.cat(first_steps)
    position = position[:clips]
    displacement = torch.from_numpy(position[:, -1] - position[:, 0])
    explained = data.explained(z_1.flatten(1), displacement)
    print(f'z_1 alone explains {explained:.0%} of the displacement (linear read-out, {clips:,} clips left out in turn)')


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


# ---- before the run ------------------------------------------------------------------------------------------------------

def refuse_given(settings, knobs, why):
    """Raise Refusal where one of these knobs has another value than its default: it would be ignored."""
    defaults = {name: default for name, default, _, _ in read_knobs(os.path.join(ROOT, 'prepare.py'))}
    for knob in knobs:
        if settings[knob] != defaults[knob]:
            raise Refusal(f'--{knob}={settings[knob]}: {why}')


def check_settings(settings):
    """Raise Refusal for settings that do not go together."""
    check_folder(folder_of(settings['name']), settings['source'])
    if settings['size'] % PATCH:
        raise Refusal(f'--size={settings["size"]}: must be a multiple of {PATCH}')
    if settings['source'] == 'physics':
        refuse_given(settings, ('split', 'content', 'in_place', 'skip_bad'),
                     'is for clips of your own; name their folder with --source')
    else:
        refuse_given(settings, ('clips', 'test_clips'), 'is for the built-in physics, not for --source')
    if settings['content'] == 'features':
        check_for_features(settings)
    elif settings['content'] == 'pictures' and settings['in_place']:
        raise Refusal('--in_place=True: is for features; pictures must be encoded')
    if settings['encoder'] in MODELS:
        refuse_given(settings, ('dim',), f'is for the patch encoder; {settings["encoder"]} has a size of its own')
    else:
        refuse_given(settings, ('weights', 'part', 'encode', 'dtype'), 'is for V-JEPA 2; choose one with --encoder')


def check_for_features(settings):
    """Raise Refusal for settings that are of no use where own features are imported."""
    refuse_given(settings, ('encoder', 'weights', 'part', 'encode', 'dtype', 'dim', 'size', 'seed'),
                 'features are taken as they are, so nothing is encoded; choose --content=pictures to encode pictures')


def code_of_set(encoder, sources):
    """The functions and classes that the files of a set depend on. made_from.depends_on follows the names in them."""
    code = [type(sources['train']), fit_decoder]
    if encoder == 'patch':
        code += [cosine_basis, patch_encode]
    elif encoder != 'none':
        code += [vjepa2_encode, VideoEncoder]
    if 'zoom' in sources:
        code += [pushes_of_zoomed, share_read]
    return code


def new_manifest(shape, sources, made_from):
    """The manifest of a new set. shape: [T, N, D]. Raises Refusal where N is not a square number."""
    side = math.isqrt(shape[1])
    if side ** 2 != shape[1]:
        raise Refusal(f'{shape[1]} patches per step are not a square grid')
    splits = {split: {'domain': source.domain, 'shards': []} for split, source in sources.items()}
    return {'complete': False, 'made_from': made_from, 'shape': shape, 'dtype': 'float16', 'grid': [side, side],
            'patch': PATCH, 'sha256': {}, 'splits': splits}


def seconds_per_clip(folder, source, encode_clips, batch, clips):
    """
    Measured on one batch: reading or rendering, encoding, writing and comparing. encode_clips: None for in place. clips: how
    many there will be.
    """
    count = min(batch, source.count)
    if encode_clips is None:
        return seconds_of(lambda: source.listed(0, count)) / count
    # The first call of an encoder takes longer than the others.
    encode_clips(source.example())
    # A whole batch, unless that would take long.
    if seconds_of(lambda: encode_clips(source.example())) * count > 10:
        count = 1
    encoded = []

    def read_and_encode():
        content, readable = source.content(0, count)
        if readable:
            encoded.append(to_store(encode_clips, content, 'train'))
    seconds = seconds_of(read_and_encode)
    if not encoded:
        return 0
    # Up to 32 MiB: to sync a small file takes as long as a large one.
    times = max(1, min(2**25 // encoded[0].nbytes, clips // count))

    def write():
        try:
            # Not seen by anybody, and gone with this process.
            with tempfile.TemporaryFile(dir=folder) as f:
                for _ in range(times):
                    f.write(encoded[0])
                    hashlib.sha256(encoded[0])
                f.flush()
                os.fsync(f.fileno())
        except OSError:
            # The first file of the set will meet the same, and is refused by its name.
            pass
    return (seconds + seconds_of(write) / times) / count


def seconds_of(work):
    """How long work() takes: the median of up to five times, of a second or two together."""
    times = []
    while len(times) < 5 and sum(times) < 1:
        began = time.time()
        work()
        times.append(time.time() - began)
    return sorted(times)[len(times) // 2]


def seconds_of_inverse(train, shape, seed, device):
    """What training the inverse dynamics will take, measured on a batch of noise. train: its Source; shape: [T, N, D]."""
    numbers = train.actions([0]).shape[-1]
    memory, optimizer = new_inverse(shape, numbers, seed, device)
    z = torch.randn(INVERSE_CLIPS, *shape, device=device)
    a = torch.randn(INVERSE_CLIPS, shape[0], numbers, device=device)

    def step():
        inverse_step(memory, optimizer, z, a)
        if z.device.type == 'cuda':
            torch.cuda.synchronize()
    # The first one takes longer.
    step()
    return seconds_of(step) * inverse_batches(train.count)


def print_plan(folder, manifest, sources, encode_clips, batch, seed, device, needed, free):
    """Print what will be made, how long that takes and how much room. needed, free: bytes."""
    shape = manifest['shape']
    train = sources['train']
    todo = clips_to_do(manifest, sources)
    seconds = todo * seconds_per_clip(folder, train, encode_clips, batch, todo)
    if 'zoom' in sources:
        seconds += seconds_of_inverse(train, shape, seed, device)
    total = sum(source.count for source in sources.values())
    room = f'{gibibytes(needed)} on disk' if needed else 'no copy'
    print(f'{folder}: {total:,} clips of {shape[0]} steps x {shape[1]} patches x {shape[2]}: about '
          f'{duration(seconds)} and {room} ({gibibytes(free)} free)', flush=True)


# ---- the run -----------------------------------------------------------------------------------------------------------

def write_set(folder, manifest, sources, encode_clips, batch, seed, device):
    """Write what is missing of a set; returns the number of clips that were left out. See write_split."""
    after = clips_to_do(manifest, sources)
    skipped = 0
    for split, source in sources.items():
        after -= source.count - clips_done(manifest, split, source)
        left_out = write_split(folder, manifest, split, source, encode_clips, batch, after)
        # Own clips that are zoomed in are those of train once more.
        if split != 'zoom':
            skipped += left_out
    if 'zoom' in sources:
        write_zoomed_pushes(folder, manifest, sources['zoom'], seed, device)
    train = data.Split(folder, 'train', manifest=manifest)
    decoder = fit_decoder(train, kept_clips(manifest, 'train', sources['train']), sources['train'], device)
    if decoder is None:
        print('no pictures beside the features: predictions will not be shown as pictures')
    else:
        manifest['decoder'] = 'decoder.npy'
        save(folder, manifest, 'decoder.npy', lambda f: np.save(f, decoder))
    return skipped


if __name__ == '__main__':
    keep_freed_memory()
    check_settings(settings)
    device = pick_device(device)
    official = MODELS.get(encoder)
    if official:
        size = size or official.pixels
        part = part or official.part
    size = size or 64

    # The clips
    files, left_out = None, 0
    if source == 'physics':
        sources = physics_sources(clips, test_clips, seed, size, device)
    else:
        short = size
        if official:
            # V-JEPA 2 was trained on the middle of pictures whose short side is 256/224 of the crop.
            short = int(size * 256 / 224)
        crop = Crop(size, short, data.TUBELET)
        sources, files, left_out = open_sources(source, split, content, crop, skip_bad, device)

    # The encoder
    example = sources['train'].example()
    if example.dtype != torch.uint8:
        check_for_features(settings)
        encoder, encode_clips = 'none', as_they_are
        print(f'content: features of {tuple(example.shape[1:])}, taken as they are')
    else:
        if in_place:
            raise Refusal(f'--in_place=True: is for features; {source} has pictures, which must be encoded')
        encoder = encoder or 'patch'
        if source != 'physics':
            print(f"content: pictures of {sources['train'].picture_size()}, encoded by {encoder}")
        if official:
            encode_clips = load_vjepa2_encoder(encoder, weights, part, size, encode, device, dtype)
        else:
            encode_clips = functools.partial(patch_encode, basis=cosine_basis(dim).to(device))
    shape = list(encode_clips(example).shape[1:])                      # T, N, D

    # Phase A seen from nearer by
    if zoom:
        obstacle = why_not_zoomed(sources['train'], shape, example)
        if obstacle:
            print(f'no zoomed clips: {obstacle}; far motion is then not taught')
        else:
            sources['zoom'] = sources['train'].zoomed(ZOOM ** zoom_levels(sources['train'].count // 2))

    # What the set is made from. A set that was made from anything else is refused.
    counts = {key: sources[key].count for key in sources}
    code = depends_on(code_of_set(encoder, sources))
    made_from = {'source': source, 'split': split, 'content': content, 'in_place': in_place, 'encoder': encoder,
                 'encode': encode, 'weights': weights, 'part': part, 'dtype': dtype, 'seed': seed, 'size': size,
                 'skip_bad': skip_bad, 'zoom': zoom, 'files': files, 'clips': counts, **code}
    # As it is read back from JSON, where tuples are lists.
    made_from = json.loads(json.dumps(made_from))
    folder = folder_of(name)
    manifest = new_manifest(shape, sources, made_from)
    if in_place:
        encode_clips = None
    needed = 0 if in_place else sum(counts.values()) * 2 * math.prod(shape)
    free = check_room(folder, needed)
    manifest = take_over(folder, manifest, sources)
    if manifest['complete']:
        print(f'{folder} is complete and undamaged; nothing to do')
        raise SystemExit

    print_plan(folder, manifest, sources, encode_clips, batch, seed, device, needed, free)
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
        message += f'; {left_out + skipped} clips skipped'
    print(message)
