"""V-JEPA 2: the encoder of transformers, the official predictor's arithmetic, training from its weights."""
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import TESTS, run, sizes

import data
import hope
import model
import vjepa2

GOLDEN = torch.load(os.path.join(TESTS, 'vjepa2_ac_tiny.pt'), weights_only=True)
PUBLISHED = {'model': 'vit', 'rope': 'vjepa2', 'conv': False, 'world': False, 'action_dim': 7, 'state_dim': 7}
# Those of the golden file.
TINY = {'feature_dim': 48, 'width': 48, 'heads': 2, 'depth': 2, 'mlp_hidden': 192}


@pytest.fixture
def official(tmp_path):
    """The golden file's checkpoint as a file of its own."""
    torch.save(GOLDEN['checkpoint'], tmp_path / 'official.pt')
    return str(tmp_path / 'official.pt')


@pytest.mark.parametrize('steps, name', [(4, 'out_4_frames'), (1, 'out_1_frame')])
def test_the_predictor_agrees_with_the_published_code(official, steps, name):
    side = int(GOLDEN['z'].shape[2] ** 0.5)
    net = hope.build(sizes(**TINY, **PUBLISHED, grid=(side, side), normed_output=False))
    assert vjepa2.start_from(net, official) == [[], []]
    z, a, s = (GOLDEN[key][:, :steps] for key in ('z', 'actions', 'states'))
    torch.testing.assert_close(net(z, a, states=s)[0], GOLDEN[name], atol=5e-5, rtol=0)
    # The losses see it layer-normed.
    net.sizes.normed_output = True
    expected = F.layer_norm(GOLDEN[name], z.shape[-1:])
    torch.testing.assert_close(net(z, a, states=s)[0], expected, atol=5e-5, rtol=0)


def test_the_tiled_rotation_by_hand():
    """y_i = x_i cos(p w_{i mod n/2}) + J(x)_i sin(p w_{i mod n/2}), which is no true rotation."""
    x = torch.randn(24, generator=torch.Generator().manual_seed(0)).double()
    position, n = torch.tensor([3.0, 5.0, 2.0]), 8
    angle = model.rope_angles(position, 24, 'vjepa2').double()
    turned = model.rotate(x, (angle.cos(), angle.sin()))
    for axis, p in enumerate(position.double()):
        for i in range(n):
            w = 10000 ** (-2 * (i % (n // 2)) / n)
            j = axis * n + i
            partner = -x[j + 1] if i % 2 == 0 else x[j - 1]
            assert abs(turned[j] - x[j] * torch.cos(p * w) - partner * torch.sin(p * w)) < 1e-5
    assert abs(turned.norm() - x.norm()) > 1e-3


def test_grids_that_are_not_square_are_scaled_as_published():
    net = hope.build(sizes(**PUBLISHED, width=24, heads=2, depth=1, grid=(2, 4)))
    (cos, _), _ = net.rope(1, 1, None, 'cpu')
    # Row 1, column 3 of 2 x 4; the action comes first.
    angle = model.rope_angles(torch.tensor([0, 1, 3 * 2 / 4]), 12, 'vjepa2')
    torch.testing.assert_close(cos[0, 0, 1 + 7], angle.cos())


def test_training_starts_from_weights(official):
    """What has another size here starts anew, what has no place is dropped, all else is as in the file."""
    own = {**TINY, 'model': 'vit', 'rope': 'vjepa2', 'conv': False, 'grid': (2, 2)}
    net = hope.build(sizes(**own))
    new, dropped = vjepa2.start_from(net, official)
    assert new == ['action_encoder', 'inverse', 'world']
    assert dropped == ['extrinsics_encoder', 'state_encoder']
    state = net.state_dict()
    for name, tensor in GOLDEN['checkpoint']['predictor'].items():
        if '_encoder.' not in name:
            assert torch.equal(state[name.removeprefix('module.')], tensor), name
    assert vjepa2.start_from(hope.build(sizes(**{**own, **PUBLISHED})), official) == [[], []]
    with pytest.raises(AssertionError, match='predictor_blocks.2'):
        vjepa2.start_from(hope.build(sizes(**{**own, 'depth': 3})), official)
    with pytest.raises(SystemExit):
        vjepa2.start_from(hope.build(sizes(model='vit')), official)


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
    """transformers' V-JEPA 2 with random weights for pictures of 32 x 32, as it comes out of a folder."""
    transformers = pytest.importorskip('transformers')
    folder = str(tmp_path_factory.mktemp('encoder'))
    torch.manual_seed(0)
    transformers.VJEPA2Model(transformers.VJEPA2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=2, crop_size=32, initializer_range=0.2,
        pred_hidden_size=24, pred_num_hidden_layers=1, pred_num_attention_heads=2)).save_pretrained(folder)
    return vjepa2.load_encoder(folder, 'cpu')


def test_a_clip_of_one_step_is_encoded_as_that_step(encoder):
    """In whole clips step 1 knows the others."""
    frames = torch.randint(0, 256, (3, 8, 32, 32, 3), dtype=torch.uint8)
    steps, clip = (vjepa2.encode(frames, encoder, how) for how in ('step', 'clip'))
    assert steps.shape == clip.shape == (3, 4, 4, 48)
    alone = vjepa2.encode(frames[:, :2], encoder, 'clip')
    torch.testing.assert_close(steps[:, :1], alone, atol=1e-5, rtol=0)
    assert (clip[:, :1] - alone).abs().mean() > 0.01


def test_a_data_set_is_encoded_by_it(encoder, tmp_path):
    run('prepare.py', f'--name={tmp_path}/set', f'--encoder={encoder.name_or_path}', '--clips=8',
        '--test_clips=4', '--zoom=False', '--dtype=float32')
    clips = data.Clips(f'{tmp_path}/set', 'val')
    z = vjepa2.encode(data.render(clips.physics, 32), encoder, 'step', 'float32')
    torch.testing.assert_close(clips.stored(range(4))[0].float(), z, atol=2e-3, rtol=2e-3)


def test_pictures_of_any_size_are_encoded_as_transformers_does(encoder):
    from transformers import VJEPA2Model
    frames = torch.randint(0, 256, (2, 4, 48, 48, 3), dtype=torch.uint8)
    z = vjepa2.encode(frames, encoder, 'clip')
    theirs = VJEPA2Model.from_pretrained(encoder.name_or_path, crop_size=48).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    video = ((frames / 255 - mean) / std).movedim(-1, 2)
    torch.testing.assert_close(z.flatten(1, 2), theirs.get_vision_features(video).detach(), atol=1e-5, rtol=0)
