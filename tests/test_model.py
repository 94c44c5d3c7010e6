"""The predictors' shared interface: what may influence what, positions, initial values, checkpoints."""
import math
import os

import pytest
import torch
from conftest import ROOT

import hope
import model
from configurator import read_config, read_knobs

SIZES = dict(feature_dim=12, grid=(2, 2), steps=5, depth=2, width=24, heads=2, mlp_hidden=48, cms_hidden=16)
B, T, N, D = 3, 5, 4, 12


def predictor(kind, **sizes):
    torch.manual_seed(0)
    return hope.build(model.Sizes(model=kind, **{**SIZES, **sizes})).double()


def clips(batch=B):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(batch, T, N, D, generator=generator, dtype=torch.float64)
    a = torch.randn(batch, T, 2, generator=generator, dtype=torch.float64)
    return torch.nn.functional.layer_norm(z, (D,)), a


def train(net, steps=5, loss=None):
    """A few optimiser steps on the two losses, so that nothing is at its initial value any more."""
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    z, a = clips()
    for i in range(steps):
        tau = torch.tensor([2, 3, 4]).roll(i)
        optimizer.zero_grad()
        losses = model.teacher_forcing_loss(net, z, a)[0], model.jump_loss(net, z, a, tau).mean(), net.action_memory.loss(z, a)
        sum(losses).backward()
        optimizer.step()
    return net.eval()


both = pytest.mark.parametrize('kind', ['vit', 'hope'])


@both
def test_shapes_of_the_interface(kind):
    net = predictor(kind)
    z, a = clips()
    z_hat, memory = net(z, a)
    assert z_hat.shape == (B, T, N, D) and len(memory) == (1 if kind == 'vit' else 3)
    assert predictor('vit', action_memory=False)(z, a)[1] is None
    z_hat, memory = net(z[:, :1], a[:, :1], tau=torch.tensor([2, 3, 4]), memory=memory)
    assert z_hat.shape == (B, N, D)
    with pytest.raises(ValueError, match='a jump takes'):
        net(z, a, tau=torch.tensor([2, 3, 4]))
    with pytest.raises(ValueError, match='state token'):
        net(z, a, states=a)


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
    monkeypatch.setattr(model, 'AT_ONCE', at_once)
    torch.manual_seed(0)
    attention = model.Attention(24, 2).double()
    x = torch.randn(B, T, 1 + N, 24, dtype=torch.float64)
    rope = predictor('vit').rope(T, 1, N, None, 'cpu')
    q, k, v = attention.project(x.flatten(1, 2), rope)
    step = torch.arange(T * (1 + N)) // (1 + N)
    scores = (q @ k.mT / 12 ** 0.5).masked_fill(step[:, None] < step, -math.inf)
    expected = attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, rope).flatten(1, 2), expected, rtol=0, atol=1e-12)


def test_attention_stays_in_float32_on_a_cpu(monkeypatch):
    """It is slower in bfloat16 there, and autocast would choose that."""
    found = []

    def noting(*args, **kwargs):
        y = attention(*args, **kwargs)
        found.append(y.dtype)
        return y
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, 'scaled_dot_product_attention', noting)
    z, a = clips()
    with model.autocast('cpu', 'bfloat16', 24):
        predictor('vit').float()(z.float(), a.float())
    assert found == [torch.float32] * 2


@both
def test_checkpointing_changes_no_gradient(kind):
    """A memory, which is passed as an argument, gets its gradient too."""
    net = predictor(kind)
    z, a = clips()
    with torch.no_grad():
        _, start = net(z, a)
    found, calls = [], []
    net.predictor_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for checkpointing in False, True:
        net.checkpointing = checkpointing
        memory = [state.clone().requires_grad_() for state in start]
        loss = model.teacher_forcing_loss(net, z, a, memory)[0]
        loss = loss + model.jump_loss(net, z, a, torch.tensor([2, 3, 4]), memory).mean()
        # Not those of the action memory's reading of pushes, which has a loss of its own.
        wanted = [*memory, *(p for name, p in net.named_parameters() if not name.startswith('action_memory'))]
        found.append(torch.autograd.grad(loss, wanted))
    for whole, again in zip(*found):
        torch.testing.assert_close(again, whole, rtol=0, atol=1e-14)
    # Two passes; and the same again, each computed twice.
    assert len(calls) == 2 + 4


def test_bfloat16_is_for_wide_models_where_the_cpu_has_it(monkeypatch):
    def chosen(width, dtype='auto'):
        with model.autocast('cpu', dtype, width):
            return torch.is_autocast_enabled('cpu')
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'avx512_bf16': True, 'amx_bf16': False})
    assert chosen(256) and not chosen(96)
    assert chosen(96, 'bfloat16') and not chosen(256, 'float32')
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'avx512_f': True})
    assert not chosen(256)


