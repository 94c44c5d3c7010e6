"""
HOPE: an action memory, which learns what a push means in the present world; self-modifying Titan memory, written by Delta
Gradient Descent (DGD) or the delta rule; and the Continuum Memory System (CMS).

Source: "Nested Learning: The Illusion of Deep Learning Architectures" (Behrouz et al., 2025); equation numbers are
that paper's. AC-HOPE-ViT is model.Predictor with HopeBlock: a Titan memory after attention, or in its place, and the CMS
in place of the MLP. Everything else (tokens, positions, interface) is shared with ViT-AC.

    predictor = build(Sizes(feature_dim=48))                    # ViT-AC or AC-HOPE-ViT, as the sizes say
    predictor, checkpoint = load('out/hope.pt')                 # in eval mode
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import Refusal
from model import MLP, Attention, Block, Predictor, Sizes, rotate
from support.files import MALFORMED, read_checkpoint

# The five memories of a head.
MEMORIES = Sizes.adapts


def unit(x):
    """x scaled to unit length along its last dimension. The lower bound keeps the gradient finite where x is zero."""
    squared_length = x.square().sum(-1, keepdim=True).clamp(min=1e-6)
    return x * squared_length.rsqrt()


def by_step(rope, steps):
    """A rotation (cos, sin), each (b,1,T*P,d), cut into time steps → (cos, sin), each (T,b,1,P,d)."""
    cos, sin = rope
    cos = cos.unflatten(2, (steps, -1)).movedim(2, 0)
    sin = sin.unflatten(2, (steps, -1)).movedim(2, 0)
    return cos, sin


class TitanMemory(nn.Module):
    """
    Five associative memories per head with fast weights per clip: M_k, M_v, M_mem (d→d), M_eta, M_alpha (d→1).

    Each is a matrix, M(x) = M x. All five are written with the same keys, so they are stored as the rows of one matrix
    (3d+2,d), in the order of MEMORIES (Eq. 83-87). M_0, the matrix that every clip starts from, is an ordinary parameter,
    initialised near the identity (near zero for eta and alpha). The query has no memory of its own.

    rule = 'dgd': Delta Gradient Descent (Eq. 93). For one token, with beta = eta / (1 + eta):
        M ← a M (I - beta k k^T) - beta (M k - t) k^T         repeated, it converges to M k = t / 2
    rule = 'delta': the implicit delta rule (recursive least squares):
        M ← a M - beta (a M k - t) k^T                        repeated, it converges to M k = t
    In both, a M stands for M_0 + a (M - M_0): a memory decays to M_0, not to zero.

    The state of a memory, (B,H,3d+2,d), is the change of its fast weights since their start. It is zero for a new clip.
    """

    def __init__(self, sizes):
        super().__init__()
        width, heads = sizes.width, sizes.heads
        d = width // heads
        self.heads = heads
        self.grid = sizes.grid
        self.rule = sizes.rule
        self.surprise = sizes.surprise
        self.self_targets = sizes.self_targets
        # The query, the input of M_k and the input of M_v.
        self.qkv = nn.Linear(width, 3 * width)
        self.conv = None
        if sizes.conv:
            # Zero-initialised: starts as a no-op.
            self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
            nn.init.zeros_(self.conv.weight)
            nn.init.zeros_(self.conv.bias)
        self.proj = nn.Linear(width, width)
        # (3d+2,d)
        identity = F.pad(torch.eye(d).repeat(3, 1), (0, 0, 0, 2))
        self.memory = nn.Parameter(identity + 0.02 * torch.randn(heads, 3 * d + 2, d))
        # Keeps the query of an all-zero token (no action) away from zero. Without it the token would stay exactly zero
        # through all blocks, and LayerNorm's gradient at zero, 1/sqrt(eps), overflows within a dozen blocks.
        self.query_bias = nn.Parameter(0.02 * torch.randn(heads, 1, d))
        # softplus(2) = 2.1, so a write corrects 2/3 of the error.
        self.eta_bias = nn.Parameter(torch.full((heads, 1), 2.0))
        # Retention is exp(-softplus(-4)) = 0.98 per step and 0.86 over a clip of 8 steps. At 0.5 per step less than 1 % of
        # a write would be left after a clip.
        self.alpha_bias = nn.Parameter(torch.full((heads, 1), -4.0))
        if self.surprise:
            self.gate_bias = nn.Parameter(torch.full((heads, 1), -2.0))
        # Which rows are those of k, of v, of mem, and of eta and alpha, (3d+2,4).
        column, pair = torch.ones(d, 1), torch.ones(2, 1)
        self.register_buffer('members', torch.block_diag(column, column, column, pair), persistent=False)
        self.register_buffer('adapting', self.adapting_rows(sizes.adapts, d), persistent=False)
        # If it is set to a list, every write appends a dict.
        self.diagnostics = None

    def adapting_rows(self, adapts, d):
        """Which rows of the matrix are written, (3d+2,1) bool, by the names of the memories; None for all of them."""
        adapts = set(adapts)
        if not self.self_targets:
            # The target is then v itself, which has no components for eta and alpha.
            adapts -= {'eta', 'alpha'}
        if adapts == set(MEMORIES):
            return None
        written = torch.tensor([name in adapts for name in MEMORIES])
        rows_of_each = torch.tensor([d, d, d, 1, 1])
        return written.repeat_interleave(rows_of_each)[:, None]

    def forward(self, x, rope, memory=None):
        """
        x (B,T,P,C), rope: see Predictor.rope, memory: the state or None → y (B,T,P,C), state after the last step.

        Two calls with the state passed on equal one long call.
        """
        B, T, P, C = x.shape
        H = self.heads
        d = C // H
        if self.conv:
            x = self.see_neighbours(x)
        qkv = self.qkv(x).view(B, T, P, 3, H, d)
        qkv = qkv.permute(3, 1, 0, 4, 2, 5).to(self.memory.dtype)
        # each (T,B,H,P,d)
        q, k_in, v_in = qkv.contiguous()
        rope_q, rope_k = rope
        cos, sin = by_step(rope_k, T)
        y = []
        # In bfloat16 a memory would lose small writes.
        with torch.autocast(x.device.type, enabled=False):
            q = rotate(unit(q + self.query_bias), by_step(rope_q, T))
            # The memories of all clips and heads form one batch for bmm, G = B*H: (T,G,P,d).
            q = q.flatten(1, 2)
            k_in = k_in.flatten(1, 2)
            v_in = v_in.flatten(1, 2)
            cos = cos.flatten(1, 2)
            sin = sin.flatten(1, 2)
            learned = self.learned(B)
            weights = learned['start']
            if memory is not None:
                weights = weights + memory.flatten(0, 1)
            parts = self.parts(weights, learned)
            # One chunk is one time step.
            steps = zip(q.unbind(), k_in.unbind(), v_in.unbind(), cos.unbind(), sin.unbind())
            for q_t, k_t, v_t, cos_t, sin_t in steps:
                weights = self.write(weights, parts, learned, k_t, v_t, (cos_t, sin_t))
                parts = self.parts(weights, learned)
                # Read after the write: a jump from a single frame would otherwise read an empty memory.
                y.append(self.read(parts['mem'], q_t))                 # (G,P,d)
        y = torch.stack(y, 1).view(B, H, T, P, d)
        y = y.permute(0, 2, 3, 1, 4).reshape(B, T, P, C)
        state = weights - learned['start']
        return self.proj(y), state.unflatten(0, (B, H))

    def see_neighbours(self, x):
        """x (B,T,P,C) → x plus a 3x3 depthwise convolution over the grid of patches, the last of the P tokens."""
        B, T, P, C = x.shape
        side = math.isqrt(P)
        rows, columns = self.grid or (side, side)
        conditions = P - rows * columns
        picture = x[:, :, conditions:].reshape(B * T, rows, columns, C)
        added = self.conv(picture.permute(0, 3, 1, 2))                 # (B*T,C,rows,columns)
        added = added.permute(0, 2, 3, 1).reshape(B, T, rows * columns, C)
        return x + F.pad(added, (0, 0, conditions, 0))

    def start(self):
        """The weights that every clip starts from, (H,.,.)."""
        return self.memory

    def learned(self, clips):
        """The parameters of each head, repeated for every clip: {name: (G,...)}, G = clips * heads."""
        # (H,.,.) and (H,3d+2,d)
        learned = {'start': self.start(), 'M_0': self.memory}
        # (H,1,2)
        learned['rates'] = torch.stack([self.eta_bias, self.alpha_bias], -1)
        if self.surprise:
            # (H,1)
            learned['gate'] = F.softplus(self.gate_bias)
        return {name: p.expand(clips, *p.shape).flatten(0, 1) for name, p in learned.items()}

    def rows(self, matrix):
        """The rows (G,.,c) of a matrix (G,3d+2,c), by the part of M that they belong to."""
        d = self.memory.shape[-1]
        k, v, mem, rates = matrix.split((d, d, d, 2), 1)
        return {'k': k, 'v': v, 'mem': mem, 'rates': rates, 'all': matrix}

    def parts(self, weights, learned):
        """What read() needs of the weights for each part of M: {'k', 'v', 'mem', 'rates' (eta, alpha), 'all'}."""
        return self.rows(weights)

    def read(self, part, x):
        """A part of M(x), x (G,P,d) → (G,P,rows of the part)."""
        return x.bmm(part.mT)

    def write(self, weights, parts, learned, k_in, v_in, rope):
        """
        Write one chunk of P tokens: weights (G,.,.) and their parts(), k_in and v_in (G,P,d) → weights after the chunk.

        k, v, eta, alpha, the self-generated targets t = M_c(v) and the gradient are taken at the chunk's start M_c (Eq.
        90). The write rate grows with the surprise, which is the retrieval error |M_mem k - t|^2.
        """
        d = k_in.shape[-1]
        k = rotate(unit(self.read(parts['k'], k_in)), rope)
        eta, retained = self.rates(parts, learned, k_in)
        target = self.targets(parts, v_in)
        error = self.read(parts['mem'], k) - target[..., 2 * d:3 * d]
        # (G,P)
        surprise = error.square().sum(-1)
        gate = torch.ones_like(surprise)
        if self.surprise:
            gate = surprise / (surprise + learned['gate'])
        eta = eta * gate
        new = self.step(weights, parts, learned, retained, k, eta, target)
        if self.diagnostics is not None:
            start = learned['start']
            kept = start.lerp(weights, retained)
            self.diagnostics.append({
                'surprise': surprise.sqrt().mean(),
                'write strength': (eta / (1 + eta)).mean(),
                'gate': gate.mean(),
                'retention': retained.mean(),
                'write norm': (new - kept).norm(),
                'drift': (new - start).norm() / self.memory.norm(),
            })
        return new

    def rates(self, parts, learned, k_in):
        """k_in (G,P,d) → write rate eta > 0 of each token (G,P), retention of the frame (G,1,1), in 0..1."""
        rates = F.softplus(self.read(parts['rates'], k_in) + learned['rates'])
        eta, alpha = rates.unbind(-1)
        # With a sum in place of the mean, more patches would mean less retention.
        retained = torch.exp(-alpha.mean(-1))
        return eta, retained[:, None, None]

    def targets(self, parts, v_in):
        """v_in (G,P,d) → the target of each memory for each token's key, t (G,P,3d+2): M_c(v), or v itself."""
        v = unit(self.read(parts['v'], v_in))
        if not self.self_targets:
            return F.pad(v.repeat(1, 1, 3), (0, 2))
        target = self.read(parts['all'], v)
        # Targets longer than 1 are scaled to unit length. Otherwise P keys with the same target M(v) could make the memory
        # grow by up to sqrt(P) a step.
        squared_length = target.square() @ self.members
        scale = squared_length.clamp(min=1).rsqrt()
        return target * (scale @ self.members.mT)

    def step(self, weights, parts, learned, retained, k, eta, target):
        """The weights (G,3d+2,d) after one frame: keys k (G,P,d), rates eta (G,P), targets (G,P,3d+2)."""
        wanted = target
        if self.rule == 'dgd':
            wanted = target - self.read(parts['all'], k)
        new = self.proximal(learned['start'], weights, retained, k, eta, wanted)
        if self.adapting is None:
            return new
        return torch.where(self.adapting, new, weights)

    def proximal(self, start, weights, retained, keys, eta, wanted):
        """
        One proximal step of a layer for all tokens of a frame, whatever their order → the weights (G,r,c) that minimise

            |W - W_a|^2 + sum_i eta_i |W k_i - u_i|^2,      W_a = start + retained (weights - start)

        over W. The solution is W = (W_a + U^T E K) (I + K^T E K)^-1, a contraction for every eta > 0. weights and start
        (G,r,c), keys k (G,P,c), eta (G,P), wanted outputs u (G,P,r). These are minus the gradient at the layer's output
        (rule 'dgd', Eq. 93), or the present output minus the gradient (rule 'delta').
        """
        Ek = eta[..., None] * keys
        kept = start.lerp(weights, retained)
        identity = torch.eye(keys.shape[-1], device=keys.device, dtype=keys.dtype)
        # Positive definite: the identity plus a Gram matrix.
        gram = torch.baddbmm(identity, keys.mT, Ek)
        right_side = torch.baddbmm(kept, wanted.mT, Ek)
        inverse, _ = torch.linalg.inv_ex(gram)
        return right_side.bmm(inverse)


