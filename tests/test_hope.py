"""HOPE's memory against float64 references, its laws, and the pace at which CMS levels write."""
import pytest
import torch
import torch.nn.functional as F
from conftest import sizes, small_predictor, some_clips

import hope
import model

# Seven tokens a frame: the action and a grid of 2 x 3 patches.
B, H, P, d = 2, 2, 7, 6
VARIANTS = [{'rule': 'delta'}, {'rule': 'dgd'}, {'conv': False}, {'surprise': False}, {'self_targets': False},
            {'memory_hidden': 4, 'rule': 'delta'}, {'memory_hidden': 4, 'rule': 'dgd'}]
every_variant = pytest.mark.parametrize('variant', VARIANTS, ids=str)
both_rules = pytest.mark.parametrize('rule', ['delta', 'dgd'])


def memory_layer(**variant):
    """A Titan memory in float64, none of whose parameters is at its initial value."""
    torch.manual_seed(0)
    memory = hope.TwoLayerTitanMemory if variant.get('memory_hidden') else hope.TitanMemory
    layer = memory(sizes(**{'width': H * d, 'heads': H, 'grid': (2, 3), **variant})).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return layer


def turn(tokens, size=1.0):
    """A rope of random angles; size 0 does not turn."""
    angle = size * torch.randn(1, 1, tokens, d).double()[..., ::2].repeat_interleave(2, -1)
    return angle.cos(), angle.sin()


def fresh(layer, clips=B):
    return torch.zeros(clips, *layer.start().shape).double()


def write(layer, state, k_in, v_in, rope):
    """The state after one chunk: state, k_in and v_in (B,H,...), the rope for all of them."""
    start = layer.start()[None]
    return layer.write(start + state, start, k_in, v_in, rope) - start


def convolved(layer, x):
    """The convolution by its definition: each patch adds up its neighbours in the grid, (B,T,P,C)."""
    seen = x.clone()
    for place in range(6):
        seen[:, :, 1 + place] += layer.conv.bias
        for other in range(6):
            down, right = other // 3 - place // 3, other % 3 - place % 3
            if abs(right) < 2:
                seen[:, :, 1 + place] += layer.conv.weight[:, 0, 1 + down, 1 + right] * x[:, :, 1 + other]
    return seen


def token_by_token(layer, x, rope, memory):
    """
    The reference: one clip, one head, one token after the other, in any order. → y (B,T,P,C), state.

    A layer M is written for the keys k of a frame by recursive least squares towards u: minus the gradient at
    its output (DGD), or its output minus the gradient (delta). For one key these are TitanMemory's formulas.
    """
    T, two = x.shape[1], isinstance(layer, hope.TwoLayerTitanMemory)
    rows = layer.memory.shape[1]
    if layer.sizes.conv:
        x = convolved(layer, x)
    qkv = layer.qkv(x).view(len(x), T, P, 3, H, d)

    def rotated(v, which, token):
        cos, sin = (part[0, 0, token] for part in rope[which])
        v = v / v.norm().clamp(min=1e-3)
        return v * cos + torch.stack([-v[1::2], v[::2]], -1).flatten() * sin

    def written(kept, tokens):
        """What a layer becomes by one (key, eta, output, gradient) after the other."""
        M, inverse = kept, torch.eye(kept.shape[1]).double()
        for k, eta, output, gradient in tokens:
            u = -gradient if layer.sizes.rule == 'dgd' else output - gradient
            gain = inverse @ k * eta / (1 + eta * (k @ inverse @ k))
            M = M + torch.outer(u - M @ k, gain)
            inverse = inverse - torch.outer(gain, inverse @ k)
        return M

    def one_head(b, n):
        start, y = layer.start()[n], []
        weights = start + memory[b, n]

        def M(v):
            if not two:
                return weights @ v
            # Two is the root of the four hidden channels.
            return layer.memory[n] @ v + weights[:rows] @ torch.tanh(weights[rows:].T @ v) / 2

        for t in range(T):
            q, k_in, v_in = qkv[b, t, :, :, n].unbind(1)
            layer1, layer2, retained = [], [], 1
            for i in torch.randperm(P).tolist():
                k, v = rotated(M(k_in[i])[:d], 1, t * P + i), F.normalize(M(v_in[i])[d:2 * d], dim=0)
                target = torch.cat([v, v, v, torch.zeros(2)])
                if layer.sizes.self_targets:
                    target = torch.cat([part / part.norm().clamp(min=1) for part in M(v).split([d, d, d, 2])])
                error = M(k) - target                                  # the gradient of 1/2 |M(k) - t|^2
                biases = torch.cat([layer.eta_bias[n], layer.alpha_bias[n]])
                eta, alpha = F.softplus(M(k_in[i])[3 * d:] + biases)
                if layer.sizes.surprise:
                    surprise = error[2 * d:3 * d].square().sum()
                    eta = eta * surprise / (surprise + F.softplus(layer.gate_bias[n, 0]))
                retained = retained * torch.exp(-alpha / P)
                key, output = k, M(k)
                if two:
                    z = weights[rows:].T @ k
                    jacobian = weights[:rows] @ torch.diag((1 - torch.tanh(z) ** 2) / 2)
                    layer2.append((k, eta, z, jacobian.T @ error / (1 + jacobian.square().sum())))
                    key, output = torch.tanh(z) / 2, weights[:rows] @ torch.tanh(z) / 2
                layer1.append((key, eta, output, error))
            kept = start + retained * (weights - start)
            new = written(kept[:rows], layer1)
            if not layer.sizes.self_targets:
                new = torch.cat([new[:3 * d], weights[3 * d:]])
            weights = torch.cat([new, written(kept[rows:].T, layer2).T]) if two else new
            queries = [rotated(q[i] + layer.query_bias[n, 0], 0, t * P + i) for i in range(P)]
            y.append(torch.stack([M(query)[2 * d:3 * d] for query in queries]))
        return torch.stack(y), weights - start

    y, state = zip(*[one_head(b, n) for b in range(len(x)) for n in range(H)])
    y = torch.stack(y).unflatten(0, (len(x), H)).permute(0, 2, 3, 1, 4).flatten(3)
    return layer.proj(y), torch.stack(state).unflatten(0, (len(x), H))


