"""HOPE's memory against float64 references, its laws, and the pace at which CMS levels write."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import counted

import hope
import model

# Five tokens a frame: the action and a grid of 2 x 2 patches
B, H, P, d = 2, 2, 5, 6
VARIANTS = [{'rule': 'delta'}, {'rule': 'dgd'}, {'conv': False}, {'surprise': False}, {'self_targets': False},
            {'adapts': ('k', 'mem'), 'rule': 'dgd'}, {'memory_hidden': 4, 'rule': 'delta'},
            {'memory_hidden': 4, 'rule': 'dgd'}]
RULES = pytest.mark.parametrize('rule', ['delta', 'dgd'])
STILL = torch.ones(1, 1, d, d), torch.zeros(1, 1, d, d)


def memory_layer(seed=0, **variant):
    torch.manual_seed(seed)
    memory = hope.TwoLayerTitanMemory if variant.get('memory_hidden') else hope.TitanMemory
    layer = memory(model.Sizes(**{'width': H * d, 'heads': H, 'grid': (2, 2), **variant})).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return layer


def without_randomness(layer, eta):
    """A matrix memory that starts at the identity, whose rates do not depend on the token and that keeps everything."""
    with torch.no_grad():
        layer.memory.copy_(F.pad(torch.eye(d).repeat(3, 1), (0, 0, 0, 2)))
        layer.eta_bias.fill_(torch.tensor(eta).double().expm1().log().item())
        layer.alpha_bias.fill_(-40.0)
    return layer


def turn(tokens, seed=2):
    """A rope of random angles for `tokens` tokens; seed None goes on with the random numbers."""
    if seed is not None:
        torch.manual_seed(seed)
    angle = torch.randn(1, 1, tokens, d).double()[..., ::2].repeat_interleave(2, -1)
    return angle.cos(), angle.sin()


def chunk(seed=1, tokens=P):
    torch.manual_seed(seed)
    return (*torch.randn(2, B, H, tokens, d).double(), turn(tokens, seed))


def fresh(layer, clips=B):
    """The state of a new clip."""
    return torch.zeros(clips, *layer.start().shape).double()


def write(layer, state, k_in, v_in, rope):
    """The state after one chunk: state, k_in and v_in (B,H,...), the rope for all of them."""
    learned = layer.learned(len(state))
    weights = learned['start'] + state.flatten(0, 1)
    flat = (x.flatten(0, 1) for x in (k_in, v_in))
    new = layer.write(weights, layer.parts(weights, learned), learned, *flat, [r[0] for r in rope])
    return (new - learned['start']).view(state.shape)


def read(layer, state, part, x):
    """A part of M(x) with a state: x (B,H,P,d) → (B,H,P,.)."""
    learned = layer.learned(len(state))
    parts = layer.parts(learned['start'] + state.flatten(0, 1), learned)
    return layer.read(parts[part], x.flatten(0, 1)).unflatten(0, x.shape[:2])


def convolved(layer, x):
    """The convolution by its definition, patch by patch: each adds up its neighbours in the grid, weighted, (B,T,P,C)."""
    if layer.conv is None:
        return x
    weight, seen = layer.conv.weight[:, 0], x.clone()                  # (C,3,3)
    for row in range(2):
        for column in range(2):
            total = layer.conv.bias
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    if 0 <= row + down < 2 and 0 <= column + right < 2:
                        neighbour = x[:, :, 1 + 2 * (row + down) + column + right]
                        total = total + weight[:, 1 + down, 1 + right] * neighbour
            seen[:, :, 1 + 2 * row + column] = x[:, :, 1 + 2 * row + column] + total
    return seen


def token_by_token(layer, x, rope, memory=None):
    """
    The reference: one clip, one head, one token after the other, by the definitions. A layer with weights W is written for
    the keys k of a frame towards u: minus the gradient at its output (DGD), or its output minus the gradient (delta rule),
    by recursive least squares in place of the closed form. → y (B,T,P,C), state.
    """
    T, two = x.shape[1], isinstance(layer, hope.TwoLayerTitanMemory)
    rows = layer.memory.shape[1]
    memory = fresh(layer, len(x)) if memory is None else memory
    qkv = layer.qkv(convolved(layer, x)).view(len(x), T, P, 3, H, d)

    def rotated(v, which, t, i):
        cos, sin = (r[0, 0, t * P + i] for r in rope[which])
        return v * cos + torch.stack([-v[1::2], v[::2]], -1).flatten() * sin

    def unit(v):
        return v / v.norm().clamp(min=1e-3)

    def written(start, change, keep, keys, etas, outputs, gradients):
        """A layer's change after one key after the other."""
        M = start + keep * change
        inverse = torch.eye(len(keys[0])).double()
        for k, eta, output, gradient in zip(keys, etas, outputs, gradients):
            u = -gradient if layer.rule == 'dgd' else output - gradient
            gain = inverse @ k * eta / (1 + eta * (k @ inverse @ k))
            M = M + torch.outer(u - M @ k, gain)
            inverse = inverse - torch.outer(gain, inverse @ k)
        return M - start

    ys, states = [], []
    for b in range(len(x)):
        outputs = []
        for n in range(H):
            M_0, state, column = layer.memory[n], memory[b, n], []

            def W1():
                return layer.layer1[n] + state[:rows]

            def W2():
                return layer.layer2[n] + state[rows:].T

            def M(v):
                if not two:
                    return (M_0 + state) @ v
                return M_0 @ v + W1() @ torch.tanh(W2() @ v) / 2       # the root of 4 hidden channels

            for t in range(T):
                q, k_in, v_in = qkv[b, t, :, :, n].unbind(1)
                ks, etas, alphas, errors, hiddens, zs, backs = ([] for _ in range(7))
                for i in range(P):
                    k, v = rotated(unit(M(k_in[i])[:d]), 1, t, i), unit(M(v_in[i])[d:2 * d])
                    eta, alpha = M(k_in[i])[3 * d:]
                    if layer.self_targets:
                        target = torch.cat([part / part.norm().clamp(min=1) for part in M(v).split([d, d, d, 2])])
                    else:
                        target = torch.cat([v, v, v, torch.zeros(2)])
                    error = M(k) - target                              # the gradient of 1/2 |M(k) - t|^2 at the output
                    eta = F.softplus(eta + layer.eta_bias[n, 0])
                    if layer.surprise:
                        surprise = error[2 * d:3 * d].square().sum()
                        eta = eta * surprise / (surprise + F.softplus(layer.gate_bias[n, 0]))
                    ks.append(k), etas.append(eta), errors.append(error)
                    alphas.append(torch.exp(-F.softplus(alpha + layer.alpha_bias[n, 0]) / P))
                    if two:
                        z = W2() @ k
                        jacobian = W1() @ torch.diag((1 - torch.tanh(z) ** 2) / 2)
                        zs.append(z), hiddens.append(torch.tanh(z) / 2)
                        backs.append(jacobian.T @ error / (1 + jacobian.square().sum()))
                keep = torch.stack(alphas).prod()
                if not two:
                    new = written(M_0, state, keep, ks, etas, [M(k) for k in ks], errors)
                    state = new if layer.adapting is None else torch.where(layer.adapting, new, state)
                else:
                    new1 = written(layer.layer1[n], state[:rows], keep, hiddens, etas, [W1() @ a for a in hiddens], errors)
                    new2 = written(layer.layer2[n], state[rows:].T, keep, ks, etas, zs, backs)
                    state = torch.cat([new1, new2.T])
                column.append(torch.stack([M(rotated(unit(q[i] + layer.query_bias[n, 0]), 0, t, i))[2 * d:3 * d]
                                           for i in range(P)]))
            outputs.append(torch.stack(column))                        # (T,P,d)
            states.append(state)
        ys.append(torch.cat(outputs, -1))
    return layer.proj(torch.stack(ys)), torch.stack(states).unflatten(0, (len(x), H))


