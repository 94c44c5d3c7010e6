"""The methods: scored before shown, frozen where the rate is 0, and controls that do what they say."""
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import adapt
import methods
from methods import METHODS

# Those that learn from the clips of the stream.
LEARNING = [name for name in METHODS
            if name not in ('copy', 'blank', 'frozen', 'wrong world', 'no carry')]
TTA = [name for name in LEARNING if issubclass(METHODS[name], methods.TTA)]
# What adapt.py gets from its command line for a short stream.
CONFIG = {'oracle': '', 'phases': 'auto', 'clips': 6, 'tune_clips': 1, 'probe_clips': 6, 'probe_every': 6,
          'streams': 1, 'plan': False, 'methods': '', 'rates': '', 'tune_on': 'C', 'device': 'cpu', 'dtype': 'float32'}


@pytest.fixture(scope='module')
def hope(trained, tiny):
    return adapt.read_checkpoints({**CONFIG, 'data': tiny, 'ckpt': trained['hope']})[0]


@pytest.fixture
def fitting(hope, trained, tiny, method):
    """A checkpoint that a test's `method` can run on."""
    if METHODS[method].fits(hope.predictor.sizes):
        return hope
    return adapt.read_checkpoints({**CONFIG, 'data': tiny, 'ckpt': trained['vit']})[0]


@pytest.fixture(scope='module')
def experiment(tiny):
    return adapt.Experiment(adapt.resolved({**CONFIG, 'data': tiny, 'streams': 3}))


@pytest.fixture(scope='module')
def eight(experiment):
    """The first 8 clips of the first stream, of A and of B: z, a."""
    return tuple(map(torch.cat, zip(*[experiment.read(split, [i]) for split, i in experiment.streams[0][:8]])))


def streamed(checkpoint, name, rate, clips):
    """Run a method, with the first of its rates if rate is '', along clips z (n,T,N,D), a (n,T,A)."""
    keep = SimpleNamespace(probes={}, probe_at=(), goals=(), readout=None, shown=range(len(clips[0])),
                           read=lambda _, numbers: tuple(x[numbers] for x in clips))
    rate = METHODS[name].rates[0] if rate == '' and METHODS[name].rates else rate
    return adapt.run_stream(METHODS[name](checkpoint, rate, keep), [[('', i) for i in range(len(clips[0]))]])


def losses(*args):
    return [loss for loss, in streamed(*args)['loss']]


@pytest.mark.parametrize('method', LEARNING)
def test_a_clip_is_predicted_and_scored_before_it_is_shown(fitting, eight, method):
    """A change of clip t after its first step changes no earlier loss and no prediction of t, but what follows."""
    (z, a), t = eight, 5
    z2 = z.clone()
    z2[t, 1:] += torch.randn_like(z2[t, 1:])
    before, after = streamed(fitting, method, '', (z, a)), streamed(fitting, method, '', (z2, a))
    assert np.array_equal(before['predicted'][:t + 1], after['predicted'][:t + 1])
    assert before['loss'][:t] == after['loss'][:t]
    assert before['loss'][t + 1:] != after['loss'][t + 1:]


@pytest.mark.parametrize('method', [*TTA, 'no carry'])
def test_rate_zero_or_no_carry_is_frozen_bit_for_bit(fitting, eight, method):
    assert losses(fitting, method, 0.0, eight) == losses(fitting, 'frozen', None, eight)


@pytest.mark.parametrize('method', ['CMS', 'Titan memory'])
def test_rate_zero_writes_nothing(hope, eight, method):
    assert losses(hope, method, 0.0, eight) == pytest.approx(losses(hope, 'frozen', None, eight), rel=1e-5)


@pytest.mark.parametrize('method', LEARNING)
def test_a_run_leaves_the_checkpoint_untouched(fitting, eight, method):
    before = copy.deepcopy(fitting.predictor.state_dict())
    losses(fitting, method, '', eight)
    after = fitting.predictor.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad and p.grad is None for p in fitting.predictor.parameters())


@pytest.mark.parametrize('method, part', [('LN-TTA', 'norm'), ('full TTA', '')])
def test_tta_adapts_what_it_says(hope, method, part):
    adapted = METHODS[method](hope, 1e-3).predictor.named_parameters()
    named = [name for name, _ in hope.predictor.named_parameters() if part in name]
    assert [name for name, p in adapted if p.requires_grad] == named


@pytest.mark.parametrize('method', ['frozen', 'memory', 'Titan memory', 'shuffled'])
def test_streams_as_a_batch_are_streams_one_by_one(hope, experiment, method):
    """On their own clips and on the probes."""
    method = METHODS[method]
    together = adapt.run_stream(method(hope, 0.05, experiment, 3), experiment.streams)
    for s, stream in enumerate(experiment.streams):
        alone = adapt.run_stream(method(hope, 0.05, experiment), [stream])
        for many, one in ((together['loss'], alone['loss']), (together['probes']['A'], alone['probes']['A'])):
            assert [values[s] for values in many] == pytest.approx([value for value, in one], rel=1e-3)


def test_the_memory_is_what_teacher_forcing_would_write(hope, eight):
    """The method shows a clip to the action memory alone; through the interface the same state comes out."""
    method, memory = methods.Memory(hope), None
    for z, a in zip(eight[0].split(1), eight[1].split(1)):
        method.look_back(z, a)
        _, new = hope.predictor(z[:, :-1], a[:, :-1], memory=memory)
        memory = {'action': new['action']}
        assert torch.equal(method.memory['action'], new['action'])


def test_the_shuffled_control_is_shown_the_push_of_the_clip_before(hope, eight):
    shuffled, memory = methods.Shuffled(hope), methods.Memory(hope)
    for z, a in zip(eight[0].split(1)[:2], eight[1].split(1)):
        shuffled.look_back(z, a)
        memory.look_back(z, eight[1][:1])
    assert torch.equal(shuffled.memory['action'], memory.memory['action'])


def test_the_wrong_world_is_written_before_the_stream_and_kept(hope, experiment, eight):
    wrong, memory = methods.WrongWorld(hope, experiment=experiment), methods.Memory(hope)
    for split, index in experiment.other:
        memory.look_back(*experiment.read(split, [index]))
    wrong.look_back(eight[0][:1], eight[1][:1])
    assert torch.equal(wrong.memory['action'], memory.memory['action'])


def test_the_gain_writer_follows_the_gradient(hope, eight):
    """One step of its rule, the gradient by finite differences."""
    z, a = eight[0][:1], eight[1][:1]
    method = methods.GainWriter(hope, 10.0)
    method.predict(z, a)
    method.look_back(z, a)
    halves = []
    for gain in 1.01, 0.99:
        z_hat = methods.Method(hope).predict(z, gain * a)
        halves.append(methods.feature_loss(z_hat.double(), z[:, hope.targets].double()).square().item() / 2)
    assert method.change.item() == pytest.approx(-10 * (halves[0] - halves[1]) / 0.02, rel=0.05)


def test_diagnostics(hope, eight):
    """Every block's memory and every CMS level report along the stream."""
    memory, titan, cms = (streamed(hope, name, rate, eight)['diagnostics'][-1]
                          for name, rate in (('memory', None), ('Titan memory', 0.5), ('CMS', 1.0)))
    assert 0 < memory['retention, action memory'] < 1 and memory['surprise'] > 0
    assert 0 < titan['surprise, block 1'] < 2 and titan['drift, block 2'] > 0
    assert [cms[f'writes, CMS every {period}'] for period in (1, 4, 16)] == [8, 2, 0]
