"""
Own clips: the folders that they come in. A bad clip is refused by its name.

    <clip>/actions_states/actions.npy, or <clip>/actions.npy   (rows,A): one push in any row, or a push per step
    <clip>/actions_states/states.npy, or <clip>/states.npy     (T,S), or a row per frame; all clips have it, or none has
    <clip>/feature_maps/<any>.npy                              features, (T*256,D) or (T,N,D), float16 or float32
    <clip>/rgb/frame_00001.png, ...                            or an unbroken row of pictures, all PNG or all JPEG
    <clip>/<any>.npy                                           or pictures, (frames,height,width,3) uint8
    <clip>/<any>.mp4, .avi, .mov, .mkv or .webm                or a video file

The splits are folders, <source>/<split>/<clip>, or ranges of the numbers at the end of the clips' names. Everything that can
be told without reading a clip's content is checked before the first one is read. To add a layout, change contents(); to read
other files of actions, change read_actions(). The files themselves are read in support/own_files.py.
"""
import hashlib
import os
import re
from dataclasses import dataclass, replace

import numpy as np
import torch

from configurator import Refusal
from support.files import sha256
from support.own_files import (PICTURES, count_frames, holds, map_features, number_of, read_array, read_features,
                               read_frames, resize_and_crop, visible)

VIDEOS = '.mp4', '.avi', '.mov', '.mkv', '.webm'
ARCHIVES = '.zip', '.tar', '.tar.gz', '.tgz', '.7z', '.rar'


# ---- one clip ----------------------------------------------------------------------------------------------------------

@dataclass
class Clip:
    """What is known of a clip before its content is read."""
    folder: str
    # The .npy or video file of its content, or the folder of its pictures
    path: str
    # Of its content: features (T,N,D), or pictures (F,size,size,3)
    shape: tuple
    # (T,A) float32
    actions: np.ndarray
    # (T,S) float32, or None
    states: np.ndarray


def contents(folder):
    """The paths of what a clip's folder holds → {'features': [...], 'pictures': [...]}."""
    maps = os.path.join(folder, 'feature_maps')
    features = [os.path.join(maps, name) for name in holds(maps, '.npy')]
    names = holds(folder, ('.npy', *VIDEOS))
    pictures = [os.path.join(folder, name) for name in names if name not in ('actions.npy', 'states.npy')]
    rgb = os.path.join(folder, 'rgb')
    if holds(rgb, PICTURES):
        pictures.append(rgb)
    return {'features': features, 'pictures': pictures}


def find_content(folder, kind):
    """The path of a clip's features or pictures, of which it must have one."""
    found = contents(folder)[kind]
    if len(found) != 1:
        what = '.npy files in feature_maps/'
        if kind == 'pictures':
            what = 'of rgb/ with pictures, a .npy array of pictures and a video file'
        raise Refusal(f'{folder}: has {len(found)} {what}; it must be one')
    return found[0]


def files_of(folder):
    """The files of a clip, of any layout → [(path, size in bytes, time when it was written), ...]. None is read."""
    files = []
    for part in ('', 'actions_states', 'feature_maps', 'rgb'):
        for name in holds(os.path.join(folder, part), ('.npy', *PICTURES, *VIDEOS)):
            path = os.path.join(folder, part, name)
            if os.path.isfile(path):
                status = os.stat(path)
                files.append((path, status.st_size, status.st_mtime_ns))
    return files


def find_rows(folder, file):
    """The path of a clip's actions or states; it may not exist."""
    path = os.path.join(folder, 'actions_states', file)
    beside = os.path.join(folder, file)
    return beside if os.path.exists(beside) and not os.path.exists(path) else path


