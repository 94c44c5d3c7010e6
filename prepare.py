"""Prepare features: simulate or import clips, encode them with a frozen encoder, write them for training.

    python prepare.py                                    the laptop default: data/slide, a minute or two
    python prepare.py --name=slide256 --size=256 --dim=1024 --clips=1000       full-size tensors
    python prepare.py --name=mine --source=clips         your own clips: see docs/own_data.md
    python prepare.py --name=slide_vitl --encoder=vitl --clips=1000    V-JEPA 2, downloaded once
    python prepare.py --name=mujoco --source=mujoco --clips=3000       a real engine: see docs/own_data.md

The split `zoom` is A made some times smaller and seen from as much nearer by: it looks the same, but what
slides goes farther than A ever shows. The same command makes what is missing of a set, such as the split of
a new domain, and leaves the rest as it is."""
import functools
import json
import math
import os
import runpy
import time
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from scipy.fft import dctn
from tqdm import tqdm

import data
from configurator import configure, read_knobs, refuse
from support import own_clips, plots
from support.files import pick_device, write_atomically

name = 'slide'           # data set: data/<name> beside the code, or a folder if it contains a slash
source = 'physics'       # physics, mujoco, or a folder of own clips: with <split>/<clip>, or <clip>, in it
split = ''               # own clips: by their numbers, train:17000-21999,B:22000-22999; '' = by folder
content = ''             # own clips: what to take; '' = features where there are any [ | features | pictures]
frame_time = 0.0         # own clips: seconds of a row of actions in N, added up; 0 = they are in N·s [0..]
clips = 30000            # simulated: clips in train; fit_B, for the oracle, has a fifth of them [1..]
test_clips = 600         # simulated: clips in val and in each test_<domain> [1..]
zoom = True              # simulated: also A made smaller, seen from nearer by, as many clips as in train
seed = 1                 # simulated: of the clips [0..]
size = 0                 # pictures: side in pixels, a multiple of 16; 0 = V-JEPA 2's, or their own [0..]
encoder = ''             # pictures: patch, file.py:function, V-JEPA 2: vitl, vith, vitg, a path; '' = patch
dim = 48                 # patch: D, the number of lowest frequencies of a patch that are kept [3..1536]
encode = 'step'          # V-JEPA 2: each step alone, or all at once: z_1 then sees the future [step | clip]
dtype = 'auto'           # V-JEPA 2: auto is bfloat16 where the machine has it [auto | float32 | bfloat16]
device = 'auto'          # auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps or cpu
batch = 32               # clips encoded at once [1..]
config = configure(globals()) if __name__ == '__main__' else {}

SIMULATED = 'physics', 'mujoco'       # sources that are no folder
PATCH = 16               # pixels per patch side, as in ViT-L/16
ZOOM = 2.0               # how many times smaller A is in the split `zoom`, seen from as much nearer by
FRAME_BYTES = 2**19      # bytes of frames encoded at once: as floats they fit into a processor's cache


def cosine_basis(dim):
    """Cosines of a 2 x 16 x 16 block by rising frequency, each once per colour → (512*3,dim) float32."""
    shape = data.TUBELET, PATCH, PATCH
    pixels = np.eye(math.prod(shape)).reshape(-1, *shape)
    basis = dctn(pixels, axes=(1, 2, 3), norm='ortho').reshape(len(pixels), -1)    # (pixels, frequencies)
    frequency = np.square(np.indices(shape).T / shape).sum(-1).T           # (t,y,x)
    lowest = np.argsort(frequency.ravel(), kind='stable')[:math.ceil(dim / 3)]
    coloured = np.kron(basis[:, lowest], np.eye(3))                        # (pixels*3, frequencies*3)
    return torch.from_numpy(coloured[:, :dim].astype(np.float32))


