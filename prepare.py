"""
Prepare features: simulate or import clips, encode them with a frozen encoder, write them for training.

    python prepare.py                                    the laptop default: data/slide, a minute or two
    python prepare.py --name=slide256 --size=256 --dim=1024 --clips=1000       full-size tensors
    python prepare.py --name=mine --source=clips         your own clips: see docs/own_data.md
    python prepare.py --name=slide_vitl --encoder=vitl --clips=1000    V-JEPA 2, downloaded once

The split `zoom` is A seen from nearer by, with farther motion than A ever shows (support/zoom.py). The same
command makes what is missing of a set, such as the split of a new domain, and leaves the rest as it is.
"""
import functools
import json
import math
import os
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
from support.zoom import FEWEST_CLIPS, ZOOM, read_zoomed, zoom_levels

name = 'slide'           # data set: data/<name> beside the code, or a folder if it contains a slash
source = 'physics'       # physics, or a folder of your own clips: <source>/<split>/<clip>, or <source>/<clip>
split = ''               # own clips: by their numbers, train:17000-21999,B:22000-22999; '' = by folder
content = ''             # own clips: what to take; '' = features where there are any [ | features | pictures]
clips = 30000            # physics: clips in train; fit_B, for the oracle, has a fifth of them [1..]
test_clips = 600         # physics: clips in val and in each test_<domain> [1..]
zoom = True              # also A seen from nearer by, half as many clips; takes 64 clips of train or more
seed = 1                 # physics: of the clips, and of the inverse dynamics that reads zoomed ones [0..]
size = 0                 # pictures: side in pixels, a multiple of 16; 0 = 64 for patch, V-JEPA 2's own [0..]
encoder = ''             # pictures: patch, or V-JEPA 2: vitl, vith, vitg, vitg384, a path; '' = patch
dim = 48                 # patch: D, the number of lowest frequencies of a patch that are kept [3..1536]
encode = 'step'          # V-JEPA 2: each step alone, or all at once: z_1 then sees the future [step | clip]
dtype = 'auto'           # V-JEPA 2: auto is bfloat16 where the machine has it [auto | float32 | bfloat16]
device = 'auto'          # auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps or cpu
batch = 32               # clips encoded at once [1..]
config = configure(globals()) if __name__ == '__main__' else {}

PATCH = 16               # pixels per patch side, as in ViT-L/16
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


def load_encoder(config, device):
    """The frozen encoder, and its own size of pictures in pixels."""
    if config['encoder'] == 'patch':
        return functools.partial(patch_encode, basis=cosine_basis(config['dim']).to(device)), 64
    import vjepa2
    net = vjepa2.load_encoder(config['encoder'], device)
    encode = functools.partial(vjepa2.encode, net=net, encode=config['encode'], dtype=config['dtype'])
    return encode, net.config.crop_size


def open_set(config, kind, folder):
    """meta.json of a set, as it is or new; refuses options that would be ignored or that it does not have."""
    physics = config['source'] == 'physics'
    encoder = 'none' if kind == 'features' else config['encoder'] or 'patch'
    used = {'physics': physics, 'own clips': not physics, 'pictures': kind == 'pictures',
            'patch': encoder == 'patch', 'V-JEPA 2': encoder not in ('none', 'patch')}
    for key, (default, comment) in read_knobs(__file__).items():
        what = comment.partition(':')[0]
        if config[key] != default and not used.get(what, True):
            refuse(f'--{key}={config[key]}: is for {what} alone, and would be ignored here')
    assert config['size'] % PATCH == 0, f'--size must be a multiple of {PATCH}'
    zoom = config['zoom'] and physics and config['clips'] >= FEWEST_CLIPS
    chosen = {**config, 'encoder': encoder, 'zoom': zoom}
    for key in 'name', 'device', 'batch':
        del chosen[key]
    if not os.path.exists(os.path.join(folder, 'meta.json')):
        return {'config': chosen, 'patch': PATCH}
    meta = data.read_meta(folder)
    for key, value in chosen.items():
        was = meta['config'][key]
        if was != value:
            refuse(f'{folder} was made with {key} = {was!r}, not {value!r}; choose another --name')
    return meta


