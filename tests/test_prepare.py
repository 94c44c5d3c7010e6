"""
Preparing: what a set is made from; own clips in every layout, byte for byte, and every bad one refused or skipped by name;
official encoders and their download.
"""
import ast
import functools
import glob
import hashlib
import http.server
import importlib.util
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, official_weights, optional, own_clip, own_clips, refused, run
from test_refusals import function_of

import data
import prepare
import vjepa2
from configurator import Refusal
from support import files, made_from, own_clips as own, own_files
from support.shards import check_room, write_split
from zoomed import association, doubts, read_pushes, share_read, train_inverse, why_not_zoomed, zoom_levels, zoomed_pushes

MAPS = 'feature_maps/vjepa2_vitl16.npy'
ACTIONS = 'actions_states/actions.npy'
CROP = own_files.Crop(size=32, short=32, tubelet=data.TUBELET)


# ---- what a set is made from ---------------------------------------------------------------------------------------------

def test_a_changed_world_is_another_set(tmp_path):
    """A set made with another gravity, or before a set knew the code it was made from, is not taken for up to date."""
    code, folder = tmp_path / 'code', tmp_path / 'set'
    shutil.copytree(os.path.join(ROOT, 'support'), code / 'support')
    for script in glob.glob(os.path.join(ROOT, '*.py')):
        shutil.copy(script, code)
    args = code / 'prepare.py', f'--name={folder}', '--size=16', '--dim=6', '--clips=4', '--test_clips=2'
    run(*args)
    world = (code / 'data.py').read_text(encoding='utf-8')
    assert 'GRAVITY = 9.81' in world
    (code / 'data.py').write_text(world + '\n# A comment.\n', encoding='utf-8')
    assert 'nothing to do' in run(*args).stdout
    (code / 'data.py').write_text(world.replace('GRAVITY = 9.81', 'GRAVITY = 1.62'), encoding='utf-8')
    assert 'made with other settings: data.GRAVITY = 1.62 (was 9.81)' in refused(run(*args, ok=False))
    (code / 'data.py').write_text(world.replace('(0.5 + edge', '(0.4 + edge'), encoding='utf-8')
    assert 'made with other code of the world' in refused(run(*args, ok=False))
    (code / 'data.py').write_text(world.replace('def check(self)', 'def check_all(self)').replace('self.check(', 'self.check_all('),
                                  encoding='utf-8')
    assert 'nothing to do' in run(*args).stdout

    (code / 'data.py').write_text(world, encoding='utf-8')
    manifest = json.load(open(folder / 'manifest.json'))
    del manifest['made_from']['code'], manifest['made_from']['constants']
    files.write_manifest(str(folder), manifest)
    assert 'made with other settings' in refused(run(*args, ok=False))


WORLD = '''
RATE = 2
LIMITS = {'low': (0, 1)}

def helper(x):
    return x * RATE

def made(x):
    """What is made."""
    if x < 0:
        raise ValueError('negative')
    return [helper(x), LIMITS]

def other():
    return 1
'''


@pytest.mark.parametrize('old, new, same', [
    ('RATE = 2', 'RATE = 3', False),
    ("'low': (0, 1)", "'low': (0, 2)", False),
    ('x * RATE', 'x + RATE', False),
    ('[helper(x), LIMITS]', '[LIMITS, helper(x)]', False),
    ('"""What is made."""', '"""What comes out."""', True),
    ("'negative'", "'below zero'", True),
    ('return x * RATE', 'return x * RATE  # per second', True),
    ('return 1', 'return 2', True),
])
def test_code_is_followed_by_name(old, new, same, tmp_path, monkeypatch):
    """A constant or a function that is used counts; a comment, a docstring, a refusal or what is not used does not."""
    monkeypatch.setattr(made_from, 'FOLDERS', (str(tmp_path),))
    found = []
    for name, text in (('before', WORLD), ('after', WORLD.replace(old, new))):
        path = tmp_path / f'{name}_world.py'
        path.write_text(text)
        spec = importlib.util.spec_from_file_location('world', path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, 'world', module)
        spec.loader.exec_module(module)
        depends = made_from.depends_on([module.made])
        constants = {constant.rpartition('.')[2]: value for constant, value in depends['constants'].items()}
        assert set(constants) == {'RATE', 'LIMITS'}
        found.append((constants, depends['code']))
    assert WORLD != WORLD.replace(old, new)
    assert (found[0] == found[1]) == same


def test_code_is_written_alike_by_every_python():
    """Python 3.10 to 3.13 give this text; ast.unparse and ast.dump do not."""
    tree = ast.parse("def f(x, *y): return f'{x!r:>3}', [1, None, 'a\\n']")
    assert made_from.written(tree) == (
        "Module(body=[FunctionDef(name='f', args=arguments(args=[arg(arg='x')], vararg=arg(arg='y')), body=[Return(value="
        "Tuple(elts=[JoinedStr(values=[FormattedValue(value=Name(id='x', ctx=Load()), conversion=114, format_spec=JoinedStr("
        "values=[Constant(value='>3')]))]), List(elts=[Constant(value=1), Constant(), Constant(value='a\\n')], ctx=Load())], "
        "ctx=Load()))])])")


def test_the_world_counts_as_a_whole():
    """Every constant of the world is found by following the code; prepare.py has no list of them."""
    source = prepare.PhysicsClips('train', 'A', count=1, seed=1, size=16, device='cpu')
    world = made_from.depends_on(prepare.code_of_set('patch', {'train': source}))
    for name in ('GRAVITY', 'FPS', 'FRAMES', 'TUBELET', 'WORLD', 'IMPULSE', 'RADIUS', 'CORNERS', 'BACKGROUND', 'DOMAINS'):
        assert world['constants'][f'data.{name}'] == getattr(data, name)


def test_shards_of_any_size_hold_the_same(tmp_path, monkeypatch):
    """Seven clips, one of them bad, in shards of 3 and batches of 2; what an interruption left is gone on from."""
    source = own_clips(tmp_path / 'clips', ('train',), 'pictures') / 'train'
    for i in range(3, 7):
        own_clip(source / f'clip_{i:05d}', i + 1, 'pictures')
    (source / 'clip_00004' / 'rgb' / 'frame_00007.png').write_bytes(b'no picture')
    found = [own.inspect(str(folder), 'pictures', CROP) for folder in sorted(source.iterdir())]
    clips = own.OwnClips(found, 'train', CROP, True, 'cpu')
    encode = functools.partial(prepare.patch_encode, basis=prepare.cosine_basis(24))
    whole, readable = clips.content(0, 7)
    assert readable == [0, 1, 2, 3, 5, 6]
    pictures, shown = clips.pictures([2, 4, 5], 32)
    assert shown == [2, 5] and torch.equal(pictures, whole[[2, 4]])
    at_once = encode(whole)
    # The patch encoder then takes one clip after the other.
    monkeypatch.setattr(prepare, 'FRAME_BYTES', 1)
    torch.testing.assert_close(encode(whole), at_once)
    manifest = prepare.new_manifest([8, 4, 24], {'train': clips}, {})

    # Three clips of a shard, in bytes.
    monkeypatch.setattr('support.shards.SHARD_BYTES', 3 * 2 * 8 * 4 * 24)

    def write():
        assert write_split(str(tmp_path), manifest, 'train', clips, encode, batch=2) == 1
        shards = manifest['splits']['train']['shards']
        assert [shard['clips'] for shard in shards] == [3, 2, 1]
        assert [shard['skipped'] for shard in shards] == [[], [4], []]
        return np.concatenate([np.load(tmp_path / shard['file']) for shard in shards])
    z = write()
    np.testing.assert_allclose(z, encode(whole).half(), atol=2e-3)
    assert np.load(tmp_path / 'train_actions.npy')[:, 0, 0].tolist() == [1, 2, 3, 4, 6, 7]
    (tmp_path / 'train_00001.npy').write_bytes(b'half')
    del manifest['splits']['train']['shards'][1:]
    assert write().tobytes() == z.tobytes()


