"""
HOPE: self-modifying Titan memory, written by Delta Gradient Descent (DGD) or the delta rule, and the Continuum Memory
System (CMS).

Source: "Nested Learning: The Illusion of Deep Learning Architectures" (Behrouz et al., 2025); equation numbers are
that paper's. AC-HOPE-ViT is model.Predictor with HopeBlock: a Titan memory after attention, or in its place, and the CMS
where the MLP stood. Everything else (tokens, positions, interface) is shared with ViT-AC.

    predictor = build(Sizes(feature_dim=48))                    # either predictor, by its sizes
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
    """x scaled to unit length along its last dimension; the bound keeps the gradient finite at 0, where idle tokens are."""
    return x * x.square().sum(-1, keepdim=True).clamp(min=1e-6).rsqrt()


class TitanMemory(nn.Module):
    """
    Five associative memories per head with fast weights per clip: M_k, M_v, M_mem (d→d), M_eta, M_alpha (d→1).

    The matrix memory, M(x) = M x. All five are written with the same keys, so they are the rows of one matrix
    (3d+2,d), in the order of MEMORIES (Eq. 83-87). The matrix that a clip starts from, M_0, is an ordinary parameter; it
    starts at the identity (zero for eta and alpha). The query does not adapt.

    rule = 'dgd': Delta Gradient Descent (Eq. 93). For one token, with beta = eta / (1 + eta):
        M ← a M (I - beta k k^T) - beta (M k - t) k^T         repeated, it ends at M k = t / 2
    rule = 'delta': the implicit delta rule (recursive least squares):
        M ← a M - beta (a M k - t) k^T                        repeated, it ends at M k = t
    In both, a M stands for M_0 + a (M - M_0): what is forgotten relaxes to the learned M_0.

    A memory's state is what its fast weights have come to differ from where they started: zero for a new clip,
    (B,H,3d+2,d).
    """

    def __init__(self, sizes):
        super().__init__()
        width, self.heads = sizes.width, sizes.heads
        d = width // self.heads
        self.self_targets, self.surprise, self.rule = sizes.self_targets, sizes.surprise, sizes.rule
        # The query, and the inputs of M_k and of M_v.
        self.qkv = nn.Linear(width, 3 * width)
        self.grid = sizes.grid
        # Over each patch and its eight neighbours; zero-initialised: starts as a no-op.
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width) if sizes.conv else None
        if self.conv:
            nn.init.zeros_(self.conv.weight)
            nn.init.zeros_(self.conv.bias)
        self.proj = nn.Linear(width, width)
        # (3d+2,d)
        identity = F.pad(torch.eye(d).repeat(3, 1), (0, 0, 0, 2))
        self.memory = nn.Parameter(identity + 0.02 * torch.randn(self.heads, 3 * d + 2, d))
        # An idle action token (all zeros) would read nothing and stay exactly zero through every block, where LayerNorm's
        # gradient is 1/sqrt(eps): over a dozen blocks it overflows. With this bias its query is not zero.
        self.query_bias = nn.Parameter(0.02 * torch.randn(self.heads, 1, d))
        # softplus(2) = 2.1, so a write corrects 2/3 of the error.
        self.eta_bias = nn.Parameter(torch.full((self.heads, 1), 2.0))
        # Retention per step exp(-softplus(-4)) = 0.98, so 0.86 over a clip of 8; a memory that starts at 0.5 per step
        # remembers nothing.
        self.alpha_bias = nn.Parameter(torch.full((self.heads, 1), -4.0))
        # What a head keeps of its change from one clip to the next. It starts low, 0.05: the last clip's frames lie at the
        # same times and places as the next one's, and a head must learn to tell them apart before it keeps more.
        self.carry_bias = nn.Parameter(torch.full((self.heads, 1, 1), -3.0))
        if self.surprise:
            self.gate_bias = nn.Parameter(torch.full((self.heads, 1), -2.0))
        adapts = set(sizes.adapts)
        if not self.self_targets:
            # v has no parts that eta and alpha could be told.
            adapts -= {'eta', 'alpha'}
        # Rows that may change, (3d+2,1).
        rows = torch.cat([torch.full((n, 1), name in adapts) for name, n in zip(MEMORIES, (d, d, d, 1, 1))])
        # rows of k, v, mem, eta with alpha: (3d+2,4)
        members = torch.block_diag(*(torch.ones(n, 1) for n in (d, d, d, 2)))
        self.register_buffer('members', members, persistent=False)
        self.register_buffer('adapting', None if adapts == set(MEMORIES) else rows, persistent=False)
        # Set to a list, it collects a dict per write.
        self.diagnostics = None

    def forward(self, x, rope, memory=None):
        """
        x (B,T,P,C), rope: see Predictor.rope, memory: the state or None → y (B,T,P,C), state after the last step. A call
        goes on where the state was left: two calls are one long call. Between clips stands hand_over().
        """
        B, T, P, C = x.shape
        H, d = self.heads, C // self.heads
        if self.conv:
            x = self.see_neighbours(x)
        qkv = self.qkv(x).view(B, T, P, 3, H, d).permute(3, 1, 0, 4, 2, 5)
        # each (T,B,H,P,d)
        q, k_in, v_in = qkv.to(self.memory.dtype).contiguous()
        # (T,b,1,P,d)
        rope_q, rope_k = ([r.unflatten(2, (T, P)).movedim(2, 0) for r in pair] for pair in rope)
        y = []
        # A memory in bfloat16 would lose what it sums up.
        with torch.autocast(x.device.type, enabled=False):
            q = rotate(unit(q + self.query_bias), rope_q)
            # From here on the G = B*H memories lie side by side, as bmm takes them, (T,G,P,d).
            q, k_in, v_in, *rope_k = (r.flatten(1, 2) for r in (q, k_in, v_in, *rope_k))
            learned = self.learned(B)
            weights = learned['start'] if memory is None else learned['start'] + memory.flatten(0, 1)
            parts = self.parts(weights, learned)
            # One chunk is one time step.
            for q_t, k_t, v_t, *rope_t in zip(*(r.unbind(0) for r in (q, k_in, v_in, *rope_k))):
                weights = self.write(weights, parts, learned, k_t, v_t, rope_t)
                parts = self.parts(weights, learned)
                # A frame's reads see that frame's writes, (G,P,d).
                y.append(self.read(parts['mem'], q_t))
        y = torch.stack(y, 1).view(B, H, T, P, d).permute(0, 2, 3, 1, 4).reshape(B, T, P, C)
        return self.proj(y), (weights - learned['start']).unflatten(0, (B, H))

    def see_neighbours(self, x):
        """x (B,T,P,C) → x plus a 3x3 depthwise convolution over the grid of patches, which come last of the P tokens."""
        B, T, P, C = x.shape
        rows, columns = self.grid or [math.isqrt(P)] * 2
        conditions = P - rows * columns
        picture = x[:, :, conditions:].reshape(B * T, rows, columns, C).permute(0, 3, 1, 2)
        # (B*T,C,rows,columns) → (B,T,N,C)
        seen = self.conv(picture).permute(0, 2, 3, 1).reshape(B, T, rows * columns, C)
        return x + F.pad(seen, (0, 0, conditions, 0))

    def hand_over(self, memory):
        """The state that the next clip starts from."""
        return self.carry_bias.sigmoid() * memory

    def start(self):
        """The weights that every clip starts from, (H,.,.)."""
        return self.memory

    def learned(self, clips):
        """What each head has learned, once for every clip: {name: (G,...)}, G = clips * heads."""
        # (H,.,.), (H,3d+2,d), (H,1,2)
        learned = {'start': self.start(), 'M_0': self.memory, 'rates': torch.stack([self.eta_bias, self.alpha_bias], -1)}
        if self.surprise:
            # (H,1)
            learned['gate'] = F.softplus(self.gate_bias)
        return {name: p.expand(clips, *p.shape).flatten(0, 1) for name, p in learned.items()}

    def rows(self, matrix):
        """The rows (G,.,c) of a matrix (G,3d+2,c) by the part of M that they belong to."""
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
        90). The gate of the user's plan opens with the retrieval error |M_mem k - t|^2.
        """
        d = k_in.shape[-1]
        k = rotate(unit(self.read(parts['k'], k_in)), rope)
        eta, retained = self.rates(parts, learned, k_in)
        target = self.targets(parts, v_in)
        # (G,P)
        surprise = (self.read(parts['mem'], k) - target[..., 2 * d:3 * d]).square().sum(-1)
        gate = surprise / (surprise + learned['gate']) if self.surprise else torch.ones_like(surprise)
        eta = eta * gate
        new = self.step(weights, parts, learned, retained, k, eta, target)
        if self.diagnostics is not None:
            start = learned['start']
            self.diagnostics.append({
                'surprise': surprise.sqrt().mean(), 'write strength': (eta / (1 + eta)).mean(), 'gate': gate.mean(),
                'retention': retained.mean(), 'write norm': (new - start.lerp(weights, retained)).norm(),
                'drift': (new - start).norm() / self.memory.norm()})
        return new

    def rates(self, parts, learned, k_in):
        """k_in (G,P,d) → write rate eta > 0 of each token (G,P), and what the frame retains (G,1,1), in 0..1."""
        eta, alpha = F.softplus(self.read(parts['rates'], k_in) + learned['rates']).unbind(-1)
        # The mean over the P tokens: what a frame retains does not depend on the number of its patches.
        return eta, torch.exp(-alpha.mean(-1))[:, None, None]

    def targets(self, parts, v_in):
        """v_in (G,P,d) → what each memory shall answer to a token's key, t (G,P,3d+2): M_c(v), or v itself."""
        v = unit(self.read(parts['v'], v_in))
        if not self.self_targets:
            return F.pad(v.repeat(1, 1, 3), (0, 2))
        target = self.read(parts['all'], v)
        # Kept to unit length where they are longer: P keys that ask for the same M(v) would otherwise let the memory
        # feed on itself and grow by up to sqrt(P) a step.
        squared_lengths = target.square() @ self.members
        return target * (squared_lengths.clamp(min=1).rsqrt() @ self.members.mT)

    def step(self, weights, parts, learned, retained, k, eta, target):
        """The weights (G,3d+2,d) after one frame: keys k (G,P,d), rates eta (G,P), targets (G,P,3d+2)."""
        wanted = target - self.read(parts['all'], k) if self.rule == 'dgd' else target
        new = self.proximal(learned['start'], weights, retained, k, eta, wanted)
        return new if self.adapting is None else torch.where(self.adapting, new, weights)

    def proximal(self, start, weights, retained, keys, eta, wanted):
        """
        One proximal step of a layer over a whole frame, whose tokens have no order: weights and their start (G,r,c), keys
        (G,P,c), eta (G,P), wanted (G,P,r) → weights (G,r,c), the minimum over W of

            |W - W_a|^2 + sum_i eta_i |W k_i - u_i|^2,      W_a = start + retained (weights - start)

        which is W = (W_a + U^T E K) (I + K^T E K)^-1 and contracts for every eta > 0. The wanted outputs u are minus the
        gradient at the layer's output (rule 'dgd', Eq. 93), or the present output minus the gradient (rule 'delta').
        """
        Ek = eta[..., None] * keys
        kept = start.lerp(weights, retained)
        # Positive definite: the identity plus a Gram matrix.
        gram = torch.baddbmm(torch.eye(keys.shape[-1], device=keys.device, dtype=keys.dtype), keys.mT, Ek)
        return torch.baddbmm(kept, wanted.mT, Ek).bmm(torch.linalg.inv_ex(gram)[0])