def read_rows(path):
    """A .npy file of numbers → (rows,numbers) float32."""
    rows = read_array(path)
    if rows.ndim != 2 or 0 in rows.shape or rows.dtype.kind not in 'fiu':
        raise Refusal(f'{path}: must be finite numbers, (rows,numbers), not {rows.shape} {rows.dtype}')
    with np.errstate(over='ignore'):
        rows = rows.astype(np.float32)
    if not np.isfinite(rows).all():
        raise Refusal(f'{path}: must be finite numbers in float32')
    return rows


def read_actions(folder, steps):
    """
    Actions (steps,A) of a clip. A file with one non-zero row gives that push, at step 1. Several are pushes at their steps:
    it then has a row for each step, or for each but the last.
    """
    path = find_rows(folder, 'actions.npy')
    rows = read_rows(path)
    pushes = np.flatnonzero(rows.any(1))
    if not len(pushes):
        raise Refusal(f'{path}: the push is zero throughout')
    actions = np.zeros((steps, rows.shape[1]), np.float32)
    if len(pushes) == 1:
        actions[0] = rows[pushes[0]]
        return actions
    if len(rows) not in (steps, steps - 1):
        raise Refusal(f'{path}: several pushes need one row per step, {steps} or {steps - 1}, not {len(rows)}')
    actions[:len(rows)] = rows
    return actions


def read_states(folder, steps, tubelet):
    """States (steps,S) of a clip, or None where it has none. Of a row per frame, the first of each step is taken."""
    path = find_rows(folder, 'states.npy')
    if not os.path.exists(path):
        return None
    rows = read_rows(path)
    if len(rows) == steps * tubelet:
        rows = rows[::tubelet]
    if len(rows) != steps:
        raise Refusal(f'{path}: states need one row per step, {steps}, or one per frame, {steps * tubelet}, not {len(rows)}')
    return rows


def inspect(folder, kind, crop, steps=None):
    """
    A Clip, from names and headers. kind: 'features' or 'pictures'. steps: T, for a video file; None to decode it. Raises
    Refusal for a clip that lacks something, or has something else.
    """
    path = find_content(folder, kind)
    if kind == 'features':
        shape = map_features(path).shape
        steps = shape[0]
    else:
        frames, _ = count_frames(path)
        if frames is None:
            frames = steps * crop.tubelet if steps else len(read_frames(path))
        if frames % crop.tubelet:
            raise Refusal(f'{path}: has {frames} frames; a step is {crop.tubelet}, so their number must be even')
        shape = frames, crop.size, crop.size, 3
        steps = frames // crop.tubelet
    if steps < 2:
        raise Refusal(f'{path}: has one step; nothing can be predicted')
    return Clip(folder, path, shape, read_actions(folder, steps), read_states(folder, steps, crop.tubelet))


def check_alike(clip, first):
    """Raise Refusal where a Clip differs from the first one in the shape of its content, of its actions or of its states."""
    if clip.shape != first.shape:
        raise Refusal(f'{clip.folder}: shape {clip.shape} differs from {first.shape} of {first.folder}')
    numbers = first.actions.shape[1]
    if clip.actions.shape[1] != numbers:
        raise Refusal(f'{clip.folder}: its actions do not have the {numbers} numbers of {first.folder}')
    if (clip.states is None) != (first.states is None):
        with_states, without = (first, clip) if clip.states is None else (clip, first)
        raise Refusal(f'{with_states.folder} has states and {without.folder} has none; all clips must have them, or none')
    if clip.states is not None and clip.states.shape != first.states.shape:
        raise Refusal(f'{clip.folder}: its states do not have the {first.states.shape[1]} numbers of {first.folder}')


def read_content(clip, crop):
    """The content of a Clip: features (T,N,D) float16, or pictures (F,size,size,3) uint8. Raises Refusal."""
    if len(clip.shape) == 3:
        content = read_features(clip.path)
    else:
        content = resize_and_crop(read_frames(clip.path), crop)
    if content.shape != clip.shape:
        raise Refusal(f'{clip.folder}: shape {tuple(content.shape)} differs from {clip.shape} of the others')
    return content


