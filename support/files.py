"""
Files: atomic writes, locks, checksums, the manifest of a data set, checkpoints.

    save('out/hope.pt', predictor, step=6)           hope.load() reads it back, as a predictor
    write_atomically(path, lambda f: f.write(b''))   path is either as it was or whole
    claim('data/slide')                              other runs stay out until this one ends

A file that is missing, damaged or not ours raises Refusal, which names it. No file is ever executed.
"""
import dataclasses
import hashlib
import io
import json
import os
import pickle

import numpy as np
import torch

from configurator import ROOT, Refusal

try:
    import fcntl
except ImportError:
    # Windows: two runs into one place are not kept apart there.
    fcntl = None

# The version of the training code, stored in every checkpoint. Raise it when the same settings would no longer give the
# same weights: a run that was begun with another version is then not resumed.
VERSION = 3
# What reading a file with unexpected content can raise.
MALFORMED = ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError


# ---- any file --------------------------------------------------------------------------------------------------------

def write_atomically(path, write):
    """
    Call write(file) on a temporary neighbour, sync it and rename it: path is either old or whole, also after a loss of
    power. Raises Refusal where the system does not let it be written (disk full, no permission); path is then untouched.
    """
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
            # The new name is safe once its folder is synced.
            folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        why = error.strerror or error
        raise Refusal(f'{path} could not be written ({why}); what it held before is untouched') from None


def claim(path, *outputs):
    """
    Keep other runs out of a file or folder until this process ends, however it ends, and remove what a killed run left
    half-written of these outputs. Raises Refusal where another run is at work.
    """
    if fcntl:
        # Stays open: the system lets go of the lock when the process ends.
        lock = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refusal(f'{path}: another run is writing here; wait for it, or choose another place') from None
    for output in outputs:
        if os.path.exists(output + '.tmp'):
            os.unlink(output + '.tmp')


def sha256(path):
    """Hex digest of a file."""
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def read_bytes(path):
    """The bytes of a file; raises Refusal where the system does not let it be read."""
    try:
        with open(path, 'rb') as f:
            return f.read()
    except OSError as error:
        raise Refusal(f'{path} could not be read ({error.strerror})') from None


# ---- data sets ---------------------------------------------------------------------------------------------------------
# data/<name>/<split>_<nnnnn>.npy     float16 (clips,T,N,D) features as the encoder gave them, memory-mapped
# data/<name>/<split>_actions.npy     float32 (clips,T,A), zero after step 1
# data/<name>/<split>_physics.npz     what data.simulate() returned
# data/<name>/manifest.json           shapes, domains, encoder, seed, sha256 of every file and of itself, complete or not

# The manifest's last entry: the sha256 of every byte before it.
MANIFEST_SEAL = b',\n "checksum": "'
MANIFEST_KEYS = 'made_from', 'complete', 'shape', 'sha256', 'splits'


def folder_of(name):
    """data/<name> beside the code; a name with a path separator is taken as a folder."""
    if not name:
        raise Refusal('a data set needs a name')
    return os.path.abspath(name) if os.sep in name else os.path.join(ROOT, 'data', name)


def write_manifest(folder, manifest):
    """Write the manifest of a data set atomically, closed by its own checksum."""
    entries = {key: value for key, value in manifest.items() if key != 'checksum'}
    text = json.dumps(entries, indent=1).encode().removesuffix(b'\n}')
    seal = MANIFEST_SEAL + hashlib.sha256(text).hexdigest().encode() + b'"\n}'
    write_atomically(os.path.join(folder, 'manifest.json'), lambda f: f.write(text + seal))


def parse_manifest(path):
    """The manifest at a path, its 'checksum' verified; raises Refusal where a byte of it is not as it was written."""
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
    """Whether a file of a data set is there and has the sha256 that the manifest noted."""
    path = os.path.join(folder, file)
    return os.path.isfile(path) and sha256(path) == manifest['sha256'].get(file)


def verify(folder, manifest, files):
    """Raise Refusal unless each of these files has the sha256 that the manifest noted. Reads every byte of them."""
    for file in files:
        if not intact(folder, manifest, file):
            raise Refusal(f'{os.path.join(folder, file)} is damaged or missing; prepare.py, called as at first, mends it')


def map_array(folder, file):
    """
    A .npy file of a data set, memory-mapped. Its header must claim exactly the bytes that the file has; its content is not
    read. Raises Refusal for a file that is missing, cut short or not a .npy file.
    """
    if os.path.basename(file) != file:
        raise Refusal(f'{folder}: its manifest names {file!r}, which is not a file of this folder')
    path = os.path.join(folder, file)
    try:
        array = np.load(path, mmap_mode='r', allow_pickle=False)
        whole = array.offset + array.nbytes == os.path.getsize(path)
    # A damaged header raises one of a dozen kinds, up to those of Python's tokenizer.
    except Exception:
        whole = False
    if not whole:
        raise Refusal(f'{path} is damaged or missing; prepare.py, called as at first, mends it')
    return array


# ---- checkpoints -------------------------------------------------------------------------------------------------------

# A file of write_sealed ends in the hex SHA-256 of every byte before it.
SEAL_BYTES = 64


def write_sealed(path, content):
    """Write a dict of tensors, numbers, text and containers of them atomically, closed by its checksum."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    seal = hashlib.sha256(buffer.getbuffer()).hexdigest().encode()
    buffer.write(seal)
    write_atomically(path, lambda f: f.write(buffer.getbuffer()))


def read_sealed(path, device='cpu'):
    """What write_sealed wrote; raises Refusal where a byte differs from what was written, or for what it never writes."""
    raw = memoryview(read_bytes(path))
    content, seal = raw[:-SEAL_BYTES], raw[-SEAL_BYTES:]
    if hashlib.sha256(content).hexdigest().encode() != seal:
        raise Refusal(f'{path} is damaged or cut short, or was not written by this code: its checksum does not fit; '
                      'put back a copy, or delete it and make it again')
    try:
        return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except (*MALFORMED, pickle.UnpicklingError, EOFError) as error:
        raise Refusal(f'{path} is not a file of this code ({" ".join(str(error).split())[:200]})') from None


def peek(path):
    """
    What a file of torch.save holds, ours or official, memory-mapped: only tensors that are used are read, and no checksum
    is compared. Raises Refusal for anything else.
    """
    try:
        stored = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except (*MALFORMED, EOFError, OSError, pickle.UnpicklingError) as error:
        raise Refusal(f'{path}: not a file of weights ({type(error).__name__}: {str(error)[:100]})') from None
    return stored if isinstance(stored, dict) else {}


def save(path, predictor, **more):
    """
    Write a checkpoint atomically: sizes, weights and what else is handed in (tensors and plain values only).

    Raises Refusal for weights that are not finite and where it cannot be written; an earlier checkpoint is then untouched.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    state = predictor.state_dict()
    if not all(t.isfinite().all() for t in state.values()):
        raise Refusal(f'{path} was not written: a weight is NaN or infinite; what it held before is untouched')
    write_sealed(path, {'sizes': dataclasses.asdict(predictor.sizes), 'predictor': state, **more})


def read_checkpoint(path, device='cpu', **fields):
    """
    What save() wrote → dict with 'sizes' (dict), 'predictor' (its weights) and more; fields: name=type of what else it must
    hold. hope.load() makes a predictor of it. Raises Refusal where it is missing, damaged, not finite or not a checkpoint.
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
    except MALFORMED as error:
        raise Refusal(f'{path} is not a checkpoint of this code ({" ".join(str(error).split())[:200]})') from None
    return checkpoint
