"""Physics against the closed form, pictures against the physics, the disk format, batches."""
import json
import os
import shutil
import threading
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_SET, refused, run

import data
import hope
import model
import prepare
from configurator import Refusal
from support import files, running, terminal

CLIPS = 300


def slid(clips):
    return np.linalg.norm(clips['position'][:, -1] - clips['position'][:, 0], axis=1)


def test_stopping_distance_is_v0_squared_over_2_mu_g():
    impulse, mu, mass = np.array([0.2, 0.5, 1.0]), np.array([0.05, 0.12, 0.3]), np.array([0.5, 1.0, 2.0])
    expected = (impulse / mass) ** 2 / (2 * mu * data.GRAVITY)
    np.testing.assert_allclose(data.displacement(impulse, data.Physics(mu, mass), 60.0), expected, rtol=1e-12)


@pytest.mark.parametrize('domain', data.DOMAINS)
def test_motion_obeys_newtons_law(domain):
    """Integrate m dv/dt = -mu m g in small steps, independently of the closed form."""
    clips = data.simulate(domain, 20, 2, 'x')
    physics = data.DOMAINS[domain]
    velocity = np.linalg.norm(clips['impulse'], axis=1) / physics.mass
    sub, x, path = 2000, np.zeros(20), [np.zeros(20)] * data.TUBELET
    for _ in range(data.FRAMES - data.TUBELET):
        for _ in range(sub):
            after = np.maximum(0, velocity - physics.mu * data.GRAVITY / (data.FPS * sub))
            x, velocity = x + (velocity + after) / 2 / (data.FPS * sub), after
        path.append(x)
    measured = np.linalg.norm(clips['position'] - clips['position'][:, :1], axis=2).T
    np.testing.assert_allclose(measured, np.array(path), atol=1e-6)


@pytest.mark.parametrize('domain', data.DOMAINS)
def test_the_motion_follows_the_impulse_and_starts_after_step_1(domain):
    """In `turned` it goes 40 degrees from where the push points, in the other domains where it points."""
    clips, angle = data.simulate(domain, CLIPS, 1, 'x'), np.deg2rad(40 if domain == 'turned' else 0)
    (px, py), (mx, my) = clips['impulse'].T, (clips['position'][:, -1] - clips['position'][:, 0]).T
    lengths = np.hypot(px, py) * np.hypot(mx, my)
    np.testing.assert_allclose((px * mx + py * my) / lengths, np.cos(angle), atol=1e-9)
    np.testing.assert_allclose((px * my - py * mx) / lengths, np.sin(angle), atol=1e-9)
    assert (clips['position'][:, :data.TUBELET] == clips['position'][:, :1]).all()


def test_time_matters():
    """In A half of the objects move by a pixel between the first and the last jump target; at rest all steps are one."""
    position = data.simulate('A', 5000, 1, 'x')['position']
    first, last = position[:, 5 * data.TUBELET + 1], position[:, 7 * data.TUBELET + 1]  # last frames of steps 6 and 8
    pixels = np.linalg.norm(last - first, axis=1) * 64 / data.WORLD
    assert np.mean(pixels >= 1) > 0.5


def test_B_moves_twice_as_far_as_A_and_half_of_it_further_than_A_ever_does():
    a, b = slid(data.simulate('A', 5000, 1, 'x')), slid(data.simulate('B', 5000, 1, 'x'))
    assert a.max() / a.min() > 5
    assert 2.0 < np.median(b / a) < 2.5 and (b / a).min() > 1.8
    assert 0.45 < np.mean(b > a.max()) < 0.6


@pytest.mark.parametrize('domain', data.DOMAINS)
def test_objects_stay_in_view(domain):
    clips = data.simulate(domain, 2000, 3, 'x')
    assert (clips['position'] > clips['radius'][:, None, None] - 1e-9).all()
    assert (clips['position'] < data.WORLD - clips['radius'][:, None, None] + 1e-9).all()


def test_zoomed_objects_stay_in_view_and_move_further():
    """By the factor of each clip for the same push; the picture's side still counts as WORLD."""
    zooms = 1.2 ** np.repeat([1, 2, 3, 4], 500)
    clips, plain = data.simulate('A', 2000, 3, 'x', zooms), data.simulate('A', 2000, 3, 'x')
    assert (clips['position'] > clips['radius'][:, None, None] - 1e-9).all()
    assert (clips['position'] < data.WORLD - clips['radius'][:, None, None] + 1e-9).all()
    assert (clips['impulse'] == plain['impulse']).all()
    np.testing.assert_allclose(clips['radius'], zooms * plain['radius'])
    np.testing.assert_allclose(slid(clips), zooms * slid(plain), rtol=1e-9)


