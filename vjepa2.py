"""
Official V-JEPA 2 weights: the frozen video encoder, reading the published files, starting a predictor from them, and
their download.

    encoder = load_vjepa2('vitl.pt')                    # V-JEPA 2 or 2.1, as the weights are
    predictor = load_vjepa2('vjepa2-ac-vitg.pt', 'predictor')
    new, dropped = start_from(predictor, 'vjepa2-ac-vitg.pt')

Sources: V-JEPA 2 (Assran et al., 2025) and V-JEPA 2.1 (official repository, app/vjepa_2_1).
"""
import http.client
import json
import math
import os
import re
import urllib.error
import urllib.request
from typing import NamedTuple

import torch
import torch.nn as nn

import data
from configurator import Refusal
from hope import load
from model import Block, Predictor, Sizes, rope_angles
from support.files import peek, sha256


# ---- the video encoder -----------------------------------------------------------------------------------------------

class VideoEncoder(nn.Module):
    """
    The frozen V-JEPA 2 video encoder: 3D patches, full attention, final LayerNorm; no CLS token, no position table.

    version '2' or '2.1'. V-JEPA 2.1 adds an embedding that tells a picture from a video, embeds a single frame by itself,
    and its rotation is a true one, on rows and columns stretched to the 16 x 16 patches of its pretraining. Raises
    ValueError for any other version.
    """

    def __init__(self, width, heads, depth, mlp_hidden, version='2'):
        super().__init__()
        if version not in ('2', '2.1'):
            raise ValueError(f"version {version!r}: allowed are '2' and '2.1'")
        self.version = version
        self.patch_embed = nn.ModuleDict({'proj': nn.Conv3d(3, width, (2, 16, 16), stride=(2, 16, 16))})
        sizes = Sizes(width=width, heads=heads, mlp_hidden=mlp_hidden)
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
        # (B,1,S,D): one step of tokens, so there is no mask.
        x = x.flatten(2).transpose(1, 2).unsqueeze(1)
        for block in self.blocks:
            x, _ = block(x, (rope, rope))
        norm = self.norm if self.version == '2' else self.norms_block[-1]
        return norm(x).squeeze(1)


# ---- published files -------------------------------------------------------------------------------------------------

# width → heads of the published models
HEADS = {
    'encoder': {768: 12, 1024: 16, 1280: 16, 1408: 22, 1664: 26},
    'predictor': {1024: 16, 384: 16},
}
# Hugging Face's names → those of the official files
TENSORS = {
    'embeddings.patch_embeddings.proj': 'patch_embed.proj', 'layernorm': 'norm', 'layer': 'blocks',
    'attention.proj': 'attn.proj', 'attention.query': 'attn.q', 'attention.key': 'attn.k', 'attention.value': 'attn.v',
}


def read_weights(path, part):
    """
    The tensors of one part of an official V-JEPA 2 file under their official names → ({name: tensor}, heads or None).

    path: an official .pt, a .safetensors file, or a Hugging Face folder with config.json and *.safetensors. Nothing in a
    file is executed. Raises Refusal for a missing or broken file, and for a part that it does not have.
    """
    if not os.path.exists(path):
        raise Refusal(f'no V-JEPA 2 weights at {path!r}')
    files = [path]
    if os.path.isdir(path):
        files = sorted(entry.path for entry in os.scandir(path) if entry.name.endswith('.safetensors'))
    if not files:
        raise Refusal(f'{path}: a folder of weights holds *.safetensors files, this one has none')
    if not files[0].endswith('.safetensors'):
        return read_official(path, part), None
    if part == 'predictor':
        raise Refusal(f'{path}: Hugging Face files hold no action-conditioned predictor; take vjepa2-ac-vitg.pt')
    stored, heads = read_safetensors(path, files)
    return official_names(stored), heads


