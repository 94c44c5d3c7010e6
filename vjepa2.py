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

from configurator import Refusal
from hope import load
from model import Block, Predictor, Sizes, rope_angles
from support.files import lock, peek, sha256
from support.terminal import progress


# ---- the video encoder -----------------------------------------------------------------------------------------------

class VideoEncoder(nn.Module):
    """
    The frozen V-JEPA 2 video encoder: 3D patches, full attention, final LayerNorm; no CLS token, no position table.

    version '2' or '2.1'. V-JEPA 2.1 adds one embedding to pictures and another to videos, and a single frame has patches of
    its own. Its rotation is a true one, on rows and columns stretched to the 16 x 16 patches of its pretraining. Raises
    ValueError for any other version.
    """

    def __init__(self, width, heads, depth, mlp_hidden, version='2'):
        super().__init__()
        if version not in ('2', '2.1'):
            raise ValueError(f"version {version!r}: allowed are '2' and '2.1'")
        self.version = version
        self.patch_embed = nn.ModuleDict({'proj': nn.Conv3d(3, width, (2, 16, 16), stride=(2, 16, 16))})
        sizes = Sizes(width=width, heads=heads, mlp_hidden=mlp_hidden, action_memory=False)
        self.width = width
        self.head_dim = width // heads
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(depth))
        if version == '2':
            self.norm = nn.LayerNorm(width, eps=1e-6)
        else:
            self.patch_embed_img = nn.ModuleDict({'proj': nn.Conv3d(3, width, (1, 16, 16), stride=(1, 16, 16))})
            self.img_mod_embed = nn.Parameter(torch.zeros(1, 1, width))
            self.video_mod_embed = nn.Parameter(torch.zeros(1, 1, width))
            # Only the last one is used. The others belong to intermediate layers, for distillation.
            self.norms_block = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(4))

    def embed(self, video):
        """Video (B,3,F,H,W) → patches (B,D,T,rows,columns)."""
        single = video.shape[2] == 1
        if self.version == '2.1' and single:
            return self.patch_embed_img['proj'](video) + self.img_mod_embed.view(-1, 1, 1, 1)
        if self.version == '2.1':
            return self.patch_embed['proj'](video) + self.video_mod_embed.view(-1, 1, 1, 1)
        if single:
            # A tubelet is two frames, so a single frame is repeated.
            video = video.repeat(1, 1, 2, 1, 1)
        return self.patch_embed['proj'](video)

    def forward(self, video):
        """
        Normalised video (B,3,F,H,W) → features (B,T*N,D) in raster order: time, row, column.

        A single frame gives one step. Frames and pixels beyond the last whole patch are dropped. Raises ValueError for a
        video without frames and, in 2.1, for a single row or column of patches.
        """
        if video.shape[2] == 0:
            raise ValueError('the video has no frames')
        x = self.embed(video)
        steps, rows, columns = x.shape[2:]
        time = torch.arange(steps, device=x.device)
        row = torch.arange(rows, device=x.device)
        column = torch.arange(columns, device=x.device)
        position = torch.cartesian_prod(time, row, column)
        if self.version == '2.1':
            if min(rows, columns) == 1:
                raise ValueError(f'V-JEPA 2.1 needs two rows and two columns of patches, not {rows} x {columns}')
            position = position * torch.tensor([1, 15 / (rows - 1), 15 / (columns - 1)], device=x.device)
        form = 'vjepa2' if self.version == '2' else 'paired'
        angle = rope_angles(position, self.head_dim, form)
        rope = angle.cos(), angle.sin()
        # As a single step of tokens, (B,1,S,D), which Block does not mask.
        x = x.flatten(2).transpose(1, 2).unsqueeze(1)
        for block in self.blocks:
            x, _ = block(x, (rope, rope))
        norm = self.norm if self.version == '2' else self.norms_block[-1]
        return norm(x).squeeze(1)


# ---- published files -------------------------------------------------------------------------------------------------

