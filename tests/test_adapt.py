"""The A→B→A protocol: scored before shown, frozen where the rate is 0, and every file that it promises."""
import csv
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import FEW, FEW_KNOBS, TINY, refused, run

import adapt
import methods
from compare import title
from configurator import Refusal
from data import open_split
from experiment import SCALED, build_experiment, check_clips, domain_of, labels_of, phases_of, read_checkpoints
from experiment import split_of, tuned_on
from support import files
from support.files import read_sealed
from support.finished import resume


@pytest.fixture(scope='module')
def own_phases(tiny, tmp_path_factory):
    """A copy of the tiny set with phases as users have them, A1, B and A2, no other domain and no decoder."""
    folder = str(shutil.copytree(tiny, tmp_path_factory.mktemp('own') / 'set'))
    manifest = files.parse_manifest(os.path.join(folder, 'manifest.json'))
    splits = manifest['splits']
    for name, other in (('test_A1', 'test_A'), ('test_A2', 'test_mass')):
        entry = splits.pop(other)
        splits[name] = entry
        for part in ('actions.npy', 'physics.npz'):
            shutil.copy(f'{folder}/{other}_{part}', f'{folder}/{name}_{part}')
            manifest['sha256'][f'{name}_{part}'] = manifest['sha256'][f'{other}_{part}']
    for name in list(splits):
        if name not in ('train', 'val', 'test_A1', 'test_B', 'test_A2'):
            del splits[name]
    del manifest['decoder']
    files.write_manifest(folder, manifest)
    return folder


def test_tuning_never_touches_b(experiment):
    # The same number of trials for every method.
    assert len({len(method.rates) for method in methods.METHODS.values() if method.rates}) == 1
    (streamed,) = experiment.tuning
    assert places(streamed) == [('val', 0), ('test_C', 0), ('test_C', 1), ('val', 1)]
    assert not {split for split, _ in places(streamed)} & {split for split, _ in places(experiment.streams[0])}


# ---- phases ----------------------------------------------------------------------------------------------------------

def places(clips):
    """(split, index) of Clips."""
    return [(split.name.split()[1], index) for split, index, _ in clips.places]


class Named:
    """A split of so many clips that is not read."""

    def __init__(self, name, count):
        self.name, self.count = f'split {name} of here', count

    def __len__(self):
        return self.count


@pytest.mark.parametrize('phases, splits, home', [
    (['A', 'B', 'A'], {'test_A': 18, 'test_B': 12, 'val': 2}, 'A'),
    (['A1', 'B', 'A2'], {'test_A1': 12, 'test_B': 12, 'test_A2': 6, 'val': 2}, 'A1'),
    (['A1', 'B', 'A2'], {'test_A1': 11, 'test_B': 12, 'test_A2': 12, 'val': 2}, 'A2'),
    (['val', 'B', 'A2'], {'val': 14, 'test_B': 12, 'test_A2': 6}, 'val'),
    (['val', 'B', 'A2'], {'val': 13, 'test_B': 12, 'test_A2': 12}, 'A2'),
])
def test_no_clip_serves_twice(phases, splits, home):
    """Stream, probes and tuning share splits, and no clips; home probes come from where there are enough."""
    named = {name: Named(name, count) for name, count in {**splits, 'test_C': 2}.items()}
    experiment = build_experiment(FEW_KNOBS, phases, ['C'], named, 'cpu')
    shown = places(experiment.streams[0])
    assert [split for split, _ in shown] == [split_of(phase) for phase in phases for _ in range(6)]
    used = shown + places(experiment.probes['A']) + places(experiment.probes['B']) + places(experiment.tuning[0])
    assert len(set(used)) == len(used) == 18 + 12 + 4
    assert {split for split, _ in places(experiment.probes['A'])} == {split_of(home)}