class TwoLayerTitanMemory(TitanMemory):
    """
    The paper's memory of two layers (Eq. 89): M(x) = M_0 x + W1 tanh(W2 x) / sqrt(h), with h = memory_hidden.

    W1 and W2 are fast weights, M_0 is an ordinary parameter. All five memories share the hidden layer, so they adapt
    together or not at all. The state (B,H,3d+2+d,h) is the change of W1 above that of the transpose of W2.

    Two things keep the writes well conditioned. The hidden activations, which are the keys of W1, are divided by sqrt(h):
    like the keys of W2 they have at most unit length. The gradient at the hidden layer is divided by one plus the squared
    norm of its Jacobian, because a full step overshoots once W1 has grown. Without these two, a rounding error grows a
    thousandfold over a clip.
    """

    def __init__(self, sizes):
        super().__init__(sizes)
        d = sizes.width // self.heads
        hidden = sizes.memory_hidden
        self.layer1 = nn.Parameter(0.1 * torch.randn(self.heads, 3 * d + 2, hidden))
        self.layer2 = nn.Parameter(torch.randn(self.heads, hidden, d))

    def start(self):
        return torch.cat([self.layer1, self.layer2.mT], 1)

    def layers(self, weights):
        """weights (G,3d+2+d,h) → W1 (G,3d+2,h) and the transpose of W2 (G,d,h)."""
        d = self.memory.shape[-1]
        return weights.split((3 * d + 2, d), 1)

    def parts(self, weights, learned):
        w1, w2 = self.layers(weights)
        rows_of_m_0 = self.rows(learned['M_0'])
        rows_of_w1 = self.rows(w1)
        return {name: (rows_of_m_0[name], rows_of_w1[name], w2) for name in rows_of_m_0}

    def hidden(self, z):
        """The hidden activations of z (G,P,h), of at most unit length."""
        return z.tanh() / z.shape[-1] ** 0.5

    def read(self, part, x):
        m_0, w1, w2 = part
        return x.bmm(m_0.mT) + self.hidden(x.bmm(w2)).bmm(w1.mT)

    def step(self, weights, parts, learned, retained, k, eta, target):
        """The weights (G,3d+2+d,h) after one frame: keys k (G,P,d), rates eta (G,P), targets (G,P,3d+2)."""
        start1, start2 = self.layers(learned['start'])
        w1, w2 = self.layers(weights)
        z = k.bmm(w2)
        hidden = self.hidden(z)
        output = hidden.bmm(w1.mT)
        # The gradient of 1/2 |M(k) - t|^2 at the output of W1.
        gradient1 = k.bmm(learned['M_0'].mT) + output - target
        slope = (1 - z.tanh().square()) / z.shape[-1] ** 0.5
        # The squared norm of the Jacobian, (G,P,1).
        jacobian = slope.square() * w1.square().sum(1, keepdim=True)
        jacobian = jacobian.sum(-1, keepdim=True)
        # The gradient at the output of W2, bounded.
        gradient2 = gradient1.bmm(w1) * slope / (1 + jacobian)
        wanted1 = -gradient1
        wanted2 = -gradient2
        if self.rule == 'delta':
            wanted1 = output + wanted1
            wanted2 = z + wanted2
        new1 = self.proximal(start1, w1, retained, hidden, eta, wanted1)
        new2 = self.proximal(start2.mT, w2.mT, retained, k, eta, wanted2)
        return torch.cat([new1, new2.mT], 1)