# The number of heads of the published models, by their width.
HEADS = {
    'encoder': {768: 12, 1024: 16, 1280: 16, 1408: 22, 1664: 26},
    'predictor': {1024: 16, 384: 16},
}
# The official names of tensors, by their Hugging Face names.
TENSORS = {
    'embeddings.patch_embeddings.proj': 'patch_embed.proj', 'layernorm': 'norm', 'layer': 'blocks',
    'attention.proj': 'attn.proj', 'attention.query': 'attn.q', 'attention.key': 'attn.k', 'attention.value': 'attn.v',
}


def read_weights(path, part):
    """
    The tensors of one part of an official V-JEPA 2 file under their official names → ({name: tensor}, heads or None).

    path: an official .pt, a .safetensors file, or a Hugging Face folder with config.json and *.safetensors. No code in a
    file is run. Raises Refusal for a missing or broken file, and for a part that it does not have.
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
    tensors, heads = read_safetensors(path, files)
    return official_names(tensors), heads


def read_official(path, part):
    """One part of an official .pt file → {name: tensor}."""
    parts = {name: value for name, value in peek(path).items() if isinstance(value, dict) and value}
    if part not in parts:
        raise Refusal(f'{path} has no part {part!r}; it has {", ".join(map(repr, parts)) or "none"}')
    state = {}
    for name, tensor in parts[part].items():
        name = str(name).removeprefix('module.').removeprefix('backbone.')
        state[name] = tensor
    return state


def read_safetensors(path, files):
    """The tensors of .safetensors files under their own names, and the number of heads in path/config.json, or None."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise Refusal(f'{path}: .safetensors need the package: pip install safetensors') from None
    state = {}
    heads = None
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
        for theirs, official in TENSORS.items():
            name = re.sub(rf'(^|\.){re.escape(theirs)}\.', rf'\1{official}.', name)
        state[name] = tensor
    queries = [name for name in state if '.attn.q.' in name]
    for query in queries:
        names = [query.replace('.attn.q.', f'.attn.{x}.') for x in 'qkv']
        if all(name in state for name in names):
            q, k, v = (state.pop(name) for name in names)
            state[query.replace('.attn.q.', '.attn.qkv.')] = torch.cat([q, k, v])
    return state


def load_vjepa2(path, part='target_encoder', heads=None, grid=None):
    """
    A module with official V-JEPA 2 weights, in eval mode, its sizes read from the weights.

    part: 'target_encoder' (whose features the action-conditioned model was trained on), 'encoder' or 'ema_encoder' (the two
    distilled encoders of V-JEPA 2.1) → VideoEncoder of V-JEPA 2 or 2.1, as the weights are; 'predictor' → Predictor,
    called as predictor(z, a, states=s), whose output is not layer-normed (as published). path: see read_weights.
    heads: their number, where neither the width nor a config.json tells it. grid: (rows, columns) of the predictor's
    patches; None means square. Raises Refusal that names the first missing, unexpected or misshapen tensor. Raises
    ValueError for a grid with an encoder, which takes it from the video.
    """
    if grid and part != 'predictor':
        raise ValueError(f'grid belongs to the predictor; part {part!r} takes it from the video')
    if part not in ('target_encoder', 'encoder', 'ema_encoder', 'predictor'):
        raise Refusal(f"part {part!r}: allowed are 'target_encoder', 'encoder', 'ema_encoder' and 'predictor'")
    state, configured_heads = read_weights(path, part)
    where = f'{path}, {part}'
    for name, value in state.items():
        if not torch.is_tensor(value):
            raise Refusal(f'{where}: {name} is not a tensor')
    # Some files have a table of positions, which the rotary models do not use.
    state.pop('pos_embed', None)
    # On the meta device, sizes can be compared before any memory is allocated.
    with torch.device('meta'):
        if part == 'predictor':
            net = empty_predictor(state, where, heads, grid)
        else:
            net = empty_encoder(state, where, heads or configured_heads)
    check_tensors(state, net.state_dict(), where)
    net.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return net.eval()