# ---- zoomed clips ------------------------------------------------------------------------------------------------------

FEW = '--size=32', '--dim=24', '--clips=70', '--test_clips=8'


@pytest.fixture(scope='module')
def zoomed(tmp_path_factory):
    """(folder of a small set with zoomed clips, what prepare.py printed)."""
    folder = tmp_path_factory.mktemp('data') / 'zoomed'
    return folder, run('prepare.py', f'--name={folder}', *FEW).stdout


def test_the_split_zoom(zoomed, tmp_path):
    """Half as many clips, of A, in four equal parts; M applied k times; all else is as in a set without it."""
    folder, out = zoomed
    assert 'zoomed clips: pushes read x' in out and 'too few clips to read their pushes well' in out
    clips = data.open_split(str(folder), 'zoom')
    assert len(clips) == 35 and clips.manifest['splits']['zoom']['domain'] == 'A'
    levels = zoom_levels(35)
    assert sorted(levels) == list(levels) and np.bincount(levels).tolist() == [0, 9, 9, 9, 8]
    given = clips.physics['impulse']
    assert (given == data.simulate('A', 35, 1, 'zoom')['impulse']).all()
    M = np.array(clips.manifest['zoom']['M'])
    train = data.open_split(str(folder), 'train')
    scale = np.linalg.norm(train.actions[:, 0], axis=1).mean()
    for push, level, read in zip(given, levels, clips.actions[:, 0]):
        for _ in range(level):
            # In newton seconds: multiplied, and changed by a constant along the push.
            push = M[:, :2] @ push + M[:, 2:] @ push / np.linalg.norm(push) * scale
        np.testing.assert_allclose(read, push, rtol=1e-4, atol=1e-6)
    assert (clips.actions[:, 1:] == 0).all() and len(data.open_split(str(folder), 'train', 'zoom')) == 105
    run('prepare.py', f'--name={tmp_path}/plain', *FEW, '--zoom=False')
    without = json.load(open(tmp_path / 'plain' / 'manifest.json'))
    assert set(without['splits']) == set(clips.manifest['splits']) - {'zoom'}
    for file, digest in without['sha256'].items():
        assert clips.manifest['sha256'][file] == digest, file


def test_zoomed_clips_are_used_where_their_pushes_could_be_read(zoomed, tmp_path):
    assert doubts(0.99, 0.95) == '' and 'too few clips' in doubts(0.9, 0.95) and 'start in one place' in doubts(0.99, 0.1)
    folder = tmp_path / 'set'
    shutil.copytree(zoomed[0], folder)
    manifest = json.load(open(folder / 'manifest.json'))
    assert manifest['zoom']['used'] is False
    open_training = function_of('train.py', 'open_training', open_split=data.open_split)
    assert len(open_training(str(folder), 'train', True)) == 70
    manifest['zoom']['used'] = True
    files.write_manifest(str(folder), manifest)
    assert len(open_training(str(folder), 'train', True)) == 105 and len(open_training(str(folder), 'train', False)) == 70


def test_zoomed_clips_after_an_interruption(zoomed, tmp_path):
    """A damaged shard and a run that stopped before the pushes were read: the same command gives the same bytes."""
    folder, _ = zoomed
    again = tmp_path / 'again'
    shutil.copytree(folder, again)
    args = f'--name={again}', *FEW
    (again / 'zoom_00000.npy').write_bytes(b'half')
    assert 'zoom_00000.npy: damaged or missing, made again' in run('prepare.py', *args).stdout
    assert (again / 'manifest.json').read_bytes() == (folder / 'manifest.json').read_bytes()
    manifest = json.load(open(again / 'manifest.json'))
    manifest['complete'] = False
    del manifest['zoom'], manifest['sha256']['zoom_actions.npy']
    files.write_manifest(str(again), manifest)
    (again / 'zoom_actions.npy').write_bytes(b'half')
    run('prepare.py', *args)
    for file in json.load(open(folder / 'manifest.json'))['sha256']:
        assert (again / file).read_bytes() == (folder / file).read_bytes(), file
    assert 'nothing to do' in run('prepare.py', *args).stdout
    assert 'other settings: zoom = False (was True)' in refused(run('prepare.py', *args, '--zoom=False', ok=False))


class Plain:
    """Clips like those of data.Split, whose features say how far something moved."""

    def __init__(self, seed, clips, gain):
        rng = np.random.default_rng(seed)
        self.actions = np.zeros((clips, 4, 3), np.float32)
        self.actions[:, 0] = rng.normal(size=(clips, 3))
        # (n,T,N,D): patches of noise, to which each step adds the motion so far.
        seen = gain * self.actions[:, :1] * np.arange(4)[:, None]
        z = 0.1 * rng.normal(size=(clips, 4, 4, 6))
        z[..., :3] += 0.3 * seen[:, :, None]
        self.z = torch.from_numpy(z.astype(np.float32))
        self.manifest = {'shape': [4, 4, 6], 'grid': [2, 2]}

    def __len__(self):
        return len(self.actions)

    def __getitem__(self, indices):
        return self.z[indices], torch.from_numpy(self.actions[indices])


def test_pushes_are_read_from_the_features():
    """What moves 1.3 times as far was pushed 1.3 times as hard, whatever push was given; pushes of three numbers."""
    memory = train_inverse(Plain(0, 200, 1), 1, 'cpu')
    assert share_read(memory, Plain(1, 200, 1), 'cpu') > 0.97
    near = Plain(2, 600, 1.3)
    given = torch.from_numpy(near.actions[:, 0])
    weak = (given.norm(dim=1) < 2).nonzero()[:, 0]
    seen = read_pushes(memory, near, weak, 'cpu')
    memory = memory.double()
    M = association(memory, given[weak].double(), seen.double())
    assert M.shape == (3, 6)
    pushes = torch.eye(3, dtype=torch.float64)
    levels = torch.tensor([1, 1, 1])
    zoomed = zoomed_pushes(memory, M, pushes, levels)
    torch.testing.assert_close(zoomed, 1.3 * pushes, atol=0.1, rtol=0)
    twice = zoomed_pushes(memory, M, pushes, levels + 1)
    torch.testing.assert_close(twice, zoomed_pushes(memory, M, zoomed, levels))


def test_the_inverse_dynamics_follows_from_the_seed():
    first, same, other = [train_inverse(Plain(0, 20, 1), seed, 'cpu').inverse.embed.weight for seed in (1, 1, 2)]
    assert torch.equal(first, same) and not torch.equal(first, other)