class TwoLayerTitanMemory(TitanMemory):
    """
    The paper's memory of two layers (Eq. 89): M(x) = M_0 x + W1 tanh(W2 x) / sqrt(h), with h = memory_hidden.

    W1 and W2 are fast, M_0 is a parameter. All five memories share the hidden layer, so they adapt together or not at all.
    State: the changes of W1 and of the transpose of W2, one above the other, (B,H,3d+2+d,h).

    Two things keep the writes well conditioned. The hidden activations are keys of W1: divided by sqrt(h) they are at
    most of unit length, like the keys of W2. And the gradient step at the hidden layer is divided by one plus the squared
    norm of its Jacobian: a full step overshoots once W1 has grown. Without them a rounding error grows a
    thousandfold over a clip.
    """

    def __init__(self, sizes):
        super().__init__(sizes)
        d, hidden = sizes.width // self.heads, sizes.memory_hidden
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
        m_0, w1 = self.rows(learned['M_0']), self.rows(w1)
        return {name: (m_0[name], w1[name], w2) for name in m_0}

    def hidden(self, z):
        """The hidden activations of z (G,P,h), at most of unit length."""
        return z.tanh() / z.shape[-1] ** 0.5

    def read(self, part, x):
        m_0, w1, w2 = part
        return x.bmm(m_0.mT) + self.hidden(x.bmm(w2)).bmm(w1.mT)

    def step(self, weights, parts, learned, retained, k, eta, target):
        """The weights (G,3d+2+d,h) after one frame: keys k (G,P,d), rates eta (G,P), targets (G,P,3d+2)."""
        (start1, start2), (w1, w2) = self.layers(learned['start']), self.layers(weights)
        z = k.bmm(w2)
        hidden = self.hidden(z)
        output = hidden.bmm(w1.mT)
        # The gradients of 1/2 |M(k) - t|^2 at the outputs of W1 and, bounded, of W2
        gradient1 = k.bmm(learned['M_0'].mT) + output - target
        slope = (1 - z.tanh().square()) / z.shape[-1] ** 0.5
        # The squared norm of the Jacobian, (G,P,1).
        jacobian = (slope.square() * w1.square().sum(1, keepdim=True)).sum(-1, keepdim=True)
        gradient2 = gradient1.bmm(w1) * slope / (1 + jacobian)
        wanted1, wanted2 = -gradient1, -gradient2
        if self.rule == 'delta':
            wanted1, wanted2 = output + wanted1, z + wanted2
        new1 = self.proximal(start1, w1, retained, hidden, eta, wanted1)
        new2 = self.proximal(start2.mT, w2.mT, retained, k, eta, wanted2)
        return torch.cat([new1, new2.mT], 1)


