"""
The V-JEPA 2 family: 3D RoPE, attention, block, frozen video encoder, action-conditioned predictor; losses; checkpoints.

    predictor, checkpoint = load('out/hope.pt')                 # eval mode
    z_hat, memory = predictor(z, a, tau=None, memory=None)      # see Predictor.forward

Predictor is the whole interface. ViT-AC is Predictor with the Block below, AC-HOPE-ViT is Predictor with hope.HopeBlock.
Sources: V-JEPA 2 (Assran et al., 2025), whose parameter names, layout and initialisation are kept.
"""
import hashlib
import io
import json
import math
import os
import pickle
import pickletools
import re
import struct
import zipfile

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import Refusal
from data import write_atomically

# What a file with odd content leads to
MALFORMED = ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError

SIZES = {                    # every size of a predictor, with the laptop default; a checkpoint stores its own
    'model': 'vit',          # 'vit' or 'hope'
    'feature_dim': 96,       # D
    'action_dim': 2,         # A
    'state_dim': 0,          # size of the optional state token; 0 = none
    'grid': (4, 4),          # rows, columns of patches; N = rows * columns; None = square, whatever N is
    'depth': 4,
    'width': 96,             # C
    'heads': 4,
    'mlp_hidden': 384,       # ViT-AC: hidden width of the MLP
    'cms_hidden': 120,       # HOPE: hidden width of each CMS level
    'cms_periods': (1, 4, 16),  # HOPE: ticks between the writes of the CMS levels, fast to slow
    'mixer': 'both',         # HOPE: 'titan', 'attention' or 'both', attention first
    'conv': True,            # HOPE: a 3x3 depthwise convolution over the patches of a step, before the memory
    'memory_hidden': 0,      # HOPE: hidden width of the two-layer Titan memory; 0 = matrix memory
    'adapts': ('k', 'v', 'mem', 'eta', 'alpha'),  # HOPE: the memories that are written
    'self_targets': True,    # HOPE: each memory's target is M(v); else v itself
    'surprise': True,        # HOPE: writes are gated by the retrieval error
    'rule': 'delta',         # HOPE: how the memory is written, 'dgd' or 'delta' (see TitanMemory)
    'rope': 'paired',        # 'paired' (a true rotation) or 'vjepa2' (the published models' form)
    'normed_output': True,   # z_hat is layer-normed; the published predictor leaves that to its loss
}


# ---- 3D rotary position embedding ----------------------------------------------------------------------------------

def rope_angles(position, head_dim, form='paired'):
    """
    Rotation angles of tokens: position (...,3) as time, row, column → (...,head_dim) radians.

    n = 2*floor(floor(head_dim/3)/2) channels each for time, row and column, w_j = 10000^(-2j/n); the rest is not
    rotated. 'paired': both members of a pair share a frequency. 'vjepa2': the angles are tiled, as in the published
    weights, so the members of a pair turn at different rates (not a true rotation).
    """
    n = 2 * (head_dim // 3 // 2)
    omega = 10000 ** (-torch.arange(0, n, 2, device=position.device, dtype=torch.float32) / n)
    angles = position[..., None].float() * omega                       # (...,3,n/2)
    if form == 'paired':
        angles = angles.repeat_interleave(2, dim=-1)
    else:
        angles = angles.repeat(*[1] * (angles.dim() - 1), 2)
    return F.pad(angles.flatten(-2), (0, head_dim - 3 * n))


def rotate(x, rope):
    """Apply a rotation rope = (cos, sin), each broadcastable to x (...,tokens,head_dim); pairs are adjacent channels."""
    cos, sin = rope
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return x * cos + turned * sin


# ---- transformer block ---------------------------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head attention; one qkv linear with rows [q; k; v] and heads inside each."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, rope_q, rope_k, mask=None):
        """x (B,S,C), mask (S,S) bool, True where a query may look → (B,S,C)."""
        B, S, C = x.shape
        qkv = self.qkv(x).view(B, S, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.contiguous()                                     # each (B,H,S,d); reading them strided is a fifth slower
        q, k = rotate(q, rope_q).to(v.dtype), rotate(k, rope_k).to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(y.transpose(1, 2).reshape(B, S, C))

    def block_causal(self, x, rope):
        """x (B,T,P,C), P tokens per step; a token sees its own and earlier steps → (B,T,P,C)."""
        B, T, P, C = x.shape
        step = torch.arange(T * P, device=x.device) // P
        mask = step[:, None] >= step if T > 1 else None
        return self(x.view(B, T * P, C), rope[0], rope[1], mask).view(B, T, P, C)


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
        width = sizes['width']
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, sizes['heads'])
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, sizes['mlp_hidden'])

    def forward(self, x, rope, memory=None):
        """x (B,T,P,C), rope: see Predictor.rope → (B,T,P,C), None (no memory)."""
        x = x + self.attn.block_causal(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x)), None


