"""The A→B→A protocol: scored before shown, frozen where the rate is 0, and every file that it promises."""
import copy
import csv
import json
import os

import pytest
import torch
from conftest import FEW, TINY, run

import adapt
from configurator import Refusal
from data import DOMAINS, open_split


@pytest.fixture(scope='module')
def checkpoints(trained):
    """HOPE and ViT-AC."""
    return adapt.read_checkpoints(f'{trained["hope"]},{trained["vit"]}', '', 'cpu')


@pytest.fixture(scope='module')
def hope(checkpoints):
    return checkpoints[0]


@pytest.fixture(scope='module')
def experiment(tiny):
    """The experiment that FEW asks for."""
    splits = {name: open_split(tiny, name) for name in ('test_A', 'test_C', 'val')}
    splits['shift'] = open_split(tiny, 'test_B')
    knobs = {'clips': 6, 'probe_clips': 6, 'probe_every': 6, 'tune_clips': 1}
    return adapt.build_experiment(knobs, splits, ['C'], 'cpu')


# Controls that take nothing from the clips of the stream.
BLIND = ['push known', 'wrong world', 'no carry']
# Every other method of the table but frozen, at the first of its rates.
LEARNING = [name for name, method in adapt.METHODS.items() if method is not adapt.Frozen and name not in BLIND]
TTA = [name for name in LEARNING if issubclass(adapt.METHODS[name], adapt.TTA)]
RATES = {name: method.rates[0] if method.rates else None for name, method in adapt.METHODS.items()}


@pytest.fixture
def fitting(checkpoints, method):
    """The first checkpoint that a test's `method` can run on."""
    return next(c for c in checkpoints if adapt.METHODS[method].fits(c.predictor.sizes))


def streamed(checkpoint, method, rate, stream, **more):
    return adapt.run_stream(adapt.METHODS[method](checkpoint, rate), stream, **more)


def losses(checkpoint, method, rate, stream):
    return streamed(checkpoint, method, rate, stream)['loss']


@pytest.mark.parametrize('method', LEARNING)
def test_a_clip_is_scored_before_it_is_shown(fitting, experiment, method):
    """Changing clip t beyond its target steps, or later clips, leaves the losses up to t untouched."""
    (z, a), t = experiment.stream, 5
    before = losses(fitting, method, RATES[method], (z, a))
    z2, a2 = z.clone(), a.clone()
    # Steps 2-5 of clip t are no targets.
    z2[t, 1:5] += torch.randn_like(z2[t, 1:5])
    z2[t + 1:] = z2[t + 1:].flip(0)
    a2[t + 1:] += 1
    after = losses(fitting, method, RATES[method], (z2, a2))
    assert after[:t + 1] == before[:t + 1]
    assert after[t + 1:] != before[t + 1:]


@pytest.mark.parametrize('method', LEARNING)
def test_a_prediction_knows_its_clip_by_the_first_step_alone(fitting, experiment, method):
    """Whatever the later steps of clip t are, what was predicted for them is the same."""
    (z, a), t = experiment.stream, 5
    before = streamed(fitting, method, RATES[method], (z, a), shown=range(t + 1))['shown']
    z2 = z.clone()
    z2[t, 1:] += torch.randn_like(z2[t, 1:])
    after = streamed(fitting, method, RATES[method], (z2, a), shown=range(t + 1))['shown']
    assert all(torch.equal(before[i], after[i]) for i in range(t + 1))


@pytest.mark.parametrize('method', LEARNING)
def test_every_method_learns_from_the_look_back(fitting, experiment, method):
    """The loss of clip t depends on what was shown at t-1."""
    z, a = experiment.stream
    z2 = z.clone()
    z2[3, 1:] = z[4, 1:]
    before, after = (losses(fitting, method, RATES[method], (features, a)) for features in (z, z2))
    assert before[4:] != after[4:]


@pytest.mark.parametrize('method', TTA)
def test_rate_zero_is_frozen_bit_for_bit(fitting, experiment, method):
    assert losses(fitting, method, 0.0, experiment.stream) == losses(fitting, 'frozen', None, experiment.stream)


def test_a_control_that_keeps_nothing_is_frozen(hope, experiment):
    assert losses(hope, 'no carry', None, experiment.stream) == losses(hope, 'frozen', None, experiment.stream)


def test_the_memory_is_what_teacher_forcing_would_write(hope, experiment):
    """The method shows a clip to the action memory alone; through the interface the same state comes out."""
    z, a = experiment.stream
    method = adapt.Memory(hope)
    memory = None
    for i in range(3):
        method.look_back(z[i:i + 1], a[i:i + 1])
        _, new = hope.predictor(z[i:i + 1, :-1], a[i:i + 1, :-1], memory=memory)
        memory = new[:1]
        assert torch.equal(method.memory[0], new[0])


