"""
The safety net: 50 training losses of both predictors and one A→B→A row of four methods, on a tiny set, as they were.

golden/clips.npz has the features and pushes, golden/losses.json what came out at commit 6afb56d, on one thread of a CPU.
Where arithmetic was not meant to change, all of it must come out again; another processor may differ in the last digits.
"""
import csv
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TESTS, run

FLAGS = ['--depth=2', '--width=24', '--heads=2', '--mlp_hidden=32', '--cms_hidden=10', '--batch_size=8', '--max_iters=50',
         '--teacher_every=2', '--inverse_batch=8', '--eval_interval=25', '--eval_clips=8', '--log_interval=1', '--device=cpu']
CLOSE = {'rel': 2e-3}


@pytest.fixture(scope='module')
def golden():
    with open(os.path.join(TESTS, 'golden', 'losses.json'), encoding='utf-8') as f:
        return json.load(f)


@pytest.fixture(scope='module')
def data_set(tmp_path_factory):
    """The golden clips as a data set → its folder."""
    from support.files import clip_checksums, write_manifest
    from support.shards import save
    folder = str(tmp_path_factory.mktemp('golden'))
    clips = np.load(os.path.join(TESTS, 'golden', 'clips.npz'))
    manifest = {'complete': True, 'made_from': {'source': 'golden'}, 'shape': [8, 4, 24], 'dtype': 'float16', 'grid': [2, 2],
                'patch': 16, 'sha256': {}, 'splits': {}}
    for split in ('train', 'val', 'test_A', 'test_B'):
        z = clips[split]
        save(folder, manifest, f'{split}_00000.npy', lambda f: np.save(f, z))
        save(folder, manifest, f'{split}_actions.npy', lambda f: np.save(f, clips[split + '_actions']))
        manifest['splits'][split] = {'domain': 'A', 'shards': [{'file': f'{split}_00000.npy', 'crc32': clip_checksums(z)}]}
    write_manifest(folder, manifest)
    return folder


@pytest.mark.parametrize('kind', ['hope', 'vit'])
def test_training_and_adaptation_come_out_as_they_were(kind, golden, data_set, tmp_path):
    run('train.py', *FLAGS, f'--model={kind}', f'--data={data_set}', f'--out={tmp_path}/{kind}.pt')
    with open(tmp_path / f'{kind}.csv', encoding='utf-8') as f:
        rows = list(csv.DictReader(f))
    for column, name in (('loss', kind), ('inverse', f'{kind}_inverse'), ('val_jump', f'{kind}_val')):
        assert [float(row[column]) for row in rows if row[column]] == pytest.approx(golden[name], **CLOSE)

    from adapt import run_stream
    from data import open_split
    from experiment import build_experiment, read_checkpoints
    from methods import METHODS
    checkpoint, = read_checkpoints(f'{tmp_path}/{kind}.pt', '', 'cpu')
    splits = {split: open_split(data_set, split) for split in ('test_A', 'test_B')}
    knobs = SimpleNamespace(clips=6, tune_clips=1, probe_clips=6, probe_every=6, streams=1)
    experiment = build_experiment(knobs, ['A', 'B', 'A'], [], splits, 'cpu')
    for name, rate in (('frozen', None), ('LN-TTA', 0.01), ('memory', None), ('CMS', 10.0)):
        if kind == 'vit' and name == 'CMS':
            continue
        method = METHODS[name](checkpoint, rate, None, experiment, 1)
        row = run_stream(method, experiment.streams, experiment.probes, experiment.probe_at)
        key = f'{checkpoint.name} {name}'
        assert row['loss'][0] == pytest.approx(golden[key], **CLOSE)
        for domain, losses in row['probes'].items():
            assert losses[0] == pytest.approx(golden[f'{key} probes'][domain], **CLOSE)
