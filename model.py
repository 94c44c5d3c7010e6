"""
The predictor of the V-JEPA 2 family: sizes, 3D RoPE, attention, block, action-conditioned predictor; losses.

    predictor = hope.build(Sizes(model='vit', feature_dim=48))
    z_hat, memory = predictor(z, a, tau=None, memory=None)      # see Predictor.forward

Predictor is the whole interface. ViT-AC is Predictor with the Block below, AC-HOPE-ViT is Predictor with hope.HopeBlock.
Sources: V-JEPA 2 (Assran et al., 2025), whose parameter names, layout and initialisation are kept.
"""
import dataclasses
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import Refusal


# ---- sizes -----------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Sizes:
    """
    Every size of a predictor. The defaults are the laptop's, and those of train.py's knobs. A checkpoint stores its sizes.

    cms_periods and adapts may also be text, as in a config file: '1,4,16' and 'k,v,mem'. Raises Refusal for sizes that do
    not fit together.
    """

    # 'vit' or 'hope'
    model: str = 'hope'
    # D
    feature_dim: int = 48
    # A
    action_dim: int = 2
    # Size of the optional state token; 0 = none
    state_dim: int = 0
    # Whether actions pass through an action memory (see hope.ActionMemory)
    action_memory: bool = True
    # T, time steps of a clip
    steps: int = 8
    # Rows and columns of patches, N = rows * columns; None = a square grid of any N
    grid: tuple = (4, 4)
    depth: int = 2
    # C
    width: int = 96
    heads: int = 4
    # ViT-AC: hidden width of the MLP
    mlp_hidden: int = 384
    # HOPE: hidden width of each CMS level
    cms_hidden: int = 236
    # HOPE: ticks between the writes of the CMS levels, fast to slow
    cms_periods: tuple = (1, 4, 16)
    # HOPE: 'titan', 'attention' or 'both', attention first
    mixer: str = 'both'
    # HOPE: a 3x3 depthwise convolution over the patches of a step, before the memory
    conv: bool = True
    # HOPE: hidden width of the two-layer Titan memory; 0 = matrix memory
    memory_hidden: int = 0
    # HOPE: the memories that are written
    adapts: tuple = ('k', 'v', 'mem', 'eta', 'alpha')
    # HOPE: the target of each memory is M(v); if False, v itself
    self_targets: bool = True
    # HOPE: the retrieval error gates the writes
    surprise: bool = True
    # HOPE: how the memory is written, 'dgd' or 'delta' (see TitanMemory)
    rule: str = 'dgd'
    # 'paired' (a true rotation) or 'vjepa2' (the published models' form)
    rope: str = 'paired'
    # z_hat is layer-normed; False for the published predictor, whose loss does that
    normed_output: bool = True

    @classmethod
    def from_settings(cls, settings, **more):
        """The sizes among a script's settings or a config file's values; more: sizes that come from the data."""
        names = {field.name for field in dataclasses.fields(cls)}
        chosen = {name: value for name, value in settings.items() if name in names}
        return cls(**chosen, **more)

    def __post_init__(self):
        if isinstance(self.cms_periods, str):
            try:
                self.cms_periods = tuple(int(word) for word in self.cms_periods.split(','))
            except ValueError:
                raise Refusal(f'cms_periods = {self.cms_periods!r}: must be whole numbers separated by commas') from None
        if isinstance(self.adapts, str):
            self.adapts = tuple(self.adapts.split(','))
        self.check()

    def check(self):
        """Raise Refusal for sizes that do not fit together."""
        if self.width % self.heads or self.width // self.heads < 6:
            raise Refusal(f'width {self.width} must be a multiple of heads {self.heads}, with at least 6 channels per head')
        if min(self.cms_periods) < 1:
            given = ','.join(map(str, self.cms_periods))
            raise Refusal(f'cms_periods = {given!r}: a level cannot be written more often than at every tick (1)')
        if self.action_memory and (self.grid is None or self.steps < 3):
            raise Refusal(f'action_memory: needs clips of three steps or more, not {self.steps}, and the grid of patches')
        if self.model == 'vit' or self.mixer == 'attention':
            return
        memories = set(Sizes.adapts)
        adapts = set(self.adapts)
        if not adapts or adapts - memories:
            raise Refusal(f'adapts = {", ".join(self.adapts)!r}: allowed are {", ".join(Sizes.adapts)}')
        all_adapt = self.self_targets and adapts == memories
        if self.memory_hidden and not all_adapt:
            raise Refusal(f'memory_hidden = {self.memory_hidden}: the memories share the hidden layer, so all of '
                          f'{", ".join(Sizes.adapts)} must adapt, with self_targets = True; or set memory_hidden = 0')