@every_variant
def test_equals_the_token_by_token_loop(variant):
    """Outputs, state and every gradient, with a memory carried in."""
    layer, T = memory_layer(**variant), 3
    x = torch.randn(B, T, P, H * d, dtype=torch.float64, requires_grad=True)
    carried = (0.1 * torch.randn_like(fresh(layer))).requires_grad_()
    rope = turn(T * P), turn(T * P)
    leaves = [x, carried, *layer.parameters()]
    results = []
    for y, state in (layer(x, rope, carried), token_by_token(layer, x, rope, carried)):
        weight = torch.linspace(-1, 1, y.numel()).double().view(y.shape)
        total = (y * weight).sum() + state.square().sum()
        results.append([y, state, *torch.autograd.grad(total, leaves)])
    for ours, reference in zip(*results):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)


@both_rules
def test_fixed_points(rule):
    """One pair written again and again: DGD ends at M k = t / 2, the delta rule at M k = t."""
    layer = memory_layer(rule=rule)
    k, t = F.normalize(torch.randn(B, H, 1, d).double(), dim=-1), torch.randn(B, H, 1, 3 * d + 2).double()
    eta, retained = torch.full((B, H, 1), 0.5).double(), torch.ones(B, H, 1, 1).double()
    start = weights = layer.start()[None]
    with torch.no_grad():
        for _ in range(201):       # 200 writes before the last read
            found = layer.read(weights, 'all', k)
            weights = layer.step(weights, start, retained, k, eta, t, found - t)
    torch.testing.assert_close(found, t / 2 if rule == 'dgd' else t, rtol=0, atol=1e-9)


@both_rules
def test_the_two_layer_memory_is_well_conditioned(rule):
    """A rounding error of the input, 1e-8 or bfloat16's 4e-3, stays of its size over two clips."""
    torch.manual_seed(0)
    net = hope.build(sizes(depth=1, mixer='titan', memory_hidden=24, rule=rule)).double()
    layer, rope = net.predictor_blocks[0].titan, net.rope(16, 1, None, 'cpu')
    x = torch.randn(2, 16, 17, 96).double()
    noise = torch.randn_like(x)
    with torch.no_grad():
        _, state = layer(x, rope)
        for size in (1e-8, 4e-3):
            _, moved = layer(x + size * noise, rope)
            assert (moved - state).norm() < 5 * size * state.norm()


@every_variant
def test_two_calls_are_one_long_call_and_clips_are_apart(variant):
    layer, T = memory_layer(**variant), 6
    x, rope = torch.randn(B, T, P, H * d).double(), turn(T * P)
    whole, end = layer(x, (rope, rope))
    early, late = ([part[:, :, cut] for part in rope] for cut in (slice(2 * P), slice(2 * P, None)))
    first, memory = layer(x[:, :2], (early, early))
    second, memory = layer(x[:, 2:], (late, late), memory)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(memory, end, rtol=0, atol=1e-12)
    one = [part[:, :, :P] for part in rope]
    y, _ = layer(x[:, :1], (one, one), jump=True)
    torch.testing.assert_close(y, whole[:, :1], rtol=0, atol=1e-12)
    x[1] += 1
    y, memory = layer(x, (rope, rope))
    assert torch.equal(y[0], whole[0]) and torch.equal(memory[0], end[0])
    assert not torch.allclose(memory[1], end[1])