# ---- splits ------------------------------------------------------------------------------------------------------------

class OwnClips:
    """
    A Source (see prepare.py) of clips in folders. clips: list of Clip. skip_bad: leave out clips whose content cannot be
    read, and print why. zooms: the factor by which each clip is zoomed in, None for 1.
    """

    # Not known for own clips.
    physics = {}

    def __init__(self, clips, domain, crop, skip_bad, device, zooms=None):
        self.clips, self.domain, self.crop = clips, domain, crop
        self.skip_bad, self.device, self.zooms = skip_bad, device, zooms
        self.count = len(clips)
        # Whether any clip has a push after step 1.
        self.several_pushes = any(clip.actions[1:].any() for clip in clips)
        # Folders of the clips whose content could not be read, each printed once.
        self.unreadable = set()

    def zoomed(self, zooms):
        """The first len(zooms) of these clips seen from nearer by, clip i by the factor zooms[i] → a Source."""
        return OwnClips(self.clips[:len(zooms)], self.domain, self.crop, self.skip_bad, self.device, zooms)

    def crop_of(self, index):
        """The Crop of a clip."""
        if self.zooms is None:
            return self.crop
        # A window in the middle of the motion would tell in the first step where the object is going.
        place = np.random.default_rng(index).random(2)
        return replace(self.crop, zoom=float(self.zooms[index]), place=tuple(place))

    def example(self):
        """The content of the first clip that can be read. All others have its shape."""
        for index in range(self.count):
            content, readable = self.content(index, index + 1)
            if readable:
                return content
        raise Refusal(f'split {self.domain}: none of its {self.count} clips can be read')

    def picture_size(self):
        """The size of the first clip's pictures, in words."""
        _, size = count_frames(self.clips[0].path)
        height, width = size or read_frames(self.clips[0].path).shape[1:3]
        return f'{width} x {height}'

    def actions(self, indices):
        """Actions (n,T,A) of these clips."""
        return np.stack([self.clips[i].actions for i in indices])

    def states(self, indices):
        """States (n,T,S) of these clips, or None."""
        if self.clips[0].states is None:
            return None
        return np.stack([self.clips[i].states for i in indices])

    def each_readable(self, start, end, read):
        """read(index) of each of the clips start..end-1 that can be read → ([what it returned], their indices)."""
        results, readable = [], []
        for index in range(start, end):
            try:
                results.append(read(index))
                readable.append(index)
            except Refusal as refusal:
                if not self.skip_bad:
                    raise
                folder = self.clips[index].folder
                if folder not in self.unreadable:
                    print(f'skipped: {refusal}')
                self.unreadable.add(folder)
        return results, readable

    def content(self, start, end):
        """Pictures or features of the readable ones among clips start..end-1, and their indices."""
        read, readable = self.each_readable(start, end, lambda i: read_content(self.clips[i], self.crop_of(i)))
        return torch.stack(read).to(self.device) if read else None, readable

    def listed(self, start, end):
        """As content(), but where the features are and what they are: {'path', 'bytes', 'sha256'} of each file."""
        def entry(index):
            clip = self.clips[index]
            read_content(clip, self.crop)
            path = os.path.abspath(clip.path)
            return {'path': path, 'bytes': os.path.getsize(path), 'sha256': sha256(path)}
        return self.each_readable(start, end, entry)

    def stamp(self, start, end):
        """A checksum of the names, sizes and times of the files of clips start..end-1, none of which is read."""
        files = [files_of(clip.folder) for clip in self.clips[start:end]]
        return hashlib.sha256(repr(files).encode()).hexdigest()

    def pictures(self, indices, size):
        """
        Pictures (n,F,size,size,3) of those of these clips that have any, for a decoder of their features, and which of the
        indices they are. Beside features there must be two pictures per step, or one, which is then taken twice.
        """
        taken, frames = [], []
        for index in indices:
            clip = self.clips[index]
            steps = len(clip.actions)
            try:
                if len(clip.shape) == 4:
                    x = read_content(clip, self.crop)
                else:
                    path = find_content(clip.folder, 'pictures')
                    x = resize_and_crop(read_frames(path), replace(self.crop, size=size, short=size))
            except Refusal:
                continue
            if len(x) == steps:
                x = x.repeat_interleave(self.crop.tubelet, 0)
            if len(x) == steps * self.crop.tubelet:
                taken.append(index)
                frames.append(x)
        return torch.stack(frames).to(self.device) if frames else None, taken


