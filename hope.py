"""
HOPE: self-modifying Titan memory written by Delta Gradient Descent (DGD), and the Continuum Memory System (CMS).

Source: "Nested Learning: The Illusion of Deep Learning Architectures" (Behrouz et al., 2025); equation numbers are
that paper's. AC-HOPE-ViT is model.Predictor with HopeBlock: a Titan memory after attention, or in its place, and the CMS
where the MLP stood. Everything else (tokens, positions, interface) is shared with ViT-AC.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import Refusal
from model import MLP, Attention, rotate

MEMORIES = 'k', 'v', 'mem', 'eta', 'alpha'


def unit(x):
    """x scaled to unit length along its last dimension; the bound keeps the gradient finite at 0, where idle tokens are."""
    return x * x.square().sum(-1, keepdim=True).clamp(min=1e-6).rsqrt()  # fewer passes back than F.normalize


class TitanMemory(nn.Module):
    """
    Five associative memories per head with fast weights per clip: M_k, M_v, M_mem (d→d), M_eta, M_alpha (d→1).

    memory_hidden = 0: matrix memory, M(x) = M_0 x + W x. Else a two-layer memory, M(x) = M_0 x + W1 tanh(W2 x) (Eq. 89).
    M_0, and the W1 and W2 that a clip starts from, are ordinary parameters; M_0 starts at the identity (zero for eta and
    alpha). All five are written with the same keys, so they are the rows of one map R^d → R^(3d+2), in the order of
    MEMORIES (Eq. 83-87), and share the hidden layer where there is one. The query does not adapt.

    A memory's state is what its fast weights have come to differ from where they started: zero for a new clip, (B,H,3d+2,d)
    for the matrix memory; for two layers W1 and the transpose of W2, one above the other, (B,H,3d+2+d,memory_hidden).
    """

    def __init__(self, sizes):
        super().__init__()
        width, self.heads = sizes['width'], sizes['heads']
        d, hidden = width // self.heads, sizes['memory_hidden']
        self.hidden, self.self_targets, self.surprise, self.dgd = (
            sizes[k] for k in ('memory_hidden', 'self_targets', 'surprise', 'dgd'))
        self.qkv = nn.Linear(width, 3 * width)                         # query, and the inputs of M_k and of M_v
        # Over each token and its two neighbours in its step; it starts as nothing.
        self.conv = nn.Conv1d(width, width, 3, padding=1, groups=width) if sizes['conv'] else None
        if self.conv:
            nn.init.zeros_(self.conv.weight), nn.init.zeros_(self.conv.bias)
        self.proj = nn.Linear(width, width)
        identity = F.pad(torch.eye(d).repeat(3, 1), (0, 0, 0, 2))      # (3d+2,d)
        self.memory = nn.Parameter(identity + 0.02 * torch.randn(self.heads, 3 * d + 2, d))
        if hidden:
            self.layer1 = nn.Parameter(torch.randn(self.heads, 3 * d + 2, hidden) * 0.1 / hidden ** 0.5)
            self.layer2 = nn.Parameter(torch.randn(self.heads, hidden, d))
        # An idle action token (all zeros) would read nothing and stay exactly zero through every block, where LayerNorm's
        # gradient is 1/sqrt(eps): over a dozen blocks it overflows. This gives it something to ask for.
        self.query_bias = nn.Parameter(0.02 * torch.randn(self.heads, 1, d))
        self.eta_bias = nn.Parameter(torch.full((self.heads, 1), 2.0))  # softplus(2) = 2.1: writes 2/3 of the error
        # Retention per step exp(-softplus(-4)) = 0.98, so 0.86 over a clip of 8; a memory that starts at 0.5 per step
        # remembers nothing.
        self.alpha_bias = nn.Parameter(torch.full((self.heads, 1), -4.0))
        # What a head keeps of its change from one clip to the next. It starts low, 0.05: the last clip's frames lie at the
        # same times and places as the next one's, and a head must learn to tell them apart before it keeps more.
        self.carry_bias = nn.Parameter(torch.full((self.heads, 1, 1), -3.0))
        if self.surprise:
            self.gate_bias = nn.Parameter(torch.full((self.heads, 1), -2.0))
        unknown = set(sizes['adapts']) - set(MEMORIES)
        if unknown or not sizes['adapts']:
            raise Refusal(f'adapts = {", ".join(sizes["adapts"])!r}: allowed are {", ".join(MEMORIES)}')
        # Rows that may change. Without self-generated targets there is nothing that eta and alpha could be told.
        adapts = [m in sizes['adapts'] and (self.self_targets or m not in ('eta', 'alpha')) for m in MEMORIES]
        rows = torch.tensor([flag for flag, n in zip(adapts, (d, d, d, 1, 1)) for _ in range(n)])[:, None]
        members = torch.block_diag(*(torch.ones(n, 1) for n in (d, d, d, 2)))  # rows of k, v, mem, eta with alpha: (3d+2,4)
        self.register_buffer('members', members, persistent=False)
        self.register_buffer('adapting', None if all(adapts) else rows, persistent=False)
        self.diagnostics = None                                        # a list here collects a dict per write

    def forward(self, x, rope, memory=None):
        """
        x (B,T,P,C), rope: see Predictor.rope, memory: the state or None → y (B,T,P,C), state after the last step. A call
        goes on where the state was left: two calls are one long call. Between clips stands hand_over().
        """
        B, T, P, C = x.shape
        H, d = self.heads, C // self.heads
        if self.conv:
            x = x + self.conv(x.flatten(0, 1).mT).mT.view(x.shape)     # (B*T,C,P) and back
        qkv = self.qkv(x).view(B, T, P, 3, H, d).permute(3, 1, 0, 4, 2, 5)
        q, k_in, v_in = qkv.to(self.memory.dtype).contiguous()         # each (T,B,H,P,d)
        rope_q, rope_k = ([r.unflatten(2, (T, P)).movedim(2, 0) for r in pair] for pair in rope)  # (T,b,1,P,d)
        y = []
        with torch.autocast(x.device.type, enabled=False):             # a memory in bfloat16 would lose what it sums up
            q = rotate(unit(q + self.query_bias), rope_q)
            # From here on the G = B*H memories lie side by side, as bmm takes them: matmul would reshape them at every call.
            q, k_in, v_in, *rope_k = (r.flatten(1, 2) for r in (q, k_in, v_in, *rope_k))  # (T,G,P,d)
            learned = self.learned(B)
            weights = learned['start'] if memory is None else learned['start'] + memory.flatten(0, 1)
            parts = self.parts(weights, learned)
            for q_t, k_t, v_t, *rope_t in zip(*(r.unbind(0) for r in (q, k_in, v_in, *rope_k))):  # chunk = step
                weights = self.write(weights, parts, learned, k_t, v_t, rope_t)
                parts = self.parts(weights, learned)
                y.append(self.read(parts['mem'], q_t))                 # after the write, (G,P,d)
        y = torch.stack(y, 1).view(B, H, T, P, d).permute(0, 2, 3, 1, 4).reshape(B, T, P, C)
        return self.proj(y), (weights - learned['start']).unflatten(0, (B, H))

    def hand_over(self, memory):
        """The state that the next clip starts from."""
        return self.carry_bias.sigmoid() * memory

    def learned(self, clips):
        """What each head has learned, once for every clip: {name: (G,...)}, G = clips * heads."""
        learned = {'start': self.memory, 'rates': torch.stack([self.eta_bias, self.alpha_bias], -1)}  # (H,.,.), (H,1,2)
        if self.hidden:
            learned |= {'start': torch.cat([self.layer1, self.layer2.mT], 1), 'M_0': self.memory}
        if self.surprise:
            learned['gate'] = F.softplus(self.gate_bias)               # (H,1)
        return {name: p.expand(clips, *p.shape).flatten(0, 1) for name, p in learned.items()}

    def parts(self, weights, learned):
        """What read() needs of the weights (G,.,.) for each part of M: {'k', 'v', 'mem', 'rates' (eta, alpha), 'all'}."""
        d = self.memory.shape[-1]

        def rows(matrix):
            return *matrix.split((d, d, d, 2), 1), matrix              # one split: its gradient is one concatenation
        names = 'k', 'v', 'mem', 'rates', 'all'
        if not self.hidden:
            return dict(zip(names, zip(rows(weights))))
        w1, w2 = weights.split((3 * d + 2, d), 1)
        return {name: (m_0, w, w2) for name, m_0, w in zip(names, rows(learned['M_0']), rows(w1))}

    def read(self, part, x):
        """A part of M(x), x (G,P,d) → (G,P,rows of the part)."""
        linear, *layers = part
        y = x.bmm(linear.mT)
        return y + x.bmm(layers[1]).tanh().bmm(layers[0].mT) if layers else y

    def write(self, weights, parts, learned, k_in, v_in, rope):
        """
        Write one chunk of P tokens: weights (G,.,.) and their parts(), k_in and v_in (G,P,d) → weights after the chunk.

        k, v, eta, alpha and the self-generated targets t = M_c(v) are taken at the chunk's start M_c (Eq. 90). The
        tokens of a frame have no order, so they are written together, as one proximal step of DGD's objective:
            |W - a W_c|^2 + sum_i eta_i |M(k_i) - t_i|^2,   a = prod_i alpha_i  (retention)
        is minimised by W = (a W_c + (T - K M_0^T)^T E K) (I + K^T E K)^-1, which contracts for every eta > 0. What is
        forgotten relaxes to the learned M_0. Of two layers, W1 is written so with the hidden activations as keys, W2
        with the keys k, towards what one gradient step makes of its output.
        """
        d = k_in.shape[-1]
        k = rotate(unit(self.read(parts['k'], k_in)), rope)
        v = unit(self.read(parts['v'], v_in))
        eta, alpha = F.softplus(self.read(parts['rates'], k_in) + learned['rates']).unbind(-1)  # (G,P)
        # log alpha is divided by P: what a frame retains does not depend on the number of its patches.
        retained = torch.exp(-alpha.mean(-1))[:, None, None]
        if self.self_targets:
            # Kept to unit length where they are longer: P keys that ask for the same M(v) would otherwise let the memory
            # feed on itself and grow by up to sqrt(P) a step.
            target = self.read(parts['all'], v)                        # (G,P,3d+2)
            lengths = target.square() @ self.members                   # squared, (G,P,4)
            target = target * (lengths.clamp(min=1).rsqrt() @ self.members.mT)
        else:
            target = F.pad(v.repeat(1, 1, 3), (0, 2))
        if self.surprise or self.diagnostics is not None:              # |M_mem k - t|^2, (G,P)
            surprise = (self.read(parts['mem'], k) - target[..., 2 * d:3 * d]).square().sum(-1)
        if self.surprise:                                              # the gate opens with the retrieval error
            gate = surprise / (surprise + learned['gate'])
            eta = eta * gate
        if not self.hidden:
            new = self.proximal(learned['start'], weights, retained, k, eta, target)
            new = new if self.adapting is None else torch.where(self.adapting, new, weights)
        else:
            (start1, start2), (w1, w2) = (x.split((3 * d + 2, d), 1) for x in (learned['start'], weights))
            z = k.bmm(w2)
            hidden = z.tanh()
            target = target - k.bmm(learned['M_0'].mT)                 # what is left for the two layers, (G,P,3d+2)
            error = hidden.bmm(w1.mT) - target
            if self.adapting is not None:
                error = error * self.adapting.mT
            step = error.bmm(w1) * (1 - hidden * hidden)               # gradient of 1/2 |M(k) - t|^2 at the hidden layer's z
            new1 = self.proximal(start1, w1, retained, hidden, eta, target)
            new1 = new1 if self.adapting is None else torch.where(self.adapting, new1, w1)
            new2 = self.proximal(start2.mT, w2.mT, retained, k, eta, z - step)
            new = torch.cat([new1, new2.mT], 1)
        if self.diagnostics is not None:
            start = learned['start']
            self.diagnostics.append({
                'surprise': surprise.sqrt().mean(), 'write strength': (eta / (1 + eta)).mean(),
                'gate': gate.mean() if self.surprise else torch.ones(()), 'retention': retained.mean(),
                'write norm': (new - start.lerp(weights, retained)).norm(), 'drift': (new - start).norm() / self.memory.norm()})
        return new

    def proximal(self, start, weights, retained, keys, eta, target):
        """
        Weights (G,r,c) from their start (G,r,c), written with keys (G,P,c) and targets (G,P,r) → weights (G,r,c).

        With dgd: the minimum of |W - a W_c|^2 + sum eta |(S + W) k - t|^2, S the start and W, W_c the changes from it. Without:
        one gradient step of its second term, whose rate eta / (1 + sum eta) keeps it from overshooting; what DGD adds is that
        the step knows of the other keys.
        """
        Ek = eta[..., None] * keys
        kept = start.lerp(weights, retained)                           # S + a W_c
        if not self.dgd:
            rate = 1 / (1 + eta.sum(-1))[:, None, None]
            return kept + rate * (target - keys.bmm(kept.mT)).mT.bmm(Ek)
        gram = torch.baddbmm(torch.eye(keys.shape[-1], device=keys.device, dtype=keys.dtype), keys.mT, Ek)  # positive definite
        # I + PSD is well conditioned; solve() is slower
        return torch.baddbmm(kept, target.mT, Ek).bmm(torch.linalg.inv_ex(gram)[0])


class Level(MLP):
    """
    A level of the CMS: what an MLP and a gain of the input add to it, gain * x + fc2(gelu(fc1(x))).

    The gain starts at 0. Written online, it is the one number that scales what passes through the level: what a push does
    in a world of another mass. log_rates, learned on streams, say how fast each of these weights is written online, against
    the others. Weights may carry a leading dimension n, one set for each n-th of the batch.
    """

    def __init__(self, width, hidden):
        super().__init__(width, hidden)
        self.gain = nn.Parameter(torch.zeros(()))
        # The gain is one number; a step of the MLP adds up thousands and starts at a tenth of its rate.
        self.log_rates = nn.ParameterDict({name.replace('.', '_'): nn.Parameter(torch.tensor(0.0 if name == 'gain' else -2.3))
                                           for name, _ in self.named_parameters()})

    def forward(self, x):
        """x (B,T,P,C) → (B,T,P,C)."""
        if self.fc1.weight.dim() == 2:
            return self.gain * x + super().forward(x)
        rows = x.reshape(len(self.fc1.weight), -1, x.shape[-1])        # (n,B/n*T*P,C)
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
        added = 0                                                      # the block has a residual path of its own, and
        for level in self.levels:                                      # y - x at the end would cancel in bfloat16
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
    L = loss^2 / 2: the gradient of the loss times the loss itself. What is well predicted hardly writes. At every tick all
    changes, and the gradients that wait for a slow level's turn, are multiplied by a retention that is earned:
    min(1, L_0 / L)^2, where L_0 is that of the unwritten weights on the same clip. Where the old world is back, the writes
    predict worse than no writes and are forgotten within two clips; where they help they stay, and no decay wears them out.
    """

    def __init__(self, predictor, rate, streams=1):
        self.predictor, self.periods = predictor, predictor.sizes['cms_periods']
        self.rate, self.streams, self.ticks = rate, streams, 0
        self.levels, self.log_rates = [{} for _ in self.periods], {}
        for place, module in predictor.named_modules():
            if isinstance(module, Level):
                for name, p in module.named_parameters():
                    if not name.startswith('log_rates'):
                        self.levels[int(place.rpartition('.')[2])][f'{place}.{name}'] = p
                        self.log_rates[f'{place}.{name}'] = module.log_rates[name.replace('.', '_')]
        self.changes = {name: p.new_zeros(streams, *p.shape) for level in self.levels for name, p in level.items()}
        self.sums = {name: torch.zeros_like(change) for name, change in self.changes.items()}
        self.retention, self.write_norms = torch.ones(()), [torch.zeros(())] * len(self.periods)
        self.refresh()

    def __call__(self, *args, **kwargs):
        """The predictor's forward with the written weights; every n-th of the batch has those of its stream."""
        return torch.func.functional_call(self.predictor, self.weights, args, kwargs)

    def refresh(self):
        """The written weights. Their gradient is also that of the initial weights (first order)."""
        self.weights = {name: p + self.changes[name] for level in self.levels for name, p in level.items()}

    def tick(self, losses, initial_losses, retain_graph=False):
        """
        Look back at one clip of every stream: write the levels that are due by the gradients of losses (streams,), and
        forget by what the unwritten weights would have reached, initial_losses (streams,).
        """
        gradients = torch.autograd.grad(losses.square().sum() / 2, list(self.weights.values()), retain_graph=retain_graph)
        self.ticks += 1
        earned = (initial_losses / losses.detach().clamp(min=1e-12)).clamp(max=1).pow(4)  # (L_0 / L)^2
        for name, gradient in zip(self.weights, gradients):
            kept = earned.view(-1, *[1] * (gradient.dim() - 1))
            self.changes[name] = kept * self.changes[name]
            self.sums[name] = kept * (self.sums[name] + gradient)      # taken at weights of which as much is left
        for i, (level, period) in enumerate(zip(self.levels, self.periods)):
            if self.ticks % period == 0:
                steps = {name: self.rate / period * self.log_rates[name].exp() * self.sums[name] for name in level}
                for name in level:
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
        return [{'writes': self.ticks // period, 'retention': self.retention.item(), 'write norm': norm.item(),
                 'drift': (self.norm(self.changes, level) / sum(p.square().sum() for p in level.values()).sqrt()).item()}
                for level, period, norm in zip(self.levels, self.periods, self.write_norms)]

    def state(self):
        """What a later writer needs to go on, for load(): plain values and tensors."""
        return {'ticks': self.ticks, 'changes': dict(self.changes), 'sums': dict(self.sums)}

    def load(self, state):
        """Go on from state()."""
        self.ticks, self.changes, self.sums = state['ticks'], dict(state['changes']), dict(state['sums'])
        self.refresh()


class HopeBlock(nn.Module):
    """x + attention(LN x), then x + Titan(LN x), then x + CMS(LN x); mixer = 'attention' or 'titan' leaves the other out."""

    def __init__(self, sizes):
        super().__init__()
        width, mixer = sizes['width'], sizes['mixer']

        def norm():
            return nn.LayerNorm(width, eps=1e-6)
        self.attn_norm, self.attn = (norm(), Attention(width, sizes['heads'])) if mixer != 'titan' else (None, None)
        self.titan_norm, self.titan = (norm(), TitanMemory(sizes)) if mixer != 'attention' else (None, None)
        self.cms_norm, self.cms = norm(), CMS(width, sizes['cms_hidden'], len(sizes['cms_periods']))

    def forward(self, x, rope, memory=None):
        """x (B,T,P,C), rope: see Predictor.rope, memory of this block or None → (B,T,P,C), memory."""
        new = None
        if self.attn:
            x = x + self.attn.block_causal(self.attn_norm(x), rope)
        if self.titan:
            y, new = self.titan(self.titan_norm(x), rope, memory if memory is None else self.titan.hand_over(memory))
            x = x + y
        return x + self.cms(self.cms_norm(x)), new