def check_tensors(state, expected, where):
    """Raise Refusal unless a file's tensors have the names and shapes of the expected ones, and are finite."""
    for name, tensor in expected.items():
        if name not in state:
            raise Refusal(f'{where}: tensor {name} is missing')
        if state[name].shape != tensor.shape:
            raise Refusal(f'{where}: tensor {name} is {tuple(state[name].shape)}, must be {tuple(tensor.shape)}')
        if not state[name].isfinite().all():
            raise Refusal(f'{where}: tensor {name} holds values that are NaN or infinite')
    unexpected = sorted(set(state) - set(expected))
    if unexpected:
        raise Refusal(f'{where}: {len(unexpected)} unexpected tensors, the first is {unexpected[0]}')


def length(state, where, name, axis=0):
    """The length of a tensor along an axis; raises Refusal where the tensor is missing."""
    if name not in state or state[name].dim() <= axis:
        raise Refusal(f'{where}: tensor {name} is missing')
    return state[name].shape[axis]


def depth_of(state, blocks):
    """The number of blocks, from the tensors' names. The number of tensors is the cap, against hostile names."""
    numbers = [int(name.split('.')[1]) for name in state if re.match(rf'{blocks}\.\d+\.', name)]
    return min(1 + max(numbers), len(state))


def check_heads(heads, width, where):
    """Raise Refusal for a number of heads that is not known or does not divide the width."""
    if not heads:
        raise Refusal(f'{where}: the number of heads is not known for width {width}; give it with heads=')
    if width % heads:
        raise Refusal(f'{where}: width {width} is not a multiple of {heads} heads')


def empty_encoder(state, where, heads):
    """A VideoEncoder of the weights' sizes."""
    width = length(state, where, 'patch_embed.proj.weight')
    hidden = length(state, where, 'blocks.0.mlp.fc1.weight')
    heads = heads or HEADS['encoder'].get(width)
    check_heads(heads, width, where)
    version = '2.1' if 'video_mod_embed' in state else '2'
    return VideoEncoder(width, heads, depth_of(state, 'blocks'), hidden, version)


def empty_predictor(state, where, heads, grid):
    """A Predictor of the weights' sizes, in the published form."""
    width = length(state, where, 'predictor_norm.weight')
    hidden = length(state, where, 'predictor_blocks.0.mlp.fc1.weight')
    heads = heads or HEADS['predictor'].get(width)
    check_heads(heads, width, where)
    sizes = Sizes(model='vit', width=width, heads=heads, depth=depth_of(state, 'predictor_blocks'), mlp_hidden=hidden,
                  feature_dim=length(state, where, 'predictor_embed.weight', 1),
                  action_dim=length(state, where, 'action_encoder.weight', 1),
                  state_dim=length(state, where, 'state_encoder.weight', 1),
                  grid=grid, rope='vjepa2', normed_output=False, action_memory=False)
    return Predictor(sizes, Block)


# ---- starting from weights -------------------------------------------------------------------------------------------