def simulate_splits(config, device):
    """The built-in physics → {split: (arrays for its .npz, frames(indices, size) → (n,F,size,size,3))}."""
    def draw(physics, indices, size):
        return data.render({key: values[indices] for key, values in physics.items()}, size, device)
    clips, few = config['clips'], config['test_clips']
    drawn = {'train': ('A', clips, 1), 'val': ('A', few, 1), 'fit_B': ('B', max(few, clips // 5), 1)}
    drawn |= {f'test_{domain}': (domain, few, 1) for domain in data.DOMAINS}
    if config['zoom']:
        drawn['zoom'] = 'A', clips // 2, ZOOM ** zoom_levels(clips // 2)
    splits = {}
    for split, (domain, count, factor) in drawn.items():
        physics = data.simulate(domain, count, config['seed'], split, factor)
        actions = np.zeros((count, data.FRAMES // data.TUBELET, 2), np.float32)
        actions[:, 0] = physics['impulse']
        splits[split] = {'actions': actions, **physics}, functools.partial(draw, physics)
    return splits


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
    print(f'{split}: {len(arrays["actions"]):,} clips', flush=True)


def fit_decoder(train, frames, device):
    """Least squares from layer-normed features to pixels, for data.pictures → (D+1, 3*512) float32."""
    T, N, _ = train.meta['shape']
    size = PATCH * math.isqrt(N)
    # So many steps' patches are enough, and so many fit into memory at once.
    clips = np.arange(min(2**16 // (T * N), len(train)))
    at_once = 2**12 // (T * N) + 1
    xx = xy = 0
    for indices in np.split(clips, range(at_once, len(clips), at_once)):
        z, _ = train[indices]
        x = F.pad(z.to(device), (0, 1), value=1.0).flatten(0, 2).double()                    # (n*T*N,D+1)
        y = data.tubelets(frames(indices, size), PATCH).flatten(3).flatten(0, 2).double()    # (n*T*N,3*512)
        xx += x.T @ x
        xy += x.T @ y
    xx.diagonal().add_(1e-6 * xx.diagonal().mean())
    return torch.linalg.solve(xx, xy).float().cpu().numpy()


def main():
    """Make what is missing of a data set."""
    folder, where = data.folder_of(name), pick_device(device)
    kind = 'pictures'
    if source != 'physics':
        found = own_clips.find_clips(source, split)
        first = found['train'][0]
        kind = content or ('features' if own_clips.content(first, 'features') else 'pictures')
    meta = open_set(config, kind, folder)
    chosen = meta['config']
    if source == 'physics':
        splits = simulate_splits(chosen, where)
    else:
        splits = own_clips.open_splits(found, kind, chosen['encoder'] not in ('none', 'patch'), where)
    ending = 'npz' if kind == 'features' else 'npy'
    missing = [part for part in splits if not os.path.exists(os.path.join(folder, f'{part}.{ending}'))]
    os.makedirs(folder, exist_ok=True)
    if missing and kind == 'pictures':
        encode_frames, usual_size = load_encoder(chosen, where)
        pixels = size or usual_size
        print(f'{folder}: pictures of {pixels} x {pixels}, encoded by {chosen["encoder"]}', flush=True)
    for part in missing:
        path = os.path.join(folder, part)
        arrays, frames = splits[part]
        actions = arrays['actions']
        if kind == 'features':
            _, shape = own_clips.read_features(first)
            listed = tqdm(found[part], part, disable=None)
            meta.setdefault('files', {})[part] = [own_clips.read_features(clip, shape)[0] for clip in listed]
        else:
            features = write_features(f'{path}.npy.tmp', len(actions), frames, encode_frames, pixels)
            shape = features.shape[1:]
        if part == 'zoom':
            known = [(np.load(f'{folder}/{other}.npy', 'r'), splits[other][0]['actions'])
                     for other in ('train', 'val')]
            actions[:, 0], meta['zoom'] = read_zoomed(*known, (features, actions), seed, where)
            print('zoom read {share_read:.0%}, explained {explained:.0%}, used {used}'.format(**meta['zoom']))
        name_split(path, meta, shape, arrays)
    if missing and source == 'physics':
        plots.draw_domains(os.path.join(folder, 'clips.png'), seed)
    decoder = os.path.join(folder, 'decoder.npy')
    if kind == 'features' and not (own_clips.content(first, 'pictures') and find_spec('imageio')):
        print('no pictures beside the features, or no package imageio: predictions will not be drawn')
    elif not os.path.exists(decoder):
        fitted = fit_decoder(data.Clips(folder, 'train'), splits['train'][1], where)
        write_atomically(decoder, lambda f: np.save(f, fitted))
    print(f'{folder} is complete' if missing else f'{folder} is complete; nothing to do')


if __name__ == '__main__':
    main()