# ---- 3D rotary position embedding ----------------------------------------------------------------------------------

def rope_angles(position, head_dim, form='paired'):
    """
    Rotation angles of tokens: position (...,3) as time, row, column → (...,head_dim) radians.

    Time, row and column have n = 2*floor(floor(head_dim/3)/2) channels each, w_j = 10000^(-2j/n). The remaining channels
    are not rotated. 'paired': both members of a pair share a frequency. 'vjepa2': the angles are tiled, as in the
    published weights, so the members of a pair turn at different rates (not a true rotation).
    """
    n = 2 * (head_dim // 3 // 2)
    omega = 10000 ** (-torch.arange(0, n, 2, device=position.device, dtype=torch.float32) / n)
    # (...,3,n/2)
    angles = position[..., None].float() * omega
    if form == 'paired':
        angles = angles.repeat_interleave(2, dim=-1)
    else:
        angles = torch.cat([angles, angles], dim=-1)
    return F.pad(angles.flatten(-2), (0, head_dim - 3 * n))


def rotate(x, rope):
    """Apply a rotation rope = (cos, sin), each broadcastable to x (...,tokens,head_dim); pairs are adjacent channels."""
    cos, sin = rope
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return x * cos + turned * sin


# ---- transformer block ---------------------------------------------------------------------------------------------

# Tokens whose attention is computed at once, but at least one step: short steps together under a mask, long ones alone.
AT_ONCE = 256


def block_causal(q, k, v, P):
    """
    Attention of each token to its own and earlier steps, P tokens each: q, k, v (B,H,T*P,d) → (B,H,T*P,d).

    Each step gets a prefix of the keys. Under one mask for all steps, half would be computed to be thrown away.
    """
    T = q.shape[2] // P
    at_once = max(1, AT_ONCE // P)
    y = []
    for first in range(0, T, at_once):
        last = min(first + at_once, T)
        rows = slice(first * P, last * P)
        seen = slice(0, last * P)
        mask = None
        if last > first + 1:
            step = torch.arange(last * P, device=q.device) // P
            mask = step[rows, None] >= step
        y.append(F.scaled_dot_product_attention(q[:, :, rows], k[:, :, seen], v[:, :, seen], attn_mask=mask))
    return torch.cat(y, 2)


class Attention(nn.Module):
    """
    Block-causal multi-head attention: a token attends to its own and earlier steps. One linear layer gives [q; k; v], each
    with its heads side by side.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, rope):
        """x (B,T,P,C), P tokens per step, rope: see Predictor.rope → (B,T,P,C)."""
        T, P = x.shape[1:3]
        q, k, v = self.project(x.flatten(1, 2), rope)                  # (B,H,T*P,d)
        # Autocast would turn to bfloat16 what project() keeps in float32.
        with torch.autocast(x.device.type, enabled=False):
            y = block_causal(q, k, v, P)
        y = y.transpose(1, 2).flatten(2)                               # (B,T*P,C)
        return self.proj(y).unflatten(1, (T, P))

    def project(self, x, rope):
        """x (B,S,C), rope: (cos, sin) of queries and of keys → q, k, v, each (B,H,S,d), q and k rotated."""
        B, S, C = x.shape
        qkv = self.qkv(x).view(B, S, 3, self.heads, C // self.heads)
        # each (B,H,S,d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous()
        if v.dtype == torch.bfloat16 and v.device.type == 'cpu':
            # Attention is slower in bfloat16 there.
            v = v.float()
        rope_q, rope_k = rope
        return rotate(q, rope_q).to(v.dtype), rotate(k, rope_k).to(v.dtype), v

class MLP(nn.Module):
    """fc2(gelu(fc1(x))) with the exact-erf GELU."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(LN x), then x + MLP(LN x)."""

    def __init__(self, sizes):
        super().__init__()
        width = sizes.width
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, sizes.heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, sizes.mlp_hidden)

    def forward(self, x, rope, memory=None):
        """x (B,T,P,C), rope: see Predictor.rope → (B,T,P,C), None (no memory)."""
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x)), None


