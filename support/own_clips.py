"""
Own clips: the folders and files that they come in. No code in a file is run, and a bad file is refused by its name.

    <clip>/actions_states/actions.npy, or <clip>/actions.npy   (rows,A), the impulse in its first non-zero row
    <clip>/feature_maps/<any>.npy                              features, (T*256,D) or (T,N,D), float16 or float32
    <clip>/rgb/frame_00001.png, ...                            or an unbroken row of pictures
    <clip>/<any>.npy                                           or pictures, (frames,height,width,3) uint8
    <clip>/<any>.mp4, .avi, .mov, .mkv or .webm                or a video file

The splits are folders, <source>/<split>/<clip>, or ranges of the numbers at the end of the clips' names. To add a layout,
change read_content; to read other files of actions, change read_actions.
"""
import os
import re
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from configurator import Refusal

VIDEOS = '.mp4', '.avi', '.mov', '.mkv', '.webm'
# Patches per step of features that are stored as (T*PATCHES,D)
PATCHES = 256
# Grey levels, 0..255; pictures that change by less show nothing that moves.
NOISE = 16


# ---- files -------------------------------------------------------------------------------------------------------------

def number_of(path):
    """The number at the end of a name (clip_00017 → 17), or None."""
    digits = re.search(r'(\d+)$', os.path.splitext(os.path.basename(path))[0])
    return int(digits[1]) if digits else None


def only(folder, files, what):
    """The path of the only one of these files; raises Refusal that names the folder where there are none or several."""
    if len(files) != 1:
        raise Refusal(f'{folder}: has {len(files)} {what}')
    return os.path.join(folder, files[0])