class Level(MLP):
    """
    A level of the CMS: what an MLP and a gain of the input add to it, gain * x + fc2(gelu(fc1(x))).

    The gain starts at 0. Written online, it is the one number that scales what passes through the level: what a push does
    in a world of another mass. log_rates, learned on streams, say how fast each of these weights is written online, against
    the others. Weights may carry a leading dimension n: the batch is then n equal parts, each with a set of its own.
    """

    def __init__(self, width, hidden):
        super().__init__(width, hidden)
        self.gain = nn.Parameter(torch.zeros(()))
        # The gain is one number; a step of the MLP adds up thousands and starts at a tenth of its rate.
        log_rates = {name.replace('.', '_'): torch.tensor(-2.3) for name, _ in self.named_parameters()}
        log_rates['gain'] = torch.tensor(0.0)
        self.log_rates = nn.ParameterDict({name: nn.Parameter(value) for name, value in log_rates.items()})

    def forward(self, x):
        """x (B,T,P,C) → (B,T,P,C)."""
        if self.fc1.weight.dim() == 2:
            return self.gain * x + super().forward(x)
        # (n,B/n*T*P,C)
        rows = x.reshape(len(self.fc1.weight), -1, x.shape[-1])
        hidden = F.gelu(torch.baddbmm(self.fc1.bias[:, None], rows, self.fc1.weight.mT))
        added = torch.baddbmm(self.fc2.bias[:, None], hidden, self.fc2.weight.mT)
        return (self.gain[:, None, None] * rows + added).view(x.shape)