# ---- predictor -----------------------------------------------------------------------------------------------------

class Predictor(nn.Module):
    """Action-conditioned predictor: Linear D→C, conditioning tokens and patches per step, blocks, LN, Linear C→D."""

    def __init__(self, sizes, block, action_memory=None):
        super().__init__()
        width = sizes.width
        self.sizes = sizes
        # Whether blocks keep their input alone and are computed again in the backward pass, which takes less memory.
        self.checkpointing = False
        self.predictor_embed = nn.Linear(sizes.feature_dim, width)
        self.action_encoder = nn.Linear(sizes.action_dim, width)
        self.state_encoder = None
        if sizes.state_dim:
            self.state_encoder = nn.Linear(sizes.state_dim, width)
        self.extrinsics_encoder = None
        if sizes.state_dim and sizes.rope == 'vjepa2':
            # Part of the published weights, though the published model is never given extrinsics.
            self.extrinsics_encoder = nn.Linear(sizes.action_dim - 1, width)
        self.predictor_blocks = nn.ModuleList(block(sizes) for _ in range(sizes.depth))
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, sizes.feature_dim)
        self.initialise()
        # After the others, whose initial values do not depend on it then.
        self.action_memory = action_memory(sizes) if sizes.action_memory else None

    def initialise(self):
        """
        V-JEPA 2's initial values: normal with standard deviation 0.02, biases 0, the last linear layer of each residual
        branch divided by sqrt(2 * layer). Parameters outside linear layers (HOPE's memories) keep their initial values.
        """
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
            if name.startswith('predictor_blocks') and name.endswith(('.attn.proj', '.titan.proj', '.fc2')):
                layer = int(name.split('.')[1]) + 1
                module.weight.data /= math.sqrt(2 * layer)

    def rope(self, steps, conditions, patches, tau, device):
        """
        (cos, sin) of queries and of keys for `steps` steps of tokens, each broadcastable to (B,H,steps*P,d).

        P = conditions + patches: conditioning tokens come first and are rotated in time only.
        A query sits at the time of the step that it predicts, a key at the time of the step that it comes from. If both
        were rotated by the same time, the rotations would cancel. In the published form a query that predicts step t + 1
        sits at t. Raises ValueError where the number of patches does not fit the grid.
        """
        time = torch.arange(steps, device=device).view(1, steps, 1, 1)
        query_time = time + 1
        if tau is not None:
            query_time = tau.view(-1, 1, 1, 1)
        if self.sizes.rope == 'vjepa2':
            query_time = query_time - 1
        place = self.places(conditions, patches, device)
        head_dim = self.sizes.width // self.sizes.heads

        def rotation(when):
            """when (b,steps,1,1) → (cos, sin), each (b,1,steps*P,d)."""
            b = len(when)
            times = when.expand(b, steps, len(place), 1)
            places = place.expand(b, steps, len(place), 2)
            position = torch.cat([times, places], -1)
            angle = rope_angles(position, head_dim, self.sizes.rope)
            angle = angle.flatten(1, 2).unsqueeze(1)
            return angle.cos(), angle.sin()
        return rotation(query_time), rotation(time)

    def places(self, conditions, patches, device):
        """Row and column of the tokens of one step, (P,2); conditioning tokens are at 0, 0."""
        side = math.isqrt(patches)
        rows, columns = self.sizes.grid or (side, side)
        if rows * columns != patches:
            why = f'a grid of {rows} x {columns}' if self.sizes.grid else 'a square; name it with grid=(rows, columns)'
            raise ValueError(f'z has {patches} patches per step, which is not {why}')
        row = torch.arange(rows, device=device) * 1.0
        # The published scale: columns span as much as rows, whatever their number.
        column = torch.arange(columns, device=device) * (rows / columns)
        row, column = torch.meshgrid(row, column, indexing='ij')
        place = torch.stack([row.flatten(), column.flatten()], -1)
        return F.pad(place, (0, 0, conditions, 0))

    def forward(self, z, a, tau=None, memory=None, states=None, extrinsics=None):
        """
        Predict features, by teacher forcing or by a jump.

        tau None: z (B,T,N,D), a (B,T,A) → z_hat (B,T,N,D); z_hat[:,t] predicts z[:,t+1] from steps <= t.
        tau (B,) integer, 0-based: z (B,1,N,D), a (B,1,A) → z_hat (B,N,D) predicts step tau in one pass.
        memory: what an earlier call returned, or None for the learned initial memory. Clip b of the batch reads and writes
        its own memory only. Returns (z_hat, memory). A memory is a list of tensors (B,...): that of the action memory, if
        there is one, then those of HOPE's blocks; None where there is neither. The action memory is written by teacher
        forcing over at least two steps. The prediction of a clip never depends on what the same clip writes there.
        z_hat is layer-normed like z, except where the predictor comes from load_vjepa2.
        states (B,T,S): required where the predictor has a state token. extrinsics (B,T,A-1) of the camera: optional, for a
        predictor of the published form, which then gets a third conditioning token. Raises ValueError for wrong shapes.
        """
        B, T, N, _ = z.shape
        if tau is not None and (T != 1 or tau.shape != (B,)):
            raise ValueError(f'a jump takes z (B,1,N,D) and tau (B,), not {tuple(z.shape)} and {tuple(tau.shape)}')
        if (states is None) != (self.state_encoder is None):
            raise ValueError('states must be given exactly where the predictor has a state token')
        if extrinsics is not None and self.extrinsics_encoder is None:
            raise ValueError('extrinsics were given to a predictor that has no extrinsics_encoder')
        memory = list(memory or [])
        new_memory = []
        if self.action_memory is not None:
            state = memory.pop(0) if memory else None
            # A single step shows no motion, and a jump only reads.
            if tau is None and T > 1:
                new_memory.append(self.action_memory.write(z, a[:, 0], state))
            else:
                new_memory.append(self.action_memory.start(B) if state is None else state)
            a = self.action_memory(a, state)
        conditions = [self.action_encoder(a)]
        if states is not None:
            conditions.append(self.state_encoder(states))
        if extrinsics is not None:
            conditions.append(self.extrinsics_encoder(extrinsics))
        # (B,T,P,C), P = conditions + N
        x = torch.cat([torch.stack(conditions, dim=2), self.predictor_embed(z)], dim=2)
        rope = self.rope(T, len(conditions), N, tau, z.device)
        for block in self.predictor_blocks:
            state = memory.pop(0) if memory else None
            if self.checkpointing and torch.is_grad_enabled():
                x, new = checkpoint(block, x, rope, state, use_reentrant=False)
            else:
                x, new = block(x, rope, state)
            if new is not None:
                new_memory.append(new)
        z_hat = self.predictor_proj(self.predictor_norm(x[:, :, -N:]))
        if self.sizes.normed_output:
            z_hat = F.layer_norm(z_hat, z_hat.shape[-1:])
        if tau is not None:
            z_hat = z_hat[:, 0]
        return z_hat, new_memory or None


