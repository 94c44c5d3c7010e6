"""Fixtures: a tiny data set made by prepare.py, two tiny trained checkpoints, and a way to run the scripts."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
torch.set_num_threads(2)

TINY = ['--depth=2', '--width=24', '--heads=2', '--mlp_hidden=32', '--cms_hidden=10', '--batch_size=8', '--max_iters=6',
        '--teacher_every=2', '--eval_interval=3', '--eval_clips=8', '--log_interval=1', '--device=cpu']


def run(script, *args, cwd=ROOT, launcher=(), ok=True):
    """Run a script of the project as a user would → CompletedProcess; ok=True asserts that it exits with 0."""
    done = subprocess.run([*(launcher or [sys.executable]), os.path.join(ROOT, script), *map(str, args)], cwd=cwd,
                          capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1', 'COLUMNS': '100'})
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


def refused(done):
    """The one line of a refusal: status 2, one line on stderr, no traceback."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and 'Traceback' not in done.stderr, done.stderr
    return lines[0]


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


def own_clips(folder, splits=('train', 'val', 'test_A', 'test_B'), features=True):
    """A folder of clips in the user's layout, 3 a split, as features (2048,1024) or as video (16,40,48,3) → its path."""
    rng = np.random.default_rng(0)
    for split in splits:
        for i in range(3):
            clip = folder / split / f'clip_{i:05d}'
            (clip / 'actions_states').mkdir(parents=True)
            actions = np.zeros((16, 2))
            actions[4] = i + 1, -1
            np.save(clip / 'actions_states' / 'actions.npy', actions)
            if features:
                (clip / 'feature_maps').mkdir()
                np.save(clip / 'feature_maps' / 'vjepa2_vitl16.npy', rng.normal(size=(2048, 1024)).astype(np.float16))
            else:
                np.save(clip / 'video.npy', rng.integers(0, 256, (16, 40, 48, 3), dtype=np.uint8))
    return folder


def official_weights(path, width=384, depth=1):
    """A file with the keys of an official V-JEPA 2 checkpoint and random weights → its path."""
    import model
    torch.manual_seed(0)
    encoder = model.VideoEncoder(width, model.HEADS[width], depth, 4 * width)
    torch.save({'target_encoder': {f'module.backbone.{k}': v for k, v in encoder.state_dict().items()}}, path)
    return path
