"""The methods of adaptation: scored before shown, frozen where the rate is 0, and no stream sees another."""
import copy
import dataclasses

import pytest
import torch
from torch.utils.data import TensorDataset

import adapt
import methods
from methods import METHODS


# Controls that take nothing from the clips of the stream.
BLIND = ['push known', 'wrong world', 'no carry']
# Every other method of the table but frozen, at the first of its rates.
LEARNING = [name for name, method in METHODS.items() if method is not methods.Frozen and name not in BLIND]
TTA = [name for name in LEARNING if issubclass(METHODS[name], methods.TTA)]
RATES = {name: method.rates[0] if method.rates else None for name, method in METHODS.items()}


@pytest.fixture
def fitting(checkpoints, method):
    """The first checkpoint that a test's `method` can run on."""
    return next(c for c in checkpoints if METHODS[method].fits(c.predictor.sizes))


@pytest.fixture
def eight(experiment):
    """Of the first stream, what gives (z, a) of its first 8 clips, of A and of B."""
    return experiment.streams[0][:8]


def streamed(checkpoint, method, rate, stream, **more):
    """stream: Clips, or (z, a)."""
    if isinstance(stream, tuple):
        stream = TensorDataset(*stream)
    return adapt.run_stream(METHODS[method](checkpoint, rate), [stream], **more)


def losses(checkpoint, method, rate, stream):
    return streamed(checkpoint, method, rate, stream)['loss'][0]


@pytest.mark.parametrize('method', LEARNING)
def test_a_clip_is_scored_before_it_is_shown(fitting, eight, method):
    """Changing clip t beyond its target steps, or later clips, leaves the losses up to t untouched."""
    (z, a), t = eight, 5
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
def test_a_prediction_knows_its_clip_by_the_first_step_alone(fitting, eight, method):
    """Whatever the later steps of clip t are, what was predicted for them is the same."""
    (z, a), t = eight, 5
    before = streamed(fitting, method, RATES[method], (z, a), shown=range(t + 1))['shown']
    z2 = z.clone()
    z2[t, 1:] += torch.randn_like(z2[t, 1:])
    after = streamed(fitting, method, RATES[method], (z2, a), shown=range(t + 1))['shown']
    assert all(torch.equal(before[i], after[i]) for i in range(t + 1))


@pytest.mark.parametrize('method', LEARNING)
def test_every_method_learns_from_the_look_back(fitting, eight, method):
    """The loss of clip t depends on what was shown at t-1."""
    z, a = eight
    z2 = z.clone()
    z2[3, 1:] = z[4, 1:]
    before, after = (losses(fitting, method, RATES[method], (features, a)) for features in (z, z2))
    assert before[4:] != after[4:]


@pytest.mark.parametrize('method', TTA)
def test_rate_zero_is_frozen_bit_for_bit(fitting, eight, method):
    assert losses(fitting, method, 0.0, eight) == losses(fitting, 'frozen', None, eight)


def test_a_control_that_keeps_nothing_is_frozen(hope, eight):
    assert losses(hope, 'no carry', None, eight) == losses(hope, 'frozen', None, eight)


def test_the_memory_is_what_teacher_forcing_would_write(hope, experiment):
    """The method shows a clip to the action memory alone; through the interface the same state comes out."""
    z, a = experiment.streams[0][:]
    method = methods.Memory(hope)
    memory = None
    for i in range(3):
        method.look_back(z[i:i + 1], a[i:i + 1])
        _, new = hope.predictor(z[i:i + 1, :-1], a[i:i + 1, :-1], memory=memory)
        memory = new[:1]
        assert torch.equal(method.memory[0], new[0])


def test_the_shuffled_control_is_shown_the_push_of_the_clip_before(hope, experiment):
    z, a = experiment.streams[0][:]
    shuffled, memory = methods.Shuffled(hope), methods.Memory(hope)
    for i in range(2):
        shuffled.look_back(z[i:i + 1], a[i:i + 1])
    memory.look_back(z[:1], a[:1])
    memory.look_back(z[1:2], a[:1])
    assert torch.equal(shuffled.memory[0], memory.memory[0])


