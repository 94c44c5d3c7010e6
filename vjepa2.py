"""
V-JEPA 2 (Assran et al., 2025): the frozen video encoder, by transformers, and the official action-conditioned
predictor, https://dl.fbaipublicfiles.com/vjepa2/vjepa2-ac-vitg.pt

    z = encode(frames, load_encoder('vitl', 'cuda'))            # uint8 frames (n,F,H,W,3) → (n,T,N,D)
    predictor = load_official('vjepa2-ac-vitg.pt')
    new, dropped = start_from(predictor, 'vjepa2-ac-vitg.pt')   # or a checkpoint of train.py
"""
import torch

from configurator import refuse
from model import Block, Predictor, Sizes
from support.files import autocast, read_checkpoint

ENCODERS = {
    'vitl': 'facebook/vjepa2-vitl-fpc64-256',
    'vith': 'facebook/vjepa2-vith-fpc64-256',
    'vitg': 'facebook/vjepa2-vitg-fpc64-256',
    'vitg384': 'facebook/vjepa2-vitg-fpc64-384',
}
MEAN = torch.tensor([0.485, 0.456, 0.406])     # of ImageNet's pictures
STD = torch.tensor([0.229, 0.224, 0.225])
TOKENS = 2**14                                 # that are encoded at once, but at least one clip or step


def load_encoder(encoder, device):
    """The frozen encoder: a name of ENCODERS, downloaded once, or a folder in Hugging Face's format."""
    try:
        from transformers import VJEPA2Model
    except ImportError:
        refuse(f'--encoder={encoder} needs a package: pip install transformers')
    try:
        net, info = VJEPA2Model.from_pretrained(ENCODERS.get(encoder, encoder), output_loading_info=True)
    except OSError as error:
        refuse(f'--encoder={encoder}: {str(error).splitlines()[0]}')
    assert not any('encoder.' in name for name in info['missing_keys']), f'{encoder} lacks weights'
    return net.float().to(device).eval()


@torch.inference_mode()
def encode(frames, net, encode='step', dtype='auto'):
    """Features (n,T,N,D), not layer-normed, of square frames (n,F,H,W,3) uint8. encode: 'step' or 'clip'."""
    tubelet, patch = net.config.tubelet_size, net.config.patch_size
    n, count, side = frames.shape[:3]
    steps, rows = count // tubelet, side // patch
    for layer in net.encoder.layer:
        layer.attention.grid_size = rows       # of this picture, not of the pictures of training
    video = (frames / 255 - MEAN.to(frames.device)) / STD.to(frames.device)
    video = video.permute(0, 1, 4, 2, 3)                               # (n,F,3,H,W)
    # Each step's own frames alone. In a whole clip z_1 knows the future.
    if encode == 'step':
        video = video.unflatten(1, (steps, tubelet)).flatten(0, 1)     # (n*T,2,3,H,W)
    tokens = video.shape[1] // tubelet * rows**2
    encoded = []
    with autocast(frames.device, dtype, net.config.hidden_size):
        for part in video.split(max(1, TOKENS // tokens)):
            encoded.append(net.get_vision_features(part).float())      # (b,N,D), or (b,T*N,D) of whole clips
    return torch.cat(encoded).view(n, steps, rows**2, -1)


def read_official(stored):
    """The predictor's tensors of an official .pt file, as it was read → {name: tensor}."""
    return {name.removeprefix('module.'): tensor for name, tensor in stored['predictor'].items()}


def load_official(path, grid=(16, 16), heads=16):
    """The official action-conditioned predictor, in eval mode; its output is not layer-normed there."""
    state = read_official(read_checkpoint(path))
    blocks = {name.split('.')[1] for name in state if name.startswith('predictor_blocks.')}
    sizes = Sizes.from_config(
        dict.fromkeys(Sizes.__annotations__),
        model='vit', rope='vjepa2', state_dim=state['state_encoder.weight'].shape[1],
        feature_dim=state['predictor_embed.weight'].shape[1],
        action_dim=state['action_encoder.weight'].shape[1],
        width=len(state['predictor_norm.weight']),
        mlp_hidden=len(state['predictor_blocks.0.mlp.fc1.weight']),
        depth=len(blocks), heads=heads, grid=grid)
    predictor = Predictor(sizes, Block)
    predictor.load_state_dict(state)
    return predictor.eval()


def start_from(predictor, path):
    """Start from a checkpoint of train.py or the official one → names of layers: anew, and dropped."""
    stored = read_checkpoint(path)
    if 'sizes' in stored:
        predictor.load_state_dict(stored['predictor'])
        return [], []
    if predictor.sizes.rope != 'vjepa2':
        refuse(f'--init_from={path}: official weights were trained with --rope=vjepa2')
    state = read_official(stored)
    initial = predictor.state_dict()
    # The action memory, which the official one lacks, and encoders of another size start anew.
    dropped = {name for name in state if '_encoder.' in name and name not in initial}
    new = {name for name, tensor in initial.items() if name.startswith('action_memory.')
           or '_encoder.' in name and (name not in state or state[name].shape != tensor.shape)}
    for name in dropped:
        del state[name]
    predictor.load_state_dict({**state, **{name: initial[name] for name in new}})
    return [sorted({name.split('.')[0] for name in names}) for names in (new, dropped)]
