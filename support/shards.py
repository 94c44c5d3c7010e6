"""
How a data set is written: shard after shard, so that an interrupted run goes on where it stopped; and when that is refused.

    manifest = take_over(folder, manifest, sources)          # of this run, or that of an earlier one
    write_split(folder, manifest, split, source, ...)        # what is missing of a split

A Source (see prepare.py) gives the clips of a split. What the files are is said in support/files.py.
"""
import itertools
import json
import math
import os
import shutil

import numpy as np

from configurator import Refusal
from support.files import claim, clip_checksums, intact, parse_manifest, sha256, write_atomically, write_manifest
from support.own_files import visible
from support.terminal import progress

# An interrupted run loses at most one shard.
SHARD_BYTES = 128 * 2**20
# What may have changed in the files of own clips.
CHANGES = {'names': 'were added, removed or renamed', 'sizes': 'have another size', 'times': 'were written again'}


def save(folder, manifest, file, write):
    """Write a file of the set atomically by calling write(file object), and put its sha256 into the manifest."""
    path = os.path.join(folder, file)
    write_atomically(path, write)
    manifest['sha256'][file] = sha256(path)


def differences(found, wanted):
    """How two manifests differ in what the set is made from, in words for the user."""
    before, now = found['made_from'], wanted['made_from']
    if set(before) != set(now):
        return 'other settings, or by another version of prepare.py'
    # The constants of the code count as settings.
    was = {**before, **before['constants'], 'shape': found['shape']}
    settings = {**now, **now['constants'], 'shape': wanted['shape']}
    words = []
    for key, value in settings.items():
        if key not in ('files', 'clips', 'code', 'constants') and was.get(key) != value:
            words.append(f'{key} = {value!r} (was {was.get(key)!r})')
    if words:
        return f'other settings: {", ".join(words)}'
    for key, change in CHANGES.items():
        if before['files'] and before['files'][key] != now['files'][key]:
            return f'own clips that have changed since: files {change}'
    if before['clips'] != now['clips']:
        return 'other settings: the number of clips'
    return 'other code of the world or of the encoder'


def check_folder(folder, source):
    """Raise Refusal for a folder that is not there for a data set alone. source: the folder of own clips."""
    own = os.path.abspath(source)
    if source != 'physics' and os.path.join(folder, '').startswith(os.path.join(own, '')):
        raise Refusal(f'{folder} is in the folder of your clips, where it would count as one; choose another --name')
    if not os.path.isdir(folder) or os.path.exists(os.path.join(folder, 'manifest.json')):
        return
    # A run that was killed at its very beginning leaves no more than this.
    foreign = [file for file in sorted(os.listdir(folder)) if file != 'manifest.json.tmp' and visible(file)]
    if foreign:
        raise Refusal(f'{folder} exists and is not a data set (it holds {foreign[0]}); choose another --name')


def drop_changed(found, manifest, sources):
    """
    Go on with an unfinished set after own clips were mended: without the shards of clips that have changed, and those after
    them. found: its manifest, which is changed; manifest: what it would be now.
    """
    before = sum(len(entry['shards']) for entry in found['splits'].values())
    shard_clips = shard_size(found['shape'])
    for split, entry in found['splits'].items():
        source = sources[split]
        whole = []
        for start, shard in zip(range(0, source.count, shard_clips), entry['shards']):
            if shard['stamp'] != source.stamp(start, min(start + shard_clips, source.count)):
                break
            whole.append(shard)
        entry['shards'] = whole
    kept = [shard['file'] for entry in found['splits'].values() for shard in entry['shards']]
    print(f'own clips have changed since the last run: {before - len(kept)} of {before} shards are made again')
    # What was made of all clips, such as actions, is made again in any case.
    found['sha256'] = {file: found['sha256'][file] for file in kept}
    found['made_from'] = manifest['made_from']


def only_clips_changed(found, wanted):
    """Whether two manifests differ in nothing but the files of own clips."""
    same = {**found['made_from'], 'files': None, 'clips': None} == {**wanted['made_from'], 'files': None, 'clips': None}
    return same and found['shape'] == wanted['shape'] and list(found['splits']) == list(wanted['splits'])


def take_over(folder, manifest, sources):
    """
    Claim the folder of a set for this run → the manifest to continue from: the given one for a new set, else that of an
    earlier run without its damaged shards and those after them. 'complete' stays true where nothing is left to do. Raises
    Refusal where another run is at work, or for a set that was made with other settings or, once it is complete, of own
    clips that have changed.
    """
    path = os.path.join(folder, 'manifest.json')
    os.makedirs(folder, exist_ok=True)
    if not os.path.exists(path):
        claim(folder, path)
        # From now on the folder is known for that of a data set.
        write_manifest(folder, manifest)
        return manifest
    # Of a run that was killed. claim() removes them.
    half_written = [f.path.removesuffix('.tmp') for f in os.scandir(folder) if f.name.endswith('.tmp')]
    claim(folder, *half_written)
    found = parse_manifest(path)
    differs = (found['made_from'], found['shape']) != (manifest['made_from'], manifest['shape'])
    if differs and not found['complete'] and only_clips_changed(found, manifest):
        drop_changed(found, manifest, sources)
    elif differs:
        words = differences(found, manifest)
        raise Refusal(f'{folder} holds a set made with {words}; choose another --name or delete the folder')
    damaged = []
    for file in progress(found['sha256'], 'comparing checksums', 'files'):
        if not intact(folder, found, file):
            damaged.append(file)
    if found['complete'] and not damaged:
        return found
    found['complete'] = False
    for entry in found['splits'].values():
        whole = itertools.takewhile(lambda shard: shard['file'] not in damaged, entry['shards'])
        entry['shards'] = list(whole)
    if damaged:
        print(f'{", ".join(damaged)}: damaged or missing, made again')
    return found


