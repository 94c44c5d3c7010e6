"""Own clips, in the layout of docs/own_data.md; for another layout, change CONTENT. The splits are folders,
<source>/<split>/<clip>, or ranges of the numbers at the end of clips' names. The first bad clip is refused.
"""
import functools
import glob
import os
import re

import numpy as np
import torch
import torch.nn.functional as F

from configurator import listed, refuse
from data import TUBELET, normed

# Features are (T*256,D) or (T,N,D); pictures PNG or JPEG, an array (F,H,W,3) uint8 or a video file.
CONTENT = {
    'features': ['feature_maps/*.npy'],
    'pictures': ['rgb', 'video*.npy', '*.mp4', '*.avi', '*.mov', '*.mkv', '*.webm'],
    'actions': ['actions_states/actions.npy', 'actions.npy'],
    'states': ['actions_states/states.npy', 'states.npy'],
}
PATCHES = 256      # per step, of features that are stored as (T*PATCHES,D)


def paths_in(folder, pattern='*'):
    """The paths in a folder, in order."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))


def clips_by_number(source, ranges):
    """'train:17000-21999,B:22000-22999' → {'train': [folder, ...], 'B': [...]}."""
    numbered = {int(number): path for path in paths_in(source) for number in re.findall(r'\d+$', path)}
    named = {}
    for written in listed(ranges):
        match = re.fullmatch(r'(\w+):(\d+)-(\d+)', written)
        if not match:
            refuse(f'--split={ranges}: {written!r} is not name:first-last, such as train:17000-21999')
        name, first, last = match.groups()
        for number in range(int(first), int(last) + 1):
            if number not in numbered:
                refuse(f'{source}/clip_{number:05d}: clip is missing, or in two ranges of --split')
            named.setdefault(name, []).append(numbered.pop(number))
    return named


def find_clips(source, ranges):
    """The folders of clips → {split: [folder, ...]}. Without a val, every tenth clip of train is held out."""
    in_folders = {os.path.basename(folder): paths_in(folder) for folder in paths_in(source)}
    named = clips_by_number(source, ranges) if ranges else in_folders
    found = {name if re.fullmatch('train|val|(fit|test)_.*', name) else f'test_{name}': clips
             for name, clips in named.items()}
    if len(found.get('train', ())) < 2 or not all(found.values()):
        refuse(f'--source={source}: no clips of train, or of another split; see docs/own_data.md')
    if 'val' not in found:
        found['val'] = found['train'][::-10]
        del found['train'][::-10]
        print(f'no split val: {len(found["val"])} of the clips of train, every tenth, are held out as val')
    return found


def content(folder, kind):
    """The paths of what a clip has of a kind of CONTENT, of which it should have one."""
    return [path for pattern in CONTENT[kind] for path in paths_in(folder, pattern)]


def read_file(path):
    """A .npy array, or a folder of numbered pictures or a video file → (F,H,W,3) uint8."""
    if path.endswith('.npy'):
        return np.load(path)
    import imageio.v3
    if not os.path.isdir(path):
        return imageio.v3.imread(path, plugin='pyav')
    pictures = sorted(paths_in(path), key=lambda path: [int(number) for number in re.findall(r'\d+', path)])
    return np.stack([imageio.v3.imread(picture, plugin='pillow', mode='RGB') for picture in pictures])


def read(folder, kind, dtype=None):
    """What a clip has of a kind → (its absolute path, array). A damaged file can raise any exception."""
    paths = content(folder, kind)
    if len(paths) != 1:
        refuse(f'{folder}: must have {kind} once, not {len(paths)} times')
    try:
        array = np.asarray(read_file(paths[0]), dtype)
        assert np.isfinite(array).all(), 'not finite'
    except Exception as error:
        refuse(f'{paths[0]}: cannot be read ({" ".join(str(error).split())})')
    return os.path.abspath(paths[0]), array


def read_rows(folder, kind, steps, frame_time=0):
    """Actions or states of a clip → (steps,numbers) float32. A single push is at step 1, wherever it was.
    With a frame_time, in seconds, actions are forces, added up to one impulse."""
    path, rows = read(folder, kind, np.float32)
    if kind == 'actions' and frame_time:
        rows = frame_time * rows.sum(0, keepdims=True)
    filled = rows.any(-1)
    if kind == 'actions' and filled.sum() == 1:
        rows = rows[filled]
    elif kind == 'states' and len(rows) == steps * TUBELET:
        rows = rows[::TUBELET]
    elif len(rows) not in (steps - 1, steps) or not filled.any():
        refuse(f'{path}: needs a row per step, {steps}, which are not all zero; has {len(rows)}')
    return np.pad(rows, ((0, steps - len(rows)), (0, 0)))


def read_features(folder, shape=None):
    """Where the features of a clip are, and their shape (T,N,D), which must be `shape` if it is given."""
    path, z = read(folder, 'features', np.float16)
    if z.ndim == 2 and len(z) % PATCHES == 0:
        z = z.reshape(-1, PATCHES, z.shape[1])
    if z.ndim != 3 or z.shape != (shape or z.shape):
        refuse(f'{path}: must be (T*256,D) or (T,N,D), alike in all clips; is {z.shape}')
    return path, z.shape


def read_frames(folder, size, vjepa2=False, steps=None):
    """The middle of a clip's pictures → (F,size,size,3) uint8; for V-JEPA 2 224/256 of it, as in training."""
    path, frames = read(folder, 'pictures')
    if steps and len(frames) != steps * TUBELET:
        refuse(f'{path}: has {len(frames)} pictures; {steps} steps have {TUBELET} each')
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        refuse(f'{path}: must be (frames,height,width,3) uint8, not {frames.shape} {frames.dtype}')
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).float()           # (F,3,H,W)
    short = size * 256 // 224 if vjepa2 else size
    # The long side is rounded down, as in V-JEPA 2.
    height, width = [short * side // min(x.shape[-2:]) for side in x.shape[-2:]]
    x = F.interpolate(x, (height, width), mode='bilinear', antialias=True)
    top, left = (height - size) // 2, (width - size) // 2
    return x[..., top:top + size, left:left + size].clamp(0, 255).round().byte().permute(0, 2, 3, 1)


def open_splits(found, kind, vjepa2, frame_time, device):
    """{split: [folder, ...]} → {split: (arrays for its .npz, frames(indices, size))}, as prepare.py wants."""
    first = found['train'][0]
    steps = read_features(first)[1][0] if kind == 'features' else len(read_frames(first, 16)) // TUBELET
    kinds = ['actions', 'states'] if content(first, 'states') else ['actions']

    def frames(folders, indices, size):
        return torch.stack([read_frames(folders[i], size, vjepa2, steps) for i in indices]).to(device)
    splits = {}
    for split, folders in found.items():
        arrays = {kind: np.stack([read_rows(folder, kind, steps, frame_time) for folder in folders])
                  for kind in kinds}
        splits[split] = arrays, functools.partial(frames, folders)
    return splits


def say_what_step_1_tells(train, val):
    """How well a linear map reads the push from z_1, which should not know it: ridge regression on up to 400
    clips of train, data.Clips, correlation on up to 200 of val → a sentence."""
    def first_steps(clips, most):
        features, a, _ = clips.stored(np.arange(min(most, len(clips))), steps=1)
        return normed(features).flatten(1), a[:, 0]                    # (n,N*D), (n,A)
    (x, a), (x_val, a_val) = first_steps(train, 400), first_steps(val, 200)
    centre = x.mean(0)
    x, x_val = x - centre, x_val - centre
    # As many equations as clips, not as features.
    gram = x @ x.T
    gram.diagonal().add_(0.1 * gram.diagonal().mean())
    read_out = x_val @ (x.T @ torch.linalg.solve(gram, a - a.mean(0)))
    a_val = a_val - a_val.mean(0)
    found = ((read_out * a_val).sum() / (read_out.norm() * a_val.norm()).clamp(min=1e-12)).item()
    chance = 3 / a_val.numel() ** 0.5
    measured = f'correlation {found:.2f}, chance is up to {chance:.2f}'
    if found < chance:
        return f'step 1 does not tell the push: {measured}'
    return (f'WARNING: step 1 tells the push: {measured}. Either it was encoded together\n'
            'with later pictures; then it saw the future, and jump losses prove nothing: encode again, each\n'
            'step alone (--encode=step). Or pushes go with the places where objects start.')