def moving_square(frames=16, height=80, width=96, top=20, left=20, step=1):
    """(F,H,W,3) uint8: a white square of 8 x 8 pixels that moves to the right, on black."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    for i in range(frames):
        start = left + i * step
        video[i, top:top + 8, start:start + 8] = 255
    return video


@pytest.mark.parametrize('place', [(0, 0), (0.5, 0.5), (0.999, 0.999)])
def test_a_window_holds_what_moves(place):
    """The square is zoomed in, whole in every frame, and moves as much further."""
    plain = own_files.resize_and_crop(moving_square(), own_files.Crop(32, 32, 2)).float()
    near = own_files.resize_and_crop(moving_square(), own_files.Crop(32, 32, 2, zoom=1.5, place=place)).float()
    assert near.shape == plain.shape == (16, 32, 32, 3)
    light = near.sum((1, 2, 3)) / plain.sum((1, 2, 3))
    np.testing.assert_allclose(light, 1.5 ** 2, rtol=0.07)
    column = torch.arange(32.0)[:, None]
    moved = []
    for frames in (plain, near):
        x = (frames * column).sum((1, 2, 3)) / frames.sum((1, 2, 3))
        moved.append((x[-1] - x[0]).item())
    assert moved[1] == pytest.approx(1.5 * moved[0], rel=0.05) and moved[0] > 5


@pytest.mark.parametrize('changing, place, start', [
    ([], 0.3, 5),                                          # nothing moves: the middle
    ([4, 9], 0, 0),                                        # windows from 0 to 4 hold both
    ([4, 9], 0.999, 4),
    ([4, 9], 0.5, 2),
    ([12, 18], 0, 9),                                      # from 9 to 10
    ([12, 18], 0.999, 10),
    ([2, 15], 0.999, 4),                                   # they do not fit: centred on them
    ([0, 12], 0, 1),
])
def test_where_a_window_starts(changing, place, start):
    """Windows of 10 among 20 pixels."""
    changes = torch.zeros(20, dtype=torch.bool)
    changes[changing] = True
    assert own_files.window_start(changes, 10, place) == start


def test_own_pictures_are_zoomed_in(tmp_path):
    """Clip i of zoom is clip i of train, without one that cannot be read. Their pushes have three numbers."""
    rng = np.random.default_rng(0)
    for split, count in (('train', 66), ('val', 2)):
        for i in range(count):
            clip = tmp_path / 'clips' / split / f'clip_{i:05d}'
            clip.mkdir(parents=True)
            np.save(clip / 'actions.npy', np.array([[1 + i, -1, 0.5]]))
            top, left = rng.integers(4, 60, 2)
            np.save(clip / 'video.npy', moving_square(top=top, left=left))
    (tmp_path / 'clips' / 'train' / 'clip_00003' / 'video.npy').write_bytes(b'no array')
    args = f'--name={tmp_path}/set', f'--source={tmp_path}/clips', '--size=32', '--dim=24', '--skip_bad=True'
    assert '1 clips skipped' in run('prepare.py', *args).stdout
    train, near = data.open_split(f'{tmp_path}/set', 'train'), data.open_split(f'{tmp_path}/set', 'zoom')
    assert len(train) == 65 and near.actions.shape == (32, 8, 3) and np.shape(near.manifest['zoom']['M']) == (3, 6)
    assert near.manifest['splits']['zoom']['domain'] == 'train'
    assert not torch.equal(near[[0]][0], train[[0]][0])
    sources, _, left_out = own.open_sources(f'{tmp_path}/clips', '', '', CROP, True, 'cpu')
    pictures, readable = sources['train'].zoomed(1.2 ** zoom_levels(32)).content(0, 32)
    assert left_out == 1 and readable == list(range(32)) and pictures.shape == (32, 16, 32, 32, 3)
    light = pictures[:, :, :, :, 0].float().sum((2, 3)).mean(1)
    assert light[-8:].mean() > 2.5 * light[:8].mean()


# ---- own clips ---------------------------------------------------------------------------------------------------------


def test_features_are_imported_byte_for_byte(tmp_path):
    source = own_clips(tmp_path / 'clips')
    again = source / 'train' / 'clip_00001'                            # the other published shapes of the same
    np.save(again / MAPS, np.load(again / MAPS).reshape(8, 256, 1024))
    np.save(again / 'actions_states' / 'actions.npy', np.array([[0, 0], [2, -1]] + [[0, 0]] * 5, np.float32))
    out = run('prepare.py', f'--name={tmp_path}/set', f'--source={source}').stdout
    assert 'no zoomed clips: imported features cannot be cropped; far motion is then not taught' in out
    assert 'zoom' not in json.load(open(tmp_path / 'set' / 'manifest.json'))['splits']
    for split in ('train', 'test_B'):
        stored = np.load(tmp_path / 'set' / f'{split}_00000.npy')
        for i in range(3):
            assert stored[i].tobytes() == np.load(source / split / f'clip_{i:05d}' / MAPS).tobytes()
    z, a = data.open_split(str(tmp_path / 'set'), 'train')[[0, 1, 2]]
    assert z.shape == (3, 8, 256, 1024) and a.shape == (3, 8, 2)
    assert a[:, 0].tolist() == [[1, -1], [2, -1], [3, -1]] and (a[:, 1:] == 0).all()  # the push acts at step 1


def test_clips_by_their_numbers(tmp_path):
    """The user's numbering in one folder: phases by range, which stay apart; every tenth training clip is held out."""
    source = tmp_path / 'clips'
    for i, number in enumerate([*range(17000, 17012), *range(22000, 22004), *range(23000, 23003), 5]):
        own_clip(source / f'clip_{number:05d}', i + 1, 'video')
    args = f'--source={source}', '--size=32', '--dim=24'
    ranges = '--split=train:17000-17011,B:22000-22001,fit_B:22002-22003,A1:23000-23000,A2:23001-23002'
    assert 'held out as val' in run('prepare.py', f'--name={tmp_path}/set', *args, ranges).stdout
    manifest = json.load(open(tmp_path / 'set' / 'manifest.json'))
    domains = {split: entry['domain'] for split, entry in manifest['splits'].items()}
    assert domains == {'train': 'train', 'val': 'val', 'test_B': 'B', 'fit_B': 'fit_B', 'test_A1': 'A1', 'test_A2': 'A2'}
    pushes = {s: data.open_split(str(tmp_path / 'set'), s).actions[:, 0, 0].tolist() for s in manifest['splits']}
    assert pushes == {'train': [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12], 'val': [10], 'test_B': [13, 14], 'fit_B': [15, 16],
                      'test_A1': [17], 'test_A2': [18, 19]}
    ranges = '--split=train:17000-17012,B:22000-22001'
    out = run('prepare.py', f'--name={tmp_path}/y', *args, ranges, '--skip_bad=True').stdout
    assert 'clip is missing (1 of train:17000-17012)' in out and '1 clips skipped' in out
    assert len(data.open_split(f'{tmp_path}/y', 'test_B')) == 2


def opened(source, ranges='', content='', skip_bad=False):
    """What own.open_sources makes of a folder."""
    return own.open_sources(str(source), ranges, content, CROP, skip_bad, 'cpu')


def test_folders_are_named_as_ranges_are(tmp_path):
    """B is test_B; what the system puts into folders is neither a split nor a clip nor a picture."""
    source = own_clips(tmp_path / 'clips', ('train', 'val', 'B', 'fit_B'), 'pictures')
    for folder in ('.ipynb_checkpoints', '__MACOSX', 'train/.ipynb_checkpoints', 'train/__MACOSX', 'train/@eaDir'):
        (source / folder).mkdir()
    for file in ('.DS_Store', 'train/.DS_Store', 'train/notes.txt', 'train/clip_00000/rgb/._frame_00001.png'):
        (source / file).write_bytes(b'')
    sources, _, left_out = opened(source)
    assert {split: clips.count for split, clips in sources.items()} == {'train': 3, 'val': 3, 'test_B': 3, 'fit_B': 3}
    assert left_out == 0 and sources['train'].content(0, 3)[1] == [0, 1, 2]
    (source / 'test_B').mkdir()
    with pytest.raises(Refusal, match='two folders for split test_B'):
        opened(source)


