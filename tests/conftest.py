"""Fixtures: a tiny data set made by prepare.py, two tiny trained checkpoints, and a way to run the scripts."""
import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
torch.set_num_threads(2)
NUMBERS = []                 # rows of the table that `pytest -m trust` ends with: what, how many, outcome

TINY = ['--depth=2', '--width=24', '--heads=2', '--mlp_hidden=32', '--cms_hidden=10', '--batch_size=8', '--max_iters=6',
        '--teacher_every=2', '--eval_interval=3', '--eval_clips=8', '--log_interval=1', '--device=cpu']

FORKS = multiprocessing.get_context('forkserver')                      # imports torch once, not at every start of a script
FORKS.set_forkserver_preload(['torch', 'torch._dynamo', 'numpy', 'matplotlib.pyplot'])


def child(path, args, cwd, environment, out, err, limits):
    """Run a script as `python path args` would, in this fresh process."""
    for stream, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(1)
    for name, most in limits.items():
        if name == 'RLIMIT_AS':                                        # bytes beyond what is mapped already
            with open('/proc/self/statm') as f:
                most += int(f.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(getattr(resource, name), (most, most))
    sys.argv, sys.path[0] = [path, *args], os.path.dirname(path)
    try:
        runpy.run_path(path, run_name='__main__')
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def run(script, *args, cwd=ROOT, launcher=(), ok=True, meanwhile=None, limits=()):
    """
    Run a script of the project as a user would → CompletedProcess; ok=True asserts that it exits with 0. meanwhile(pid) is
    called once it runs; limits: {'RLIMIT_FSIZE': bytes, ...}.
    """
    command = [os.path.join(ROOT, script), *map(str, args)]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'COLUMNS': '100'}
    if launcher:
        done = subprocess.run([*launcher, *command], cwd=cwd, capture_output=True, text=True, env=environment)
    else:
        with tempfile.TemporaryDirectory() as folder:
            out, err = os.path.join(folder, 'out'), os.path.join(folder, 'err')
            args = command[0], command[1:], str(cwd), environment, out, err, dict(limits)
            process = FORKS.Process(target=child, args=args)
            process.start()
            if meanwhile:
                meanwhile(process.pid)
            process.join()
            texts = [open(file, encoding='utf-8').read() if os.path.exists(file) else '' for file in (out, err)]
        done = subprocess.CompletedProcess(command, process.exitcode, *texts)
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


def refused(done):
    """The one line of a refusal: status 2, one line on stderr, no traceback."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and 'Traceback' not in done.stderr, done.stderr
    return lines[0]


def pytest_terminal_summary(terminalreporter, config):
    """The numbers of the trust suite."""
    if NUMBERS and config.option.markexpr == 'trust':
        terminalreporter.section('trust')
        for what, count, outcome in NUMBERS:
            terminalreporter.write_line(f'{what:<36}{count:>5}   {outcome}')


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    """A data set of 2 x 2 patches, D = 24: its folder."""
    folder = tmp_path_factory.mktemp('data') / 'tiny'
    run('prepare.py', f'--name={folder}', '--size=32', '--dim=24', '--clips=48', '--test_clips=24')
    return str(folder)


@pytest.fixture(scope='session')
def trained(tiny, tmp_path_factory):
    """{'hope': path, 'vit': path}: checkpoints of a few steps on the tiny set."""
    folder = tmp_path_factory.mktemp('out')
    for kind in ('hope', 'vit'):
        run('train.py', *TINY, f'--model={kind}', f'--data={tiny}', f'--out={folder}/{kind}.pt')
    return {kind: str(folder / f'{kind}.pt') for kind in ('hope', 'vit')}


def own_clip(clip, number, layout='features'):
    """One clip in one of the user's layouts, with a push of (number, -1) in the fifth row of its actions."""
    rng = np.random.default_rng(number)
    (clip / 'actions_states').mkdir(parents=True)
    actions = np.zeros((16, 2))
    actions[4] = number, -1
    np.save(clip / 'actions_states' / 'actions.npy', actions)
    if layout == 'features':
        (clip / 'feature_maps').mkdir()
        np.save(clip / 'feature_maps' / 'vjepa2_vitl16.npy', rng.normal(size=(2048, 1024)).astype(np.float16))
        return
    video = np.kron(rng.integers(0, 256, (16, 5, 6, 3), dtype=np.uint8), np.ones((1, 8, 8, 1), np.uint8))  # (16,40,48,3)
    if layout == 'video':
        np.save(clip / 'video.npy', video)
    elif layout == 'pictures':
        from PIL import Image
        (clip / 'rgb').mkdir()
        for i, frame in enumerate(video):
            Image.fromarray(frame).save(clip / 'rgb' / f'frame_{i + 1:05d}.png')


def own_clips(folder, splits=('train', 'val', 'test_A', 'test_B'), layout='features'):
    """A folder of clips in one of the user's layouts, 3 a split → its path."""
    for split in splits:
        for i in range(3):
            own_clip(folder / split / f'clip_{i:05d}', i + 1, layout)
    return folder


def official_weights(path, width=768, depth=1, part='target_encoder', version='2'):
    """A file with the keys of an official V-JEPA 2 checkpoint and random weights → its path."""
    import vjepa2
    torch.manual_seed(0)
    encoder = vjepa2.VideoEncoder(width, vjepa2.HEADS['encoder'][width], depth, width, version)
    torch.save({part: {f'module.backbone.{k}': v for k, v in encoder.state_dict().items()}}, path)
    return path


def official_predictor(path):
    """A file with the keys of an official action-conditioned checkpoint and random weights, of the size of TINY → its path."""
    import hope
    import model
    torch.manual_seed(0)
    sizes = model.Sizes(model='vit', feature_dim=24, action_dim=7, state_dim=7, grid=None, depth=2, width=24, heads=2,
                        mlp_hidden=32, rope='vjepa2')
    net = hope.build(sizes)
    torch.save({'predictor': {f'module.{k}': v for k, v in net.state_dict().items()}}, path)
    return path