def test_the_wrong_world_is_written_before_the_stream_and_kept(hope, experiment):
    z, a = experiment.streams[0][:]
    wrong, memory = methods.WrongWorld(hope, experiment=experiment), methods.Memory(hope)
    for i in range(len(experiment.other)):
        memory.look_back(*experiment.other[i:i + 1])
    wrong.look_back(z[:1], a[:1])
    assert torch.equal(wrong.memory[0], memory.memory[0])


def test_the_known_push_is_used_in_the_middle_phase_alone(hope, experiment):
    """What it knows loses no more on the clips that it was fitted to than the push as it is given."""
    known = adapt.run_stream(methods.PushKnown(hope, experiment=experiment), experiment.streams[:1])['loss'][0]
    frozen = losses(hope, 'frozen', None, experiment.streams[0])
    assert known[:6] == frozen[:6] and known[12:] == frozen[12:] and known[6:12] != frozen[6:12]
    z, a = experiment.probes['B'][:]
    best = methods.best_map(hope, experiment.probes['B']).expand(len(z), -1, -1)
    fitted, given = (methods.feature_loss(methods.predict_targets(hope.predictor, 'jump', hope.targets, z, a, memory),
                                          z[:, hope.targets]).mean() for memory in ([best], None))
    assert fitted < given


def test_the_gain_writer_follows_the_gradient(hope, experiment):
    """One step of its rule, the gradient by finite differences."""
    z, a = experiment.streams[0][:1]
    method = methods.GainWriter(hope, 10.0)
    method.predict(z[:, None], a[:, None])
    method.look_back(z, a)

    def half_square(gain):
        z_hat = methods.predict_targets(hope.predictor, 'jump', hope.targets, z, a * (1 + gain))
        return methods.feature_loss(z_hat.double(), z[:, hope.targets].double()).square().item() / 2
    slope = (half_square(0.01) - half_square(-0.01)) / 0.02
    assert method.change.item() == pytest.approx(-10 * slope, rel=0.05)


@pytest.mark.parametrize('method, without', [('CMS', 'frozen'), ('Titan memory', 'frozen')])
def test_rate_zero_writes_nothing(hope, eight, method, without):
    """A fresh action memory multiplies by the identity, which may move the last bit."""
    expected = losses(hope, without, None, eight)
    assert losses(hope, method, 0.0, eight) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('method, rate', [('memory', None), ('CMS', 1.0), ('Titan memory', 0.5)])
def test_a_kept_memory_goes_on_where_it_stopped(hope, experiment, method, rate):
    """A stream cut in two, with the state handed in, is the uncut stream; without it the second half differs."""
    z, a = experiment.streams[0][:]
    whole = losses(hope, method, rate, (z, a))
    first = streamed(hope, method, rate, (z[:7], a[:7]))
    going_on = METHODS[method](hope, rate, first['state'])
    assert first['loss'][0] + adapt.run_stream(going_on, [TensorDataset(z[7:], a[7:])])['loss'][0] == whole
    assert losses(hope, method, rate, (z[7:], a[7:])) != whole[7:]


def test_diagnostics(hope, experiment):
    """Every block's memory and every CMS level report along the stream; what is not asked for is not computed."""
    row = streamed(hope, 'memory', None, experiment.streams[0])
    last = dict(row['diagnostics'][-1])
    assert 0 < last['retention, action memory'] < 1 and last['surprise, action memory'] > 0
    assert 0 < last['gain, action memory'] < 3 and -180 <= last['angle, action memory'] <= 180
    titan = streamed(hope, 'Titan memory', 0.5, experiment.streams[0])['diagnostics'][-1]
    for b in (1, 2):
        last.update({key: value for key, value in titan.items() if 'block' in key})
        assert 0 < last[f'surprise, block {b}'] < 2 and 0 < last[f'write strength, block {b}'] < 1
        assert 0 < last[f'gate, block {b}'] < 1 and 0 < last[f'retention, block {b}'] < 1
        assert last[f'drift, block {b}'] > 0 and last[f'write norm, block {b}'] > 0
    last.update(streamed(hope, 'CMS', 1.0, experiment.streams[0])['diagnostics'][-1])
    assert [last[f'writes, CMS every {period}'] for period in (1, 4, 16)] == [18, 4, 1]
    z = experiment.streams[0][17:][0][0]
    copied = (z[hope.targets] - z[0]).abs().mean().item()
    assert row['diagnostics'][-1]['surprise'] == pytest.approx(row['loss'][0][-1] / copied)
    assert last['drift, CMS every 1'] > 0
    assert 'drift, block 1' not in streamed(hope, 'CMS', 1.0, experiment.streams[0])['diagnostics'][-1]