# ---- losses: L1 on layer-normed features ---------------------------------------------------------------------------

def feature_loss(z_hat, z):
    """The loss of predicted features: mean L1 per clip (V-JEPA 2, Eq. 2). z_hat and z (B,...) → (B,)."""
    return (z_hat - z).abs().flatten(1).mean(1)


def teacher_forcing_loss(predictor, z, a, memory=None, states=None):
    """
    Mean L1 of every one-step prediction (V-JEPA 2, Eq. 2): z (B,T,N,D), a (B,T,A) → scalar, memory after the clips.

    states (B,T,S): for a predictor with a state token, here and in a rollout.
    Steps 1..T-1 are written to the memory, the last is only a target. Clips are written to a memory by this call only, in
    training and at test time. A test-time write of step T would spoil jumps to T: training never wrote a key at that time.
    """
    if states is not None:
        states = states[:, :-1]
    z_hat, memory = predictor(z[:, :-1], a[:, :-1], memory=memory, states=states)
    # With the batch as a single clip, the loss is one mean over all clips and steps.
    loss = feature_loss(z_hat[None], z[None, :, 1:])[0]
    return loss, memory


def jump_loss(predictor, z, a, tau, memory=None):
    """L1 of step tau predicted from z_1, a_1 alone: z (B,T,N,D), a (B,T,A), tau (B,) 0-based → (B,), one per clip."""
    z_hat, _ = predictor(z[:, :1], a[:, :1], tau=tau, memory=memory)
    clip = torch.arange(len(z), device=z.device)
    return feature_loss(z_hat, z[clip, tau])


