"""What tests share: a way to run the scripts, a small data set, two checkpoints, a small predictor, clips."""
import functools
import gc
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time

import pytest
import torch
import torch.nn.functional as F

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TESTS)
sys.path.insert(0, ROOT)
torch.set_num_threads(1)

# Options of train.py for two blocks and six steps, and of adapt.py for a short stream.
TINY = ['--depth=2', '--width=24', '--heads=2', '--mlp_hidden=32', '--cms_hidden=10', '--batch_size=8',
        '--stream_clips=4', '--max_iters=6', '--teacher_every=2', '--inverse_batch=8', '--eval_interval=3',
        '--eval_clips=8', '--log_interval=1', '--device=cpu']
FEW = ['--clips=6', '--probe_clips=6', '--probe_every=6', '--tune_clips=1', '--processes=1', '--device=cpu']
# A data set of 2 x 2 patches, D = 24.
SMALL_SET = ['--size=32', '--dim=24', '--clips=48', '--test_clips=24', '--device=cpu']

# The laptop's sizes, which a test changes where it needs others.
SIZES = dict(
    model='hope', feature_dim=48, action_dim=2, state_dim=0, world=True, steps=8, grid=(4, 4), depth=2,
    width=96, heads=4, mlp_hidden=384, cms_hidden=236, cms_periods=(1, 4, 16), mixer='both', conv=True,
    memory_hidden=0, self_targets=True, surprise=True, rule='dgd', rope='paired', normed_output=True)


def sizes(**changes):
    """model.Sizes of the laptop's predictor with some changes."""
    import model
    return model.Sizes(**{**SIZES, **changes})


# A predictor as small as the features of some_clips().
SMALL = dict(feature_dim=12, grid=(2, 2), steps=5, width=24, heads=2, mlp_hidden=48, cms_hidden=16)


def small_predictor(kind='hope', **changes):
    import hope
    torch.manual_seed(0)
    return hope.build(sizes(**{'model': kind, **SMALL, **changes})).double()


def some_clips(clips=3, steps=5):
    """Random features (clips,steps,4,12) and actions (clips,steps,2)."""
    random = functools.partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return F.layer_norm(random(clips, steps, 4, 12), (12,)), random(clips, steps, 2)


# It imports torch once; a script then starts in a fork of it, in a tenth of the time.
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(['torch', 'torch._dynamo', 'pandas', 'scipy.stats', 'matplotlib.pyplot'])


def child(path, args, cwd, environment, out, err):
    """Run a script as `python path args` would, in this fresh process."""
    # What torch has created is not searched for garbage: that took most of the time of a small script.
    gc.freeze()
    for stream, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(1)
    sys.argv = [path, *args]
    sys.path[:] = [os.path.dirname(path), *(p for p in sys.path if p not in ('', ROOT, TESTS))]
    runpy.run_path(path, run_name='__main__')


def run(script, *args, cwd=ROOT, environment=None, ok=True, meanwhile=None):
    """
    Run a script of the project as a user would → CompletedProcess; ok=True asserts that it exits with 0.

    environment: {name: value} on top of this one. meanwhile(pid) is called once it runs.
    """
    command = [os.path.join(ROOT, script), *map(str, args)]
    environment = {'OMP_NUM_THREADS': '1', 'COLUMNS': '100', **(environment or {})}
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ('out', 'err')]
        process = FORKS.Process(target=child, args=(command[0], command[1:], str(cwd), environment, *files))
        process.start()
        if meanwhile:
            meanwhile(process.pid)
        process.join()
        said = []
        for file in files:
            with open(file, encoding='utf-8') as f:
                said.append(f.read())
    done = subprocess.CompletedProcess(command, process.exitcode, *said)
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


def refused(done):
    """The one line of a refusal: status 2, one line on stderr, no traceback."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and 'Traceback' not in done.stderr, done.stderr
    return lines[0]


def pytest_xdist_auto_num_workers(config):
    """One process, which starts sooner than several, where files or tests are named."""
    if config.option.keyword or any('.py' in arg for arg in config.args):
        return 0


def common(tmp_path_factory, name, make):
    """A folder that all processes of this run share; the first that asks for it fills it by make(folder)."""
    base = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        base = base.parent
    folder, made = base / name, base / f'{name}.made'
    try:
        folder.mkdir()
    except FileExistsError:
        deadline = time.time() + 100
        while not made.exists():
            assert time.time() < deadline, f'another process did not finish {folder}'
            time.sleep(0.05)
        return folder
    make(folder)
    made.touch()
    return folder


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    """The folder of a small data set."""
    def make(folder):
        run('prepare.py', f'--name={folder}/tiny', *SMALL_SET)
    return str(common(tmp_path_factory, 'data', make) / 'tiny')


@pytest.fixture(scope='session')
def trained(tiny, tmp_path_factory):
    """{'hope': path, 'vit': path}: checkpoints of a few steps on the tiny set."""
    def make(folder):
        for kind in ('hope', 'vit'):
            plain = ['--world=False', '--worlds=False', '--conv=False'] if kind == 'vit' else []
            run('train.py', *TINY, *plain, f'--model={kind}', f'--data={tiny}', f'--out={folder}/{kind}.pt')
    folder = common(tmp_path_factory, 'out', make)
    return {kind: str(folder / f'{kind}.pt') for kind in ('hope', 'vit')}


def own_phases(data_set, folder):
    """A copy with phases as users have them, val, B and A2, no other domain, no pictures → its folder."""
    shutil.copytree(data_set, folder, ignore=shutil.ignore_patterns('decoder.npy', 'test_[C-z]*'))
    for end in 'npz', 'npy':
        os.rename(folder / f'test_A.{end}', folder / f'test_A2.{end}')
    return str(folder)