def test_every_order_has_other_clips_or_the_same_in_another_order():
    """None twice, none of the probes or of tuning, and the first order is what it would be alone."""
    named = {name: Named(name, count) for name, count in {'test_A': 40, 'test_B': 20, 'test_C': 2, 'val': 2}.items()}
    knobs = SimpleNamespace(**{**vars(FEW_KNOBS), 'streams': 4})
    many = build_experiment(knobs, ['A', 'B', 'A'], ['C'], named, 'cpu')
    alone = build_experiment(FEW_KNOBS, ['A', 'B', 'A'], ['C'], named, 'cpu')
    assert places(many.streams[0]) == places(alone.streams[0])
    kept = {place for clips in (*many.probes.values(), *many.tuning) for place in places(clips)}
    for stream in many.streams:
        shown = places(stream)
        assert len(set(shown)) == 18 and not set(shown) & kept
        assert [split for split, _ in shown] == ['test_A'] * 6 + ['test_B'] * 6 + ['test_A'] * 6
    assert len({tuple(places(stream)) for stream in many.streams}) == 4


def test_all_that_is_too_short_is_named_at_once():
    named = {name: Named(name, 5) for name in ('test_A', 'test_B', 'val', 'test_C')}
    with pytest.raises(Refusal) as refusal:
        build_experiment(FEW_KNOBS, ['A', 'B', 'A'], ['C'], named, 'cpu')
    assert 'test_A of here has 5 clips, of which 18 are needed' in str(refusal.value)
    assert 'test_B of here has 5 clips, of which 12 are needed' in str(refusal.value)


def test_phases_follow_the_data():
    assert phases_of('auto', ['train', 'test_A', 'test_A2']) == ['A', 'B', 'A']
    assert phases_of('auto', ['train', 'test_A1', 'val']) == ['A1', 'B', 'A2']
    assert phases_of('auto', ['train', 'val']) == ['val', 'B', 'A2']
    assert phases_of('A, turned, A, turned', ['test_A']) == ['A', 'turned', 'A', 'turned']
    assert [domain_of(phase) for phase in ('val', 'B', 'A2', 'B12', 'turned', '7')] == ['A', 'B', 'A', 'B', 'turned', '7']
    assert labels_of(['A', 'B', 'A', 'B']) == ['A₁', 'B₁', 'A₂', 'B₂'] and labels_of(['A1', 'B', 'A2']) == ['A1', 'B', 'A2']
    assert tuned_on('auto', ['A', 'B', 'A'], ['test_C']) == ['C']
    assert tuned_on('auto', ['A', 'B', 'A'], []) == tuned_on('auto', ['A', 'C', 'A'], ['test_C']) == ['scaled']


def test_scaled_pushes(tiny):
    """Without another shift, rates are tuned on clips that move further than their pushes say."""
    splits = {name: open_split(tiny, name) for name in ('test_A', 'test_B', 'val')}
    tuning = build_experiment(FEW_KNOBS, ['A', 'B', 'A'], ['scaled'], splits, 'cpu').tuning
    for scaled, divisor in zip(tuning, SCALED):
        assert places(scaled) == [('val', i) for i in (0, 2, 3, 1)]
        z, a = scaled[:]
        given_z, given = splits['val'][[0, 2, 3, 1]]
        assert torch.equal(z, given_z) and torch.equal(a[1:3], given[1:3] / divisor)
        assert torch.equal(a[::3], given[::3])


# ---- the table of methods ------------------------------------------------------------------------------------------------

class Half(methods.Method):
    """A method that lacks its rates and its look-back."""


class NoRates(Half):
    def look_back(self, z, a):
        pass


class NoLookBack(Half):
    rates = 1e-3, 1e-2


class Forgetful(methods.Frozen):
    rates = 1e-3, 1e-2


@pytest.mark.parametrize('method, words', [
    (NoRates, 'has no rates'),
    (NoLookBack, 'has no look_back'),
    (Forgetful, 'has no look_back of its own'),
])
def test_a_half_registered_method_is_refused(method, words):
    """Not run as frozen under another name."""
    knobs = SimpleNamespace(methods='', tune_on='', phases='auto', out='out/aba', memory_in='', memory_out='', plan=False)
    adapt.check_settings(knobs, methods.METHODS)
    with pytest.raises(Refusal) as refusal:
        adapt.check_settings(knobs, {**methods.METHODS, 'mine': method})
    assert f"method 'mine': its class {method.__name__} {words}" == str(refusal.value)