@both
def test_a_clip_never_sees_another_clip(kind):
    """A memory shared across the batch would tell of other clips."""
    net = train(predictor(kind))
    z, a = clips()
    tau = torch.tensor([2, 3, 4])
    memory = net(z, a)[1]
    other_z, other_a = z.clone(), a.clone()
    other_z[1:] = torch.randn_like(z[1:])
    other_a[1:] += 1
    other = net(other_z, other_a)[1]
    torch.testing.assert_close(net(other_z, other_a)[0][0], net(z, a)[0][0], rtol=0, atol=1e-12)
    torch.testing.assert_close(net(other_z[:, :1], other_a[:, :1], tau, other)[0][0],
                               net(z[:, :1], a[:, :1], tau, memory)[0][0], rtol=0, atol=1e-12)
    torch.testing.assert_close(net(z[:1], a[:1])[0], net(z, a)[0][:1], rtol=0, atol=1e-12)


@both
def test_patches_and_action_of_a_frame_meet(kind):
    """A frame is written before it is read: every patch's jump depends on every patch and on the action."""
    net = train(predictor(kind))
    z, a = clips()
    tau = torch.tensor([2, 3, 4])
    before = net(z[:, :1], a[:, :1], tau=tau)[0]
    for n in range(N):
        z2 = z.clone()
        z2[:, 0, n] += 1 + torch.arange(D)
        assert ((net(z2[:, :1], a[:, :1], tau=tau)[0] - before).abs().amax((0, 2)) > 1e-6).all()
    assert ((net(z[:, :1], a[:, :1] + 1, tau=tau)[0] - before).abs().amax((0, 2)) > 1e-6).all()


@both
def test_the_target_step_matters_and_only_through_the_time_part_of_the_rotation(kind, monkeypatch):
    net = train(predictor(kind), steps=10)
    z, a = clips(1)

    def jumps():
        return [net(z[:, :1], a[:, :1], tau=torch.tensor([t]))[0] for t in (2, 4)]
    early, late = jumps()
    assert (early - late).abs().mean() > 1e-3
    angles = model.rope_angles
    monkeypatch.setattr(model, 'rope_angles', lambda p, *rest: angles(p * torch.tensor([0, 1, 1]), *rest))
    early, late = jumps()
    assert torch.equal(early, late)


@both
def test_teacher_forcing_is_a_jump_by_one(kind):
    net = train(predictor(kind))
    z, a = clips()
    jump = net(z[:, :1], a[:, :1], tau=torch.ones(B, dtype=torch.long))[0]
    torch.testing.assert_close(jump, net(z, a)[0][:, 0], rtol=0, atol=1e-12)


@both
def test_a_jump_is_made_before_its_clip_is_shown(kind):
    """The jump's prediction depends on step 1 and the action alone, not on a memory that has read the answer."""
    net = train(predictor(kind))
    z, a = clips()
    tau = torch.tensor([2, 3, 4])
    z.requires_grad_()
    model.jump_loss(net, z, a, tau).sum().backward()
    touched = z.grad.abs().sum((2, 3)) > 0
    target = torch.zeros(B, T, dtype=torch.bool)
    target[torch.arange(B), tau] = True                  # the loss compares with this step ...
    target[:, 0] = True                                  # ... and predicts from this one
    assert torch.equal(touched, target)


@both
def test_every_parameter_has_a_gradient_after_two_steps(kind):
    """Nothing is left that never trains."""
    net = train(predictor(kind), steps=2)
    z, a = clips()
    net.zero_grad()
    teacher, memory = model.teacher_forcing_loss(net, z, a)
    loss = teacher + model.jump_loss(net, z, a, torch.tensor([2, 3, 4])).mean()
    loss = loss + net.action_memory.loss(z, a)
    loss.backward()
    for name, p in net.named_parameters():
        rows = p.grad.flatten(1) if p.dim() == 3 else p.grad.flatten()[None]
        assert (rows.abs().amax(1) > 0).all(), name


def test_initial_values_are_those_of_v_jepa_2():
    """No general initialisation has undone the special values."""
    sizes = dict(width=192, heads=4, mlp_hidden=384, cms_hidden=256, depth=3)
    for kind, mixer, last in (('vit', 'attn', 'mlp.fc2'), ('hope', 'titan', 'cms.levels.2.fc2')):
        net = predictor(kind, **sizes)
        state = net.state_dict()
        for i in range(3):
            assert abs(state[f'predictor_blocks.{i}.{mixer}.qkv.weight'].std() / 0.02 - 1) < 0.05
            for name in (f'{mixer}.proj', last):
                std = state[f'predictor_blocks.{i}.{name}.weight'].std()
                assert abs(std / (0.02 / math.sqrt(2 * (i + 1))) - 1) < 0.05, (kind, name)
        biases = [p for n, p in net.named_parameters() if n.endswith('.bias') and 'action_memory' not in n]
        assert all((p == 0).all() for p in biases)
    for block in net.predictor_blocks:
        assert (block.titan.alpha_bias == -4).all() and (block.titan.eta_bias == 2).all()
        identity = torch.nn.functional.pad(torch.eye(48).repeat(3, 1), (0, 0, 0, 2))
        assert (block.titan.memory - identity).abs().max() < 0.2