class InverseDynamics(nn.Module):
    """
    Which push explains what was seen: reads it from the features of a clip alone, never from the action.

    A linear map of every patch with a learned place, eight softmax-pooled slots a step, an MLP over the steps. It is trained
    with the predictor on phase A (ActionMemory.loss), so it answers in terms of A: in a lighter world it reads a stronger
    push. It reads the first `steps` steps of a clip; those that are missing at the end count as zeros.
    """

    def __init__(self, sizes, channels=48, slots=8, step_size=32, hidden=128):
        super().__init__()
        rows, columns = sizes.grid
        self.steps = sizes.steps
        self.embed = nn.Linear(sizes.feature_dim, channels)
        self.place = nn.Parameter(0.02 * torch.randn(rows * columns, channels))
        self.query = nn.Linear(channels, slots)
        # Linear, so that the MLP can subtract positions at different steps.
        self.step = nn.Linear(slots * channels, step_size)
        self.mlp = nn.Sequential(
            nn.Linear(self.steps * step_size, hidden), nn.GELU(),
            nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, sizes.action_dim))

    def forward(self, z, shown=None):
        """z (B,T,N,D), shown (B,): how many of the T steps count, None for all → push (B,A) in units of the mean push."""
        z = z[:, :self.steps]
        T = z.shape[1]
        # Patches are pooled before they are embedded: as both are linear, the order does not matter, and there are fewer slots.
        place = self.place + self.embed.bias                           # (N,channels)
        scores = F.linear(z, self.query.weight @ self.embed.weight) + self.query(place)
        weights = scores.mT.softmax(-1)                                # (B,T,slots,N)
        x = F.linear(weights @ z, self.embed.weight) + weights @ place     # (B,T,slots,channels)
        x = self.step(x.flatten(2))                                    # (B,T,step_size)
        if shown is not None:
            counts = torch.arange(T, device=z.device) < shown[:, None]
            x = x * counts[..., None]
        x = F.pad(x, (0, 0, 0, self.steps - T))
        return self.mlp(x.flatten(1))


