"""Training: repeatable, resumable, the same on several processes, and stopped before damage is done."""
import csv
import json
import os
import shlex
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import FEW, TINY, own_phases, refused, run, small_predictor

import hope
from data import Clips, batch_indices, mean_push
from model import stream_loss, teacher_forcing_loss
from support import worlds


def content(path):
    """What a checkpoint holds."""
    return torch.load(path, weights_only=True)


def furthest(a, b):
    """The largest difference between the weights of two checkpoints."""
    a, b = content(a)['predictor'], content(b)['predictor']
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def logged(path, *columns):
    """Columns of a checkpoint's log, (steps,columns); of a step that is there twice the later row."""
    with open(os.path.splitext(path)[0] + '.csv', encoding='utf-8') as f:
        rows = {row['step']: [float(row[name] or 'nan') for name in columns] for row in csv.DictReader(f)}
    return np.array(list(rows.values()))


def on_two_processes(*args):
    """Run train.py as torchrun would, on two processes of a CPU → what they printed."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    shared = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'WORLD_SIZE': '2'}
    ranks = [{**shared, 'RANK': str(rank), 'LOCAL_RANK': str(rank)} for rank in range(2)]
    with ThreadPoolExecutor() as pool:
        return ''.join(pool.map(lambda ranked: run('train.py', *args, environment=ranked).stdout, ranks))


def own_set(folder, pushes):
    """Write a data set of 12 random clips in train and val, 2 x 2 patches, D = 24, S = 3 → its folder."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split in 'train', 'val':
        actions, states = np.zeros((12, 8, 2), np.float32), rng.normal(size=(12, 8, 3)).astype(np.float32)
        actions[:, :pushes] = rng.normal(size=(12, pushes, 2))
        np.savez(folder / f'{split}.npz', actions=actions, states=states)
        np.save(folder / f'{split}.npy', rng.normal(size=(12, 8, 4, 24)).astype(np.float16))
    meta = {'config': {'source': str(folder)}, 'shape': [8, 4, 24], 'grid': [2, 2], 'patch': 16}
    (folder / 'meta.json').write_text(json.dumps(meta))
    return folder


@pytest.mark.parametrize('kind', ['hope', 'vit'])
def test_killed_and_resumed_it_ends_as_if_never_stopped(kind, tiny, tmp_path):
    """Killed after its first checkpoint, maybe while it writes another, it ends with the same weights."""
    args = [*TINY, f'--data={tiny}', f'--model={kind}', '--max_iters=20', '--eval_interval=1']
    run('train.py', *args, f'--out={tmp_path}/whole.pt')
    out = tmp_path / 'killed.pt'

    def kill(pid):
        while not out.exists():
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
    assert run('train.py', *args, f'--out={out}', meanwhile=kill, ok=False).returncode == -signal.SIGKILL
    assert content(out)['step'] < 20
    run('train.py', *args, f'--out={out}', '--resume')
    whole, killed = content(tmp_path / 'whole.pt'), content(out)
    states = [[each['state'] for each in end['optimizers']] for end in (whole, killed)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert (whole['step'], whole['best'], whole['best_step']) == (20, killed['best'], killed['best_step'])
    for name in '', '_best':
        assert furthest(tmp_path / f'whole{name}.pt', tmp_path / f'killed{name}.pt') == 0
    columns = 'step', 'loss', 'inverse', 'surprise', 'grad_norm', 'val_jump'
    np.testing.assert_array_equal(logged(out, *columns), logged(tmp_path / 'whole.pt', *columns))
    assert 'is finished (20 steps)' in run('train.py', *args, f'--out={out}', '--resume').stdout


def test_another_seed_gives_another_result(tiny, trained, tmp_path):
    run('train.py', *TINY, f'--data={tiny}', f'--out={tmp_path}/x.pt', '--seed=2')
    assert furthest(tmp_path / 'x.pt', trained['hope']) > 1e-3


def test_accumulation_and_processes_change_nothing(tiny, tmp_path):
    """The same clips, so the same losses but for rounding, which Muon would amplify."""
    args = [*TINY, f'--data={tiny}', '--max_iters=3', '--optimizer=adamw']
    run('train.py', *args, f'--out={tmp_path}/one.pt')
    run('train.py', *args, f'--out={tmp_path}/parts.pt', '--accumulation=2')
    assert on_two_processes(*args, f'--out={tmp_path}/two.pt').count('processes: 2') == 1
    columns = 'loss', 'teacher_forcing', 'jump', 'surprise', 'inverse'
    for name in 'parts', 'two':
        one, other = logged(tmp_path / 'one.pt', *columns), logged(tmp_path / f'{name}.pt', *columns)
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-6)
        assert furthest(tmp_path / f'{name}.pt', tmp_path / 'one.pt') < 2e-4