def start_from(predictor, path):
    """
    Load the weights of a checkpoint, ours or an official action-conditioned one, into a predictor → (names of tensors that
    keep their initial values, names of stored tensors that are dropped).

    One of ours must fit in every tensor. The encoders of actions and states of an official one may have other sizes than
    here, or not exist here (own clips have a push of two numbers and no states): these keep their initial values or are
    dropped. An action memory, which it does not have, keeps its initial values. Raises Refusal for any other difference.
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
        words = ' '.join(str(error).split())[:200]
        raise Refusal(f'init_from = {path}: does not fit this predictor: {words}') from None
    return new, dropped


def official_start(predictor, path):
    """The weights of an official file for a predictor → (weights, names that keep initial values, names dropped)."""
    initial = predictor.state_dict()
    state = load_vjepa2(path, 'predictor', predictor.sizes.heads).state_dict()
    if predictor.sizes.rope != 'vjepa2':
        raise Refusal(f"{path}: official weights need the published rotation; set rope = 'vjepa2'")
    new, dropped = [], []
    for name in {**state, **initial}:
        if name.startswith('action_memory'):
            # The published predictor has none.
            state[name] = initial[name]
            if 'action_memory' not in new:
                new.append('action_memory')
        if not name.startswith(('action_encoder', 'state_encoder', 'extrinsics_encoder')):
            continue
        if name not in initial:
            del state[name]
            dropped.append(name)
        elif name not in state or state[name].shape != initial[name].shape:
            state[name] = initial[name]
            new.append(name)
    return state, new, dropped


# ---- download ----------------------------------------------------------------------------------------------------------

class Official(NamedTuple):
    """An official encoder: where its weights are published, and the pictures that it was trained on."""
    # The Hugging Face repository; None where there is only an official file
    repository: str | None
    # The official file
    file: str
    # The part of the file that is the published encoder
    part: str
    # Side of a picture
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
    if os.path.exists(path):
        return path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    held = lock(path)
    if held is None:
        print(f'another run is downloading {path}; waiting for it', flush=True)
        held = lock(path, seconds=-1)
    if not os.path.exists(path):
        download(encoder, official.repository, address, path)
    held.release()
    return path


def download(encoder, repository, address, path):
    """
    Download the official weights of a Hugging Face repository to path.

    An interrupted download goes on where it stopped. Size and sha256 are compared with the server's before the file is
    renamed to path. Without network it raises a Refusal that names the encoder and another address of the same weights.
    """
    try:
        # Needed to read the file. Checked before a gigabyte is downloaded.
        import safetensors  # noqa: F401
    except ImportError:
        raise Refusal(f'--encoder={encoder}: official weights need the package: pip install safetensors') from None
    url = f'{os.environ.get("HF_ENDPOINT", "https://huggingface.co")}/{repository}/resolve/main/model.safetensors'
    partial = path + '.part'
    try:
        digest, size = ask_for_checksum(url)
        fetch(url, partial, size, f'downloading {encoder}')
    # URLError, a timeout and a full disk are OSErrors.
    except (OSError, http.client.HTTPException) as error:
        raise Refusal(f'--encoder={encoder}: cannot download ({error}); get model.safetensors from '
                      f'https://huggingface.co/{repository} or {address} and name it with --weights') from None
    done = os.path.getsize(partial)
    if done < size:
        raise Refusal(f'{url}: the connection ended after {done:,} of {size:,} bytes; the same command goes on')
    if done > size or sha256(partial) != digest:
        os.remove(partial)
        raise Refusal(f'{url}: the downloaded file does not have the sha256 that the server gave; try again')
    os.replace(partial, path)


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: size and sha256 of a file are in the server's first answer only."""

    def redirect_request(self, *args):
        return None


def ask_for_checksum(url):
    """The sha256 and the size in bytes that Hugging Face gives for a file."""
    request = urllib.request.Request(url, method='HEAD')
    try:
        answer = urllib.request.build_opener(NoRedirect).open(request, timeout=30)
    except urllib.error.HTTPError as error:
        if not 300 <= error.code < 400:
            raise
        answer = error
    digest = (answer.headers.get('X-Linked-Etag') or '').strip('"')
    size = int(answer.headers.get('X-Linked-Size') or 0)
    if not re.fullmatch('[0-9a-f]{64}', digest) or not size:
        raise Refusal(f'{url}: the server gives no size and sha256 to check the download by')
    return digest, size


def fetch(url, path, size, label):
    """Append to path what is missing of the `size` bytes at url, until the connection ends."""
    done = 0
    if os.path.exists(path):
        done = os.path.getsize(path)
    if done >= size:
        return
    request = urllib.request.Request(url, headers={'Range': f'bytes={done}-'})
    with urllib.request.urlopen(request, timeout=30) as body, open(path, 'ab') as f:
        if body.status != 206:
            # The server sends the whole file, not the range asked for.
            done = 0
            f.truncate(done)
        mebibytes = math.ceil((size - done) / 2**20)
        for _ in progress(range(mebibytes), label, 'MiB'):
            f.write(body.read(2**20))
