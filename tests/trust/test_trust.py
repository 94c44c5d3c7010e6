"""
What a user may rely on, counted: kills, flipped bits, cut, hostile and malformed files, NaN.

    pytest -m trust          all of it, under 15 minutes on two cores, with a table of the numbers at the end

The quick suite runs the same tests on a few cases each.
"""
import contextlib
import csv
import errno
import functools
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import FEW, ROOT, SMALL_SET, TINY, counted, own_clips, refused, run

import data
import hope
from configurator import Refusal
from support import files


def spread(cases, count):
    """`count` of the cases, evenly spread; no more than there are."""
    return [cases[i * len(cases) // count] for i in range(min(count, len(cases)))]


def killing(number, when=lambda: True, after=0.0):
    """For conftest.run: send the script a signal, so many seconds after something has become true."""
    def meanwhile(pid):
        with contextlib.suppress(ProcessLookupError):                  # it ended before
            while not when():
                os.kill(pid, 0)
                time.sleep(0.001)
            time.sleep(after)
            os.kill(pid, number)
    return meanwhile


def touched(path):
    """A function that says whether a file was written since."""
    def stamp():
        return os.stat(path).st_mtime_ns if os.path.exists(path) else None
    before = stamp()
    return lambda: stamp() != before


# ---- comparing runs --------------------------------------------------------------------------------------------------

def equal(a, b):
    """Whether two checkpoints' contents are the same to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def log_of(path):
    """The rows of the log beside a checkpoint, without what a clock decides; where one stands twice the later counts."""
    rows = {}
    with open(str(path).replace('.pt', '.csv'), newline='') as f:
        for row in csv.DictReader(f):
            evaluation = row['loss'] == ''
            rows[row['step'], evaluation] = {k: v for k, v in row.items() if k != 'clips_per_s'}
    return rows


def same_run(a, b):
    """Weights, optimiser, best loss, random states and log of two runs are the same."""
    return equal(*(torch.load(p, weights_only=True) for p in (a, b))) and log_of(a) == log_of(b)


def results_of(folder):
    """results.json and results.csv of A→B→A without settings and what a clock decides."""
    with open(os.path.join(folder, 'results.json')) as f:
        results = json.load(f)
    del results['settings']
    for row in results['rows']:
        del row['seconds'], row['figures']['ms_per_clip']
    with open(os.path.join(folder, 'results.csv')) as f:
        return results, f.read()


def files_of(folder):
    """{name: bytes} of a folder."""
    return {f.name: open(f, 'rb').read() for f in os.scandir(folder)}


# ---- kills -----------------------------------------------------------------------------------------------------------

RUNS = {
    'vit': ['--model=vit'],
    'hope': [],
    'accumulation': ['--model=vit', '--accumulation=2'],
}


@counted(3, 100)
def test_killed_in_training(count, tiny, tmp_path, note):
    """SIGKILL at any moment of training and saving: the checkpoint is readable, and in the end nothing differs."""
    rng = random.Random(count)
    runs, total, in_save, unreadable, equals = spread(list(RUNS), 1 if count < 10 else len(RUNS)), 0, 0, 0, 0
    for name in runs:
        steps = 12 if count < 10 else 120
        args = [*TINY, f'--data={tiny}', *RUNS[name], f'--max_iters={steps}', '--eval_interval=1']
        whole, out = tmp_path / f'{name}_whole.pt', tmp_path / f'{name}.pt'
        run('train.py', *args, f'--out={whole}')
        kills = 0
        while True:
            more = kills < count / len(runs)
            begun = touched(f'{tmp_path}/{name}.csv')                  # the log is opened when training begins
            if kills % 2:                                              # in the midst of a save
                begun = functools.partial(os.path.exists, f'{out}.tmp')
            done = run('train.py', *args, f'--out={out}', f'--resume={out.exists()}', ok=not more,
                       meanwhile=killing(signal.SIGKILL, begun, 0 if kills % 2 else rng.uniform(0, 0.5)) if more else None)
            if done.returncode == -signal.SIGKILL:
                kills += 1
                in_save += os.path.exists(f'{out}.tmp')
                try:
                    if out.exists():
                        hope.load(str(out))
                except Refusal:
                    unreadable += 1
            elif more:                                                 # finished too early: once more from the beginning
                assert same_run(whole, out)
                out.unlink()
                (tmp_path / f'{name}_best.pt').unlink()
            else:
                break
        assert not os.path.exists(f'{out}.tmp')
        total, equals = total + kills, equals + same_run(whole, out)
    note('kills of train.py (SIGKILL)', total, f'{unreadable} unreadable checkpoints; {in_save} while saving; '
         f'{equals} of {len(runs)} runs bit-equal at the end')
    assert not unreadable and equals == len(runs)


def killed(script, args, folder, count, longest):
    """
    SIGKILL a script `count` times, up to `longest` seconds after it has touched its folder, calling it again each time, and
    let the last call end. Yields the kills so far after every call that ended by itself. Many kills meet pictures, too.
    """
    rng, kills = random.Random(count), 0
    while True:
        more = kills < count
        done = run(script, *args, ok=not more, pictures=count > 1,
                   meanwhile=killing(signal.SIGKILL, touched(folder), rng.uniform(0, longest)) if more else None)
        if done.returncode == -signal.SIGKILL:
            kills += 1
            continue
        yield kills
        if not more:
            break


@counted(1, 50)
def test_killed_in_preparing(count, tmp_path, note):
    whole, folder = tmp_path / 'whole', tmp_path / 'set'
    args = ['--size=32', '--dim=24', '--clips=60', '--test_clips=24', '--device=cpu']
    run('prepare.py', *args, f'--name={whole}', pictures=count > 1)
    sets, equals = 0, 0
    for kills in killed('prepare.py', [*args, f'--name={folder}'], folder, count, 1):
        sets, equals = sets + 1, equals + (files_of(whole) == files_of(folder))
        shutil.rmtree(folder)
    note('kills of prepare.py (SIGKILL)', kills,
         f'{equals} of {sets} data sets equal in every byte of every file')
    assert equals == sets


@counted(1, 20)
def test_killed_in_adapting(count, tiny, trained, tmp_path, note):
    whole, out = tmp_path / 'whole', tmp_path / 'aba'
    checkpoints = trained['vit'] if count == 1 else f'{trained["hope"]},{trained["vit"]}'
    args = [f'--ckpt={checkpoints}', f'--data={tiny}', *FEW]
    run('adapt.py', *args, f'--out={whole}')
    ends, equals = 0, 0
    for kills in killed('adapt.py', [*args, f'--out={out}'], out, count, 2):
        ends, equals = ends + 1, equals + (results_of(whole) == results_of(out) and not (out / 'unfinished.pt').exists())
        # A finished run would have nothing more to do.
        shutil.rmtree(out)
    note('kills of adapt.py (SIGKILL)', kills, f'{equals} of {ends} results equal in every number but times')
    assert equals == ends


@pytest.mark.parametrize('number', [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.trust)])
def test_a_signal_saves_at_the_next_step(number, tiny, tmp_path):
    args = [*TINY, f'--data={tiny}', '--model=vit', '--max_iters=40', '--eval_interval=7']
    run('train.py', *args, f'--out={tmp_path}/whole.pt')
    out = tmp_path / 'stopped.pt'
    done = run('train.py', *args, f'--out={out}', meanwhile=killing(number, out.exists), ok=False)
    assert done.returncode == 128 + number and '--resume=True goes on' in done.stdout.splitlines()[-1]
    step = hope.load(str(out))[1]['step']
    assert 7 <= step < 40 and f'stopped at step {step}' in done.stdout
    run('train.py', *args, f'--out={out}', '--resume=True')
    assert same_run(tmp_path / 'whole.pt', out)


@pytest.mark.trust
def test_processes_stop_together_and_resume_exactly(tiny, tmp_path, note):
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    args = [*TINY, f'--data={tiny}', '--max_iters=80', '--eval_interval=7']
    run('train.py', *args, f'--out={tmp_path}/whole.pt', launcher=torchrun)
    out = tmp_path / 'stopped.pt'
    job = subprocess.Popen([*torchrun, os.path.join(ROOT, 'train.py'), *args, f'--out={out}'], stdout=subprocess.PIPE,
                           stderr=subprocess.DEVNULL, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    while not out.exists():
        time.sleep(0.01)
    job.terminate()
    said = job.communicate(timeout=60)[0]
    assert '--resume=True goes on' in said, said
    run('train.py', *args, f'--out={out}', '--resume=True', launcher=torchrun)
    assert same_run(tmp_path / 'whole.pt', out)
    note('SIGTERM to torchrun, 2 processes', 1, 'saved at one step; bit-equal at the end')


def test_what_does_not_fit_is_refused(tiny, trained, tmp_path):
    """Another data set, version, number of steps or of action components: one line, and the checkpoint is as it was."""
    args, out = [*TINY, f'--data={tiny}', '--model=vit'], tmp_path / 'x.pt'
    run('train.py', *args, f'--out={out}', '--stop_at=2')
    good, content = out.read_bytes(), torch.load(out, weights_only=True)
    state = {'torch': torch.zeros(3, dtype=torch.uint8)}
    for field, value, words in (('version', 0, 'trained by version 0'), ('data', 'x', 'another data set'),
                                ('best', 'x', 'has no best'), ('random', state, 'cannot be gone on with')):
        files.write_sealed(str(out), {**content, field: value})
        changed = out.read_bytes()
        assert words in refused(run('train.py', *args, f'--out={out}', '--resume=True', ok=False))
        assert out.read_bytes() == changed
    out.write_bytes(good)
    run('train.py', *args, f'--out={out}', '--resume=True')

    def cut(steps, numbers):
        def change(folder, manifest):
            manifest['shape'][0] = steps
            for split in 'train', 'val', 'test_A', 'test_B', 'test_C':
                for file, most in ((f'{split}_00000.npy', None), (f'{split}_actions.npy', numbers)):
                    put(file, np.load(os.path.join(folder, file))[:, :steps, :most])(folder, manifest)
        return changed_set(tiny, tmp_path / f'{steps}_{numbers}', change)
    for folder in (cut(7, 2), cut(8, 1)):
        line = refused(run('adapt.py', f'--ckpt={trained["vit"]}', *FEW, f'--data={folder}', f'--out={tmp_path}/aba',
                           ok=False))
        assert 'trained on clips of 8 steps with actions of 2 numbers' in line
    assert 'action_encoder' in refused(run('train.py', *args, f'--data={tmp_path}/8_1', f'--init_from={trained["vit"]}',
                                           f'--out={tmp_path}/y.pt', ok=False))
    assert not (tmp_path / 'aba').exists() and not (tmp_path / 'y.pt').exists()


# ---- two at once, no room --------------------------------------------------------------------------------------------

def test_two_runs_into_one_place(tiny, trained, tmp_path):
    """While this process holds the place, a script refuses it and changes nothing; afterwards it does not."""
    folder, out, data_set = tmp_path / 'aba', tmp_path / 'x.pt', shutil.copytree(tiny, tmp_path / 'set')
    folder.mkdir()
    with open(trained['hope'].replace('.pt', '.csv'), newline='') as f:
        begun = f.readline()
    (tmp_path / 'x.csv').write_text(begun, newline='')
    places = {folder: ('adapt.py', f'--ckpt={trained["vit"]}', f'--data={tiny}', f'--out={folder}', *FEW,
                       '--methods=frozen'),
              tmp_path / 'x.csv': ('train.py', *TINY, f'--data={tiny}', f'--out={out}', '--max_iters=1'),
              data_set: ('prepare.py', f'--name={data_set}', *SMALL_SET)}
    hold = ('import sys\nfrom support import files\n[files.claim(path) for path in sys.argv[1:]]\n'
            'print(1, flush=True)\nsys.stdin.read()')
    holder = subprocess.Popen([sys.executable, '-c', hold, *map(str, places)], cwd=ROOT, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    holder.stdout.readline()
    for command in places.values():
        assert 'another run is writing here' in refused(run(*command, ok=False))
    assert os.listdir(folder) == ['.lock'] and (tmp_path / 'x.csv').read_bytes() == begun.encode() and not out.exists()
    holder.kill()
    holder.communicate()
    for command in list(places.values())[1:]:
        run(*command)


@pytest.mark.parametrize('number', [errno.ENOSYS, errno.ENOLCK, errno.EBADF, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(number, tmp_path, monkeypatch, capsys):
    """Such as NFS or Lustre, as they are mounted on some clusters: it is said, and nothing is left that a kill would leave."""
    fcntl = pytest.importorskip('fcntl')

    def flock(*args):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, 'flock', flock)
    for path in tmp_path, tmp_path / 'x.csv':
        files.claim(str(path))
        assert capsys.readouterr().out == f'{tmp_path}: this file system has no locks; see that no other run writes here\n'
        assert [file for file in os.listdir(tmp_path) if os.path.getsize(tmp_path / file)] == []


def test_what_a_symbolic_link_points_to_is_written(trained, tmp_path):
    """A checkpoint on another disk, say. The link stays, and so does a dangling one that names a new file."""
    (tmp_path / 'disk').mkdir()
    for name in 'old', 'new':
        (tmp_path / f'{name}.pt').symlink_to(tmp_path / 'disk' / f'{name}.pt')
    (tmp_path / 'disk' / 'old.pt').write_bytes(b'stale')
    (tmp_path / 'disk' / 'old.pt.tmp').write_bytes(b'of a run that was killed')
    files.claim(str(tmp_path), str(tmp_path / 'old.pt'))
    assert not (tmp_path / 'disk' / 'old.pt.tmp').exists()
    predictor, _ = hope.load(trained['vit'])
    for name in 'old', 'new':
        link = tmp_path / f'{name}.pt'
        files.save(str(link), predictor)
        assert link.is_symlink() and equal(*(hope.load(str(path))[0].state_dict() for path in (link, trained['vit'])))
    assert sorted(os.listdir(tmp_path / 'disk')) == ['new.pt', 'old.pt']


def test_checksums_of_large_files(tmp_path):
    """Read in pieces."""
    content = bytes(range(256)) * 10_000
    (tmp_path / 'x').write_bytes(content)
    assert files.sha256(str(tmp_path / 'x')) == hashlib.sha256(content).hexdigest()


def test_no_room_and_no_permission(tiny, tmp_path, monkeypatch):
    """A checkpoint that cannot be written: one line that names it, the previous one as it was, nothing left behind."""
    out = tmp_path / 'x.pt'
    args = [*TINY, f'--data={tiny}', f'--out={out}']
    run('train.py', *args, '--stop_at=3')
    before = out.read_bytes()
    line = refused(run('train.py', *args, '--resume=True', ok=False, limits={'RLIMIT_FSIZE': 20000}))
    # The first file that it writes is the best one, which a kill between the two would have left behind.
    assert f'{tmp_path}/x_best.pt could not be written' in line and out.read_bytes() == before
    assert not list(tmp_path.glob('*.tmp'))
    for number in (errno.ENOSPC, errno.EROFS, errno.EACCES):
        def denied(*args):
            raise OSError(number, os.strerror(number))
        with monkeypatch.context() as patch:
            patch.setattr(files.os, 'fsync', denied)
            with pytest.raises(Refusal, match=os.strerror(number)):
                files.write_atomically(str(out), lambda f: f.write(b'new'))
        assert out.read_bytes() == before and not os.path.exists(f'{out}.tmp')
    assert 'File exists' in refused(run('train.py', *TINY, f'--data={tiny}', f'--out={out}/x.pt', ok=False))
    assert 'could not be written' in refused(run('prepare.py', f'--name={tmp_path}/set', *SMALL_SET, ok=False,
                                                 limits={'RLIMIT_FSIZE': 20000}))


@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='needs the size of a process')
def test_out_of_memory_names_the_knob(tiny, trained, tmp_path):
    line = refused(run('train.py', *TINY, f'--data={tiny}', f'--out={tmp_path}/x.pt', '--batch_size=16384', '--model=vit',
                          limits={'RLIMIT_AS': 400 * 2**20}, ok=False))
    assert 'out of memory' in line and '--accumulation' in line and '--batch_size' in line


# ---- flipped bits, cut files -----------------------------------------------------------------------------------------

def opens(path, folder):
    """
    Read a checkpoint, or the split of a data set that a shard or the manifest belongs to; False where it is refused. A
    shard is also verified, as prepare.py does when it is called again: a bit of its header may change nothing that is
    read.
    """
    try:
        if path.endswith('.pt'):
            hope.load(path)
        else:
            clips = data.open_split(folder, 'val')
            clips[range(len(clips))]
            if path.endswith('.npy'):
                files.verify(folder, clips.manifest, [os.path.basename(path)])
    except Refusal as refusal:
        assert '\n' not in str(refusal) and (path in str(refusal) or folder in str(refusal)), refusal
        return False
    return True


@pytest.fixture
def victims(tiny, trained, tmp_path):
    """{what: (path, folder)} of a checkpoint, a shard and a manifest that may be damaged."""
    folder = str(shutil.copytree(tiny, tmp_path / 'set'))
    checkpoint = shutil.copy(trained['hope'], str(tmp_path / 'x.pt'))
    return {'checkpoint': (checkpoint, folder), 'shard': (f'{folder}/val_00000.npy', folder),
            'manifest': (f'{folder}/manifest.json', folder)}


@counted(12, 400)
def test_flipped_bits(count, victims, note):
    rng = random.Random(count)
    for what, (path, folder) in victims.items():
        assert opens(path, folder)
        whole, unseen = open(path, 'rb').read(), 0
        for i in range(count):
            place = rng.randrange(len(whole)) if i % 2 else rng.choice([*range(128), *range(-128, 0)])  # headers, footers
            flipped = bytearray(whole)
            flipped[place] ^= 1 << rng.randrange(8)
            with open(path, 'wb') as f:
                f.write(flipped)
            unseen += opens(path, folder)
        with open(path, 'wb') as f:
            f.write(whole)
        assert opens(path, folder)
        note(f'flipped bits in a {what}', count, f'{count - unseen} seen')
        assert not unseen


@counted(9, 100)
def test_cut_files(count, victims, note):
    rng, unseen = random.Random(count), 0
    for i in range(count):
        path, folder = list(victims.values())[i % 3]
        whole = open(path, 'rb').read()
        with open(path, 'wb') as f:
            f.write(whole[:0 if i < 3 else len(whole) - 1 if i < 6 else rng.randrange(len(whole))])
        unseen += opens(path, folder)
        with open(path, 'wb') as f:
            f.write(whole)
    note('truncated files', count, f'{count - unseen} seen')
    assert not unseen


def test_a_damaged_shard_is_mended_by_the_same_command(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / 'set')
    (folder / 'val_00000.npy').write_bytes(b'damaged')
    (folder / 'test_B_actions.npy').unlink()
    (folder / 'val_00000.npy.tmp').write_bytes(b'left over')
    said = run('prepare.py', f'--name={folder}', *SMALL_SET).stdout
    assert 'val_00000.npy, test_B_actions.npy: damaged or missing' in said
    assert files_of(folder) == files_of(tiny)


def test_opening_a_split_reads_no_shard(tiny, tmp_path):
    """Sizes and headers are checked at every open, checksums when a clip is read or prepare.py is called again."""
    folder = str(shutil.copytree(tiny, tmp_path / 'set'))
    path = os.path.join(folder, 'val_00000.npy')
    with open(path, 'r+b') as f:
        f.seek(-1, os.SEEK_END)
        f.write(b'x')
    clips = data.open_split(folder, 'val')
    with pytest.raises(Refusal, match='val_00000.npy is damaged or missing; prepare.py, run as before, repairs it'):
        files.verify(folder, clips.manifest, ['val_00000.npy'])
    with open(path, 'ab') as f:
        f.write(b'x')
    with pytest.raises(Refusal, match='val_00000.npy is damaged or missing'):
        data.open_split(folder, 'val')


# ---- malformed data folders ----------------------------------------------------------------------------------------------

def claim_of(shape, descr='<f4', rest=b'0' * 64):
    """A .npy file whose header claims a shape."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {'descr': descr, 'fortran_order': False, 'shape': shape})
    return buffer.getvalue() + rest


def put(file, content):
    """
    A change of a data set: a file's content (bytes, or an array), with its true sha256 in the manifest, which has no
    checksums of clips, as in a set of an earlier version.
    """
    def change(folder, manifest):
        for split in manifest['splits'].values():
            for shard in split['shards']:
                shard.pop('crc32', None)
        path = os.path.join(folder, file)
        if isinstance(content, bytes):
            with open(path, 'wb') as f:
                f.write(content)
        elif file.endswith('.npz'):
            np.savez(path, **content)
        else:
            np.save(path, content, allow_pickle=True)
        manifest['sha256'][file] = files.sha256(path)
    return change


def edit(**entries):
    """A change of a data set: entries of the manifest."""
    return lambda folder, manifest: manifest.update(entries)


def shards(names):
    """A change of a data set: the shards of val, which are there, with their true sha256."""
    def change(folder, manifest):
        for name in names:
            path = os.path.join(folder, name)
            shutil.copy(os.path.join(folder, 'train_00000.npy'), path)
            manifest['sha256'][name] = files.sha256(path)
        manifest['splits']['val']['shards'] = [{'file': name, 'clips': 48} for name in names]
    return change


def checksums(text):
    """A change of a data set: the checksums of the clips in the shard of val."""
    return lambda folder, manifest: manifest['splits']['val']['shards'][0].update(crc32=text)


def gone(file):
    """A change of a data set: a file less."""
    return lambda folder, manifest: os.unlink(os.path.join(folder, file))


def forget(file):
    """A change of a data set: a sha256 less."""
    return lambda folder, manifest: manifest['sha256'].pop(file)


Z, A = np.ones((24, 8, 4, 24), np.float16) * np.arange(24, dtype=np.float16), np.ones((24, 8, 2), np.float32)
BAD = {value: [np.where(np.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1)) == 5, value, x).astype(x.dtype) for x in (Z, A)]
       for value in (np.nan, np.inf)}