def test_probes_and_predictions_are_noted_when_they_are_asked_for(hope, experiment):
    """Probes before the stream and after every sixth clip; probing changes nothing in the stream."""
    row = streamed(hope, 'full TTA', 1e-2, experiment.streams[0], probes=experiment.probes, probe_at=experiment.probe_at,
                   shown=experiment.shown)
    assert len(row['probes']['A'][0]) == len(experiment.probe_at) == 4
    assert list(row['shown']) == [4, 5, 6, 7, 8, 9, 10, 11]
    assert row['loss'][0] == losses(hope, 'full TTA', 1e-2, experiment.streams[0])


@pytest.mark.parametrize('method', LEARNING)
def test_a_run_leaves_the_checkpoint_untouched(fitting, experiment, method):
    before = copy.deepcopy(fitting.predictor.state_dict())
    losses(fitting, method, RATES[method], experiment.streams[0])
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
    adapted = {id(p) for p in METHODS[method].adapts(hope.predictor)}
    names = {name for name, p in hope.predictor.named_parameters() if id(p) in adapted}
    assert names == {name for name, p in hope.predictor.named_parameters() if part in name}


def test_one_clip_or_many_score_the_same(hope, experiment):
    """A probe set is scored in one batch, the stream clip by clip: the same predictions."""
    z, a = experiment.streams[0][:]
    method = methods.Memory(hope)
    method.predict(z[None, :1], a[None, :1])
    method.look_back(z[:1], a[:1])
    method.diagnostics()
    with torch.no_grad():
        many = method.predict(z[None, :4], a[None, :4])
        each = [method.predict(z[None, i:i + 1], a[None, i:i + 1]) for i in range(4)]
    torch.testing.assert_close(many, torch.cat(each, 1))


# ---- several streams at once -------------------------------------------------------------------------------------------

def in_float64(checkpoint, *clips):
    """The checkpoint, and Clips as what gives (z, a) of 8 of them. In float32, Adam and the memories magnify rounding."""
    exact = dataclasses.replace(checkpoint, predictor=copy.deepcopy(checkpoint.predictor).double())
    return exact, *[TensorDataset(*[x.double() for x in some[:8]]) for some in clips]


@pytest.mark.parametrize('method', METHODS)
def test_streams_never_see_each_other(fitting, experiment, method, monkeypatch):
    """Streams that run together lose what each loses alone, on its clips and on the probes."""
    # Which map is best is not the question here, and finding it takes long.
    monkeypatch.setattr(methods, 'best_map', lambda checkpoint, clips: checkpoint.predictor.action_memory.state_of(
        1.5 * torch.eye(2, 4, dtype=torch.float64)))
    exact, probe, shift, other, *streams = in_float64(fitting, experiment.probes['A'], experiment.probes['B'],
                                                      experiment.other, *experiment.streams)
    known = dataclasses.replace(experiment, clips=4, other=other, probes={'B': shift})
    many = adapt.run_stream(METHODS[method](exact, RATES[method], experiment=known, streams=3), streams, {'A': probe}, [8])
    for s, stream in enumerate(streams):
        alone = adapt.run_stream(METHODS[method](exact, RATES[method], experiment=known), [stream], {'A': probe}, [8])
        assert many['loss'][s] == pytest.approx(alone['loss'][0], rel=1e-5)
        assert many['probes']['A'][s] == pytest.approx(alone['probes']['A'][0], rel=1e-5)


@pytest.mark.parametrize('method', [name for name in METHODS if RATES[name]])
def test_each_stream_may_have_a_rate_of_its_own(fitting, experiment, method):
    """As in tuning, where all rates run at once."""
    exact, stream = in_float64(fitting, experiment.streams[0])
    rates = torch.tensor(METHODS[method].rates[:2], dtype=torch.float64)
    both = adapt.run_stream(METHODS[method](exact, rates, streams=2), [stream, stream])['loss']
    for rate, loss in zip(rates.tolist(), both):
        alone = adapt.run_stream(METHODS[method](exact, rate), [stream])['loss'][0]
        assert loss == pytest.approx(alone, rel=1e-5)
    assert both[0] != both[1]
