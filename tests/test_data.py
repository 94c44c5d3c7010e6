"""Physics against Newton's law, pictures against the physics, a data set on disk, batches."""
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, run

import data
import hope
import model

CLIPS = 300


def slid(clips):
    """How far objects slide over the clip, in metres."""
    return np.linalg.norm(clips['position'][:, -1] - clips['position'][:, 0], axis=1)


@pytest.mark.parametrize('domain', data.DOMAINS)
def test_motion_obeys_newtons_law(domain):
    """
    Integrate m dv/dt = -mu m g in small steps, without the closed form, from the last frame of step 1.
    Wind adds to the push; in `turned` the motion goes 40 degrees from where the push points.
    """
    clips = data.simulate(domain, 20, 2, 'x')
    push = (clips['impulse'] + ([0.2, 0.1] if domain == 'wind' else [0, 0])) @ [1, 1j]
    velocity, mu = np.abs(push) / clips['mass'], data.DOMAINS[domain].mu
    sub, x, path = 2000, np.zeros(20), [np.zeros(20)] * data.TUBELET
    for _ in range(data.FRAMES - data.TUBELET):
        for _ in range(sub):
            after = np.maximum(0, velocity - mu * data.GRAVITY / (data.FPS * sub))
            x, velocity = x + (velocity + after) / 2 / (data.FPS * sub), after
        path.append(x)
    heading = push / np.abs(push) * np.exp(1j * np.deg2rad(40 if domain == 'turned' else 0))
    measured = (clips['position'] - clips['position'][:, :1]) @ [1, 1j]
    np.testing.assert_allclose(measured.T, np.array(path) * heading, atol=1e-6)


def test_masses():
    """One for all; in `varied` drawn for each clip, in `colour` 2.5 times as heavy where red is over blue."""
    for domain, physics in data.DOMAINS.items():
        clips = data.simulate(domain, 5000, 1, 'x')
        logs = np.log(clips['mass'] / physics.mass)
        assert logs.mean() == pytest.approx(0, abs=0.02)
        if domain == 'colour':
            red = clips['colour'][:, 0] > clips['colour'][:, 2]
            np.testing.assert_allclose(logs, np.log(2.5) * (red - 0.5))
        else:
            assert logs.std() == pytest.approx(0.3 if domain == 'varied' else 0, rel=0.02)


def test_time_matters():
    """In A half of the objects move by a pixel between the first and the last jump target, or more."""
    position = data.simulate('A', 5000, 1, 'x')['position']
    first, last = (position[:, step * data.TUBELET + 1] for step in (5, 7))
    pixels = np.linalg.norm(last - first, axis=1) * 64 / data.WORLD
    assert np.mean(pixels >= 1) > 0.5


def test_B_moves_twice_as_far_as_A_and_half_of_it_further_than_A_ever_does():
    a, b = slid(data.simulate('A', 5000, 1, 'x')), slid(data.simulate('B', 5000, 1, 'x'))
    assert a.max() / a.min() > 5
    assert 2.0 < np.median(b / a) < 2.5 and (b / a).min() > 1.8
    assert 0.45 < np.mean(b > a.max()) < 0.6


@pytest.mark.parametrize('domain', [*data.DOMAINS, 'zoomed'])
def test_objects_stay_in_view(domain):
    """Zoomed ones too, which move further by the factor and look as large as the others."""
    zooms = 2.0 if domain == 'zoomed' else 1
    name = 'A' if domain == 'zoomed' else domain
    for seed in (1, 2, 3):
        clips, plain = data.simulate(name, 2000, seed, 'x', zooms), data.simulate(name, 2000, seed, 'x')
        assert (clips['position'] > clips['radius'][:, None, None] - 1e-9).all()
        assert (clips['position'] < data.WORLD - clips['radius'][:, None, None] + 1e-9).all()
        assert (clips['impulse'] == plain['impulse']).all()
        np.testing.assert_allclose(clips['radius'], plain['radius'])
        np.testing.assert_allclose(slid(clips), zooms * slid(plain), rtol=1e-9)


def test_a_new_domain_must_fit_the_room(monkeypatch, capsys):
    monkeypatch.setitem(data.DOMAINS, 'feather', data.Physics(mu=0.02, mass=0.2))
    for arguments in (('feather', 100, 1, 'x'), ('A', 100, 1, 'x', 6)):
        with pytest.raises(SystemExit):
            data.simulate(*arguments)
        assert 'objects slide out of view; widen ROOM' in capsys.readouterr().err


def test_the_first_step_tells_nothing_about_the_domain():
    a = data.simulate('A', CLIPS, 1, 'x')
    for domain in data.DOMAINS:
        other = data.simulate(domain, CLIPS, 1, 'x')
        for key in ('impulse', 'radius', 'angle', 'colour', 'corners'):
            assert (a[key] == other[key]).all()
        assert (a['position'][:, :data.TUBELET] == other['position'][:, :data.TUBELET]).all()


def test_splits_share_no_clip_and_a_seed_fixes_each():
    def drawn(*arguments):
        return data.simulate('A', *arguments)['impulse'][:, 0]
    val, *others = [drawn(CLIPS, 1, split) for split in ('val', 'train', 'test_A', 'fit_B')]
    assert len(np.unique([val, *others])) == 4 * CLIPS
    # Of more clips the first ones are the same.
    assert (drawn(10, 1, 'val') == val[:10]).all() and not (drawn(10, 2, 'val') == val[:10]).any()