@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_exact(variant):
    """Outputs, state and every gradient against the token-by-token loop, with a memory carried in."""
    layer, T = memory_layer(**variant), 3
    torch.manual_seed(5)
    x = torch.randn(B, T, P, H * d, dtype=torch.float64, requires_grad=True)
    carried = (0.1 * torch.randn_like(fresh(layer))).requires_grad_()
    rope = turn(T * P, 3), turn(T * P, 4)
    leaves = [x, carried, *layer.parameters()]
    results = []
    for run in (layer, lambda *args: token_by_token(layer, *args)):
        y, state = run(x, rope, carried)
        weight = torch.linspace(-1, 1, y.numel()).double().view(y.shape)
        total = (y * weight).sum() + state.square().sum()
        results.append([y, state, *torch.autograd.grad(total, leaves, allow_unused=True)])
    for ours, reference in zip(*results):
        assert (ours is None) == (reference is None)
        if ours is not None:
            torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)


@RULES
def test_one_token_is_the_rule_of_the_name(rule):
    """
    With beta = eta / (1 + eta) and retention a, M_a = M_0 + a (M - M_0):
    DGD, the plan's formula: M_a (I - beta k k^T) - beta (M k - t) k^T. Delta rule: M_a - beta (M_a k - t) k^T.
    """
    layer, (k_in, v_in, rope) = memory_layer(surprise=False, rule=rule), chunk(tokens=1)
    with torch.no_grad():
        state = 0.1 * torch.randn_like(fresh(layer))
        new = layer.memory + write(layer, state, k_in, v_in, rope)
        M = layer.memory + state
        k = hope.rotate(hope.unit(read(layer, state, 'k', k_in)), rope).mT   # (B,H,d,1)
        t = read(layer, state, 'all', hope.unit(read(layer, state, 'v', v_in))).mT
        t = torch.cat([part / part.norm(dim=2, keepdim=True).clamp(min=1) for part in t.split([d, d, d, 2], 2)], 2)
        eta, alpha = read(layer, state, 'rates', k_in)[:, :, 0, :, None, None].unbind(2)
        eta, alpha = F.softplus(eta + layer.eta_bias[..., None]), F.softplus(alpha + layer.alpha_bias[..., None])
        beta, M_a = eta / (1 + eta), layer.memory + torch.exp(-alpha) * state
        if rule == 'dgd':
            expected = M_a @ (torch.eye(d) - beta * k @ k.mT) - beta * (M @ k - t) @ k.mT
        else:
            expected = M_a - beta * (M_a @ k - t) @ k.mT
    torch.testing.assert_close(new, expected, rtol=0, atol=1e-12)


