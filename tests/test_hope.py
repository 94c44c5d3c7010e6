"""HOPE's memory against float64 references, its laws, and the pace at which CMS levels write."""
import pytest
import torch
import torch.nn.functional as F

import hope
import model

B, H, P, d = 2, 3, 5, 6


def memory_layer(seed=0):
    torch.manual_seed(seed)
    layer = hope.TitanMemory(H * d, H).double()
    with torch.no_grad():
        layer.memory.add_(0.3 * torch.randn_like(layer.memory))
        layer.eta_bias.normal_()
        layer.alpha_bias.normal_()
    return layer


def chunk(seed=1, tokens=P):
    torch.manual_seed(seed)
    angle = torch.randn(1, 1, tokens, d).double()
    angle = angle[..., ::2].repeat_interleave(2, -1)
    return (*torch.randn(2, B, H, tokens, d).double(), (angle.cos(), angle.sin()))


def unit(x):
    return x / x.norm().clamp(min=1e-3)


def parts(layer, M, k_in, v_in, rope):
    """k, target, eta and alpha of each token, by the definitions, for one clip and head."""
    cos, sin = rope
    for i in range(k_in.shape[0]):
        k = unit(M[:d] @ k_in[i])
        k = k * cos[0, 0, i] + torch.stack([-k[1::2], k[::2]], -1).flatten() * sin[0, 0, i]
        target = M @ unit(M[d:2 * d] @ v_in[i])
        target = torch.cat([part / part.norm().clamp(min=1) for part in target.split([d, d, d, 2])])
        yield k, target, M[3 * d] @ k_in[i], M[3 * d + 1] @ k_in[i]


def test_write_minimises_its_objective():
    """The closed form against the objective's own gradient, which must vanish at the written memory."""
    layer, (k_in, v_in, rope) = memory_layer(), chunk()
    M_c = layer.memory.detach() + 0.1 * torch.randn(B, H, 3 * d + 2, d).double()
    written = layer.write(M_c, k_in, v_in, rope).detach()
    for b in range(B):
        for h in range(H):
            M = written[b, h].clone().requires_grad_()
            log_alpha, error = 0, 0
            for k, target, eta, alpha in parts(layer, M_c[b, h], k_in[b, h], v_in[b, h], rope):
                log_alpha = log_alpha - F.softplus(alpha + layer.alpha_bias[h, 0]) / P
                error = error + F.softplus(eta + layer.eta_bias[h, 0]) * (M @ k - target).square().sum()
            M_0 = layer.memory[h].detach()
            kept = M_0 + torch.exp(log_alpha) * (M_c[b, h] - M_0)
            ((M - kept).square().sum() + error).backward()
            assert M.grad.abs().max() < 1e-10


def test_one_token_is_delta_gradient_descent():
    """For one key the step is DGD's: M - beta (M k - target) k^T with beta = eta / (1 + eta), after the retention."""
    layer, (k_in, v_in, rope) = memory_layer(), chunk(tokens=1)
    M_c = layer.memory.detach() + 0.1 * torch.randn(B, H, 3 * d + 2, d).double()
    written = layer.write(M_c, k_in, v_in, rope)
    for b in range(B):
        for h in range(H):
            (k, target, eta, alpha), = parts(layer, M_c[b, h], k_in[b, h], v_in[b, h], rope)
            eta = F.softplus(eta + layer.eta_bias[h, 0])
            M_0 = layer.memory[h]
            kept = M_0 + torch.exp(-F.softplus(alpha + layer.alpha_bias[h, 0])) * (M_c[b, h] - M_0)
            expected = kept - eta / (1 + eta) * torch.outer(kept @ k - target, k)
            torch.testing.assert_close(written[b, h], expected, rtol=0, atol=1e-10)


def test_the_tokens_of_a_frame_have_no_order():
    layer, (k_in, v_in, (cos, sin)) = memory_layer(), chunk()
    order = torch.randperm(P)
    M = layer.memory.expand(B, -1, -1, -1)
    torch.testing.assert_close(layer.write(M, k_in, v_in, (cos, sin)),
                               layer.write(M, k_in[:, :, order], v_in[:, :, order], (cos[:, :, order], sin[:, :, order])),
                               rtol=0, atol=1e-12)


