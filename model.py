"""The predictor of the V-JEPA 2 family: sizes, 3D RoPE, attention, block, predictor with actions, losses.

ViT-AC is Predictor with the Block below, AC-HOPE-ViT is Predictor with hope.HopeBlock: see hope.build.
Source: V-JEPA 2 (Assran et al., 2025), whose parameter names, layout and initialisation are kept."""
import dataclasses
import math
from collections import namedtuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import refuse


@dataclasses.dataclass
class Sizes:
    """Every size of a predictor, as checkpoints store them. Refuses a width that the heads cannot share."""
    model: str             # 'vit' or 'hope'
    feature_dim: int       # D
    action_dim: int        # A
    state_dim: int         # size of the optional state token; 0 = none
    world: bool            # a memory of the present world in the first block: hope.WorldHead
    steps: int             # T, time steps of a clip
    grid: tuple            # rows and columns of patches, N = rows * columns
    depth: int             # blocks
    width: int             # C
    heads: int             # H
    mlp_hidden: int        # ViT-AC: hidden width of the MLP
    cms_hidden: int        # HOPE: hidden width of each CMS level
    cms_periods: tuple     # HOPE: ticks between the writes of the CMS levels, fast to slow
    mixer: str             # HOPE: 'titan', 'attention' or 'both', attention first
    conv: bool             # a 3x3 depthwise convolution over the patches of a step: see PatchConv
    memory_hidden: int     # HOPE: hidden width of the two-layer Titan memory; 0 = matrix memory
    self_targets: bool     # HOPE: the target of each memory is M(v); if False, v itself
    surprise: bool         # HOPE: the retrieval error gates the writes
    rule: str              # HOPE: how the memory is written, 'dgd' or 'delta' (see TitanMemory)
    rope: str              # 'paired' (a true rotation) or 'vjepa2' (the published models' form)
    normed_output: bool    # z_hat is layer-normed; False for the published predictor, whose loss does that

    @classmethod
    def from_config(cls, config, **more):
        """The sizes among a script's config {name: value}; more: sizes that come from the data."""
        return cls(**{name: config[name] for name in cls.__annotations__ if name in config} | more)

    def __post_init__(self):
        if self.width % self.heads or self.width < 6 * self.heads:
            refuse(f'width = {self.width}: must be a multiple of heads = {self.heads}, six times it or more')


def rope_angles(position, head_dim, form='paired'):
    """Rotation angles of tokens: position (...,3) as time, row, column → (...,head_dim) radians.
    Time, row and column have n = 2*floor(floor(head_dim/3)/2) channels each, w_j = 10000^(-2j/n); the others
    are not rotated. 'paired': both members of a pair share a frequency. 'vjepa2': they do not, as in the
    published weights, which is no true rotation."""
    n = 2 * (head_dim // 3 // 2)
    omega = 10000 ** (-torch.arange(0, n, 2, device=position.device, dtype=torch.float32) / n)
    angles = position[..., None].float() * omega                       # (...,3,n/2)
    angles = angles.repeat_interleave(2, -1) if form == 'paired' else torch.cat([angles, angles], -1)
    return F.pad(angles.flatten(-2), (0, head_dim - 3 * n))


def rotate(x, rope):
    """Rotate x (...,tokens,head_dim) by (cos, sin), which broadcast to it; pairs are adjacent channels."""
    cos, sin = rope
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], -1)
    return x * cos + turned.flatten(-2) * sin


AT_ONCE = 256      # tokens whose attention is computed under one mask, but at least one step