@RULES
def test_fixed_points(rule):
    """One pair shown again and again: DGD ends at M k = v / 2, the delta rule at M k = v."""
    layer = without_randomness(memory_layer(surprise=False, self_targets=False, conv=False, rule=rule), eta=0.5)
    torch.manual_seed(7)
    k, v = F.normalize(torch.randn(2, B, H, 1, d).double(), dim=-1)
    state, still = fresh(layer), [r[:, :, :1] for r in STILL]
    with torch.no_grad():
        for _ in range(200):
            # M_k and M_v adapt, too: what they turn into this key and this value
            M_k, M_v = (layer.memory + state).split([d, d, d + 2], 2)[:2]
            state = write(layer, state, torch.linalg.solve(M_k, k.mT).mT, torch.linalg.solve(M_v, v.mT).mT, still)
        found = read(layer, state, 'mem', k)
    torch.testing.assert_close(found, v / 2 if rule == 'dgd' else v, rtol=0, atol=1e-9)


@RULES
def test_the_two_layer_memory_is_well_conditioned(rule):
    """
    A rounding error of the input (a difference of 1e-8, or bfloat16's 4e-3) may grow in the state, but stays of its size:
    at the laptop's width, two clips long. Before its steps were bounded, 1e-8 grew a thousandfold over eight steps.
    """
    torch.manual_seed(0)
    net = hope.build(model.Sizes(model='hope', depth=1, mixer='titan', memory_hidden=24, rule=rule)).double()
    layer, rope = net.predictor_blocks[0].titan, net.rope(16, 1, 16, None, 'cpu')
    x = torch.randn(2, 16, 17, 96).double()
    noise = torch.randn_like(x)
    with torch.no_grad():
        _, state = layer(x, rope)
        for size in (1e-8, 4e-3):
            _, moved = layer(x + size * noise, rope)
            assert (moved - state).norm() < 5 * size * state.norm()


def test_the_tokens_of_a_frame_have_no_order():
    layer, (k_in, v_in, (cos, sin)) = memory_layer(), chunk()
    order = torch.randperm(P)
    shuffled = [x[:, :, order] for x in (k_in, v_in, cos, sin)]
    torch.testing.assert_close(write(layer, fresh(layer), k_in, v_in, (cos, sin)),
                               write(layer, fresh(layer), *shuffled[:2], shuffled[2:]), rtol=0, atol=1e-12)