def test_the_shuffled_control_is_shown_the_push_of_the_clip_before(hope, experiment):
    z, a = experiment.stream
    shuffled, memory = adapt.Shuffled(hope), adapt.Memory(hope)
    for i in range(2):
        shuffled.look_back(z[i:i + 1], a[i:i + 1])
    memory.look_back(z[:1], a[:1])
    memory.look_back(z[1:2], a[:1])
    assert torch.equal(shuffled.memory[0], memory.memory[0])


def test_the_wrong_world_is_written_before_the_stream_and_kept(hope, experiment):
    z, a = experiment.stream
    wrong, memory = adapt.WrongWorld(hope, experiment=experiment), adapt.Memory(hope)
    for i in range(len(experiment.other[0])):
        memory.look_back(experiment.other[0][i:i + 1], experiment.other[1][i:i + 1])
    wrong.look_back(z[:1], a[:1])
    assert torch.equal(wrong.memory[0], memory.memory[0])


def test_the_known_push_is_used_in_the_middle_phase_alone(hope, experiment):
    """What it knows loses no more on the clips that it was fitted to than the push as it is given."""
    stream = experiment.stream
    known = adapt.run_stream(adapt.PushKnown(hope, experiment=experiment), stream)['loss']
    frozen = losses(hope, 'frozen', None, stream)
    assert known[:6] == frozen[:6] and known[12:] == frozen[12:] and known[6:12] != frozen[6:12]
    z, a = experiment.probes['B']
    best = adapt.best_map(hope, z, a)
    fitted, given = (adapt.feature_loss(adapt.predict_targets(hope.predictor, 'jump', hope.targets, z, a, memory),
                                        z[:, hope.targets]).mean() for memory in ([best], None))
    assert fitted < given


def test_the_gain_writer_follows_the_gradient(hope, experiment):
    """One step of its rule, the gradient by finite differences."""
    z, a = (x[:1] for x in experiment.stream)
    method = adapt.GainWriter(hope, 10.0)
    method.predict(z, a)
    method.look_back(z, a)

    def half_square(gain):
        z_hat = adapt.predict_targets(hope.predictor, 'jump', hope.targets, z, a * (1 + gain))
        return adapt.feature_loss(z_hat.double(), z[:, hope.targets].double()).square().item() / 2
    slope = (half_square(0.01) - half_square(-0.01)) / 0.02
    assert method.change.item() == pytest.approx(-10 * slope, rel=0.05)


@pytest.mark.parametrize('method, without', [('CMS', 'frozen'), ('Titan memory', 'frozen')])
def test_rate_zero_writes_nothing(hope, experiment, method, without):
    """A fresh action memory multiplies by the identity, which may move the last bit."""
    expected = losses(hope, without, None, experiment.stream)
    assert losses(hope, method, 0.0, experiment.stream) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('method, rate', [('memory', None), ('CMS', 1.0), ('Titan memory', 0.5)])
def test_a_kept_memory_goes_on_where_it_stopped(hope, experiment, method, rate):
    """A stream cut in two, with the state handed in, is the uncut stream; without it the second half differs."""
    z, a = experiment.stream
    whole = losses(hope, method, rate, (z, a))
    first = streamed(hope, method, rate, (z[:7], a[:7]))
    going_on = adapt.METHODS[method](hope, rate, first['state'])
    assert first['loss'] + adapt.run_stream(going_on, (z[7:], a[7:]))['loss'] == whole
    assert losses(hope, method, rate, (z[7:], a[7:])) != whole[7:]


def test_diagnostics(hope, experiment):
    """Every block's memory and every CMS level report along the stream; what is not asked for is not computed."""
    row = streamed(hope, 'memory', None, experiment.stream)
    last = dict(row['diagnostics'][-1])
    assert 0 < last['retention, action memory'] < 1 and last['surprise, action memory'] > 0
    assert 0 < last['gain, action memory'] < 3 and -180 <= last['angle, action memory'] <= 180
    titan = streamed(hope, 'Titan memory', 0.5, experiment.stream)['diagnostics'][-1]
    for b in (1, 2):
        last.update({key: value for key, value in titan.items() if 'block' in key})
        assert 0 < last[f'surprise, block {b}'] < 2 and 0 < last[f'write strength, block {b}'] < 1
        assert 0 < last[f'gate, block {b}'] < 1 and 0 < last[f'retention, block {b}'] < 1
        assert last[f'drift, block {b}'] > 0 and last[f'write norm, block {b}'] > 0
    last.update(streamed(hope, 'CMS', 1.0, experiment.stream)['diagnostics'][-1])
    assert [last[f'writes, CMS every {period}'] for period in (1, 4, 16)] == [18, 4, 1]
    z = experiment.stream[0][-1]
    copied = (z[hope.targets] - z[0]).abs().mean().item()
    assert row['diagnostics'][-1]['surprise'] == pytest.approx(row['loss'][-1] / copied)
    assert last['drift, CMS every 1'] > 0
    assert 'drift, block 1' not in streamed(hope, 'CMS', 1.0, experiment.stream)['diagnostics'][-1]


