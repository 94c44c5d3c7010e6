"""
Own clips, in the layout of docs/own_data.md. The first bad clip is refused by its name.

The splits are folders, <source>/<split>/<clip>, or ranges of the numbers at the end of the clips' names. For
another layout, change CONTENT; for other files of actions, change read_actions().
"""
import functools
import glob
import math
import os
import re

import numpy as np
import torch
import torch.nn.functional as F

from configurator import listed, refuse
from data import TUBELET

# Features, (T*256,D) or (T,N,D); pictures, PNG or JPEG, an array (F,H,W,3) uint8 or a video file.
CONTENT = {'features': ['feature_maps/*.npy'],
           'pictures': ['rgb', '*.npy', '*.mp4', '*.avi', '*.mov', '*.mkv', '*.webm']}
# Patches per step of features that are stored as (T*PATCHES,D)
PATCHES = 256


def paths_in(folder, pattern='*'):
    """The paths in a folder, in order, without those of the system (.DS_Store, __MACOSX, @eaDir)."""
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))
    return [path for path in paths if not os.path.basename(path).startswith(('__', '@'))]


def number_of(path):
    """The number at the end of a name (clip_00017 → 17, frame_02.png → 2), -1 where there is none."""
    digits = re.search(r'(\d+)(\.\w+)?$', path)
    return int(digits[1]) if digits else -1


def clips_by_number(source, ranges):
    """'train:17000-21999,B:22000-22999' → {'train': [folder, ...], 'B': [...]}."""
    numbered = {number_of(path): path for path in paths_in(source)}
    named = {}
    for written in listed(ranges):
        match = re.fullmatch(r'(\w+):(\d+)-(\d+)', written)
        if not match:
            refuse(f'--split={ranges}: {written!r} is not name:first-last, such as train:17000-21999')
        name, first, last = match.groups()
        folders = named.setdefault(name, [])
        for number in range(int(first), int(last) + 1):
            if number not in numbered:
                refuse(f'{source}/clip_{number:05d}: clip is missing, or in two ranges of --split')
            folders.append(numbered.pop(number))
    return named


def find_clips(source, ranges):
    """The folders of clips → {split: [folder, ...]}. Without a val, every tenth clip of train is held out."""
    if ranges:
        named = clips_by_number(source, ranges)
    else:
        named = {os.path.basename(folder): paths_in(folder) for folder in paths_in(source)}
    usual = re.compile('train|val|(fit|test)_.*')
    found = {name if usual.fullmatch(name) else f'test_{name}': clips for name, clips in named.items()}
    if len(found.get('train', ())) < 2 or not all(found.values()):
        refuse(f'--source={source}: no clips of train, or of another split; see docs/own_data.md')
    if 'val' not in found:
        train = found['train']
        found['val'] = train[9::10] or train[-1:]
        found['train'] = [folder for folder in train if folder not in set(found['val'])]
        print(f'no split val: {len(found["val"])} of the clips of train, every tenth, are held out as val')
    return found


def content(folder, kind):
    """The paths of what a clip has of a kind, 'features' or 'pictures', of which it should have one."""
    paths = [path for pattern in CONTENT[kind] for path in paths_in(folder, pattern)]
    return [path for path in paths if os.path.basename(path) not in ('actions.npy', 'states.npy')]


def read(path, reader):
    """What reader(path) reads, or a refusal that names the file."""
    try:
        return reader(path)
    # A damaged file can raise a dozen kinds of exceptions, such as those of Python's tokenizer.
    except Exception as error:
        refuse(f'{path}: cannot be read ({" ".join(str(error).split())})')


def read_content(folder, kind, reader):
    """What reader(path) makes of a clip's features or pictures → (path, array)."""
    paths = content(folder, kind)
    if len(paths) != 1:
        refuse(f'{folder}: must have {kind} once, not {len(paths)} times')
    return paths[0], read(paths[0], reader)


def read_rows(folder, file):
    """actions.npy or states.npy of a clip → (rows,numbers) float32; None where it is missing."""
    paths = paths_in(folder, f'actions_states/{file}') or paths_in(folder, file)
    if not paths:
        return None
    rows = read(paths[0], lambda path: np.load(path).astype(np.float32))
    if rows.ndim != 2 or not np.isfinite(rows).all():
        refuse(f'{paths[0]}: must be (rows,numbers), finite in float32')
    return rows


