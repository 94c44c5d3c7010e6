"""
Files: atomic writes, locks, checksums, the manifest of a data set, checkpoints.

    save('out/hope.pt', predictor, step=6)           hope.load() reads it back, as a predictor
    write_atomically(path, lambda f: f.write(b''))   path has its old content or the whole new one
    claim('data/slide')                              refuses other runs there until this one ends

A file that is missing, damaged or of another kind raises Refusal, which names it. No code in a file is ever run.
"""
import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import pickle
import zlib

import filelock
import numpy as np
import torch

from configurator import ROOT, Refusal

# The version of the training code, stored in every checkpoint. Raise it when the same settings no longer give the same
# weights. A run that was started with another version is refused on resume.
VERSION = 5
# The exceptions that unexpected content of a file can raise.
MALFORMED = ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError
# How a file system says that it has no locks.
NO_LOCKS = errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL
# The locks of this process. One that is forgotten is released.
HELD = []


# ---- any file --------------------------------------------------------------------------------------------------------

def write_atomically(path, write):
    """
    Call write(file) on a temporary file, sync it and rename it to path, which so has its old content or the whole new one,
    even after a power failure. A symbolic link stays one: the file behind it is replaced. Raises Refusal where the system
    fails to write (disk full, no permission); path then keeps its old content.
    """
    path = os.path.realpath(path)
    temporary = path + '.tmp'
    try:
        try:
            with open(temporary, 'wb') as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)
        if os.name == 'posix':
            # Without this sync of the folder, a power failure could undo the renaming.
            folder = os.open(os.path.dirname(path), os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        why = error.strerror or error
        raise Refusal(f'{path} could not be written ({why}); what it held before is untouched') from None


def write_text(path, text):
    """Write a text file atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def claim(path, *outputs):
    """
    Lock a file or folder until this process ends, however it ends, and remove the temporary files that a killed run left
    beside these outputs. Raises Refusal where another run has the lock.
    """
    held = lock(path)
    if held is None:
        raise Refusal(f'{path}: another run is writing here; wait for it, or choose another place')
    HELD.append(held)
    for output in outputs:
        temporary = os.path.realpath(output) + '.tmp'
        if os.path.exists(temporary):
            os.unlink(temporary)


def lock(path, seconds=0):
    """
    Lock a file or folder for this process → the lock; None where another run has it for so many seconds (-1: wait for ever).

    What is locked is an empty file, .lock in the folder or .<name>.lock beside the file. It is never deleted: another run
    may be waiting for it. Where the file system has no locks, this says so, and other runs are not kept out.
    """
    path = os.path.realpath(path)
    folder, file = os.path.split(path)
    file = f'.{file}.lock'
    if os.path.isdir(path):
        folder, file = path, '.lock'
    held = filelock.FileLock(os.path.join(folder, file), seconds, fallback_to_soft=False)
    try:
        held.acquire()
    except filelock.Timeout:
        return None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        print(f'{folder}: this file system has no locks; see that no other run writes here')
    return held


def sha256(path):
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_bytes(path):
    """The bytes of a file; raises Refusal where the system fails to read it."""
    try:
        with open(path, 'rb') as f:
            return f.read()
    except OSError as error:
        raise Refusal(f'{path} could not be read ({error.strerror})') from None


# ---- data sets ---------------------------------------------------------------------------------------------------------
# data/<name>/<split>_<nnnnn>.npy     float16 (clips,T,N,D) features as the encoder gave them
# data/<name>/<split>_<nnnnn>.json    or, where own features are read in place, their paths, sizes and sha256
# data/<name>/<split>_actions.npy     float32 (clips,T,A)
# data/<name>/<split>_states.npy      float32 (clips,T,S), where own clips have states
# data/<name>/<split>_physics.npz     what data.simulate() returned
# data/<name>/manifest.json           shapes, domains, encoder, seed, sha256 of every file and of itself, complete or not,
#                                     and the CRC-32 of every clip in a shard

# The start of the manifest's last entry, the sha256 of every byte before it.
MANIFEST_SEAL = b',\n "checksum": "'
MANIFEST_KEYS = 'made_from', 'complete', 'shape', 'sha256', 'splits'


def folder_of(name):
    """data/<name> beside the code; a name with a path separator is taken as a folder."""
    if not name:
        raise Refusal('a data set needs a name')
    if name in ('.', '..'):
        raise Refusal(f'{name!r} is no name of a data set; a folder is given with a slash, such as ./slide')
    # Windows has both separators.
    is_path = os.sep in name or '/' in name
    return os.path.abspath(name) if is_path else os.path.join(ROOT, 'data', name)


def write_manifest(folder, manifest):
    """Write the manifest of a data set atomically, with its own checksum at the end."""
    entries = {key: value for key, value in manifest.items() if key != 'checksum'}
    text = json.dumps(entries, indent=1).encode().removesuffix(b'\n}')
    seal = MANIFEST_SEAL + hashlib.sha256(text).hexdigest().encode() + b'"\n}'
    write_atomically(os.path.join(folder, 'manifest.json'), lambda f: f.write(text + seal))


def parse_manifest(path):
    """The manifest at a path; raises Refusal where a byte of it differs from what was written."""
    raw = read_bytes(path)
    text, _, seal = raw.rpartition(MANIFEST_SEAL)
    if seal != hashlib.sha256(text).hexdigest().encode() + b'"\n}':
        raise Refusal(f'{path} is damaged, or was not written by this version; delete the folder and run prepare.py again')
    manifest = json.loads(raw)
    missing = [key for key in MANIFEST_KEYS if key not in manifest]
    if missing:
        raise Refusal(f'{path} is not a manifest (it has no {missing[0]}); delete the folder and run prepare.py again')
    return manifest


def read_manifest(name):
    """The manifest of a finished data set; raises Refusal where there is none or it is unfinished or unreadable."""
    path = os.path.join(folder_of(name), 'manifest.json')
    if not os.path.isfile(path):
        raise Refusal(f'no data set at {os.path.dirname(path)}; make it with: python prepare.py --name={name}')
    manifest = parse_manifest(path)
    if manifest['complete'] is not True:
        raise Refusal(f'{os.path.dirname(path)} is unfinished; go on with the same prepare.py command')
    return manifest


def intact(folder, manifest, file):
    """Whether a file of a data set exists and has the sha256 of the manifest."""
    path = os.path.join(folder, file)
    return os.path.isfile(path) and sha256(path) == manifest['sha256'].get(file)


def verify(folder, manifest, files):
    """Raise Refusal unless each of these files has the sha256 of the manifest. Reads every byte of them."""
    for file in files:
        if not intact(folder, manifest, file):
            raise Refusal(f'{os.path.join(folder, file)} is damaged or missing; prepare.py, run as before, repairs it')


def clip_checksums(features):
    """CRC-32 of each clip of features (clips,T,N,D), as the manifest has them: 8 hex digits a clip in one text."""
    return ''.join(f'{zlib.crc32(clip):08x}' for clip in features)


def read_checksums(text):
    """What clip_checksums wrote → uint32 (clips,)."""
    return np.frombuffer(bytes.fromhex(text), '>u4')


def map_array(folder, file):
    """
    A .npy file of a data set, memory-mapped. Only its header is read, which must fit the size of the file. Raises Refusal
    for a file that is missing, cut short or not a .npy file.
    """
    if os.path.basename(file) != file:
        raise Refusal(f'{folder}: its manifest names {file!r}, which is not a file of this folder')
    path = os.path.join(folder, file)
    try:
        array = np.load(path, mmap_mode='r', allow_pickle=False)
        whole = array.offset + array.nbytes == os.path.getsize(path)
    # A damaged header can raise a dozen kinds of exceptions, such as those of Python's tokenizer.
    except Exception:
        whole = False
    if not whole:
        raise Refusal(f'{path} is damaged or missing; prepare.py, run as before, repairs it')
    return array


# ---- checkpoints -------------------------------------------------------------------------------------------------------

# A file of write_sealed ends with the SHA-256 of every byte before it, as 64 hex digits.
SEAL_BYTES = 64


def write_sealed(path, content):
    """Write a dict of tensors, numbers, text and containers of them atomically, with its checksum at the end."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    seal = hashlib.sha256(buffer.getbuffer()).hexdigest().encode()
    buffer.write(seal)
    write_atomically(path, lambda f: f.write(buffer.getbuffer()))


def read_sealed(path, device='cpu'):
    """The content of a file of write_sealed; raises Refusal where a byte differs from what was written."""
    raw = memoryview(read_bytes(path))
    content, seal = raw[:-SEAL_BYTES], raw[-SEAL_BYTES:]
    if hashlib.sha256(content).hexdigest().encode() != seal:
        raise Refusal(f'{path} is damaged or cut short, or was not written by this code: its checksum does not fit; '
                      'restore a copy, or delete it and make it again')
    try:
        return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except (*MALFORMED, pickle.UnpicklingError, EOFError) as error:
        raise Refusal(f'{path} is not a file of this code ({" ".join(str(error).split())[:200]})') from None


def peek(path):
    """
    The content of a file of torch.save, ours or official, memory-mapped: only tensors that are used are read, and no
    checksum is compared. Raises Refusal for any other file.
    """
    try:
        stored = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except (*MALFORMED, EOFError, OSError, pickle.UnpicklingError) as error:
        raise Refusal(f'{path}: not a file of weights ({type(error).__name__}: {str(error)[:100]})') from None
    return stored if isinstance(stored, dict) else {}


def save(path, predictor, **more):
    """
    Write a checkpoint atomically: sizes, weights and further entries (tensors and plain values only).

    Raises Refusal for weights that are not finite and where writing fails; an earlier checkpoint is then untouched.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    state = predictor.state_dict()
    if not all(t.isfinite().all() for t in state.values()):
        raise Refusal(f'{path} was not written: a weight is NaN or infinite; what it held before is untouched')
    write_sealed(path, {'sizes': dataclasses.asdict(predictor.sizes), 'predictor': state, **more})


def read_checkpoint(path, device='cpu', **fields):
    """
    Read a file of save() → dict with 'sizes' (dict), 'predictor' (its weights) and further entries; hope.load() makes a
    predictor of it. fields: the names and types of further entries that it must have. Raises Refusal for a checkpoint that
    is missing, damaged, not finite or not one of this code.
    """
    if not os.path.isfile(path):
        raise Refusal(f'no checkpoint at {path}; train one with: python train.py config/hope_jump.py')
    checkpoint = read_sealed(path, device)
    try:
        for field, kind in {'sizes': dict, 'predictor': dict, **fields}.items():
            if not isinstance(checkpoint.get(field), kind):
                raise ValueError(f'it has no {field}')
        if not all(t.isfinite().all() for t in checkpoint['predictor'].values()):
            raise ValueError('a weight is NaN or infinite')
        jump_last, steps = checkpoint.get('jump_last', 1), checkpoint.get('clip_steps', math.inf)
        if not 1 <= jump_last < steps:
            raise ValueError(f'jump_last = {jump_last} of clips of {steps} steps')
    except MALFORMED as error:
        raise Refusal(f'{path} is not a checkpoint of this code ({" ".join(str(error).split())[:200]})') from None
    return checkpoint