def scan(parent):
    """
    The folders in a folder → ({name: path}, {name: what is wrong}), in the order of the names. What is wrong: the folder is
    behind a link to nothing, or still in an archive.
    """
    found, lost = {}, {}
    for entry in sorted(os.scandir(parent), key=lambda entry: entry.name):
        if not visible(entry.name):
            continue
        endings = [ending for ending in ARCHIVES if entry.name.endswith(ending)]
        # A link that leads to itself is no folder either, but entry.is_dir() would raise an error.
        if os.path.isdir(entry.path):
            found[entry.name] = entry.path
        elif endings:
            lost[entry.name.removesuffix(endings[0])] = f'{entry.path}: still an archive; unpack it, or move it away'
        elif entry.is_symlink() and not os.path.exists(entry.path):
            lost[entry.name] = f'{entry.path}: a link to nothing'
    # An archive beside the folder that was in it does no harm.
    lost = {name: words for name, words in lost.items() if name not in found}
    return found, lost


def by_number(named):
    """{name of a clip: value} → {its number: value}; a name without a number stays. Raises Refusal for a number twice."""
    numbered = {}
    for name, value in named.items():
        number = number_of(name)
        key = name if number is None else number
        if key in numbered:
            raise Refusal(f'{value} and {numbered[key]} are two clips with one number')
        numbered[key] = value
    return numbered


def split_called(name):
    """The split of a range or a folder: train, val, fit_... and test_... are called as it; any other X becomes test_X."""
    if re.fullmatch('train|val|(fit|test)_.*', name):
        return name
    return f'test_{name}'


def clips_by_folder(source):
    """<source>/<split>/<clip> → ({split: [folder, ...]}, [(what is wrong, number of clips), ...])."""
    parents, lost = scan(source)
    # A whole split may be in an archive, or behind a link.
    bad = [(words, 1) for words in lost.values()]
    found = {}
    for name, parent in parents.items():
        split = split_called(name)
        if split in found:
            raise Refusal(f'{parent}: there are two folders for split {split}')
        clips, lost = scan(parent)
        found[split] = list(by_number(clips).values())
        bad += [(words, 1) for words in lost.values()]
    return found, bad


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


def clips_by_number(source, ranges):
    """<source>/<clip> and the ranges of --split → as clips_by_folder."""
    clips, lost = map(by_number, scan(source))
    found, bad = {}, []
    for written, name, numbers in parse_ranges(ranges):
        present = found.setdefault(split_called(name), [])
        missing = []
        for number in numbers:
            if number in clips:
                present.append(clips[number])
            elif number in lost:
                bad.append((lost[number], 1))
            else:
                missing.append(os.path.join(source, f'clip_{number:05d}'))
        if missing:
            bad.append((f'{missing[0]}: clip is missing ({len(missing)} of {written})', len(missing)))
    return found, bad