POSITION = np.zeros((24, 16, 2))
FOLDERS = {
    'no folder': lambda folder, manifest: shutil.rmtree(folder),
    'unfinished': edit(complete=False),
    'complete by word': edit(complete='yes'),
    'no split': lambda folder, manifest: manifest['splits'].pop('val'),
    'no shards': shards([]),
    'shard missing': gone('val_00000.npy'),
    'actions missing': gone('val_actions.npy'),
    'physics missing': gone('val_physics.npz'),
    'actions without sha256': forget('val_actions.npy'),
    'shard outside': shards(['../x.npy']),
    'shard of another split': shards(['val_00000.npy', 'x.npy']),
    'shard named as folder': shards(['./x.npy']),
    'checksums of other clips': checksums('01234567' * 24),
    'too few checksums': checksums('01234567' * 23),
    'checksums by word': checksums('none'),
    'T differs': edit(shape=[7, 4, 24]),
    'N differs': edit(shape=[8, 5, 24]),
    'D differs': edit(shape=[8, 4, 25]),
    'shape of two numbers': edit(shape=[8, 4]),
    'shape by word': edit(shape='8'),
    'grid differs': edit(grid=[3, 2]),
    'no grid': lambda folder, manifest: manifest.pop('grid'),
    'splits as list': edit(splits=[1]),
    'sha256 as list': edit(sha256=[1]),
    'float32 shard': put('val_00000.npy', Z.astype(np.float32)),
    'flat shard': put('val_00000.npy', Z.reshape(-1)),
    'empty shard': put('val_00000.npy', Z[:0]),
    'text as shard': put('val_00000.npy', b'hello'),
    'nothing as shard': put('val_00000.npy', b''),
    'float64 actions': put('val_actions.npy', A.astype(np.float64)),
    'actions too short': put('val_actions.npy', A[:, :7]),
    'actions too few': put('val_actions.npy', A[:23]),
    'flat actions': put('val_actions.npy', A[..., 0]),
    'NaN in actions': put('val_actions.npy', BAD[np.nan][1]),
    'Inf in features': put('val_00000.npy', BAD[np.inf][0]),
    'physics too few': put('val_physics.npz', {'position': POSITION[:23]}),
    'physics without position': put('val_physics.npz', {'mu': np.ones(24)}),
    'text as physics': put('val_physics.npz', b'hello'),
}


