"""Official V-JEPA 2 weights: the published arithmetic, both file layouts, every kind of wrong file."""
import math
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, official_predictor, optional, run

import hope
import model
import vjepa2
from configurator import Refusal, read_config

PARTS = pytest.mark.parametrize('part', ['encoder', 'target_encoder'])


def golden(file):
    return torch.load(os.path.join(os.path.dirname(__file__), file), weights_only=True)


def official(tmp_path, file='vjepa2_encoder_tiny.pt', change=lambda checkpoint: None):
    """A golden file's checkpoint, changed, as a file of its own → path."""
    checkpoint = golden(file)['checkpoint']
    change(checkpoint)
    torch.save(checkpoint, tmp_path / 'official.pt')
    return str(tmp_path / 'official.pt')


@PARTS
def test_encoder_agrees_with_the_published_code(part, tmp_path):
    reference = golden('vjepa2_encoder_tiny.pt')
    encoder = vjepa2.load_vjepa2(official(tmp_path), part, heads=2)
    assert not encoder.training
    torch.testing.assert_close(encoder(reference['video']), reference[f'{part}_out'], atol=5e-5, rtol=0)


def test_one_frame_is_doubled_and_none_is_refused(tmp_path):
    encoder, video = vjepa2.load_vjepa2(official(tmp_path), heads=2), golden('vjepa2_encoder_tiny.pt')['video']
    frame = video[:, :, :1]
    assert torch.equal(encoder(frame), encoder(torch.cat([frame, frame], dim=2)))
    with pytest.raises(ValueError, match='no frames'):
        encoder(video[:, :, :0])


@pytest.mark.parametrize('steps', [4, 1])
def test_predictor_agrees_with_the_published_code(steps, tmp_path):
    """The action-conditioned predictor with its state token, as it is and with what our losses see, layer-normed."""
    reference = golden('vjepa2_ac_tiny.pt')
    predictor = vjepa2.load_vjepa2(official(tmp_path, 'vjepa2_ac_tiny.pt'), 'predictor', heads=2)
    z, a, s = (reference[key][:, :steps] for key in ('z', 'actions', 'states'))
    expected = reference['out_4_frames' if steps == 4 else 'out_1_frame']
    z_hat, memory = predictor(z, a, states=s)
    assert memory is None and not predictor.training
    torch.testing.assert_close(z_hat, expected, atol=5e-5, rtol=0)
    predictor.sizes.normed_output = True
    torch.testing.assert_close(predictor(z, a, states=s)[0], F.layer_norm(expected, (48,)), atol=5e-5, rtol=0)


def test_a_jump_of_the_published_form_is_teacher_forcing_by_one(tmp_path):
    reference = golden('vjepa2_ac_tiny.pt')
    predictor = vjepa2.load_vjepa2(official(tmp_path, 'vjepa2_ac_tiny.pt'), 'predictor', heads=2)
    z, a, s = (reference[key][:, :1] for key in ('z', 'actions', 'states'))
    one, three = (predictor(z, a, tau=torch.full((len(z),), t), states=s)[0] for t in (1, 3))
    torch.testing.assert_close(one, predictor(z, a, states=s)[0][:, 0], atol=1e-6, rtol=0)
    assert (one - three).abs().mean() > 1e-3


def test_true_sizes():
    """ViT-L, ViT-H, ViT-g and the action-conditioned predictor have the published numbers of parameters."""
    def count(net):
        return sum(p.numel() for p in net.parameters())
    with torch.device('meta'):
        assert count(vjepa2.VideoEncoder(1024, 16, 24, 4096)) == 303_885_312
        assert count(vjepa2.VideoEncoder(1408, 22, 40, 6144)) == 1_012_173_952
        sizes = model.Sizes(model='vit', feature_dim=1408, action_dim=7, state_dim=7, depth=24, width=1024, heads=16,
                            mlp_hidden=4096, grid=None, rope='vjepa2', action_memory=False)
        assert count(hope.build(sizes)) == 305_220_992


def test_features_of_low_variance_feel_the_eps(tmp_path):
    """LayerNorm's eps is 1e-6: 1e-5 would shift what a nearly flat video gives by far more than rounding."""
    encoder = vjepa2.load_vjepa2(official(tmp_path), heads=2)
    flat = 1e-3 * golden('vjepa2_encoder_tiny.pt')['video']
    with torch.no_grad():
        encoder.patch_embed['proj'].bias.zero_()
        right = encoder(flat)
        for module in encoder.modules():
            if isinstance(module, torch.nn.LayerNorm):
                assert module.eps == 1e-6
                module.eps = 1e-5
        assert (encoder(flat) - right).abs().max() > 0.02


