"""Zoomed clips: the pushes that are read from their features agree with physics."""
import numpy as np
import pytest
from conftest import run

import data
from support.zoom import LEAST_READ, read_zoomed, zoom_levels


def plain(seed, clips, gain):
    """Features (n,4,4,8) in which something moves `gain` times as far as pushed, and the pushes (n,4,3)."""
    rng = np.random.default_rng(seed)
    actions = np.zeros((clips, 4, 3), np.float32)
    actions[:, 0] = rng.normal(size=(clips, 3))
    z = 0.1 * rng.normal(size=(clips, 4, 4, 8))
    z[..., :3] += 0.3 * gain * actions[:, :1, None] * np.arange(4)[:, None, None]
    # So large that a layer norm multiplies all features alike.
    z[..., 6:] = 8, -8
    return z.astype(np.float16), actions


def test_pushes_are_read_from_the_features():
    """What moves 1.3 times as far was pushed 1.3 times as hard, again for each time that it is zoomed in."""
    features, given = plain(2, 400, 1.3)
    pushes, says = read_zoomed(plain(0, 150, 1), plain(1, 100, 1), (features, given), 1, 'cpu')
    assert says['used'] and says['explained'] > 0.97 and says['share_read'] > LEAST_READ
    np.testing.assert_allclose(says['M'], 1.3 * np.eye(3, 6), atol=0.15)
    gain = np.linalg.norm(pushes, axis=1) / np.linalg.norm(given[:, 0], axis=1)
    for level in (1, 2, 3, 4):
        assert gain[zoom_levels(400) == level].mean() == pytest.approx(1.3 ** level, rel=0.1)
    # Where val does not move, its pushes cannot be read, and the zoomed clips are not used.
    _, says = read_zoomed(plain(0, 150, 1), plain(1, 100, 0), (features, given), 1, 'cpu')
    assert not says['used'] and says['share_read'] < 0.1


def test_the_split_zoom(tmp_path):
    """Half as many clips, of A, in four parts; M applied k times: a gain, and a constant along the push."""
    run('prepare.py', f'--name={tmp_path}', '--size=32', '--dim=24', '--clips=70', '--test_clips=8')
    clips = data.Clips(str(tmp_path), 'zoom')
    assert np.bincount(zoom_levels(35)).tolist() == [0, 9, 9, 9, 8] and len(clips) == 35
    given = clips.physics['impulse']
    assert (given == data.simulate('A', 35, 1, 'zoom')['impulse']).all()
    assert (clips.actions[:, 1:] == 0).all()
    says = clips.meta['zoom']
    M = np.array(says['M'])
    # 70 clips are too few to read pushes from.
    assert says['factor'] == 1.2 and says['share_read'] < LEAST_READ and says['used'] is False
    scale = np.linalg.norm(data.Clips(str(tmp_path), 'train').actions[:, 0], axis=1).mean()
    for push, level, read in zip(given, zoom_levels(35), clips.actions[:, 0]):
        for _ in range(level):
            push = M[:, :2] @ push + M[:, 2:] @ push / np.linalg.norm(push) * scale
        np.testing.assert_allclose(read, push, rtol=1e-4, atol=1e-6)
