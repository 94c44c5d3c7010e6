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
            if name not in ('copy', 'blank', 'frozen', 'worlds known', 'wrong world', 'no carry')]
TTA = [name for name in LEARNING if issubclass(METHODS[name], methods.TTA)]
# What adapt.py gets from its command line for a short stream.
CONFIG = dict(oracle='', phases='auto', clips=6, tune_clips=1, probe_clips=6, probe_every=6, streams=1,
              plan=False, methods='', rates='', tune_on='C', device='cpu', dtype='float32')


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
    clips = [experiment.read(split, [i]) for split, i in experiment.streams[0][:8]]
    return tuple(map(torch.cat, zip(*clips)))


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
    """
    A change after a clip's first step changes no earlier loss and not its prediction, but what follows.
    The checkpoint stays as it is.
    """
    (z, a), t = eight, 5
    untouched = copy.deepcopy(fitting.predictor.state_dict())
    torch.manual_seed(0)
    z2 = z.clone()
    z2[t, 1:] += torch.randn_like(z2[t, 1:])
    before, after = streamed(fitting, method, '', (z, a)), streamed(fitting, method, '', (z2, a))
    assert np.array_equal(before['predicted'][:t + 1], after['predicted'][:t + 1])
    assert before['loss'][:t] == after['loss'][:t]
    assert before['loss'][t + 1:] != after['loss'][t + 1:]
    assert all(torch.equal(p, untouched[name]) for name, p in fitting.predictor.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in fitting.predictor.parameters())


@pytest.mark.parametrize('method', [*TTA, 'no carry', 'CMS', 'Titan memory'])
def test_rate_zero_or_no_carry_is_frozen(fitting, eight, method):
    """Bit for bit, but where what is written, nothing, is added."""
    found, frozen = losses(fitting, method, 0.0, eight), losses(fitting, 'frozen', None, eight)
    assert found == frozen or method in ('CMS', 'Titan memory') and found == pytest.approx(frozen, rel=1e-5)


@pytest.mark.parametrize('method', ['frozen', 'world head', 'LN-TTA', 'worlds known', 'Titan memory', 'shuffled'])
def test_streams_as_a_batch_are_streams_one_by_one(hope, experiment, method):
    """On their own clips and on the probes."""
    method, rate = METHODS[method], 1e-3 if method == 'LN-TTA' else 0.05
    together = adapt.run_stream(method(hope, rate, experiment, 3), experiment.streams)
    for s, stream in enumerate(experiment.streams):
        alone = adapt.run_stream(method(hope, rate, experiment), [stream])
        for many, one in ((together['loss'], alone['loss']), (together['probes']['A'], alone['probes']['A'])):
            assert [values[s] for values in many] == pytest.approx([value for value, in one], rel=1e-3)


def of_now(method):
    """What the hypotheses of the first stream hold."""
    return method.memory['world']['now']['M'][0]


def test_the_shuffled_control_is_shown_the_push_of_the_clip_before(hope, eight):
    shuffled, memory = methods.Shuffled(hope), methods.WorldHead(hope)
    for z, a in zip(eight[0].split(1)[:2], eight[1].split(1)):
        shuffled.look_back(z, a)
        memory.look_back(z, eight[1][:1])
    assert torch.equal(of_now(shuffled), of_now(memory))


def test_worlds_are_known_from_other_clips_and_kept(hope, experiment, eight):
    """Home is in the world of the phase, filled from the probes; the wrong world is that of the tuning."""
    known, wrong = (METHODS[name](hope, experiment=experiment) for name in ('worlds known', 'wrong world'))
    other = wrong.memory_of('test_C', [index for _, index in experiment.other])
    for i in range(18):
        split, indices = experiment.probes[experiment.domains[i // 6]]
        assert torch.equal(of_now(known), known.memory_of(split, indices)['world']['now']['M'][0])
        assert torch.equal(of_now(wrong), other['world']['now']['M'][0])
        for method in known, wrong:
            method.look_back(eight[0][:1], eight[1][:1])


@pytest.mark.parametrize('method, steps, kind', [
    ('LN-TTA', 1, torch.nn.LayerNorm), ('LN-TTA x5', 5, torch.nn.LayerNorm), ('full TTA', 1, object)])
def test_tta_looks_back_at_all_steps_of_the_clip(hope, eight, method, steps, kind):
    """Against Adam on the LayerNorms or all of a copy, on the jump loss plus that of teacher forcing."""
    z, a = eight[0][:1], eight[1][:1]
    adapted = METHODS[method](hope, 1e-2)
    adapted.predict(z, a)
    adapted.look_back(z, a)
    net = copy.deepcopy(hope.predictor)
    norms = list({p for m in net.modules() if isinstance(m, kind) for p in m.parameters()})
    adam = torch.optim.Adam(norms, 1e-2)
    for _ in range(steps):
        net.zero_grad()
        z_hat = methods.LOSSES['jump'].predict(net, z, a, hope.targets)
        forced, _ = methods.teacher_forcing_loss(net, z, a, {})
        (methods.feature_loss(z_hat, z[:, hope.targets]).mean() + forced).backward()
        torch.nn.utils.clip_grad_norm_(norms, 1.0)
        adam.step()
    for found, p in zip(adapted.predictor.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(found.view_as(p), p, rtol=1e-4, atol=1e-5)


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
                          for name, rate in (('world head', None), ('Titan memory', 0.5), ('CMS', 1.0)))
    assert 0 < memory['home'] <= 1 and sum(memory['ages']) == pytest.approx(1)
    assert 0 < titan['surprise, block 1'] < 2 and titan['drift, block 2'] > 0
    assert [cms[f'writes, every {period}'] for period in (1, 4, 16)] == [8, 2, 0]