class VideoEncoder(nn.Module):
    """
    The frozen V-JEPA 2 video encoder: 3D patches, full attention, final LayerNorm; no CLS token, no position table.

    version '2': V-JEPA 2 (Assran et al., 2025). '2.1': V-JEPA 2.1 (official repository, app/vjepa_2_1). It adds an embedding
    that tells a picture from a video, embeds a single frame by itself, and its rotation is a true one, on rows and columns
    stretched to the 16 x 16 patches of its pretraining. Raises ValueError for any other version.
    """

    def __init__(self, width, heads, depth, mlp_hidden, version='2'):
        super().__init__()
        if version not in ('2', '2.1'):
            raise ValueError(f"version {version!r}: allowed are '2' and '2.1'")
        self.version = version
        self.patch_embed = nn.ModuleDict({'proj': nn.Conv3d(3, width, (2, 16, 16), stride=(2, 16, 16))})
        sizes = {'width': width, 'heads': heads, 'mlp_hidden': mlp_hidden}
        self.head_dim = width // heads
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(depth))
        if version == '2':
            self.norm = nn.LayerNorm(width, eps=1e-6)
        else:
            self.patch_embed_img = nn.ModuleDict({'proj': nn.Conv3d(3, width, (1, 16, 16), stride=(1, 16, 16))})
            self.img_mod_embed = nn.Parameter(torch.zeros(1, 1, width))
            self.video_mod_embed = nn.Parameter(torch.zeros(1, 1, width))
            # The last one is the output's. The others served the distillation of intermediate layers.
            self.norms_block = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(4))

    def embed(self, video):
        """Video (B,3,F,H,W) → patches (B,D,T,rows,columns)."""
        single = video.shape[2] == 1
        if self.version == '2':
            # A tubelet is two frames: a single one is doubled.
            return self.patch_embed['proj'](video.repeat(1, 1, 2, 1, 1) if single else video)
        if single:
            return self.patch_embed_img['proj'](video) + self.img_mod_embed.view(-1, 1, 1, 1)
        return self.patch_embed['proj'](video) + self.video_mod_embed.view(-1, 1, 1, 1)

    def forward(self, video):
        """
        Normalised video (B,3,F,H,W) → features (B,T*N,D) ordered time, row, column; what fills no patch is dropped.

        A single frame gives one step. Raises ValueError for a video without frames and, in 2.1, for one row or one column.
        """
        if video.shape[2] == 0:
            raise ValueError('the video has no frames')
        x = self.embed(video)
        steps, rows, columns = x.shape[2:]
        position = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in (steps, rows, columns)))
        if self.version == '2.1':
            if min(rows, columns) == 1:
                raise ValueError(f'V-JEPA 2.1 needs two rows and two columns of patches, not {rows} x {columns}')
            position = position * torch.tensor([1, 15 / (rows - 1), 15 / (columns - 1)], device=x.device)
        angle = rope_angles(position, self.head_dim, 'vjepa2' if self.version == '2' else 'paired')
        rope = angle.cos(), angle.sin()
        x = x.flatten(2).transpose(1, 2).unsqueeze(1)                  # (B,1,S,D): one block of tokens, no mask
        for block in self.blocks:
            x, _ = block(x, (rope, rope))
        norm = self.norm if self.version == '2' else self.norms_block[-1]
        return norm(x).squeeze(1)


HEADS = {                    # width → heads of the published models
    'encoder': {768: 12, 1024: 16, 1280: 16, 1408: 22, 1664: 26},
    'predictor': {1024: 16, 384: 16},
}
TENSORS = {                  # how Hugging Face calls what the official files call ...
    'embeddings.patch_embeddings.proj': 'patch_embed.proj', 'layernorm': 'norm', 'layer': 'blocks',
    'attention.proj': 'attn.proj', 'attention.query': 'attn.q', 'attention.key': 'attn.k', 'attention.value': 'attn.v',
}


