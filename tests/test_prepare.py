"""prepare.py: the patch encoder, a set is complete when it is named, and the decoder."""
import glob
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_SET, refused, run
from scipy.fft import dctn

import data
from prepare import cosine_basis, patch_encode, simulate_splits


def test_the_patch_encoder_is_a_cosine_transform():
    """Against scipy's DCT in float64: every tubelet, the lowest frequencies first, each once per colour."""
    frames = torch.randint(0, 256, (2, 4, 32, 48, 3), dtype=torch.uint8)
    z = patch_encode(frames, cosine_basis(48))
    assert z.shape == (2, 2, 6, 48)
    t, y, x = np.indices((2, 16, 16))
    order = np.argsort(((t / 2) ** 2 + (y / 16) ** 2 + (x / 16) ** 2).ravel(), kind='stable')[:16]
    for clip, step, patch in ((0, 0, 0), (1, 1, 4), (0, 1, 5)):
        row, column = divmod(patch, 3)
        picture = frames[clip, 2 * step:2 * step + 2, 16 * row:, 16 * column:].double().numpy()
        block = picture[:, :16, :16] / 127.5 - 1
        reference = dctn(block, axes=(0, 1, 2), norm='ortho').reshape(-1, 3)
        np.testing.assert_allclose(z[clip, step, patch].reshape(16, 3), reference[order], atol=1e-4)


def test_each_step_is_encoded_from_its_own_frames_alone():
    frames = data.render(data.simulate('A', 3, 1, 'test'), 32)
    basis = cosine_basis(24)
    z = patch_encode(frames, basis)
    frames[:, 6:8] = 255 - frames[:, 6:8]
    changed = (patch_encode(frames, basis) != z).flatten(2).any(2)
    assert changed[:, 3].all() and not changed[:, [0, 1, 2, 4, 5, 6, 7]].any()


def test_zoomed_clips_have_the_pushes_that_they_look_like():
    """By the law of A: the push after which an object of A is where theirs is seen."""
    splits = simulate_splits(dict(source='physics', clips=200, test_clips=64, seed=1, zoom=True), 'cpu')
    zoomed, _ = splits['zoom']()
    assert len(zoomed['actions']) == 200 and not zoomed['actions'][:, 1:].any()
    assert (zoomed['impulse'] == data.simulate('A', 200, 1, 'zoom')['impulse']).all()
    seconds = (data.FRAMES - 3 - 1) / data.FPS                         # the first step rests
    slid = np.linalg.norm(zoomed['position'][:, -3] - zoomed['position'][:, 0], axis=1)
    true = slid / seconds + 0.5 * data.DOMAINS['A'].mu * data.GRAVITY * seconds
    read = np.linalg.norm(zoomed['actions'][:, 0], axis=1)
    np.testing.assert_allclose(read, true, rtol=1e-6)
    assert true.max() > 1.4 * data.IMPULSE[1]


def test_a_set_on_disk(tiny):
    """Every split of the world, encoded; the push at step 1; what simulate() returned; how it was made."""
    meta = data.read_meta(tiny)
    assert meta['shape'] == [8, 4, 24] and meta['grid'] == [2, 2] and meta['patch'] == 16
    counts = {'train': 48, 'val': 24, 'fit_B': 24, 'zoom': 48, **{f'test_{domain}': 24 for domain in data.DOMAINS}}
    named = {file[:-4] for file in os.listdir(tiny) if file.endswith('.npz')}
    assert named == set(counts) and not [file for file in os.listdir(tiny) if file.endswith('.tmp')]
    for split, clips in counts.items():
        features = np.load(f'{tiny}/{split}.npy', mmap_mode='r')
        assert features.shape == (clips, 8, 4, 24) and features.dtype == np.float16
    physics = data.simulate('B', 24, 1, 'test_B')
    clips = data.Clips(tiny, 'test_B')
    for name, values in physics.items():
        assert (clips.physics[name] == values).all()
    assert np.allclose(clips.actions[:, 0], physics['impulse']) and (clips.actions[:, 1:] == 0).all()
    encoded = patch_encode(data.render(physics, 32), cosine_basis(24)).half()
    assert torch.equal(clips.stored(range(24))[0], encoded)
    assert os.path.getsize(f'{tiny}/clips.png') > 1000


def test_the_decoder_turns_features_back_into_pictures(tmp_path):
    """At the usual size of the patch encoder; 2 x 2 patches with D = 24 show too little."""
    run('prepare.py', f'--name={tmp_path}', '--clips=48', '--test_clips=8')
    decoder = torch.from_numpy(np.load(tmp_path / 'decoder.npy'))
    clips = data.Clips(str(tmp_path), 'test_B')
    z, _ = clips[range(8)]
    frames = data.render(clips.physics, 64).float() / 255
    for step in (0, 7):
        shown = data.pictures(z[:, step], decoder, (4, 4), 16)
        # (8,8): each picture is nearest to its own frame.
        error = (shown[:, None] - frames[None, :, 2 * step + 1]).square().mean((2, 3, 4))
        assert error.argmin(1).tolist() == list(range(8)) and error.diagonal().mean() < 0.3 * error.mean()