class CMS(nn.Module):
    """
    Continuum Memory System: a chain of residual MLPs, fast to slow (Eq. 70). Every level processes every token; what
    differs is how often its weights are written online (CMSWriter).
    """

    def __init__(self, width, hidden, levels):
        super().__init__()
        self.levels = nn.ModuleList(Level(width, hidden) for _ in range(levels))

    def forward(self, x):
        """x (B,T,P,C) → what the chain adds to x, (B,T,P,C)."""
        # Summed apart from x, because the block has a residual path of its own and y - x would cancel in bfloat16.
        added = 0
        for level in self.levels:
            added = added + level(x + added)
        return added


class CMSWriter:
    """
    The online writes of a predictor's CMS levels, for n streams of clips side by side.

        z_hat, memory = writer(z, a, tau=tau)      the predictor as the writes have left it
        writer.tick(losses, initial_losses)        after the look-back at one clip of every stream

    Holds how far the weights have come from the predictor's own, which are not touched: what training learns is where
    the writes start. Level l is written when the tick counter is a multiple of its period C_l:

        change_l <- change_l - eta_l * sum of the gradients of L since the last write

    (Eq. 71) with eta_l = rate * exp(log_rate) / C_l, so that a slow level steps along the mean gradient of its window.
    L = loss^2 / 2, so its gradient is that of the loss times the loss: a clip that is well predicted hardly writes. At
    every tick all changes, and the gradients that wait for a slow level's turn, are multiplied by an earned retention,
    min(1, L_0 / L)^2, where L_0 is that of the unwritten weights on the same clip. When the old world is back, the written
    weights predict worse than the unwritten ones, and the writes are forgotten within two clips. As long as they help,
    they are kept in full.
    """

    def __init__(self, predictor, rate, streams=1):
        self.predictor, self.rate, self.streams = predictor, rate, streams
        self.periods = predictor.sizes.cms_periods
        self.ticks = 0
        # For each level, its weights in all blocks and on the action: {name: weight}. For every weight its learned rate.
        self.levels = [{} for _ in self.periods]
        self.log_rates = {}
        for place, module in predictor.named_modules():
            if isinstance(module, Level):
                level = self.levels[int(place.rpartition('.')[2])]
                for name, p in module.named_parameters():
                    if not name.startswith('log_rates'):
                        level[f'{place}.{name}'] = p
                        self.log_rates[f'{place}.{name}'] = module.log_rates[name.replace('.', '_')]
        # The change of every weight, and the sum of its gradients since the last write, (streams,...).
        self.changes = {name: p.new_zeros(streams, *p.shape) for level in self.levels for name, p in level.items()}
        self.sums = {name: torch.zeros_like(change) for name, change in self.changes.items()}
        self.retention = torch.ones(())
        self.write_norms = [torch.zeros(())] * len(self.periods)
        self.refresh()

    def __call__(self, *args, **kwargs):
        """The predictor's forward with the written weights; the batch is `streams` equal parts, each with its stream's."""
        return torch.func.functional_call(self.predictor, self.weights, args, kwargs)

    def refresh(self):
        """The written weights. Their gradient is also that of the initial weights (first order)."""
        self.weights = {name: p + self.changes[name] for level in self.levels for name, p in level.items()}

    def tick(self, losses, initial_losses, retain_graph=False):
        """
        Look back at one clip of every stream: write the levels that are due by the gradients of losses (streams,), and
        forget according to the losses of the unwritten weights, initial_losses (streams,).
        """
        gradients = torch.autograd.grad(losses.square().sum() / 2, list(self.weights.values()), retain_graph=retain_graph)
        self.ticks += 1
        # (L_0 / L)^2, L being half of the squared loss.
        earned = (initial_losses / losses.detach().clamp(min=1e-12)).clamp(max=1).pow(4)
        for name, gradient in zip(self.weights, gradients):
            kept = earned.view(-1, *[1] * (gradient.dim() - 1))
            self.changes[name] = kept * self.changes[name]
            # The waiting gradients were taken at weights of which as much is left.
            self.sums[name] = kept * (self.sums[name] + gradient)
        for i, (level, period) in enumerate(zip(self.levels, self.periods)):
            if self.ticks % period == 0:
                steps = {}
                for name in level:
                    steps[name] = self.rate / period * self.log_rates[name].exp() * self.sums[name]
                    self.changes[name] = self.changes[name] - steps[name]
                    self.sums[name] = torch.zeros_like(self.sums[name])
                self.write_norms[i] = self.norm(steps, level)
        self.retention = earned.mean()
        self.refresh()

    def norm(self, values, level):
        """Root mean square over the streams of the norm of a level's values."""
        return (sum(values[name].square().sum() for name in level) / self.streams).sqrt()

    def diagnostics(self):
        """Per level, fast to slow: writes so far, norm of the last write, drift |change| / |initial weights|."""
        rows = []
        for level, period, norm in zip(self.levels, self.periods, self.write_norms):
            initial = sum(p.square().sum() for p in level.values()).sqrt()
            drift = self.norm(self.changes, level) / initial
            rows.append({'writes': self.ticks // period, 'retention': self.retention.item(), 'write norm': norm.item(),
                         'drift': drift.item()})
        return rows

    def state(self):
        """What a later writer needs to go on, for load(): plain values and tensors."""
        return {'ticks': self.ticks, 'changes': dict(self.changes), 'sums': dict(self.sums)}

    def load(self, state):
        """Go on from state()."""
        self.ticks, self.changes, self.sums = state['ticks'], dict(state['changes']), dict(state['sums'])
        self.refresh()