def test_pictures_show_the_object_where_the_physics_puts_it():
    """To a quarter of a pixel; it stands out from the plane by 0.3 of the range of brightness or more."""
    clips = data.simulate('B', 8, 1, 'x')
    frames = data.render(clips, 96)
    assert frames.shape == (8, data.FRAMES, 96, 96, 3) and frames.dtype == torch.uint8
    assert (data.BACKGROUND - data.simulate('A', 5000, 1, 'x')['colour'] >= 0.3 - 1e-9).all()
    light = (frames.float().sum(-1) - 3 * round(255 * data.BACKGROUND)).abs()
    pixel = (torch.arange(96) + 0.5) * data.WORLD / 96
    x = (light.sum(2) * pixel).sum(-1) / light.sum((2, 3))
    y = (light.sum(3) * pixel).sum(-1) / light.sum((2, 3))
    centre = torch.stack([x, y], -1).double().numpy()
    assert np.abs(centre - clips['position']).max() < 0.002


def test_a_zoomed_picture_is_a_part_of_a_larger_one_and_changes_no_other():
    near = data.simulate('A', 20, 1, 'x', zoom=1.5)
    far = {**near, 'position': near['position'] / 1.5, 'radius': near['radius'] / 1.5}
    part = data.render(far, 96)[:, :, :64, :64]
    assert (data.render(near, 64).int() - part.int()).abs().max() <= 1 and part.float().std() > 10
    plain = data.simulate('A', 20, 1, 'y')
    both = {key: np.concatenate([values, near[key]]) for key, values in plain.items()}
    assert torch.equal(data.render(both, 64)[:20], data.render(plain, 64))


def test_one_clip_some_clips_and_a_loader(tiny):
    clips = data.Clips(tiny, 'val')
    z, a = clips[range(24)]
    assert len(clips) == 24 and z.shape == (24, 8, 4, 24) and a.shape == (24, 8, 2)
    assert z.dtype == a.dtype == torch.float32 and (a[:, 1:] == 0).all() and (a[:, 0] != 0).any()
    torch.testing.assert_close(z.mean(-1), torch.zeros(24, 8, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(-1, unbiased=False), torch.ones(24, 8, 4), atol=1e-2, rtol=0)
    for index in (5, -1, np.int64(3), torch.tensor(7), slice(2, 20, 5), [3, 3, 0], np.array([4, 1])):
        assert torch.equal(clips[index][0], z[index]) and torch.equal(clips[index][1], a[index])
    with pytest.raises(IndexError):
        clips[24]
    both = data.Clips(tiny, 'val', 'test_B')
    assert torch.equal(both[-1][0], data.Clips(tiny, 'test_B')[23][0]) and torch.equal(both[5][0], z[5])
    batches = torch.utils.data.DataLoader(clips, batch_size=10, num_workers=2)
    assert torch.equal(torch.cat([batch[0] for batch in batches]), z)
    features, _, states = clips.stored(range(3, 9))
    assert features.dtype == torch.float16 and states is None and not clips.several_pushes
    assert torch.equal(data.normed(features), z[3:9])


def test_a_missing_split_or_set_is_one_line(tiny, tmp_path, capsys):
    folder = shutil.copytree(tiny, tmp_path / 'set')
    os.unlink(folder / 'val.npy')
    for missing, words in (folder, "no split 'val'; run prepare.py as before"), (tmp_path, 'make it with: python'):
        with pytest.raises(SystemExit) as end:
            data.Clips(str(missing), 'val')
        said = capsys.readouterr().err
        assert end.value.code == 2 and words in said and said.count('\n') == 1


def test_batches_visit_every_clip_once_per_epoch_and_need_no_state():
    drawn = [data.batch_indices(10, 4, 7, i) for i in range(5)]
    assert sorted(np.concatenate(drawn)[:10]) == list(range(10)) == sorted(np.concatenate(drawn)[10:])
    assert (data.batch_indices(10, 4, 7, 3) == drawn[3]).all()
    assert not (np.concatenate(drawn)[:10] == np.concatenate(drawn)[10:]).all()


@pytest.mark.parametrize('kind', ['hope', 'vit'])
def test_a_trained_model_needs_to_know_the_step_and_the_world(kind, tmp_path):
    """
    The checkpoints in assets/, told step 8 in place of 6 and 6 in place of 8, lose a tenth and more; if all
    had come to rest, they would lose nothing. On B they lose three times as much as on A.
    """
    run('prepare.py', f'--name={tmp_path}/fresh', '--clips=8', '--test_clips=40', '--seed=7', '--zoom=False')
    predictor, _ = hope.load(os.path.join(ROOT, 'assets', f'{kind}.pt'))

    def loss(domain, told):
        """Mean loss of the target steps 6, 7 and 8 when the predictor is told other ones, 0-based."""
        clips = data.Clips(f'{tmp_path}/fresh', f'test_{domain}')
        z, a = clips[range(len(clips))]
        with torch.no_grad():
            z_hat = [predictor(z[:, :1], a[:, :1], tau=torch.full((len(z),), step))[0] for step in told]
        return model.feature_loss(torch.stack(z_hat, 1), z[:, 5:]).mean()

    right = loss('A', (5, 6, 7))
    assert loss('A', (7, 6, 5)) > 1.1 * right
    assert loss('B', (5, 6, 7)) > 3 * right