@pytest.mark.parametrize('ranges, words', [
    ('train:1-4', 'clip_00004: clip is missing (1 of train:1-4)'),
    ('train:1-2,B:3-5', 'clip_00004: clip is missing (2 of B:3-5) (2 clips are bad, of which this is the first'),
    ('train:1-3,B:3-5', 'another range'),
    ('train:1-99999999', 'more than ten million'),
    ('train=1-2', 'is not name:first-last'),
    ('train:3-1', 'is not name:first-last'),
    ('B:1-2', 'split train has no clips'),
    ('', 'split train has no clips'),
])
def test_bad_ranges(ranges, words, tmp_path):
    for number in (1, 2, 3):
        own_clip(tmp_path / f'clip_{number:05d}', number, 'video')
    with pytest.raises(Refusal, match=re.escape(words)):
        opened(tmp_path, ranges)
    (tmp_path / 'clip_2').mkdir()
    if ranges:
        with pytest.raises(Refusal, match='two clips with one number'):
            own.find_clips(str(tmp_path), 'train:1-2')


def test_clips_that_are_not_there_are_named(tmp_path):
    """Behind a link to nothing, or in an archive: both layouts. An archive beside its folder does no harm."""
    source = own_clips(tmp_path / 'clips', ('train', 'val'), 'video')
    train = source / 'train'
    (train / 'clip_00007').symlink_to(tmp_path / 'nowhere')
    (train / 'clip_00008.tar.gz').write_bytes(b'')
    (train / 'clip_00001.zip').write_bytes(b'')
    (source / 'B.zip').write_bytes(b'')
    with pytest.raises(Refusal, match=r'B.zip: still an archive; .* \(3 clips are bad, of which this is the first'):
        opened(source)
    assert opened(source, skip_bad=True)[2] == 3
    with pytest.raises(Refusal, match='clip_00007: a link to nothing .2 clips are bad'):
        opened(train, 'train:0-1,val:2-2,train:7-8')
    assert opened(train, 'train:0-1,val:2-2')[2] == 0


def test_pictures_arrays_and_videos_are_the_same_clip(tmp_path):
    """rgb/frame_00001.png, video.npy and, where PyAV is installed, a lossless video file give equal shards."""
    layouts = ['video', 'pictures']
    for layout in layouts:
        own_clips(tmp_path / layout, ('train', 'val'), layout)
    try:
        import av
    # Missing, or installed but broken.
    except Exception:
        av = None
    if av:
        layouts.append('file')
        own_clips(tmp_path / 'file', ('train', 'val'), 'video')
        for clip in (tmp_path / 'file').glob('*/*'):
            with av.open(str(clip / 'clip.mkv'), 'w') as container:
                stream = container.add_stream('ffv1', rate=30, width=48, height=40, pix_fmt='bgr0')
                for frame in np.load(clip / 'video.npy'):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
                container.mux(stream.encode())
            os.remove(clip / 'video.npy')
    for layout in layouts:
        run('prepare.py', f'--name={tmp_path}/set_{layout}', f'--source={tmp_path}/{layout}', '--size=32', '--dim=24')
    shards = {layout: (tmp_path / f'set_{layout}' / 'train_00000.npy').read_bytes() for layout in layouts}
    assert len(set(shards.values())) == 1
    z = np.load(tmp_path / 'set_video' / 'train_00000.npy')
    assert z.shape == (3, 8, 4, 24) and np.ptp(z) > 1


@pytest.mark.parametrize('backend', ['nonsense', 'module://a_notebook_that_is_not_here'])
def test_pictures_are_drawn_whatever_a_notebook_has_set(backend, tmp_path):
    """Jupyter hands the name of its own backend to the commands that it starts."""
    draw = f'from support import plots; plots.draw_displacement({str(tmp_path / "x.png")!r}, x := plots.np.arange(1., 9), x)'
    done = subprocess.run([sys.executable, '-c', draw], cwd=ROOT, env={**os.environ, 'MPLBACKEND': backend},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'x.png').read_bytes().startswith(b'\x89PNG')