def read_official(path, part):
    """One part of an official .pt file → {name: tensor}."""
    parts = {name: value for name, value in peek(path).items() if isinstance(value, dict) and value}
    if part not in parts:
        raise Refusal(f'{path} has no part {part!r}; it has {", ".join(map(repr, parts)) or "none"}')
    return {str(name).removeprefix('module.').removeprefix('backbone.'): value for name, value in parts[part].items()}


def read_safetensors(path, files):
    """The tensors of .safetensors files under their own names, and the heads that a config.json in path names, or None."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise Refusal(f'{path}: .safetensors need the package: pip install safetensors') from None
    state, heads = {}, None
    config = os.path.join(path, 'config.json')
    try:
        for file in files:
            state.update(load_file(file))
        if os.path.exists(config):
            with open(config, encoding='utf-8') as f:
                heads = json.load(f).get('num_attention_heads')
    except (SafetensorError, OSError, ValueError) as error:
        raise Refusal(f'{path}: not a file of weights ({str(error)[:100]})') from None
    return state, heads


def official_names(stored):
    """Hugging Face's encoder tensors under their official names; queries, keys and values become one tensor, [q; k; v]."""
    state = {}
    for name, tensor in stored.items():
        name = name.removeprefix('vjepa2.')
        if not name.startswith('encoder.'):
            continue
        name = name.removeprefix('encoder.')
        for theirs, ours in TENSORS.items():
            name = re.sub(rf'(^|\.){re.escape(theirs)}\.', rf'\1{ours}.', name)
        state[name] = tensor
    for query in [name for name in state if '.attn.q.' in name]:
        names = [query.replace('.attn.q.', f'.attn.{x}.') for x in 'qkv']
        if all(name in state for name in names):
            state[query.replace('.attn.q.', '.attn.qkv.')] = torch.cat([state.pop(name) for name in names])
    return state


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
    for name, value in state.items():
        if not torch.is_tensor(value):
            raise Refusal(f'{where}: {name} is not a tensor')
    # Some files hold a table of positions, which a rotary model has no use for.
    state.pop('pos_embed', None)
    # Sizes first, memory only when all of them fit.
    with torch.device('meta'):
        if part == 'predictor':
            net = empty_predictor(state, where, heads, grid)
        else:
            net = empty_encoder(state, where, heads or told)
    wanted = net.state_dict()
    for name, tensor in wanted.items():
        if name not in state:
            raise Refusal(f'{where}: tensor {name} is missing')
        if state[name].shape != tensor.shape:
            raise Refusal(f'{where}: tensor {name} is {tuple(state[name].shape)}, must be {tuple(tensor.shape)}')
    unexpected = sorted(set(state) - set(wanted))
    if unexpected:
        raise Refusal(f'{where}: {len(unexpected)} unexpected tensors, the first is {unexpected[0]}')
    net.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return net.eval()


def length(state, where, name, axis=0):
    """The length of a tensor along an axis; raises Refusal where the tensor is missing."""
    if name not in state or state[name].dim() <= axis:
        raise Refusal(f'{where}: tensor {name} is missing')
    return state[name].shape[axis]


def depth_of(state, blocks):
    """The number of blocks that the names of the tensors tell, at most that of the tensors: a name alone is no block."""
    numbers = [int(name.split('.')[1]) for name in state if re.match(rf'{blocks}\.\d+\.', name)]
    return min(1 + max(numbers), len(state))


def check_heads(heads, width, where):
    """Raise Refusal for a number of heads that is not known or does not divide the width."""
    if not heads:
        raise Refusal(f'{where}: width {width} does not tell the number of heads; name it with heads=')
    if width % heads:
        raise Refusal(f'{where}: width {width} is not a multiple of {heads} heads')


def empty_encoder(state, where, heads):
    """A VideoEncoder of the sizes that the weights tell."""
    width = length(state, where, 'patch_embed.proj.weight')
    hidden = length(state, where, 'blocks.0.mlp.fc1.weight')
    heads = heads or HEADS['encoder'].get(width)
    check_heads(heads, width, where)
    version = '2.1' if 'video_mod_embed' in state else '2'
    return VideoEncoder(width, heads, depth_of(state, 'blocks'), hidden, version)


