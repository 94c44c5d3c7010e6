"""
The safety net: 50 training losses of three predictors and the rows of an A→B stream, on a tiny set.

golden/clips.npz has the features and pushes, golden/losses.json what came out of an early version, on one
thread. Where arithmetic was not meant to change, all of it must come out again. Another processor may differ
in the last digits. Where it was meant to change: python tests/test_golden.py writes losses.json anew.
"""
import csv
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import TESTS, run

GOLDEN = Path(TESTS, 'golden')
# At low rates: at those of a real training rounding errors grow to a tenth of the loss within 50 steps.
FLAGS = ['--depth=2', '--width=24', '--heads=2', '--mlp_hidden=32', '--cms_hidden=10', '--batch_size=8',
         '--stream_clips=4', '--max_iters=50', '--teacher_every=2', '--inverse_batch=8', '--eval_interval=25',
         '--eval_clips=8', '--log_interval=1', '--device=cpu', '--learning_rate=5e-5', '--muon_rate=1e-4']
STREAM = ['--clips=6', '--probe_clips=6', '--probe_every=6', '--tune_on=', '--processes=1', '--device=cpu']
PLAIN = ['--world=False', '--worlds=False']
# What is trained, and how it adapts.
RUNS = {
    'hope': ([], ['--methods=frozen, LN-TTA, world head, CMS', '--rates=LN-TTA=0.001,CMS=0.01']),
    'hope without head': ([*PLAIN, '--optimizer=adamw'], ['--methods=frozen, CMS', '--rates=CMS=0.01']),
    'vit': ([*PLAIN, '--model=vit', '--conv=False'], ['--methods=frozen, LN-TTA', '--rates=LN-TTA=0.001']),
}


def outcome(name, folder):
    """Make the golden clips a data set in a new folder, train there and adapt → {what: numbers}."""
    folder.mkdir()
    clips = np.load(GOLDEN / 'clips.npz')
    for split in ('train', 'val', 'test_A', 'test_B'):
        np.savez(folder / f'{split}.npz', actions=clips[f'{split}_actions'])
        np.save(folder / f'{split}.npy', clips[split])
    config = dict(source='golden', size=32, encoder='patch', dim=24, encode='step')
    meta = {'config': config, 'shape': [8, 4, 24], 'grid': [2, 2], 'patch': 16}
    (folder / 'meta.json').write_text(json.dumps(meta))
    options, methods = RUNS[name]
    run('train.py', *FLAGS, *options, f'--data={folder}', f'--out={folder}/x.pt')
    with open(folder / 'x.csv', encoding='utf-8') as f:
        rows = list(csv.DictReader(f))
    found = {column: [float(row[column]) for row in rows if row[column]]
             for column in ('loss', 'inverse', 'surprise', 'val_jump')}
    run('adapt.py', *STREAM, *methods, f'--ckpt={folder}/x.pt', f'--data={folder}', f'--out={folder}/aba')
    for path in sorted(folder.glob('aba/*_1_*.json')):
        row = json.loads(path.read_text())
        found |= {path.stem: row['loss'][0]}
        found |= {f'{path.stem}, probes of {domain}': losses[0] for domain, losses in row['probes'].items()}
        # At this size the head changes losses by 2e-3 only.
        if row['method'] == 'world head':
            found |= {'surprise of the stream': [clip['surprise'] for clip in row['diagnostics']]}
    return found


@pytest.mark.parametrize('name', RUNS)
def test_training_and_adaptation_come_out_as_they_were(name, tmp_path):
    golden, found = json.loads((GOLDEN / 'losses.json').read_text())[name], outcome(name, tmp_path / name)
    assert found.keys() == golden.keys()
    for what, numbers in found.items():
        assert numbers == pytest.approx(golden[what], rel=2e-3, abs=0.02 if 'surprise' in what else None), what


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as place:
        found = {name: outcome(name, Path(place, name)) for name in RUNS}
    (GOLDEN / 'losses.json').write_text(json.dumps(found))