def find_clips(source, ranges):
    """
    The folders of own clips → ({split: [folder, ...]}, [(what is wrong, number of clips), ...]). Without a val, every tenth
    clip of train is held out as val.
    """
    if not os.path.isdir(source):
        raise Refusal(f'--source={source}: neither "physics" nor a folder')
    found, bad = clips_by_number(source, ranges) if ranges else clips_by_folder(source)
    for split in ('train', *found):
        if not found.get(split):
            why = f' ({bad[0][0]})' if bad else ''
            raise Refusal(f'--source={source}: split {split} has no clips; they belong in '
                          f'{os.path.join(source, split)}/<clip>/ or in a range of --split{why}')
    if 'val' not in found:
        train = found['train']
        found['val'] = train[9::10] or train[-1:]
        held_out = set(found['val'])
        found['train'] = [folder for folder in train if folder not in held_out] or found['val']
        print(f"no split val: {len(found['val'])} of the clips of train, every tenth, are held out as val")
    return found, bad


def choose_content(asked, found):
    """What is taken of the clips {split: [folder, ...]}: 'features' or 'pictures'. asked: --content, '' for what is there."""
    if asked:
        return asked
    kinds = []
    for folders in found.values():
        for folder in folders:
            kinds_here = [kind for kind, paths in contents(folder).items() if paths]
            if len(kinds_here) > 1:
                raise Refusal(f'{folder}: has features and pictures; choose --content=features (pictures then serve to show '
                              'predictions), or --content=pictures (which are encoded anew)')
            kinds += kinds_here
    return kinds[0] if kinds else 'pictures'


def first_clip(folders, kind, crop):
    """The first of these clips that can be read, as a Clip. All others must be like it."""
    refusals = []
    for folder in folders:
        try:
            clip = inspect(folder, kind, crop)
            read_content(clip, crop)
            return clip
        except Refusal as refusal:
            refusals.append(refusal)
    raise Refusal(f'{refusals[0]}; none of the {len(folders)} clips of train can be read')


def fingerprint(source, found):
    """
    What tells whether the clips {split: [folder, ...]} have changed: checksums of the names, of the sizes and of the times
    of their files, none of which is read → {'names': sha256, 'sizes': sha256, 'times': sha256}.
    """
    hashes = {'names': hashlib.sha256(), 'sizes': hashlib.sha256(), 'times': hashlib.sha256()}
    for folder in sorted(folder for folders in found.values() for folder in folders):
        for path, size, written in files_of(folder):
            name = os.path.relpath(path, source)
            hashes['names'].update(f'{name}\n'.encode())
            hashes['sizes'].update(f'{name} {size}\n'.encode())
            hashes['times'].update(f'{name} {written}\n'.encode())
    return {key: digest.hexdigest() for key, digest in hashes.items()}


def open_sources(source, ranges, content, crop, skip_bad, device):
    """
    Every split of own clips, all clips checked → ({split: OwnClips}, their fingerprint, the number of clips left out).

    ranges: the numbers of each split; '' = splits are folders. content: 'features', 'pictures' or ''. Raises Refusal that
    names the first bad clip and says how many there are, or with skip_bad prints them all and leaves them out.
    """
    found, bad = find_clips(source, ranges)
    kind = choose_content(content, found)
    total = sum(map(len, found.values()))
    print(f'checking {total:,} clips of {source}', flush=True)
    first = first_clip(found['train'], kind, crop)
    clips = {}
    for split, folders in found.items():
        clips[split] = []
        for folder in folders:
            try:
                clip = inspect(folder, kind, crop, len(first.actions))
                check_alike(clip, first)
                clips[split].append(clip)
            except Refusal as refusal:
                bad.append((str(refusal), 1))
    left_out = sum(count for _, count in bad)
    if bad and not skip_bad:
        others = f' ({left_out} clips are bad, of which this is the first; --skip_bad=True names and leaves out all)'
        raise Refusal(bad[0][0] + (others if left_out > 1 else ''))
    for words, _ in bad:
        print(f'skipped: {words}')
    sources = {}
    for split in found:
        if not clips[split]:
            raise Refusal(f'split {split}: none of its {len(found[split])} clips can be read')
        sources[split] = OwnClips(clips[split], split.removeprefix('test_'), crop, skip_bad, device)
    return sources, fingerprint(source, found), left_out