def read_array(path):
    """A .npy file, memory-mapped; raises Refusal that names it."""
    try:
        return np.load(path, mmap_mode='r', allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise Refusal(f'{path}: not a readable .npy file ({error})') from None


def read_picture(path):
    """A .png file → (H,W,3) uint8; raises Refusal that names it."""
    # Installed with matplotlib.
    from PIL import Image
    try:
        with Image.open(path, formats=['PNG']) as picture:
            return np.asarray(picture.convert('RGB'))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Refusal(f'{path}: not a readable picture ({error})') from None


def read_pictures(folder):
    """A folder of pictures with consecutive numbers → frames (F,H,W,3) uint8."""
    names = [name for name in os.listdir(folder) if name.endswith('.png')]
    numbered = names and None not in map(number_of, names)
    if numbered:
        names.sort(key=number_of)
        first = number_of(names[0])
        numbered = [number_of(name) for name in names] == list(range(first, first + len(names)))
    if not numbered:
        raise Refusal(f'{folder}: holds no unbroken row of numbered pictures (frame_00001.png, frame_00002.png, ...)')
    frames = []
    for name in names:
        path = os.path.join(folder, name)
        frames.append(read_picture(path))
        if frames[-1].shape != frames[0].shape:
            raise Refusal(f'{path}: its size differs from that of {names[0]}')
    return np.stack(frames)


def read_video_file(path):
    """A video file → frames (F,H,W,3) uint8."""
    try:
        import av
    except ImportError:
        raise Refusal(f'{path}: video files need the package: pip install av') from None
    try:
        with av.open(path) as container:
            frames = [frame.to_ndarray(format='rgb24') for frame in container.decode(video=0)]
        return np.stack(frames)
    except (av.error.FFmpegError, ValueError, IndexError) as error:
        raise Refusal(f'{path}: not a readable video ({error})') from None


def read_frames(path):
    """Frames (F,H,W,3) uint8 of a .npy array, a folder of numbered pictures, or a video file."""
    if os.path.isdir(path):
        return read_pictures(path)
    if not path.endswith('.npy'):
        return read_video_file(path)
    frames = read_array(path)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise Refusal(f'{path}: must be (frames,height,width,3) uint8, not {frames.shape} {frames.dtype}')
    return np.array(frames)


def read_features(path):
    """A .npy file of features, (T*256,D) or (T,N,D), float16 or float32 → (T,N,D) float16."""
    z = read_array(path)
    whole_steps = z.ndim == 3 or (z.ndim == 2 and len(z) % PATCHES == 0)
    if z.dtype not in (np.float16, np.float32) or 0 in z.shape or not whole_steps:
        raise Refusal(f'{path}: must be (T*256,D) or (T,N,D), float16 or float32, not {z.shape} {z.dtype}')
    if z.ndim == 2:
        z = z.reshape(-1, PATCHES, z.shape[-1])                        # (T,N,D)
    z = torch.from_numpy(np.array(z)).half()
    if not torch.isfinite(z).all():
        raise Refusal(f'{path}: has values that are not finite in float16')
    return z


# ---- one clip ----------------------------------------------------------------------------------------------------------

@dataclass
class Crop:
    """How own pictures become square: they are resized, then the middle is cut out, or a window of it around what moves."""
    # Side of the square in pixels
    size: int
    # Short side of the resized picture in pixels
    short: int
    # Frames per time step
    tubelet: int
    # Of that square, a window of 1 / zoom of the side is kept
    zoom: float = 1
    # Where the window lies, down and across, among the places where it holds all that moves, each 0..1
    place: tuple = (0.5, 0.5)


def resized(height, width, short):
    """Size of a picture whose short side becomes `short` pixels. The long side is rounded down, as in V-JEPA 2."""
    least = min(height, width)
    return short * height // least, short * width // least


def window_start(changes, size, place):
    """
    Where a window of `size` pixels starts along one axis so that it holds all pixels that change.

    changes (side,) bool; place 0..1 chooses among the possible starts. Where not all of them fit, the window is centred on
    them. Where nothing changes, it is in the middle.
    """
    side = len(changes)
    changing = changes.nonzero()
    if not len(changing):
        return (side - size) // 2
    first = changing.min().item()
    end = changing.max().item() + 1
    earliest = max(0, end - size)
    latest = min(first, side - size)
    if earliest > latest:
        return (earliest + latest) // 2
    return earliest + int(place * (latest - earliest + 1))


def crop_to_motion(x, size, place):
    """Pictures (F,3,S,S) 0..255 → (F,3,size,size), the same window of all frames; place: see Crop."""
    change = x.amax(0) - x.amin(0)
    change = change.amax(0)                                            # (S,S)
    # Less than a quarter of the largest change is taken for noise and shadows.
    moves = change > max(NOISE, change.max() / 4)
    down, across = place
    top = window_start(moves.any(1), size, down)
    left = window_start(moves.any(0), size, across)
    return x[..., top:top + size, left:left + size]


def resize_and_crop(frames, crop):
    """Frames (F,H,W,3) uint8 of any size → (F,size,size,3) uint8: the middle of the picture or a window of it, see Crop."""
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).float()           # (F,3,H,W)
    # A window that is zoomed in is cut from a larger picture, so it is as sharp as the frames allow.
    height, width = resized(*x.shape[-2:], round(crop.zoom * crop.short))
    x = F.interpolate(x, (height, width), mode='bilinear', antialias=True)
    side = round(crop.zoom * crop.size)
    top = (height - side) // 2
    left = (width - side) // 2
    x = x[..., top:top + side, left:left + side]
    if crop.zoom > 1:
        x = crop_to_motion(x, crop.size, crop.place)
    return x.clamp(0, 255).round().byte().permute(0, 2, 3, 1)          # (F,size,size,3)


def read_content(folder, crop):
    """The content of a clip's folder: features (T,N,D) float16, or frames (F,size,size,3) uint8."""
    if not os.path.isdir(folder):
        raise Refusal(f'{folder}: there is no such clip')
    maps = os.path.join(folder, 'feature_maps')
    if os.path.isdir(maps):
        arrays = [f for f in os.listdir(maps) if f.endswith('.npy')]
        return read_features(only(maps, arrays, '.npy files of features; it must be one'))
    files = []
    for file in os.listdir(folder):
        is_array = file.endswith('.npy') and file != 'actions.npy'
        if file == 'rgb' or is_array or file.endswith(VIDEOS):
            files.append(file)
    path = only(folder, files, 'of feature_maps/, rgb/, a .npy array and a video file; it must be one')
    frames = read_frames(path)
    if len(frames) % crop.tubelet:
        raise Refusal(f'{path}: has {len(frames)} frames; a step is {crop.tubelet}, so their number must be even')
    return resize_and_crop(frames, crop)