def read_actions(folder, steps):
    """
    Actions (steps,A) of a clip. One non-zero row is the push at step 1, wherever it is. Several are pushes at
    their steps: then there is a row for each step, or for each but the last.
    """
    rows = read_rows(folder, 'actions.npy')
    if rows is None or not rows.any():
        refuse(f'{folder}: has no actions.npy, or one that is zero throughout')
    pushes = rows.any(1)
    if pushes.sum() == 1:
        rows = rows[pushes]
    elif len(rows) not in (steps, steps - 1):
        refuse(f'{folder}: several pushes need a row per step, {steps} or {steps - 1}, not {len(rows)}')
    return np.pad(rows, ((0, steps - len(rows)), (0, 0)))


def read_states(folder, steps):
    """States (steps,S) of a clip, or None. Of a row per frame, the first of each step is taken."""
    rows = read_rows(folder, 'states.npy')
    if rows is None or len(rows) == steps:
        return rows
    if len(rows) != steps * TUBELET:
        refuse(f'{folder}: states need a row per step or per frame, not {len(rows)}')
    return rows[::TUBELET]


def read_arrays(folders, steps, first):
    """{'actions': (n,steps,A), 'states': (n,steps,S) if any} of clips that are like the clip `first`."""
    clips = [(read_actions(folder, steps), read_states(folder, steps)) for folder in (first, *folders)]
    like, *shapes = [[np.shape(rows) for rows in clip] for clip in clips]
    for folder, shape in zip(folders, shapes):
        if shape != like:
            refuse(f'{folder}: actions and states are {shape}, those of {first} {like}')
    actions, states = zip(*clips[1:])
    arrays = {'actions': np.stack(actions)}
    return arrays if states[0] is None else {**arrays, 'states': np.stack(states)}


def read_features(folder, shape=None):
    """Features of a clip → (their absolute path, (T,N,D) float16). shape: that of the other clips."""
    path, z = read_content(folder, 'features', lambda path: torch.from_numpy(np.load(path)).half())
    if z.dim() == 2 and len(z) % PATCHES == 0:
        z = z.view(-1, PATCHES, z.shape[-1])
    if z.dim() != 3 or z.shape != (shape or z.shape) or not z.isfinite().all():
        refuse(f'{path}: must be (T*256,D) or (T,N,D), alike in all clips, and finite; is {tuple(z.shape)}')
    if math.isqrt(z.shape[1]) ** 2 != z.shape[1]:
        refuse(f'{path}: {z.shape[1]} patches per step are not a square grid')
    return os.path.abspath(path), z


def read_pictures(path):
    """A .npy array, a folder of numbered pictures or a video file → (F,H,W,3) uint8."""
    if path.endswith('.npy'):
        return np.load(path)
    import imageio.v3
    if not os.path.isdir(path):
        return imageio.v3.imread(path, plugin='pyav')
    pictures = sorted(paths_in(path), key=number_of)
    return np.stack([imageio.v3.imread(picture, plugin='pillow', mode='RGB') for picture in pictures])


def read_frames(folder, size, vjepa2=False):
    """The middle of a clip's pictures → (F,size,size,3) uint8; for V-JEPA 2 224/256 of it, as in training."""
    path, frames = read_content(folder, 'pictures', read_pictures)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        refuse(f'{path}: must be (frames,height,width,3) uint8, not {frames.shape} {frames.dtype}')
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).float()           # (F,3,H,W)
    short = size * 256 // 224 if vjepa2 else size
    # The long side is rounded down, as in V-JEPA 2.
    height, width = [short * side // min(x.shape[-2:]) for side in x.shape[-2:]]
    x = F.interpolate(x, (height, width), mode='bilinear', antialias=True)
    top, left = (height - size) // 2, (width - size) // 2
    x = x[..., top:top + size, left:left + size]
    return x.clamp(0, 255).round().byte().permute(0, 2, 3, 1)


def read_clips(folders, steps, vjepa2, device, indices, size):
    """The pictures of some clips → (n,F,size,size,3) uint8, F = TUBELET * steps."""
    clips = []
    for folder in [folders[i] for i in indices]:
        clips.append(read_frames(folder, size, vjepa2))
        if len(clips[-1]) != steps * TUBELET:
            refuse(f'{folder}: has {len(clips[-1])} pictures; {steps} steps have {TUBELET} each')
    return torch.stack(clips).to(device)


def open_splits(found, kind, vjepa2, device):
    """{split: [folder, ...]} → {split: (arrays for its .npz, frames(indices, size))}, as prepare.py wants."""
    first = found['train'][0]
    steps = len(read_features(first)[1] if kind == 'features' else read_frames(first, 16)[::TUBELET])
    splits = {}
    for split, folders in found.items():
        frames = functools.partial(read_clips, folders, steps, vjepa2, device)
        splits[split] = read_arrays(folders, steps, first), frames
    return splits