def patch_encode(frames, basis):
    """uint8 frames (n,F,H,W,3) → features (n,T,N,dim), each step's from its own two frames alone."""
    parts = frames.split(max(1, FRAME_BYTES // frames[0].numel()))
    return torch.cat([data.tubelets(clips, PATCH).mT.flatten(-2) @ basis for clips in parts])


def encode_pictures(frames, net, scale=((0.0,), (1.0,))):
    """uint8 frames (n,F,H,W,3) → features (n,T,N,D), by a net for pictures: the mean over a step's frames,
    less the mean of each channel and over its deviation, which channel_scale() found."""
    # What eight pictures become fits into a processor's cache.
    maps = torch.cat([net(few.permute(0, 3, 1, 2) / 255) for few in frames.flatten(0, 1).split(8)])
    # (n*F,D,rows,columns) → (n,T,N,D)
    z = maps.flatten(2).mT.unflatten(0, (len(frames), -1, data.TUBELET)).mean(2)
    mean, deviation = torch.tensor(scale, device=z.device)
    return (z - mean) / deviation


def channel_scale(z):
    """Mean and deviation of each channel of features z (n,T,N,D), two lists; 0 and 1, which change nothing,
    where no channel has a tenth of the squares."""
    z = z.flatten(0, 2)
    power = z.square().mean(0)
    if power.max() < 0.1 * power.sum():
        return [0.0], [1.0]
    return z.mean(0).tolist(), z.std(0).clamp(min=1e-6).tolist()


def is_vjepa2(encoder):
    """Whether an encoder is V-JEPA 2: a name of its size, or a folder, and no file.py:function."""
    return encoder not in ('none', 'patch') and '.py:' not in encoder


def load_encoder(config, device):
    """The frozen encoder, and the size of pictures in pixels that it wants, 0 for any."""
    if config['encoder'] == 'patch':
        return functools.partial(patch_encode, basis=cosine_basis(config['dim']).to(device)), 0
    if '.py:' in config['encoder']:
        file, _, function = config['encoder'].rpartition(':')
        if not os.path.isfile(file) or function not in (found := runpy.run_path(file)):
            refuse(f'--encoder={config["encoder"]}: there is no such function')
        return functools.partial(encode_pictures, net=found[function]), 0
    import vjepa2
    net = vjepa2.load_encoder(config['encoder'], device)
    encode = functools.partial(vjepa2.encode, net=net, encode=config['encode'], dtype=config['dtype'])
    return encode, net.config.crop_size


def open_set(config, kind, folder):
    """meta.json of a set, as it is or new; refuses options that would be ignored or that it does not have."""
    simulated = config['source'] in SIMULATED
    encoder = 'none' if kind == 'features' else config['encoder'] or 'patch'
    used = {'simulated': simulated, 'own clips': not simulated, 'pictures': kind == 'pictures',
            'patch': encoder == 'patch', 'V-JEPA 2': is_vjepa2(encoder)}
    for key, (default, comment) in read_knobs(__file__).items():
        what = comment.partition(':')[0]
        if config[key] != default and not used.get(what, True):
            refuse(f'--{key}={config[key]}: is for {what} alone, and would be ignored here')
    assert config['size'] % PATCH == 0, f'--size must be a multiple of {PATCH}'
    chosen = {**config, 'encoder': encoder, 'zoom': config['zoom'] and simulated}
    for key in 'name', 'device', 'batch':
        del chosen[key]
    if not os.path.exists(os.path.join(folder, 'meta.json')):
        return {'config': chosen, 'patch': PATCH}
    meta = data.read_meta(folder)
    for key, value in chosen.items():
        was = meta['config'].get(key)
        if was != value:
            refuse(f'{folder} was made with {key} = {was!r}, not {value!r}; choose another --name')
    return meta


def world_of(config):
    """The module that simulates and renders a simulated world."""
    if config['source'] == 'physics':
        return data
    from support import mujoco_world
    return mujoco_world


def simulate_splits(config, device):
    """A simulated world → {split: function}, which simulates it when it is first called → (arrays for its
    .npz, frames(indices, size) → (n,F,size,size,3))."""
    world = world_of(config)

    def draw(physics, indices, size):
        return world.render({key: values[indices] for key, values in physics.items()}, size, device)
    clips, few = config['clips'], config['test_clips']
    drawn = {'train': ('A', clips, 1), 'val': ('A', few, 1), 'fit_B': ('B', max(few, clips // 5), 1)}
    drawn |= {f'test_{domain}': (domain, few, 1) for domain in data.DOMAINS}
    if config['zoom']:
        drawn['zoom'] = 'A', clips, ZOOM

    @functools.cache
    def simulated(split):
        domain, count, factor = drawn[split]
        physics = world.simulate(domain, count, config['seed'], split, factor)
        actions = np.zeros((count, data.FRAMES // data.TUBELET, 2), np.float32)
        push = actions[:, 0]
        push[:] = physics['impulse']
        if split == 'zoom':
            # In A, what goes twice as far until t was pushed twice as hard, less what friction takes of it,
            # mu m g t / 2, which it takes only once. t: the middle of the steps to which jumps go.
            A, seconds = data.DOMAINS['A'], (data.FRAMES - data.TUBELET - 2) / data.FPS
            taken = A.mu * A.mass * data.GRAVITY * seconds / 2
            push *= ZOOM - (ZOOM - 1) * taken / np.linalg.norm(push, axis=1, keepdims=True)
        return {'actions': actions, **physics}, functools.partial(draw, physics)
    return {split: functools.partial(simulated, split) for split in drawn}


def write_features(path, clips, frames, encode, size):
    """Encode so many clips into a new file → their features (clips,T,N,D) float16, memory-mapped."""
    features = None
    for indices in tqdm(np.split(np.arange(clips), range(batch, clips, batch)), path, disable=None):
        z = encode(frames(indices, size))
        if features is None:
            features = np.lib.format.open_memmap(path, 'w+', np.float16, (clips, *z.shape[1:]))
        features[indices] = z.half().cpu().numpy()
    features.flush()
    return features


def name_split(path, meta, shape, arrays):
    """Write what goes with the features (n,*shape) of a split, named last: what is there is complete."""
    folder, split = os.path.split(path)
    side = math.isqrt(shape[1])
    assert side**2 == shape[1], f'{split}: {shape[1]} patches per step are not a square grid'
    meta.update(shape=shape, grid=[side, side])
    text = json.dumps(meta, indent=1).encode()
    write_atomically(f'{folder}/meta.json', lambda f: f.write(text))
    write_atomically(f'{path}.npz', lambda f: np.savez(f, **arrays))
    if split not in meta.get('files', ()):
        os.replace(f'{path}.npy.tmp', f'{path}.npy')


def fit_decoder(train, frames, device):
    """Least squares from layer-normed features to pixels, for data.pictures → (D+1, 3*512) float32."""
    T, N, _ = train.meta['shape']
    size = PATCH * math.isqrt(N)
    # So many patches are enough, and fit into memory.
    clips = np.arange(min(2**15 // (T * N) + 1, len(train)))
    x = F.pad(train[clips][0].to(device), (0, 1), value=1.0).flatten(0, 2)               # (n*T*N,D+1)
    y = data.tubelets(frames(clips, size), PATCH).flatten(3).flatten(0, 2)               # (n*T*N,3*512)
    xx = x.T @ x
    xx.diagonal().add_(1e-5 * xx.diagonal().mean())
    return torch.linalg.solve(xx.double(), (x.T @ y).double()).float().cpu().numpy()


def main():
    """Make what is missing of a data set."""
    folder, where = data.folder_of(name), pick_device(device)
    simulated, kind = source in SIMULATED, 'pictures'
    if not simulated:
        found = own_clips.find_clips(source, split)
        first = found['train'][0]
        kind = content or ('features' if own_clips.content(first, 'features') else 'pictures')
        count = len(found['train'])
        print(f'train: {count:,} clips; for the defaults of training take 3,000 or more', flush=True)
    meta = open_set(config, kind, folder)
    chosen = meta['config']
    if simulated:
        splits = simulate_splits(chosen, where)
    else:
        # All actions are read now, so that a bad clip is refused before the first is encoded.
        opened = own_clips.open_splits(found, kind, is_vjepa2(chosen['encoder']), frame_time, where)
        splits = {part: functools.partial(opened.get, part) for part in opened}
    ending = 'npz' if kind == 'features' else 'npy'
    missing = [part for part in splits if not os.path.exists(os.path.join(folder, f'{part}.{ending}'))]
    os.makedirs(folder, exist_ok=True)
    if missing and kind == 'pictures':
        encode_frames, own_size = load_encoder(chosen, where)
        usual = {'physics': 64, 'mujoco': 128}
        pixels = size or own_size or usual.get(source)
        pixels = pixels or min(own_clips.read(first, 'pictures')[1].shape[1:3]) // PATCH * PATCH
        print(f'{folder}: pictures of {pixels} x {pixels}, encoded by {chosen["encoder"]}', flush=True)
        if '.py:' in chosen['encoder']:
            if 'scale' not in meta:
                arrays, frames = splits['train']()
                few = np.arange(min(64, len(arrays['actions'])))
                meta['scale'] = channel_scale(encode_frames(frames(few, pixels)))
            encode_frames = functools.partial(encode_frames, scale=meta['scale'])
    for part in missing:
        path = os.path.join(folder, part)
        started = time.time()
        arrays, frames = splits[part]()
        clips = len(arrays['actions'])
        if kind == 'features':
            _, shape = own_clips.read_features(first)
            listed = tqdm(found[part], part, disable=None)
            meta.setdefault('files', {})[part] = [own_clips.read_features(clip, shape)[0] for clip in listed]
        else:
            features = write_features(f'{path}.npy.tmp', clips, frames, encode_frames, pixels)
            shape = features.shape[1:]
        name_split(path, meta, shape, arrays)
        print(f'{part}: {clips:,} clips, {clips / (time.time() - started):.0f} a second', flush=True)
    if missing and simulated:
        plots.draw_domains(os.path.join(folder, 'clips.png'), seed, world_of(chosen))
    elif missing:
        print(own_clips.say_what_step_1_tells(data.Clips(folder, 'train'), data.Clips(folder, 'val')))
    decoder = os.path.join(folder, 'decoder.npy')
    if kind == 'features' and not (own_clips.content(first, 'pictures') and find_spec('imageio')):
        print('no pictures beside the features, or no package imageio: predictions will not be drawn')
    elif not os.path.exists(decoder):
        _, frames = splits['train']()
        fitted = fit_decoder(data.Clips(folder, 'train'), frames, where)
        write_atomically(decoder, lambda f: np.save(f, fitted))
    print(f'{folder} is complete' if missing else f'{folder} is complete; nothing to do')


if __name__ == '__main__':
    main()
