"""
Own clips, file by file: arrays, pictures, videos and features, and how pictures become square.

No code in a file is run, and a bad file is refused by its name. To read another kind of pictures, change count_frames() and
read_frames().
"""
import os
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from configurator import Refusal

PICTURES = '.png', '.jpg', '.jpeg'
# Patches per step of features that are stored as (T*PATCHES,D)
PATCHES = 256
# Grey levels, 0..255; pictures that change by less show nothing that moves.
NOISE = 16


def visible(name):
    """Whether a name is the user's own: not .DS_Store, .ipynb_checkpoints, __MACOSX, @eaDir or $RECYCLE.BIN."""
    return not name.startswith(('.', '__', '@', '$'))


def holds(folder, endings):
    """The names of the files in a folder that end so, in order; none where there is no such folder."""
    if not os.path.isdir(folder):
        return []
    return [name for name in sorted(os.listdir(folder)) if visible(name) and name.lower().endswith(endings)]


def number_of(path):
    """The number at the end of a name (clip_00017 → 17), or None."""
    digits = re.search(r'(\d+)$', os.path.splitext(os.path.basename(path))[0])
    return int(digits[1]) if digits else None


def one_line(error):
    """The message of an exception, short and on one line, without numpy's advice to run what is in a file."""
    words = ' '.join(str(error).split())
    return words.partition(' If you trust')[0][:200]


def read_array(path):
    """A .npy file, memory-mapped; raises Refusal that names it."""
    try:
        array = np.load(path, mmap_mode='r', allow_pickle=False)
    # A damaged header can raise a dozen kinds of exceptions, such as those of Python's tokenizer.
    except Exception as error:
        raise Refusal(f'{path}: not a readable .npy file ({one_line(error)})') from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise Refusal(f'{path}: not a readable .npy file (it is an archive, as np.savez writes)')
    return array


def open_picture(path):
    """A .png or .jpg file as a picture of Pillow, of which only the header is read."""
    try:
        from PIL import Image
    except ImportError:
        raise Refusal(f'{path}: pictures need the package: pip install pillow') from None
    try:
        return Image.open(path, formats=['PNG', 'JPEG'])
    # As for .npy files: a damaged file can raise anything.
    except Exception as error:
        raise Refusal(f'{path}: not a readable picture ({one_line(error)})') from None


def read_picture(path):
    """A .png or .jpg file → (H,W,3) uint8. Transparency is left out; of 16 bits the upper 8 are taken. Raises Refusal."""
    with open_picture(path) as picture:
        try:
            if not picture.mode.startswith('I'):
                return np.asarray(picture.convert('RGB'))
            # Grey of 16 bits, of which Pillow would make white.
            grey = (np.asarray(picture) >> 8).astype(np.uint8)
        except Exception as error:
            raise Refusal(f'{path}: not a readable picture ({one_line(error)})') from None
    return np.stack([grey, grey, grey], axis=-1)


def picture_names(folder):
    """The names of the pictures in a folder, in the order of their numbers, which must be consecutive."""
    names = holds(folder, PICTURES)
    png = [name for name in names if name.lower().endswith('.png')]
    if 0 < len(png) < len(names):
        raise Refusal(f'{folder}: has PNG and JPEG pictures; keep one of the two')
    numbered = names and None not in map(number_of, names)
    if numbered:
        names.sort(key=number_of)
        first = number_of(names[0])
        numbered = [number_of(name) for name in names] == list(range(first, first + len(names)))
    if not numbered:
        raise Refusal(f'{folder}: holds no unbroken row of numbered pictures (frame_00001.png, frame_00002.png, ...)')
    return names


def read_pictures(folder):
    """A folder of pictures with consecutive numbers → frames (F,H,W,3) uint8."""
    names = picture_names(folder)
    frames = []
    for name in names:
        path = os.path.join(folder, name)
        frames.append(read_picture(path))
        if frames[-1].shape != frames[0].shape:
            raise Refusal(f'{path}: its size differs from that of {names[0]}')
    return np.stack(frames)


def import_av(path):
    """The module that decodes video files."""
    try:
        import av
    except ImportError:
        raise Refusal(f'{path}: video files need the package: pip install av') from None
    return av


def read_video_file(path):
    """A video file → frames (F,H,W,3) uint8."""
    av = import_av(path)
    try:
        with av.open(path) as container:
            frames = [frame.to_ndarray(format='rgb24') for frame in container.decode(video=0)]
    except (av.error.FFmpegError, ValueError, IndexError) as error:
        raise Refusal(f'{path}: not a readable video ({one_line(error)})') from None
    if not frames:
        raise Refusal(f'{path}: a video without frames')
    if len({frame.shape for frame in frames}) > 1:
        raise Refusal(f'{path}: the size of its frames changes')
    return np.stack(frames)


def read_video_array(path):
    """A .npy file of pictures, memory-mapped (F,H,W,3) uint8."""
    frames = read_array(path)
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape or frames.dtype != np.uint8:
        raise Refusal(f'{path}: must be (frames,height,width,3) uint8, not {frames.shape} {frames.dtype}')
    return frames


def read_frames(path):
    """Frames (F,H,W,3) uint8 of a .npy array, a folder of numbered pictures, or a video file."""
    if os.path.isdir(path):
        return read_pictures(path)
    if path.lower().endswith('.npy'):
        return np.array(read_video_array(path))
    return read_video_file(path)


def count_frames(path):
    """
    The number of frames at a path and their (height, width), from names and headers only; None and None for a video file,
    whose header cannot be trusted.
    """
    if os.path.isdir(path):
        names = picture_names(path)
        with open_picture(os.path.join(path, names[0])) as picture:
            return len(names), picture.size[::-1]
    if path.lower().endswith('.npy'):
        shape = read_video_array(path).shape
        return shape[0], shape[1:3]
    import_av(path)
    return None, None


def map_features(path):
    """A .npy file of features, (T*256,D) or (T,N,D), float16 or float32, memory-mapped → (T,N,D)."""
    z = read_array(path)
    whole_steps = z.ndim == 3 or (z.ndim == 2 and len(z) % PATCHES == 0)
    if z.dtype not in (np.float16, np.float32) or 0 in z.shape or not whole_steps:
        raise Refusal(f'{path}: must be (T*256,D) or (T,N,D), float16 or float32, not {z.shape} {z.dtype}')
    if z.ndim == 2:
        z = z.reshape(-1, PATCHES, z.shape[-1])
    return z


def read_features(path):
    """A .npy file of features → (T,N,D) float16."""
    # What is too large for float16 becomes infinite, and is refused.
    with np.errstate(over='ignore'):
        z = map_features(path).astype(np.float16)
    if not np.isfinite(z).all():
        raise Refusal(f'{path}: has values that are not finite in float16')
    return torch.from_numpy(z)


# ---- pictures become square ----------------------------------------------------------------------------------------------

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
