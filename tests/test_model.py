"""The predictors' shared interface: what may influence what, positions, initial values, losses, optimiser."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import sizes
from conftest import small_predictor as predictor
from conftest import some_clips as clips

import hope
import model
from configurator import read_config

B, T, N, D = 3, 5, 4, 12
TAU = torch.tensor([2, 3, 4])
both = pytest.mark.parametrize('kind', ['vit', 'hope'])


def all_losses(net, z, a, tau=TAU):
    """The sum of all that is trained, the clips being one stream."""
    teacher, _ = model.teacher_forcing_loss(net, z, a, {})
    jump, surprise = model.stream_loss(net, z, a, tau, len(z))
    return teacher + jump.mean() + 0.1 * surprise.mean() + net.inverse.loss(z, a)


def train(net, steps=5):
    """A few optimiser steps, so that nothing is at its initial value any more; then these clips are home."""
    net.world.get_to_know(clips()[0], clips()[0].flatten(0, 1).median(0).values)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    for i in range(steps):
        optimizer.zero_grad()
        all_losses(net, *clips(), TAU.roll(i)).backward()
        optimizer.step()
    net.settle(*clips())
    return net.eval()


def first(z, a):
    return z[:, :1], a[:, :1]


@both
def test_shapes_of_the_interface(kind):
    net = predictor(kind)
    z, a = clips()
    z_hat, memory = net(z, a)
    assert z_hat.shape == (B, T, N, D) and memory['world']['now']['M'].shape == (B, 8, 78, 50)
    assert ('titan' in memory) == (kind == 'hope')
    z_hat, again = net(*first(z, a), tau=TAU, memory=memory)
    assert z_hat.shape == (B, N, D) and again.keys() == memory.keys()
    assert predictor('vit', world=False)(z, a)[1] == {}
    with pytest.raises(SystemExit):
        sizes(width=20, heads=4)


@both
def test_causality(kind):
    """A prediction from steps <= t changes with step t and with nothing later."""
    net = train(predictor(kind))
    z, a = clips()
    before = net(z, a)[0]
    for t in range(T):
        z2, a2 = z.clone(), a.clone()
        z2[:, t:] += torch.randn_like(z2[:, t:])
        a2[:, t:] += 1
        after = net(z2, a2)[0]
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])


@pytest.mark.parametrize('at_once', [1, 2 * (1 + N), T * (1 + N)])
def test_attention_is_that_of_a_block_causal_mask(at_once, monkeypatch):
    """Prefixes of one step, of two and of all give what the dense mask of the published predictor gives."""
    def dense(q, k, v, P):
        step = torch.arange(q.shape[2]) // P
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(step[:, None] < step, -math.inf)
        return scores.softmax(-1) @ v
    monkeypatch.setattr(model, 'AT_ONCE', at_once)
    net = predictor('vit')
    prefixes = net(*clips())[0]
    monkeypatch.setattr(model, 'block_causal', dense)
    torch.testing.assert_close(net(*clips())[0], prefixes, rtol=0, atol=1e-12)


@both
def test_checkpointing_changes_no_gradient(kind):
    """And each block is computed once more in the backward pass."""
    net = predictor(kind)
    calls, found = [], []
    net.predictor_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for net.checkpointing in (False, True):
        found.append(torch.autograd.grad(all_losses(net, *clips()), list(net.parameters())))
    for whole, again in zip(*found):
        torch.testing.assert_close(again, whole, rtol=0, atol=1e-13)
    assert len(calls) == 2 + 2 * 2


@both
def test_a_clip_never_sees_another_clip(kind):
    """A memory shared across the batch would tell of other clips."""
    net = train(predictor(kind))
    z, a = clips()
    together, memory = net(z, a)
    alone, own = net(z[:1], a[:1])
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-12)
    together, alone = net(*first(z, a), TAU, memory)[0], net(*first(z[:1], a[:1]), TAU[:1], own)[0]
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-12)


@both
def test_patches_and_action_of_a_frame_meet(kind):
    """A frame is written before it is read: every patch's jump depends on every patch and on the action."""
    net = train(predictor(kind))
    z, a = first(*clips())
    before = net(z, a, TAU)[0]
    changed = [(z, a + 1)]
    for n in range(N):
        z2 = z.clone()
        z2[:, 0, n] += 1 + torch.arange(D)
        changed.append((z2, a))
    for inputs in changed:
        assert ((net(*inputs, TAU)[0] - before).abs().amax((0, 2)) > 1e-6).all()