def test_nothing_is_overwritten_and_nothing_wrong_resumed(tiny, trained, tmp_path):
    for name in 'x.pt', 'x_best.pt':
        shutil.copy(trained['hope'], tmp_path / name)
        args = [*TINY, f'--data={tiny}', f'--out={tmp_path}/x.pt']
        before = (tmp_path / name).read_bytes()
        assert f'{tmp_path}/{name} exists' in refused(run('train.py', *args, ok=False))
        assert (tmp_path / name).read_bytes() == before
        (tmp_path / name).unlink()
    args.append('--resume')
    for content, words in (b'', 'damaged'), (before, 'other sizes'):
        (tmp_path / 'x.pt').write_bytes(content)
        assert words in refused(run('train.py', *args, '--depth=3', ok=False))


def test_the_best_weights_are_kept_too(tiny, tmp_path):
    """At a rate that is far too high, with one of these seeds a middle step is the best."""
    args = [*TINY, f'--data={tiny}', '--model=vit', '--optimizer=adamw', '--world=False', '--worlds=False',
            '--eval_interval=2', '--warmup=0.0', '--decay=0.0', '--learning_rate=1', f'--out={tmp_path}/x.pt']
    for seed in range(1, 9):
        said = run('train.py', *args, f'--seed={seed}').stdout
        losses = dict(logged(tmp_path / 'x.pt', 'step', 'val_jump')[1::2])
        best_step = min(losses, key=losses.get)
        last, best = content(tmp_path / 'x.pt'), content(tmp_path / 'x_best.pt')
        assert (best['step'], best['best']) == (best_step, losses[best_step])
        assert f'best on val was step {best["step"]}: {tmp_path}/x_best.pt' in said
        if best_step < 6:
            break
        for name in 'x.pt', 'x_best.pt':
            (tmp_path / name).unlink()
    assert best_step < 6 and furthest(tmp_path / 'x.pt', tmp_path / 'x_best.pt') > 0
    assert set(last) - set(best) == {'optimizers'}


def test_the_log(tiny, trained):
    with open(trained['hope'].replace('.pt', '.csv'), encoding='utf-8') as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ['step', 'loss', 'teacher_forcing', 'jump', 'inverse', 'surprise', 'lambda',
                             'learning_rate', 'grad_norm', 'clips_per_s', 'val_teacher_forcing', 'val_jump']
    assert [row['step'] for row in rows] == ['1', '2', '3', '4', '5', '6']
    assert [bool(row['val_jump']) for row in rows] == [False, False, True, False, False, True]
    assert [float(row['lambda']) for row in rows] == pytest.approx([0.2, 0.32, 0.44, 0.56, 0.68, 0.8])


def test_the_next_command_works(tiny, trained, tmp_path):
    data = own_phases(tiny, tmp_path / 'set')
    done = run('train.py', *TINY, f'--data={data}', f'--out={tmp_path}/x.pt', '--max_iters=1')
    python, script, *flags = shlex.split(done.stdout.splitlines()[-1].removeprefix('next: '))
    assert (python, script) == ('python', 'adapt.py')
    run(script, *flags, *FEW, '--methods=frozen', f'--out={tmp_path}/aba')


@pytest.mark.parametrize('short, nearest', [(0, 5), (0.1, 1)])
def test_a_step_from_another_checkpoint(tiny, trained, tmp_path, short, nearest):
    """Teacher forcing on every n-th clip, jumps on all, along streams of made-up worlds; near ones at first."""
    run('train.py', *TINY, f'--data={tiny}', f'--init_from={trained["hope"]}', f'--out={tmp_path}/x.pt',
        '--zoom=False', '--max_iters=1', '--learning_rate=1e-9', '--muon_rate=1e-9', '--lambda_start=0.3',
        '--teacher_every=4', '--plain_worlds=0', f'--short_jumps={short}')
    predictor, _ = hope.load(trained['hope'])
    clips, val = Clips(tiny, 'train'), Clips(tiny, 'val')
    push = mean_push(clips.actions)
    tau = torch.from_numpy(np.random.default_rng([1, 1, 0]).integers(nearest, 8, 8))
    world = worlds.draw_worlds(np.random.default_rng([1, 3, 0]), 2, 2, 0.85, 0)
    drawn = batch_indices(len(clips), 128, 1, 0).reshape(2, 64)
    length = np.linalg.norm(val.actions[:, 0], axis=1)
    pushes = torch.from_numpy(clips.actions[drawn, 0])
    with torch.no_grad():
        looks = predictor.world.looks(clips[drawn.ravel()][0][:, 0]).view(2, 64, -1)
        chosen = worlds.fitting(np.random.default_rng([1, 4, 0]), world, pushes, looks, push, length, 4)
        z, a = clips[np.take_along_axis(drawn, chosen, 1).ravel()]
        first = teacher_forcing_loss(predictor, z[::4], a[::4], {})[0].item()
        looks = predictor.world.looks(z[:, 0]).view(2, 4, -1)
        a[:, 0] = worlds.given_pushes(world, a[:, 0].view(2, 4, 2), looks, push).view(8, 2)
        lost, surprise = stream_loss(predictor, z, a, tau, 4)
    second = (lost * torch.tensor([0.4, 0.8, 1.2, 1.6])).mean().item()
    losses = logged(tmp_path / 'x.pt', 'teacher_forcing', 'jump', 'loss', 'surprise')
    expected = first, second, 0.7 * first + 0.3 * second, surprise.mean().item()
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    before, after = content(trained['hope'])['predictor'], content(tmp_path / 'x.pt')['predictor']
    assert all((before[name] - after[name]).abs().max() < 1e-6 for name in before if 'world' not in name)