@pytest.mark.parametrize('pairs', [d, 32])
def test_recall_after_one_write(pairs):
    """
    After one pass the error of orthonormal keys has fallen by the factor 1 + eta. Of 32 random pairs, more than a memory
    of 6 columns can hold, what is left is the ridge regression's: the least that any such memory can reach.
    """
    eta = 50.0
    layer = without_randomness(memory_layer(surprise=False, rule='delta'), eta)
    torch.manual_seed(3)
    keys, values = torch.randn(2, B, H, pairs, d).double()
    keys = torch.linalg.qr(keys)[0] if pairs == d else keys
    keys, values = (x / x.norm(dim=-1, keepdim=True) for x in (keys, values))
    still = torch.ones(1, 1, pairs, d), torch.zeros(1, 1, pairs, d)
    state = write(layer, fresh(layer), keys, values, still)
    before, after = (values - keys).norm(), (values - read(layer, state, 'mem', keys)).norm()
    if pairs == d:
        torch.testing.assert_close(before / after, torch.tensor(1 + eta).double(), rtol=1e-4, atol=0)
    else:
        best = torch.linalg.lstsq(keys, values).solution
        assert (values - keys @ best).norm() <= after < 1.01 * (values - keys @ best).norm() < 0.9 * before


@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_memory_carried_over_two_calls_is_one_long_call(variant):
    layer, T = memory_layer(**variant), 6
    x, rope = torch.randn(B, T, P, H * d).double(), turn(T * P)
    whole, end = layer(x, (rope, rope))
    cut = [tuple(r[:, :, part] for r in rope) for part in (slice(0, 2 * P), slice(2 * P, None))]
    first, memory = layer(x[:, :2], (cut[0], cut[0]))
    second, memory = layer(x[:, 2:], (cut[1], cut[1]), memory)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(memory, end, rtol=0, atol=1e-12)


@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_clips_do_not_touch_each_other(variant):
    """The write of one clip changes no other clip's memory or output."""
    layer = memory_layer(**variant)
    x, rope = torch.randn(3, 4, P, H * d).double(), turn(4 * P)
    other = x.clone()
    other[1] = torch.randn_like(other[1])
    (y, memory), (y2, memory2) = layer(x, (rope, rope)), layer(other, (rope, rope))
    for row in (0, 2):
        assert torch.equal(y[row], y2[row]) and torch.equal(memory[row], memory2[row])
    assert not torch.allclose(memory[1], memory2[1])


def test_a_memory_that_is_not_written_is_a_plain_network():
    """eta = 0: the state stays zero, and a read is M_0 (or the initial two layers) applied to the rotated query."""
    for variant in ({}, {'memory_hidden': 4}):
        layer = memory_layer(**variant)
        with torch.no_grad():
            layer.eta_bias.fill_(-200.0)
        x, rope = torch.randn(B, 2, P, H * d).double(), turn(2 * P)
        y, memory = layer(x.view(B, 2, P, -1), (rope, rope))
        assert memory.abs().max() < 1e-12
        q = layer.qkv(convolved(layer, x.view(B, 2, P, -1)))[..., :H * d].view(B, 2 * P, H, d).transpose(1, 2)
        found = read(layer, fresh(layer), 'mem', hope.rotate(hope.unit(q + layer.query_bias), rope))
        torch.testing.assert_close(y, layer.proj(found.transpose(1, 2).reshape(B, 2, P, H * d)), rtol=0, atol=1e-12)


def test_memories_that_do_not_adapt_stay():
    layer = memory_layer(adapts=('v', 'alpha'))
    state = write(layer, fresh(layer), *chunk())
    moved = state.abs().amax((0, 1, 3)) > 0
    assert moved.tolist() == [False] * d + [True] * d + [False] * d + [False, True]


def test_the_convolution_knows_the_grid_and_not_the_order_of_tokens():
    """It spans rows and columns, wraps around no border, and the action takes no part in it."""
    layer = memory_layer(grid=(2, 3))
    x = torch.randn(1, 1, 7, H * d).double()
    near = {}
    for i in range(7):
        other = x.clone()
        other[:, :, i] += 1
        changed = (layer.see_neighbours(other) - layer.see_neighbours(x)).abs().sum(-1)[0, 0] > 1e-9
        near[i] = changed.nonzero().flatten().tolist()
    assert near == {0: [0], 1: [1, 2, 4, 5], 2: [1, 2, 3, 4, 5, 6], 3: [2, 3, 5, 6],
                    4: [1, 2, 4, 5], 5: [1, 2, 3, 4, 5, 6], 6: [2, 3, 5, 6]}


def test_the_gate_opens_with_the_retrieval_error():
    """The same frame shown again and again is less and less of a surprise, and is written less and less."""
    layer, seen = memory_layer(), chunk()
    state, layer.diagnostics = fresh(layer), []
    for _ in range(6):
        state = write(layer, state, *seen)
    surprise, gate = ([step[key].item() for step in layer.diagnostics] for key in ('surprise', 'gate'))
    assert surprise[-1] < 0.8 * surprise[0] and gate[-1] < gate[0] and 0 < min(gate) and max(gate) < 1