def test_a_method_is_one_class_and_one_line(hope, monkeypatch):
    """It is planned where it fits, before the rates that it asks for are tuned."""
    class OutputTTA(methods.TTA):
        """TTA of the last linear layer."""
        rates = 1e-3, 1e-2

        @staticmethod
        def adapts(net):
            return list(net.predictor_proj.parameters())

    monkeypatch.setitem(methods.METHODS, 'output TTA', OutputTTA)
    methods.check_methods(methods.METHODS)
    chosen = ['frozen', 'output TTA']
    tuned = [('frozen', None, ''), ('output TTA', None, 'tuned')]
    assert adapt.rows_of(hope, chosen, {}, tuning=True, other=None) == tuned
    # Nothing says what its rate would be without tuning.
    assert adapt.rows_of(hope, chosen, {}, tuning=False, other=None) == [('frozen', None, '')]


def test_rates_are_given_tuned_or_measured(checkpoints):
    hope, vit = checkpoints
    chosen = ['LN-TTA', 'CMS']
    assert adapt.rows_of(hope, chosen, {'CMS': 7.0}, True, None) == [('LN-TTA', None, 'tuned'), ('CMS', 7.0, 'given')]
    default = [('LN-TTA', 1e-2, 'default'), ('CMS', 10.0, 'default')]
    assert adapt.rows_of(hope, chosen, {'CMS': 0.0}, False, None) == default
    # The plan's own rate has a row of its own, once.
    assert adapt.rows_of(vit, chosen, {}, False, None) == [('LN-TTA', 3e-3, 'default'), ('LN-TTA', 1e-4, 'plan')]
    assert adapt.rows_of(vit, chosen, {'LN-TTA': 1e-4}, True, None) == [('LN-TTA', 1e-4, 'given')]
    for name, method in methods.METHODS.items():
        assert set(method.default) == (set(method.models) if method.rates else set()), name
        assert bool(method.knob) == bool(method.rates), name


def test_a_method_that_lacks_what_it_needs_is_refused_by_its_name(hope):
    knobs = SimpleNamespace(methods='memory, wrong world', ckpt='x.pt', memory_out='')
    plans = [(hope, adapt.rows_of(hope, ['memory', 'wrong world'], {}, tuning=True, other=None))]
    with pytest.raises(Refusal, match='wrong world needs another domain, named by --tune_on'):
        adapt.check_plans(knobs, plans)


def test_all_that_does_not_fit_is_named_at_once():
    """Several pushes are no jump's, and nobody knows the states of a clip to come."""
    split = SimpleNamespace(name='split val', several_pushes=True, actions=torch.zeros(3, 8, 2),
                            manifest={'shape': [8, 4, 24], 'grid': [2, 2]})

    def checkpoint(path, loss='jump', size=24, state_dim=0):
        sizes = SimpleNamespace(action_dim=2, feature_dim=size, grid=(2, 2), state_dim=state_dim)
        return SimpleNamespace(path=path, loss=loss, clip_steps=8, predictor=SimpleNamespace(sizes=sizes))
    check_clips([checkpoint('rollout.pt', 'rollout')], {'val': split}, 'mine')
    with pytest.raises(Refusal) as refusal:
        check_clips([checkpoint('jump.pt'), checkpoint('states.pt', 'rollout', 12, 7)], {'val': split}, 'mine')
    line = str(refusal.value)
    assert 'jump.pt jumps, which takes one push a clip; split val has clips with several' in line
    assert 'states.pt was trained on features of size 12' in line and 'states.pt takes states' in line


