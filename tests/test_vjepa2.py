"""V-JEPA 2: the encoder through transformers, the official predictor's arithmetic, and training from its weights."""
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import TESTS, sizes

import hope
import model
import vjepa2
from support.files import save

GOLDEN = torch.load(os.path.join(TESTS, 'vjepa2_ac_tiny.pt'), weights_only=True)
PUBLISHED = {'model': 'vit', 'rope': 'vjepa2', 'action_memory': False, 'action_dim': 7, 'state_dim': 7}


@pytest.fixture
def official(tmp_path):
    """The golden file's checkpoint as a file of its own."""
    torch.save(GOLDEN['checkpoint'], tmp_path / 'official.pt')
    return str(tmp_path / 'official.pt')


@pytest.mark.parametrize('steps, name', [(4, 'out_4_frames'), (1, 'out_1_frame')])
def test_the_predictor_agrees_with_the_published_code(official, steps, name):
    side = int(GOLDEN['z'].shape[2] ** 0.5)
    net = vjepa2.load_official(official, (side, side), heads=2)
    z, a, s = (GOLDEN[key][:, :steps] for key in ('z', 'actions', 'states'))
    z_hat, memory = net(z, a, states=s)
    assert memory is None and not net.training
    torch.testing.assert_close(z_hat, GOLDEN[name], atol=5e-5, rtol=0)
    # The losses see it layer-normed.
    net.sizes.normed_output = True
    expected = F.layer_norm(GOLDEN[name], z.shape[-1:])
    torch.testing.assert_close(net(z, a, states=s)[0], expected, atol=5e-5, rtol=0)


def test_the_published_form_has_the_published_size():
    with torch.device('meta'):
        net = hope.build(sizes(**PUBLISHED, feature_dim=1408, depth=24, width=1024, heads=16, mlp_hidden=4096))
    assert sum(p.numel() for p in net.parameters()) == 305_220_992


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


def test_training_starts_from_weights(official, tmp_path):
    """What has another size here starts anew, what has no place is dropped, all else is as in the file."""
    published = vjepa2.load_official(official, (2, 2), heads=2).sizes
    same = {name: getattr(published, name) for name in ('feature_dim', 'width', 'heads', 'depth', 'mlp_hidden')}
    own = {**same, 'model': 'vit', 'rope': 'vjepa2', 'grid': (2, 2)}
    net = hope.build(sizes(**own))
    new, dropped = vjepa2.start_from(net, official)
    assert new == ['action_encoder', 'action_memory'] and dropped == ['extrinsics_encoder', 'state_encoder']
    state = net.state_dict()
    for name, tensor in vjepa2.read_official(GOLDEN['checkpoint']).items():
        if '_encoder.' not in name:
            assert torch.equal(state[name], tensor), name
    assert vjepa2.start_from(hope.build(sizes(**{**own, **PUBLISHED})), official) == [[], []]
    with pytest.raises(RuntimeError, match='predictor_blocks'):
        vjepa2.start_from(hope.build(sizes(**{**own, 'depth': 3})), official)
    with pytest.raises(SystemExit):
        vjepa2.start_from(hope.build(sizes(model='vit')), official)
    # One of ours has to fit as a whole.
    save(tmp_path / 'ours.pt', net)
    again = hope.build(net.sizes)
    vjepa2.start_from(again, str(tmp_path / 'ours.pt'))
    assert all(torch.equal(p, state[name]) for name, p in again.state_dict().items())


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


def test_a_clip_of_one_step_is_encoded_as_that_step(encoder, monkeypatch):
    """In whole clips step 1 knows the others. How many are encoded at once changes nothing."""
    frames = torch.randint(0, 256, (3, 8, 32, 32, 3), dtype=torch.uint8)
    steps, clip = (vjepa2.encode(frames, encoder, how) for how in ('step', 'clip'))
    assert steps.shape == clip.shape == (3, 4, 4, 48)
    alone = vjepa2.encode(frames[:, :2], encoder, 'clip')
    torch.testing.assert_close(steps[:, :1], alone, atol=1e-5, rtol=0)
    assert (clip[:, :1] - alone).abs().mean() > 0.01
    monkeypatch.setattr(vjepa2, 'TOKENS', 1)
    torch.testing.assert_close(vjepa2.encode(frames, encoder), steps, atol=1e-5, rtol=0)


def test_pictures_of_any_size_are_encoded_as_transformers_does(encoder):
    from transformers import VJEPA2Model
    frames = torch.randint(0, 256, (2, 4, 48, 48, 3), dtype=torch.uint8)
    z = vjepa2.encode(frames, encoder, 'clip')
    theirs = VJEPA2Model.from_pretrained(encoder.name_or_path, crop_size=48).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    video = ((frames / 255 - mean) / std).movedim(-1, 2)
    torch.testing.assert_close(z.flatten(1, 2), theirs.get_vision_features(video).detach(), atol=1e-5, rtol=0)


def test_an_encoder_that_is_not_there_is_refused(tmp_path, capsys):
    pytest.importorskip('transformers')
    with pytest.raises(SystemExit):
        vjepa2.load_encoder(str(tmp_path / 'none'), 'cpu')
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