def bytes_of(folder):
    """{file: its bytes} of all but the pictures."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != '.png'}


def test_a_killed_run_goes_on(tiny, tmp_path):
    """What has its name is whole and stays; the rest is made, with the bytes of a run that went through."""
    folder, whole = tmp_path / 'set', bytes_of(Path(tiny))
    args = f'--name={folder}', *SMALL_SET

    def kill(pid):
        while not list(folder.glob('val.npy*')):
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
    assert run('prepare.py', *args, ok=False, meanwhile=kill).returncode == -signal.SIGKILL
    left = {name: content for name, content in bytes_of(folder).items() if not name.endswith('.tmp')}
    assert {'train.npy', 'train.npz', 'meta.json'} <= left.keys() and left.items() <= whole.items()
    (folder / 'test_C.npy.tmp').write_bytes(b'half')
    written = os.stat(folder / 'train.npy').st_mtime_ns
    assert 'train:' not in run('prepare.py', *args).stdout
    assert bytes_of(folder) == whole and os.stat(folder / 'train.npy').st_mtime_ns == written
    assert 'is complete; nothing to do' in run('prepare.py', *args).stdout


def test_a_new_domain_makes_one_split_and_moves_no_clip(tiny, tmp_path):
    """One more row of DOMAINS, in a copy of the project."""
    copy, folder = tmp_path / 'project', tmp_path / 'set'
    shutil.copytree(os.path.join(ROOT, 'support'), copy / 'support')
    for file in glob.glob(f'{ROOT}/*.py'):
        shutil.copy(file, copy)
    world = (copy / 'data.py').read_text(encoding='utf-8')
    row = "    'moon': Physics(mu=0.02, mass=1.0),\n"
    (copy / 'data.py').write_text(world.replace('DOMAINS = {\n', 'DOMAINS = {\n' + row), encoding='utf-8')
    shutil.copytree(tiny, folder)
    before = bytes_of(folder)
    out = run(copy / 'prepare.py', f'--name={folder}', *SMALL_SET).stdout
    assert re.findall(r'(\w+): \d+ clips', out) == ['test_moon']
    after = bytes_of(folder)
    assert set(after) - set(before) == {'test_moon.npy', 'test_moon.npz'} and after.items() >= before.items()


@pytest.mark.parametrize('option, words', [
    ('--clips=49', 'was made with clips = 48, not 49'), ('--seed=2', 'was made with seed = 1, not 2'),
    ('--split=B:1-2', 'own clips alone'), ('--encode=clip', 'V-JEPA 2 alone')])
def test_no_option_is_ignored(option, words, tiny):
    assert words in refused(run('prepare.py', f'--name={tiny}', *SMALL_SET, option, ok=False))


def test_the_domains_in_a_real_engine(tmp_path):
    """Contact friction stops a slide as Coulomb's law says; one line where the engine or the file is missing."""
    try:
        from support import mujoco_world
    except SystemExit:
        pytest.skip('the package mujoco or libosmesa6 is missing')
    for domain in ('A', 'B', 'turned', 'wind', 'colour'):
        physics, law = mujoco_world.simulate(domain, 6, 1, 'x'), data.simulate(domain, 6, 1, 'x')
        np.testing.assert_allclose(physics['position'], law['position'], atol=2e-3)
    zoomed = mujoco_world.simulate('A', 6, 1, 'x', 2.0)['position']
    np.testing.assert_allclose(zoomed, data.simulate('A', 6, 1, 'x', 2.0)['position'], atol=4e-3)
    frames = mujoco_world.render(physics, 64)
    assert frames.shape == (6, 16, 64, 64, 3) and (frames[:, 0] == frames[:, 1]).all()
    # What differs between two frames is where the object is, and its shadow.
    changed = (frames[0, 15].int() - frames[0, 0].int()).abs().sum(-1) > 60
    assert 10 < changed.sum() < 500
    (tmp_path / 'encoder.py').write_text('import torch\ndef encode(pictures):\n'
                                         '    small = torch.nn.functional.avg_pool2d(pictures, 16)\n'
                                         '    return torch.cat([small, 99 + 0 * small], 1)\n')
    folder = tmp_path / 'set'
    wanted = f'--name={folder}', '--source=mujoco', '--size=32', '--clips=6', '--test_clips=2', '--zoom=False'
    assert 'a second' in run('prepare.py', *wanted, f'--encoder={tmp_path}/encoder.py:encode').stdout
    clips = data.Clips(str(folder), 'train')
    # Three of six channels are constant and large: without a scale they would be all that is left.
    z = clips.stored(range(6))[0].float()
    assert clips.meta['shape'] == [8, 4, 6] and (z[..., 3:] == 0).all()
    torch.testing.assert_close(z[..., :3].flatten(0, 2).std(0), torch.ones(3), atol=0.05, rtol=0)
    pixels = mujoco_world.render(clips.physics, 32).float() / 255
    mean, deviation = (torch.tensor(part)[:3] for part in clips.meta['scale'])
    expected = (pixels.unflatten(1, (8, 2)).mean(2)[:, :, :16, :16].mean((2, 3)) - mean) / deviation
    torch.testing.assert_close(z[:, :, 0, :3], expected, atol=2e-2, rtol=0)
    assert 'no such function' in refused(run('prepare.py', f'--name={tmp_path}/x', '--encoder=x.py:f', ok=False))