def test_probes_and_predictions_are_noted_when_they_are_asked_for(hope, experiment):
    """Probes before the stream and after every sixth clip; probing changes nothing in the stream."""
    row = streamed(hope, 'full TTA', 1e-2, experiment.stream, probes=experiment.probes, probe_at=experiment.probe_at,
                   shown=experiment.shown)
    assert [seen for seen, loss in row['probes']['A']] == [0, 6, 12, 18]
    assert list(row['shown']) == [7, 8, 9, 10, 11]
    assert row['loss'] == losses(hope, 'full TTA', 1e-2, experiment.stream)


@pytest.mark.parametrize('method', LEARNING)
def test_a_run_leaves_the_checkpoint_untouched(fitting, experiment, method):
    before = copy.deepcopy(fitting.predictor.state_dict())
    losses(fitting, method, RATES[method], experiment.stream)
    after = fitting.predictor.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad for p in fitting.predictor.parameters())


@pytest.mark.parametrize('method, part', [
    ('LN-TTA', 'norm'),
    ('action TTA', 'action_encoder'),
    ('full TTA', ''),
    ('CMS', 'levels'),
])
def test_a_method_adapts_what_it_says(hope, method, part):
    adapted = {id(p) for p in adapt.METHODS[method].adapts(hope.predictor)}
    names = {name for name, p in hope.predictor.named_parameters() if id(p) in adapted}
    assert names == {name for name, p in hope.predictor.named_parameters() if part in name}


def test_one_clip_or_many_score_the_same(hope, experiment):
    """A probe set is scored in one batch, the stream clip by clip: the same predictions."""
    z, a = experiment.stream
    method = adapt.Memory(hope)
    method.predict(z[:1], a[:1])
    method.look_back(z[:1], a[:1])
    method.diagnostics()
    with torch.no_grad():
        many = method.predict(z[:4], a[:4])
        each = [method.predict(z[i:i + 1], a[i:i + 1]) for i in range(4)]
    torch.testing.assert_close(many, torch.cat(each))


def test_tuning_never_touches_b(tiny):
    assert adapt.tune_on not in ('A', adapt.shift) and adapt.tune_on in DOMAINS
    # The same number of trials for every method.
    assert len({len(method.rates) for method in adapt.METHODS.values() if method.rates}) == 1
    splits = {name: open_split(tiny, name) for name in ('val', 'test_C')}
    # No other split is needed, and so none is used.
    z, _ = adapt.tuning_stream(splits['val'], splits['test_C'], 2, 'cpu')
    assert torch.equal(z, torch.cat([splits['val'][:2][0], splits['test_C'][:4][0], splits['val'][2:4][0]]))


# ---- the table of methods ------------------------------------------------------------------------------------------------

class Half(adapt.Method):
    """A method that lacks its rates and its look-back."""


class NoRates(Half):
    def look_back(self, z, a):
        pass


class NoLookBack(Half):
    rates = 1e-3, 1e-2


class Forgetful(adapt.Frozen):
    rates = 1e-3, 1e-2


@pytest.mark.parametrize('method, words', [
    (NoRates, 'has no rates'),
    (NoLookBack, 'has no look_back'),
    (Forgetful, 'has no look_back of its own'),
])
def test_a_half_registered_method_is_refused(method, words):
    """Not run as frozen under another name."""
    knobs = {'methods': '', 'tune_on': '', 'shift': 'B', 'out': 'out/aba', 'memory_in': '', 'memory_out': ''}
    adapt.check_settings(knobs, adapt.METHODS)
    with pytest.raises(Refusal) as refusal:
        adapt.check_settings(knobs, {**adapt.METHODS, 'mine': method})
    assert f"method 'mine': its class {method.__name__} {words}" == str(refusal.value)


