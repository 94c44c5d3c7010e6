"""
AC-HOPE-ViT: model.Predictor with a Titan memory and a Continuum Memory System (CMS) in each block. And an
action memory for either predictor: what a push does in the present world.

    predictor = build(sizes)                                    # ViT-AC or AC-HOPE-ViT, as the sizes say
    predictor, checkpoint = load('out/hope.pt')                 # in eval mode

Source of Eq.: "Nested Learning: The Illusion of Deep Learning Architectures" (Behrouz et al., 2025).
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import get_total_norm

from model import MLP, Attention, Block, Predictor, Sizes, rotate
from support.files import read_checkpoint


def unit(x):
    """x scaled to unit length along its last dimension. The lower bound keeps the gradient finite at zero."""
    squared_length = x.square().sum(-1, keepdim=True)
    return x * squared_length.clamp(min=1e-6).rsqrt()


def by_step(rope, steps):
    """A rotation (cos, sin), each (b,1,T*P,d), cut into time steps → (cos, sin), each (T,b,1,P,d)."""
    return [part.unflatten(2, (steps, -1)).movedim(2, 0) for part in rope]


class TitanMemory(nn.Module):
    """
    Five associative memories per head, fast weights per clip: M_k, M_v, M_mem (d→d), M_eta, M_alpha (d→1).

    Each is a matrix, M(x) = M x. All five are written with the same keys, so they are stored as the rows of
    one matrix (3d+2,d), in this order (Eq. 83-87). M_0, the matrix that every clip starts from, is an
    ordinary parameter, initialised near the identity (near zero for eta and alpha). The query has no memory
    of its own.

    rule = 'dgd': Delta Gradient Descent (Eq. 93). For one token, with beta = eta / (1 + eta):
        M ← a M (I - beta k k^T) - beta (M k - t) k^T         repeated, it converges to M k = t / 2
    rule = 'delta': the implicit delta rule (recursive least squares):
        M ← a M - beta (a M k - t) k^T                        repeated, it converges to M k = t
    In both, a M stands for M_0 + a (M - M_0): a memory decays to M_0, not to zero.

    The state of a memory, (B,H,3d+2,d), is the change of its fast weights since their start. It is zero for a
    new clip. Below, M is a dict of what belongs to all G = B*H memories: their weights and what at() adds.
    """

    def __init__(self, sizes):
        super().__init__()
        width, heads = sizes.width, sizes.heads
        d = width // heads
        self.sizes = sizes
        self.qkv = nn.Linear(width, 3 * width)     # the query, the input of M_k and the input of M_v
        if sizes.conv:
            self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
            nn.init.zeros_(self.conv.weight)       # starts as a no-op
            nn.init.zeros_(self.conv.bias)
        self.proj = nn.Linear(width, width)
        identity = F.pad(torch.eye(d).repeat(3, 1), (0, 0, 0, 2))      # (3d+2,d)
        self.memory = nn.Parameter(identity + 0.02 * torch.randn(heads, 3 * d + 2, d))
        # Without it an all-zero token (no action) would stay exactly zero through all blocks, and LayerNorm's
        # gradient at zero, 1/sqrt(eps), overflows within a dozen of them.
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

    def forward(self, x, rope, memory=None):
        """x (B,T,P,C), rope: see Predictor.rope, memory: state or None → y (B,T,P,C), state to go on from."""
        B, T, P, _ = x.shape
        H = self.sizes.heads
        if self.sizes.conv:
            x = self.see_neighbours(x)
        qkv = self.qkv(x).view(B, T, P, 3, H, -1)
        qkv = qkv.permute(3, 1, 0, 4, 2, 5).to(self.memory.dtype)
        q, k_in, v_in = qkv.contiguous()                               # each (T,B,H,P,d)
        rope_q, rope_k = rope
        y = []
        with torch.autocast(x.device.type, enabled=False):             # bfloat16 would lose small writes
            q = rotate(unit(q + self.query_bias), by_step(rope_q, T))
            learned = self.learned(B)
            weights = learned['start']
            if memory is not None:
                weights = weights + memory.flatten(0, 1)
            M = self.at(weights, learned)
            # The memories of all clips and heads form one batch for bmm; one chunk is one time step.
            tokens = [part.flatten(1, 2) for part in (q, k_in, v_in, *by_step(rope_k, T))]
            for q_t, k_t, v_t, cos_t, sin_t in zip(*tokens):
                weights = self.write(M, k_t, v_t, (cos_t, sin_t))
                M = self.at(weights, learned)
                # Read after the write: a jump from a single frame would otherwise read an empty memory.
                y.append(self.read(M['mem'], q_t))                     # (G,P,d)
        y = torch.stack(y, 1).unflatten(0, (B, H))
        y = y.permute(0, 2, 3, 1, 4).flatten(3)                        # (B,T,P,C)
        state = weights - learned['start']
        return self.proj(y), state.unflatten(0, (B, H))

    def see_neighbours(self, x):
        """x (B,T,P,C) → x plus a 3x3 depthwise convolution over the patches, the last of the P tokens."""
        rows, columns = self.sizes.grid
        conditions = x.shape[2] - rows * columns
        patches = x[:, :, conditions:].flatten(0, 1)                   # (B*T,N,C)
        picture = patches.unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
        added = self.conv(picture).permute(0, 2, 3, 1).flatten(1, 2)
        added = F.pad(added, (0, 0, conditions, 0))                    # (B*T,P,C)
        return x + added.view(x.shape)

    def start(self):
        """The weights that every clip starts from, (H,.,.)."""
        return self.memory

    def learned(self, clips):
        """The parameters of each head, repeated for every clip: {name: (G,...)}."""
        learned = {'start': self.start(), 'M_0': self.memory}          # (H,.,.) and (H,3d+2,d)
        learned['biases'] = torch.stack([self.eta_bias, self.alpha_bias], -1)              # (H,1,2)
        if self.sizes.surprise:
            learned['gate'] = F.softplus(self.gate_bias)               # (H,1)
        return {name: p.expand(clips, *p.shape).flatten(0, 1) for name, p in learned.items()}

    def parts(self, matrix):
        """The rows (G,.,c) of a matrix (G,3d+2,c), by the part of M that they belong to."""
        d = self.memory.shape[-1]
        k, v, mem, rates = matrix.split((d, d, d, 2), 1)
        return {'k': k, 'v': v, 'mem': mem, 'rates': rates, 'all': matrix}

    def at(self, weights, learned):
        """M with these weights (G,.,.); read() takes its parts 'k', 'v', 'mem', 'rates' and 'all'."""
        return {**learned, **self.parts(weights), 'weights': weights}

    def read(self, part, x):
        """A part of M(x), x (G,P,d) → (G,P,rows of the part)."""
        return x.bmm(part.mT)

    def write(self, M, k_in, v_in, rope):
        """Write P tokens, k_in and v_in (G,P,d), all as M sees them at the start (Eq. 90) → new weights."""
        d = k_in.shape[-1]
        k = rotate(unit(self.read(M['k'], k_in)), rope)
        rates = F.softplus(self.read(M['rates'], k_in) + M['biases'])
        eta, alpha = rates.unbind(-1)                                  # (G,P)
        retained = torch.exp(-alpha.mean(-1))[:, None, None]           # a mean: P must not matter
        target = self.targets(M, v_in)
        error = self.read(M['mem'], k) - target[..., 2 * d:-2]
        surprise = error.square().sum(-1)                              # (G,P), raises the write rate
        gate = torch.ones_like(surprise)
        if self.sizes.surprise:
            gate = surprise / (surprise + M['gate'])
        new = self.step(M, retained, k, eta * gate, target)
        if self.diagnostics is not None:
            self.diagnostics.append({
                'surprise': surprise.sqrt().mean(),
                'gate': gate.mean(),
                'retention': retained.mean(),
                'drift': (new - M['start']).norm() / self.memory.norm(),
            })
        return new

    def targets(self, M, v_in):
        """v_in (G,P,d) → the targets of each token's key, t (G,P,3d+2): M_c(v), or v itself."""
        v = unit(self.read(M['v'], v_in))
        if not self.sizes.self_targets:
            return F.pad(v.repeat(1, 1, 3), (0, 2))
        target = self.read(M['all'], v)
        # Unless cut to length 1, one target of P keys could make the memory grow by up to sqrt(P) a step.
        squared_length = target.square() @ self.members
        scale = squared_length.clamp(min=1).rsqrt()
        return target * (scale @ self.members.mT)

    def step(self, M, retained, k, eta, target):
        """The weights after a frame: retention (G,1,1), keys k (G,P,d), eta (G,P), targets (G,P,3d+2)."""
        wanted = target
        if self.sizes.rule == 'dgd':
            wanted = target - self.read(M['all'], k)
        kept = M['start'].lerp(M['weights'], retained)
        new = self.proximal(kept, k, eta, wanted)
        if self.sizes.self_targets:
            return new
        return torch.cat([new[:, :-2], M['weights'][:, -2:]], 1)       # v has none for eta and alpha

    def proximal(self, kept, keys, eta, wanted):
        """
        One proximal step of a layer for all tokens of a frame, whatever their order → the weights (G,r,c)
        that minimise

            |W - W_a|^2 + sum_i eta_i |W k_i - u_i|^2,      W_a = start + retained (weights - start)

        over W. The solution is W = (W_a + U^T E K) (I + K^T E K)^-1, a contraction for every eta > 0. kept,
        W_a (G,r,c), keys k (G,P,c), eta (G,P), wanted outputs u (G,P,r). These are minus the gradient at the
        layer's output (rule 'dgd', Eq. 93), or the present output minus the gradient (rule 'delta').
        """
        Ek = eta[..., None] * keys
        identity = torch.eye(keys.shape[-1], device=keys.device, dtype=keys.dtype)
        gram = torch.baddbmm(identity, keys.mT, Ek)                    # positive definite
        right_side = torch.baddbmm(kept, wanted.mT, Ek)
        inverse, _ = torch.linalg.inv_ex(gram)
        return right_side.bmm(inverse)


