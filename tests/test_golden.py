"""
The safety net: 50 training losses of both predictors and an A→B→A row of four methods, on a tiny set.

golden/clips.npz has the features and pushes, golden/losses.json what came out of an early version, on one
thread. Where arithmetic was not meant to change, all of it must come out again. Another processor may differ
in the last digits.
"""
import csv
import json
import os

import numpy as np
import pytest
from conftest import TESTS, run

FLAGS = ['--depth=2', '--width=24', '--heads=2', '--mlp_hidden=32', '--cms_hidden=10', '--batch_size=8',
         '--max_iters=50', '--teacher_every=2', '--inverse_batch=8', '--eval_interval=25', '--eval_clips=8',
         '--log_interval=1', '--device=cpu']
STREAM = ['--clips=6', '--probe_clips=6', '--probe_every=6', '--tune_on=', '--rates=LN-TTA=0.01',
          '--processes=1', '--device=cpu']
CLOSE = {'rel': 2e-3}


@pytest.fixture(scope='module')
def golden():
    with open(os.path.join(TESTS, 'golden', 'losses.json'), encoding='utf-8') as f:
        return json.load(f)


@pytest.fixture(scope='module')
def data_set(tmp_path_factory):
    """The golden clips as a data set → its folder."""
    folder = tmp_path_factory.mktemp('golden')
    clips = np.load(os.path.join(TESTS, 'golden', 'clips.npz'))
    for split in ('train', 'val', 'test_A', 'test_B'):
        np.savez(folder / f'{split}.npz', actions=clips[f'{split}_actions'])
        np.save(folder / f'{split}.npy', clips[split])
    meta = {'config': {'source': 'golden'}, 'shape': [8, 4, 24], 'grid': [2, 2], 'patch': 16}
    (folder / 'meta.json').write_text(json.dumps(meta))
    return folder


@pytest.mark.parametrize('kind', ['hope', 'vit'])
def test_training_and_adaptation_come_out_as_they_were(kind, golden, data_set, tmp_path):
    run('train.py', *FLAGS, f'--model={kind}', f'--data={data_set}', f'--out={tmp_path}/{kind}.pt')
    with open(tmp_path / f'{kind}.csv', encoding='utf-8') as f:
        rows = list(csv.DictReader(f))
    for column, name in (('loss', kind), ('inverse', f'{kind}_inverse'), ('val_jump', f'{kind}_val')):
        assert [float(row[column]) for row in rows if row[column]] == pytest.approx(golden[name], **CLOSE)

    methods = 'frozen,LN-TTA,memory,CMS' if kind == 'hope' else 'frozen,LN-TTA,memory'
    run('adapt.py', *STREAM, f'--ckpt={tmp_path}/{kind}.pt', f'--data={data_set}', f'--methods={methods}',
        f'--out={tmp_path}/aba')
    rows = [json.loads(path.read_text()) for path in tmp_path.glob('aba/*_1_*.json')]
    # That of the plan's learning rate is not among the golden ones.
    rows = {f'{row["model"]} {row["method"]}': row for row in rows if row['rate_from'] != 'plan'}
    assert {name.split(' ', 1)[1] for name in rows} == set(methods.split(','))
    for name, row in rows.items():
        assert row['loss'][0] == pytest.approx(golden[name], **CLOSE)
        for domain, losses in row['probes'].items():
            assert losses[0] == pytest.approx(golden[f'{name} probes'][domain], **CLOSE)
