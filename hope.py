"""
HOPE: self-modifying Titan memory written by Delta Gradient Descent (DGD), and the Continuum Memory System (CMS).

Source: "Nested Learning: The Illusion of Deep Learning Architectures" (Behrouz et al., 2025); equation numbers are
that paper's. AC-HOPE-ViT is model.Predictor with HopeBlock: the Titan memory stands where attention stood, the CMS
where the MLP stood. Everything else (tokens, positions, interface) is shared with ViT-AC.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import MLP, rotate

PERIODS = 1, 4, 16           # ticks between the writes of the CMS levels, fast to slow


def unit(x):
    """x scaled to unit length along its last dimension; the bound keeps the gradient finite at 0, where idle tokens are."""
    return F.normalize(x, dim=-1, eps=1e-3)


class TitanMemory(nn.Module):
    """
    Five associative memories per head with fast weights per clip: M_k, M_v, M_mem (d→d), M_eta, M_alpha (d→1).

    Each is a matrix memory in residual form, M(x) = M_0 x + W x, where M_0 is an ordinary parameter that starts at the
    identity (zero for eta and alpha, which have one output), and the fast weights W start at 0. All are written with
    the same keys, so they are the rows of one matrix M (3d+2,d) per clip and head, in the order k, v, mem, eta, alpha
    (Eq. 83-87). The query does not adapt.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads, d = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)                         # query, and the inputs of M_k and of M_v
        self.proj = nn.Linear(width, width)
        identity = F.pad(torch.eye(d).repeat(3, 1), (0, 0, 0, 2))      # (3d+2,d)
        self.memory = nn.Parameter(identity + 0.02 * torch.randn(heads, 3 * d + 2, d))
        # An idle action token (all zeros) would read nothing and stay exactly zero through every block, where LayerNorm's
        # gradient is 1/sqrt(eps): over a dozen blocks it overflows. This gives it something to ask for.
        self.query_bias = nn.Parameter(0.02 * torch.randn(heads, 1, d))
        self.eta_bias = nn.Parameter(torch.full((heads, 1), 2.0))      # softplus(2) = 2.1: two thirds of the error are written
        # Retention per step exp(-softplus(-4)) = 0.98, so 0.86 over a clip of 8; a memory that starts at 0.5 per step
        # remembers nothing.
        self.alpha_bias = nn.Parameter(torch.full((heads, 1), -4.0))

    def forward(self, x, rope_q, rope_k, memory=None):
        """x (B,T,P,C), memory (B,H,3d+2,d) or None → y (B,T,P,C), memory after the last step's writes."""
        B, T, P, C = x.shape
        H, d = self.heads, C // self.heads
        qkv = self.qkv(x).view(B, T, P, 3, H, d).permute(3, 1, 0, 4, 2, 5)
        q, k_in, v_in = qkv.to(self.memory.dtype).contiguous()           # each (T,B,H,P,d)
        cos_q, sin_q, cos_k, sin_k = (r.unflatten(2, (T, P)).movedim(2, 0) for r in rope_q + rope_k)  # (T,b,1,P,d)
        M = self.memory.expand(B, -1, -1, -1) if memory is None else memory
        y = []
        with torch.autocast(x.device.type, enabled=False):             # a memory in bfloat16 would lose what it sums up
            q = rotate(unit(q + self.query_bias), (cos_q, sin_q))
            for q_t, k_t, v_t, *rope_t in zip(*(r.unbind(0) for r in (q, k_in, v_in, cos_k, sin_k))):  # chunk = step
                M = self.write(M, k_t, v_t, rope_t)
                y.append(q_t @ M[:, :, 2 * d:3 * d].mT)                # read after the write: M_mem(q), (B,H,P,d)
        y = torch.stack(y, 1).transpose(2, 3).reshape(B, T, P, C)      # (B,T,H,P,d) → (B,T,P,H*d)
        return self.proj(y), M

    def write(self, M, k_in, v_in, rope):
        """
        Write one chunk of P tokens: M (B,H,3d+2,d), k_in and v_in (B,H,P,d) → M after the chunk.

        k, v, eta, alpha and the self-generated targets t = M_c(v) are taken at the chunk's start M_c (Eq. 90). The
        tokens of a frame have no order, so they are written together, as one proximal step of DGD's objective: M minimises
            |M - (M_0 + a (M_c - M_0))|^2 + sum_i eta_i |M k_i - t_i|^2,   a = prod_i alpha_i  (retention),
        which is M = (M_0 + a (M_c - M_0) + T^T E K) (I + K^T E K)^-1. It contracts for every eta > 0. What is forgotten
        relaxes to the learned initial memory; relaxing to 0 would unlearn M_0 itself within a few clips.
        """
        d = k_in.shape[-1]
        M_k, M_v, _, M_eta_alpha = M.split([d, d, d, 2], dim=2)
        k = rotate(unit(k_in @ M_k.mT), rope)
        v = unit(v_in @ M_v.mT)
        eta, alpha = (k_in @ M_eta_alpha.mT).unbind(-1)                # (B,H,P)
        # Self-generated targets, kept to unit length where they are longer: P keys that ask for the same M(v) would
        # otherwise let the memory feed on itself and grow by up to sqrt(P) a step.
        target = v @ M.mT                                              # (B,H,P,3d+2)
        vectors = F.normalize(target[..., :3 * d].unflatten(-1, (3, d)), dim=-1, eps=1.0).flatten(-2)
        target = torch.cat([vectors, F.normalize(target[..., 3 * d:], dim=-1, eps=1.0)], -1)
        Ek = F.softplus(eta + self.eta_bias)[..., None] * k
        # log alpha is divided by P: what a frame retains does not depend on the number of its patches.
        retained = torch.exp(-F.softplus(alpha + self.alpha_bias).mean(-1))[..., None, None]
        gram = torch.eye(d, device=k.device) + k.mT @ Ek               # (B,H,d,d), symmetric positive definite
        goal = torch.lerp(self.memory, M, retained) + target.mT @ Ek        # (B,H,3d+2,d)
        return goal @ torch.linalg.inv_ex(gram)[0]                     # I + PSD is well conditioned; solve() is slower


