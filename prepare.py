"""
Prepare features: simulate or import clips, encode them with a frozen encoder, write shards for train.py and adapt.py.

    python prepare.py                                           the laptop default: data/slide, under a minute
    python prepare.py --name=slide256 --size=256 --dim=1024 --clips=1000                    full-size tensors
    python prepare.py --name=mine --source=clips                                           your own clips (README)
    python prepare.py --name=slide_vitl --encoder=vitl --clips=1000       with V-JEPA 2; downloads its weights once

Interrupted, the same command goes on where it stopped; a finished set is left alone. data/<name>/clips.png shows clips
of each domain, data/<name>/displacement.png how far objects slide in A and B.
"""
import http.client
import itertools
import os
import re
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import torch
import torch.nn.functional as F

import data
from configurator import Refusal, configure
from model import pick_device
from support.files import claim, folder_of, intact, parse_manifest, sha256, write_atomically, write_manifest
from vjepa2 import load_vjepa2

# what to make
name = 'slide'           # data set: data/<name> beside the code, or a folder if it contains a slash
source = 'physics'       # physics, or a folder of your own clips: <source>/<split>/<clip>, or <source>/<clip> with --split
split = ''               # own clips by their numbers: train:17000-21999,B:22000-22999,A2:23000-23999; '' = by folder
skip_bad = False         # own clips: leave out what cannot be read, name it and count it
clips = 30000            # physics: clips in train; fit_B, for the oracle, has a fifth of them [1..]
test_clips = 600         # physics: clips in val and in each test_<domain> [1..]
seed = 1                 # physics: every random number of the set follows from it [0..]
# how to encode
size = 0                 # picture size in pixels, a multiple of 16; 0 = 64 for patch, what the V-JEPA 2 model saw else [0..]
encoder = 'patch'        # frozen: low frequencies of each patch, or V-JEPA 2 [patch | vitl | vith | vitg | vitg384 | vitb2.1 | vitl2.1 | vitg2.1 | vitG2.1]
dim = 48                 # patch: D, the number of lowest frequencies kept [3..1536]
weights = ''             # V-JEPA 2: official .pt, .safetensors or Hugging Face folder; '' = download once into torch's cache
part = ''                # V-JEPA 2: which encoder of an official .pt; '' = the published one [ | target_encoder | encoder | ema_encoder]
encode = 'step'          # V-JEPA 2: each step's own frames, or all at once (then z_1 sees the future) [step | clip]
# where
device = 'auto'          # auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps or cpu
batch = 32               # clips encoded at once [1..]
settings = configure(globals())
device = pick_device(device)

PATCH = 16                   # pixels per patch side, as in ViT-L/16
SHARD_BYTES = 128 * 2**20    # an interrupted run loses at most one shard
TOKENS = 2**14               # tokens that V-JEPA 2 encodes at once: what bounds its memory, whatever the batch
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as V-JEPA 2 was trained
OFFICIAL = 'https://dl.fbaipublicfiles.com/vjepa2'
MODELS = {                   # repository on Hugging Face (1.3, 2.6, 4.1, 4.1 GB), official file and the part to use, pixels
    'vitl': ('facebook/vjepa2-vitl-fpc64-256', 'vitl.pt', 'target_encoder', 256),
    'vith': ('facebook/vjepa2-vith-fpc64-256', 'vith.pt', 'target_encoder', 256),
    'vitg': ('facebook/vjepa2-vitg-fpc64-256', 'vitg.pt', 'target_encoder', 256),
    'vitg384': ('facebook/vjepa2-vitg-fpc64-384', 'vitg-384.pt', 'target_encoder', 384),
    # V-JEPA 2.1: official files only. The first two were distilled from the last.
    'vitb2.1': (None, 'vjepa2_1_vitb_dist_vitG_384.pt', 'ema_encoder', 384),
    'vitl2.1': (None, 'vjepa2_1_vitl_dist_vitG_384.pt', 'ema_encoder', 384),
    'vitg2.1': (None, 'vjepa2_1_vitg_384.pt', 'target_encoder', 384),
    'vitG2.1': (None, 'vjepa2_1_vitG_384.pt', 'target_encoder', 384),
}
VIDEOS = '.mp4', '.avi', '.mov', '.mkv', '.webm'
# The patch encoder has no parts; its manifests have always named this one.
repository, official, own_part, pixels = MODELS.get(encoder, (None, None, 'target_encoder', 64))
size, part = size or pixels, part or own_part
if size % PATCH:
    raise Refusal(f'--size={size}: must be a multiple of {PATCH}')