def peek(path):
    """What a file of torch.save holds, memory-mapped: only tensors that are used are read. Raises Refusal."""
    try:
        inspect(path)
        stored = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except (*MALFORMED, EOFError, OSError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise Refusal(f'{path}: not a file of weights ({type(error).__name__}: {str(error)[:100]})') from None
    return stored if isinstance(stored, dict) else {}


def read_weights(path, part):
    """
    The tensors of one part of an official V-JEPA 2 file under their official names → ({name: tensor}, heads or None).

    path: an official .pt, a .safetensors file, or a Hugging Face folder with config.json and *.safetensors. Nothing in a
    file is executed. Raises Refusal for a missing or broken file, and for a part that it does not have.
    """
    if not os.path.exists(path):
        raise Refusal(f'no V-JEPA 2 weights at {path!r}')
    files = sorted(f.path for f in os.scandir(path) if f.name.endswith('.safetensors')) if os.path.isdir(path) else [path]
    if not files:
        raise Refusal(f'{path}: a folder of weights holds *.safetensors files, this one has none')
    if not files[0].endswith('.safetensors'):
        parts = {k: v for k, v in peek(path).items() if isinstance(v, dict) and v}
        if part not in parts:
            raise Refusal(f'{path} has no part {part!r}; it has {", ".join(map(repr, parts)) or "none"}')
        return {str(k).removeprefix('module.').removeprefix('backbone.'): v for k, v in parts[part].items()}, None
    if part == 'predictor':
        raise Refusal(f'{path}: Hugging Face files hold no action-conditioned predictor; take vjepa2-ac-vitg.pt')
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise Refusal(f'{path}: .safetensors need the package: pip install safetensors') from None
    state, heads = {}, None
    try:
        for file in files:
            state |= {k.removeprefix('vjepa2.'): v for k, v in load_file(file).items()}
        if os.path.exists(config := os.path.join(path, 'config.json')):
            with open(config, encoding='utf-8') as f:
                heads = json.load(f).get('num_attention_heads')
    except (SafetensorError, OSError, ValueError) as error:
        raise Refusal(f'{path}: not a file of weights ({str(error)[:100]})') from None
    state = {k.removeprefix('encoder.'): v for k, v in state.items() if k.startswith('encoder.')}
    for theirs, ours in TENSORS.items():
        state = {re.sub(rf'(^|\.){re.escape(theirs)}\.', rf'\1{ours}.', k): v for k, v in state.items()}
    for k in [k for k in state if '.attn.q.' in k]:                    # one linear with rows [q; k; v]
        names = [k.replace('.attn.q.', f'.attn.{x}.') for x in 'qkv']
        if all(name in state for name in names):
            state[k.replace('.attn.q.', '.attn.qkv.')] = torch.cat([state.pop(name) for name in names])
    return state, heads


def load_vjepa2(path, part='target_encoder', heads=None, grid=None):
    """
    A module with official V-JEPA 2 weights, in eval mode, its sizes read from the weights.

    part: 'target_encoder' (what the action-conditioned model was trained on), 'encoder' or 'ema_encoder' (where the two
    distilled encoders of V-JEPA 2.1 lie) → VideoEncoder of V-JEPA 2 or 2.1, as the weights are; 'predictor' → Predictor,
    called as predictor(z, a, states=s), whose output is not layer-normed (as published). path: see read_weights.
    heads: where neither the width nor a config.json tells. grid: (rows, columns) of patches that the predictor is to
    see; None means square. Raises Refusal that names the first missing, unexpected or misshapen tensor; nothing is half
    loaded. Raises ValueError for the grid of an encoder, which reads it off the video.
    """
    if grid and part != 'predictor':
        raise ValueError(f'grid belongs to the predictor; part {part!r} takes it from the video')
    if part not in ('target_encoder', 'encoder', 'ema_encoder', 'predictor'):
        raise Refusal(f"part {part!r}: allowed are 'target_encoder', 'encoder', 'ema_encoder' and 'predictor'")
    state, told = read_weights(path, part)
    where = f'{path}, {part}'
    if odd := [k for k, v in state.items() if not torch.is_tensor(v)]:
        raise Refusal(f'{where}: {odd[0]} is not a tensor')
    state.pop('pos_embed', None)                                       # a stray one; rotary models have no use for it
    first = 'predictor_blocks' if part == 'predictor' else 'blocks'

    def size(name, axis=0):
        if name not in state or state[name].dim() <= axis:
            raise Refusal(f'{where}: tensor {name} is missing')
        return state[name].shape[axis]
    width = size('predictor_norm.weight' if part == 'predictor' else 'patch_embed.proj.weight')
    hidden = size(f'{first}.0.mlp.fc1.weight')
    depth = 1 + max(int(k.split('.')[1]) for k in state if re.match(rf'{first}\.\d+\.', k))
    depth = min(depth, len(state))                                     # a name alone builds no million blocks
    heads = heads or told or HEADS['predictor' if part == 'predictor' else 'encoder'].get(width)
    if not heads:
        raise Refusal(f'{where}: width {width} does not tell the number of heads; name it with heads=')
    if width % heads:
        raise Refusal(f'{where}: width {width} is not a multiple of {heads} heads')
    with torch.device('meta'):                                         # sizes first, memory only when all of them fit
        if part == 'predictor':
            net = build(feature_dim=size('predictor_embed.weight', 1), action_dim=size('action_encoder.weight', 1),
                        state_dim=size('state_encoder.weight', 1), grid=grid, depth=depth, width=width,
                        heads=heads, mlp_hidden=hidden, rope='vjepa2', normed_output=False)
        else:
            net = VideoEncoder(width, heads, depth, hidden, '2.1' if 'video_mod_embed' in state else '2')
    for name, tensor in net.state_dict().items():
        if name not in state:
            raise Refusal(f'{where}: tensor {name} is missing')
        if state[name].shape != tensor.shape:
            raise Refusal(f'{where}: tensor {name} is {tuple(state[name].shape)}, must be {tuple(tensor.shape)}')
    unexpected = sorted(set(state) - set(net.state_dict()))
    if unexpected:
        raise Refusal(f'{where}: {len(unexpected)} unexpected tensors, the first is {unexpected[0]}')
    net.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    return net.eval()


# ---- predictor -----------------------------------------------------------------------------------------------------

class Predictor(nn.Module):
    """Action-conditioned predictor: Linear D→C, conditioning tokens and patches per step, blocks, LN, Linear C→D."""

    def __init__(self, sizes, block, action_cms=None):
        super().__init__()
        width, rest = sizes['width'], sizes['width'] % sizes['heads']
        if rest or width // sizes['heads'] < 6:
            raise Refusal(f'width {width} must be a multiple of heads {sizes["heads"]}, with at least 6 channels per head')
        self.sizes = sizes
        self.predictor_embed = nn.Linear(sizes['feature_dim'], width)
        self.action_encoder = nn.Linear(sizes['action_dim'], width)
        self.action_cms = action_cms
        self.state_encoder = nn.Linear(sizes['state_dim'], width) if sizes['state_dim'] else None
        # The published weights have it and their model does not use it: its token is there only where extrinsics are given.
        published = self.state_encoder and sizes['rope'] == 'vjepa2'
        self.extrinsics_encoder = nn.Linear(sizes['action_dim'] - 1, width) if published else None
        self.predictor_blocks = nn.ModuleList(block(sizes) for _ in range(sizes['depth']))
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, sizes['feature_dim'])
        # V-JEPA 2: normal 0.02, biases 0, the last linear of each residual branch divided by sqrt(2 * layer). What a
        # block's constructor set apart from Linear layers (HOPE's memories) is not touched here.
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
                if name.startswith('predictor_blocks') and name.endswith(('.attn.proj', '.titan.proj', '.fc2')):
                    module.weight.data /= math.sqrt(2 * (int(name.split('.')[1]) + 1))

    def rope(self, steps, conditions, patches, tau, device):
        """
        (cos, sin) of queries and of keys for `steps` steps of tokens, each broadcastable to (B,H,steps*P,d).

        P = conditions + patches: conditioning tokens come first and are rotated in time only.
        A query sits at the time of the step that it predicts, a key at the time of the step that it comes from:
        rotating both by the same time would cancel. In the published form a query that predicts step t + 1 sits at t.
        Raises ValueError where the patches are not those of the grid.
        """
        rows, columns = self.sizes['grid'] or [math.isqrt(patches)] * 2
        if rows * columns != patches:
            why = f'a grid of {rows} x {columns}' if self.sizes['grid'] else 'a square; name it with grid=(rows, columns)'
            raise ValueError(f'z has {patches} patches per step, which is not {why}')
        row, column = torch.meshgrid(torch.arange(rows, device=device) * 1.0,
                                     torch.arange(columns, device=device) * (rows / columns), indexing='ij')
        place = F.pad(torch.stack([row.flatten(), column.flatten()], -1), (0, 0, conditions, 0))  # (P,2)
        time = torch.arange(steps, device=device).view(1, steps, 1, 1)
        query_time = time + 1 if tau is None else tau.view(-1, 1, 1, 1)
        if self.sizes['rope'] == 'vjepa2':
            query_time = query_time - 1

        def angles(when):                                              # (b,steps,1,1) → (b,1,steps*P,d)
            position = torch.cat([when.expand(-1, -1, len(place), 1), place.expand(*when.shape[:2], -1, 2)], -1)
            angle = rope_angles(position, self.sizes['width'] // self.sizes['heads'], self.sizes['rope'])
            return angle.flatten(1, 2).unsqueeze(1)
        return tuple((angle.cos(), angle.sin()) for angle in (angles(query_time), angles(time)))

    def forward(self, z, a, tau=None, memory=None, states=None, extrinsics=None):
        """
        Predict features, by teacher forcing or by a jump.

        tau None: z (B,T,N,D), a (B,T,A) → z_hat (B,T,N,D); z_hat[:,t] predicts z[:,t+1] from steps <= t.
        tau (B,) integer, 0-based: z (B,1,N,D), a (B,1,A) → z_hat (B,N,D) predicts step tau in one pass.
        memory: None starts from the learned initial memory, else what an earlier call returned; row b of the batch
        reads and writes row b alone. Returns (z_hat, memory); ViT-AC's memory is None. z_hat is layer-normed like z,
        but where the predictor comes from load_vjepa2.
        states (B,T,S) where the predictor has a state token. extrinsics (B,T,A-1), the camera's, add a third conditioning
        token to a predictor of the published form; without them there is none. Raises ValueError where shapes do not fit.
        """
        B, T, N, _ = z.shape
        if tau is not None and (T != 1 or tau.shape != (B,)):
            raise ValueError(f'a jump takes z (B,1,N,D) and tau (B,), not {tuple(z.shape)} and {tuple(tau.shape)}')
        if (states is None) != (self.state_encoder is None):
            raise ValueError('states must be given exactly where the predictor has a state token')
        if extrinsics is not None and self.extrinsics_encoder is None:
            raise ValueError('extrinsics were given to a predictor that has no extrinsics_encoder')
        if self.action_cms is not None:
            a = a + self.action_cms(a)
        conditions = [self.action_encoder(a)]
        if states is not None:
            conditions.append(self.state_encoder(states))
        if extrinsics is not None:
            conditions.append(self.extrinsics_encoder(extrinsics))
        x = torch.cat([torch.stack(conditions, dim=2), self.predictor_embed(z)], dim=2)  # (B,T,P,C), P = conditions + N
        rope = self.rope(T, len(conditions), N, tau, z.device)
        kept = []
        for i, block in enumerate(self.predictor_blocks):
            x, new = block(x, rope, None if memory is None else memory[i])
            kept.append(new)
        z_hat = self.predictor_proj(self.predictor_norm(x[:, :, -N:]))
        if self.sizes['normed_output']:
            z_hat = F.layer_norm(z_hat, z_hat.shape[-1:])
        return z_hat if tau is None else z_hat[:, 0], None if kept[0] is None else kept


def build(**sizes):
    """A predictor from SIZES with these overridden; raises Refusal for sizes that do not fit together."""
    unknown = set(sizes) - set(SIZES)
    if unknown:
        raise Refusal(f'no predictor has the sizes {", ".join(sorted(unknown))}')
    sizes = {**SIZES, **sizes}
    if sizes['model'] == 'vit':
        return Predictor(sizes, Block)
    from hope import CMS, HopeBlock  # here, because hope.py builds on this file
    return Predictor(sizes, HopeBlock, CMS(sizes['action_dim'], 16, len(sizes['cms_periods'])))


# ---- losses: L1 on layer-normed features ---------------------------------------------------------------------------

def feature_loss(z_hat, z):
    """The loss of predicted features: mean L1 per clip (V-JEPA 2, Eq. 2). z_hat and z (B,...) → (B,)."""
    return (z_hat - z).abs().flatten(1).mean(1)


def teacher_forcing_loss(predictor, z, a, memory=None):
    """
    Mean L1 of every one-step prediction (V-JEPA 2, Eq. 2): z (B,T,N,D), a (B,T,A) → scalar, memory after the clips.

    Steps 1..T-1 are written to the memory, the last is only a target. A memory is shown a clip in this way alone, at
    training and at test time: a key at a time that training never wrote (T) sends jumps to T astray.
    """
    z_hat, memory = predictor(z[:, :-1], a[:, :-1], memory=memory)
    return (z_hat - z[:, 1:]).abs().mean(), memory


def jump_loss(predictor, z, a, tau, memory=None):
    """L1 of step tau predicted from z_1, a_1 alone: z (B,T,N,D), a (B,T,A), tau (B,) 0-based → (B,), one per clip."""
    z_hat, _ = predictor(z[:, :1], a[:, :1], tau=tau, memory=memory)
    return (z_hat - z[torch.arange(len(z), device=z.device), tau]).abs().mean((1, 2))


def rollout(predictor, z, a, steps, memory=None):
    """Feed predictions back: z (B,T,N,D) of which step 1 alone is used, a (B,T,A) → steps 2..steps+1, (B,steps,N,D)."""
    seen = z[:, :1]
    for t in range(steps):
        z_hat, _ = predictor(seen, a[:, :t + 1], memory=memory)
        seen = torch.cat([seen, z_hat[:, -1:]], dim=1)
    return seen[:, 1:]


# ---- checkpoints and devices ---------------------------------------------------------------------------------------

def pick_device(name):
    """'auto' → CUDA, else MPS, else CPU; any other name is checked. Raises Refusal for a device that is not here."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == 'auto':
        return 'cuda' if cuda else 'mps' if mps else 'cpu'
    kind, _, index = name.partition(':')
    here = {'cpu': 1, 'cuda': torch.cuda.device_count() if cuda else 0, 'mps': int(mps)}.get(kind)
    if here is None or (index and not index.isdigit()):
        raise Refusal(f'--device={name}: allowed are auto, cpu, mps, cuda, cuda:0, cuda:1, ...')
    if int(index or 0) >= here:
        raise Refusal(f'--device={name}: there is no such device here; --device=cpu runs anywhere')
    return name


VERSION = 3                  # of the training code: raised when the same settings would no longer give the same weights
SEAL_BYTES = 64              # a file ends in the hex SHA-256 of every byte before it, which is the comment of the zip
BUILDERS = (r'collections (OrderedDict|Counter)|_codecs encode|(__builtin__|builtins) (set|complex)|torch\._utils '
            r'_rebuild_(tensor|tensor_v2|parameter)|torch (Size|device|bool|[a-z]+\d+|[A-Z]\w*Storage)')


def inspect(file):
    """
    Raise ValueError for a torch file with anything but tensors, numbers, text and containers of them.

    weights_only=True runs no code, but it still inflates what is compressed and makes a bytearray as long as it is told.
    """
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f'{member.filename} is compressed')
            if member.filename.lower().endswith('.pkl'):
                for operation, argument, _ in pickletools.genops(archive.read(member)):
                    if operation.name == 'GLOBAL' and not re.fullmatch(BUILDERS, argument):
                        raise ValueError(f'{argument.replace(" ", ".")} in it is neither a tensor nor a plain value')


def write_sealed(path, content):
    """Write a dict of tensors, numbers, text and containers of them atomically, closed by its checksum."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    inspect(buffer)
    buffer.seek(-2, os.SEEK_END)                                       # a zip ends in the length of its comment
    buffer.write(struct.pack('<H', SEAL_BYTES))
    buffer.write(hashlib.sha256(buffer.getbuffer()).hexdigest().encode())
    write_atomically(path, lambda f: f.write(buffer.getbuffer()))


def read_sealed(path, device='cpu'):
    """What write_sealed wrote; raises Refusal where a byte differs from what was written, or for what it never writes."""
    try:
        with open(path, 'rb') as f:
            raw = f.read()
        if hashlib.sha256(memoryview(raw)[:-SEAL_BYTES]).hexdigest().encode() != raw[-SEAL_BYTES:]:
            raise Refusal(f'{path} is damaged or cut short, or was not written by this code: its checksum does not fit; '
                          'put back a copy, or delete it and make it again')
        inspect(io.BytesIO(raw))
        return torch.load(io.BytesIO(raw), map_location=device, weights_only=True)
    except OSError as error:
        raise Refusal(f'{path} could not be read ({error.strerror})') from None
    except (*MALFORMED, zipfile.BadZipFile, pickle.UnpicklingError, EOFError) as error:
        raise Refusal(f'{path} is not a file of this code ({" ".join(str(error).split())[:200]})') from None


def save(path, predictor, **more):
    """
    Write a checkpoint atomically: sizes, weights and what else is handed in (tensors and plain values only).

    Raises Refusal for weights that are not finite and where it cannot be written; an earlier checkpoint is then untouched.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    state = predictor.state_dict()
    if not all(t.isfinite().all() for t in state.values()):
        raise Refusal(f'{path} was not written: a weight is NaN or infinite; what it held before is untouched')
    write_sealed(path, {'sizes': predictor.sizes, 'predictor': state, **more})


def start_from(predictor, path):
    """
    Give a predictor the weights of a checkpoint, ours or an official action-conditioned one → (names that start anew,
    names that are dropped).

    Ours must fit in every tensor. Of an official one the encoders of actions and states may have other sizes or be absent
    here (own clips have a push of two numbers and no states): those start anew or are dropped. Raises Refusal else.
    """
    new, dropped = [], []
    if not os.path.isfile(path):
        raise Refusal(f'init_from = {path}: there is no such file')
    if 'sizes' in peek(path):
        state = load(path)[0].state_dict()
    else:
        state, mine = load_vjepa2(path, 'predictor', predictor.sizes['heads']).state_dict(), predictor.state_dict()
        if predictor.sizes['rope'] != 'vjepa2':
            raise Refusal(f"{path}: official weights know the published rotation only; set rope = 'vjepa2'")
        for name in {**state, **mine}:
            if name.startswith(('action_encoder', 'state_encoder', 'extrinsics_encoder')):
                if name not in mine:
                    del state[name]
                    dropped.append(name)
                elif name not in state or state[name].shape != mine[name].shape:
                    state[name] = mine[name]
                    new.append(name)
    try:
        predictor.load_state_dict(state)
    except RuntimeError as error:
        raise Refusal(f'init_from = {path}: not this predictor: {" ".join(str(error).split())[:200]}') from None
    return new, dropped


def load(path, device='cpu', **fields):
    """
    Read a checkpoint → (predictor in eval mode on device, checkpoint dict); fields: name=type of what else it must hold.

    Raises Refusal where it is missing, damaged, not finite or not a checkpoint. Its sizes are believed only as far as its
    tensors go, so a stranger's file takes no more memory than a few times its own size.
    """
    if not os.path.isfile(path):
        raise Refusal(f'no checkpoint at {path}; train one with: python train.py config/hope_jump.py')
    checkpoint = read_sealed(path, device)
    try:
        sizes, state = {**SIZES, **checkpoint['sizes']}, checkpoint['predictor']
        if sum(t.nbytes for t in state.values()) > os.path.getsize(path):
            raise ValueError('tensors larger than the file')
        lengths = ['feature_dim', 'action_dim', 'state_dim', 'width', 'mlp_hidden', 'cms_hidden', 'memory_hidden']
        if max(sizes[k] for k in lengths) > max(t.numel() for t in state.values()) \
                or sizes['depth'] * len(sizes['cms_periods']) > len(state):
            raise ValueError('sizes that its tensors do not have')
        with torch.device('meta'):
            asked = build(**sizes).state_dict()
        odd = [k for k in {**asked, **state} if k not in asked or k not in state or asked[k].shape != state[k].shape]
        if odd:
            raise ValueError(f'{odd[0]} is not as its sizes say')
        if not all(t.isfinite().all() for t in state.values()):
            raise ValueError('a weight is NaN or infinite')
        for field, kind in fields.items():
            if type(checkpoint.get(field)) is not kind:
                raise ValueError(f'it has no {field}')
        predictor = build(**sizes)
        predictor.load_state_dict(state)
    except (Refusal, *MALFORMED) as error:
        raise Refusal(f'{path} is not a checkpoint of this code ({" ".join(str(error).split())[:200]})') from None
    return predictor.to(device).eval(), checkpoint