def test_without_zoom_the_world_is_as_it_was():
    """Starts are drawn so that all domains fit, and a zoomed clip in the same batch changes no other picture."""
    clips = data.simulate('A', CLIPS, 1, 'x')
    u = np.random.default_rng([1, zlib.crc32(b'x')]).random((CLIPS, 10))
    others = [data.simulate(domain, CLIPS, 1, 'x')['position'] for domain in data.DOMAINS]
    ends = [position[:, -1] - position[:, 0] for position in others]
    low = clips['radius'][:, None] - np.minimum(0, np.min(ends, 0))
    high = data.WORLD - clips['radius'][:, None] - np.maximum(0, np.max(ends, 0))
    np.testing.assert_allclose(clips['position'][:, 0], low + (high - low) * u[:, 3:5], atol=1e-12)
    some = {key: values[:20] for key, values in clips.items()}
    near = data.simulate('A', 20, 1, 'y', zoom=2)
    both = {key: np.concatenate([values, near[key]]) for key, values in some.items()}
    assert torch.equal(data.render(both, 64)[:20], data.render(some, 64))


def test_a_zoomed_picture_is_a_part_of_a_larger_one():
    near = data.simulate('A', 20, 1, 'x', zoom=1.5)
    far = {**near, 'position': near['position'] / 1.5, 'radius': near['radius'] / 1.5}
    part = data.render(far, 96)[:, :, :64, :64]
    assert (data.render(near, 64).int() - part.int()).abs().max() <= 1 and part.float().std() > 10


def test_what_slides_too_far_to_be_zoomed_in_is_refused():
    with pytest.raises(Refusal, match='slide out of view'):
        data.simulate('A', 100, 1, 'x', zoom=3)


def test_the_first_step_tells_nothing_about_the_domain():
    a = data.simulate('A', CLIPS, 1, 'x')
    for domain in data.DOMAINS:
        other = data.simulate(domain, CLIPS, 1, 'x')
        for key in ('impulse', 'radius', 'angle', 'colour', 'corners'):
            assert (a[key] == other[key]).all()
        assert (a['position'][:, :data.TUBELET] == other['position'][:, :data.TUBELET]).all()


def test_splits_share_no_clip_and_a_seed_fixes_each():
    drawn = {s: data.simulate('A', CLIPS, 1, s)['impulse'][:, 0] for s in ('train', 'val', 'test_A', 'test_B', 'fit_B')}
    assert len(np.unique(np.concatenate(list(drawn.values())))) == CLIPS * len(drawn)
    assert (data.simulate('A', CLIPS, 1, 'val')['impulse'][:, 0] == drawn['val']).all()
    assert not (data.simulate('A', CLIPS, 2, 'val')['impulse'][:, 0] == drawn['val']).any()
    assert (data.simulate('A', 10, 1, 'val')['impulse'][:, 0] == drawn['val'][:10]).all()  # more clips, the same first ones


def test_pictures_show_the_object_where_the_physics_puts_it():
    clips = data.simulate('B', 8, 1, 'x')
    frames = data.render(clips, 96)
    assert frames.shape == (8, data.FRAMES, 96, 96, 3) and frames.dtype == torch.uint8
    light = frames.float().sum(-1) - 3 * round(255 * data.BACKGROUND)
    pixel = (torch.arange(96) + 0.5) * data.WORLD / 96
    x = (light.sum(2) * pixel).sum(-1) / light.sum((2, 3))
    y = (light.sum(3) * pixel).sum(-1) / light.sum((2, 3))
    centre = torch.stack([x, y], -1).double().numpy()
    assert np.abs(centre - clips['position']).max() < 0.002  # a quarter of a pixel


def test_unknown_domain_is_refused():
    with pytest.raises(Refusal, match='A, B, C'):
        data.simulate('moon', 1, 1, 'x')


