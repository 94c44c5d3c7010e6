"""Own clips: the thesis layout in three ways, by numbers and by folders, pushes and states, bad clips."""
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import common, refused, run
from thesis_folder import make_folder

import data
from support import own_clips

RANGES = '--split=train:17000-17019,B:22000-22003,fit_B:22004-22005,A2:23000-23005'
ENCODED = '--encoder=patch', '--size=32', '--dim=24'


@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    """A folder of clips in the thesis layout, with features and pictures."""
    return common(tmp_path_factory, 'clips', lambda folder: make_folder(folder, 'both', 20, 6, 32))


@pytest.fixture
def few(clips, tmp_path):
    """A copy of three clips of train and two of B, in folders, which a test may change."""
    for name in ('train/clip_17000', 'train/clip_17001', 'train/clip_17002', 'B/clip_22000', 'B/clip_22001'):
        shutil.copytree(clips / os.path.basename(name), tmp_path / 'few' / name)
    return tmp_path / 'few'


def prepare(folder, source, *more, ok=True):
    return run('prepare.py', f'--name={folder}', f'--source={source}', *more, ok=ok)


def pictures_in(rgb):
    """The pictures of a clip (F,H,W,3)."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted(rgb.iterdir())])


def as_arrays(source):
    """Pictures become a video array (F,H,W,3)."""
    for rgb in source.glob('**/rgb'):
        np.save(rgb.parent / 'video.npy', pictures_in(rgb))
        shutil.rmtree(rgb)


def test_one_set_in_three_ways(clips, tmp_path):
    """Features in place, numbered pictures and video arrays, encoded as the features were: the same clips."""
    pytest.importorskip('imageio')
    shutil.copytree(clips, tmp_path / 'video')
    as_arrays(tmp_path / 'video')
    out = prepare(tmp_path / 'features', clips, '--content=features', RANGES).stdout
    assert 'every tenth, are held out as val' in out and 'no pictures' not in out
    prepare(tmp_path / 'pictures', clips, '--content=pictures', RANGES, *ENCODED)
    prepare(tmp_path / 'arrays', tmp_path / 'video', '--content=pictures', RANGES, *ENCODED)
    for split, count in {'train': 18, 'val': 2, 'test_B': 4, 'fit_B': 2, 'test_A2': 6}.items():
        sets = [data.Clips(str(tmp_path / name), split) for name in ('features', 'pictures', 'arrays')]
        (z, a), pictures, arrays = [some[range(count)] for some in sets]
        assert len(sets[0]) == count and torch.equal(a, pictures[1]) and torch.equal(a, arrays[1])
        torch.testing.assert_close(z, pictures[0], atol=1e-2, rtol=1e-2)
        assert torch.equal(pictures[0], arrays[0])
        assert a[:, 0].any(1).all() and (a[:, 1:] == 0).all()
        assert (tmp_path / 'features' / 'decoder.npy').exists()


def test_features_are_read_in_place(few, tmp_path):
    """meta.json lists the files, nothing is copied; of the published shapes; in folders, and B is test_B."""
    flat = few / 'train' / 'clip_17001' / 'feature_maps' / 'vjepa2_vitl16.npy'
    np.save(flat, np.random.default_rng(0).normal(size=(8 * 256, 24)).astype(np.float32))
    for path in few.glob('*/*/feature_maps/*.npy'):
        if path != flat:
            np.save(path, np.resize(np.load(path), (8, 256, 24)))
    for rgb in few.glob('*/*/rgb'):
        shutil.rmtree(rgb)
    assert 'no pictures beside the features' in prepare(tmp_path / 'set', few).stdout
    meta = json.loads((tmp_path / 'set' / 'meta.json').read_text())
    assert meta['shape'] == [8, 256, 24] and meta['grid'] == [16, 16]
    assert set(meta['files']) == {'train', 'val', 'test_B'}
    assert meta['files']['train'][1] == str(flat)
    assert sorted(os.listdir(tmp_path / 'set')) == ['meta.json', 'test_B.npz', 'train.npz', 'val.npz']
    raw = torch.from_numpy(np.load(flat)).half().view(8, 256, 24)
    torch.testing.assert_close(data.Clips(str(tmp_path / 'set'), 'train')[1][0], data.normed(raw))
    assert 'is complete; nothing to do' in prepare(tmp_path / 'set', few).stdout


def test_forces_are_added_up(few, tmp_path):
    """Newtons in several rows, of 0.01 s each, are one impulse at step 1."""
    forces = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)
    np.save(few / 'train' / 'clip_17000' / 'actions_states' / 'actions.npy', forces)
    prepare(tmp_path / 'set', few, '--content=features', '--frame_time=0.01')
    actions = data.Clips(str(tmp_path / 'set'), 'train').actions
    np.testing.assert_allclose(actions[0, 0], 0.01 * forces.sum(0), rtol=1e-5)
    assert not actions[:, 1:].any()


def test_a_first_step_that_has_seen_the_future_is_said(tmp_path):
    """Features of clips in which z_1 knows the push, and of clips in which it knows nothing."""
    rng = np.random.default_rng(0)
    for told, words in (4, 'WARNING: step 1 tells the push'), (0, 'step 1 does not tell the push'):
        for i in range(150):
            push = rng.normal(size=2)
            z = rng.normal(size=(8, 16, 24))
            z[:, :2, 5] += told * push
            folder = tmp_path / f'clips{told}' / f'clip_{i:05d}'
            folder.mkdir(parents=True)
            np.save(folder / 'actions.npy', push[None])
            (folder / 'feature_maps').mkdir()
            np.save(folder / 'feature_maps' / 'x.npy', z.astype(np.float16))
        out = prepare(tmp_path / f'set{told}', tmp_path / f'clips{told}', '--split=train:0-99,val:100-149').stdout
        assert words in out and '100 clips; for the defaults of training take 3,000' in out


def test_several_pushes_and_states(few, tmp_path):
    """(8,2) is kept, (7,2) gets a row of zeros, a single push acts at step 1; states of steps or frames."""
    rows = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    states = np.arange(48).reshape(16, 3)
    for i, clip in enumerate(sorted(few.glob('*/*'))):
        np.save(clip / 'states.npy', states if i % 2 else states[::2])
    np.save(few / 'train' / 'clip_17000' / 'actions_states' / 'actions.npy', rows)
    os.remove(few / 'train' / 'clip_17001' / 'actions_states' / 'actions.npy')
    np.save(few / 'train' / 'clip_17001' / 'actions.npy', rows[:7])
    prepare(tmp_path / 'set', few, '--content=features')
    train, test = [data.Clips(str(tmp_path / 'set'), split) for split in ('train', 'test_B')]
    assert (train.actions[0] == rows).all() and (train.actions[1] == rows * (np.arange(8) < 7)[:, None]).all()
    assert train.several_pushes and not test.several_pushes and test.actions[:, 0].any(1).all()
    assert (train.states == states[::2]).all() and (test.states == states[::2]).all()


FEATURES, ACTIONS = 'feature_maps/vjepa2_vitl16.npy', 'actions_states/actions.npy'
z, push = np.ones((8, 4, 24), np.float16), np.eye(16, 2)
BAD = [
    ('features', FEATURES, None, 'must have features once, not 0 times'),
    ('features', FEATURES, z * np.nan, 'finite'),
    ('features', FEATURES, z[:6], 'alike in all clips'),
    ('features', FEATURES, z[0], 'must be (T*256,D) or (T,N,D)'),
    ('features', ACTIONS, None, 'must have actions once, not 0 times'),
    ('features', ACTIONS, 0 * push, 'not all zero'),
    ('features', ACTIONS, np.full((1, 2), np.inf), 'not finite'),
    ('features', ACTIONS, np.ones((16, 2)), 'needs a row per step, 8, which are not all zero; has 16'),
    ('pictures', 'video.npy', np.zeros((16, 32, 32), np.uint8), 'must be (frames,height,width,3) uint8'),
    ('pictures', 'video.npy', np.zeros((12, 32, 32, 3), np.uint8), 'has 12 pictures; 8 steps'),
    ('pictures', 'video_2.npy', np.zeros((16, 32, 32, 3), np.uint8), 'must have pictures once, not 2 times'),
]


@pytest.mark.parametrize('content, file, instead, words', BAD, ids=[f'{case[1]}-{case[3]}' for case in BAD])
def test_the_first_bad_clip_is_named(content, file, instead, words, few, tmp_path):
    """In one line, exit status 2; no split has a name."""
    as_arrays(few)
    path = few / 'train' / 'clip_17001' / file
    if instead is None:
        path.unlink()
    else:
        np.save(path, instead)
    line = refused(prepare(tmp_path / 'set', few, f'--content={content}', ok=False))
    assert words in line and 'clip_1700' in line and not (tmp_path / 'set' / 'train.npz').exists()


@pytest.mark.parametrize('ranges, words', [
    ('train:17000-17020', 'clip_17020: clip is missing'), ('train=1-2', 'is not name:first-last'),
    ('train:17000-17005,B:17005-17007', 'or in two ranges'), ('B:22000-22001', 'no clips of train')])
def test_bad_ranges(ranges, words, clips, tmp_path):
    assert words in refused(prepare(tmp_path / 'set', clips, f'--split={ranges}', ok=False))


def test_a_video_file_is_read(clips, tmp_path):
    iio, _ = pytest.importorskip('imageio.v3'), pytest.importorskip('av')
    frames = pictures_in(clips / 'clip_17000' / 'rgb')
    iio.imwrite(tmp_path / 'video.mkv', frames, plugin='pyav', codec='ffv1', out_pixel_format='bgr0', fps=30)
    assert torch.equal(own_clips.read_frames(str(tmp_path), 32), torch.from_numpy(frames))