@both
def test_the_target_step_matters_and_only_through_the_time_part_of_the_rotation(kind, monkeypatch):
    net = train(predictor(kind), steps=10)
    inputs = first(*clips(1))

    def jumps():
        return [net(*inputs, tau=torch.tensor([t]))[0] for t in (2, 4)]
    early, late = jumps()
    assert (early - late).abs().mean() > 1e-3
    angles = model.rope_angles
    monkeypatch.setattr(model, 'rope_angles', lambda p, *rest: angles(p * torch.tensor([0, 1, 1]), *rest))
    assert torch.equal(*jumps())


@both
@pytest.mark.parametrize('rope', ['paired', 'vjepa2'])
def test_teacher_forcing_is_a_jump_by_one(kind, rope):
    net = train(predictor(kind, rope=rope))
    z, a = clips()
    jump = net(*first(z, a), tau=torch.ones(B, dtype=torch.long), memory={})[0]
    torch.testing.assert_close(jump, net(z, a)[0][:, 0], rtol=0, atol=1e-12)


@both
def test_a_jump_is_made_before_its_clip_is_shown(kind):
    """The loss depends on step 1, from which it predicts, and on the target, with which it compares."""
    net = train(predictor(kind))
    z, a = clips()
    z.requires_grad_()
    model.jump_loss(net, z, a, TAU).sum().backward()
    touched = z.grad.abs().sum((2, 3)) > 0
    assert torch.equal(touched, F.one_hot(TAU, T) + F.one_hot(0 * TAU, T) > 0)


@both
def test_every_parameter_has_a_gradient_after_two_steps(kind):
    net = train(predictor(kind), steps=2)
    net.zero_grad()
    all_losses(net, *clips()).backward()
    for name, p in net.named_parameters():
        rows = p.grad.flatten(1) if p.dim() == 3 else p.grad.flatten()[None]
        assert (rows.abs().amax(1) > 0).all(), name


def test_initial_values_are_those_of_v_jepa_2():
    for kind, mixer, last in (('vit', 'attn', 'mlp.fc2'), ('hope', 'titan', 'cms.levels.2.fc2')):
        net = predictor(kind, width=192, heads=4, mlp_hidden=384, cms_hidden=256, depth=3)
        for i, block in enumerate(net.predictor_blocks, 1):
            for name, std in ((f'{mixer}.qkv', 0.02), (f'{mixer}.proj', 0.02 / math.sqrt(2 * i)),
                              (last, 0.02 / math.sqrt(2 * i))):
                assert block.get_submodule(name).weight.std().item() == pytest.approx(std, rel=0.05), name
        biases = [p for name, p in net.named_parameters() if name.endswith('.bias')
                  and not name.startswith(('inverse', 'world'))]
        assert all((p == 0).all() for p in biases)
    identity = F.pad(torch.eye(48).repeat(3, 1), (0, 0, 0, 2))
    for block in net.predictor_blocks:
        assert (block.titan.alpha_bias == -4).all() and (block.titan.eta_bias == 2).all()
        assert (block.titan.memory - identity).abs().max() < 0.2


def test_paired_rotation_turns_and_sees_differences_only():
    """By angles of time, row and column, and some channels that do not turn."""
    angle = model.rope_angles(torch.tensor([1.0, 10.0, 100.0]), 64)
    omega = 10000 ** (-torch.arange(0, 20, 2) / 20)
    expected = torch.cat([omega, 10 * omega, 100 * omega]).repeat_interleave(2)
    torch.testing.assert_close(angle, F.pad(expected, (0, 4)))
    q, k = torch.randn(2, 24, generator=torch.Generator().manual_seed(0))

    def at(x, *position):
        angle = model.rope_angles(torch.tensor(position), 24)
        return model.rotate(x, (angle.cos(), angle.sin()))
    torch.testing.assert_close(at(q, 3, 1, 2).norm(), q.norm())
    moved = at(q, 5, 3, 2) @ at(k, 1, 2, 0)
    torch.testing.assert_close(moved, at(q, 4, 1, 2) @ at(k, 0, 0, 0), rtol=1e-5, atol=1e-5)
    assert abs(moved - at(q, 4, 3, 2) @ at(k, 1, 2, 0)) > 1e-3