def test_finished_rows_are_not_run_again(hope, experiment, tmp_path, monkeypatch):
    """As long as everything that they depend on, the key, is the same."""
    path, plans = tmp_path / 'unfinished.pt', [(hope, [('frozen', None, ''), ('CMS', None, 'tuned')])]
    key = {'settings': {'clips': 6}, 'content': {'code': 'x'}}
    rows = adapt.run_rows(plans, experiment, resume(tmp_path, key, 'cpu'), str(path))
    assert [len(row['loss'][0]) for row in rows] == [18, 18] and rows[1]['rate'] in methods.CMS.rates
    monkeypatch.delattr(adapt, 'run_stream')
    again = adapt.run_rows(plans, experiment, resume(tmp_path, key, 'cpu'), str(path))
    assert [row['loss'] for row in again] == [row['loss'] for row in rows] and again[1]['rate'] == rows[1]['rate']
    before = path.read_bytes()
    for other, words in (({'settings': {'clips': 7}, 'content': {'code': 'x'}}, 'clips = 7 (was 6)'),
                         ({'settings': {'clips': 6}, 'content': {'code': 'y'}}, 'another content of code')):
        with pytest.raises(Refusal) as refusal:
            resume(tmp_path, other, 'cpu')
        assert words in str(refusal.value) and path.read_bytes() == before


# ---- the whole run -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def out(tiny, trained, tmp_path_factory):
    """The folder of a finished comparison of both checkpoints."""
    folder = tmp_path_factory.mktemp('aba')
    run('adapt.py', f'--ckpt={trained["hope"]},{trained["vit"]}', f'--data={tiny}', f'--out={folder}', *FEW, pictures=True)
    return folder


def test_results(out):
    results = json.load(open(os.path.join(out, 'results.json')))
    names = [' '.join(filter(None, (r['model'], r['method']))) for r in results['rows']]
    hope, vit = ('Titan memory', 'CMS', 'memory'), ('LN-TTA', 'action TTA', 'full TTA', 'memory')
    assert names == ['copy', 'blank', *(f'HOPE {m}' for m in ('frozen', 'LN-TTA', *hope)),
                     *(f'ViT-AC {m}' for m in ('frozen', 'LN-TTA', *vit))]
    with open(os.path.join(out, 'results.csv')) as f:
        rows = list(csv.reader(f))
    assert len(rows) == 1 + 18 and [r[2] for r in rows[1:]] == ['A1'] * 6 + ['B'] * 6 + ['A2'] * 6
    for row in results['rows']:
        (loss,) = row['loss']
        column = rows[0].index(title(row))
        assert [float(r[column]) for r in rows[1:]] == pytest.approx(loss, abs=1e-6)
        assert row['figures']['B'] == [pytest.approx(sum(loss[6:12]) / 6, abs=1e-6)]
    for file in ('results.png', 'results.pdf', 'predictions.png', 'switch.gif'):
        assert os.path.getsize(os.path.join(out, file)) > 5000
    table = open(os.path.join(out, 'table.txt')).read()
    assert 'HOPE Titan memory' in table and max(map(len, table.splitlines())) <= 100


def test_another_shift_with_the_controls(tiny, trained, tmp_path):
    """The table names the shift; the controls are run where they are asked for."""
    run('adapt.py', f'--ckpt={trained["hope"]}', f'--data={tiny}', f'--out={tmp_path}', *FEW, '--phases=A,turned,A',
        '--methods=all', '--clips=3', '--probe_clips=3')
    results = json.load(open(tmp_path / 'results.json'))
    controls = {name for name, method in methods.METHODS.items() if method.control}
    assert controls == {'gain writer', 'push known', 'wrong world', 'shuffled', 'no carry'}
    assert controls < {row['method'] for row in results['rows']}
    assert 'turned' in open(tmp_path / 'table.txt').read().splitlines()[0]
    assert ',turned,' in open(tmp_path / 'results.csv').read()