def test_a_new_memory_keeps_four_fifths_over_a_clip():
    """At a retention of 0.5 a step, 0.3 % would be left. Nothing is written here."""
    layer = hope.TitanMemory(sizes(width=H * d, heads=H)).double()
    with torch.no_grad():
        layer.eta_bias.fill_(-40.0)
    state = start = fresh(layer) + 0.1
    for _ in range(8):
        state = write(layer, state, *torch.randn(2, B, H, P, d).double(), turn(P))
    assert 0.8 < state.norm() / start.norm() < 1


@pytest.mark.parametrize('variant', [*VARIANTS[:2], *VARIANTS[-2:]], ids=str)
def test_no_writes_make_a_memory_grow_without_bound(variant):
    """
    Each head with other rates of writing and of forgetting: none, some, and without end. Random writes, and
    all keys of a frame asking for the same target, which the memory generates itself, again and again.
    """
    layer = memory_layer(width=6 * d, heads=6, **variant)
    keys = torch.linalg.qr(torch.randn(B, 6, d, d).double())[0]
    same = keys.sum(2, keepdim=True).expand_as(keys).contiguous()
    with torch.no_grad():
        layer.eta_bias.copy_(torch.tensor([-100, -100, 0, 0, 1000, 1000])[:, None])
        layer.alpha_bias.copy_(torch.tensor(3 * [-100, 100])[:, None])
        mixed = alike = fresh(layer)
        for _ in range(300):
            mixed = write(layer, mixed, *100 * torch.randn(2, B, 6, P, d).double(), turn(P))
            alike = write(layer, alike, keys, same, turn(d, 0))
    assert mixed.isfinite().all() and max(mixed.abs().max(), alike.abs().max()) < 1e4


def test_a_deep_predictor_with_idle_actions_has_a_finite_gradient():
    """Action tokens of zeros must not stay exactly zero through all blocks (LayerNorm's gradient)."""
    z, a = some_clips()
    net = small_predictor(depth=12).float()
    model.teacher_forcing_loss(net, z.float(), 0 * a.float())[0].backward()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    assert norm.isfinite() and norm < 1e3


def test_memory_stays_in_float32_under_bfloat16():
    z, a = (x.float() for x in some_clips())
    net = small_predictor().float()
    with torch.autocast('cpu', torch.bfloat16):
        low, memory = net(z, a)
    exact = net(z, a)[0]
    assert memory['world']['now']['M'].dtype == memory['titan'][0].dtype == torch.float32
    assert (low - exact).abs().mean() < 0.05 * exact.abs().mean()


def cms_model(**changes):
    """A predictor, and the loss of a clip with it or with what wraps it."""
    net = small_predictor(**changes)
    return net, lambda run: model.jump_loss(run, *some_clips(1), torch.tensor([4]))[0]


def test_cms_levels_write_at_their_own_pace():
    """Each level's weights change at its ticks and at no other time; the predictor itself is not touched."""
    net, loss = cms_model()
    writer = hope.CMSWriter(net, 1.0)
    before = {name: p.clone() for name, p in net.named_parameters()}
    for tick in range(1, 33):
        changes = dict(writer.changes)
        value = loss(writer)
        writer.tick(value, value.detach())                             # nothing is forgotten
        for names, period in zip(writer.levels, net.sizes.cms_periods):
            for name in names:
                assert torch.equal(changes[name], writer.changes[name]) != (tick % period == 0), (tick, name)
    assert [level['writes'] for level in writer.diagnostics() if level['drift'] > 0] == [32, 8, 2]
    assert all(torch.equal(before[name], p) for name, p in net.named_parameters())
    assert {name for names in writer.levels for name in names} == {n for n in before if '.cms.levels.' in n}


def test_cms_write_is_eq_71():
    net, loss = cms_model()
    name = 'predictor_blocks.0.cms.levels.1.fc2.weight'
    writer = hope.CMSWriter(net, 0.5)
    writer.changes[name] = start = 0.01 * torch.randn_like(writer.changes[name])
    writer.refresh()
    total = 0
    for _ in range(4):
        value = loss(writer)
        gradient, = torch.autograd.grad(value.square() / 2, writer.weights[name], retain_graph=True)
        total = 0.9 ** 4 * (total + gradient)
        writer.tick(value, 0.9 * value.detach())                       # unwritten, it would have been better
    torch.testing.assert_close(writer.changes[name], 0.9 ** 16 * start - 0.5 / 4 * total)
    # What helped is kept.
    kept = hope.earned_retention(torch.ones(2), torch.tensor([3, 0.3]))
    torch.testing.assert_close(kept, torch.tensor([1, 0.0081]))


@pytest.mark.parametrize('memory_hidden', [0, 4])
def test_no_graph_breaks_under_compile(memory_hidden):
    """Traced in one piece, without generating code, which takes a compiler and minutes."""
    net, loss = cms_model(depth=1, memory_hidden=memory_hidden)
    expected = loss(net)
    net.compile(backend='eager', fullgraph=True)
    torch.testing.assert_close(loss(net), expected)