def read_actions(folder, steps):
    """Actions (steps,A) from actions_states/actions.npy or actions.npy (rows,A): its first non-zero row, at step 1."""
    path = os.path.join(folder, 'actions_states', 'actions.npy')
    beside = os.path.join(folder, 'actions.npy')
    if os.path.exists(beside) and not os.path.exists(path):
        path = beside
    rows = read_array(path)
    if rows.ndim != 2 or 0 in rows.shape or rows.dtype.kind not in 'fiu' or not np.isfinite(rows).all():
        raise Refusal(f'{path}: actions must be finite numbers, (rows,A), not {rows.shape} {rows.dtype}')
    actions = np.zeros((steps, rows.shape[1]), np.float32)
    actions[0] = rows[np.argmax(rows.any(1))]
    return actions


# ---- splits ------------------------------------------------------------------------------------------------------------

@dataclass
class Clip:
    """The data of one clip."""
    folder: str
    # Features (T,N,D) float16, or frames (F,size,size,3) uint8
    content: torch.Tensor
    # (T,A) float32
    actions: np.ndarray


class OwnClips:
    """
    A Source (see prepare.py) of clips in folders. skip_bad: leave out clips that cannot be read, and print why. zooms: the
    factor by which each clip is zoomed in, None for 1.
    """

    # Not known for own clips.
    physics = {}

    def __init__(self, folders, domain, first, crop, skip_bad, device, zooms=None):
        self.folders, self.domain, self.first = folders, domain, first
        self.crop, self.skip_bad, self.device = crop, skip_bad, device
        self.zooms = zooms
        self.count = len(folders)

    def zoomed(self, zooms):
        """The first len(zooms) of these clips seen from nearer by, clip i by the factor zooms[i] → a Source."""
        folders = self.folders[:len(zooms)]
        return OwnClips(folders, self.domain, self.first, self.crop, self.skip_bad, self.device, zooms)

    def crop_of(self, index):
        """The Crop of a clip."""
        if self.zooms is None:
            return self.crop
        # A window in the middle of the motion would tell in the first step where the object is going.
        place = np.random.default_rng(index).random(2)
        return replace(self.crop, zoom=float(self.zooms[index]), place=tuple(place))

    def example(self):
        """The content of the first clip, whose shape all others must have."""
        return self.first.content[None].to(self.device)

    def actions(self, indices):
        """Actions (n,T,A) of these clips."""
        steps = len(self.first.actions)
        return np.stack([read_actions(self.folders[i], steps) for i in indices])

    def content(self, start, end):
        """Frames or features of the readable ones among clips start..end-1, and their indices."""
        clips = []
        readable = []
        for index in range(start, end):
            try:
                clips.append(self.read(self.folders[index], self.crop_of(index)))
                readable.append(index)
            except Refusal as refusal:
                if not self.skip_bad:
                    raise
                print(f'skipped: {refusal}')
        if not clips:
            return torch.empty(0, *self.first.content.shape, dtype=self.first.content.dtype), []
        return torch.stack(clips).to(self.device), readable

    def read(self, folder, crop):
        """The content of one clip; raises Refusal where its shape differs from that of the first."""
        first = self.first
        steps, numbers = first.actions.shape
        content = read_content(folder, crop)
        if content.shape != first.content.shape:
            shapes = f'shape {tuple(content.shape)} differs from {tuple(first.content.shape)}'
            raise Refusal(f'{folder}: {shapes} of {first.folder}')
        if read_actions(folder, steps).shape != first.actions.shape:
            raise Refusal(f'{folder}: its actions do not have the {numbers} numbers of {first.folder}')
        return content


def numbered_clips(parent):
    """The clips in a folder → {number: path}, in the order of their names. A clip without a number has its name as key."""
    numbered = {}
    for path in sorted(f.path for f in os.scandir(parent) if f.is_dir()):
        number = number_of(path)
        key = os.path.basename(path) if number is None else number
        if key in numbered:
            raise Refusal(f'{path} and {numbered[key]} are two clips with one number')
        numbered[key] = path
    return numbered