class TwoLayerTitanMemory(TitanMemory):
    """
    The paper's memory of two layers (Eq. 89): M(x) = M_0 x + W1 tanh(W2 x) / sqrt(h), with h = memory_hidden.

    W1 and W2 are fast weights, M_0 is an ordinary parameter. All five memories share the hidden layer. The
    state (B,H,3d+2+d,h) is the change of W1 above that of the transpose of W2. Two
    things keep a rounding error from growing a thousandfold over a clip: sqrt(h) bounds the keys of W1, and
    the gradient at the hidden layer is bounded, because a full step overshoots once W1 has grown.
    """

    def __init__(self, sizes):
        super().__init__(sizes)
        assert sizes.self_targets, 'memory_hidden: its memories share a layer, which needs self_targets'
        H, rows, d = self.memory.shape
        self.layer1 = nn.Parameter(0.1 * torch.randn(H, rows, sizes.memory_hidden))
        self.layer2 = nn.Parameter(torch.randn(H, sizes.memory_hidden, d))

    def start(self):
        return torch.cat([self.layer1, self.layer2.mT], 1)

    def layers(self, weights):
        """weights (G,3d+2+d,h) → W1 (G,3d+2,h) and the transpose of W2 (G,d,h)."""
        return weights.split(self.memory.shape[1:], 1)

    def at(self, weights, learned):
        w1, w2 = self.layers(weights)
        m_0 = self.parts(learned['M_0'])
        parts = {name: (m_0[name], rows, w2) for name, rows in self.parts(w1).items()}
        return {**learned, **parts, 'weights': weights}

    def hidden(self, z):
        """The hidden activations of z (G,P,h), of at most unit length."""
        return z.tanh() / z.shape[-1] ** 0.5

    def read(self, part, x):
        m_0, w1, w2 = part
        return x.bmm(m_0.mT) + self.hidden(x.bmm(w2)).bmm(w1.mT)

    def step(self, M, retained, k, eta, target):
        start1, start2 = self.layers(M['start'])
        w1, w2 = self.layers(M['weights'])
        z = k.bmm(w2)
        hidden = self.hidden(z)
        output = hidden.bmm(w1.mT)
        # The gradients of 1/2 |M(k) - t|^2 at the outputs of W1 and, bounded, of W2.
        gradient1 = k.bmm(M['M_0'].mT) + output - target
        slope = (1 - z.tanh().square()) / z.shape[-1] ** 0.5
        jacobian = slope.square() * w1.square().sum(1, keepdim=True)
        jacobian = jacobian.sum(-1, keepdim=True)                      # its squared norm, (G,P,1)
        gradient2 = gradient1.bmm(w1) * slope / (1 + jacobian)
        wanted1 = -gradient1
        wanted2 = -gradient2
        if self.sizes.rule == 'delta':
            wanted1 = output + wanted1
            wanted2 = z + wanted2
        new1 = self.proximal(start1.lerp(w1, retained), hidden, eta, wanted1)
        new2 = self.proximal(start2.lerp(w2, retained).mT, k, eta, wanted2)
        return torch.cat([new1, new2.mT], 1)