class ActionMemory(nn.Module):
    """
    What a push means in this world: an associative memory from the push that was given to the push that was seen.

    The predictor gets M a in place of the action a, and the action reaches it in no other way. M starts as the identity,
    which is right in the world of training. Each clip that is shown writes one association, by recursive least squares with
    forgetting (Haykin, Adaptive Filter Theory): the delta rule that also remembers how sure it is. With the key k of the
    given push and the value v of the seen one,

        S <- alpha S + eta k k^T,   Y <- alpha Y + eta v k^T,   M = (M_0 + Y) (I + S)^-1,   M_0 = (I, 0)

    The key of a push a is (a / scale, a / |a|) at unit length: what a world does to a push is to multiply and turn it (the
    first half) and, through friction, to take away a constant amount along it (the second half).

    The retention alpha is small where the memory is surprised, so that what is contradicted is forgotten, and where the push
    as it was given explains the clip better than the memory does, as back in the world of training:

        alpha = min(1, e_0 / e)^2 / (1 + (e / SURPRISE)^2),   e = |seen - M a| / |a|,   e_0 = |seen - a| / |a|

    The state of a clip, (B,2A,3A), holds S and the transpose of Y side by side. There is no gradient at test time.
    """

    # eta: a clip counts as much as 30 times the start M_0.
    WRITE_RATE = 30.0
    # The relative error at which half of the memory is kept.
    SURPRISE = 0.35

    def __init__(self, sizes):
        super().__init__()
        self.inverse = InverseDynamics(sizes)
        # Mean length of a push in the training clips. train.py sets it.
        self.register_buffer('scale', torch.ones(()))
        # If it is set to a list, every write appends a dict.
        self.diagnostics = None

    def start(self, clips):
        """The state of new clips, (clips,2A,3A)."""
        A = self.inverse.mlp[-1].out_features
        return self.scale.new_zeros(clips, 2 * A, 3 * A)

    def key(self, a):
        """Pushes a (...,A) → keys (...,2A) of unit length, and the lengths (...,1) by which M's outputs are multiplied."""
        size = a.norm(dim=-1, keepdim=True)
        direction = a / size.clamp(min=1e-12)
        relative = size / self.scale
        length = (1 + relative.square()).sqrt()
        # Of zero where there is no push.
        key = torch.cat([relative * direction, direction], -1) / length
        return key, length * self.scale

    def matrix(self, state):
        """M (B,A,2A) of a state (B,2A,3A)."""
        size = state.shape[1]
        identity = torch.eye(size, device=state.device, dtype=state.dtype)
        S, Yt = state[..., :size], state[..., size:]
        start = identity[:, :size // 2]
        M, _ = torch.linalg.solve_ex(identity + S, start + Yt)
        return M.mT

    def state_of(self, M):
        """The state (1,2A,3A) whose matrix is M (A,2A), as if known in advance."""
        A = len(M)
        change = M.mT - torch.eye(2 * A, A, device=M.device, dtype=M.dtype)
        return F.pad(change, (2 * A, 0))[None]

    def forward(self, a, state):
        """M a: pushes a (B,T,A) as they were given, state (B,2A,3A) or None for a new one → (B,T,A) as they will be seen."""
        if state is None:
            return a
        with torch.autocast(a.device.type, enabled=False):
            key, length = self.key(a)
            return length * (key @ self.matrix(state).mT)

    @torch.no_grad()
    def write(self, z, a, state=None):
        """
        Show a clip: z (B,T,N,D) features, a (B,A) the push that was given → the state with this association.

        Clips without a push, a = 0, change nothing.
        """
        if state is None:
            state = self.start(len(z))
        with torch.autocast(z.device.type, enabled=False):
            seen = self.inverse(z.to(self.scale.dtype)) * self.scale
            key, length = self.key(a)
            expected = self(a[:, None], state)[:, 0]
            size = a.norm(dim=-1).clamp(min=1e-12)
            surprise = (seen - expected).norm(dim=-1) / size
            unwritten = (seen - a).norm(dim=-1) / size
            earned = (unwritten / surprise.clamp(min=1e-12)).clamp(max=1).square()
            retention = earned / (1 + (surprise / self.SURPRISE).square())
            retention = torch.where(a.any(-1), retention, 1.0)
            pair = torch.cat([key, seen / length], -1)
            association = key[:, :, None] * pair[:, None]              # (B,2A,3A)
            new = retention[:, None, None] * state + self.WRITE_RATE * association
        if self.diagnostics is not None:
            gain, angle = self.gain_and_angle(new)
            self.diagnostics.append({
                'surprise': surprise.mean(),
                'retention': retention.mean(),
                'gain': gain.mean(),
                'angle': angle.mean(),
            })
        return new

    def gain_and_angle(self, state):
        """
        By how much M multiplies a push of mean length, and by how many degrees it turns it → each (B,).

        The angle is that of two-dimensional pushes, otherwise nan.
        """
        first, second = self.matrix(state).chunk(2, -1)
        M = first + second                                             # (B,A,A)
        A = M.shape[-1]
        gain = M.square().sum((1, 2)).div(A).sqrt()
        if A != 2:
            return gain, torch.full_like(gain, math.nan)
        angle = torch.atan2(M[:, 1, 0] - M[:, 0, 1], M[:, 0, 0] + M[:, 1, 1])
        return gain, angle.rad2deg()

    def loss(self, z, a, shown=None):
        """
        How far the inverse is from the pushes of clips, relative to the mean push → scalar.

        z (B,T,N,D), a (B,T,A), shown (B,): how many of the T steps the inverse may read, None for all.
        """
        with torch.autocast(z.device.type, enabled=False):
            push = self.inverse(z.to(self.scale.dtype), shown)
            return (push - a[:, 0] / self.scale).norm(dim=-1).mean()


class CMS(nn.Module):
    """
    Continuum Memory System: a chain of residual MLPs, fast to slow (Eq. 70). Every level processes every token. The levels
    differ in how often their weights are written online (CMSWriter).
    """

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
    """
    The online writes of a predictor's CMS levels along a stream of clips, or along S streams at once.

        z_hat, memory = writer(z, a, tau=tau)      the predictor with the written weights, of the first stream
        writer.tick(loss, initial_loss)            after the look-back at a clip of each stream

    The predictor's own weights stay as they are; the written ones are .weights, {name: (S,...)}. Level l is written when the
    tick counter is a multiple of its period C_l (Eq. 71):

        change_l <- change_l - rate / C_l * sum of the gradients of L since the last write

    so a slow level steps along the mean gradient of its window. L = loss^2 / 2, so its gradient is the loss times the
    gradient of the loss: a clip that is predicted well causes hardly any write. rate: a number, or one for each stream.

    At every tick all changes and sums are multiplied by an earned retention, min(1, L_0 / L)^2, where L_0 is the L of the
    unwritten weights on the same clip. Writes that help are kept in full. When the old world is back, the written weights
    predict worse than the unwritten ones, and the writes are forgotten within two clips.
    """

    def __init__(self, predictor, rate, streams=1):
        self.rate = rate
        self.periods = predictor.sizes.cms_periods
        self.predictor = predictor
        self.ticks = 0
        # The names of the weights of each level, in all blocks.
        self.levels = [[] for _ in self.periods]
        # The weights of all levels, fast to slow, as they were trained.
        self.initial = {}
        for number, level in enumerate(self.levels):
            for name, p in predictor.named_parameters():
                if f'.cms.levels.{number}.' in name:
                    level.append(name)
                    self.initial[name] = p.detach()
        # The change of each weight, and the sum of its gradients since the last write.
        self.changes = {name: p.new_zeros(streams, *p.shape) for name, p in self.initial.items()}
        self.sums = {name: torch.zeros_like(change) for name, change in self.changes.items()}
        self.retention = torch.ones(streams)
        self.write_norms = [0.0] * len(self.periods)
        self.refresh()

    def __call__(self, *args, **kwargs):
        """The predictor's forward with the weights that the first stream has written."""
        first = {name: weight[0] for name, weight in self.weights.items()}
        return torch.func.functional_call(self.predictor, first, args, kwargs)

    def tick(self, loss, initial_loss):
        """
        Look back at one clip of each stream: forget by the loss of the unwritten weights, initial_loss, and write the levels
        that are due by the gradients of loss. Both are (S,), or scalars for one stream.
        """
        gradients = torch.autograd.grad((loss.square() / 2).sum(), list(self.weights.values()))
        self.ticks += 1
        self.retention = earned_retention(loss.detach(), initial_loss)
        for name, gradient in zip(self.weights, gradients):
            retention = per_stream(self.retention, gradient)
            self.changes[name] = retention * self.changes[name]
            # The summed gradients were taken at the changed weights, so they are forgotten with the changes.
            self.sums[name] = retention * (self.sums[name] + gradient)
        for i, period in enumerate(self.periods):
            if self.ticks % period == 0:
                self.write_norms[i] = self.write(self.levels[i], period)
        self.refresh()

    def write(self, level, period):
        """Step along the summed gradients of a level's weights and start new sums; returns the norm of the step."""
        steps = {name: per_stream(self.rate, self.sums[name]) / period * self.sums[name] for name in level}
        for name in level:
            self.changes[name] = self.changes[name] - steps[name]
            self.sums[name] = torch.zeros_like(self.sums[name])
        return norm(steps, level)

    def refresh(self):
        """Put the changes into the weights."""
        self.weights = {name: (p + self.changes[name]).requires_grad_(True) for name, p in self.initial.items()}

    def diagnostics(self):
        """
        Per level, fast to slow: writes so far, and over the streams the mean retention and the norms of the last write and of
        the drift, |change| / |initial weights|.
        """
        rows = []
        streams = len(next(iter(self.changes.values())))
        for level, period, write_norm in zip(self.levels, self.periods, self.write_norms):
            initial = streams ** 0.5 * norm(self.initial, level)
            rows.append({
                'writes': self.ticks // period,
                'retention': self.retention.mean().item(),
                'write norm': write_norm / streams ** 0.5,
                'drift': norm(self.changes, level) / initial,
            })
        return rows

    def state(self):
        """What load() needs to continue in a later writer: plain values and tensors."""
        return {'ticks': self.ticks, 'changes': dict(self.changes), 'sums': dict(self.sums)}

    def load(self, state):
        """Continue from state()."""
        self.ticks = state['ticks']
        self.changes = dict(state['changes'])
        self.sums = dict(state['sums'])
        self.refresh()


def per_stream(values, x):
    """A number, or one for each stream (S,), so that it multiplies x (S,...)."""
    return torch.as_tensor(values, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.dim() - 1))