def test_seeds_orders_and_worlds_that_come_back(tiny, trained, tmp_path):
    """Every row has its streams and its probes, one oracle serves all seeds, and finished rows are found again."""
    second = shutil.copy(trained['hope'], tmp_path / 'hope_2.pt')
    args = [f'--ckpt={trained["hope"]},{second},{trained["vit"]}', f'--oracle={trained["vit"]}', f'--data={tiny}', *FEW,
            '--clips=4', '--probe_clips=4', '--phases=A,B,A,B', '--streams=3', '--methods=frozen, LN-TTA, memory',
            f'--out={tmp_path}/aba']
    done = run('adapt.py', *args)
    results = json.load(open(tmp_path / 'aba' / 'results.json'))
    assert results['labels'] == ['A₁', 'B₁', 'A₂', 'B₂'] and results['probe_at'] == [0, 4, 6, 8, 12, 16]
    for row in results['rows']:
        assert len(row['loss']) == 3 and {len(loss) for loss in row['loss']} == {16}
        assert row['model'] == '' or {len(losses) for losses in row['probes']['B']} == {6}
    named = [(row['model'], row['seed']) for row in results['rows'] if row['method'] == 'memory']
    assert named == [('HOPE', 1), ('HOPE', 2), ('ViT-AC', 1)]
    # The same checkpoint under two names.
    first, again = [row['loss'] for row in results['rows'] if (row['model'], row['method']) == ('HOPE', 'memory')]
    assert first == again and first[0] != first[1]
    assert 'HOPE memory, seed 2' in done.stdout and 'nothing to do' in run('adapt.py', *args).stdout
    assert 'is named twice' in refused(run('adapt.py', *args, f'--ckpt={second},{second}', ok=False))
    two = f'{trained["vit"]},{second}'
    line = refused(run('adapt.py', *args, f'--oracle={two}', f'--ckpt={trained["hope"]}', ok=False))
    assert 'one oracle for all seeds, or one for each of the 1 of HOPE' in line


def test_planning_is_printed_and_kept(tiny, trained, tmp_path):
    done = run('adapt.py', f'--ckpt={trained["hope"]}', f'--oracle={trained["vit"]}', f'--data={tiny}', *FEW,
               '--methods=frozen, memory', '--plan=True', '--tune_on=', f'--out={tmp_path}/aba')
    results = json.load(open(tmp_path / 'aba' / 'results.json'))
    for row in results['rows']:
        if row['model']:
            assert [phase['phase'] for phase in row['planning']] == ['A₁', 'B', 'A₂']
            assert all(len(phase['distance']) == 6 and phase['ms'] > 0 for phase in row['planning'])
    assert 'true simulator' in done.stdout


def test_a_rollout_checkpoint_is_scored_by_rollout(tiny, tmp_path):
    run('train.py', *TINY, f'--data={tiny}', '--loss=rollout', '--max_iters=2', f'--out={tmp_path}/x.pt')
    out = run('adapt.py', f'--ckpt={tmp_path}/x.pt', f'--data={tiny}', f'--out={tmp_path}/aba', *FEW, '--tune_on=',
              '--methods=frozen,LN-TTA,CMS,memory', '--clips=1', '--probe_clips=1').stdout
    assert 'rollout L1' in out and 'tuned on' not in out
    assert 'Rate of HOPE CMS: 10, the default, measured on the built-in physics; not tuned.' in out


def test_the_oracle_is_the_bound_that_gaps_are_measured_against(tiny, trained, tmp_path):
    """Its row is run whatever --methods says; the figure itself is in test_compare.py."""
    args = [f'--data={tiny}', *FEW, '--tune_on=']
    run('adapt.py', f'--ckpt={trained["hope"]}', f'--oracle={trained["vit"]}', '--methods=memory', *args,
        f'--out={tmp_path}/aba', f'--memory_out={tmp_path}/memory.pt')
    rows = {f"{r['model']} {r['method']}": r for r in json.load(open(tmp_path / 'aba' / 'results.json'))['rows']}
    assert list(rows) == [' copy', ' blank', 'HOPE memory', 'oracle frozen']
    run('adapt.py', f'--ckpt={trained["hope"]}', '--methods=memory', *args, f'--out={tmp_path}/again',
        f'--memory_in={tmp_path}/memory.pt')
    again = json.load(open(tmp_path / 'again' / 'results.json'))['rows'][-1]
    assert again['loss'][0][0] != rows['HOPE memory']['loss'][0][0]