class HopeBlock(nn.Module):
    """x + attention(LN x), then x + Titan(LN x), then x + CMS(LN x); mixer = 'attention' or 'titan' keeps that one."""

    def __init__(self, sizes):
        super().__init__()
        width, mixer = sizes.width, sizes.mixer
        memory = TwoLayerTitanMemory if sizes.memory_hidden else TitanMemory

        def norm():
            return nn.LayerNorm(width, eps=1e-6)
        self.attn_norm = self.attn = self.titan_norm = self.titan = None
        if mixer != 'titan':
            self.attn_norm, self.attn = norm(), Attention(width, sizes.heads)
        if mixer != 'attention':
            self.titan_norm, self.titan = norm(), memory(sizes)
        self.cms_norm, self.cms = norm(), CMS(width, sizes.cms_hidden, len(sizes.cms_periods))

    def forward(self, x, rope, memory=None):
        """x (B,T,P,C), rope: see Predictor.rope, memory of this block or None → (B,T,P,C), memory."""
        new = None
        if self.attn:
            x = x + self.attn.block_causal(self.attn_norm(x), rope)
        if self.titan:
            if memory is not None:
                memory = self.titan.hand_over(memory)
            y, new = self.titan(self.titan_norm(x), rope, memory)
            x = x + y
        return x + self.cms(self.cms_norm(x)), new


# ---- either predictor --------------------------------------------------------------------------------------------------

def build(sizes):
    """A ViT-AC or AC-HOPE-ViT with random weights, as its Sizes say."""
    if sizes.model == 'vit':
        return Predictor(sizes, Block)
    return Predictor(sizes, HopeBlock, CMS(sizes.action_dim, 16, len(sizes.cms_periods)))


def load(path, device='cpu', **fields):
    """
    Read a checkpoint → (predictor in eval mode on device, checkpoint dict); fields: name=type of what else it must hold.

    Raises Refusal where it is missing, damaged, not finite or not a checkpoint.
    """
    checkpoint = read_checkpoint(path, device, **fields)
    try:
        predictor = build(Sizes(**checkpoint['sizes']))
        predictor.load_state_dict(checkpoint['predictor'])
    except (Refusal, *MALFORMED) as error:
        raise Refusal(f'{path} is not a checkpoint of this code ({" ".join(str(error).split())[:200]})') from None
    return predictor.to(device).eval(), checkpoint