def earned_retention(loss, initial_loss):
    """min(1, L_0 / L)^2 of the losses of written and of unwritten weights, two scalars; L is half of the squared loss."""
    ratio = initial_loss / loss.clamp(min=1e-12)
    return ratio.clamp(max=1).pow(4)


def norm(values, names):
    """The norm of some of the tensors {name: tensor} taken together."""
    return sum(values[name].square().sum().item() for name in names) ** 0.5


class HopeBlock(nn.Module):
    """x + attention(LN x), then x + Titan(LN x), then x + CMS(LN x). mixer = 'attention' or 'titan' omits the other."""

    def __init__(self, sizes):
        super().__init__()
        width = sizes.width
        self.attn_norm = self.attn = None
        if sizes.mixer != 'titan':
            self.attn_norm = nn.LayerNorm(width, eps=1e-6)
            self.attn = Attention(width, sizes.heads)
        self.titan_norm = self.titan = None
        if sizes.mixer != 'attention':
            memory = TwoLayerTitanMemory if sizes.memory_hidden else TitanMemory
            self.titan_norm = nn.LayerNorm(width, eps=1e-6)
            self.titan = memory(sizes)
        self.cms_norm = nn.LayerNorm(width, eps=1e-6)
        self.cms = CMS(width, sizes.cms_hidden, len(sizes.cms_periods))

    def forward(self, x, rope, memory=None):
        """x (B,T,P,C), rope: see Predictor.rope, memory: that of this block or None → (B,T,P,C), memory."""
        new = None
        if self.attn:
            x = x + self.attn(self.attn_norm(x), rope)
        if self.titan:
            y, new = self.titan(self.titan_norm(x), rope, memory)
            x = x + y
        return x + self.cms(self.cms_norm(x)), new


# ---- either predictor --------------------------------------------------------------------------------------------------

def build(sizes):
    """A ViT-AC or AC-HOPE-ViT with random weights, as its Sizes say."""
    block = Block if sizes.model == 'vit' else HopeBlock
    return Predictor(sizes, block, ActionMemory)


def load(path, device='cpu', **fields):
    """
    Read a checkpoint → (predictor in eval mode on device, checkpoint dict). fields: the names and types of further entries
    that it must have. Raises Refusal for a checkpoint that is missing, damaged, not finite or not one of this code.
    """
    checkpoint = read_checkpoint(path, device, **fields)
    try:
        predictor = build(Sizes(**checkpoint['sizes']))
        predictor.load_state_dict(checkpoint['predictor'])
    except (Refusal, *MALFORMED) as error:
        why = ' '.join(str(error).split())[:200]
        raise Refusal(f'{path} is not a checkpoint of this code ({why})') from None
    return predictor.to(device).eval(), checkpoint