class InverseDynamics(nn.Module):
    """
    Which push explains what was seen: reads it from the features of a clip alone, never from the action.
    A linear map of every patch with a learned place, eight softmax-pooled slots a step, an MLP over the first
    `steps` steps; missing ones count as zeros. Trained on phase A (ActionMemory.loss), it answers in terms of
    A: in a lighter world it reads a stronger push.
    """

    def __init__(self, sizes, channels=48, slots=8, step_size=32, hidden=128):
        super().__init__()
        rows, columns = sizes.grid
        self.steps = sizes.steps
        self.embed = nn.Linear(sizes.feature_dim, channels)
        self.place = nn.Parameter(0.02 * torch.randn(rows * columns, channels))
        self.query = nn.Linear(channels, slots)
        self.step = nn.Linear(slots * channels, step_size)     # the MLP can subtract positions of two steps
        self.mlp = nn.Sequential(
            nn.Linear(self.steps * step_size, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, sizes.action_dim))

    def forward(self, z, shown=None):
        """z (B,T,N,D), shown (B,): how many of the steps count, None for all → push (B,A), in mean pushes."""
        T = z.shape[1]
        # Pooled before embedded: both are linear, and there are fewer slots than patches.
        place = self.place + self.embed.bias                           # (N,channels)
        scores = F.linear(z, self.query.weight @ self.embed.weight) + self.query(place)
        weights = scores.mT.softmax(-1)                                # (B,T,slots,N)
        x = F.linear(weights @ z, self.embed.weight) + weights @ place     # (B,T,slots,channels)
        x = self.step(x.flatten(2))                                    # (B,T,step_size)
        if shown is not None:
            counts = torch.arange(T, device=z.device) < shown[:, None]
            x = x * counts[..., None]
        x = F.pad(x, (0, 0, 0, self.steps - T))                        # cuts, too, where T is larger
        return self.mlp(x.flatten(1))