def test_tubelets_and_pictures_are_inverse():
    frames = data.render(data.simulate('A', 2, 1, 'x'), 32)
    blocks = data.tubelets(frames, 16)
    assert blocks.shape == (2, 8, 4, 3, 512)
    identity = torch.cat([torch.eye(3 * 512), torch.zeros(1, 3 * 512)])
    shown = data.pictures(blocks[:, 5].flatten(2), identity, (2, 2), 16)
    torch.testing.assert_close(shown, frames[:, 11].float() / 255, atol=1e-5, rtol=0)


def test_the_whole_basis_keeps_all_energy():
    """With D = all 1536 frequencies the patch encoder is orthonormal: features have the pixels' norm."""
    frames = data.render(data.simulate('A', 4, 1, 'train'), 16)
    z, pixels = prepare.patch_encode(frames, prepare.cosine_basis(1536)), data.tubelets(frames, 16)
    torch.testing.assert_close(z.norm(dim=-1), pixels.flatten(3).norm(dim=-1), rtol=1e-4, atol=0)
    assert z[..., 3:].abs().amax() > 0 and (z[..., 0].abs() > 1).all()  # lowest frequency first: the mean


def test_a_set_on_disk(tiny):
    manifest = json.load(open(os.path.join(tiny, 'manifest.json')))
    assert manifest['complete'] and manifest['shape'] == [8, 4, 24]
    arrays = {f for f in os.listdir(tiny) if f.endswith(('.npy', '.npz'))}
    assert set(manifest['sha256']) == arrays and 'test_B_physics.npz' in arrays
    assert all(files.sha256(os.path.join(tiny, f)) == manifest['sha256'][f] for f in arrays)
    stored = np.load(os.path.join(tiny, 'test_B_physics.npz'))
    for key, shape in dict(mu=(24,), mass=(24,), impulse=(24, 2), position=(24, data.FRAMES, 2)).items():
        assert stored[key].shape == shape
    assert set(manifest['splits']) == {'train', 'val', 'fit_B', *(f'test_{d}' for d in data.DOMAINS)}
    assert all(os.path.getsize(os.path.join(tiny, f)) > 5000 for f in ('clips.png', 'displacement.png'))
    assert not [f for f in os.listdir(tiny) if f.endswith('.tmp')]
    for split in manifest['splits'].values():
        for shard in split['shards']:
            assert shard['crc32'] == files.clip_checksums(np.load(os.path.join(tiny, shard['file'])))
    # The value that every description of CRC-32 gives for this text.
    assert files.clip_checksums([b'123456789', b'']) == 'cbf43926' + '00000000'