def test_recall_after_one_write():
    """One write of keys K with values V, strength eta: M K = target (I + (K^T K eta)^-1)^-1; orthonormal: eta / (1 + eta)."""
    layer = hope.TitanMemory(H * d, H).double()
    eta = 50.0
    with torch.no_grad():
        layer.memory.copy_(F.pad(torch.eye(d).repeat(3, 1), (0, 0, 0, 2)))
        layer.eta_bias.fill_(eta)
        layer.alpha_bias.fill_(-40.0)                                  # keeps everything
    keys = torch.linalg.qr(torch.randn(B, H, d, d).double())[0]
    values = torch.randn(B, H, d, d).double()
    values = values / values.norm(dim=-1, keepdim=True)
    still = torch.ones(1, 1, d, d), torch.zeros(1, 1, d, d)
    M = layer.write(layer.memory.expand(B, -1, -1, -1), keys, values, still)[:, :, 2 * d:3 * d]
    before, after = (values - keys).norm(), (values - keys @ M.mT).norm()
    torch.testing.assert_close(before / after, torch.tensor(1 + eta).double(), rtol=1e-4, atol=0)


def test_memory_carried_over_two_calls_is_one_long_call():
    torch.manual_seed(0)
    layer, T = memory_layer(), 6
    x = torch.randn(B, T, P, H * d).double()
    angle = torch.randn(1, 1, T * P, d).double()
    rope = angle.cos(), angle.sin()
    whole, end = layer(x, rope, rope)
    cut = [tuple(r[:, :, part] for r in rope) for part in (slice(0, 2 * P), slice(2 * P, None))]
    first, memory = layer(x[:, :2], cut[0], cut[0])
    second, memory = layer(x[:, 2:], cut[1], cut[1], memory)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(memory, end, rtol=0, atol=1e-12)


def test_a_new_memory_keeps_four_fifths_over_a_clip():
    """Known mistake 2: retention that starts so low that nothing can be remembered."""
    layer = hope.TitanMemory(H * d, H).double()
    with torch.no_grad():
        layer.eta_bias.fill_(-40.0)                                    # nothing is written: what is left is retention
    start = layer.memory.expand(B, -1, -1, -1) + 0.1
    M = start
    for t in range(8):
        M = layer.write(M, *chunk(t)[:2], chunk(t)[2])
    kept = (M - layer.memory).norm() / (start - layer.memory).norm()
    assert 0.8 < kept < 1


@pytest.mark.parametrize('eta_bias', [-100.0, 0.0, 1000.0])
@pytest.mark.parametrize('alpha_bias', [-100.0, 0.0, 100.0])
def test_extreme_rates_stay_finite(eta_bias, alpha_bias):
    layer = memory_layer()
    with torch.no_grad():
        layer.eta_bias.fill_(eta_bias)
        layer.alpha_bias.fill_(alpha_bias)
    M = layer.memory.detach().expand(B, -1, -1, -1)
    with torch.no_grad():
        for t in range(500):
            k_in, v_in, rope = chunk(t % 7)
            M = layer.write(M, 100 * k_in, 100 * v_in, rope)
    assert M.isfinite().all() and M.abs().max() < 1e4


def test_a_memory_does_not_feed_on_itself():
    """All keys of a frame ask for the same self-generated target, along the sum of the keys, 10,000 times."""
    layer = memory_layer()
    keys = torch.linalg.qr(torch.randn(B, H, d, d).double())[0]
    same = keys.sum(2, keepdim=True).expand(-1, -1, d, -1).contiguous()
    still = torch.ones(1, 1, d, d), torch.zeros(1, 1, d, d)
    M = layer.memory.detach().expand(B, -1, -1, -1)
    with torch.no_grad():
        layer.eta_bias.fill_(10.0)
        layer.alpha_bias.fill_(-40.0)
        for _ in range(10_000):
            M = layer.write(M, keys, same, still)
    assert M.isfinite().all() and M.norm() < 100