def test_paired_rotation_turns_and_sees_differences_only():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 24, generator=generator)

    def at(x, *position):
        angle = model.rope_angles(torch.tensor(position), 24)
        return model.rotate(x, (angle.cos(), angle.sin()))
    torch.testing.assert_close(at(q, 3, 1, 2).norm(), q.norm())
    torch.testing.assert_close(at(q, 5, 3, 2) @ at(k, 1, 2, 0), at(q, 4, 1, 2) @ at(k, 0, 0, 0), rtol=1e-5, atol=1e-5)
    assert abs(at(q, 5, 3, 2) @ at(k, 1, 2, 0) - at(q, 4, 3, 2) @ at(k, 1, 2, 0)) > 1e-3
    assert torch.equal(at(q, 0, 0, 0), q)


def test_rotation_forms_and_channel_split():
    angle = model.rope_angles(torch.tensor([1.0, 10.0, 100.0]), 64)     # 20 + 20 + 20 rotated, 4 not
    assert (angle[60:] == 0).all() and (angle[:60] != 0).all()
    omega = 10000 ** (-torch.arange(0, 20, 2) / 20)
    torch.testing.assert_close(angle[0:20:2], omega)                    # adjacent channels share a frequency
    torch.testing.assert_close(angle[1:20:2], omega)
    tiled = model.rope_angles(torch.tensor([1.0, 10.0, 100.0]), 64, 'vjepa2')
    torch.testing.assert_close(tiled[20:40], 10 * omega.repeat(2))


def test_rollout_feeds_predictions_back():
    net = train(predictor('vit'))
    z, a = clips()
    two = model.rollout(net, z, a, 2)
    first = net(z[:, :1], a[:, :1])[0][:, 0]
    second = net(torch.stack([z[:, 0], first], 1), a[:, :2])[0][:, 1]
    torch.testing.assert_close(two, torch.stack([first, second], 1), rtol=0, atol=1e-12)


def test_state_token():
    net = predictor('vit', state_dim=5)
    z, a = clips()
    s = torch.randn(B, T, 5, dtype=torch.float64)
    out = net(z, a, states=s)[0]
    assert out.shape == (B, T, N, D) and not torch.allclose(out, net(z, a, states=s + 1)[0])
    # A loss sees the states of the steps that it predicts from, and no later one.
    for loss, seen in ((lambda s: model.rollout_loss(net, z, a, 2, states=s), 2),
                       (lambda s: model.teacher_forcing_loss(net, z, a, states=s)[0], T - 1)):
        for t in range(T):
            changed = s.clone()
            changed[:, t] += 1
            assert torch.equal(loss(changed), loss(s)) == (t >= seen)


@pytest.mark.parametrize('pair, features', [(('hope_jump', 'vit_jump'), dict(feature_dim=48)),
                                            (('hope_medium', 'vit_medium'), dict(feature_dim=1024, grid=(16, 16))),
                                            (('hope_full', 'vit_full'), dict(feature_dim=1024, grid=(16, 16)))])
def test_compared_configs_have_the_same_number_of_parameters(pair, features):
    """Within 5 %, for the laptop, for own clips on a workstation, and for the user's 24 layers, 384 wide, 16 heads."""
    counts = []
    for name in pair:
        sizes = model.Sizes.from_settings(read_config(f'config/{name}.py'), **features)
        with torch.device('meta'):
            counts.append(sum(p.numel() for p in hope.build(sizes).parameters()))
    assert abs(counts[0] / counts[1] - 1) < 0.05
    least, most = {'vit_jump': (0.4e6, 0.6e6), 'vit_medium': (4e6, 6e6), 'vit_full': (43e6, 44e6)}[pair[1]]
    assert least < counts[1] < most


def test_a_size_that_does_not_exist_is_an_error():
    """So a checkpoint of other code is not half understood."""
    with pytest.raises(TypeError, match='colour'):
        model.Sizes(colour=1)


def test_a_config_may_give_periods_and_memories_as_text():
    """bench.py once built three levels of '1,4', one for each character."""
    sizes = model.Sizes.from_settings({'cms_periods': '1,4', 'adapts': 'k,mem', 'learning_rate': 1e-3}, grid=(2, 2))
    assert sizes.cms_periods == (1, 4) and sizes.adapts == ('k', 'mem') and sizes.grid == (2, 2)
    assert len(hope.build(sizes).predictor_blocks[0].cms.levels) == 2


def test_the_knobs_of_train_have_the_defaults_of_sizes():
    """--help reads train.py's knobs as literals, so the defaults stand twice; here they are held together."""
    knobs = {name: default for name, default, *_ in read_knobs(os.path.join(ROOT, 'train.py'))}
    sizes = vars(model.Sizes())
    data_decide = {'feature_dim', 'action_dim', 'state_dim', 'grid', 'steps', 'normed_output'}
    assert set(sizes) - set(knobs) == data_decide
    assert vars(model.Sizes.from_settings(knobs)) == sizes


def test_load_returns_what_was_saved(trained, tiny):
    for kind, path in trained.items():
        net, checkpoint = hope.load(path)
        assert not net.training and checkpoint['step'] == 6 and net.sizes.model == kind
        assert all(torch.equal(p, checkpoint['predictor'][n]) for n, p in net.state_dict().items())
