"""AC-HOPE-ViT: model.Predictor with a Titan memory and a Continuum Memory System (CMS) in each block, and in
the first block a world head, the memory that is carried from clip to clip. build() and load() are at the end.

Source of Eq.: "Nested Learning: The Illusion of Deep Learning Architectures" (Behrouz et al., 2025)."""
import math
from collections import namedtuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import get_total_norm

from model import MLP, Attention, Block, PatchConv, Predictor, Sizes, rotate
from support.files import read_checkpoint


def unit(x):
    """x scaled to unit length along its last dimension. The lower bound keeps the gradient finite at zero."""
    return x * x.square().sum(-1, keepdim=True).clamp(min=1e-6).rsqrt()


def by_step(rope, steps):
    """A rotation (cos, sin), each (b,1,T*P,d), cut into time steps → (cos, sin), each (T,b,1,P,d)."""
    return [part.unflatten(2, (steps, -1)).movedim(2, 0) for part in rope]


class TitanMemory(nn.Module):
    """Five associative memories per head, fast weights per clip: M_k, M_v, M_mem (d→d), M_eta, M_alpha (d→1).

    Each is a matrix, M(x) = M x. All five are written with the same keys, so they are the rows of one matrix
    (3d+2,d), in this order (Eq. 83-87). M_0, from which every clip starts, is an ordinary parameter.

    rule = 'dgd': Delta Gradient Descent (Eq. 93). For one token, with beta = eta / (1 + eta):
        M ← a M (I - beta k k^T) - beta (M k - t) k^T         repeated, it converges to M k = t / 2
    rule = 'delta': the implicit delta rule (recursive least squares):
        M ← a M - beta (a M k - t) k^T                        repeated, it converges to M k = t
    In both, a M stands for M_0 + a (M - M_0): a memory decays to M_0, not to zero.

    The state of a memory, (B,H,3d+2,d), is the change of its weights since the clip began. Weights that are
    still those of the start are the same for all clips, (1,H,3d+2,d)."""
    JUMP = 'mem, rates'      # what a jump writes, as nothing goes on after its one step

    def __init__(self, sizes):
        super().__init__()
        width, heads = sizes.width, sizes.heads
        d = width // heads
        self.sizes = sizes
        self.qkv = nn.Linear(width, 3 * width)     # the query, the input of M_k and the input of M_v
        self.conv = PatchConv(sizes) if sizes.conv else nn.Identity()
        self.proj = nn.Linear(width, width)
        # Counted from the end where they are also read in weights that are 'mem, rates' alone.
        self.rows = {'k': slice(d), 'v': slice(d, 2 * d), 'mem': slice(-d - 2, -2), 'rates': slice(-2, None),
                     'all': slice(None), 'mem, rates': slice(-d - 2, None)}
        identity = F.pad(torch.eye(d).repeat(3, 1), (0, 0, 0, 2))      # (3d+2,d)
        self.memory = nn.Parameter(identity + 0.02 * torch.randn(heads, 3 * d + 2, d))
        # Without it an all-zero token (no action) stays zero, where LayerNorm's gradient is 1/sqrt(eps).
        self.query_bias = nn.Parameter(0.02 * torch.randn(heads, 1, d))
        self.eta_bias = nn.Parameter(torch.full((heads, 1), 2.0))      # softplus(2) = 2.1: corrects 2/3
        # Retention is exp(-softplus(-4)) = 0.98 a step, 0.86 over 8. At 0.5, a clip would leave under 1 %.
        self.alpha_bias = nn.Parameter(torch.full((heads, 1), -4.0))
        if sizes.surprise:
            self.gate_bias = nn.Parameter(torch.full((heads, 1), -2.0))
        # Which rows are those of k, of v, of mem, and of eta and alpha, (3d+2,4).
        members = torch.block_diag(*[torch.ones(rows, 1) for rows in (d, d, d, 2)])
        self.register_buffer('members', members, persistent=False)
        self.diagnostics = None                    # if it is set to a list, every write appends a dict

    def forward(self, x, rope, memory=None, jump=False):
        """x (B,T,P,C), rope of Predictor.rope, a state or None → y (B,T,P,C), the state, in a jump None."""
        T, part = x.shape[1], self.JUMP if jump else 'all'
        qkv = self.qkv(self.conv(x)).unflatten(-1, (3, self.sizes.heads, -1)).permute(3, 1, 0, 4, 2, 5)
        q, k_in, v_in = qkv.to(self.memory.dtype).contiguous()         # each (T,B,H,P,d)
        rope_q, rope_k = rope
        y = []
        with torch.autocast(x.device.type, enabled=False):             # bfloat16 would lose small writes
            q = rotate(unit(q + self.query_bias), by_step(rope_q, T))
            start = self.start()[None]
            # Clips in a row may share a memory.
            weights = start if memory is None else start + memory.repeat_interleave(len(x) // len(memory), 0)
            # One chunk is one time step.
            for q_t, k_t, v_t, cos_t, sin_t in zip(q, k_in, v_in, *by_step(rope_k, T)):
                weights = self.write(weights, start, k_t, v_t, (cos_t, sin_t), part)
                # Read after the write: a jump from a single frame would otherwise read an empty memory.
                y.append(self.read(weights, 'mem', q_t))               # (B,H,P,d)
        y = torch.stack(y, 1).transpose(2, 3).flatten(3)               # (B,T,P,C)
        return self.proj(y), None if jump else weights - start

    def start(self):
        """The weights that every clip starts from, (H,.,.)."""
        return self.memory

    def read(self, weights, part, x):
        """A part of M(x), named as in rows; weights (B or 1,H,.,.), x (B,H,P,d) → (B,H,P,rows of it)."""
        return x @ weights[:, :, self.rows[part]].mT

    def write(self, weights, start, k_in, v_in, rope, part='all'):
        """Write P tokens, k_in, v_in (B,H,P,d), all as M sees them first (Eq. 90) → a part's weights."""
        k = rotate(unit(self.read(weights, 'k', k_in)), rope)
        biases = torch.stack([self.eta_bias, self.alpha_bias], -1)     # (H,1,2)
        eta, alpha = F.softplus(self.read(weights, 'rates', k_in) + biases).unbind(-1)             # (B,H,P)
        retained = torch.exp(-alpha.mean(-1))[..., None, None]         # a mean: P must not matter
        target = self.targets(weights, v_in, part)
        error = self.read(weights, part, k) - target                   # (B,H,P,3d+2 or fewer)
        surprise = error[..., self.rows['mem']].square().sum(-1)       # (B,H,P), raises the write rate
        gate = torch.ones_like(surprise)
        if self.sizes.surprise:
            gate = surprise / (surprise + F.softplus(self.gate_bias))
        weights, start = (each[:, :, self.rows[part]] for each in (weights, start))
        new = self.step(weights, start, retained, k, eta * gate, target, error)
        if self.diagnostics is not None:
            drift = (new - start).norm() / self.memory.norm()
            self.diagnostics.append({'surprise': surprise.sqrt().mean(), 'gate': gate.mean(),
                                     'retention': retained.mean(), 'drift': drift})
        return new

    def targets(self, weights, v_in, part):
        """v_in (B,H,P,d) → the targets of the tokens' keys, t (B,H,P,3d+2) or a part: M_c(v), or v itself."""
        v, rows = unit(self.read(weights, 'v', v_in)), self.rows[part]
        if not self.sizes.self_targets:
            return F.pad(v.repeat(1, 1, 1, 3), (0, 2))[..., rows]
        target = self.read(weights, part, v)
        # Unless cut to length 1, one target of P keys could make the memory grow by up to sqrt(P) a step.
        scale = (target.square() @ self.members[rows]).clamp(min=1).rsqrt()            # (B,H,P,4)
        return target * (scale @ self.members[rows].mT)

    def step(self, weights, start, retained, k, eta, target, error):
        """After a frame: retention (B,H,1,1), k (B,H,P,d), eta (B,H,P), t, M(k) - t (B,H,P,rows) → new."""
        wanted = -error if self.sizes.rule == 'dgd' else target
        new = self.proximal(start.lerp(weights, retained), k, eta, wanted)
        # The target v has nothing to say of eta and alpha.
        kept = weights[:, :, -2:].expand(len(new), -1, -1, -1)
        return new if self.sizes.self_targets else torch.cat([new[:, :, :-2], kept], 2)

    def proximal(self, kept, keys, eta, wanted):
        """One proximal step of a layer for all tokens of a frame at once → weights (B,H,r,c) that minimise

            |W - W_a|^2 + sum_i eta_i |W k_i - u_i|^2,      W_a = start + retained (weights - start)

        over W. The solution is W = (W_a + U^T E K) (I + K^T E K)^-1, a contraction for every eta > 0. kept,
        W_a (B,H,r,c), keys k (B,H,P,c), eta (B,H,P), wanted outputs u (B,H,P,r). These are minus the gradient
        at the layer's output (rule 'dgd', Eq. 93), or the present output minus the gradient (rule 'delta').
        """
        Ek = eta[..., None] * keys
        identity = torch.eye(keys.shape[-1], device=keys.device, dtype=keys.dtype)
        gram = identity + keys.mT @ Ek                                 # positive definite
        right_side = kept + wanted.mT @ Ek
        return right_side @ torch.linalg.inv_ex(gram).inverse


class TwoLayerTitanMemory(TitanMemory):
    """The paper's memory of two layers (Eq. 89): M(x) = M_0 x + W1 tanh(W2 x) / sqrt(h), h = memory_hidden.

    W1 and W2 are fast weights. All five memories share the hidden layer. The state (B,H,3d+2+d,h) is the
    change of W1 above that of the transpose of W2. Two things keep a rounding error from growing a
    thousandfold over a clip: sqrt(h) bounds the keys of W1, and the gradient at the hidden layer is bounded.
    """
    JUMP = 'all'             # as the five share a layer

    def __init__(self, sizes):
        super().__init__(sizes)
        assert sizes.self_targets, 'memory_hidden: its memories share a layer, which needs self_targets'
        H, rows, d = self.memory.shape
        self.layer1 = nn.Parameter(0.1 * torch.randn(H, rows, sizes.memory_hidden))
        self.layer2 = nn.Parameter(torch.randn(H, sizes.memory_hidden, d))

    def start(self):
        return torch.cat([self.layer1, self.layer2.mT], 1)

    def layers(self, weights):
        """weights (B,H,3d+2+d,h) → W1 (B,H,3d+2,h) and the transpose of W2 (B,H,d,h)."""
        return weights.split(self.memory.shape[1:], 2)

    def read(self, weights, part, x):
        w1, w2 = self.layers(weights)
        rows = self.rows[part]
        return x @ self.memory[:, rows].mT + (x @ w2).tanh() / w2.shape[-1] ** 0.5 @ w1[:, :, rows].mT

    def step(self, weights, start, retained, k, eta, target, error):
        (start1, start2), (w1, w2) = self.layers(start), self.layers(weights)
        z, root = k @ w2, w2.shape[-1] ** 0.5
        hidden = z.tanh() / root
        slope = 1 / root - root * hidden.square()
        squared_norm = slope.square() @ w1.square().sum(2)[..., None]  # of the Jacobian, (B,H,P,1)
        # The error is the gradient of 1/2 |M(k) - t|^2 at the outputs of W1; at those of W2 it is bounded.
        wanted1, wanted2 = -error, -error @ w1 * slope / (1 + squared_norm)
        if self.sizes.rule == 'delta':
            wanted1, wanted2 = hidden @ w1.mT + wanted1, z + wanted2
        new1 = self.proximal(start1.lerp(w1, retained), hidden, eta, wanted1)
        new2 = self.proximal(start2.lerp(w2, retained).mT, k, eta, wanted2)
        return torch.cat([new1, new2.mT], 2)


# What B clips have shown: the last hidden layer of the inverse dynamics (B,HIDDEN), and how the push that it
# reads differs from the given one, over its length (B,A). In training also in how many streams the clips are.
Shown = namedtuple('Shown', 'hidden deviation streams', defaults=[None])
FREEDOM = 3      # degrees of freedom of Student's t: few, which forgives single outliers


class InverseDynamics(nn.Module):
    """Which push of phase A explains the features of a clip: eight softmax-pooled slots a step of patches
    with a learned place, an MLP over the first `steps` steps. Missing ones count as zeros."""
    HIDDEN = 128

    def __init__(self, sizes, channels=48, slots=8, step_size=32):
        super().__init__()
        self.steps = sizes.steps - 1       # of a look-back: the last is only a target
        self.embed = nn.Linear(sizes.feature_dim, channels)
        # Two channels start as row and column: from random places one axis can stay unread for 1,000 steps.
        place = torch.cartesian_prod(*(torch.linspace(-1, 1, side) for side in sizes.grid))
        self.place = nn.Parameter(torch.cat([place, 0.02 * torch.randn(len(place), channels - 2)], 1))
        self.query = nn.Linear(channels, slots)
        self.step = nn.Linear(slots * channels, step_size)     # the MLP can subtract positions of two steps
        self.mlp = nn.Sequential(nn.Linear(self.steps * step_size, self.HIDDEN), nn.GELU(),
                                 nn.Linear(self.HIDDEN, self.HIDDEN), nn.GELU())
        self.push = nn.Linear(self.HIDDEN, sizes.action_dim)
        # Set by train.py: mean length of a push, and the empty scene, as a textured plane hides what moves.
        self.register_buffer('scale', torch.ones(()))
        self.register_buffer('scene', torch.zeros(math.prod(sizes.grid), sizes.feature_dim))

    def forward(self, z):
        """z (B,T,N,D) → push (B,A), hidden (B,HIDDEN)."""
        T = z.shape[1]
        z = z - self.scene
        # Pooled before embedded: both are linear, and there are fewer slots than patches.
        place = self.place + self.embed.bias                           # (N,channels)
        scores = F.linear(z, self.query.weight @ self.embed.weight) + self.query(place)
        weights = scores.mT.softmax(-1)                                # (B,T,slots,N)
        x = F.linear(weights @ z, self.embed.weight) + weights @ place     # (B,T,slots,channels)
        x = self.step(x.flatten(2))                                    # (B,T,step_size)
        hidden = self.mlp(F.pad(x, (0, 0, 0, self.steps - T)).flatten(1))      # cuts, too, where T is larger
        return self.scale * self.push(hidden), hidden

    def loss(self, z, a):
        """How far the pushes read are from a[:, 0], in mean pushes; z (B,T,N,D), a (B,T,A) → scalar."""
        return ((self(z)[0] - a[:, 0]) / self.scale).norm(dim=-1).mean()

    @torch.no_grad()
    def look(self, z, a):
        """Clips z (B,T,N,D) in whose world the pushes a (B,A) were given → Shown."""
        with torch.autocast(z.device.type, enabled=False):
            push, hidden = self(z.to(self.scale.dtype))
        # Neither a push of almost nothing nor an absurd reading makes it large.
        length = (a.square().sum(-1, keepdim=True) + (self.scale / 5).square()).sqrt()
        return Shown(hidden, ((push - a) / length).clamp(-10, 10))


def log_density(error, variance):
    """Log of Student's t density of errors (...,A), whose squared scale is variance (...) → (...)."""
    A = error.shape[-1]
    distance = error.square().sum(-1) / variance
    constant = math.lgamma((FREEDOM + A) / 2) - math.lgamma(FREEDOM / 2) - A / 2 * math.log(FREEDOM * math.pi)
    return constant - A / 2 * variance.log() - (FREEDOM + A) / 2 * torch.log1p(distance / FREEDOM)


class WorldHead(nn.Module):
    """The Titan memory that is carried from clip to clip: what a push does in the present world.

    It stands in the first block, after attention, at the action's token t of step 1. A prediction reads it, a
    clip that is shown writes one association. With x = (LN t, the looks l of the object, l times the
    direction of the push), and h, u of Shown:

        key      k = W_k x + MLP(x)                     also the query: what is asked is what was written
        value    v = (W_v h - W_0 x, u)                 what was seen minus what was expected: no label enters
        write    S <- S + k k^T / s^2,  Y <- Y + k v^T / s^2,  M = C Y,  C = (L + S)^-1
        read     t <- t + W_o (k M)                     without the columns of u

    Least squares, in which L and s are learned. There is one memory for each hypothesis "the world has been
    as it is since clip j", with its probability w. The read is the mean over them, a clip is written to each:

        w <- w p(e)      p: Student's t with squared scale r n,  e = u - k M,  r = 1 + k^T C k / s^2

    (Bayesian online change-point detection, Adams & MacKay 2007, arXiv:0710.3742). n is the noise that the
    hypothesis has met, a running mean of |e|^2 / r from s^2 on. Of each time scale the likeliest is kept.
    Before the next clip are born two empty ones, home (clips of A) and former worlds. The second empty one is
    of a world in which much depends on the object: its key has plain numbers, too, the direction of the push
    and l times it; it expects less of each number, and much noise, so it learns with care.

    The state of B streams is {'now': hypotheses, 'known': those that can be born}, each {C (B,K,d,d), M
    (B,K,d,v), s2, noise, count (in how many numbers it was seen), log_weight, age in clips, world (the clip
    at which it was first met, or IS_HOME), all (B,K)}; d is KEY and the plain numbers."""
    KEY, VALUE, LOOKS = 64, 48, 6
    KEPT = 9                     # hypotheses kept from clip to clip; with those that are born 16
    # Chances that a new world begins at a clip, one in which much depends on the object, a certain known one.
    NEW, NEW_OF_OBJECTS, AGAIN = 5e-3, 5e-4, 2.5e-3
    OF_OBJECTS, ITS_NOISE = 0.1, 0.1       # its L^-1: of plain numbers, and over the usual one; its s^2
    FORMER, OLD = 4, 50          # former worlds kept, and the age from which a hypothesis is one
    DOUBT, SURE = 3, 30          # numbers in which a noise counts as seen, at first and at most
    IS_HOME, NONE = -1, -2       # in place of the clip at which a world was first met
    HOME = 2                     # its place in 'known', between the empty ones and former worlds

    def __init__(self, sizes):
        super().__init__()
        d, v = self.KEY, self.VALUE
        asked = sizes.width + self.LOOKS * (1 + sizes.action_dim)
        self.plain = (1 + self.LOOKS) * sizes.action_dim
        self.norm = nn.LayerNorm(sizes.width, eps=1e-6)
        self.key = nn.Linear(asked, d)
        self.key_mlp = MLP(asked, 4 * d, d)
        self.expected = nn.Linear(asked, v)
        self.seen = nn.Linear(InverseDynamics.HIDDEN, v, bias=False)
        self.out = nn.Linear(v, sizes.width, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.out.weight)
        self.log_prior = nn.Parameter(torch.zeros(d))                  # of L, a diagonal
        self.log_noise = nn.Parameter(torch.tensor(math.log(0.1)))     # of s^2
        # Set by get_to_know() and settle().
        self.register_buffer('scene', torch.zeros(math.prod(sizes.grid), sizes.feature_dim))
        self.register_buffer('looks_mean', torch.zeros(sizes.feature_dim))
        self.register_buffer('looks_map', torch.zeros(sizes.feature_dim, self.LOOKS))
        self.register_buffer('home_C', torch.eye(d))
        self.register_buffer('home_M', torch.zeros(d, v + sizes.action_dim))
        self.register_buffer('home_noise', torch.ones(()))
        self.diagnostics = None      # if it is set to a list, every write appends a dict

    def forward(self, x, z, a, state, shown=None):
        """x (B,T,P,C), the clips' z (B,T,N,D) and pushes a (B,A); a state of B streams is read → x, the
        state. shown, Shown of the B clips: it is written instead → x as it is, the new state. state, in
        training Shown of S streams of n clips, B = S n: each clip reads what those before it in its stream
        write into an empty memory → x, -log p(e) of each clip (S,n)."""
        training = isinstance(state, Shown)
        with torch.autocast(x.device.type, enabled=False):
            key, value = self.associate(x, z, a, state if training else shown)
            if training:
                found, state, _ = self.along(key, value, state.streams)
            elif shown:
                return x, self.write(key, value, state)
            else:
                found = self.read(key, state['now'])
            added = self.out(found[:, :self.VALUE])
        return x + F.pad(added[:, None, None], (0, 0, 0, x.shape[2] - 1, 0, x.shape[1] - 1)), state

    def associate(self, x, z, a, shown=None):
        """Keys (B,d) of clips, see forward(), and values (B,v), if it is known what they have shown."""
        token = self.norm(x[:, 0, 0].to(self.log_noise.dtype))
        looks = self.looks(z[:, 0])
        heading = a / a.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        by_looks = (looks[:, :, None] * heading[:, None]).flatten(1)
        asked = torch.cat([token, looks, by_looks], -1)
        # A clip without a push asks nothing and writes nothing.
        key = torch.cat([self.key(asked) + self.key_mlp(asked), heading, by_looks], -1)
        key = a.any(-1, keepdim=True) * key
        if shown is None:
            return key, None
        seen = self.seen(shown.hidden) - self.expected(asked)
        return key, torch.cat([seen, shown.deviation], -1)

    def looks(self, z):
        """How unlike the empty scene step 1 is, z (B,N,D) → (B,LOOKS), each of variance 1 over clips of A."""
        far = (z.to(self.scene.dtype) - self.scene).abs().sum(1)       # (B,D)
        return ((far - self.looks_mean) @ self.looks_map).clamp(-5, 5)

    @torch.no_grad()
    def get_to_know(self, z, scene):
        """Find the directions of looks() in clips z (B,T,N,D) of A before an empty scene (N,D)."""
        self.scene.copy_(scene)
        far = (z[:, 0] - scene).abs().sum(1)                           # (B,D)
        self.looks_mean.copy_(far.mean(0))
        _, scale, directions = torch.linalg.svd(far - far.mean(0), full_matrices=False)
        scale = scale[:self.LOOKS] / len(far) ** 0.5
        used = int((scale > 1e-4 * scale[0]).sum())
        self.looks_map[:, :used] = directions[:used].T / scale[:used]

    def start(self, streams):
        """The state of so many new streams: at home, with no former world yet."""
        prior, s2, its_noise = (-self.log_prior).exp(), self.log_noise.exp(), self.ITS_NOISE
        usual, of_objects = (F.pad(prior, (0, self.plain), value=plain) for plain in (0.0, 1.0))
        M = F.pad(self.home_M, (0, 0, 0, self.plain))
        home = F.pad(self.home_C, (0, self.plain, 0, self.plain)), M, s2, self.home_noise, self.SURE
        new_of_objects = (self.OF_OBJECTS * of_objects).diag(), 0 * M, its_noise, its_noise, self.DOUBT
        rows = [
            (usual.diag(), 0 * M, s2, s2, self.DOUBT, math.log(self.NEW), 0, 0),
            (*new_of_objects, math.log(self.NEW_OF_OBJECTS), 0, 0),
            (*home, math.log(self.AGAIN), 0, self.IS_HOME),
            *self.FORMER * [(*home, -math.inf, 0, self.NONE)],
        ]
        names = 'C', 'M', 's2', 'noise', 'count', 'log_weight', 'age', 'world'
        known = {}
        for name, column in zip(names, zip(*rows)):
            part = torch.stack([torch.as_tensor(each, dtype=s2.dtype, device=s2.device) for each in column])
            known[name] = part.expand(streams, *part.shape)
        now = {name: part[:, self.HOME:self.HOME + 1] for name, part in known.items()}
        return {'now': now, 'known': known}

    def along(self, key, value, streams):
        """S streams into empty memories, key (S n,d), value (S n,v) → reads (S n,v), -log p(e) (S,n), memory.

        With one hypothesis the errors e of all clips follow from one Cholesky decomposition: they are the
        innovations of a Gaussian process (Rasmussen & Williams 2006, Eq. 2.25) with kernel k^T L^-1 k."""
        # Without the plain numbers: (S,n,KEY) and (S,n,v).
        k, v = (part.unflatten(0, (streams, -1)) for part in (key[:, :self.KEY], value))
        prior, s2 = (-self.log_prior).exp(), self.log_noise.exp()
        identity = torch.eye(k.shape[1], device=k.device, dtype=k.dtype)
        factor, failed = torch.linalg.cholesky_ex(k * prior @ k.mT + s2 * identity)        # (S,n,n)
        factor = factor.masked_fill(failed[:, None, None] > 0, math.nan)       # train.py says it in one line
        z, W = (torch.linalg.solve_triangular(factor, part, upper=False) for part in (v, k * prior))
        scale = factor.diagonal(dim1=1, dim2=2)                        # (S,n)
        error = scale[..., None] * z
        noise, count, noises = s2.expand(streams), s2.new_full((), self.DOUBT), []
        e, ratio = error[..., self.VALUE:], scale.square() / s2
        for e_j, ratio_j in zip(e.unbind(1), ratio.unbind(1)):
            noises.append(noise)
            noise, count = self.heard(e_j, ratio_j, noise, count)
        surprise = -log_density(e, ratio * torch.stack(noises, 1))     # (S,n)
        now = {'C': prior.diag() - W.mT @ W, 'M': W.mT @ z, 'noise': noise}
        return (v - error).flatten(0, 1), surprise, now

    def heard(self, e, ratio, noise, count):
        """The noise of hypotheses, and in how many numbers it was seen, after errors e (...,A)."""
        A, squares = e.shape[-1], e.square().sum(-1) / ratio
        # An outlier counts for less, as in fitting Student's t by expectation maximisation.
        trust = (FREEDOM + A) / (FREEDOM + squares / noise)
        return (count * noise + trust * squares) / (count + A), (count + A).clamp(max=self.SURE)

    @torch.no_grad()
    def settle(self, x, z, a, shown):
        """Make what clips of A write into an empty memory home → x; for the arguments see forward()."""
        *_, now = self.along(*self.associate(x, z, a, shown), 1)
        for name in 'C', 'M', 'noise':
            getattr(self, f'home_{name}').copy_(now[name][0])
        return x

    def read(self, key, now):
        """The mean of what hypotheses of S streams hold about keys (S n,d), by their weights → (S n,v)."""
        mean = torch.einsum('sk,skdv->sdv', now['log_weight'].softmax(1), now['M'])
        return (key.unflatten(0, (len(mean), -1)) @ mean).flatten(0, 1)

    def learn(self, key, value, now):
        """Write one clip of each stream, key (B,d), value (B,v), to all hypotheses → them, -log p(e) (B,)."""
        Ck = torch.einsum('bkde,be->bkd', now['C'], key)
        # Rounding could make it less than 1.
        ratio = 1 + torch.einsum('bkd,bd->bk', Ck, key).clamp(min=0) / now['s2']
        error = value[:, None] - torch.einsum('bd,bkdv->bkv', key, now['M'])
        gain = Ck / (now['s2'] * ratio)[..., None]
        e = error[..., self.VALUE:]
        likely = now['log_weight'].log_softmax(1) + log_density(e, ratio * now['noise'])
        noise, count = self.heard(e, ratio, now['noise'], now['count'])
        # The least squares with one more row, without solving them anew (Sherman and Morrison).
        C = now['C'] - gain[..., :, None] * Ck[..., None, :]
        M = now['M'] + gain[..., :, None] * error[..., None, :]
        new = {'C': C, 'M': M, 'noise': noise, 'count': count, 'log_weight': likely.log_softmax(1)}
        return {**now, **new, 'age': now['age'] + 1}, -likely.logsumexp(1)

    @torch.no_grad()
    def write(self, key, value, state):
        """Show one clip to each of B streams, key (B,d), value (B,v) → the state before the next clip."""
        now, surprise = self.learn(key, value, state['now'])
        if self.diagnostics is not None:
            weight, age, is_home = now['log_weight'].exp(), now['age'] - 1, now['world'] == self.IS_HOME
            # The posterior over ages: of 0, 1, 2-3, 4-7 ... clips, and home.
            place = torch.where(is_home, 11, (age.log2().floor() + 1).clamp(0, 10).long())
            ages = torch.zeros_like(weight[:, :1]).repeat(1, 12).scatter_add_(1, place, weight).mean(0)
            home = state['known']['M'][:, self.HOME]
            change = torch.einsum('bk,bkdv->bdv', weight, now['M']) - home
            self.diagnostics.append({'surprise': surprise.mean(), 'mean age': (weight * age).sum(1).mean(),
                                     'home': ages[11], 'ages': ages, 'drift': change.norm() / home.norm()})
        known = self.remember(likeliest(now, 1, now['log_weight']), state['known'])
        # Of each time scale (ages of 1, 2-3, 4-7 ... clips) the likeliest first: the young have yet to learn.
        scale = now['age'].log2().floor()
        alike = scale[:, :, None] == scale[:, None]                    # (B,K,K)
        best = now['log_weight'][:, None].masked_fill(~alike, -math.inf).amax(-1)
        kept = likeliest(now, self.KEPT, now['log_weight'] + 1e3 * (now['log_weight'] == best))
        return {'now': {name: torch.cat([kept[name], known[name]], 1) for name in kept}, 'known': known}

    def remember(self, best, known):
        """The known worlds, as start() has them, with the likeliest hypothesis (B,1) if it is old."""
        old = (best['age'] >= self.OLD) & (best['world'] != self.IS_HOME)
        same = known['world'] == best['world']
        after = self.HOME + 1
        # Its own place, or that of the world that was met first.
        place = torch.where(same.any(1), same.int().argmax(1), after + known['world'][:, after:].argmin(1))
        here = old & (torch.arange(same.shape[1], device=place.device) == place[:, None])  # (B,after+FORMER)
        best |= {'log_weight': torch.full_like(best['age'], math.log(self.AGAIN)), 'age': 0 * best['age']}
        known = {name: torch.where(here.view(*here.shape, *[1] * (part.dim() - 2)), best[name], part)
                 for name, part in known.items()}
        known['world'][:, :self.HOME] += 1     # those of the empty ones: the next clip
        return known


def likeliest(now, count, score):
    """The hypotheses with the greatest scores (B,K): (B,K,...) → (B,count,...), or all if they are few."""
    order = score.topk(min(count, score.shape[1]), 1).indices
    stream = torch.arange(len(order), device=order.device)[:, None]
    return {name: part[stream, order] for name, part in now.items()}


class CMS(nn.Module):
    """Continuum Memory System: a chain of residual MLPs (Eq. 70), whose paces of writing CMSWriter sets."""

    def __init__(self, width, hidden, levels):
        super().__init__()
        self.levels = nn.ModuleList(MLP(width, hidden) for _ in range(levels))

    def forward(self, x):
        """x (B,T,P,C) → what the chain adds to x, (B,T,P,C)."""
        # Summed without x, which the block adds. Subtracting x at the end would lose digits in bfloat16.
        added = 0
        for level in self.levels:
            added = added + level(x + added)
        return added


class CMSWriter:
    """A predictor whose CMS levels are written along a stream of clips. It is called as the predictor, whose
    own weights stay as they are. tick() looks back at a clip. Level l is written at every C_l-th (Eq. 71):

        change_l <- change_l - rate / C_l * sum of the gradients of L since the last write

    L is loss^2 / 2: a clip that is predicted well causes hardly any write. At every tick changes and sums are
    multiplied by earned_retention(): they are kept as far as they help."""

    def __init__(self, predictor, rate):
        self.predictor, self.rate = predictor, rate
        self.periods = predictor.sizes.cms_periods
        self.ticks = 0
        # The trained weights, their changes, the sums of their gradients since the last write.
        named = predictor.named_parameters()
        self.initial = {name: p.detach() for name, p in named if '.cms.levels.' in name}
        self.changes = {name: torch.zeros_like(p) for name, p in self.initial.items()}
        self.sums = dict(self.changes)
        self.levels = [[name for name in self.initial if f'.cms.levels.{i}.' in name]
                       for i in range(len(self.periods))]
        self.refresh()

    def __call__(self, *args, **kwargs):
        return torch.func.functional_call(self.predictor, self.weights, args, kwargs)

    def tick(self, loss, initial_loss):
        """Look back at a clip, where the written weights had this loss and the trained ones initial_loss."""
        gradients = torch.autograd.grad(loss.square() / 2, list(self.weights.values()))
        self.gradients = dict(zip(self.weights, gradients))
        self.ticks += 1
        self.retention = earned_retention(loss.detach(), initial_loss)
        for name, gradient in self.gradients.items():
            # The summed gradients were taken at the changed weights, so they are forgotten with the changes.
            self.sums[name] = self.retention * (self.sums[name] + gradient)
            self.changes[name] = self.retention * self.changes[name]
        for names, period in zip(self.levels, self.periods):
            for name in names if self.ticks % period == 0 else ():
                self.changes[name] = self.changes[name] - self.rate / period * self.sums[name]
                self.sums[name] = torch.zeros_like(self.sums[name])
        self.refresh()

    def refresh(self):
        """Put the changes into the weights."""
        self.weights = {name: (p + self.changes[name]).requires_grad_() for name, p in self.initial.items()}

    def diagnostics(self):
        """Per level, fast to slow: writes, last retention and gradient norm, drift |change| / |initial|."""
        rows = []
        for names, period in zip(self.levels, self.periods):
            gradient, change, initial = (get_total_norm([part[name] for name in names])
                                         for part in (self.gradients, self.changes, self.initial))
            rows.append({'writes': self.ticks // period, 'retention': self.retention.item(),
                         'gradient norm': gradient.item(), 'drift': (change / initial).item()})
        return rows


def earned_retention(loss, initial_loss):
    """min(1, L_0 / L)^2 of the losses of written and of unwritten weights; L is half of the squared loss."""
    return (initial_loss / loss.clamp(min=1e-12)).clamp(max=1).pow(4)


class HopeBlock(nn.Module):
    """x + attention(LN x), then x + Titan(LN x), then x + CMS(LN x), as far as mixer has them."""

    def __init__(self, sizes):
        super().__init__()
        width = sizes.width
        self.attn = self.titan = None
        if sizes.mixer != 'titan':
            self.attn_norm = nn.LayerNorm(width, eps=1e-6)
            self.attn = Attention(width, sizes.heads)
        if sizes.mixer != 'attention':
            self.titan_norm = nn.LayerNorm(width, eps=1e-6)
            self.titan = (TwoLayerTitanMemory if sizes.memory_hidden else TitanMemory)(sizes)
        self.cms_norm = nn.LayerNorm(width, eps=1e-6)
        self.cms = CMS(width, sizes.cms_hidden, len(sizes.cms_periods))

    def forward(self, x, rope, memory=None, head=nn.Identity(), jump=False):
        """x (B,T,P,C), rope: see Predictor.rope, memory: that of this block or None → (B,T,P,C), memory."""
        new = None
        if self.attn:
            x = head(x + self.attn(self.attn_norm(x), rope))
        if self.titan:
            y, new = self.titan(self.titan_norm(x), rope, memory, jump)
            x = x + y
        if not self.attn:
            x = head(x)
        return x + self.cms(self.cms_norm(x)), new


def build(sizes):
    """A ViT-AC or AC-HOPE-ViT with random weights, as its Sizes say."""
    return Predictor(sizes, Block if sizes.model == 'vit' else HopeBlock, InverseDynamics, WorldHead)


def load(path, device='cpu'):
    """Read a checkpoint → (predictor in eval mode, checkpoint dict). Refuses a missing or damaged file."""
    checkpoint = read_checkpoint(path, device)
    predictor = build(Sizes(**checkpoint['sizes']))
    predictor.load_state_dict(checkpoint['predictor'])
    return predictor.to(device).eval(), checkpoint