def test_a_method_is_one_class_and_one_line(hope, monkeypatch):
    """It is planned where it fits, before the rates that it asks for are tuned."""
    class OutputTTA(adapt.TTA):
        """TTA of the last linear layer."""
        rates = 1e-3, 1e-2

        @staticmethod
        def adapts(net):
            return list(net.predictor_proj.parameters())

    monkeypatch.setitem(adapt.METHODS, 'output TTA', OutputTTA)
    adapt.check_methods(adapt.METHODS)
    assert adapt.plan(hope, ['frozen', 'output TTA'], 1e-4, tuning=True) == [('frozen', None), ('output TTA', 'tuned')]
    assert adapt.plan(hope, ['frozen', 'output TTA'], 1e-4, tuning=False) == [('frozen', None)]


def test_finished_rows_are_not_run_again(hope, experiment, tmp_path, monkeypatch):
    """As long as everything that they depend on, the key, is the same."""
    path, planned = tmp_path / 'unfinished.pt', [('frozen', None), ('CMS', 'tuned')]
    kept = adapt.resume(path, 'key', 'cpu')
    rows = adapt.run_checkpoint(hope, planned, experiment, kept, str(path))
    assert [len(row['loss']) for row in rows] == [18, 18] and rows[1]['rate'] in adapt.CMS.rates
    monkeypatch.delattr(adapt, 'run_stream')
    again = adapt.run_checkpoint(hope, planned, experiment, adapt.resume(path, 'key', 'cpu'), str(path))
    assert [row['loss'] for row in again] == [row['loss'] for row in rows] and again[1]['rate'] == rows[1]['rate']
    assert adapt.resume(path, 'another key', 'cpu')['finished'] == {}


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
    assert len(rows) == 1 + 18 and [r[1] for r in rows[1:]] == ['A1'] * 6 + ['B'] * 6 + ['A2'] * 6
    for column, row in enumerate(results['rows'], 3):
        assert len(row['loss']) == 18
        assert [float(r[column]) for r in rows[1:]] == pytest.approx(row['loss'], abs=1e-6)
        assert row['figures']['B'] == pytest.approx(sum(row['loss'][6:12]) / 6)
    for file in ('results.png', 'predictions.png'):
        assert os.path.getsize(os.path.join(out, file)) > 5000
    table = open(os.path.join(out, 'table.txt')).read()
    assert 'HOPE Titan memory' in table and max(map(len, table.splitlines())) <= 100


def test_another_shift_with_the_controls(tiny, trained, tmp_path):
    """The table names the shift; the controls are run where they are asked for."""
    run('adapt.py', f'--ckpt={trained["hope"]}', f'--data={tiny}', f'--out={tmp_path}', *FEW, '--shift=turned',
        '--methods=all')
    results = json.load(open(tmp_path / 'results.json'))
    controls = {name for name, method in adapt.METHODS.items() if method.control}
    assert controls == {'gain writer', 'push known', 'wrong world', 'shuffled', 'no carry'}
    assert controls < {row['method'] for row in results['rows']}
    assert 'turned' in open(tmp_path / 'table.txt').read().splitlines()[0]
    assert ',turned,' in open(tmp_path / 'results.csv').read()


def test_a_rollout_checkpoint_is_scored_by_rollout(tiny, tmp_path):
    run('train.py', *TINY, f'--data={tiny}', '--loss=rollout', '--max_iters=2', f'--out={tmp_path}/x.pt')
    out = run('adapt.py', f'--ckpt={tmp_path}/x.pt', f'--data={tiny}', f'--out={tmp_path}/aba', *FEW, '--tune_on=').stdout
    assert 'rollout L1' in out and 'tuned' not in out


def test_the_oracle_is_the_bound_that_gaps_are_measured_against(tiny, trained, tmp_path):
    args = [f'--data={tiny}', *FEW, '--tune_on=', f'--out={tmp_path}/aba']
    run('adapt.py', f'--ckpt={trained["hope"]}', f'--oracle={trained["vit"]}', '--methods=frozen,memory', *args,
        f'--memory_out={tmp_path}/memory.pt')
    rows = {f"{r['model']} {r['method']}": r for r in json.load(open(tmp_path / 'aba' / 'results.json'))['rows']}
    assert list(rows) == [' copy', ' blank', 'HOPE frozen', 'HOPE memory', 'oracle frozen']
    b = slice(6, 12)
    frozen, memory, bound = (sum(rows[name]['loss'][b]) for name in ('HOPE frozen', 'HOPE memory', 'oracle frozen'))
    assert rows['HOPE memory']['figures']['gap_closed'] == pytest.approx((frozen - memory) / (frozen - bound))
    run('adapt.py', f'--ckpt={trained["hope"]}', '--methods=memory', *args, f'--memory_in={tmp_path}/memory.pt')
    again = json.load(open(tmp_path / 'aba' / 'results.json'))['rows'][-1]
    assert again['loss'][0] != rows['HOPE memory']['loss'][0]
