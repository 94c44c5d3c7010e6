"""The world head against float64 references and its laws, and the made-up worlds on which it is trained."""
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, sizes, small_predictor, some_clips
from scipy import stats

import hope
import model
from support import worlds

HOME, NONE = hope.WorldHead.IS_HOME, hope.WorldHead.NONE
both = pytest.mark.parametrize('kind', ['vit', 'hope'])


def world_head(d=5, v=3, **constants):
    """A world head in float64 with small keys, none of whose parameters is at its initial value."""
    torch.manual_seed(0)
    small = type('Small', (hope.WorldHead,), {'KEY': d, 'VALUE': v, **constants})
    head = small(sizes(**SMALL)).double()
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return head


def empty(known):
    """The first empty hypothesis alone."""
    return {name: part[:, :1] for name, part in known.items()}


def scene_of(z):
    return z.flatten(0, 1).median(0).values


def predictor(kind='hope'):
    """A predictor whose world head says something, and which has a home."""
    net = small_predictor(kind)
    with torch.no_grad():
        net.world.out.weight.normal_()
    z, a = some_clips(6)
    net.world.get_to_know(z, scene_of(z))
    net.settle(z, a)
    return net


def in_world(head, clips, gain=1.0, noise=0.0, seed=0):
    """Keys and values (n,.) of clips of a world: a linear map of the keys but their plain numbers, and noise."""
    generator = torch.Generator().manual_seed(seed)
    d, columns = head.home_M.shape
    key = torch.randn(clips, d, generator=generator, dtype=torch.float64)
    M = gain * torch.randn(d, columns, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    value = key @ M + noise * torch.randn(clips, columns, generator=generator, dtype=torch.float64)
    return torch.cat([key, torch.randn(clips, head.plain, generator=generator, dtype=torch.float64)], 1), value


def student(e, scale):
    """Log density of e (A,) under Student's t, whose squared scale is given."""
    return stats.multivariate_t.logpdf(e.detach(), shape=scale.item() * np.eye(len(e)), df=hope.FREEDOM)


def test_what_a_stream_reads_is_least_squares_over_the_clips_before():
    """In training: against the normal equations, solved for every clip; and gradients flow through it."""
    head = world_head()
    key, value = in_world(head, 24, noise=0.3)
    found, surprise, _ = head.along(key, value, 2)
    L, s2, key = head.log_prior.exp().diag(), head.log_noise.exp(), key[:, :5]
    for start in 0, 12:
        for i in range(start, start + 12):
            k, v = key[start:i], value[start:i]
            M = torch.linalg.solve(L + k.T @ k / s2, k.T @ v / s2)
            torch.testing.assert_close(found[i], key[i] @ M, rtol=1e-10, atol=1e-12)
    e = value[0, 3:]
    ratio = 1 + key[0] @ torch.linalg.inv(L) @ key[0] / s2
    assert surprise[0, 0].item() == pytest.approx(-student(e, ratio * s2))
    (found.square().sum() + surprise.sum()).backward()
    assert head.log_prior.grad.abs().min() > 0 and head.log_noise.grad.abs() > 0


def test_the_hypotheses_are_those_of_a_loop_over_clips():
    """With every hypothesis kept, a posterior that is computed anew at each clip from a list of all clips."""
    head = world_head(KEPT=99, OLD=99)
    key, value = in_world(head, 10, noise=0.2)
    value[5:] = in_world(head, 10, gain=-1.0)[1][5:]
    head.home_C.copy_(head.log_prior.exp().reciprocal().diag() / 2)
    head.home_M.normal_()
    head.home_noise.fill_(0.05)
    state = head.start(1)
    usual, prior = head.log_noise.exp(), head.log_prior.exp()
    home = torch.linalg.inv(head.home_C)
    # What each kind starts from: S and M, over the first numbers of a key or all, and s^2.
    kinds = {'home': (home, head.home_M, usual), 'empty': (prior.diag(), torch.zeros(5, 5), usual),
             'of objects': (torch.cat([10 * prior, torch.full((14,), 10.0)]).diag(), torch.zeros(19, 5), 0.1)}
    # Of each hypothesis: the clip it is true since, its kind, weight, noise and in how many numbers.
    rows = [[0, 'home', 1.0, head.home_noise, 30]]
    for i in range(10):
        expected, weights = 0, []
        for row in rows:
            since, kind, weight, noise, count = row
            S, M, s2 = kinds[kind]
            seen = key[:, :len(S)]
            k, v = seen[since:i], value[since:i]
            S, Y = S + k.T @ k / s2, S @ M.double() + k.T @ v / s2
            read = seen[i] @ torch.linalg.solve(S, Y)
            ratio = 1 + seen[i] @ torch.linalg.solve(S, seen[i]) / s2
            expected = expected + weight * read
            e = (value[i] - read)[3:]
            weights.append(weight * np.exp(student(e, ratio * noise)))
            squares = e @ e / ratio
            trust = (3 + 2) / (3 + squares / noise)
            row[3:] = (count * noise + trust * squares) / (count + 2), min(count + 2, 30)
        torch.testing.assert_close(head.read(key[i:i + 1], state['now'])[0], expected, rtol=1e-8, atol=1e-9)
        state = head.write(key[i:i + 1], value[i:i + 1], state)
        born = [[i + 1, 'empty', head.NEW, usual, 3], [i + 1, 'home', head.AGAIN, head.home_noise, 30],
                [i + 1, 'of objects', head.NEW_OF_OBJECTS, torch.tensor(0.1), 3]]
        rows = [[*row[:2], w / sum(weights), *row[3:]] for row, w in zip(rows, weights)] + born
        total = sum(row[2] for row in rows)
        rows = [[*row[:2], row[2] / total, *row[3:]] for row in rows]


@both
def test_a_jump_reads_and_teacher_forcing_writes(kind):
    """A clip is predicted before it is written; memory=None is home, {} is none; one step shows no motion."""
    net = predictor(kind)
    z, a = some_clips(2)
    tau = torch.tensor([3, 4])
    before, memory = net(z, a)
    torch.testing.assert_close(before, net(z, a, memory={})[0])
    home, kept = net(z[:, :1], a[:, :1], tau)
    assert torch.equal(kept['world']['now']['M'], net.start(2)['world']['now']['M'])
    assert not torch.allclose(home, net(z[:, :1], a[:, :1], tau, {})[0])
    assert not torch.allclose(home, net(z[:, :1], a[:, :1], tau, memory)[0])
    _, same = net(z[:, :1], a[:, :1], memory=memory)
    assert torch.equal(same['world']['now']['M'], memory['world']['now']['M'])
    # The key does not depend on the step that is asked for, and teacher forcing writes what a jump asks.
    for step in tau - 2, tau:
        asked = []
        of_head = functools.partial(hope.WorldHead.associate, net.world)
        net.world.associate = lambda *args: asked.append(of_head(*args)) or asked[-1]
        net(z[:, :1], a[:, :1], step)
        net(z, a)
        assert torch.allclose(asked[0][0], asked[1][0], rtol=0, atol=1e-12)


def test_an_empty_memory_and_a_clip_without_a_push_change_nothing():
    net = predictor()
    z, a = some_clips(2)
    known = net.start(2)['world']['known']
    memory = {'world': {'now': empty(known), 'known': known}}
    tau = torch.tensor([3, 4])
    start = net.start(2)
    for push, memory in (a, memory), (0 * a, start):
        with_memory, without = (net(z[:, :1], push[:, :1], tau, given)[0] for given in (memory, {}))
        torch.testing.assert_close(with_memory, without)
    after = net(z, 0 * a, memory=start)[1]['world']['now']
    torch.testing.assert_close(after['M'][:, 0], start['world']['now']['M'][:, 0])


def test_streams_in_training_read_what_was_written_one_by_one():
    """stream_loss is a loop of jumps and look-backs from an empty memory; the inverse gets no gradient."""
    net = predictor()
    z, a = some_clips(6)
    tau = torch.tensor([2, 3, 4, 4, 3, 2])
    lost, surprise = model.stream_loss(net, z, a, tau, 3)
    known = net.start(1)['world']['known']
    for stream in range(2):
        now = empty(known)
        for i in range(3):
            n = 3 * stream + i
            one = z[n:n + 1], a[n:n + 1]
            memory = {'world': {'now': now, 'known': known}}
            z_hat, _ = net(one[0][:, :1], one[1][:, :1], tau[n:n + 1], memory)
            torch.testing.assert_close(lost[stream, i], model.feature_loss(z_hat, one[0][:, tau[n]])[0])
            _, memory = model.teacher_forcing_loss(net, *one, memory)
            now = hope.likeliest(memory['world']['now'], 1, memory['world']['now']['log_weight'])
    (lost.sum() + surprise.sum()).backward()
    assert all(p.grad is None for p in net.inverse.parameters())
    assert all(p.grad is not None for p in net.world.parameters())
    assert not any(part.requires_grad for part in net(z, a)[1]['world']['now'].values())


def test_a_change_is_seen_and_a_return_recognised():
    """Home, then two worlds, home, and the first of them again, which now is a former world."""
    head = world_head()
    home = in_world(head, 200, noise=0.1)
    _, _, now = head.along(*home, 1)
    head.home_C.copy_(now['C'][0])
    head.home_M.copy_(now['M'][0])
    head.home_noise.copy_(now['noise'][0])
    head.diagnostics, state, errors = [], head.start(1), []
    for phase, gain in enumerate([1, -1, 2, 1, -1]):
        for k, v in zip(*in_world(head, 60, gain, 0.1, seed=phase + 1)):
            errors.append((head.read(k[None], state['now']) - v).square().mean().item())
            state = head.write(k[None], v[None], state)
    mean = np.reshape(errors, (5, 60))
    assert (mean[:, -20:].mean(1) < 0.1).all()
    # Learned within twice as many clips as a key has numbers, recognised at once.
    assert mean[1, 10:].mean() < 0.1 and mean[3, 1:].mean() < 0.1
    assert mean[4, 1:6].mean() < 0.1 < mean[1, 1:6].mean()
    report = [[entry[name].item() for entry in head.diagnostics] for name in ('home', 'mean age', 'surprise')]
    at_home, age, surprise = np.reshape(report, (3, 5, 60))
    assert (at_home[[0, 3], 2:] > 0.9).all() and (at_home[[1, 2, 4], 2:] < 0.1).all()
    assert age[1, -1] == pytest.approx(59, abs=2) and surprise[1, 0] > surprise[1, -10:].max()
    assert all(entry['ages'].sum().item() == pytest.approx(1) for entry in head.diagnostics)
    assert (state['known']['world'][0, 3:] == NONE).sum() == 2 and state['known']['world'][0, 2] == HOME


def test_a_world_in_which_much_depends_on_the_object_is_learned():
    """What the plain numbers tell, of which half is noise: the second kind of new world learns it."""
    errors = []
    for chance in 5e-4, 1e-99:
        head = world_head(NEW_OF_OBJECTS=chance)
        generator = torch.Generator().manual_seed(0)
        key, noise = (torch.randn(100, n, generator=generator, dtype=torch.float64) for n in (19, 5))
        value = 0.2 * (key[:, 5:10] + noise)
        state, error = head.start(1), []
        for k, v in zip(key, value):
            error.append((head.read(k[None], state['now']) - v).square().mean())
            state = head.write(k[None], v[None], state)
        errors.append(torch.stack(error)[50:].mean())
    assert errors[0] < 0.7 * value.square().mean() < 0.9 * errors[1]


def test_streams_do_not_see_each_other_and_memory_does_not_grow():
    head = world_head()
    clips = [in_world(head, 30, gain, 0.1, seed) for gain, seed in ((1, 1), (-2, 2))]
    together = head.start(2)
    apart = [head.start(1), head.start(1)]
    for i in range(30):
        together = head.write(*(torch.stack([clip[part][i] for clip in clips]) for part in (0, 1)), together)
        apart = [head.write(k[i:i + 1], v[i:i + 1], state) for state, (k, v) in zip(apart, clips)]
    for name, part in together['now'].items():
        assert part.shape[1] == 16
        torch.testing.assert_close(part, torch.cat([state['now'][name] for state in apart]))


def test_it_stays_finite_under_any_input():
    head = world_head().float()
    generator = torch.Generator().manual_seed(0)
    state = head.start(8)
    for step in range(500):
        size = 10.0 ** torch.randint(-12, 4, (8, 1), generator=generator)
        key = size * torch.randn(8, 19, generator=generator)
        size = 10.0 ** torch.randint(-6, 2, (8, 1), generator=generator)
        value = size * torch.randn(8, 5, generator=generator)
        assert head.read(key, state['now']).isfinite().all()
        state = head.write(key, value, state)
        assert all(part[part != -math.inf].isfinite().all() for part in state['now'].values())


def test_looks_are_white_and_bounded():
    net = predictor()
    z = F.layer_norm(torch.randn(500, 1, 4, 12).double() * torch.linspace(0.1, 2, 12), (12,))
    net.world.get_to_know(z, scene_of(z))
    looks = net.world.looks(z[:, 0])
    torch.testing.assert_close(looks.T @ looks / 500, torch.eye(6).double(), rtol=0, atol=0.1)
    assert net.world.looks(1e6 * z[:, 0]).abs().max() <= 5
    net.world.get_to_know(z[:1].repeat(3, 1, 1, 1), scene_of(z))
    assert net.world.looks(z[:, 0]).isfinite().all()


def test_the_inverse_learns_alone_and_reads_what_was_shown():
    net = small_predictor()
    z, a = some_clips(3)
    net.inverse.loss(z, a).backward()
    assert {n.split('.')[0] for n, p in net.named_parameters() if p.grad is not None} == {'inverse'}
    # The last step, which no look-back has, is not read.
    torch.testing.assert_close(net.inverse(z)[0], net.inverse(z[:, :-1])[0])
    deviation = net.inverse.look(z, 1e-9 * a[:, 0]).deviation
    assert deviation.isfinite().all() and deviation.abs().max() <= 10


def test_a_push_given_in_a_made_up_world_looks_like_the_push_of_the_clip():
    """Forward by hand: gain by looks, the matrix, the amount along the push, the push on top."""
    rng = np.random.default_rng(0)
    drawn = worlds.draw_worlds(rng, 400, 2, gain=0.85, plain=0.15)
    seen = F.normalize(torch.from_numpy(rng.normal(0, 1, (400, 3, 2))), dim=-1).float()
    seen = seen * torch.from_numpy(rng.uniform(0.6, 1.6, (400, 3, 1))).float()
    looks = torch.from_numpy(rng.normal(0, 1, (400, 3, 6))).float()
    given = worlds.given_pushes(drawn, seen, looks, mean_push=0.5)
    side = (looks * drawn.direction[:, None]).sum(-1) / drawn.direction.norm(dim=1, keepdim=True)
    side = torch.where(drawn.sharp > 0, side.sign(), torch.tanh(2 * side))
    push = torch.einsum('sij,snj->sni', drawn.matrix, given) * torch.exp(drawn.log_gain * side)[..., None]
    size = push.norm(dim=-1, keepdim=True)
    slid = push / size * (size - 0.5 * drawn.along) + 0.5 * drawn.on_top
    # But for pushes of which nearly nothing would have been left.
    fine = size[..., 0] > 0.051
    assert fine.float().mean() > 0.95
    torch.testing.assert_close(slid[fine], seen[fine], rtol=1e-3, atol=1e-3)
    plain = (given - seen).abs().amax((1, 2)) < 1e-5
    assert 0.1 < plain.float().mean() < 0.25
    gains = torch.linalg.det(drawn.matrix).abs().sqrt()
    assert gains.min() < 0.5 and gains.max() > 2
    assert torch.equal(worlds.draw_worlds(rng, 9, 3, gain=0, plain=1).matrix, torch.eye(3).expand(9, 3, 3))


def test_clips_fit_their_worlds():
    """Given pushes are as strong as those of A, each strength as often, and tell nothing of the looks."""
    rng = np.random.default_rng(1)
    drawn = worlds.draw_worlds(rng, 400, 2, gain=0.85, plain=0)
    seen = F.normalize(torch.from_numpy(rng.normal(size=(400, 320, 2))), dim=-1).float()
    seen = seen * torch.from_numpy(rng.uniform(0.2, 1.6, (400, 320, 1))).float()
    looks = torch.from_numpy(rng.normal(size=(400, 320, 6))).float()
    usual = rng.uniform(0.25, 0.8, 1000)
    chosen = worlds.fitting(rng, drawn, seen, looks, 0.5, usual, 20)
    assert all(len(set(row)) == 20 for row in chosen)
    length = worlds.given_pushes(drawn, seen, looks, 0.5).norm(dim=-1).numpy()
    picked = np.take_along_axis(length, chosen, 1)
    assert (np.abs(picked - 0.525) < 0.28).mean() > 0.95 > 0.7 > (np.abs(length - 0.525) < 0.28).mean()
    # The farthest motion that there is was not given as a weak push more often than as a strong one.
    light = torch.linalg.det(drawn.matrix).abs().sqrt().numpy() > 1.5
    assert 0.4 < (picked[light] > 0.525).mean() < 0.6
    heavy = (drawn.log_gain * worlds.which_side(drawn, looks) < -0.2).numpy()
    strong, of_heavy = picked > 0.525, np.take_along_axis(heavy, chosen, 1)
    assert abs(strong[of_heavy].mean() - strong.mean()) < 0.1 < abs(length[heavy].mean() - length.mean())