def block_causal(q, k, v, P):
    """Attention of each token to its own and earlier steps of P tokens: q, k, v (B,H,T*P,d) → (B,H,T*P,d)."""
    tokens = q.shape[2]
    step = torch.arange(tokens, device=q.device) // P
    at_once = max(1, AT_ONCE // P) * P
    y = []
    # One mask for all steps would throw half of the scores away.
    for first, queries in zip(range(0, tokens, at_once), q.split(at_once, 2)):
        last = first + queries.shape[2]
        mask = step[first:last, None] >= step[:last] if last > first + P else None
        y.append(F.scaled_dot_product_attention(queries, k[:, :, :last], v[:, :, :last], attn_mask=mask))
    return torch.cat(y, 2)


class Attention(nn.Module):
    """Block-causal multi-head attention. A linear layer gives [q; k; v], each with its heads side by side."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, rope):
        """x (B,T,P,C), P tokens per step, rope: (cos, sin) of queries and of keys → (B,T,P,C)."""
        qkv = self.qkv(x.flatten(1, 2)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous()              # each (B,H,T*P,d)
        # On a CPU attention is slower in bfloat16, which autocast would choose again.
        if v.dtype == torch.bfloat16 and v.device.type == 'cpu':
            v = v.float()
        q, k = (rotate(part, turn).to(v.dtype) for part, turn in zip((q, k), rope))
        with torch.autocast(x.device.type, enabled=False):
            y = block_causal(q, k, v, x.shape[2])
        return self.proj(y.transpose(1, 2).flatten(2)).view(x.shape)


class MLP(nn.Module):
    """fc2(gelu(fc1(x))) with the exact-erf GELU; as wide at its end as at its start, or `out` wide."""

    def __init__(self, width, hidden, out=None):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out or width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class PatchConv(nn.Conv2d):
    """A 3x3 depthwise convolution over the grid of patches, added to the tokens; a no-op at first."""

    def __init__(self, sizes):
        super().__init__(sizes.width, sizes.width, 3, padding=1, groups=sizes.width)
        self.grid = sizes.grid
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        """x (B,T,P,C), of whose P tokens the last N are patches → (B,T,P,C)."""
        conditions = x.shape[2] - math.prod(self.grid)
        patches = x[:, :, conditions:].flatten(0, 1).unflatten(1, self.grid)           # (B*T,rows,columns,C)
        added = super().forward(patches.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
        return x + F.pad(added, (0, 0, conditions, 0)).view(x.shape)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(LN x), then x + MLP(LN x)."""

    def __init__(self, sizes):
        super().__init__()
        width = sizes.width
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.conv = PatchConv(sizes) if sizes.conv else nn.Identity()
        self.attn = Attention(width, sizes.heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, sizes.mlp_hidden)

    def forward(self, x, rope, memory=None, head=nn.Identity(), jump=False):
        """x (B,T,P,C), rope: see Predictor.rope, head: the world head's → (B,T,P,C), None (no memory)."""
        x = head(x + self.attn(self.conv(self.norm1(x)), rope))
        return x + self.mlp(self.norm2(x)), None


class Predictor(nn.Module):
    """Action-conditioned predictor: Linear D→C, tokens of conditions and patches, blocks, LN, Linear C→D."""

    def __init__(self, sizes, block, inverse=None, world=None):
        super().__init__()
        width = sizes.width
        self.sizes = sizes
        self.checkpointing = False     # if set, blocks are computed again in the backward pass: less memory
        self.predictor_embed = nn.Linear(sizes.feature_dim, width)
        self.action_encoder = nn.Linear(sizes.action_dim, width)
        self.state_encoder = None
        if sizes.state_dim:
            self.state_encoder = nn.Linear(sizes.state_dim, width)
            if sizes.rope == 'vjepa2':
                self.extrinsics_encoder = nn.Linear(sizes.action_dim - 1, width)     # published, never used
        self.predictor_blocks = nn.ModuleList(block(sizes) for _ in range(sizes.depth))
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, sizes.feature_dim)
        # V-JEPA 2's initial values; the last layer of a residual branch is divided by sqrt(2 * layer).
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            if name.startswith('predictor_blocks') and name.endswith(('proj', 'fc2')):
                module.weight.data /= math.sqrt(2 * (1 + int(name.split('.')[1])))
        # Last, so that the others' initial values do not depend on them.
        self.inverse = inverse(sizes) if sizes.world else None
        self.world = world(sizes) if sizes.world else None

    def rope(self, steps, conditions, tau, device):
        """(cos, sin) of queries and of keys for `steps` steps of tokens; they broadcast to (B,H,steps*P,d).

        A query sits at the time of the step that it predicts, a key at the time of the step that it comes
        from. If both were rotated by the same time, the rotations would cancel. In the published form a query
        that predicts step t + 1 sits at t. Conditioning tokens come first and are rotated in time only. They
        predict nothing: in a jump, too, their queries sit one step later, whatever step is asked for."""
        time = torch.arange(steps, device=device).view(1, steps, 1, 1)
        next_time = time + 1
        query_time = next_time if tau is None else tau.view(-1, 1, 1, 1)
        if self.sizes.rope == 'vjepa2':
            next_time, query_time = next_time - 1, query_time - 1
        return self.rotation(query_time, next_time, conditions), self.rotation(time, time, conditions)

    def rotation(self, time, condition_time, conditions):
        """Times of patches (b,steps,1,1), of conditions (1,steps,1,1) → (cos, sin), each (b,1,steps*P,d)."""
        rows, columns = self.sizes.grid
        row = torch.arange(rows, device=time.device) * 1.0
        # The published scale: columns span as much as rows, whatever their number.
        column = torch.arange(columns, device=time.device) * (rows / columns)
        place = F.pad(torch.cartesian_prod(row, column), (1, 0, conditions, 0))            # (P,3)
        of_conditions = condition_time.expand(len(time), -1, conditions, 1)
        of_patches = time.expand(-1, -1, rows * columns, 1)
        position = F.pad(torch.cat([of_conditions, of_patches], 2), (0, 2)) + place        # (b,steps,P,3)
        angle = rope_angles(position, self.sizes.width // self.sizes.heads, self.sizes.rope)
        angle = angle.flatten(1, 2).unsqueeze(1)                                           # (b,1,steps*P,d)
        return angle.cos(), angle.sin()

    def forward(self, z, a, tau=None, memory=None, states=None):
        """Predict features, by teacher forcing or by a jump → (z_hat, memory).

        tau None: z (B,T,N,D), a (B,T,A) → z_hat (B,T,N,D); z_hat[:,t] predicts z[:,t+1] from steps <= t.
        tau (B,) integer, 0-based: z (B,1,N,D), a (B,1,A) → z_hat (B,N,D) predicts step tau in one pass.
        states (B,T or more,S): where the predictor has a state token.
        memory: what an earlier call returned, None for that of new streams, {} for none at all; {'world': see
        hope.WorldHead.forward, 'titan': [a tensor (B,...) per block]}, each clip of a batch with its own, or
        n clips in a row with the same, (B/n,...). A jump reads it and hands it on as it is. Teacher forcing
        writes it, 'world' only over two steps or more, which show motion."""
        B, T, N, _ = z.shape
        assert tau is None or T == 1, 'a jump takes the first step alone'
        assert (states is None) == (self.state_encoder is None), 'states are given if there is a state token'
        memory = self.start(B) if memory is None else memory
        uses_world = 'world' in memory and (tau is not None or T > 1)
        new_memory = dict(memory)
        shown = self.inverse.look(z, a[:, 0]) if uses_world and tau is None else None

        def head(x):
            x, new_memory['world'] = self.world(x, z, a[:, 0], memory['world'], shown)
            return x
        conditions = [self.action_encoder(a)]
        if states is not None:
            conditions.append(self.state_encoder(states[:, :T]))
        x = torch.cat([torch.stack(conditions, 2), self.predictor_embed(z)], 2)      # (B,T,P,C)
        rope = self.rope(T, len(conditions), tau, z.device)
        titan = memory.get('titan', [None] * len(self.predictor_blocks))
        written = []
        for i, (block, state) in enumerate(zip(self.predictor_blocks, titan)):
            given = x, rope, state, head if i == 0 and uses_world else nn.Identity(), tau is not None
            x, new = checkpoint(block, *given, use_reentrant=False) if self.checkpointing else block(*given)
            written.append(new)
        if tau is None and written[0] is not None:
            new_memory['titan'] = written
        z_hat = self.predictor_proj(self.predictor_norm(x[:, :, -N:]))
        if self.sizes.normed_output:
            z_hat = F.layer_norm(z_hat, z_hat.shape[-1:])
        return z_hat if tau is None else z_hat[:, 0], new_memory

    def start(self, streams):
        """The memory that so many new streams start from: home, if there is a world head."""
        return {'world': self.world.start(streams)} if self.world else {}

    @torch.no_grad()
    def settle(self, z, a):
        """Make A home: the world head keeps what clips z (B,T,N,D), a (B,T,A) show."""
        rope = self.rope(1, 1, None, z.device)
        x = torch.cat([self.action_encoder(a[:, :1, None]), self.predictor_embed(z[:, :1])], 2)
        shown = self.inverse.look(z[:, :-1], a[:, 0])
        self.predictor_blocks[0](x, rope, None, lambda x: self.world.settle(x, z, a[:, 0], shown))


def feature_loss(z_hat, z):
    """The loss of predicted features: mean L1 per clip (V-JEPA 2, Eq. 2). z_hat and z (B,...) → (B,)."""
    return (z_hat - z).abs().flatten(1).mean(1)


def teacher_forcing_loss(predictor, z, a, memory=None, states=None):
    """Mean L1 of all one-step predictions (V-JEPA 2, Eq. 2): z (B,T,N,D), a (B,T,A) → scalar, new memory."""
    # The last step is only a target: after a write of it, which no training made, jumps to it would suffer.
    z_hat, memory = predictor(z[:, :-1], a[:, :-1], memory=memory, states=states)
    return feature_loss(z_hat[None], z[None, :, 1:])[0], memory      # the batch as one clip: a mean over all


def jump_loss(predictor, z, a, tau, states=None):
    """L1 of step tau predicted from z_1, a_1 alone: z (B,T,N,D), a (B,T,A), tau (B,) → (B,), one per clip."""
    z_hat, _ = predictor(z[:, :1], a[:, :1], tau, {}, states)
    return feature_loss(z_hat, z[torch.arange(len(z), device=z.device), tau])


def stream_loss(predictor, z, a, tau, clips):
    """jump_loss of each clip with what those before it in its stream wrote → L1 (S,n), -log p(e) (S,n)."""
    shown = predictor.inverse.look(z[:, :-1], a[:, 0])._replace(streams=len(z) // clips)
    z_hat, memory = predictor(z[:, :1], a[:, :1], tau, {'world': shown})
    lost = feature_loss(z_hat, z[torch.arange(len(z), device=z.device), tau])
    return lost.unflatten(0, (-1, clips)), memory['world']


def predict_jumps(predictor, z, a, targets, memory=None, states=None):
    """Jumps to the target steps (K,) from step 1 and the action alone: z (B,T,N,D), a (B,T,A) → (B,K,N,D)."""
    K = len(targets)
    first, push = (part.repeat_interleave(K, 0) for part in (z[:, :1], a[:, :1]))
    states = None if states is None else states.repeat_interleave(K, 0)
    z_hat, _ = predictor(first, push, targets.repeat(len(z)), memory, states)          # (B*K,N,D)
    return z_hat.unflatten(0, (-1, K))


def predict_rollout(predictor, z, a, targets, memory=None, states=None):
    """Feed predictions back, from step 1 to the target steps (K,): z (B,T,N,D), a (B,T,A) → (B,K,N,D)."""
    seen = z[:, :1]
    for t in range(1, int(targets.max()) + 1):
        z_hat, _ = predictor(seen, a[:, :t], memory=memory, states=states)
        seen = torch.cat([seen, z_hat[:, -1:]], 1)
    return seen[:, targets]


def rollout_loss(predictor, z, a, tau, states=None):
    """L1 of step tau after feeding predictions back: z (B,T,N,D), a (B,T,A), tau (B,), all equal → (B,)."""
    return feature_loss(predict_rollout(predictor, z, a, tau[:1], states=states), z[:, tau[:1]])


# A loss, train(predictor, z, a, tau, states=None) → (B,), beside teacher forcing, and how such a predictor
# predicts, predict(predictor, z, a, targets, memory=None, states=None) → (B,K,N,D). Steps are 0-based.
Loss = namedtuple('Loss', 'train predict')
LOSSES = {'jump': Loss(jump_loss, predict_jumps), 'rollout': Loss(rollout_loss, predict_rollout)}


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon (Jordan et al., 2024) with steps as large as AdamW's, but in float32: that works in
    bfloat16, which most CPUs have to emulate."""

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, {'lr': lr, 'weight_decay': weight_decay, 'momentum': momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group['params']:
                if p not in self.state:
                    self.state[p]['momentum_buffer'] = torch.zeros_like(p)
                mean = self.state[p]['momentum_buffer']
                mean.lerp_(p.grad, 1 - group['momentum'])
                p.mul_(1 - group['lr'] * group['weight_decay'])
                turn = orthogonal(p.grad.lerp(mean, group['momentum']))
                p.sub_(0.2 * group['lr'] * max(p.shape) ** 0.5 * turn)


def orthogonal(x):
    """The orthogonal matrix next to x (m,n), roughly: five Newton-Schulz iterations with Muon's numbers."""
    if len(x) > x.shape[1]:
        return orthogonal(x.T).T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x


def make_optimizers(predictor, kind, rate, muon_rate, beta2, weight_decay):
    """'adamw': AdamW of all parameters; 'muon': AdamW, and in two halves Muon (Jordan et al., 2024) of the
    matrices of blocks and of the world head. Group 'scale': the peak of its rate over that of AdamW. Decay
    by role: matrices of linear maps decay, all else (a memory's retention, biases) does not."""
    modules = predictor.named_modules()
    matrices = {f'{name}.weight' for name, module in modules if isinstance(module, nn.Linear)}
    of_muon, decaying, others = [], [], []
    for name, p in predictor.named_parameters():
        inside = kind == 'muon' and name.startswith(('predictor_blocks', 'world'))
        group = others if name not in matrices else of_muon if inside else decaying
        group.append(p)
    groups = [{'params': decaying, 'weight_decay': weight_decay, 'scale': 1.0},
              {'params': others, 'weight_decay': 0.0, 'scale': 1.0}]
    adamw = torch.optim.AdamW(groups, lr=rate, betas=(0.9, beta2), fused=True)
    halves = [{'params': half, 'scale': muon_rate / rate} for half in (of_muon[::2], of_muon[1::2]) if half]
    return [adamw, *(Muon([half], muon_rate, weight_decay) for half in halves)]


def rate_at(step, steps, start, peak, warmup, decay):
    """Learning rate at a step: linear warm-up from start to peak, constant, linear decay to 0."""
    rising = min(1.0, (step + 1) / (warmup * steps + 1))
    falling = min(1.0, (steps - step) / (decay * steps + 1e-9))
    return (start + (peak - start) * rising) * falling
