"""The A→B→A protocol: which clips are used for what, tuning, rows, and what is refused."""
import json
import os
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import own_phases
from test_methods import CONFIG

import adapt
from methods import METHODS


def adapted(data, out, **changes):
    """Run adapt.py here, without its report → {model, method and rate_from: row}, and its run.json."""
    config = {**CONFIG, 'data': data, 'out': str(out), 'processes': 1, **changes}
    with mock.patch('report.write'):
        adapt.main(config)
    about = json.loads((out / 'run.json').read_text())
    rows = {}
    for file in about['rows']:
        row = json.loads((out / file).read_text())
        rows[f'{row["model"]} {row["method"]} {row["rate_from"]}'.strip()] = row
    return rows, about


@pytest.fixture
def refusal(capsys):
    """The one line that adapted() refuses with."""
    def line_of(*args, **changes):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            adapted(*args, **changes)
        assert end.value.code == 2
        line, = capsys.readouterr().err.splitlines()
        return line
    return line_of


def changed(path, new, **changes):
    """A copy of a checkpoint with other entries → its path."""
    torch.save({**torch.load(path, weights_only=True), **changes}, new)
    return str(new)


@pytest.mark.parametrize('changes', [
    {'phases': 'A,B,A', 'streams': 4},
    {'phases': 'val,B,A'},
    {'phases': 'A,B,A,B', 'clips': 200, 'probe_clips': 200, 'tune_clips': 25},
])
def test_no_clip_serves_twice(tiny, changes):
    """Streams have clips of their phases, none of the probes or of tuning; each stream in its own order."""
    config = adapt.resolved({**CONFIG, 'data': tiny, **changes})
    experiment = adapt.Experiment(config)
    probes = [(split, i) for split, indices in experiment.probes.values() for i in indices]
    tuned = set(experiment.tuning)
    assert len(probes) == experiment.probe_clips * len(experiment.probes) > 0
    for stream in experiment.streams:
        assert len({*stream, *probes, *tuned}) == len(stream) + len(probes) + len(tuned)
        expected = [adapt.split_of(phase) for phase in config['phases'] for _ in range(experiment.clips)]
        assert [split for split, _ in stream] == expected
    assert len(set(map(tuple, experiment.streams))) == config['streams']


def test_tuning_never_touches_what_is_tested(tiny, trained, tmp_path, refusal, capsys):
    stream = adapt.Experiment(adapt.resolved({**CONFIG, 'data': tiny})).tuning
    assert stream == [('val', 0), ('test_C', 0), ('test_C', 1), ('val', 1)]
    assert adapt.resolved({**CONFIG, 'data': tiny, 'phases': 'A,C,A'})['tune_on'] == ''
    assert 'learning rates are the defaults' in capsys.readouterr().out
    for domain in 'B', 'A', 'val', 'ice':
        line = refusal(tiny, tmp_path, ckpt=trained['vit'], tune_on=domain, phases='A,ice')
        assert 'rates tuned on a domain under test prove nothing' in line


def test_names_of_phases():
    domains = [adapt.domain_of(phase) for phase in ('val', 'B', 'A2', 'B12', 'turned', '7')]
    assert domains == ['A', 'B', 'A', 'B', 'turned', '7']
    assert adapt.labels_of(['A', 'B', 'A', 'B']) == ['A₁', 'B₁', 'A₂', 'B₂']
    assert adapt.labels_of(['A1', 'B', 'A2']) == ['A1', 'B', 'A2']


def test_rows_are_run_once_and_another_run_is_refused(tiny, trained, tmp_path, refusal):
    """A row that is missing is run, and no other file of a row changes; methods may be added."""
    ckpt = f'{trained["hope"]},{trained["vit"]}'
    rows, about = adapted(tiny, tmp_path, ckpt=ckpt)
    both = ['frozen', 'LN-TTA tuned']
    hope = ['Titan memory tuned', 'CMS tuned', 'world head']
    assert set(rows) == {'copy', 'blank', *(f'HOPE {name}' for name in both + hope),
                         *(f'ViT-AC {name}' for name in [*both, 'full TTA tuned'])}
    assert about['labels'] == ['A₁', 'B', 'A₂'] and about['probe_at'] == [0, 6, 12, 18]
    for name, row in rows.items():
        assert np.shape(row['loss']) == (1, 18) and len(row['seconds']) == len(row['diagnostics']) == 18
        assert not row['model'] or np.shape(row['probes']['B']) == (1, 4)
        assert name == 'blank' or np.shape(row['metres']) == (1, 18)
        if row['rate_from'] == 'tuned':
            rates = METHODS[row['method']].rates
            assert row['rate'] == min(rates, key=lambda rate: row['tried'][str(rate)])
    predicted = np.load(tmp_path / 'HOPE_1_world_head.npz')['predicted']
    assert predicted.shape == (len(about['shown']), 3, 4, 24) == (8, 3, 4, 24)

    os.remove(tmp_path / 'HOPE_1_world_head.json')
    times = {file: file.stat().st_mtime_ns for file in tmp_path.glob('*_*.json')}
    again, _ = adapted(tiny, tmp_path, ckpt=ckpt, methods='frozen, world head, no carry')
    assert again['HOPE world head']['loss'] == rows['HOPE world head']['loss']
    assert again['HOPE no carry']['loss'] == rows['HOPE frozen']['loss']
    assert 'run.json is of another run: clips = 6, not 5' in refusal(tiny, tmp_path, ckpt=ckpt, clips=5)
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())