def test_a_new_memory_keeps_four_fifths_over_a_clip():
    """Retention that starts lower leaves nothing to remember: from 0.5 a step, 0.3 % after a clip."""
    layer = hope.TitanMemory(model.Sizes(width=H * d, heads=H)).double()
    with torch.no_grad():
        layer.eta_bias.fill_(-40.0)                                    # nothing is written: what is left is retention
    state = start = fresh(layer) + 0.1
    for t in range(8):
        state = write(layer, state, *chunk(t))
    assert 0.8 < state.norm() / start.norm() < 1


@counted(1000, 10_000)
@pytest.mark.parametrize('variant', [VARIANTS[0], VARIANTS[1], *VARIANTS[-2:]], ids=str)
def test_extreme_rates_stay_finite(variant, count):
    """Random writes, each head with other rates of writing and of forgetting: none, some, and as good as infinite."""
    rates = [(eta, alpha) for eta in (-100.0, 0.0, 1000.0) for alpha in (-100.0, 100.0)]
    layer = memory_layer(width=6 * d, heads=6, **variant)
    torch.manual_seed(1)
    with torch.no_grad():
        for head, (eta, alpha) in enumerate(rates):
            layer.eta_bias[head], layer.alpha_bias[head] = eta, alpha
        state = fresh(layer)
        for _ in range(count):
            k_in, v_in = 100 * torch.randn(2, B, 6, P, d).double()
            state = write(layer, state, k_in, v_in, turn(P, seed=None))
    assert state.isfinite().all() and state.abs().max() < 1e4


@counted(1000, 10_000)
@pytest.mark.parametrize('variant', [{'surprise': False}, {'surprise': False, 'memory_hidden': 4}], ids=str)
def test_a_memory_does_not_feed_on_itself(variant, count):
    """
    All keys of a frame ask for the same self-generated target, along the sum of the keys, thousands of times, and nothing
    is forgotten. The matrix memory comes to rest; that of two layers grows no faster than the root of the number of writes.
    """
    layer = memory_layer(**variant)
    keys = torch.linalg.qr(torch.randn(1, H, d, d).double())[0]
    same = keys.sum(2, keepdim=True).expand(-1, -1, d, -1).contiguous()
    state = fresh(layer, 1)
    with torch.no_grad():
        layer.eta_bias.fill_(10.0)
        layer.alpha_bias.fill_(-40.0)
        for _ in range(count):
            state = write(layer, state, keys, same, STILL)
    assert state.norm() < (12 * count ** 0.5 if 'memory_hidden' in variant else 20)


def test_an_idle_token_has_a_finite_gradient():
    """An action token of zeros reaches the memory as an exact zero; its length must not be divided by."""
    layer = memory_layer()
    x = torch.zeros(B, 1, P, H * d, dtype=torch.float64, requires_grad=True)
    still = torch.ones(1, 1, P, d), torch.zeros(1, 1, P, d)
    layer(x, (still, still))[0].sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() < 1e6


def test_a_deep_predictor_with_idle_actions_has_a_finite_gradient():
    """Action tokens are zero after step 1; they must not stay exactly zero through all blocks (LayerNorm's gradient)."""
    torch.manual_seed(0)
    net = hope.build(model.Sizes(model='hope', feature_dim=12, grid=(2, 2), depth=12, width=24, heads=2, cms_hidden=32))
    z, a = F.layer_norm(torch.randn(4, 8, 4, 12), (12,)), torch.zeros(4, 8, 2)
    a[:, 0] = 1
    model.teacher_forcing_loss(net, z, a)[0].backward()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    assert norm.isfinite() and norm < 1e3


def test_memory_stays_in_float32_under_bfloat16():
    torch.manual_seed(0)
    net = hope.build(model.Sizes(model='hope', feature_dim=12, grid=(2, 2), depth=2, width=24, heads=2, cms_hidden=16))
    z, a = F.layer_norm(torch.randn(2, 8, 4, 12), (12,)), torch.randn(2, 8, 2)
    with torch.autocast('cpu', torch.bfloat16):
        low, memory = net(z, a)
    exact = net(z, a)[0]
    assert memory[0].dtype == torch.float32
    assert (low - exact).abs().mean() < 0.05 * exact.abs().mean()