def changed_set(tiny, folder, change):
    """A copy of the tiny data set with a change, its manifest sealed as a knowing hand would → its folder."""
    shutil.copytree(tiny, folder)
    manifest = files.parse_manifest(os.path.join(folder, 'manifest.json'))
    change(str(folder), manifest)
    if os.path.exists(folder):
        files.write_manifest(str(folder), manifest)
    return str(folder)


@counted(9, 38)
def test_malformed_data_folders(count, tiny, tmp_path, note):
    wrong = []
    for i, (name, change) in enumerate(spread(list(FOLDERS.items()), count)):
        folder = changed_set(tiny, tmp_path / str(i), change)
        try:
            clips = data.open_split(folder, 'val')
            clips[range(len(clips))]
            wrong.append(name)
        except Refusal as refusal:
            assert '\n' not in str(refusal) and folder in str(refusal), refusal
    note('malformed data folders', min(count, len(FOLDERS)), f'{len(wrong)} taken for whole')
    assert not wrong, '\n'.join(map(str, wrong))


# ---- hostile files -------------------------------------------------------------------------------------------------------

class Runs:
    """Unpickled, it would run a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


def seal(path, content, change):
    """A checkpoint by a knowing hand: its pickled part changed, a valid checksum at its end."""
    buffer, packed = io.BytesIO(), io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(packed, 'w') as target:
        for name in source.namelist():
            member = source.read(name)
            target.writestr(name, change(member) if name.endswith('data.pkl') else member)
    raw = packed.getvalue()
    with open(path, 'wb') as f:
        f.write(raw + hashlib.sha256(raw).hexdigest().encode())


def hostile(tiny, trained, tmp_path, mark):
    """[(what, script, its arguments)]: each reads a file that would do harm to a believer."""
    whole = torch.load(trained['vit'], weights_only=True)
    evil, cases = tmp_path / 'evil', []
    evil.mkdir()

    def data_set(what, change):
        folder = changed_set(tiny, evil / f'{len(cases)}', change)
        cases.append((what, 'train.py', [*TINY, f'--data={folder}', '--model=vit', f'--out={evil}/x.pt', '--max_iters=1']))

    seal(evil / 'code.pt', whole, lambda pickled: pickle.dumps(Runs(mark), 2))
    cases.append(('code in a checkpoint', 'adapt.py', [f'--ckpt={evil}/code.pt', f'--data={tiny}', *FEW]))
    bare = evil / 'bare.pt'
    bare.write_bytes(pickle.dumps(Runs(mark)))
    cases.append(('a bare pickle', 'adapt.py', [f'--ckpt={bare}', f'--data={tiny}', *FEW]))
    encode = ['--encoder=vitl', f'--name={evil}/set', '--clips=2']
    cases.append(('a bare pickle as weights', 'prepare.py', [*encode, f'--weights={bare}']))
    data_set('code in a shard', put('train_00000.npy', np.array([Runs(mark)], dtype=object)))
    data_set('code in actions', put('train_actions.npy', np.array([Runs(mark)], dtype=object)))
    data_set('10^12 clips in a shard', put('train_00000.npy', claim_of((10**12, 8, 4, 24), '<f2')))
    data_set('10^12 actions', put('train_actions.npy', claim_of((10**12,))))
    data_set('code in physics', put('val_physics.npz', {'position': np.array([Runs(mark)], dtype=object)}))
    data_set('a shard outside the folder', shards(['../../outside.npy']))
    clips = own_clips(evil / 'clips', splits=('train',))
    np.save(clips / 'train' / 'clip_00000' / 'actions_states' / 'actions.npy', np.array([Runs(mark)], dtype=object))
    cases.append(('code in own actions', 'prepare.py', [f'--source={clips}', f'--name={evil}/own']))
    return cases


@counted(5, 10)
def test_hostile_files(count, tiny, trained, tmp_path, note):
    mark, harmed = tmp_path / 'mark', []
    cases = spread(hostile(tiny, trained, tmp_path, mark), count)
    for what, script, args in cases:
        done = run(script, *args, ok=False, limits={'RLIMIT_AS': 2**30})
        if done.returncode != 2 or len(done.stderr.splitlines()) != 1 or mark.exists() or 'out of memory' in done.stderr:
            harmed.append((what, done.returncode, done.stderr[-600:]))
            mark.unlink(missing_ok=True)
    note('malicious files', len(cases), f'{len(harmed)} with an effect: code run, no refusal')
    assert not harmed


# ---- NaN -----------------------------------------------------------------------------------------------------------------

@counted(3, 10)
def test_not_a_number(count, tiny, trained, tmp_path, note):
    """Wherever a NaN comes in, one line says where, and the last good checkpoint is as it was."""
    out, own, aba = tmp_path / 'x.pt', own_clips(tmp_path / 'clips'), tmp_path / 'aba'
    training = [*TINY, f'--data={tiny}', '--model=vit', f'--out={out}', '--eval_interval=100']
    run('train.py', *training, '--stop_at=2')
    good, nan = out.read_bytes(), float('nan')
    adapting = [f'--data={tiny}', *FEW, f'--out={aba}', '--methods=memory', '--tune_on=']

    def spoilt(name, change, source=out):
        content = torch.load(source, weights_only=True)
        change(content)
        files.write_sealed(str(tmp_path / name), content)
        return tmp_path / name

    def weight(content):
        content['predictor']['predictor_proj.bias'].fill_(nan)

    def moment(content):
        content['optimizer']['state'][0]['exp_avg'][0] = nan

    def other(change):
        return changed_set(tiny, tmp_path / str(len(list(tmp_path.iterdir()))), change)

    def own_nan(*file):
        array = np.load(own.joinpath('train', 'clip_00001', *file))
        np.save(own.joinpath('train', 'clip_00001', *file), np.full_like(array, nan))
        return ['prepare.py', f'--source={own}', f'--name={tmp_path}/own']
    features, actions = (np.concatenate([x, x]) for x in BAD[np.nan])
    cases = [
        ('features', ['train.py', *training, f'--data={other(put("train_00000.npy", features))}',
                      f'--out={tmp_path}/y.pt']),
        ('optimiser', ['train.py', *training, f'--out={spoilt("m.pt", moment)}', '--resume=True']),
        ('gradient', ['train.py', *training, f'--out={tmp_path}/g.pt', '--learning_rate=1e30', '--warmup=0']),
        ('actions', ['train.py', *training, f'--data={other(put("train_actions.npy", actions))}',
                     f'--out={tmp_path}/y.pt']),
        ('weights', ['adapt.py', f'--ckpt={spoilt("w.pt", weight)}', *adapting]),
        ('weights to start from', ['train.py', *training, f'--out={tmp_path}/y.pt', f'--init_from={tmp_path}/w.pt']),
        ('decoder', ['adapt.py', f'--ckpt={trained["vit"]}', *adapting,
                     f'--data={other(put("decoder.npy", np.full((25, 1536), nan, np.float32)))}']),
    ]
    if count > 3:
        run('adapt.py', f'--ckpt={trained["hope"]}', *adapting, f'--memory_out={tmp_path}/memory.pt')
        memory = spoilt('memory_nan.pt', lambda c: c['memory'][0].fill_(nan), tmp_path / 'memory.pt')
        cases.append(('memory', ['adapt.py', f'--ckpt={trained["hope"]}', *adapting, f'--memory_in={memory}']))
    cases.append(('own actions', own_nan('actions_states', 'actions.npy')))
    wrong, chosen = [], cases[:count]
    for where, command in chosen:
        done = run(*command, ok=False)
        one_line = done.returncode == 2 and len(done.stderr.splitlines()) == 1
        if not one_line or 'finite' not in done.stderr or out.read_bytes() != good:
            wrong.append((where, done.returncode, done.stderr[-600:]))
    if count > 3:
        command = own_nan('feature_maps', 'vjepa2_vitl16.npy')
        os.rename(own / 'train' / 'clip_00001' / 'actions_states', own / 'train' / 'clip_00001' / 'bad')
        shutil.copytree(own / 'train' / 'clip_00000' / 'actions_states', own / 'train' / 'clip_00001' / 'actions_states')
        done = run(*command, ok=False)
        if done.returncode != 2 or 'finite' not in done.stderr:
            wrong.append(('own features', done.returncode, done.stderr[-600:]))
    note('NaN injected', len(chosen) + (count > 3), f'{len(wrong)} passed on')
    assert not wrong, '\n'.join(map(str, wrong))