def test_memory_is_handed_to_other_clips_only():
    """Known mistake 6: a jump must not read a memory that has seen the same clip."""
    memory = [torch.arange(4.0).view(4, 1, 1, 1)]                      # of the clips 0, 4, 8, 12 of a batch of 16
    handed = hope.hand_on(memory, 16)[0].flatten().tolist()
    assert len(handed) == 16 and all(4 * m != clip for clip, m in enumerate(handed)) and set(handed) == {0, 1, 2, 3}
    with pytest.raises(ValueError):
        hope.hand_on([torch.zeros(1, 1, 1, 1)], 4)


def test_an_idle_token_has_a_finite_gradient():
    """An action token of zeros reaches the memory as an exact zero; its length must not be divided by."""
    layer = memory_layer()
    x = torch.zeros(B, 1, P, H * d, dtype=torch.float64, requires_grad=True)
    still = torch.ones(1, 1, P, d), torch.zeros(1, 1, P, d)
    layer(x, still, still)[0].sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() < 1e6


def test_a_deep_predictor_with_idle_actions_has_a_finite_gradient():
    """Action tokens are zero after step 1; they must not stay exactly zero through all blocks (LayerNorm's gradient)."""
    torch.manual_seed(0)
    net = model.build(model='hope', feature_dim=12, grid=(2, 2), depth=12, width=24, heads=2, cms_hidden=32)
    z, a = F.layer_norm(torch.randn(4, 8, 4, 12), (12,)), torch.zeros(4, 8, 2)
    a[:, 0] = 1
    model.teacher_forcing_loss(net, z, a)[0].backward()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    assert norm.isfinite() and norm < 1e3


def test_memory_stays_in_float32_under_bfloat16():
    torch.manual_seed(0)
    net = model.build(model='hope', feature_dim=12, grid=(2, 2), depth=2, width=24, heads=2, cms_hidden=16)
    z, a = F.layer_norm(torch.randn(2, 8, 4, 12), (12,)), torch.randn(2, 8, 2)
    with torch.autocast('cpu', torch.bfloat16):
        low, memory = net(z, a)
    exact = net(z, a)[0]
    assert memory[0].dtype == torch.float32
    assert (low - exact).abs().mean() < 0.05 * exact.abs().mean()


def cms_model():
    torch.manual_seed(0)
    net = model.build(model='hope', feature_dim=12, grid=(2, 2), depth=2, width=24, heads=2, cms_hidden=16).eval()
    z = F.layer_norm(torch.randn(1, 8, 4, 12), (12,))
    return net, lambda: model.jump_loss(net, z, torch.ones(1, 8, 2), torch.tensor([7])).sum()


def test_cms_levels_write_at_their_own_pace():
    """Known mistake 4: levels that were plain MLPs. Each level's weights change at its ticks and at no other time."""
    net, loss = cms_model()
    writer = hope.CMSWriter(net, rate=1.0, retention=1.0)
    level_of = {id(p): i for i, level in enumerate(writer.levels) for p in level}
    for tick in range(1, 33):
        before = {name: p.clone() for name, p in net.named_parameters()}
        writer.tick(loss())
        for name, p in net.named_parameters():
            due = id(p) in level_of and tick % hope.PERIODS[level_of[id(p)]] == 0
            assert torch.equal(before[name], p) != due, (tick, name)
    assert sorted(set(level_of.values())) == [0, 1, 2]
    assert all(drift > 0 for drift in writer.drift())


def test_cms_write_is_eq_71():
    """The weights after a window are the start minus rate / C times the sum of the window's gradients; then retention."""
    net, loss = cms_model()
    writer = hope.CMSWriter(net, rate=0.5, retention=0.9)
    medium = writer.levels[1][0]
    start, total = medium.detach().clone(), 0
    for _ in range(4):
        value = loss()
        total = total + torch.autograd.grad(value, medium, retain_graph=True)[0]
        writer.tick(value)
    torch.testing.assert_close(medium.detach(), start - 0.5 / 4 * total)
    written = medium.detach().clone()
    for p in net.parameters():
        p.data = p.data.detach()
    for _ in range(4):
        writer.tick(0 * sum(p.sum() for level in writer.levels for p in level))
    torch.testing.assert_close(medium.detach(), start + 0.9 * (written - start))