def cms_model(depth=2):
    torch.manual_seed(0)
    sizes = model.Sizes(model='hope', feature_dim=12, grid=(2, 2), depth=depth, width=24, heads=2, cms_hidden=16)
    net = hope.build(sizes).double().eval()
    z = F.layer_norm(torch.randn(3, 8, 4, 12).double(), (12,))
    actions = torch.zeros(3, 8, 2).double()
    actions[:, 0] = torch.randn(3, 2)

    def loss(run):
        return model.jump_loss(run, z[:1], actions[:1], torch.tensor([7]))[0]
    return net, loss


def test_cms_levels_write_at_their_own_pace():
    """Each level's weights change at its ticks and at no other time; a level that never writes is a plain MLP."""
    net, loss = cms_model()
    writer = hope.CMSWriter(net, 1.0)
    before = {name: p.clone() for name, p in net.named_parameters()}
    for tick in range(1, 33):
        changes = dict(writer.changes)
        value = loss(writer)
        writer.tick(value, value.detach())                             # as good as unwritten: nothing is forgotten
        for level, period in zip(writer.levels, net.sizes.cms_periods):
            for name in level:
                assert torch.equal(changes[name], writer.changes[name]) != (tick % period == 0), (tick, name)
    assert all(level['drift'] > 0 and level['write norm'] > 0 for level in writer.diagnostics())
    assert [level['writes'] for level in writer.diagnostics()] == [32, 8, 2]
    assert all(torch.equal(before[name], p) for name, p in net.named_parameters())  # the predictor itself is not touched
    written = {name for level in writer.levels for name in level}
    assert written == {n for n, _ in net.named_parameters() if '.cms.levels.' in n}


def test_cms_write_is_eq_71():
    """After a window: what was retained, minus the level's rate times the retained sum of the gradients of loss^2 / 2."""
    net, loss = cms_model()
    name = 'predictor_blocks.0.cms.levels.1.fc2.weight'
    writer = hope.CMSWriter(net, 0.5)
    writer.changes[name] = start = 0.01 * torch.randn_like(writer.changes[name])
    writer.refresh()
    total = 0
    for _ in range(4):
        value = loss(writer)
        gradient = torch.autograd.grad(value.square() / 2, writer.weights[name], retain_graph=True)[0]
        total = 0.9 ** 4 * (total + gradient)
        writer.tick(value, 0.9 * value.detach())                       # the unwritten weights would have been better
    expected = 0.9 ** 16 * start - 0.5 / 4 * total
    torch.testing.assert_close(writer.changes[name], expected)


def test_cms_goes_on_from_its_state():
    net, loss = cms_model()
    first = hope.CMSWriter(net, 5.0)
    for _ in range(3):
        first.tick(loss(first), torch.tensor(0.9))
    second = hope.CMSWriter(net, 5.0)
    second.load(first.state())
    for _ in range(3):
        assert torch.equal(loss(first), loss(second))
        first.tick(loss(first), torch.tensor(0.9)), second.tick(loss(second), torch.tensor(0.9))


def test_what_did_worse_than_no_writes_is_forgotten():
    net, loss = cms_model()
    writer = hope.CMSWriter(net, 5.0)
    value = loss(writer)
    writer.tick(value, value.detach())
    learned = {name: c.clone() for name, c in writer.changes.items()}
    writer.rate = 0.0
    value = loss(writer)
    writer.tick(value, 3 * value.detach())                             # the writes helped: they stay
    assert all(torch.equal(learned[name], c) for name, c in writer.changes.items())
    value = loss(writer)
    writer.tick(value, 0.3 * value.detach())                           # the old world is back
    assert all(torch.allclose(0.0081 * learned[name], c) for name, c in writer.changes.items())


@pytest.mark.parametrize('mixer', ['attention', 'both'])
def test_mixers(mixer):
    torch.manual_seed(0)
    sizes = model.Sizes(model='hope', feature_dim=12, grid=(2, 2), depth=2, width=24, heads=2, cms_hidden=16, mixer=mixer)
    net = hope.build(sizes)
    z, a = F.layer_norm(torch.randn(2, 8, 4, 12), (12,)), torch.randn(2, 8, 2)
    z_hat, memory = net(z, a)
    z2 = z.clone()
    z2[:, 5:] += 1
    torch.testing.assert_close(net(z2, a)[0][:, :5], z_hat[:, :5])     # block-causal
    assert len(memory) == (1 if mixer == 'attention' else 3)