def shard_size(shape):
    """Clips per shard; shape: [T, N, D]."""
    return max(1, SHARD_BYTES // (2 * math.prod(shape)))


def clips_done(manifest, split, source):
    """How many clips of a split have been written, or left out."""
    return min(source.count, len(manifest['splits'][split]['shards']) * shard_size(manifest['shape']))


def clips_to_do(manifest, sources):
    """How many clips of all splits are not yet written."""
    return sum(source.count - clips_done(manifest, split, source) for split, source in sources.items())


def to_store(encode_clips, content, where):
    """The features of content, as they are stored → numpy (n,T,N,D) float16; raises Refusal where they are not finite."""
    z = encode_clips(content).half().cpu().numpy()
    if not np.isfinite(z).all():
        raise Refusal(f'split {where}: the encoder returns features that are not finite in float16; are its weights whole?')
    return z


def encode_shard(shape, split, source, start, end, encode_clips, batch, bar):
    """The features (n,T,N,D) float16 of the readable ones among clips start..end-1, and their indices."""
    # Filled batch by batch. Small arrays, allocated between the encoder's large ones, would keep gigabytes of freed memory
    # from being returned to the system.
    z = np.empty((end - start, *shape), np.float16)
    kept = []
    for first in range(start, end, batch):
        last = min(first + batch, end)
        content, readable = source.content(first, last)
        if readable:
            features = to_store(encode_clips, content, f'{split}, from clip {first} on')
            z[len(kept):len(kept) + len(readable)] = features
        kept += readable
        for _ in range(first, last):
            next(bar, None)
    return z[:len(kept)], kept


def list_shard(source, start, end, bar):
    """Where the features of clips start..end-1 are, to be read in place, and the indices of the readable ones."""
    listed = []
    kept = []
    for index in range(start, end):
        entries, readable = source.listed(index, index + 1)
        listed += entries
        kept += readable
        next(bar, None)
    return listed, kept


def write_split(folder, manifest, split, source, encode_clips, batch, after=0):
    """
    Write the shards of a split that are still missing, then its actions, states and physics.

    encode_clips: content of n clips → features (n,T,N,D); None to write lists of files that are read in place. batch: clips
    encoded at once. after: clips of later splits, for the time left. Returns the number of clips that were left out; raises
    Refusal where that is all of them, or where the encoder returns what is not finite.
    """
    shards = manifest['splits'][split]['shards']
    shard_clips = shard_size(manifest['shape'])
    done = clips_done(manifest, split, source)
    # Each further next() counts one clip as done.
    bar = progress(range(done, source.count), split, after=after)
    next(bar, None)
    for start in range(done, source.count, shard_clips):
        end = min(start + shard_clips, source.count)
        number = len(shards)
        checksums = {}
        if encode_clips:
            file = f'{split}_{number:05d}.npy'
            z, kept = encode_shard(manifest['shape'], split, source, start, end, encode_clips, batch, bar)
            save(folder, manifest, file, lambda f: np.save(f, z))
            checksums['crc32'] = clip_checksums(z)
        else:
            file = f'{split}_{number:05d}.json'
            listed, kept = list_shard(source, start, end, bar)
            save(folder, manifest, file, lambda f: f.write(json.dumps(listed, indent=1).encode()))
        left_out = sorted(set(range(start, end)) - set(kept))
        stamp = source.stamp(start, end)
        shards.append({'file': file, 'clips': len(kept), 'skipped': left_out, 'stamp': stamp, **checksums})
        write_manifest(folder, manifest)
    kept = kept_clips(manifest, split, source)
    if not kept:
        raise Refusal(f'split {split}: none of its {source.count} clips can be read')
    actions = source.actions(kept)
    save(folder, manifest, f'{split}_actions.npy', lambda f: np.save(f, actions))
    states = source.states(kept)
    if states is not None:
        save(folder, manifest, f'{split}_states.npy', lambda f: np.save(f, states))
    if source.physics:
        save(folder, manifest, f'{split}_physics.npz', lambda f: np.savez(f, **source.physics))
    return source.count - len(kept)


def kept_clips(manifest, split, source):
    """The indices of the clips of a Source that a written split holds."""
    skipped = {index for shard in manifest['splits'][split]['shards'] for index in shard['skipped']}
    return [index for index in range(source.count) if index not in skipped]


def check_room(folder, needed):
    """Free bytes where a folder is or will be. needed: bytes of the whole set; raises Refusal where they do not fit."""
    there = 0
    if os.path.isdir(folder):
        there = sum(entry.stat().st_size for entry in os.scandir(folder))
    place = folder
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    free = shutil.disk_usage(place).free
    if needed - there > free:
        raise Refusal(f'{folder}: the set takes {gibibytes(needed - there)} and {gibibytes(free)} are free; make room, choose '
                      'a --name on another disk, or with own features --in_place=True')
    return free


def gibibytes(count):
    """A number of bytes for the user."""
    return f'{count / 2**30:.1f} GiB' if count >= 2**30 / 10 else f'{count / 2**20:.1f} MiB'