def test_lambda_weighs_the_gradients(tiny, tmp_path):
    """With lambda = 0 the second loss moves no weight, with lambda = 1 teacher forcing moves none."""
    def out(*flags):
        path = tmp_path / f'{flags}.pt'
        run('train.py', *TINY, f'--data={tiny}', '--model=vit', '--max_iters=2', *flags, f'--out={path}')
        return path
    no_jump, all_jump = ['--lambda_start=0', '--lambda_end=0'], ['--lambda_start=1', '--lambda_end=1']
    first, second = out(*no_jump), out(*all_jump)
    assert furthest(first, out(*no_jump, '--jump_last=1')) == 0
    assert furthest(second, out(*all_jump, '--teacher_every=1')) == 0
    assert furthest(first, second) > 1e-4


def test_what_is_not_finite_stops_it_and_is_not_saved(tiny, tmp_path):
    """A gradient before the optimiser's step, a loss on val before the checkpoint."""
    args = [*TINY, f'--data={tiny}', f'--out={tmp_path}/x.pt', '--warmup=0.0', '--resume']
    run('train.py', *args[:-1], '--max_iters=1')
    before = (tmp_path / 'x.pt').read_bytes()
    for interval, words in ((6, 'step 3: a loss or its gradient'), (1, 'step 2: the loss on val')):
        done = run('train.py', *args, '--learning_rate=1e30', f'--eval_interval={interval}', ok=False)
        assert words in refused(done) and 'lower --learning_rate' in refused(done)
        assert (tmp_path / 'x.pt').read_bytes() == before


def test_what_does_not_go_together_is_refused_in_one_line(tmp_path):
    one, many = own_set(tmp_path / 'one', pushes=1), own_set(tmp_path / 'many', pushes=8)
    for flags, words in ((['--batch_size=9', f'--data={one}'], 'teacher_every'),
                         (['--jump_last=8', f'--data={one}'], 'jump_last = 8'),
                         (['--stream_clips=3', f'--data={one}'], 'stream_clips'),
                         ([f'--data={many}'], '--loss=rollout'),
                         ([f'--data={one}', '--loss=rollout'], '--world=False'),
                         ([f'--data={one}', '--split=fit_B'], 'fit_B')):
        assert words in refused(run('train.py', *TINY, *flags, f'--out={tmp_path}/x.pt', ok=False))


def test_fine_tuning_the_official_predictor_with_states(tmp_path):
    """Clips of several pushes with states: the state encoder, of the clips' size, is trained, too."""
    net = small_predictor('vit', feature_dim=24, action_dim=7, state_dim=7, mlp_hidden=32, rope='vjepa2',
                          world=False, conv=False).float()
    weights = {f'module.{name}': value for name, value in net.state_dict().items()}
    torch.save({'predictor': weights}, tmp_path / 'ac.pt')
    clips = own_set(tmp_path / 'set', pushes=8)
    args = ['config/finetune_vjepa2_ac.py', *TINY, f'--init_from={tmp_path}/ac.pt', '--accumulation=1',
            f'--data={clips}', '--states']
    run('train.py', *args, f'--out={tmp_path}/start.pt', '--max_iters=1', '--learning_rate=1e-9')
    run('train.py', *args, f'--out={tmp_path}/end.pt')
    start, end = content(tmp_path / 'start.pt')['predictor'], content(tmp_path / 'end.pt')['predictor']
    name = 'predictor_blocks.0.attn.qkv.weight'
    torch.testing.assert_close(start[name], weights[f'module.{name}'])
    for name in 'state_encoder.weight', name:
        assert not torch.allclose(start[name], end[name], atol=1e-6)