@pytest.mark.parametrize('checkpointing', [False, True])
def test_no_graph_breaks_under_compile(checkpointing):
    """Traced in one piece, forward and backward (without generating code, which takes a compiler and minutes)."""
    net, loss = cms_model(depth=1)
    expected = loss(net)
    net.checkpointing = checkpointing
    net.compile(backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(loss(net), expected)
    loss(net).sum().backward()


# ---- the action memory -------------------------------------------------------------------------------------------------

def action_memory(A=2, **sizes):
    """An action memory in float64 with random weights."""
    torch.manual_seed(0)
    layer = hope.ActionMemory(model.Sizes(feature_dim=12, grid=(2, 2), steps=5, action_dim=A, **sizes)).double()
    layer.scale.fill_(0.5)
    return layer


class Sees(torch.nn.Module):
    """In place of the inverse: sees a push as `world` changes it. The clip's features are the push that was given."""

    def __init__(self, layer, world):
        super().__init__()
        self.scale, self.world, self.mlp = layer.scale, world, layer.inverse.mlp

    def forward(self, z, shown=None):
        return self.world(z[:, 0, 0]) / self.scale


def shows(layer, world, pushes, state=None):
    """The state after clips with these pushes (n,A) were shown one after the other in a world."""
    layer.inverse = Sees(layer, world)
    for push in pushes:
        state = layer.write(push[None, None, None], push[None], state)
    return state


def some_pushes(n, A=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(n, A, generator=generator, dtype=torch.float64)
    size = 0.25 + 0.55 * torch.rand(n, 1, generator=generator, dtype=torch.float64)
    return size * hope.unit(direction)


@pytest.mark.parametrize('A', [1, 2, 3, 7])
def test_action_memory_is_weighted_least_squares(A):
    """Against a loop that keeps every association with its weight and solves for M anew after each clip."""
    layer = action_memory(A)
    generator = torch.Generator().manual_seed(1)
    z = F.layer_norm(torch.randn(20, 4, 4, 12, generator=generator, dtype=torch.float64), (12,))
    pushes = some_pushes(20, A)
    scale = layer.scale.item()
    start = torch.eye(A, 2 * A, dtype=torch.float64)
    M, kept, state = start, [], None
    for i in range(20):
        a, seen = pushes[i], layer.inverse(z[i:i + 1])[0].detach() * scale
        size = a.norm()
        features = torch.cat([a / scale, a / size])
        # Both forms, in units: M a = scale M (a / scale, a / |a|).
        torch.testing.assert_close(layer(a[None, None], state)[0, 0], scale * M @ features, rtol=1e-10, atol=1e-12)
        e = (seen - scale * M @ features).norm() / size
        e_0 = (seen - a).norm() / size
        alpha = min(1, (e_0 / e).item()) ** 2 / (1 + (e / 0.35) ** 2)
        kept = [(alpha * weight, k, v) for weight, k, v in kept]
        length = features.norm()
        kept.append((30.0, features / length, seen / scale / length))
        gram = torch.eye(2 * A, dtype=torch.float64) + sum(w * torch.outer(k, k) for w, k, v in kept)
        M = (start + sum(w * torch.outer(v, k) for w, k, v in kept)) @ torch.linalg.inv(gram)
        state = layer.write(z[i:i + 1], a[None], state)
        torch.testing.assert_close(layer.matrix(state)[0], M, rtol=1e-10, atol=1e-10)


def turned(push, degrees=40.0, gain=1.0):
    angle = math.radians(degrees)
    rotation = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    return gain * push @ rotation.T


@pytest.mark.parametrize('world', [
    lambda push: 1.7 * push,
    turned,
    # Friction takes away a constant amount along the push.
    lambda push: push - 0.1 * push / push.norm(dim=-1, keepdim=True),
    lambda push: turned(1.5 * push + 0.08 * push / push.norm(dim=-1, keepdim=True), -70),
])
def test_action_memory_learns_a_world_and_forgets_it_at_home(world):
    layer = action_memory()
    state = shows(layer, lambda push: push, some_pushes(50))
    state = shows(layer, world, some_pushes(25, seed=1), state)
    new = some_pushes(50, seed=2)
    seen = world(new)
    wrong = (layer(new[:, None], state.expand(50, -1, -1))[:, 0] - seen).norm(dim=1)
    assert wrong.mean() < 0.1 * (new - seen).norm(dim=1).mean()
    # Back home: two clips in different directions suffice.
    state = shows(layer, lambda push: push, torch.tensor([[0.5, 0.0], [0.0, 0.5]], dtype=torch.float64), state)
    wrong = (layer(new[:, None], state.expand(50, -1, -1))[:, 0] - new).norm(dim=1)
    assert wrong.mean() < 0.1 * (new - seen).norm(dim=1).mean()


def test_action_memory_stays_finite_under_any_input():
    """100 streams of 100 clips with pushes of any size and direction, none at all among them."""
    layer = action_memory().float()
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 16, (100, 100, 1), generator=generator)
    pushes = torch.randn(100, 100, 2, generator=generator) * 10.0 ** exponents
    pushes[::7, ::3] = 0
    state = None
    for push in pushes:
        z = 1000 * torch.randn(100, 4, 4, 12, generator=generator)
        state = layer.write(z, push, state)
        assert state.isfinite().all() and layer.matrix(state).isfinite().all()
        assert layer(push[:, None], state).isfinite().all()


def test_a_clip_without_a_push_writes_nothing():
    layer = action_memory()
    state = shows(layer, turned, some_pushes(5))
    assert torch.equal(shows(layer, turned, torch.zeros(1, 2, dtype=torch.float64), state), state)


def test_clips_of_a_batch_have_action_memories_of_their_own():
    layer = action_memory()
    z, a = torch.randn(3, 4, 4, 12, dtype=torch.float64), some_pushes(3)
    state = layer.write(z, a)
    alone = torch.cat([layer.write(z[i:i + 1], a[i:i + 1]) for i in range(3)])
    torch.testing.assert_close(state, alone)
    # A handful of bytes.
    assert state[0].float().nbytes == 96


@pytest.mark.parametrize('kind', ['hope', 'vit'])
def test_the_action_reaches_the_predictor_through_its_memory_alone(kind):
    """A push under a memory is predicted as the push that it stands for; teacher forcing writes it, a jump reads it."""
    torch.manual_seed(0)
    sizes = model.Sizes(model=kind, feature_dim=12, grid=(2, 2), steps=5, depth=2, width=24, heads=2, mlp_hidden=16, cms_hidden=16)
    net = hope.build(sizes).double()
    z = F.layer_norm(torch.randn(2, 5, 4, 12, dtype=torch.float64), (12,))
    a = torch.zeros(2, 5, 2, dtype=torch.float64)
    a[:, 0] = some_pushes(2)
    M = torch.cat([1.5 * turned(torch.eye(2, dtype=torch.float64)).T, torch.zeros(2, 2, dtype=torch.float64)], 1)
    state = net.action_memory.state_of(M).expand(2, -1, -1)
    torch.testing.assert_close(net.action_memory.matrix(state)[0], M)
    expected = net(z, turned(a, gain=1.5))[0]
    z_hat, memory = net(z, a, memory=[state])
    torch.testing.assert_close(z_hat, expected)
    # Written by the clip, which changed nothing in the clip's own prediction.
    assert torch.equal(memory[0], net.action_memory.write(z, a[:, 0], state)) and not torch.equal(memory[0], state)
    tau = torch.tensor([3, 4])
    jump, after = net(z[:, :1], a[:, :1], tau=tau, memory=memory)
    assert torch.equal(after[0], memory[0])
    assert not torch.allclose(jump, net(z[:, :1], a[:, :1], tau=tau)[0])
    # One step shows no motion.
    assert torch.equal(net(z[:, :1], a[:, :1], memory=[state])[1][0], state)


def test_the_inverse_learns_alone():
    """Its loss gives no gradient to the predictor, and the predictor's losses none to it."""
    torch.manual_seed(0)
    sizes = model.Sizes(feature_dim=12, grid=(2, 2), steps=5, depth=1, width=24, heads=2, cms_hidden=16)
    net = hope.build(sizes)
    z, a = F.layer_norm(torch.randn(2, 5, 4, 12), (12,)), torch.randn(2, 5, 2)
    net.action_memory.loss(z, a).backward()
    assert {n.split('.')[0] for n, p in net.named_parameters() if p.grad is not None} == {'action_memory'}
    net.zero_grad()
    (model.teacher_forcing_loss(net, z, a)[0] + model.jump_loss(net, z, a, torch.tensor([3, 4])).mean()).backward()
    assert all(p.grad is None for p in net.action_memory.parameters())


def test_the_inverse_reads_the_steps_that_were_shown():
    """Steps that are cut off count as steps that are not given."""
    inverse = action_memory().inverse
    z = torch.randn(3, 5, 4, 12, dtype=torch.float64)
    cut = inverse(z, shown=torch.tensor([2, 3, 5]))
    torch.testing.assert_close(cut, torch.cat([inverse(z[:1, :2]), inverse(z[1:2, :3]), inverse(z[2:])]))