def test_reading_a_split(tiny):
    clips = data.open_split(tiny, 'val')
    z, a = clips[[0, 5]]
    assert len(clips) == 24 and z.shape == (2, 8, 4, 24) and a.shape == (2, 8, 2)
    assert z.dtype == a.dtype == torch.float32
    torch.testing.assert_close(z.mean(-1), torch.zeros(2, 8, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(-1, unbiased=False), torch.ones(2, 8, 4), atol=1e-2, rtol=0)
    assert (a[:, 1:] == 0).all() and (a[:, 0] != 0).any()
    assert torch.equal(clips[[5]][0][0], z[1]) and torch.equal(clips[range(5, 6)][0][0], z[1])
    with pytest.raises(IndexError):
        clips[[24]]


def test_one_clip_some_clips_and_a_loader(tiny):
    """A Split is a sequence of clips, and a torch data set."""
    clips = data.open_split(tiny, 'val')
    z, a = clips[range(24)]
    for index in (0, 5, -1, np.int64(3), torch.tensor(7)):
        one = clips[index]
        assert one[0].shape == (8, 4, 24) and torch.equal(one[0], z[index]) and torch.equal(one[1], a[index])
    for indices in (slice(2, 20, 5), [3, 3, 0], np.array([4, 1]), torch.tensor([9, 2]), slice(-3, None)):
        assert torch.equal(clips[indices][0], z[indices]) and torch.equal(clips[indices][1], a[indices])
    assert sum(1 for _ in clips) == 24
    for wrong in (24, -25):
        with pytest.raises(IndexError):
            clips[wrong]
    assert clips.states is None and not clips.several_pushes
    both = data.open_split(tiny, 'val', 'test_B')
    assert torch.equal(both[-1][0], data.open_split(tiny, 'test_B')[23][0]) and torch.equal(both[5][0], z[5])
    for workers in (0, 2):
        batches = list(torch.utils.data.DataLoader(clips, batch_size=10, num_workers=workers))
        assert [len(batch[0]) for batch in batches] == [10, 10, 4]
        assert torch.equal(torch.cat([batch[0] for batch in batches]), z)
        assert torch.equal(torch.cat([batch[1] for batch in batches]), a)


def test_more_shards_than_files_may_be_open(tiny, tmp_path):
    """A set of a shard per clip, in a process that may open few files more than it has open."""
    resource = pytest.importorskip('resource')
    folder = shutil.copytree(tiny, tmp_path / 'set')
    manifest = files.parse_manifest(str(folder / 'manifest.json'))
    z = np.load(folder / 'train_00000.npy')
    entries = []
    for i, clip in enumerate(z):
        entries.append({'file': f'train_{i:05d}.npy', 'clips': 1, 'skipped': []})
        np.save(folder / entries[-1]['file'], clip[None])
    manifest['splits']['train']['shards'] = entries
    files.write_manifest(str(folder), manifest)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 10, limits[1]))
        clips = data.open_split(str(folder), 'train')
        read = clips[range(48)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    same = data.open_split(tiny, 'train')[range(48)]
    assert len(clips.shards) == 48 and torch.equal(read[0], same[0]) and torch.equal(read[1], same[1])


def test_a_file_that_is_cut_after_opening_is_named(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / 'set')
    clips = data.open_split(str(folder), 'val')
    os.truncate(folder / 'val_00000.npy', 1000)
    with pytest.raises(Refusal, match='val_00000.npy is damaged or missing; prepare.py, run as before, repairs it'):
        clips[range(24)]


def test_a_flipped_bit_is_refused_when_its_clip_is_read(tiny, tmp_path):
    """Not when another clip of the file is; and a clip that was found whole is not compared again."""
    folder = shutil.copytree(tiny, tmp_path / 'set')
    clips, read_before = data.open_split(str(folder), 'val'), data.open_split(str(folder), 'val')
    expected, _ = read_before[range(24)]
    with open(folder / 'val_00000.npy', 'r+b') as f:
        # A bit in the exponent of the last number of clip 7.
        f.seek(-2 * 8 * 4 * 24 * 16 - 1, os.SEEK_END)
        byte, = f.read(1)
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 0x40]))
    others = [i for i in range(24) if i != 7]
    assert torch.equal(clips[others][0], expected[others])
    for chosen in (7, [7], slice(5, 9)):
        with pytest.raises(Refusal, match='val_00000.npy is damaged or missing; prepare.py, run as before, repairs it'):
            clips[chosen]
    assert not torch.equal(read_before[7][0], expected[7])


def test_a_set_of_an_earlier_version_has_no_checksums_of_clips(tiny, tmp_path):
    """It is read as it is, and left as it is: its sha256 changes with a list, and a run of train.py could not go on."""
    folder = shutil.copytree(tiny, tmp_path / 'set')
    manifest = files.parse_manifest(str(folder / 'manifest.json'))
    for split in manifest['splits'].values():
        for shard in split['shards']:
            del shard['crc32']
    files.write_manifest(str(folder), manifest)
    assert torch.equal(data.open_split(str(folder), 'val')[range(24)][0], data.open_split(tiny, 'val')[range(24)][0])
    before = (folder / 'manifest.json').read_bytes()
    assert 'nothing to do' in run('prepare.py', f'--name={folder}', *SMALL_SET).stdout
    assert (folder / 'manifest.json').read_bytes() == before


def test_a_domain_that_a_set_lacks_is_named(tiny, monkeypatch):
    """One that was added to DOMAINS after the set was made."""
    with pytest.raises(Refusal, match="has no split 'test_moon'; it has train, .*[a-z]$"):
        data.open_split(tiny, 'test_moon')
    monkeypatch.setitem(data.DOMAINS, 'moon', data.Physics(mu=0.1, mass=1.0))
    with pytest.raises(Refusal, match="'test_moon'; it has .*it was made before the domain moon was added; make it anew"):
        data.open_split(tiny, 'test_moon')