def test_own_phases_without_another_domain(tiny, trained, tmp_path, own_phases):
    """A set of train, val, A1, B and A2 alone: every method runs, and the phases are called as they are given."""
    checkpoints = f'--ckpt={trained["hope"]},{trained["vit"]}'
    done = run('adapt.py', checkpoints, f'--data={own_phases}', f'--out={tmp_path}/aba', *FEW)
    results = json.load(open(tmp_path / 'aba' / 'results.json'))
    assert results['labels'] == ['A1', 'B', 'A2'] and results['domains'] == ['A', 'B', 'A'] and results['tuned_on'] == ['scaled']
    plain = {name for name, method in methods.METHODS.items() if not method.control}
    assert plain < {row['method'] for row in results['rows']}
    assert 'tuned on clips with scaled pushes among' in done.stdout
    assert 'no predictions.png: ' in done.stdout and 'predictions.png' not in done.stdout.splitlines()[-1]
    phases = [line.split(',')[2] for line in open(tmp_path / 'aba' / 'results.csv')]
    assert phases == ['phase'] + ['A1'] * 6 + ['B'] * 6 + ['A2'] * 6


def test_bfloat16_changes_little(tiny, trained, tmp_path):
    """And what is learned is seen at the next clip, though bfloat16 copies of weights are kept within one."""
    low, = read_checkpoints(trained['vit'], '', 'cpu', 'bfloat16')
    full, = read_checkpoints(trained['vit'], '', 'cpu', 'float32')
    splits = {name: open_split(tiny, name) for name in ('test_A', 'test_B', 'val')}
    clips = build_experiment(FEW_KNOBS, ['A', 'B', 'A'], [], splits, 'cpu').streams
    for method, rate in (('frozen', None), ('full TTA', 1e-2), ('memory', None)):
        exact, rounded = (torch.tensor(adapt.run_stream(methods.METHODS[method](checkpoint, rate), clips)['loss'])
                          for checkpoint in (full, low))
        assert not torch.equal(exact, rounded)
        assert (exact - rounded).abs().mean() < 0.05 * exact.mean()


# ---- what is not written over ----------------------------------------------------------------------------------------

def test_a_finished_run_is_printed_and_another_is_refused(out, tiny, trained):
    """Not one file of a finished run changes."""
    before = {f.name: open(f, 'rb').read() for f in os.scandir(out)}
    args = [f'--ckpt={trained["hope"]},{trained["vit"]}', f'--data={tiny}', f'--out={out}', *FEW]
    done = run('adapt.py', *args)
    assert before['table.txt'].decode() in done.stdout and 'nothing to do' in done.stdout.splitlines()[-1]
    line = refused(run('adapt.py', *args, '--clips=5', ok=False))
    assert 'holds table.txt of another run: clips = 5 (was 6); name another folder' in line
    line = refused(run('adapt.py', *args, f'--ckpt={trained["vit"]}', ok=False))
    assert 'another content of ckpt' in line
    assert before == {f.name: open(f, 'rb').read() for f in os.scandir(out)}


def test_a_memory_replaces_a_memory_of_the_same_run_alone(tiny, trained, tmp_path):
    """Checkpoints, and whatever else is there, stay as they are."""
    hope, memory = tmp_path / 'hope.pt', tmp_path / 'memory.pt'
    hope.write_bytes(open(trained['hope'], 'rb').read())
    (tmp_path / 'link.pt').symlink_to(hope)
    (tmp_path / 'text.txt').write_text('mine')
    args = [f'--ckpt={hope}', f'--data={tiny}', *FEW, '--methods=memory']
    for path, words in ((hope, 'which this run needs'), (tmp_path / 'link.pt', 'which this run needs'),
                        (trained['vit'], 'is no memory'), (tmp_path / 'text.txt', 'is no memory')):
        before = open(path, 'rb').read()
        assert words in refused(run('adapt.py', *args, f'--out={tmp_path}/aba', f'--memory_out={path}', ok=False))
        assert open(path, 'rb').read() == before and not (tmp_path / 'aba').exists()
    for folder in ('first', 'second'):
        run('adapt.py', *args, f'--out={tmp_path}/{folder}', f'--memory_out={memory}')
    assert read_sealed(memory)['memory'] is not None
    line = refused(run('adapt.py', *args, f'--out={tmp_path}/third', f'--memory_out={memory}', '--clips=5', ok=False))
    assert 'holds the memory of another run (clips = 5 (was 6))' in line