def hand_on(memory, clips):
    """
    The memories of b shown clips as the start of a batch of `clips` others: row j*n of the batch is shown clip j (the
    batch was shown [::n]), and no row gets the memory of a clip of its own group, which could hold its answer.
    """
    if len(memory[0]) < 2:
        raise ValueError('one shown clip cannot hand its memory to another')
    return [m.roll(1, 0).repeat_interleave(-(-clips // len(m)), 0)[:clips] for m in memory]


class CMS(nn.Module):
    """
    Continuum Memory System: a chain of residual MLPs, fast to slow (Eq. 70). Every level processes every token; what
    differs is how often its weights are written online (PERIODS, CMSWriter).
    """

    def __init__(self, width, hidden):
        super().__init__()
        self.levels = nn.ModuleList(MLP(width, hidden) for _ in PERIODS)

    def forward(self, x):
        """x (...,C) → what the chain adds to x, (...,C)."""
        added = 0                                                      # the block has a residual path of its own, and
        for level in self.levels:                                      # y - x at the end would cancel in bfloat16
            added = added + level(x + added)
        return added


class CMSWriter:
    """
    The online writes of a predictor's CMS levels: level l is written when the tick counter is a multiple of C_l,

        theta_l <- theta_l0 + retention * (theta_l - theta_l0) - rate / C_l * sum of its gradients since the last write

    (Eq. 71 with eta_l = rate / C_l, so that a slow level steps along the mean gradient of its window). The retention
    towards the learned initial value theta_l0, once per write, lets the fast level forget a passing domain while the
    slow one hardly moves. One tick per look-back. Changes the weights of the predictor it is given.
    """

    def __init__(self, predictor, rate, retention):
        chains = [block.cms.levels for block in predictor.predictor_blocks]
        self.levels = [[p for chain in chains for p in chain[i].parameters()] for i in range(len(PERIODS))]
        self.initial = [[p.detach().clone() for p in level] for level in self.levels]
        self.sums = [[torch.zeros_like(p) for p in level] for level in self.levels]
        self.rate, self.retention, self.ticks = rate, retention, 0

    def tick(self, loss):
        """Take the gradients of one look-back loss and write the levels whose turn it is."""
        grads = iter(torch.autograd.grad(loss, [p for level in self.levels for p in level]))
        self.ticks += 1
        for period, level, initial, sums in zip(PERIODS, self.levels, self.initial, self.sums):
            for p, start, total in zip(level, initial, sums):
                total += next(grads)
                if self.ticks % period == 0:
                    p.data = start + self.retention * (p.data - start) - self.rate / period * total
                    total.zero_()

    def drift(self):
        """|theta_l - theta_l0| / |theta_l0| of each level, fast to slow."""
        return [(sum((p - s).square().sum() for p, s in zip(*pair)) / sum(s.square().sum() for s in pair[1])).sqrt().item()
                for pair in zip(self.levels, self.initial)]


class HopeBlock(nn.Module):
    """x + Titan(LN x), then x + CMS(LN x)."""

    def __init__(self, sizes):
        super().__init__()
        width = sizes['width']
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = TitanMemory(width, sizes['heads'])
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.cms = CMS(width, sizes['cms_hidden'])

    def forward(self, x, rope_q, rope_k, memory=None):
        """x (B,T,P,C), memory of this block or None → (B,T,P,C), memory."""
        y, memory = self.attn(self.norm1(x), rope_q, rope_k, memory)
        x = x + y
        return x + self.cms(self.norm2(x)), memory