def rollout(predictor, z, a, steps, memory=None, states=None):
    """
    Feed predictions back: z (B,T,N,D), of which only step 1 is used, a (B,T,A) → steps 2..steps+1, (B,steps,N,D).

    States, like actions, are the true ones, as in the published training.
    """
    seen = z[:, :1]
    for t in range(steps):
        known = None if states is None else states[:, :t + 1]
        z_hat, _ = predictor(seen, a[:, :t + 1], memory=memory, states=known)
        seen = torch.cat([seen, z_hat[:, -1:]], dim=1)
    return seen[:, 1:]


def rollout_loss(predictor, z, a, steps, memory=None, states=None):
    """L1 of the last of `steps` predictions, each fed back: z (B,T,N,D), a (B,T,A) → (B,), one per clip."""
    predictions = rollout(predictor, z, a, steps, memory, states)
    return feature_loss(predictions[:, -1], z[:, steps])


# ---- devices ---------------------------------------------------------------------------------------------------------

def pick_device(name):
    """'auto' → CUDA, else MPS, else CPU; any other name is checked. Raises Refusal for a device that is not here."""
    cuda = torch.cuda.is_available()
    mps = torch.backends.mps.is_available()
    if name == 'auto' and cuda:
        return 'cuda'
    if name == 'auto':
        return 'mps' if mps else 'cpu'
    gpus = torch.cuda.device_count() if cuda else 0
    present = {'cpu': 1, 'cuda': gpus, 'mps': int(mps)}
    kind, colon, index = name.partition(':')
    if kind not in present or (colon and not index.isdecimal()):
        raise Refusal(f'--device={name}: allowed are auto, cpu, mps, cuda, cuda:0, cuda:1, ...')
    if int(index or 0) >= present[kind]:
        raise Refusal(f'--device={name}: there is no such device here; --device=cpu runs anywhere')
    return name


def autocast(device, dtype, width):
    """
    The context in which a model of this width computes on a device: in bfloat16, or in float32, where it changes nothing.

    dtype: 'float32', 'bfloat16', or 'auto': bfloat16 on a CUDA device that has it, and on a CPU that multiplies matrices in
    it if the model is at least 256 wide. Narrower ones gain little, and the published figures are theirs in float32.
    """
    kind = torch.device(device).type
    fast = dtype == 'bfloat16'
    if dtype == 'auto' and kind == 'cuda':
        fast = torch.cuda.is_bf16_supported()
    if dtype == 'auto' and kind == 'cpu':
        able = torch.cpu.get_capabilities()
        fast = width >= 256 and any(able.get(name) for name in ('avx512_bf16', 'amx_bf16', 'bf16'))
    return torch.autocast(kind, torch.bfloat16, enabled=fast)