def test_prepare_goes_on_where_it_stopped_and_leaves_finished_sets_alone(tiny, tmp_path):
    again = tmp_path / 'again'
    args = f'--name={again}', '--size=32', '--dim=24', '--clips=48', '--test_clips=24'
    run('prepare.py', *args)
    manifest = json.load(open(again / 'manifest.json'))
    manifest['complete'] = False                        # as if killed while test_B was written
    manifest['splits']['test_B']['shards'] = []
    files.write_manifest(str(again), manifest)
    (again / 'test_B_00000.npy').write_bytes(b'half')
    with pytest.raises(Refusal, match='unfinished'):
        data.open_split(str(again), 'val')
    run('prepare.py', *args)
    for file in os.listdir(tiny):
        if file.endswith('.npy'):
            assert files.sha256(again / file) == files.sha256(os.path.join(tiny, file)), file
    assert 'nothing to do' in run('prepare.py', *args).stdout
    assert 'other settings' in refused(run('prepare.py', *args, '--seed=2', ok=False))


def test_batches_visit_every_clip_once_per_epoch_and_need_no_state():
    drawn = [data.batch_indices(10, 4, 7, i) for i in range(5)]         # two epochs of 10 clips
    assert sorted(np.concatenate(drawn)[:10]) == list(range(10)) == sorted(np.concatenate(drawn)[10:])
    assert (data.batch_indices(10, 4, 7, 3) == drawn[3]).all()
    assert not (np.concatenate(drawn)[:10] == np.concatenate(drawn)[10:]).all()


def test_batches_are_read_one_ahead_in_a_thread_that_ends():
    read, threads = [], threading.active_count()

    def batches(last):
        for i in range(5):
            read.append(threading.current_thread())
            yield i
        raise last

    seen = []
    with pytest.raises(Refusal, match='damaged'):
        for i in data.read_ahead(batches(Refusal('damaged'))):
            assert len(read) <= i + 2
            seen.append(i)
    assert seen == [0, 1, 2, 3, 4] and threading.main_thread() not in read
    left_early = data.read_ahead(batches(StopIteration))
    assert next(left_early) == 0
    left_early.close()
    assert threading.active_count() == threads


def test_clips_as_they_are_stored(tiny):
    clips = data.open_split(tiny, 'val')
    features, a, states = clips.stored(range(3, 9))
    assert np.array_equal(features, np.load(os.path.join(tiny, 'val_00000.npy'))[3:9]) and states is None
    z, expected = clips[3:9]
    assert torch.equal(data.normed(features), z) and torch.equal(a, expected)


@pytest.fixture(scope='module')
def fresh_clips(tmp_path_factory):
    """Clips of the laptop set that no model has seen: its folder."""
    folder = tmp_path_factory.mktemp('data') / 'fresh'
    run('prepare.py', f'--name={folder}', '--clips=8', '--test_clips=40', '--seed=7')
    return str(folder)


@pytest.mark.parametrize('kind', ['hope', 'vit'])
def test_a_trained_model_needs_to_know_the_step_and_the_world(kind, fresh_clips):
    """
    The checkpoints in assets/, told step 8 in place of step 6 and 6 in place of 8, lose a tenth and more: in a world where
    all had come to rest they would lose nothing. On B they lose three times as much as on A.
    """
    predictor, _ = hope.load(os.path.join(ROOT, 'assets', f'{kind}.pt'))

    def jump_loss(domain, told):
        """Mean loss of the target steps 6, 7 and 8 when the predictor is told other ones, 0-based."""
        clips = data.open_split(fresh_clips, f'test_{domain}')
        z, a = clips[range(len(clips))]
        with torch.no_grad():
            z_hat = [predictor(z[:, :1], a[:, :1], tau=torch.full((len(z),), step))[0] for step in told]
        return model.feature_loss(torch.stack(z_hat, 1), z[:, 5:]).mean()

    right = jump_loss('A', (5, 6, 7))
    assert jump_loss('A', (7, 6, 5)) > 1.1 * right
    assert jump_loss('B', (5, 6, 7)) > 3 * right


def test_durations_are_said_in_words():
    assert [terminal.duration(seconds) for seconds in (41.4, 380, 29000)] == ['41 s', '6 min', '8.1 h']


def test_the_default_set_is_made_where_it_is_missing(monkeypatch):
    started = []

    def missing(name):
        raise Refusal('no data set')
    monkeypatch.setattr(running, 'read_manifest', missing)
    monkeypatch.setattr(running.subprocess, 'run', lambda command: started.append(command) or SimpleNamespace(returncode=0))
    monkeypatch.setattr(running.signal, 'signal', lambda number, handler: None)
    running.make_slide('mine')
    assert not started
    running.make_slide('slide')
    assert [os.path.basename(word) for word in started[0][1:]] == ['prepare.py']