@both
def test_each_loss_predicts_as_it_trains(kind):
    """A rollout feeds predictions back, a jump takes one pass, each clip with its own memory."""
    net = train(predictor(kind))
    z, a = clips()
    one = net(*first(z, a))[0]
    two = net(torch.cat([z[:, :1], one], 1), a[:, :2])[0]
    rollout = model.predict_rollout(net, z, a, torch.tensor([1, 2]))
    torch.testing.assert_close(rollout, two, rtol=0, atol=1e-12)
    memory = net(z.flip(0), a.flip(0))[1]
    alone = {'titan': [state[1:2] for state in memory.get('titan', [])], 'world': {
        part: {name: x[1:2] for name, x in memory['world'][part].items()} for part in ('now', 'known')}}
    targets = torch.tensor([2, 4])
    for name, loss in model.LOSSES.items():
        z_hat = loss.predict(net, z, a, targets, {})
        for k, target in enumerate(targets):
            trained = loss.train(net, z, a, target.repeat(B))
            torch.testing.assert_close(trained, model.feature_loss(z_hat[:, k], z[:, target]))
        z_hat, without = loss.predict(net, z, a, targets, memory)[1:2], z_hat[1:2]
        expected = loss.predict(net, z[1:2], a[1:2], targets, {key: alone[key] for key in memory})
        torch.testing.assert_close(z_hat, expected, rtol=0, atol=1e-12)
        assert not torch.allclose(z_hat, without) or (kind, name) == ('vit', 'rollout')


@pytest.mark.parametrize('name, seen', [('jump', 1), ('rollout', 2), ('teacher forcing', T - 1)])
def test_a_loss_sees_the_states_that_it_predicts_from(name, seen):
    net = predictor('vit', state_dim=5, world=False)
    z, a = clips()

    def loss(states):
        if name == 'teacher forcing':
            return model.teacher_forcing_loss(net, z, a, states=states)[0]
        return model.LOSSES[name].train(net, z, a, torch.tensor([2, 2, 2]), states)
    states = torch.randn(B, T, 5, dtype=torch.float64)
    for t in range(T):
        changed = states.clone()
        changed[:, t] += 1
        assert torch.equal(loss(changed), loss(states)) == (t >= seen)


def test_decay_and_optimiser_by_role():
    """Matrices of linear maps decay; those of the blocks and of the world head are Muon's."""
    net = predictor('hope')
    names = {id(p): name for name, p in net.named_parameters()}
    for kind, sharing in ('adamw', 2), ('muon', 4):
        optimizers = model.make_optimizers(net, kind, 1e-3, 2e-3, 0.99, 0.1)
        groups = [group for each in optimizers for group in each.param_groups]
        held = [{names[id(p)] for p in group['params']} for group in groups]
        assert [group['weight_decay'] for group in groups] == [0.1, 0.0, 0.1, 0.1][:sharing]
        assert [group['scale'] for group in groups] == [1, 1, 2, 2][:sharing]
        assert sum(map(len, held)) == len(names) and set.union(*held) == set(names.values())
        kept = {name.split('.')[-1] for name in held[1]}
        assert kept == {'memory', 'alpha_bias', 'eta_bias', 'gate_bias', 'query_bias', 'bias', 'weight',
                        'place', 'log_prior', 'log_noise'}
    owners = [{name.split('.')[0] for name in group} for group in held]
    assert owners[0] == {'predictor_embed', 'action_encoder', 'predictor_proj', 'inverse'}
    assert owners[2] == owners[3] == {'predictor_blocks', 'world'}


def test_muon_is_that_of_torch_but_for_its_bfloat16():
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in ((30, 10), (10, 24))] for _ in range(2))
    both = model.Muon(ours, 0.1, 0.04), torch.optim.Muon(theirs, 0.1, 0.04, adjust_lr_fn='match_rms_adamw')
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = q.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p)))
        [optimizer.step() for optimizer in both]
    assert all((p - q).norm() < 0.02 * (p - 1).norm() for p, q in zip(ours, theirs))


def test_the_rate_rises_stays_and_falls():
    rates = [model.rate_at(step, 100, 0.1, 1.0, 0.1, 0.3) for step in range(101)]
    assert rates[:11] == pytest.approx(torch.linspace(0.1, 1, 12)[1:].tolist(), abs=1e-6)
    assert rates[10:71] == pytest.approx([1] * 61)
    assert rates[70:] == pytest.approx(torch.linspace(1, 0, 31).tolist(), abs=1e-6)


@pytest.mark.parametrize('pair, features, most', [
    ('jump', dict(feature_dim=48), 0.6e6), ('medium', dict(feature_dim=1024, grid=(16, 16)), 6e6),
    ('full', dict(feature_dim=1024, grid=(16, 16)), 44e6)])
def test_compared_configs_have_the_same_number_of_parameters(pair, features, most):
    """But for HOPE's world head, within 5 %: laptop, own clips, 24 layers of 384 with 16 heads."""
    counts = []
    for kind in ('hope', 'vit'):
        config = {**vars(sizes(**features)), **read_config(f'config/{kind}_{pair}.py')}
        chosen = model.Sizes.from_config({**config, 'world': False})
        with torch.device('meta'):
            counts.append(sum(p.numel() for p in hope.build(chosen).parameters()))
    assert abs(counts[0] / counts[1] - 1) < 0.05 and 0.6 * most < counts[1] < most