def test_seeds_orders_and_worlds_that_come_back(tiny, trained, tmp_path):
    """Rows that run side by side are the same; one oracle serves all seeds."""
    second = shutil.copy(trained['hope'], tmp_path / 'hope_2.pt')
    options = {'ckpt': f'{trained["hope"]},{second}', 'oracle': trained['vit'], 'clips': 2, 'probe_clips': 2,
               'phases': 'A,B,A,B', 'streams': 3, 'methods': 'LN-TTA, world head', 'rates': 'LN-TTA=0.01'}
    alone, about = adapted(tiny, tmp_path / 'one', **options)
    rows, _ = adapted(tiny, tmp_path / 'two', **options, processes=2)
    assert about['labels'] == ['A₁', 'B₁', 'A₂', 'B₂'] and about['probe_at'] == [0, 2, 4, 6, 8]
    assert list(rows) == ['copy', 'blank', 'HOPE LN-TTA given', 'HOPE world head', 'oracle frozen']
    assert len(about['rows']) == 7
    for name, row in rows.items():
        assert row['loss'] == alone[name]['loss'] and np.shape(row['loss']) == (3, 8)
        assert row['loss'][0] != row['loss'][1]


def test_planning_and_a_rollout_beside_a_jump(tiny, trained, tmp_path, refusal):
    rollout = changed(trained['hope'], tmp_path / 'x.pt', loss='rollout')
    options = dict(plan=True, tune_on='', clips=2, probe_clips=1, phases='A,B',
                   methods='HOPE world head, HOPE rollout frozen, HOPE rollout world head')
    with mock.patch('support.planning.search', lambda cost, largest: cost(np.zeros((1, 2))) * [1, 0]):
        rows, about = adapted(tiny, tmp_path / 'aba', ckpt=f'{trained["hope"]},{rollout}', **options)
    assert about['loss'] == 'jump and rollout' and about['tuned_on'] == ''
    assert [*rows][2:] == ['HOPE world head', 'HOPE rollout frozen', 'HOPE rollout world head']
    assert [(at['phase'], len(at['distance'])) for at in rows['HOPE world head']['planning']] == [('A', 1), ('B', 1)]
    fewer = changed(trained['hope'], tmp_path / 'y.pt', jump_last=2)
    assert 'have other target steps' in refusal(tiny, tmp_path, ckpt=f'{trained["hope"]},{fewer}')


def test_own_phases_with_fewer_clips_than_asked_for(tiny, trained, tmp_path, capsys):
    folder = own_phases(tiny, tmp_path / 'set')
    rows, about = adapted(folder, tmp_path / 'out', ckpt=trained['hope'], methods='frozen, LN-TTA', clips=200,
                          probe_clips=200, tune_clips=25)
    assert about['phases'] == ['val', 'B', 'A2'] and about['domains'] == ['A', 'B', 'A']
    assert about['shown'] == [] and about['tuned_on'] == '' and about['clips'] == 12
    assert len(rows['HOPE frozen']['loss'][0]) == 36
    said = capsys.readouterr().out
    for words in "{'clips': 12, 'probe_clips': 12", 'learning rates are the defaults':
        assert words in said


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_what_is_learned_is_seen_at_the_next_clip(tiny, trained, dtype):
    """Though under autocast bfloat16 copies of weights are kept within a clip."""
    config = {**CONFIG, 'data': tiny, 'ckpt': trained['vit'], 'dtype': dtype}
    (checkpoint,) = adapt.read_checkpoints(config)
    experiment = adapt.Experiment(adapt.resolved(config))
    frozen, learned = [
        adapt.run_stream(METHODS[name](checkpoint, 1e-2, experiment.bare()), experiment.streams)['loss']
        for name in ('frozen', 'full TTA')]
    assert frozen[0] == learned[0] and frozen[1] != learned[1]


def test_a_checkpoint_of_another_data_set_is_refused(tiny, trained, tmp_path, refusal):
    """Not one of the same with more clips, or with other random numbers."""
    with open(os.path.join(tiny, 'meta.json'), encoding='utf-8') as f:
        made_with = json.load(f)['config']
    more = changed(trained['vit'], tmp_path / 'x.pt', data={**made_with, 'clips': 7, 'seed': 7})
    adapt.read_checkpoints({**CONFIG, 'data': tiny, 'ckpt': more})
    other = changed(trained['vit'], tmp_path / 'y.pt', data={**made_with, 'encode': 'clip'})
    assert 'was trained on data with encode = clip' in refusal(tiny, tmp_path, ckpt=other)


@pytest.mark.parametrize('changes, words', [
    ({'ckpt': 'nothing.pt'}, 'no checkpoint at nothing.pt'),
    ({'methods': 'memory'}, 'memory is no method'),
    ({'methods': 'CMS'}, 'CMS is no method, or can adapt none of'),
    ({'methods': 'wrong world', 'tune_on': ''}, 'wrong world is no method'),
    ({'rates': 'world head=1'}, 'world head is no method'),
    ({'phases': 'A,moon'}, "no split 'test_moon'"),
])
def test_mistakes_are_refused_in_one_line(tiny, trained, tmp_path, refusal, changes, words):
    assert words in refusal(tiny, tmp_path, **{'ckpt': trained['vit'], **changes})
    assert not os.listdir(tmp_path)