class ActionMemory(nn.Module):
    """
    What a push means in this world: an associative memory from the push that was given to the push seen.

    The predictor gets M a in place of the action a, and the action reaches it in no other way. M starts as
    the identity, which is right in the world of training. Each clip that is shown writes one association, by
    recursive least squares with forgetting (Haykin, Adaptive Filter Theory): the delta rule that also
    remembers how sure it is. With the key k of the given push and the value v of the seen one,

        S <- alpha S + eta k k^T,   Y <- alpha Y + eta v k^T,   M = (M_0 + Y) (I + S)^-1,   M_0 = (I, 0)

    The key of a push a is (a / scale, a / |a|) at unit length: what a world does to a push is to multiply and
    turn it (the first half) and, through friction, to take away a constant amount along it (the second half).

    The retention alpha is small where the memory is surprised, so that what is contradicted is forgotten, and
    where the push as given explains the clip better than the memory does, as back in the world of training:

        alpha = min(1, e_0 / e)^2 / (1 + (e / SURPRISE)^2),   e = |seen - M a| / |a|,   e_0 = |seen - a| / |a|

    The state of a clip, (B,2A,3A), holds S and the transpose of Y side by side. No gradient at test time.
    """
    WRITE_RATE = 30.0      # eta: a clip counts as much as 30 times the start M_0
    SURPRISE = 0.35        # the relative error at which half of the memory is kept

    def __init__(self, sizes):
        super().__init__()
        self.inverse = InverseDynamics(sizes)
        self.register_buffer('scale', torch.ones(()))      # mean length of a push in training
        self.diagnostics = None        # if it is set to a list, every write appends a dict

    def key(self, a):
        """Pushes a (...,A) → keys (...,2A) of unit length, and lengths (...,1) that multiply M's outputs."""
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
        S, Yt = state.split((size, size // 2), -1)
        start = identity[:, :size // 2]
        M, _ = torch.linalg.solve_ex(identity + S, start + Yt)
        return M.mT

    def forward(self, a, state):
        """M a: pushes a (B,T,A) as given, state (B,2A,3A) or None → pushes (B,T,A) as they will be seen."""
        if state is None:
            return a
        with torch.autocast(a.device.type, enabled=False):
            key, length = self.key(a)
            return length * (key @ self.matrix(state).mT)

    @torch.no_grad()
    def write(self, z, a, state=None):
        """Show clips z (B,T,N,D) with the pushes a (B,A) that were given → state; a = 0 changes nothing."""
        if state is None:
            state = self.scale.new_zeros(len(a), 2 * a.shape[1], 3 * a.shape[1])
        with torch.autocast(z.device.type, enabled=False):
            seen = self.inverse(z.to(self.scale.dtype)) * self.scale
            key, length = self.key(a)
            expected = self(a[:, None], state)[:, 0]
            size = a.norm(dim=-1).clamp(min=1e-12)
            surprise = (seen - expected).norm(dim=-1) / size
            unwritten = (seen - a).norm(dim=-1) / size
            ratio = unwritten / surprise.clamp(min=1e-12)
            earned = ratio.clamp(max=1).square()
            retention = earned / (1 + (surprise / self.SURPRISE).square())
            retention = torch.where(a.any(-1), retention, 1.0)
            pair = torch.cat([key, seen / length], -1)
            association = key[:, :, None] * pair[:, None]              # (B,2A,3A)
            new = retention[:, None, None] * state + self.WRITE_RATE * association
        if self.diagnostics is not None:
            self.diagnostics.append({
                'surprise': surprise.mean(),
                'retention': retention.mean(),
            })
        return new

    def loss(self, z, a, shown=None):
        """How far the inverse is from the pushes a[:, 0], in mean pushes; z and shown as there → scalar."""
        with torch.autocast(z.device.type, enabled=False):
            push = self.inverse(z.to(self.scale.dtype), shown)
            error = push - a[:, 0] / self.scale
            return error.norm(dim=-1).mean()


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
    """
    The online writes of a predictor's CMS levels along a stream of clips.

        z_hat, memory = writer(z, a, tau=tau)      the predictor with the written weights
        writer.tick(loss, initial_loss)            after the look-back at a clip

    The predictor's own weights stay as they are. Level l is written at every C_l-th tick (Eq. 71):

        change_l <- change_l - rate / C_l * sum of the gradients of L since the last write

    L is loss^2 / 2: a clip that is predicted well causes hardly any write. At every tick changes and sums are
    multiplied by an earned retention, min(1, L_0 / L)^2, with the L_0 of the unwritten weights. Writes that
    help are kept; back in the old world they are soon forgotten.
    """

    def __init__(self, predictor, rate):
        self.predictor = predictor
        self.rate = rate
        self.periods = predictor.sizes.cms_periods
        self.ticks = 0
        self.retention = torch.ones(())
        named = predictor.named_parameters()
        # The trained weights, their changes, and the sums of their gradients since the last write.
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
        self.ticks += 1
        self.retention = earned_retention(loss.detach(), initial_loss)
        for name, gradient in zip(self.weights, gradients):
            # The summed gradients were taken at the changed weights, so they are forgotten with the changes.
            self.sums[name] = self.retention * (self.sums[name] + gradient)
            self.changes[name] = self.retention * self.changes[name]
        for names, period in zip(self.levels, self.periods):
            if self.ticks % period:
                continue
            for name in names:
                step = self.rate / period * self.sums[name]
                self.changes[name] = self.changes[name] - step
                self.sums[name] = torch.zeros_like(step)
        self.refresh()

    def refresh(self):
        """Put the changes into the weights."""
        self.weights = {}
        for name, p in self.initial.items():
            self.weights[name] = (p + self.changes[name]).requires_grad_()

    def diagnostics(self):
        """Per level, fast to slow: writes so far, the last retention, and the drift |change| / |initial|."""
        rows = []
        for names, period in zip(self.levels, self.periods):
            change = get_total_norm([self.changes[name] for name in names])
            initial = get_total_norm([self.initial[name] for name in names])
            rows.append({
                'writes': self.ticks // period,
                'retention': self.retention.item(),
                'drift': (change / initial).item(),
            })
        return rows


def earned_retention(loss, initial_loss):
    """min(1, L_0 / L)^2 of the losses of written and of unwritten weights; L is half of the squared loss."""
    ratio = initial_loss / loss.clamp(min=1e-12)
    return ratio.clamp(max=1).pow(4)


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


def build(sizes):
    """A ViT-AC or AC-HOPE-ViT with random weights, as its Sizes say."""
    block = Block if sizes.model == 'vit' else HopeBlock
    return Predictor(sizes, block, ActionMemory)


def load(path, device='cpu'):
    """Read a checkpoint → (predictor in eval mode, checkpoint dict). Refuses a missing or damaged file."""
    checkpoint = read_checkpoint(path, device)
    predictor = build(Sizes(**checkpoint['sizes']))
    predictor.load_state_dict(checkpoint['predictor'])
    return predictor.to(device).eval(), checkpoint
