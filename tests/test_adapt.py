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
    splits = {name: open_split(tiny, name) for name in ('test_A', 'test_B', 'test_C', 'val')}
    knobs = {'clips': 6, 'probe_clips': 6, 'probe_every': 6, 'tune_clips': 1}
    return adapt.build_experiment(knobs, splits, ['C'], 'cpu')


# Every method of the table but frozen, at the first of its rates.
LEARNING = [name for name, method in adapt.METHODS.items() if method is not adapt.Frozen]
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


def test_cms_at_rate_zero_is_without_cms(hope, experiment):
    """Written weights run through batched products, so the last bit may differ."""
    for method, without in (('memory + CMS', 'memory'), ('CMS', 'frozen')):
        expected = losses(hope, without, None, experiment.stream)
        assert losses(hope, method, 0.0, experiment.stream) == pytest.approx(expected, rel=1e-5)


def test_a_kept_memory_goes_on_where_it_stopped(hope, experiment):
    """A stream cut in two, with the state handed in, is the uncut stream; without it the second half differs."""
    z, a = experiment.stream
    whole = losses(hope, 'memory + CMS', 1.0, (z, a))
    first = streamed(hope, 'memory + CMS', 1.0, (z[:7], a[:7]))
    # Else the state would hold a graph that grows with the stream.
    assert not any(change.requires_grad for change in first['state']['cms']['changes'].values())
    going_on = adapt.MemoryAndCMS(hope, 1.0, first['state'])
    assert first['loss'] + adapt.run_stream(going_on, (z[7:], a[7:]))['loss'] == whole
    assert losses(hope, 'memory + CMS', 1.0, (z[7:], a[7:])) != whole[7:]


def test_diagnostics(hope, experiment):
    """Every block's memory and every CMS level report along the stream; what is not asked for is not computed."""
    row = streamed(hope, 'memory + CMS', 1.0, experiment.stream)
    last = row['diagnostics'][-1]
    for b in (1, 2):
        assert 0 < last[f'surprise, block {b}'] < 2 and 0 < last[f'write strength, block {b}'] < 1
        assert 0 < last[f'gate, block {b}'] < 1 and 0 < last[f'retention, block {b}'] < 1
        assert last[f'drift, block {b}'] > 0 and last[f'write norm, block {b}'] > 0
    assert [last[f'writes, CMS every {period}'] for period in (1, 4, 16)] == [18, 4, 1]
    z = experiment.stream[0][-1]
    copied = (z[hope.targets] - z[0]).abs().mean().item()
    assert last['surprise'] == pytest.approx(row['loss'][-1] / copied)
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
    assert adapt.tune_on not in ('A', 'B') and adapt.tune_on in DOMAINS
    # The same number of trials for every method.
    assert len({len(method.rates) for method in adapt.METHODS.values() if method.rates}) == 1
    splits = {name: open_split(tiny, name) for name in ('val', 'test_C')}
    # No other split is needed, and so none is used.
    z, _ = adapt.tuning_stream(splits['val'], splits['test_C'], 2, 'cpu')
    assert torch.equal(z, torch.cat([splits['val'][:2][0], splits['test_C'][:4][0], splits['val'][2:4][0]]))


# ---- the table of methods ------------------------------------------------------------------------------------------------

class Half(adapt.Method):
    """A method that lacks its rates and its look-back."""

    @staticmethod
    def adapts(net):
        return []


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
    knobs = {'methods': '', 'tune_on': '', 'out': 'out/aba', 'memory_in': '', 'memory_out': ''}
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
    hope, vit = ('memory', 'CMS', 'memory + CMS'), ('LN-TTA', 'action TTA', 'full TTA')
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
    assert 'HOPE memory + CMS' in table and max(map(len, table.splitlines())) <= 100


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