def test_the_tiled_rotation_by_hand():
    """y_i = x_i cos(p w_{i mod n/2}) + J(x)_i sin(p w_{i mod n/2}), and no true rotation: it changes lengths' products."""
    generator = torch.Generator().manual_seed(0)
    x, position, n = torch.randn(24, generator=generator).double(), (3.0, 5.0, 2.0), 8
    angle = model.rope_angles(torch.tensor(position), 24, 'vjepa2').double()
    turned = model.rotate(x, (angle.cos(), angle.sin()))
    for axis, p in enumerate(position):
        for i in range(n):
            w = 10000 ** (-2 * (i % (n // 2)) / n)
            j = axis * n + i
            J = -x[j + 1] if i % 2 == 0 else x[j - 1]
            expected = x[j] * torch.cos(torch.tensor(p * w)) + J * torch.sin(torch.tensor(p * w))
            assert abs(turned[j] - expected) < 1e-5
    assert abs(turned.norm() - x.norm()) > 1e-3


def test_non_square_grids_are_scaled_as_published():
    sizes = model.Sizes(model='vit', feature_dim=8, width=24, heads=2, depth=1, mlp_hidden=16, grid=(2, 4), rope='vjepa2')
    net = hope.build(sizes)
    (cos, _), _ = net.rope(1, 1, 8, None, 'cpu')
    angle = model.rope_angles(torch.tensor([[0, 1, 3 * 2 / 4]]), 12, 'vjepa2')
    torch.testing.assert_close(cos[0, 0, 1 + 7], angle[0].cos())      # row 1, column 3 of a 2 x 4 grid; the action is first


# ---- references of our own, token by token in double precision ---------------------------------------------------------

def linear(w, name, x):
    return w[f'{name}.weight'] @ x + w[f'{name}.bias']


def norm(w, name, x):
    return (x - x.mean()) / (x.var(correction=0) + 1e-6).sqrt() * w[f'{name}.weight'] + w[f'{name}.bias']


def turn(x, place, tiled):
    """x (d,) of one token and head, rotated channel by channel for its place (time, row, column)."""
    y, n = x.clone(), 2 * (len(x) // 3 // 2)
    for axis, p in enumerate(place):
        for i in range(n):
            j = axis * n + i
            angle = p * 10000 ** (-2 * (i % (n // 2) if tiled else i // 2) / n)
            partner = -x[j + 1] if i % 2 == 0 else x[j - 1]
            y[j] = math.cos(angle) * x[j] + math.sin(angle) * partner
    return y


def published_blocks(w, blocks, depth, heads, x, places, tiled, seen=lambda i, j: True):
    """x, a list of tokens (C,), through the published blocks; token i attends to the tokens j with seen(i, j)."""
    for name in (f'{blocks}.{layer}' for layer in range(depth)):
        qkv = [linear(w, f'{name}.attn.qkv', norm(w, f'{name}.norm1', token)).view(3, heads, -1) for token in x]
        q, k = ([[turn(token[which, h], place, tiled) for h in range(heads)] for token, place in zip(qkv, places)]
                for which in (0, 1))
        after = []
        for i, token in enumerate(x):
            keys, heard = [j for j in range(len(x)) if seen(i, j)], []
            for h in range(heads):
                weights = torch.stack([q[i][h] @ k[j][h] for j in keys]) / len(q[i][h]) ** 0.5
                weights = weights.exp() / weights.exp().sum()
                heard.append(sum(weight * qkv[j][2, h] for weight, j in zip(weights, keys)))
            token = token + linear(w, f'{name}.attn.proj', torch.cat(heard))
            hidden = linear(w, f'{name}.mlp.fc1', norm(w, f'{name}.norm2', token))
            after.append(token + linear(w, f'{name}.mlp.fc2', hidden * (1 + torch.erf(hidden / 2 ** 0.5)) / 2))
        x = after
    return x


def published_predictor(w, z, rows, columns, **conditions):
    """One clip: z (T,N,D), conditions {encoder: (T,A)} in the order of their tokens → (T,N,D)."""
    x, places, patches = [], [], []
    for t in range(len(z)):
        for name, values in conditions.items():
            x.append(linear(w, name, values[t]))
            places.append((t, 0, 0))
        for row in range(rows):
            for column in range(columns):
                patches.append(len(x))
                x.append(linear(w, 'predictor_embed', z[t, row * columns + column]))
                places.append((t, row, column * rows / columns))
    x = published_blocks(w, 'predictor_blocks', 2, 2, x, places, True, lambda i, j: places[j][0] <= places[i][0])
    return torch.stack([linear(w, 'predictor_proj', norm(w, 'predictor_norm', x[i])) for i in patches]).view(z.shape)


@pytest.mark.parametrize('camera', [False, True])
@pytest.mark.parametrize('rows, columns', [(2, 2), (2, 3), (3, 2), (1, 4)])
def test_grids_and_extrinsics_agree_with_a_reference(rows, columns, camera, tmp_path):
    """Non-square grids, also with a square number of patches, and the third conditioning token."""
    path = official(tmp_path, 'vjepa2_ac_tiny.pt')
    published = golden('vjepa2_ac_tiny.pt')['checkpoint']['predictor']
    w = {name.removeprefix('module.'): tensor.double() for name, tensor in published.items()}
    generator = torch.Generator().manual_seed(0)
    z, a, s, e = (torch.randn(2, 3, *shape, generator=generator) for shape in ((rows * columns, 48), (7,), (7,), (6,)))
    predictor = vjepa2.load_vjepa2(path, 'predictor', heads=2, grid=(rows, columns))
    z_hat, _ = predictor(z, a, states=s, **{'extrinsics': e} if camera else {})
    for b in range(2):
        conditions = {'action_encoder': a[b].double(), 'state_encoder': s[b].double()}
        if camera:
            conditions['extrinsics_encoder'] = e[b].double()
        expected = published_predictor(w, z[b].double(), rows, columns, **conditions)
        torch.testing.assert_close(z_hat[b].double(), expected, atol=5e-5, rtol=0)


def test_extrinsics_need_their_encoder():
    net = hope.build(model.Sizes(model='vit', feature_dim=8, width=24, heads=2, depth=1, mlp_hidden=16, grid=(1, 2)))
    with pytest.raises(ValueError, match='no extrinsics_encoder'):
        net(torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2), extrinsics=torch.zeros(1, 1, 1))


def test_patches_that_are_not_the_grid_are_refused(tmp_path):
    path, a = official(tmp_path, 'vjepa2_ac_tiny.pt'), torch.zeros(1, 1, 7)
    with pytest.raises(ValueError, match='z has 9 patches per step, which is not a grid of 2 x 3'):
        vjepa2.load_vjepa2(path, 'predictor', heads=2, grid=(2, 3))(torch.zeros(1, 1, 9, 48), a, states=a)
    with pytest.raises(ValueError, match='z has 6 patches per step, which is not a square; name it with grid='):
        vjepa2.load_vjepa2(path, 'predictor', heads=2)(torch.zeros(1, 1, 6, 48), a, states=a)
    with pytest.raises(ValueError, match='grid belongs to the predictor'):
        vjepa2.load_vjepa2(official(tmp_path), heads=2, grid=(2, 3))


# ---- V-JEPA 2.1 --------------------------------------------------------------------------------------------------------

def weights_2_1():
    """Random weights of a tiny V-JEPA 2.1 encoder, in the official layout: 40 wide, 2 heads, 2 blocks."""
    linears = {'patch_embed.proj': (40, 3, 2, 16, 16), 'patch_embed_img.proj': (40, 3, 1, 16, 16)}
    norms = [f'norms_block.{i}' for i in range(4)]
    for block in ('blocks.0', 'blocks.1'):
        norms += [f'{block}.norm1', f'{block}.norm2']
        linears |= {f'{block}.attn.qkv': (120, 40), f'{block}.attn.proj': (40, 40),
                    f'{block}.mlp.fc1': (96, 40), f'{block}.mlp.fc2': (40, 96)}
    generator = torch.Generator().manual_seed(0)
    w = {name: torch.randn(1, 1, 40, generator=generator) for name in ('img_mod_embed', 'video_mod_embed')}
    for name, shape in linears.items():
        w[f'{name}.weight'] = torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5
        w[f'{name}.bias'] = torch.randn(shape[0], generator=generator)
    for name in norms:
        w[f'{name}.weight'] = 1 + 0.1 * torch.randn(40, generator=generator)
        w[f'{name}.bias'] = torch.randn(40, generator=generator)
    return w


def official_2_1(tmp_path, w, part='target_encoder'):
    torch.save({part: {f'module.backbone.{name}': v for name, v in w.items()}}, tmp_path / '2_1.pt')
    return str(tmp_path / '2_1.pt')


def published_2_1(w, video):
    """One video (3,F,H,W) → (S,D), from what the official repository says of V-JEPA 2.1."""
    name, embedding, frames = 'patch_embed.proj', 'video_mod_embed', 2
    if video.shape[1] == 1:
        name, embedding, frames = 'patch_embed_img.proj', 'img_mod_embed', 1
    steps, rows, columns = video.shape[1] // frames, video.shape[2] // 16, video.shape[3] // 16
    x, places = [], []
    for t in range(steps):
        for row in range(rows):
            for column in range(columns):
                patch = video[:, t * frames:(t + 1) * frames, row * 16:row * 16 + 16, column * 16:column * 16 + 16]
                x.append(w[f'{name}.weight'].flatten(1) @ patch.flatten() + w[f'{name}.bias'] + w[embedding][0, 0])
                places.append((t, row * 15 / (rows - 1), column * 15 / (columns - 1)))
    x = published_blocks(w, 'blocks', 2, 2, x, places, False)
    return torch.stack([norm(w, 'norms_block.3', token) for token in x])


@pytest.mark.parametrize('part', ['target_encoder', 'ema_encoder'])
@pytest.mark.parametrize('shape', [(4, 32, 32), (2, 48, 48), (4, 32, 48), (5, 56, 40),
                                   (1, 32, 32), (1, 48, 32), (1, 40, 56)])
def test_encoder_2_1_agrees_with_a_reference(shape, part, tmp_path):
    """Clips and single frames, square and not, frames and pixels that fill no patch."""
    w = weights_2_1()
    encoder = vjepa2.load_vjepa2(official_2_1(tmp_path, w, part), part, heads=2)
    video = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([published_2_1({name: v.double() for name, v in w.items()}, clip.double()) for clip in video])
    torch.testing.assert_close(encoder(video).double(), expected, atol=5e-5, rtol=0)
    assert all(module.eps == 1e-6 for module in encoder.modules() if isinstance(module, torch.nn.LayerNorm))


def test_encoder_2_1_refuses_a_single_row_or_column(tmp_path):
    encoder = vjepa2.load_vjepa2(official_2_1(tmp_path, weights_2_1()), heads=2)
    for height, width, words in ((16, 32, '1 x 2'), (32, 16, '2 x 1')):
        with pytest.raises(ValueError, match=f'two rows and two columns of patches, not {words}'):
            encoder(torch.zeros(1, 3, 2, height, width))
    with pytest.raises(ValueError, match="version '3'"):
        vjepa2.VideoEncoder(48, 2, 1, 48, '3')


@pytest.mark.parametrize('change, words', [
    (lambda w: w.pop('norms_block.0.weight'), 'norms_block.0.weight is missing'),
    (lambda w: w.pop('norms_block.3.bias'), 'norms_block.3.bias is missing'),
    (lambda w: w.pop('img_mod_embed'), 'img_mod_embed is missing'),
    (lambda w: w.pop('patch_embed_img.proj.weight'), 'patch_embed_img.proj.weight is missing'),
    (lambda w: w.pop('video_mod_embed'), 'is missing'),
    (lambda w: w.update({'video_mod_embed': torch.zeros(1, 1, 3)}),
     r'video_mod_embed is \(1, 1, 3\), must be \(1, 1, 40\)'),
    (lambda w: w.update({'norm.weight': torch.zeros(40)}), '1 unexpected tensors, the first is norm.weight'),
    (lambda w: w.update({'norms_block.4.weight': torch.zeros(40)}),
     '1 unexpected tensors, the first is norms_block.4.weight'),
])
def test_files_of_2_1_are_strict_too(change, words, tmp_path):
    w = weights_2_1()
    change(w)
    with pytest.raises(Refusal, match=words):
        vjepa2.load_vjepa2(official_2_1(tmp_path, w), heads=2)


# ---- wrong files -----------------------------------------------------------------------------------------------------

def drop(key):
    return lambda checkpoint: checkpoint['target_encoder'].pop(f'module.backbone.{key}')


def put(key, value):
    return lambda checkpoint: checkpoint['target_encoder'].update({f'module.backbone.{key}': value})


@pytest.mark.parametrize('change, words', [
    (drop('blocks.1.norm2.bias'), ['blocks.1.norm2.bias', 'missing']),
    (drop('norm.weight'), ['norm.weight', 'missing']),
    (drop('patch_embed.proj.bias'), ['patch_embed.proj.bias', 'missing']),
    (put('blocks.0.attn.gamma', torch.zeros(3)), ['blocks.0.attn.gamma', 'unexpected']),
    (put('blocks.0.attn.qkv.weight', torch.zeros(3, 48)), ['blocks.0.attn.qkv.weight', '(3, 48)', '(144, 48)']),
    (put('blocks.99999999.norm1.bias', torch.zeros(48)), ['missing']),
    (put('norm.bias', 'text'), ['norm.bias', 'not a tensor']),
    (put('norm.bias', torch.tensor([math.nan] + [0.0] * 47)), ['norm.bias', 'NaN or infinite']),
    (put('blocks.1.norm2.bias', torch.full((48,), math.inf)), ['blocks.1.norm2.bias', 'NaN or infinite']),
    (lambda checkpoint: checkpoint.pop('target_encoder'), ["no part 'target_encoder'", "'encoder'"]),
])
def test_what_is_missing_unexpected_or_misshapen_is_named(change, words, tmp_path):
    with pytest.raises(Refusal) as refusal:
        vjepa2.load_vjepa2(official(tmp_path, change=change), heads=2)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert '\n' not in str(refusal.value)


def test_a_stray_position_table_is_tolerated_and_heads_are_asked_for(tmp_path):
    reference = golden('vjepa2_encoder_tiny.pt')
    path = official(tmp_path, change=put('pos_embed', torch.zeros(1, 18, 48)))
    features = vjepa2.load_vjepa2(path, heads=2)(reference['video'])
    torch.testing.assert_close(features, reference['target_encoder_out'], atol=5e-5, rtol=0)
    for arguments, words in ((dict(), 'heads='), (dict(heads=5), 'not a multiple'),
                             (dict(part='decoder'), 'target_encoder')):
        with pytest.raises(Refusal, match=words):
            vjepa2.load_vjepa2(path, **arguments)
    with pytest.raises(Refusal, match="no part 'predictor'"):
        vjepa2.load_vjepa2(path, 'predictor', heads=2)
    with pytest.raises(Refusal, match='no V-JEPA 2 weights at'):
        vjepa2.load_vjepa2(str(tmp_path / 'none.pt'))
    (tmp_path / 'text.pt').write_text('hello')
    with pytest.raises(Refusal, match='not a file of weights'):
        vjepa2.load_vjepa2(str(tmp_path / 'text.pt'))
    (tmp_path / 'folder').mkdir()
    with pytest.raises(Refusal, match='has none'):
        vjepa2.load_vjepa2(str(tmp_path / 'folder'))


def test_weights_never_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'pwned'),)
    torch.save({'target_encoder': {'module.norm.weight': Evil()}}, tmp_path / 'evil.pt')
    with pytest.raises(Refusal, match='not a file of weights'):
        vjepa2.load_vjepa2(str(tmp_path / 'evil.pt'))
    assert not (tmp_path / 'pwned').exists()


# ---- against transformers --------------------------------------------------------------------------------------------

def hugging_face(tmp_path, frames=4, side=32, **more):
    """transformers' V-JEPA 2 with random weights, saved as people get it → model, folder."""
    transformers = optional('transformers')
    optional('safetensors.torch')
    torch.manual_seed(0)
    sizes = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, crop_size=side, frames_per_clip=frames,
                 pred_hidden_size=24, pred_num_hidden_layers=1, pred_num_attention_heads=2, attn_implementation='sdpa')
    theirs = transformers.VJEPA2Model(transformers.VJEPA2Config(**{**sizes, **more})).eval()
    with torch.no_grad():
        for p in theirs.parameters():                                  # biases and gains that are not trivial
            p += 0.1 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path / 'hf')
    return theirs, str(tmp_path / 'hf')


@pytest.mark.parametrize('shape, more', [
    ((4, 32, 32), {}), ((16, 32, 48), {}), ((2, 64, 32), {}), ((5, 32, 32), {}), ((4, 40, 56), {}), ((16, 32, 32), {}),
    ((8, 48, 48), dict(hidden_size=96, num_attention_heads=4, num_hidden_layers=3, mlp_ratio=3)),
    ((4, 32, 32), dict(hidden_size=128, num_attention_heads=2)), ((1, 32, 32), {}),
])
def test_encoder_agrees_with_transformers(shape, more, tmp_path):
    """Sizes, longer and non-square clips, a single frame, frames and pixels that fill no patch, and the gradients."""
    theirs, folder = hugging_face(tmp_path, side=shape[1], **more)
    ours = vjepa2.load_vjepa2(folder)
    steps = max(1, shape[0] // 2)
    used = min(2 * steps, shape[0])
    if shape[1] != shape[2]:
        # transformers counts rows and columns on a square crop.
        grid = torch.cartesian_prod(*map(torch.arange, (steps, shape[1] // 16, shape[2] // 16)))
        for layer in theirs.encoder.layer:
            layer.attention.get_position_ids = lambda x, masks=None: grid.unbind(1)
    video = torch.randn(2, 3, *shape)
    x, y = video.clone().requires_grad_(), video[:, :, :used].clone().requires_grad_()
    features = ours(x)
    expected = theirs.get_vision_features(y.transpose(1, 2))
    assert features.shape == (2, steps * (shape[1] // 16) * (shape[2] // 16), more.get('hidden_size', 48))
    torch.testing.assert_close(features, expected, atol=5e-5, rtol=0)
    features.square().mean().backward()
    expected.square().mean().backward()
    torch.testing.assert_close(x.grad[:, :, :used], y.grad, atol=1e-7, rtol=1e-3)
    weight = theirs.encoder.layer[1].attention.key.weight.grad
    torch.testing.assert_close(ours.blocks[1].attn.qkv.weight.grad.chunk(3)[1], weight, atol=1e-7, rtol=1e-3)


def test_hugging_face_files_are_strict_too(tmp_path):
    _, folder = hugging_face(tmp_path)
    from safetensors.torch import load_file, save_file
    file = os.path.join(folder, 'model.safetensors')
    with pytest.raises(Refusal, match='vjepa2-ac-vitg.pt'):
        vjepa2.load_vjepa2(folder, 'predictor')
    state = load_file(file)
    one = vjepa2.load_vjepa2(file, heads=2)                             # the file alone does not tell the heads
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), vjepa2.load_vjepa2(folder).parameters()))
    removed = state.pop('encoder.layer.1.attention.key.weight')
    save_file(state, file)
    with pytest.raises(Refusal, match='blocks.1.attn.qkv.weight'):
        vjepa2.load_vjepa2(folder)
    extra = {'encoder.layer.1.attention.key.weight': removed, 'encoder.layer.1.extra.bias': removed.clone()}
    save_file({**state, **extra}, file)
    with pytest.raises(Refusal, match='blocks.1.extra.bias'):
        vjepa2.load_vjepa2(folder)
    with open(file, 'wb') as f:
        f.write(b'no tensors')
    with pytest.raises(Refusal, match='not a file of weights'):
        vjepa2.load_vjepa2(folder)


# ---- fine-tuning -----------------------------------------------------------------------------------------------------

def test_fine_tuning_sums_its_losses_equally():
    """As published, from the first step to the last."""
    recipe = read_config('config/finetune_vjepa2_ac.py')
    assert recipe['loss'] == 'rollout' and recipe['lambda_start'] == recipe['lambda_end'] == 0.5


def test_official_weights_are_fine_tuned_on_own_data(tiny, tmp_path):
    """init_from takes an official predictor; what starts anew and what is dropped is said on the terminal."""
    published = torch.load(official_predictor(tmp_path / 'ac.pt'), weights_only=True)['predictor']
    args = [*TINY, f'--data={tiny}', '--model=vit', f'--init_from={tmp_path}/ac.pt', '--loss=rollout', '--max_iters=1',
            '--learning_rate=1e-9', f'--out={tmp_path}/x.pt']
    out = run('train.py', *args, '--rope=vjepa2').stdout
    anew, dropped = (next(line for line in out.splitlines() if words in line)
                     for words in ('start anew: ', 'are dropped: '))
    assert anew.split(': ')[1] == 'action_encoder.weight, action_memory'
    assert set(dropped.split(': ')[1].split(', ')) == {f'{name}_encoder.{part}' for name in ('state', 'extrinsics')
                                                       for part in ('weight', 'bias')}
    net, _ = hope.load(str(tmp_path / 'x.pt'))
    for name, tensor in published.items():
        if name.split('.')[1] not in ('action_encoder', 'state_encoder', 'extrinsics_encoder'):
            torch.testing.assert_close(net.get_parameter(name.removeprefix('module.')).data, tensor, atol=1e-6, rtol=0)