if split and source == 'physics':
    raise Refusal(f'--split={split}: numbers clips of your own; name their folder with --source')


# ---- official weights --------------------------------------------------------------------------------------------------

class NoRedirect(urllib.request.HTTPRedirectHandler):
    """The first answer of the server carries the size and sha256 of a file; where it sends us does not."""

    def redirect_request(self, *args):
        return None


def download(repository, path):
    """
    The official weights of a Hugging Face repository, into path, once. An interrupted download goes on where it stopped;
    size and sha256 are compared with the server's before the file gets its name. Raises Refusal without network.
    """
    try:
        import safetensors  # noqa: F401  before a gigabyte is fetched that could not be read
    except ImportError:
        raise Refusal(f'--encoder={encoder}: official weights need the package: pip install safetensors') from None
    url = f'{os.environ.get("HF_ENDPOINT", "https://huggingface.co")}/{repository}/resolve/main/model.safetensors'
    os.makedirs(os.path.dirname(path), exist_ok=True)
    partial = path + '.part'
    try:
        try:
            answer = urllib.request.build_opener(NoRedirect).open(urllib.request.Request(url, method='HEAD'), timeout=30)
        except urllib.error.HTTPError as error:
            if not 300 <= error.code < 400:
                raise
            answer = error
        digest = (answer.headers.get('X-Linked-Etag') or '').strip('"')
        length = int(answer.headers.get('X-Linked-Size') or 0)
        if not re.fullmatch('[0-9a-f]{64}', digest) or not length:
            raise Refusal(f'{url}: the server names no size and sha256 to check a download by')
        done = os.path.getsize(partial) if os.path.exists(partial) else 0
        if done < length:
            request = urllib.request.Request(url, headers={'Range': f'bytes={done}-'})
            with urllib.request.urlopen(request, timeout=30) as body, open(partial, 'ab') as f:
                if body.status != 206:                                 # the server starts from the beginning
                    f.truncate(done := 0)
                for _ in data.progress(range(-(-(length - done) // 2**20)), f'downloading {encoder}', 'MiB'):
                    f.write(body.read(2**20))
    except (OSError, http.client.HTTPException) as error:              # URLError, a timeout, a full disk
        raise Refusal(f'--encoder={encoder}: cannot download ({error}); get model.safetensors from '
                      f'https://huggingface.co/{repository} or {OFFICIAL}/{official} and name it with --weights') from None
    done = os.path.getsize(partial)
    if done < length:
        raise Refusal(f'{url}: the connection ended after {done:,} of {length:,} bytes; the same command goes on')
    if done > length or sha256(partial) != digest:
        os.remove(partial)
        raise Refusal(f'{url}: what came does not have the sha256 that the server named; try again')
    os.replace(partial, path)


# ---- frozen encoders: uint8 frames (n,F,H,W,3) → features (n,T,N,D) --------------------------------------------------

def cosine_basis():
    """
    The lowest frequencies of the orthonormal 3D cosine basis (DCT-II) of a TUBELET x 16 x 16 block →
    (TUBELET*16*16*3, dim) float32, columns by rising frequency in cycles, each once for every colour.
    """
    def axis(n):
        k, i = np.arange(n)[:, None], np.arange(n)[None]
        return np.cos(np.pi * k * (2 * i + 1) / (2 * n)) * np.where(k == 0, 1, np.sqrt(2)) / np.sqrt(n)  # (k,i)
    shape = data.TUBELET, PATCH, PATCH
    basis = np.einsum('ai,bj,ck->abcijk', *map(axis, shape)).reshape(np.prod(shape), np.prod(shape))
    frequency = sum((k / n) ** 2 for k, n in zip(np.indices(shape), shape)).ravel()
    lowest = np.argsort(frequency, kind='stable')[:-(-dim // 3)]
    return torch.from_numpy(np.kron(basis[lowest].T, np.eye(3))[:, :dim].astype(np.float32)).to(device)


def patch_encode(frames):
    """Patch encoder: lowest frequencies of every tubelet, (n,T,N,dim); no step sees another's frames."""
    return data.tubelets(frames, PATCH).mT.flatten(-2) @ basis         # (n,T,N,512*3) as the pixels lie: nothing is moved


@torch.inference_mode()
def vjepa2_encode(frames):
    """V-JEPA 2: (n,T,N,D), each step's frames encoded alone (encode='step') or the whole clip at once ('clip')."""
    n, steps = len(frames), frames.shape[1] // data.TUBELET
    video = (frames.permute(0, 4, 1, 2, 3).float() / 255 - stats[0]) / stats[1]         # n,3,F,H,W
    if encode == 'step':
        video = video.unflatten(2, (steps, data.TUBELET)).movedim(2, 1).flatten(0, 1)   # n*T,3,t,H,W
    tokens = video.shape[2] // data.TUBELET * (size // PATCH) ** 2                       # of one forward pass's item
    with torch.autocast('cuda', torch.bfloat16, enabled=str(device).startswith('cuda')):
        z = torch.cat([vjepa2(part).float() for part in video.split(max(1, TOKENS // tokens))])
    return z.view(n, steps, (size // PATCH) ** 2, -1)


# ---- sources -----------------------------------------------------------------------------------------------------------
# A split is: its number of clips; actions(indices) → (n,T,A); physics, a dict of arrays or empty; and content(i, j) → the
# readable ones among clips i..j-1 as frames (uint8) or features, and their indices.

def cut(clips, start, end):
    """The clips start..end of a dict of arrays."""
    return {key: value[start:end] for key, value in clips.items()}


def physics_split(split, domain, count):
    """A split of simulated clips."""
    drawn = data.simulate(domain, count, seed, split)
    actions = np.zeros((count, data.FRAMES // data.TUBELET, 2), np.float32)
    actions[:, 0] = drawn['impulse']
    return count, actions.__getitem__, drawn, lambda i, j: (data.render(cut(drawn, i, j), size, device), list(range(i, j)))


def read_array(path):
    """A .npy file, never executing anything; raises Refusal by name."""
    try:
        return np.load(path, mmap_mode='r', allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise Refusal(f'{path}: not a readable .npy file ({error})') from None


def read_video(path):
    """Frames (F,H,W,3) uint8 of a .npy array, a folder of numbered pictures, or a video file."""
    if path.endswith('.npy'):
        video = read_array(path)
        if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8:
            raise Refusal(f'{path}: must be (frames,height,width,3) uint8, not {video.shape} {video.dtype}')
        return np.array(video)
    if os.path.isdir(path):
        from PIL import Image  # comes with matplotlib
        names = sorted((f for f in os.listdir(path) if f.endswith('.png')), key=number_of)
        numbers = [number_of(name) for name in names]
        if not names or None in numbers or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise Refusal(f'{path}: holds no unbroken row of numbered pictures (frame_00001.png, frame_00002.png, ...)')
        frames = []
        for name in names:
            try:
                with Image.open(os.path.join(path, name), formats=['PNG']) as picture:
                    frames.append(np.asarray(picture.convert('RGB')))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise Refusal(f'{os.path.join(path, name)}: not a readable picture ({error})') from None
            if frames[-1].shape != frames[0].shape:
                raise Refusal(f'{os.path.join(path, name)}: its size differs from that of {names[0]}')
        return np.stack(frames)
    try:
        import av
    except ImportError:
        raise Refusal(f'{path}: video files need the package: pip install av') from None
    try:
        with av.open(path) as container:
            return np.stack([frame.to_ndarray(format='rgb24') for frame in container.decode(video=0)])
    except (av.error.FFmpegError, ValueError, IndexError) as error:
        raise Refusal(f'{path}: not a readable video ({error})') from None


def number_of(path):
    """The number at the end of a name (clip_00017 → 17), or None."""
    digits = re.search(r'(\d+)$', os.path.splitext(os.path.basename(path))[0])
    return int(digits[1]) if digits else None


def only(folder, files, what):
    """The one of these files that a clip's folder has; raises Refusal by name where there are none or several."""
    if len(files) != 1:
        raise Refusal(f'{folder}: has {len(files) or "no"} {what}')
    return os.path.join(folder, files[0])


def resized(height, width, short):
    """Size of a picture whose short side becomes `short` pixels; the long side is rounded down, as V-JEPA 2 was trained."""
    least = min(height, width)
    return short * height // least, short * width // least


def read_content(folder):
    """
    What a clip's folder shows: features (T,N,D) of feature_maps/*.npy, stored as (T*256,D) or (T,N,D), float16 or float32,
    or frames (F,size,size,3) uint8 of rgb/, of a .npy array or of a video file.
    """
    if not os.path.isdir(folder):
        raise Refusal(f'{folder}: there is no such clip')
    maps = os.path.join(folder, 'feature_maps')
    if os.path.isdir(maps):
        path = only(maps, [f for f in os.listdir(maps) if f.endswith('.npy')], '.npy files of features; it must be one')
        z = read_array(path)
        if z.dtype not in (np.float16, np.float32) or z.ndim not in (2, 3) or 0 in z.shape or (z.ndim == 2 and len(z) % 256):
            raise Refusal(f'{path}: must be (T*256,D) or (T,N,D), float16 or float32, not {z.shape} {z.dtype}')
        z = torch.from_numpy(np.array(z.reshape(-1, 256, z.shape[-1]) if z.ndim == 2 else z)).half()
        if (z.view(torch.int16) & 0x7c00).max() == 0x7c00:             # an exponent of ones; isfinite() takes 20 times as long
            raise Refusal(f'{path}: has values that are not finite in float16')
        return z
    files = [f for f in os.listdir(folder) if f.endswith(VIDEOS) or (f.endswith('.npy') and f != 'actions.npy') or f == 'rgb']
    path = only(folder, files, 'of feature_maps/, rgb/, a .npy array and a video file; it must be one')
    video = read_video(path)
    if len(video) % data.TUBELET:
        raise Refusal(f'{path}: has {len(video)} frames; a step is {data.TUBELET}, so their number must be even')
    x = torch.from_numpy(video).permute(0, 3, 1, 2).float()            # F,3,H,W
    # V-JEPA 2 was trained on the middle of the picture: short side to 256/224 of the crop. The patch encoder sees all of it.
    short = size if encoder == 'patch' else int(size * 256 / 224)
    x = F.interpolate(x, resized(*x.shape[-2:], short), mode='bilinear', antialias=True)
    top, left = (x.shape[-2] - size) // 2, (x.shape[-1] - size) // 2
    return x[..., top:top + size, left:left + size].clamp(0, 255).round().byte().permute(0, 2, 3, 1)


def read_actions(folder, steps):
    """Actions (steps,A) from actions_states/actions.npy or actions.npy (rows,A): its first non-zero row, at step 1."""
    files = [os.path.join(folder, *f) for f in (('actions_states', 'actions.npy'), ('actions.npy',))]
    path = next((f for f in files if os.path.exists(f)), files[0])
    rows = read_array(path)
    if rows.ndim != 2 or 0 in rows.shape or rows.dtype.kind not in 'fiu' or not np.isfinite(rows).all():
        raise Refusal(f'{path}: actions must be finite numbers, (rows,A), not {rows.shape} {rows.dtype}')
    actions = np.zeros((steps, rows.shape[1]), np.float32)
    actions[0] = rows[np.argmax(rows.any(1))]
    return actions


def own_split(folders, example):
    """A split of own clips: folders, and the content and actions of a clip that all must be shaped like."""
    shape, (steps, A) = example[0].shape, example[1].shape

    def content(i, j):
        good, kept = [], []
        for number in range(i, j):
            try:
                clip = read_content(folders[number])
                if clip.shape != shape:
                    raise Refusal(f'{folders[number]}: shape {tuple(clip.shape)} differs from {tuple(shape)} of {example[2]}')
                if read_actions(folders[number], steps).shape != (steps, A):
                    raise Refusal(f'{folders[number]}: its actions do not have the {A} numbers of {example[2]}')
            except Refusal as error:
                if not skip_bad:
                    raise
                print(f'skipped: {error}')
                continue
            good.append(clip)
            kept.append(number)
        return torch.stack(good).to(device) if good else torch.empty(0, *shape, dtype=example[0].dtype), kept
    return len(folders), lambda kept: np.stack([read_actions(folders[i], steps) for i in kept]), {}, content


def numbered_clips(parent):
    """The clip folders in a folder, by their number or, without one, their name → {key: path}, in order of name."""
    numbered = {}
    for path in sorted(f.path for f in os.scandir(parent) if f.is_dir()):
        key = number_of(path)
        key = os.path.basename(path) if key is None else key
        if key in numbered:
            raise Refusal(f'{path} and {numbered[key]} are two clips with one number')
        numbered[key] = path
    return numbered


def find_clips():
    """The folders of own clips → {split: [folder, ...]}, by folder or by the numbers of --split."""
    if not os.path.isdir(source):
        raise Refusal(f'--source={source}: neither "physics" nor a folder')
    found = {}
    if not split:
        for name in sorted(f.name for f in os.scandir(source) if f.is_dir() and not f.name.startswith('.')):
            found[name] = list(numbered_clips(os.path.join(source, name)).values())
    else:
        numbered, taken = numbered_clips(source), set()
        for word in split.split(','):
            match = re.fullmatch(r'(\w+):(\d+)-(\d+)', word.strip())
            if not match or int(match[2]) > int(match[3]):
                raise Refusal(f'--split={split}: {word!r} is not name:first-last, such as train:17000-21999')
            numbers = range(int(match[2]), int(match[3]) + 1)
            if len(numbers) > 10**7 or taken.intersection(numbers):
                raise Refusal(f'--split={split}: {word!r} has clips of another range, or more than ten million')
            taken.update(numbers)
            # What is not a split of train.py is a phase of adapt.py; A2 is the world of A again.
            name = 'A' if match[1] in ('A1', 'A2') else match[1]
            name = name if re.fullmatch('train|val|(fit|test)_.*', name) else f'test_{name}'
            missing = [os.path.join(source, f'clip_{number:05d}') for number in numbers if number not in numbered]
            if missing and not skip_bad:
                raise Refusal(f'{missing[0]}: clip is missing ({len(missing)} of {word.strip()})')
            found.setdefault(name, []).extend(numbered[number] for number in numbers if number in numbered)
            if missing:
                print(f'skipped: {len(missing)} clips of {word.strip()} are missing, the first is {missing[0]}')
    empty = [name for name in {'train': [], **found} if not found.get(name)]
    if empty:
        raise Refusal(f'--source={source}: split {empty[0]} has no clips; they belong into '
                      f'{os.path.join(source, empty[0])}/<clip>/ or into a range of --split')
    if 'val' not in found:                                             # the training clips nobody trains on
        found['val'] = found['train'][9::10] or found['train'][-1:]
        found['train'] = [folder for folder in found['train'] if folder not in set(found['val'])] or found['val']
        print(f"no split val: {len(found['val'])} of the clips of train, every tenth, are held out as val")
    return found


def first_clip(folders):
    """The clip that all others must be shaped like: content, actions and folder of the first one that can be read."""
    for folder in folders:
        try:
            clip = read_content(folder)
            steps = len(clip) if clip.dtype != torch.uint8 else len(clip) // data.TUBELET
            return clip, read_actions(folder, steps), folder
        except Refusal:
            if not skip_bad:
                raise
    raise Refusal(f'--source={source}: not one of {len(folders)} clips of train can be read')


# ---- files -----------------------------------------------------------------------------------------------------------

def save(file, write):
    """Write a file of the set atomically by calling write(file object), and note its sha256 in the manifest."""
    path = os.path.join(folder, file)
    write_atomically(path, write)
    manifest['sha256'][file] = sha256(path)


def stored(clips, steps):
    """The first clips of train as they were stored, layer-normed like what data.Split gives → (n,steps,N,D) float32."""
    files = [os.path.join(folder, shard['file']) for shard in manifest['splits']['train']['shards']]
    z = np.concatenate([np.load(f, mmap_mode='r')[:clips, :steps] for f in files[:-(-clips // shard_clips)]])[:clips]
    return F.layer_norm(torch.from_numpy(z).float(), z.shape[-1:])


def fit_decoder(content):
    """
    Least squares from layer-normed features to a tubelet's pixels → float32 (D+1, 3*512), the last row the bias.
    It turns predicted features back into pictures (data.pictures), whatever the encoder was.
    """
    xx, xy, done = 0, 0, 0
    first_shard = manifest['splits']['train']['shards'][0]
    z = stored(min(512, first_shard['clips']), shape[0])
    tried = first_shard['clips'] + len(first_shard['skipped'])
    for start in range(0, tried, 32):
        if done == len(z):
            break
        frames = content(start, min(start + 32, tried))[0][:len(z) - done]
        x = F.pad(z[done:done + len(frames)].to(device), (0, 1), value=1.0).flatten(0, 2).double()
        y = data.tubelets(frames, PATCH).flatten(3).flatten(0, 2).double()
        xx, xy, done = xx + x.T @ x, xy + x.T @ y, done + len(frames)
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
    for row, (domain, (mu, mass, camera)) in zip(axes, data.DOMAINS.items()):
        drawn = data.simulate(domain, shown, seed, 'test_A')  # the same draws in every row: only the physics differs
        frames = data.render(drawn, 128).float() / 255
        ghost = torch.stack([0.4 * frames[:, 0], 0.65 * frames[:, data.FRAMES // 2], frames[:, -1]]).amax(0)
        for ax, picture in zip(row, ghost):
            ax.imshow(picture.numpy())
            ax.set_xticks([]), ax.set_yticks([])
        row[0].set_ylabel(f'{domain}\nμ {mu}, {mass} kg' + (f', {camera}°' if camera else ''), fontsize=8)
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
    ax.set_xticks(ticks := [1, 2, 5, 10, 20, 50], [str(t) for t in ticks])
    ax.minorticks_off(), ax.legend()
    fig.tight_layout()
    fig.savefig(os.path.join(folder, 'displacement.png'), dpi=90)
    plt.close(fig)


# ---- what there is to do ---------------------------------------------------------------------------------------------
if source == 'physics':
    domains = {'train': 'A', 'val': 'A', 'fit_B': 'B', **{f'test_{domain}': domain for domain in data.DOMAINS}}
    count = {'train': clips, 'fit_B': max(test_clips, clips // 5)}
    splits = {s: physics_split(s, domain, count.get(s, test_clips)) for s, domain in domains.items()}
    example = splits['train'][3](0, 1)[0]
else:
    found = find_clips()
    first = first_clip(found['train'])
    splits = {s: own_split(folders, first) for s, folders in found.items()}
    domains = {s: s.removeprefix('test_') for s in found}
    example = first[0][None].to(device)
if example.dtype != torch.uint8:                                       # features: taken as they are
    encoder, encode_clips = 'none', lambda z: z
elif encoder == 'patch':
    basis, encode_clips = cosine_basis(), patch_encode
else:
    if not weights and not repository:
        raise Refusal(f'--encoder={encoder}: get {OFFICIAL}/{official} and name it with --weights')
    path = weights or os.path.join(torch.hub.get_dir(), 'checkpoints', f'vjepa2-{encoder}.safetensors')
    if not weights and not os.path.exists(path):
        download(repository, path)
    vjepa2, encode_clips = load_vjepa2(path, part).to(device), vjepa2_encode
    if vjepa2.version == '2.1':
        print(f'V-JEPA 2.1: the {part} of {path}')
        if size == PATCH:
            raise Refusal(f'--size={size}: V-JEPA 2.1 needs two rows and two columns of patches, {2 * PATCH} pixels')
    stats = [torch.tensor(x, device=device).view(3, 1, 1, 1) for x in (MEAN, STD)]
    if encode == 'clip':
        print("encode='clip': all frames attend to each other, so z_1 has seen the whole clip and a jump from it is easy")
shape = list(encode_clips(example).shape[1:])                          # T, N, D
side = round(shape[1] ** 0.5)
if side ** 2 != shape[1]:
    raise Refusal(f'{shape[1]} patches per step are not a square grid')

folder = folder_of(name)
manifest_path = os.path.join(folder, 'manifest.json')
made_from = {'source': source, 'split': split, 'encoder': encoder, 'encode': encode, 'weights': weights, 'part': part,
             'seed': seed, 'size': size, 'fps': data.FPS, 'world_m': data.WORLD,
             'domains': {k: list(v) for k, v in data.DOMAINS.items()}, 'skip_bad': skip_bad, 'clips': {s: parts[0] for s, parts in splits.items()}}
manifest = {'complete': False, 'made_from': made_from, 'shape': shape, 'dtype': 'float16', 'grid': [side, side],
            'patch': PATCH, 'sha256': {}, 'splits': {s: {'domain': d, 'shards': []} for s, d in domains.items()}}
os.makedirs(folder, exist_ok=True)
leftovers = [f.path for f in os.scandir(folder) if f.name.endswith('.tmp')] if os.path.exists(manifest_path) else []
claim(folder, *(path.removesuffix('.tmp') for path in leftovers))
if os.path.exists(manifest_path):
    found = parse_manifest(manifest_path)
    if (found['made_from'], found['shape']) != (made_from, shape):
        raise Refusal(f'{folder} holds a set made with other settings; choose another --name or delete the folder')
    manifest = found
    damaged = [file for file in manifest['sha256'] if not intact(folder, manifest, file)]
    if manifest['complete'] and not damaged:
        print(f'{folder} is complete, every file as it was written; nothing to do')
        sys.exit(0)
    manifest['complete'] = False
    for entry in manifest['splits'].values():                          # a damaged shard, and those after it, are made again
        entry['shards'] = list(itertools.takewhile(lambda shard: shard['file'] not in damaged, entry['shards']))
    if damaged:
        print(f'{", ".join(damaged)}: damaged or missing, made again')
shard_clips = max(1, SHARD_BYTES // (2 * int(np.prod(shape))))
print(f'{folder}: {sum(made_from["clips"].values()):,} clips of {shape[0]} steps x {shape[1]} patches x {shape[2]}')

# ---- do it -----------------------------------------------------------------------------------------------------------
start, skipped = time.time(), 0
for which, (count, actions, physics, content) in splits.items():
    shards = manifest['splits'][which]['shards']
    done = min(count, len(shards) * shard_clips)                       # before an interruption
    for i in data.progress(range(done, count), which):
        place = i % shard_clips
        if place == 0:
            # One array, filled: small ones kept between the encoder's large ones would pin gigabytes of freed memory.
            z, kept = np.empty((min(shard_clips, count - i), *shape), np.float16), []
        if place % batch == 0:
            clip, readable = content(i, min(i + batch, i - place + shard_clips, count))
            if readable:
                z[len(kept):len(kept) + len(readable)] = encode_clips(clip).half().cpu().numpy()
            kept += readable
        if place == shard_clips - 1 or i == count - 1:
            file = f'{which}_{len(shards):05d}.npy'
            save(file, lambda f: np.save(f, z[:len(kept)]))
            shards.append({'file': file, 'clips': len(kept), 'skipped': sorted(set(range(i - place, i + 1)) - set(kept))})
            write_manifest(folder, manifest)
    bad = {i for shard in shards for i in shard['skipped']}
    if len(bad) == count:
        raise Refusal(f'split {which}: none of its {count} clips can be read')
    skipped += len(bad)
    save(f'{which}_actions.npy', lambda f: np.save(f, actions([i for i in range(count) if i not in bad])))
    if physics:
        save(f'{which}_physics.npz', lambda f: np.savez(f, **physics))
if example.dtype == torch.uint8:
    manifest['decoder'] = 'decoder.npy'
    decoder = fit_decoder(splits['train'][3])
    save('decoder.npy', lambda f: np.save(f, decoder))
if source == 'physics':
    # Before the push, z_1 can know where there is room to slide, no more. What is above that, it has seen in the future.
    z_1 = stored(min(1600, 2**27 // (shape[1] * shape[2])), 1)         # at most 512 MiB
    position = splits['train'][2]['position'][:len(z_1)]
    explained = data.explained(z_1.flatten(1), torch.from_numpy(position[:, -1] - position[:, 0]))
    print(f'z_1 alone explains {explained:.0%} of the displacement (linear read-out, {len(z_1):,} clips left out in turn)')
    draw_pictures()
manifest['complete'] = True
write_manifest(folder, manifest)
print(f'done in {time.time() - start:.0f} s' + (f'; pictures: {folder}/clips.png' if source == 'physics' else '')
      + (f'; {skipped} clips skipped' if skip_bad else ''))