def npy(array):
    """The bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def npz(array):
    """The bytes of a .npz file."""
    file = io.BytesIO()
    np.savez(file, array)
    return file.getvalue()


FEATURES = np.zeros((2048, 1024), np.float16)
PUSH = np.array([[0, 0], [1, -1]])
# Layout, file of clip_00001, what it holds instead (None: it is gone), words of the refusal.
BAD_CLIPS = [
    ('features', MAPS, npy(FEATURES[:1000]), 'must be (T*256,D)'),
    ('features', MAPS, npy(FEATURES[:1024]), 'differs from'),
    ('features', MAPS, npy(FEATURES[:256]), 'has one step'),
    ('features', MAPS, npy(FEATURES * np.float16(np.nan)), 'not finite'),
    ('features', MAPS, npy(FEATURES + np.float32(1e6)), 'not finite'),
    ('features', MAPS, npy(FEATURES)[:-100], 'not a readable .npy'),
    ('features', MAPS, npy(np.array([{}])), 'not a readable .npy'),
    ('features', MAPS, npz(FEATURES), 'it is an archive'),
    ('features', MAPS, npy(FEATURES).replace(b"'descr'", b"'d\0scr'"), 'not a readable .npy'),
    ('features', MAPS, npy(FEATURES).replace(b"'descr'", b"('descr'"), 'not a readable .npy'),
    ('features', MAPS, b'', 'not a readable .npy'),
    ('features', 'feature_maps/other.npy', npy(FEATURES), 'it must be one'),
    ('features', MAPS, None, 'it must be one'),
    ('features', ACTIONS, None, 'actions.npy'),
    ('features', ACTIONS, npz(PUSH), 'it is an archive'),
    ('features', ACTIONS, npy(np.full((16, 2), np.inf)), 'must be finite numbers'),
    ('features', ACTIONS, npy(1e300 * PUSH), 'must be finite numbers in float32'),
    ('features', ACTIONS, npy(0 * PUSH), 'the push is zero throughout'),
    ('features', ACTIONS, npy(1e-300 * PUSH), 'the push is zero throughout'),
    ('features', ACTIONS, npy(np.ones((16, 2))), 'several pushes need one row per step, 8 or 7, not 16'),
    ('features', ACTIONS, npy(np.ones((8, 3))), 'do not have the 2 numbers'),
    ('features', 'actions_states/states.npy', npy(np.ones((8, 3))), 'has states and'),
    ('features', 'actions_states/states.npy', npy(np.ones((9, 3))), 'states need one row per step, 8, or one per frame, 16'),
    ('features', 'states.npy', npy(np.full((8, 3), np.nan)), 'must be finite numbers'),
    ('video', 'video.npy', npy(np.zeros((16, 40, 48))), 'must be (frames'),
    ('video', 'video.npy', npy(np.zeros((0, 40, 48, 3), np.uint8)), 'must be (frames'),
    ('video', 'video.npy', npy(np.zeros((12, 40, 48, 3), np.uint8)), 'differs from'),
    ('video', 'video.npy', npy(np.zeros((15, 40, 48, 3), np.uint8)), 'must be even'),
    ('video', 'video.npy', None, 'it must be one'),
    ('pictures', 'rgb/frame_00001.png', b'no picture', 'frame_00001.png: not a readable picture'),
    ('pictures', 'rgb/frame_00004.png', b'no picture', 'frame_00004.png: not a readable picture'),
    ('pictures', 'rgb/frame_00004.png', None, 'no unbroken row'),
    ('pictures', 'rgb/cover.png', b'a picture without a number', 'no unbroken row'),
    ('pictures', 'rgb/frame_00017.jpg', b'another kind', 'has PNG and JPEG pictures'),
]


def put(path, content):
    """Write bytes to a path, or remove what is there."""
    if content is None:
        os.remove(path)
    else:
        path.write_bytes(content)


@pytest.mark.parametrize('layout, file, content, words', BAD_CLIPS, ids=[f'{case[1]}-{case[3]}' for case in BAD_CLIPS])
def test_a_bad_clip_is_named(layout, file, content, words, tmp_path):
    source = own_clips(tmp_path / 'clips', ('train', 'val'), layout)
    put(source / 'train' / 'clip_00001' / file, content)
    with pytest.raises(Refusal, match=re.escape(words)) as refusal:
        opened(source)[0]['train'].content(0, 3)
    assert 'clip_00001' in str(refusal.value) and '\n' not in str(refusal.value)
    sources, _, left_out = opened(source, skip_bad=True)
    assert len(sources['train'].content(0, sources['train'].count)[1]) == 2


def test_bad_clips_in_a_run(tmp_path):
    """One line that names the first; with skip_bad, all are named and counted, and the others are there."""
    source = own_clips(tmp_path / 'clips', ('train', 'val'))
    put(source / 'train' / 'clip_00001' / MAPS, npy(FEATURES[:1024]))
    put(source / 'val' / 'clip_00000' / ACTIONS, npy(np.full((16, 2), np.nan)))
    args = f'--name={tmp_path}/set', f'--source={source}'
    line = refused(run('prepare.py', *args, ok=False))
    assert 'train/clip_00001: shape' in line and '2 clips are bad, of which this is the first' in line
    assert not (tmp_path / 'set').exists()
    out = run('prepare.py', *args, '--skip_bad=True').stdout
    assert out.count('skipped:') == 2 and '2 clips skipped' in out
    clips = data.open_split(f'{tmp_path}/set', 'train')
    assert clips.actions[:, 0, 0].tolist() == [1, 3] and len(clips[[0, 1]][0]) == 2
    stored = np.load(tmp_path / 'set' / 'train_00000.npy')
    assert stored[1].tobytes() == np.load(source / 'train' / 'clip_00002' / MAPS).tobytes()


# ---- features, pictures, or both -----------------------------------------------------------------------------------------

def add_features(source, dtype=np.float16):
    """Features (8,4,24) beside whatever own clips have, one row of patches per step in a file of shape (8,4,24)."""
    for i, clip in enumerate(sorted(source.glob('*/*'))):
        (clip / 'feature_maps').mkdir()
        z = np.random.default_rng(i).normal(size=(8, 4, 24)).astype(dtype)
        np.save(clip / MAPS, z)
    return source


def small_clips(folder, splits=('train', 'val'), dtype=np.float16):
    """Own clips with small features alone → their folder."""
    source = own_clips(folder, splits, 'video')
    for video in source.glob('*/*/video.npy'):
        video.unlink()
    return add_features(source, dtype)


def stored(folder, split='train'):
    """All of a split: z, a."""
    clips = data.open_split(str(folder), split)
    return clips[range(len(clips))]


def test_features_and_pictures(tmp_path):
    """Which of the two is taken is said; pictures beside features give a decoder, without any that is said, too."""
    source = add_features(own_clips(tmp_path / 'clips', ('train', 'val'), 'pictures'))
    args = f'--source={source}',
    assert 'choose --content=features' in refused(run('prepare.py', f'--name={tmp_path}/x', *args, ok=False))
    assert not (tmp_path / 'x').exists()

    out = run('prepare.py', f'--name={tmp_path}/features', *args, '--content=features').stdout
    assert 'content: features of (8, 4, 24), taken as they are' in out and 'will not be shown' not in out
    manifest = json.load(open(tmp_path / 'features' / 'manifest.json'))
    decoder = torch.from_numpy(np.load(tmp_path / 'features' / manifest['decoder']))
    assert decoder.shape == (25, 1536)
    # Of the pictures that stand beside: their mean is the mean of what is shown.
    z, _ = stored(tmp_path / 'features')
    shown = data.pictures(z.flatten(0, 1), decoder, (2, 2), 16).mean()
    frames = np.load(own_clips(tmp_path / 'same', ('train',), 'video') / 'train' / 'clip_00000' / 'video.npy')
    assert abs(shown - frames.mean() / 255) < 0.05

    out = run('prepare.py', f'--name={tmp_path}/pictures', *args, '--content=pictures', '--size=32', '--dim=24').stdout
    assert 'content: pictures of 48 x 40, encoded by patch' in out
    plain = own_clips(tmp_path / 'plain', ('train', 'val'), 'video')
    run('prepare.py', f'--name={tmp_path}/plain_set', f'--source={plain}', '--size=32', '--dim=24')
    assert torch.equal(stored(tmp_path / 'pictures')[0], stored(tmp_path / 'plain_set')[0])

    alone = small_clips(tmp_path / 'alone')
    out = run('prepare.py', f'--name={tmp_path}/alone_set', f'--source={alone}').stdout
    assert 'no pictures beside the features' in out and 'about' in out and 'GiB free' in out
    assert 'decoder' not in json.load(open(tmp_path / 'alone_set' / 'manifest.json'))
    for knob in ('--encoder=patch', '--weights=x.pt', '--size=32', '--seed=2'):
        line = refused(run('prepare.py', f'--name={tmp_path}/y', f'--source={alone}', knob, ok=False))
        assert line.startswith(f'prepare.py: {knob}: ') and not (tmp_path / 'y').exists()
    assert 'is for features' in refused(run('prepare.py', f'--name={tmp_path}/y', f'--source={plain}', '--in_place=True',
                                            ok=False))


@pytest.mark.parametrize('frames, used', [(16, True), (8, True), (30, False)])
def test_pictures_beside_features(frames, used, tmp_path):
    """Two a step, or one a step, which is shown twice; of any other number no decoder is made."""
    source = add_features(own_clips(tmp_path / 'clips', ('train', 'val'), 'video'))
    for video in source.glob('*/*/video.npy'):
        np.save(video, np.resize(np.load(video), (frames, 40, 48, 3)))
    clips = opened(source, content='features')[0]['train']
    pictures, indices = clips.pictures([0, 1, 2], 32)
    assert indices == ([0, 1, 2] if used else [])
    if frames == 8:
        assert torch.equal(pictures[:, ::2], pictures[:, 1::2]) and pictures.shape == (3, 16, 32, 32, 3)


def png_of(samples, kind):
    """The bytes of a PNG of 16-bit samples (H,W,channels), written by hand. kind: 0 grey, 2 colour, 4 grey and alpha."""
    def chunk(name, body):
        return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))
    height, width = samples.shape[:2]
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in samples)
    header = struct.pack('>IIBBBBB', width, height, 16, kind, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')


@pytest.mark.parametrize('kind, channels', [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_pictures_of_16_bits(kind, channels, tmp_path):
    """Of grey and of colour the upper 8 bits are taken; transparency is left out."""
    samples = np.random.default_rng(0).integers(0, 65536, (6, 5, channels)).astype(np.uint16)
    (tmp_path / 'frame_00001.png').write_bytes(png_of(samples, kind))
    colours = samples[..., :3] if channels > 2 else samples[..., [0, 0, 0]]
    assert (own_files.read_picture(str(tmp_path / 'frame_00001.png')) == colours >> 8).all()


def test_other_pictures(tmp_path):
    """JPEG by both endings, a palette, transparency, black and white."""
    from PIL import Image
    frame = np.kron(np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    picture = Image.fromarray(frame)
    for i, ending in enumerate(('jpg', 'JPEG', 'jpg')):
        picture.save(tmp_path / f'frame_{i + 1}.{ending}', quality=95, subsampling=0)
    read = own_files.read_frames(str(tmp_path))
    assert read.shape == (3, 24, 32, 3) and np.abs(read[0].astype(int) - frame).mean() < 4
    clear = picture.copy()
    clear.putalpha(Image.new('L', clear.size, 0))
    grey = np.asarray(picture.convert('L'))
    for mode, written, expected in (('P', picture.quantize(12), frame), ('RGBA', clear, frame),
                                    ('L', picture.convert('L'), np.stack([grey] * 3, -1)),
                                    ('1', picture.convert('1'), np.asarray(picture.convert('1').convert('RGB')))):
        written.save(tmp_path / f'{mode}.png')
        assert (own_files.read_picture(str(tmp_path / f'{mode}.png')) == expected).all(), mode


# ---- read in place ---------------------------------------------------------------------------------------------------------

def test_clips_read_in_place_are_those_of_a_copy(tmp_path):
    """Bit for bit, as float16 and as float32, in both published shapes; nothing is copied."""
    source = small_clips(tmp_path / 'clips', ('train', 'val', 'B'), np.float32)
    np.save(source / 'train' / 'clip_00001' / MAPS, np.load(source / 'train' / 'clip_00001' / MAPS).astype(np.float16))
    args = f'--source={source}', '--content=features'
    run('prepare.py', f'--name={tmp_path}/copy', *args)
    out = run('prepare.py', f'--name={tmp_path}/set', *args, '--in_place=True').stdout
    assert 'no copy' in out and not glob.glob(f'{tmp_path}/set/*_0*.npy')
    for split in ('train', 'val', 'test_B'):
        for read, copied in zip(stored(tmp_path / 'set', split), stored(tmp_path / 'copy', split)):
            assert torch.equal(read, copied)
    assert 'nothing to do' in run('prepare.py', f'--name={tmp_path}/set', *args, '--in_place=True').stdout
    assert 'in_place = False (was True)' in refused(run('prepare.py', f'--name={tmp_path}/set', *args, ok=False))

    flat = own_clips(tmp_path / 'flat', ('train', 'val'))
    run('prepare.py', f'--name={tmp_path}/flat_set', f'--source={flat}', '--in_place=True')
    z, _ = data.open_split(f'{tmp_path}/flat_set', 'train')[2]
    raw = torch.from_numpy(np.load(flat / 'train' / 'clip_00002' / MAPS)).float().view(8, 256, 1024)
    assert torch.equal(z, F.layer_norm(raw, (1024,)))


def test_a_clip_that_changed_in_place_is_named(tmp_path):
    """A changed byte when it is first read, another size or a missing file when the split is opened."""
    source = small_clips(tmp_path / 'clips')
    run('prepare.py', f'--name={tmp_path}/set', f'--source={source}', '--in_place=True')
    path = source / 'train' / 'clip_00001' / MAPS
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    clips = data.open_split(f'{tmp_path}/set', 'train')
    clips[[0, 2]]
    words = f'{path} is missing or has changed since .*restore the file, or delete that folder and run prepare.py again'
    with pytest.raises(Refusal, match=words):
        clips[1]
    path.write_bytes(whole)
    clips[1]
    for damage in (lambda: path.write_bytes(whole[:-1]), path.unlink):
        damage()
        with pytest.raises(Refusal, match=words):
            data.open_split(f'{tmp_path}/set', 'train')


def test_bad_clips_in_place_are_left_out(tmp_path):
    """What is not finite is found when the list is made."""
    source = small_clips(tmp_path / 'clips')
    np.save(source / 'train' / 'clip_00001' / MAPS, np.full((8, 4, 24), np.nan, np.float16))
    args = f'--name={tmp_path}/set', f'--source={source}', '--in_place=True'
    assert 'clip_00001' in refused(run('prepare.py', *args, ok=False))
    shutil.rmtree(tmp_path / 'set')
    out = run('prepare.py', *args, '--skip_bad=True').stdout
    assert out.count('skipped:') == 1 and '1 clips skipped' in out
    assert stored(tmp_path / 'set')[1][:, 0, 0].tolist() == [1, 3]


# ---- several pushes, states ------------------------------------------------------------------------------------------------

def test_several_pushes_and_states(tmp_path):
    """(8,2) is kept as it is, (7,2) gets a row of zeros, a single push acts at step 1; states of steps or of frames."""
    source = small_clips(tmp_path / 'clips')
    rows = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    np.save(source / 'train' / 'clip_00000' / ACTIONS, rows)
    np.save(source / 'train' / 'clip_00001' / ACTIONS, rows[:7])
    run('prepare.py', f'--name={tmp_path}/set', f'--source={source}')
    clips = data.open_split(f'{tmp_path}/set', 'train')
    single = [[3, -1]] + [[0, 0]] * 7
    expected = np.stack([rows, np.concatenate([rows[:7], [[0, 0]]]), single]).astype(np.float32)
    assert clips.several_pushes and clips.states is None and (clips.actions == expected).all()
    assert not data.open_split(f'{tmp_path}/set', 'val').several_pushes

    states = np.arange(48, dtype=np.float64).reshape(16, 3)
    for i, clip in enumerate(sorted(source.glob('*/*'))):
        of_frames = i % 2
        np.save(clip / ('states.npy' if of_frames else 'actions_states/states.npy'), states if of_frames else states[::2])
    run('prepare.py', f'--name={tmp_path}/with_states', f'--source={source}')
    clips = data.open_split(f'{tmp_path}/with_states', 'train')
    assert clips.states.dtype == np.float32 and (clips.states == states[::2]).all() and clips.states.shape == (3, 8, 3)
    assert len(data.open_split(f'{tmp_path}/with_states', 'train', 'val').states) == 6


@pytest.mark.parametrize('change, words', [
    ({'actions.npy': np.ones((8, 2))}, 'clips with several pushes cannot be zoomed in on'),
    ({'states.npy': np.ones((8, 2))}, 'clips with states cannot be zoomed in on'),
])
def test_what_cannot_be_zoomed(change, words, tmp_path):
    for i in range(64):
        own_clip(tmp_path / 'train' / f'clip_{i}', i + 1, 'video')
        for file, rows in change.items():
            np.save(tmp_path / 'train' / f'clip_{i}' / 'actions_states' / file, rows)
    train = opened(tmp_path)[0]['train']
    train.count = 64
    assert why_not_zoomed(train, [8, 4, 24], train.example()) == words


# ---- what was changed since --------------------------------------------------------------------------------------------------

def test_own_clips_that_changed_are_noticed(tmp_path):
    """Changed in place, added, mended after --skip_bad: the same command says so and leaves the set as it is."""
    source = own_clips(tmp_path / 'clips', ('train', 'val'), 'video')
    bad = source / 'train' / 'clip_00001' / 'video.npy'
    whole = bad.read_bytes()
    bad.write_bytes(b'no array')
    args = f'--name={tmp_path}/set', f'--source={source}', '--size=32', '--dim=24', '--skip_bad=True'
    run('prepare.py', *args)
    made = (tmp_path / 'set' / 'manifest.json').read_bytes()
    assert 'nothing to do' in run('prepare.py', *args).stdout
    (source / 'train' / 'clip_00000' / 'notes.txt').write_text('not of the clip')
    assert 'nothing to do' in run('prepare.py', *args).stdout

    def changed(words):
        assert f'own clips that have changed since: {words}' in refused(run('prepare.py', *args, ok=False))
        assert (tmp_path / 'set' / 'manifest.json').read_bytes() == made
    bad.write_bytes(whole)
    changed('files have another size')
    bad.write_bytes(b'no array')
    changed('files were written again')
    own_clip(source / 'train' / 'clip_00003', 4, 'video')
    changed('files were added, removed or renamed')


def test_a_clip_that_is_mended_stops_no_run(tmp_path):
    """A picture of the second split is damaged: once it is mended, the same command goes on, and keeps the first."""
    source = own_clips(tmp_path / 'clips', ('train', 'val'), 'pictures')
    bad = source / 'val' / 'clip_00002' / 'rgb' / 'frame_00009.png'
    whole = bad.read_bytes()
    bad.write_bytes(whole[:60])
    args = f'--source={source}', '--size=32', '--dim=24'
    assert 'frame_00009.png: not a readable' in refused(run('prepare.py', f'--name={tmp_path}/set', *args, ok=False))
    made = os.stat(tmp_path / 'set' / 'train_00000.npy').st_mtime_ns
    bad.write_bytes(whole)
    out = run('prepare.py', f'--name={tmp_path}/set', *args).stdout
    assert 'own clips have changed since the last run: 0 of 1 shards are made again' in out
    assert os.stat(tmp_path / 'set' / 'train_00000.npy').st_mtime_ns == made
    run('prepare.py', f'--name={tmp_path}/at_once', *args)
    for file in os.listdir(tmp_path / 'at_once'):
        assert (tmp_path / 'at_once' / file).read_bytes() == (tmp_path / 'set' / file).read_bytes(), file

    manifest = json.load(open(tmp_path / 'set' / 'manifest.json'))
    manifest['complete'] = False
    files.write_manifest(str(tmp_path / 'set'), manifest)
    os.utime(source / 'train' / 'clip_00000' / 'rgb' / 'frame_00001.png')
    out = run('prepare.py', f'--name={tmp_path}/set', *args).stdout
    assert '1 of 2 shards are made again' in out and os.stat(tmp_path / 'set' / 'train_00000.npy').st_mtime_ns > made


def test_the_folder_of_a_set_is_its_own(tmp_path):
    """A folder of other files is refused; one that a run left at its very beginning is gone on with."""
    args = '--size=16', '--dim=6', '--clips=4', '--test_clips=2'
    folder = tmp_path / 'thesis'
    folder.mkdir()
    (folder / 'chapter.tex').write_text('mine')
    assert 'not a data set (it holds chapter.tex)' in refused(run('prepare.py', f'--name={folder}', *args, ok=False))
    assert os.listdir(folder) == ['chapter.tex']
    os.rename(folder / 'chapter.tex', folder / 'manifest.json.tmp')
    run('prepare.py', f'--name={folder}', *args)
    assert 'manifest.json.tmp' not in os.listdir(folder)


def test_a_full_disk_is_said_before(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10**9, 9 * 10**8, 10**8))
    assert check_room(str(tmp_path / 'a' / 'b'), 10**7) == 10**8
    with pytest.raises(Refusal, match='the set takes 0.9 GiB and 95.4 MiB are free'):
        check_room(str(tmp_path / 'a' / 'b'), 10**9)


def test_an_encoder_that_returns_no_numbers(tmp_path):
    """Nothing that is not finite is written."""
    source = prepare.PhysicsClips('train', 'A', count=3, seed=1, size=32, device='cpu')
    manifest = prepare.new_manifest([8, 4, 24], {'train': source}, {})
    for value in (float('nan'), 1e6):
        def encode(frames):
            return torch.full((len(frames), 8, 4, 24), value)
        with pytest.raises(Refusal, match='split train, from clip 0 on: the encoder returns features that are not finite'):
            write_split(str(tmp_path), manifest, 'train', source, encode, batch=2)
    assert not os.listdir(tmp_path)


def test_the_encoder_computes_in_the_dtype_asked_for(tmp_path):
    weights = f'--weights={official_weights(tmp_path / "w.pt")}'
    args = '--encoder=vitl', weights, '--size=32', '--clips=4', '--test_clips=2', '--device=cpu'
    for dtype in ('float32', 'bfloat16'):
        run('prepare.py', f'--name={tmp_path}/{dtype}', *args, f'--dtype={dtype}')
    exact, rounded = [stored(tmp_path / dtype)[0] for dtype in ('float32', 'bfloat16')]
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).abs().max() < 0.2


SIZES = [                    # height, width, short side → height, width, by hand
    (480, 640, 292, 292, 389),                             # landscape: 389.33
    (640, 480, 292, 389, 292),                             # portrait
    (720, 1280, 292, 292, 519),                            # 519.11
    (480, 854, 292, 292, 519),                             # 519.52: round() would make it 520
    (1080, 1922, 438, 438, 779),                           # 779.48
    (40, 49, 292, 292, 357),                               # upscaled: 357.7
    (49, 40, 292, 357, 292),
    (300, 300, 292, 292, 292),
    (292, 583, 292, 292, 583),                             # it already is of that size
    (3, 7, 438, 438, 1022),                                # exact
]


@pytest.mark.parametrize('height, width, short, high, wide', SIZES)
def test_the_long_side_is_rounded_down(height, width, short, high, wide):
    assert own_files.resized(height, width, short) == (high, wide)


def test_sizes_are_those_of_transformers():
    image_transforms = optional('transformers.image_transforms')
    rng = np.random.default_rng(0)
    sizes = [size[:3] for size in SIZES] + [rng.integers(16, 3000, 3).tolist() for _ in range(300)]
    for height, width, short in sizes:
        assert own_files.resized(height, width, short) == image_transforms.get_size_with_aspect_ratio((height, width), short)


@pytest.mark.parametrize('height, width, high, wide', [(54, 96, 32, 56), (96, 54, 56, 32), (20, 28, 32, 44)])
def test_own_pictures_are_resized_by_that_rule(height, width, high, wide, tmp_path):
    """A clip and the same clip resized and cropped by hand give the same features; 56.89, 56.89 and 44.8 pixels."""
    source = own_clips(tmp_path / 'clips', ('train', 'val'), 'video')
    video = np.random.default_rng(0).integers(0, 256, (16, height, width, 3), dtype=np.uint8)
    x = F.interpolate(torch.from_numpy(video).permute(0, 3, 1, 2).float(), (high, wide), mode='bilinear', antialias=True)
    top, left = (high - 32) // 2, (wide - 32) // 2
    by_hand = x[..., top:top + 32, left:left + 32].round().byte().permute(0, 2, 3, 1).numpy()
    for i, frames in enumerate((video, by_hand)):
        np.save(source / 'train' / f'clip_{i:05d}' / 'video.npy', frames)
    run('prepare.py', f'--name={tmp_path}/set', f'--source={source}', '--size=32', '--dim=24')
    z = np.load(tmp_path / 'set' / 'train_00000.npy')
    assert z[0].tobytes() == z[1].tobytes()


def test_features_see_one_step_or_the_whole_clip(tmp_path):
    """encode='step': z_1 is the same whatever happens later. encode='clip': it is not, it has seen the future."""
    source = own_clips(tmp_path / 'clips', ('train', 'val'), 'video')
    videos = [source / 'train' / f'clip_{i:05d}' / 'video.npy' for i in (0, 1)]
    frames = [np.load(v) for v in videos]
    frames[1][:2] = frames[0][:2]                                      # the same first step, another future
    np.save(videos[1], frames[1])
    args = [f'--source={source}', '--size=32', '--encoder=vitl', f'--weights={official_weights(tmp_path / "vitl.pt")}']
    for encode, blind in (('step', True), ('clip', False)):
        run('prepare.py', f'--name={tmp_path}/{encode}', *args, f'--encode={encode}')
        z, _ = data.open_split(str(tmp_path / encode), 'train')[[0, 1]]
        assert z.shape == (2, 8, 4, 768)
        assert torch.allclose(z[0, 0], z[1, 0], atol=1e-2) == blind
        assert not torch.allclose(z[0, 1], z[1, 1], atol=1e-2)
    out = run('prepare.py', f'--name={tmp_path}/physics', *args[1:], '--encode=clip', '--clips=30', '--test_clips=2').stdout
    assert 'z_1 contains the whole clip' in out and 'z_1 alone explains' in out


@pytest.mark.parametrize('encoder, width, part', [('vitb2.1', 768, 'ema_encoder'), ('vitg2.1', 1408, 'target_encoder')])
def test_v_jepa_2_1(encoder, width, part, tmp_path):
    """Its encoders come from the part of an official file that they were published under."""
    args = f'--name={tmp_path}/set', f'--encoder={encoder}', '--size=32', '--clips=4', '--test_clips=2'
    args += f'--weights={official_weights(tmp_path / "w.pt", width, part=part, version="2.1")}',
    assert f'the {part} of' in run('prepare.py', *args).stdout
    z, _ = data.open_split(f'{tmp_path}/set', 'train')[[0, 1]]
    assert z.shape == (2, 8, 4, width) and not torch.allclose(z[0], z[1], atol=1e-2)
    assert json.load(open(tmp_path / 'set' / 'manifest.json'))['made_from']['part'] == part


def test_the_read_out_is_leave_one_out_regression():
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(30, k, generator=generator, dtype=torch.float64) for k in (50, 2))
    y = x[:, :2] * 3 + 1 + 0.1 * x[:, 2:4] ** 3

    def by_hand(y):
        best = []
        for strength in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
            left = []
            for i in range(30):
                rest = [j for j in range(30) if j != i]
                f = torch.cat([x / 50 ** 0.5, torch.ones(30, 1)], 1)
                w = torch.linalg.solve(f[rest].T @ f[rest] + strength * torch.eye(51), f[rest].T @ y[rest])
                left.append(y[i] - f[i] @ w)
            best.append(1 - torch.stack(left).square().sum() / (y - y.mean(0)).square().sum())
        return max(best).item()
    assert data.explained(x, y) == pytest.approx(by_hand(y), abs=1e-6) and by_hand(y) > 0.3
    assert data.explained(x, noise) == pytest.approx(by_hand(noise), abs=1e-6) and by_hand(noise) < 0.2


# ---- the download of official weights -----------------------------------------------------------------------------------

@pytest.fixture
def hub(tmp_path):
    """A small server that answers like Hugging Face → (its folder of behaviour, environment for prepare.py)."""
    save_file = optional('safetensors.torch').save_file
    state = torch.load(official_weights(tmp_path / 'w.pt'), weights_only=True)['target_encoder']
    theirs = {}
    for name, tensor in state.items():
        name = 'encoder.' + name.removeprefix('module.backbone.')
        for ours, published in (('patch_embed.', 'embeddings.patch_embeddings.'), ('blocks.', 'layer.'),
                                ('encoder.norm.', 'encoder.layernorm.'), ('attn.proj', 'attention.proj')):
            name = name.replace(ours, published)
        if 'attn.qkv' in name:
            for part, rows in zip(('query', 'key', 'value'), tensor.chunk(3)):
                theirs[name.replace('attn.qkv', f'attention.{part}')] = rows.clone()
        else:
            theirs[name] = tensor
    save_file(theirs, tmp_path / 'model.safetensors')
    content = (tmp_path / 'model.safetensors').read_bytes()
    seen = {'sha256': hashlib.sha256(content).hexdigest(), 'stop': None, 'requests': []}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(302)
            self.send_header('Location', '/elsewhere')
            self.send_header('X-Linked-Etag', f'"{seen["sha256"]}"')
            self.send_header('X-Linked-Size', str(len(content)))
            self.end_headers()

        def do_GET(self):
            first = int(self.headers.get('Range', 'bytes=0-')[6:-1])
            seen['requests'].append((self.path, first))
            self.send_response(206)
            self.send_header('Content-Length', str(len(content) - first))
            self.end_headers()
            self.wfile.write(content[first:seen['stop']])

        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {'HF_ENDPOINT': f'http://127.0.0.1:{server.server_port}', 'TORCH_HOME': str(tmp_path / 'torch')}
    yield seen, environment
    server.shutdown()


def test_official_weights_are_downloaded_once_and_checked(hub, tmp_path, monkeypatch):
    seen, environment = hub
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    args = '--encoder=vitl', '--size=32', '--clips=4', '--test_clips=2'
    cache = tmp_path / 'torch' / 'hub' / 'checkpoints'
    seen['stop'] = 10**6                                               # the connection breaks in the middle
    assert 'the same command goes on' in refused(run('prepare.py', f'--name={tmp_path}/a', *args, ok=False))
    assert not (cache / 'vjepa2-vitl.safetensors').exists()
    seen['stop'] = None
    run('prepare.py', f'--name={tmp_path}/a', *args)
    assert [first for _, first in seen['requests']] == [0, 10**6]
    assert seen['requests'][0][0] == '/facebook/vjepa2-vitl-fpc64-256/resolve/main/model.safetensors'
    assert (cache / 'vjepa2-vitl.safetensors').read_bytes() == (tmp_path / 'model.safetensors').read_bytes()
    run('prepare.py', f'--name={tmp_path}/b', *args)
    assert len(seen['requests']) == 2                                  # it was there
    run('prepare.py', f'--name={tmp_path}/c', *args, f'--weights={tmp_path}/w.pt')
    shards = [(tmp_path / name / 'train_00000.npy').read_bytes() for name in 'abc']
    assert shards[0] == shards[1] == shards[2]                         # both layouts of the weights, the same features
    os.remove(cache / 'vjepa2-vitl.safetensors')
    seen['sha256'] = '0' * 64
    assert 'does not have the sha256' in refused(run('prepare.py', f'--name={tmp_path}/d', *args, ok=False))
    assert os.listdir(cache) == ['.vjepa2-vitl.safetensors.lock']


def test_a_second_download_waits_for_the_first_and_takes_its_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    path = tmp_path / 'hub' / 'checkpoints' / 'vjepa2-vitl.safetensors'
    path.parent.mkdir(parents=True)
    first = files.lock(str(path))
    second = threading.Thread(target=vjepa2.official_weights, args=('vitl',))
    second.start()
    while 'waiting for it' not in capsys.readouterr().out:
        time.sleep(0.01)
    path.write_bytes(b'downloaded by the first')
    first.release()
    second.join()
    # It gives its lock back, too: a run does not hold it while it encodes.
    files.lock(str(path)).release()
    assert path.read_bytes() == b'downloaded by the first'


def test_no_weights_and_no_network_is_one_sentence(tmp_path, monkeypatch):
    optional('safetensors')
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    line = refused(run('prepare.py', f'--name={tmp_path}/x', '--encoder=vitl', ok=False))
    for words in ('cannot download', 'vitl.pt', 'facebook/vjepa2-vitl-fpc64-256', '--weights'):
        assert words in line
    assert not (tmp_path / 'x').exists()