def clips_by_folder(source):
    """<source>/<split>/<clip> → {split: [folder, ...]}."""
    splits = sorted(f.name for f in os.scandir(source) if f.is_dir() and not f.name.startswith('.'))
    found = {}
    for split in splits:
        clips = numbered_clips(os.path.join(source, split))
        found[split] = list(clips.values())
    return found


def parse_ranges(ranges):
    """'train:17000-21999,B:22000-22999' → [(range as written, name, numbers), ...]; raises Refusal where two overlap."""
    parsed = []
    taken = set()
    for word in ranges.split(','):
        match = re.fullmatch(r'(\w+):(\d+)-(\d+)', word.strip())
        if not match or int(match[2]) > int(match[3]):
            raise Refusal(f'--split={ranges}: {word!r} is not name:first-last, such as train:17000-21999')
        first = int(match[2])
        last = int(match[3])
        numbers = range(first, last + 1)
        if len(numbers) > 10**7 or taken.intersection(numbers):
            raise Refusal(f'--split={ranges}: {word!r} has clips of another range, or more than ten million')
        taken.update(numbers)
        parsed.append((word.strip(), match[1], numbers))
    return parsed


def split_called(name):
    """The split of a range's name: train, val, fit_... and test_... stay; a phase of adapt.py becomes test_<phase>."""
    # A1 and A2 are both of domain A.
    if name in ('A1', 'A2'):
        return 'test_A'
    if re.fullmatch('train|val|(fit|test)_.*', name):
        return name
    return f'test_{name}'


def clips_by_number(source, ranges, skip_bad):
    """<source>/<clip> and the ranges of --split → {split: [folder, ...]}."""
    numbered = numbered_clips(source)
    found = {}
    for written, name, numbers in parse_ranges(ranges):
        present = found.setdefault(split_called(name), [])
        missing = []
        for number in numbers:
            if number in numbered:
                present.append(numbered[number])
            else:
                missing.append(os.path.join(source, f'clip_{number:05d}'))
        if missing and not skip_bad:
            raise Refusal(f'{missing[0]}: clip is missing ({len(missing)} of {written})')
        if missing:
            print(f'skipped: {len(missing)} clips of {written} are missing, the first is {missing[0]}')
    return found


def find_clips(source, ranges, skip_bad):
    """The folders of own clips → {split: [folder, ...]}. Without a val, every tenth clip of train is held out as val."""
    if not os.path.isdir(source):
        raise Refusal(f'--source={source}: neither "physics" nor a folder')
    found = clips_by_number(source, ranges, skip_bad) if ranges else clips_by_folder(source)
    for split in ('train', *found):
        if not found.get(split):
            raise Refusal(f'--source={source}: split {split} has no clips; they belong in '
                          f'{os.path.join(source, split)}/<clip>/ or in a range of --split')
    if 'zoom' in found:
        raise Refusal(f'--source={source}: a split cannot be called zoom; prepare.py makes one of this name itself')
    if 'val' not in found:
        train = found['train']
        found['val'] = train[9::10] or train[-1:]
        held_out = set(found['val'])
        found['train'] = [folder for folder in train if folder not in held_out] or found['val']
        print(f"no split val: {len(found['val'])} of the clips of train, every tenth, are held out as val")
    return found


def first_clip(source, folders, crop, skip_bad):
    """The first clip of train that can be read. All others must have its shape."""
    for folder in folders:
        try:
            content = read_content(folder, crop)
            steps = len(content)
            if content.dtype == torch.uint8:
                steps //= crop.tubelet
            return Clip(folder, content, read_actions(folder, steps))
        except Refusal:
            if not skip_bad:
                raise
    raise Refusal(f'--source={source}: none of the {len(folders)} clips of train can be read')


def open_sources(source, ranges, crop, skip_bad, device):
    """Every split of own clips → {split: OwnClips}. ranges: the numbers of each split; '' = splits are folders."""
    found = find_clips(source, ranges, skip_bad)
    first = first_clip(source, found['train'], crop, skip_bad)
    sources = {}
    for split, folders in found.items():
        domain = split.removeprefix('test_')
        sources[split] = OwnClips(folders, domain, first, crop, skip_bad, device)
    return sources