def empty_predictor(state, where, heads, grid):
    """A Predictor of the sizes that the weights tell, in the published form."""
    width = length(state, where, 'predictor_norm.weight')
    hidden = length(state, where, 'predictor_blocks.0.mlp.fc1.weight')
    heads = heads or HEADS['predictor'].get(width)
    check_heads(heads, width, where)
    sizes = Sizes(model='vit', width=width, heads=heads, depth=depth_of(state, 'predictor_blocks'), mlp_hidden=hidden,
                  feature_dim=length(state, where, 'predictor_embed.weight', 1),
                  action_dim=length(state, where, 'action_encoder.weight', 1),
                  state_dim=length(state, where, 'state_encoder.weight', 1),
                  grid=grid, rope='vjepa2', normed_output=False)
    return Predictor(sizes, Block)


# ---- starting from weights -------------------------------------------------------------------------------------------

def start_from(predictor, path):
    """
    Give a predictor the weights of a checkpoint, ours or an official action-conditioned one → (names that start anew,
    names that are dropped).

    Ours must fit in every tensor. Of an official one the encoders of actions and states may have other sizes or be absent
    here (own clips have a push of two numbers and no states): those start anew or are dropped. Raises Refusal else.
    """
    if not os.path.isfile(path):
        raise Refusal(f'init_from = {path}: there is no such file')
    new, dropped = [], []
    if 'sizes' in peek(path):
        state = load(path)[0].state_dict()
    else:
        state, new, dropped = official_start(predictor, path)
    try:
        predictor.load_state_dict(state)
    except RuntimeError as error:
        raise Refusal(f'init_from = {path}: not this predictor: {" ".join(str(error).split())[:200]}') from None
    return new, dropped


def official_start(predictor, path):
    """What a predictor takes of an official file → (its weights, names that start anew, names that are dropped)."""
    mine = predictor.state_dict()
    state = load_vjepa2(path, 'predictor', predictor.sizes.heads).state_dict()
    if predictor.sizes.rope != 'vjepa2':
        raise Refusal(f"{path}: official weights know the published rotation only; set rope = 'vjepa2'")
    new, dropped = [], []
    for name in {**state, **mine}:
        if not name.startswith(('action_encoder', 'state_encoder', 'extrinsics_encoder')):
            continue
        if name not in mine:
            del state[name]
            dropped.append(name)
        elif name not in state or state[name].shape != mine[name].shape:
            state[name] = mine[name]
            new.append(name)
    return state, new, dropped


# ---- download ----------------------------------------------------------------------------------------------------------

class Official(NamedTuple):
    """An official encoder: where its weights are published, and what it was trained on."""
    # On Hugging Face; None where the official file is all there is.
    repository: str | None
    # The official file, and the part of it that is the published encoder.
    file: str
    part: str
    # Side of a picture.
    pixels: int


OFFICIAL = 'https://dl.fbaipublicfiles.com/vjepa2'
MODELS = {
    # On Hugging Face: 1.3, 2.6, 4.1 and 4.1 GB.
    'vitl': Official('facebook/vjepa2-vitl-fpc64-256', 'vitl.pt', 'target_encoder', 256),
    'vith': Official('facebook/vjepa2-vith-fpc64-256', 'vith.pt', 'target_encoder', 256),
    'vitg': Official('facebook/vjepa2-vitg-fpc64-256', 'vitg.pt', 'target_encoder', 256),
    'vitg384': Official('facebook/vjepa2-vitg-fpc64-384', 'vitg-384.pt', 'target_encoder', 384),
    # V-JEPA 2.1: official files only. The first two were distilled from the last.
    'vitb2.1': Official(None, 'vjepa2_1_vitb_dist_vitG_384.pt', 'ema_encoder', 384),
    'vitl2.1': Official(None, 'vjepa2_1_vitl_dist_vitG_384.pt', 'ema_encoder', 384),
    'vitg2.1': Official(None, 'vjepa2_1_vitg_384.pt', 'target_encoder', 384),
    'vitG2.1': Official(None, 'vjepa2_1_vitG_384.pt', 'target_encoder', 384),
}


