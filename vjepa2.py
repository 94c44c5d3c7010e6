"""
V-JEPA 2 (Assran et al., 2025): the frozen video encoder, by transformers, and the official action-conditioned
predictor, https://dl.fbaipublicfiles.com/vjepa2/vjepa2-ac-vitg.pt

    z = encode(frames, load_encoder('vitl', 'cuda'))            # uint8 frames (n,F,H,W,3) → (n,T,N,D)
    new, dropped = start_from(predictor, 'vjepa2-ac-vitg.pt')   # or a checkpoint of train.py"""
import torch

from configurator import refuse
from support.files import autocast, read_checkpoint

ENCODERS = {
    'vitl': 'facebook/vjepa2-vitl-fpc64-256',
    'vith': 'facebook/vjepa2-vith-fpc64-256',
    'vitg': 'facebook/vjepa2-vitg-fpc64-256',
    'vitg384': 'facebook/vjepa2-vitg-fpc64-384',
}
MEAN = torch.tensor([0.485, 0.456, 0.406])     # of ImageNet's pictures
STD = torch.tensor([0.229, 0.224, 0.225])


def load_encoder(encoder, device):
    """The frozen encoder: a name of ENCODERS, downloaded once, or a folder in Hugging Face's format."""
    from transformers import VJEPA2Model
    net, info = VJEPA2Model.from_pretrained(ENCODERS.get(encoder, encoder), output_loading_info=True)
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
    with autocast(frames.device, dtype, net.config.hidden_size):
        z = net.get_vision_features(video)                             # (n*T,N,D), or (n,T*N,D) of clips
    return z.float().view(n, steps, rows**2, -1)


def start_from(predictor, path):
    """Start from a checkpoint of train.py or the official one → names of layers: anew, and dropped."""
    stored = read_checkpoint(path)
    if 'sizes' in stored:
        predictor.load_state_dict(stored['predictor'])
        return [], []
    if predictor.sizes.rope != 'vjepa2':
        refuse(f'--init_from={path}: official weights were trained with --rope=vjepa2')
    own = predictor.state_dict()
    state = {name.removeprefix('module.'): tensor for name, tensor in stored['predictor'].items()}
    # Encoders of another size, and what the official predictor lacks, start anew.
    fitting = {name: tensor for name, tensor in state.items()
               if '_encoder.' not in name or name in own and tensor.shape == own[name].shape}
    new, left = predictor.load_state_dict(fitting, strict=False)
    wrong = [name for name in new + left if name.startswith('predictor_') and '.conv.' not in name]
    assert not wrong, f'{path} is of another depth: {wrong}'
    return [sorted({name.split('.')[0] for name in names}) for names in (new, state.keys() - own.keys())]