def official_weights(encoder):
    """Path of an official encoder's weights, downloaded once into torch's cache. Raises Refusal where there are none."""
    official = MODELS[encoder]
    address = f'{OFFICIAL}/{official.file}'
    if not official.repository:
        raise Refusal(f'--encoder={encoder}: get {address} and name it with --weights')
    path = os.path.join(torch.hub.get_dir(), 'checkpoints', f'vjepa2-{encoder}.safetensors')
    if not os.path.exists(path):
        download(encoder, official.repository, address, path)
    return path


def download(encoder, repository, address, path):
    """
    The official weights of a Hugging Face repository, into path. An interrupted download goes on where it stopped; size
    and sha256 are compared with the server's before the file gets its name. Raises Refusal without network, which names
    the encoder and the address of the same weights elsewhere.
    """
    try:
        # Before a gigabyte is fetched that could not be read.
        import safetensors  # noqa: F401
    except ImportError:
        raise Refusal(f'--encoder={encoder}: official weights need the package: pip install safetensors') from None
    url = f'{os.environ.get("HF_ENDPOINT", "https://huggingface.co")}/{repository}/resolve/main/model.safetensors'
    os.makedirs(os.path.dirname(path), exist_ok=True)
    partial = path + '.part'
    try:
        digest, length = ask_for_checksum(url)
        fetch(url, partial, length, f'downloading {encoder}')
    # URLError, a timeout and a full disk are OSErrors.
    except (OSError, http.client.HTTPException) as error:
        raise Refusal(f'--encoder={encoder}: cannot download ({error}); get model.safetensors from '
                      f'https://huggingface.co/{repository} or {address} and name it with --weights') from None
    done = os.path.getsize(partial)
    if done < length:
        raise Refusal(f'{url}: the connection ended after {done:,} of {length:,} bytes; the same command goes on')
    if done > length or sha256(partial) != digest:
        os.remove(partial)
        raise Refusal(f'{url}: what came does not have the sha256 that the server named; try again')
    os.replace(partial, path)


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """The first answer of the server carries the size and sha256 of a file; where it sends us does not."""

    def redirect_request(self, *args):
        return None


def ask_for_checksum(url):
    """The sha256 and the size in bytes that Hugging Face names for a file."""
    request = urllib.request.Request(url, method='HEAD')
    try:
        answer = urllib.request.build_opener(NoRedirect).open(request, timeout=30)
    except urllib.error.HTTPError as error:
        if not 300 <= error.code < 400:
            raise
        answer = error
    digest = (answer.headers.get('X-Linked-Etag') or '').strip('"')
    length = int(answer.headers.get('X-Linked-Size') or 0)
    if not re.fullmatch('[0-9a-f]{64}', digest) or not length:
        raise Refusal(f'{url}: the server names no size and sha256 to check a download by')
    return digest, length


def fetch(url, path, length, label):
    """Append to path what is missing of the `length` bytes at url, until the connection ends."""
    done = os.path.getsize(path) if os.path.exists(path) else 0
    if done >= length:
        return
    request = urllib.request.Request(url, headers={'Range': f'bytes={done}-'})
    with urllib.request.urlopen(request, timeout=30) as body, open(path, 'ab') as f:
        if body.status != 206:
            # The server starts from the beginning.
            done = 0
            f.truncate(done)
        mebibytes = math.ceil((length - done) / 2**20)
        for _ in data.progress(range(mebibytes), label, 'MiB'):
            f.write(body.read(2**20))
