"""Training: repeatable, resumable, the same on several processes, and stopped before damage is done."""
import csv
import glob
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, official_predictor, own_clips, refused, run
from test_refusals import function_of

from configurator import Refusal
from hope import load
from support.files import write_sealed


def content(path):
    """What a checkpoint holds."""
    return torch.load(path, weights_only=True)


def weights(path):
    return content(path)['predictor']


def same(a, b):
    """Whether the weights of two checkpoints are the same to the last bit."""
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def close(a, b, atol):
    """Whether the weights of two checkpoints differ by no more than atol."""
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return all(torch.allclose(a[name], b[name], atol=atol) for name in a)


def training_rows(path):
    """The rows that a log has of training steps, not of evaluations."""
    with open(path, newline='') as f:
        return [row for row in csv.DictReader(f) if row['loss']]


def last_of_each_step(path):
    """{step: what is the same in every run} of a log; where a step stands twice, the later row counts."""
    return {row['step']: (row['loss'], row['grad_norm']) for row in training_rows(path)}


# ---- one seed, one result ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['hope', 'vit'])
def test_same_seed_same_result_and_resume_is_exact(kind, tiny, trained, tmp_path):
    args = [*TINY, f'--model={kind}', f'--data={tiny}', f'--out={tmp_path}/resumed.pt']
    assert 'stopped at step 4' in run('train.py', *args, '--stop_at=4').stdout
    run('train.py', *args, '--resume=True')
    assert same(tmp_path / 'resumed.pt', trained[kind])
    assert 'is finished (6 steps)' in run('train.py', *args, '--resume=True').stdout


def test_another_seed_gives_another_result(tiny, trained, tmp_path):
    run('train.py', *TINY, f'--data={tiny}', f'--out={tmp_path}/x.pt', '--seed=2')
    assert not close(tmp_path / 'x.pt', trained['hope'], atol=1e-3)


def test_starting_from_another_checkpoint(tiny, trained, tmp_path):
    start = f'--init_from={trained["hope"]}'
    run('train.py', *TINY, f'--data={tiny}', start, '--max_iters=1', '--learning_rate=1e-9', '--split=fit_B',
        f'--out={tmp_path}/x.pt')
    assert close(tmp_path / 'x.pt', trained['hope'], atol=1e-6)


def logged(path):
    """The losses in the log of a run, (steps,4)."""
    with open(path, newline='', encoding='utf-8') as f:
        rows = [row for row in csv.DictReader(f) if row['loss']]
    return torch.tensor([[float(row[name]) for name in ('loss', 'teacher_forcing', 'jump', 'inverse')] for row in rows])


def test_accumulation_and_processes_change_nothing(tiny, tmp_path):
    """
    One process, two micro-batches, two processes: the same clips, so the same losses but for rounding, and weights as near
    as AdamW's division by small gradients lets them be.
    """
    args = [*TINY, f'--data={tiny}', '--model=vit', '--max_iters=3']
    run('train.py', *args, f'--out={tmp_path}/one.pt')
    run('train.py', *args, f'--out={tmp_path}/two.pt', '--accumulation=2')
    assert close(tmp_path / 'one.pt', tmp_path / 'two.pt', atol=2e-4)
    args.append(f'--out={tmp_path}/ddp.pt')
    assert '2 processes' in run('train.py', *args, '--stop_at=2', processes=2).stdout
    assert run('train.py', *args, '--resume=True', processes=2).stdout.count('finished') == 1
    assert close(tmp_path / 'one.pt', tmp_path / 'ddp.pt', atol=2e-4)
    one = logged(tmp_path / 'one.csv')
    assert one.shape == (3, 4)
    for other in 'two', 'ddp':
        torch.testing.assert_close(logged(tmp_path / f'{other}.csv'), one, rtol=0, atol=1e-6)


# ---- best and last, on the same or another machine ---------------------------------------------------------------------

def changed_copy(folder, **constants):
    """A copy of the project in which constants of train.py have other values → the path of its train.py."""
    for path in glob.glob(os.path.join(ROOT, '*.py')):
        shutil.copy(path, folder)
    shutil.copytree(os.path.join(ROOT, 'support'), folder / 'support')
    text = (folder / 'train.py').read_text(encoding='utf-8')
    for name, value in constants.items():
        lines = [line for line in text.splitlines() if line.startswith(f'{name} = ')]
        text = text.replace(*lines, f'{name} = {value}')
    (folder / 'train.py').write_text(text, encoding='utf-8')
    return str(folder / 'train.py')


def test_the_best_weights_are_kept_too(tiny, tmp_path):
    """At a rate that is far too high a middle step is the best, in a resumed run as in a whole one."""
    wild = [*TINY, f'--data={tiny}', '--model=vit', '--eval_interval=2', '--warmup=0', '--decay=0', '--learning_rate=10']
    # Which step is the best is chance: with one of these seeds it is not the last.
    for seed in range(1, 9):
        args = [*wild, f'--seed={seed}']
        said = run('train.py', *args, f'--out={tmp_path}/whole.pt').stdout
        rows = list(csv.DictReader(open(tmp_path / 'whole.csv', newline='')))
        losses = {int(row['step']): float(row['val_jump']) for row in rows if row['val_jump']}
        best_step = min(losses, key=losses.get)
        if best_step < 6:
            break
        (tmp_path / 'whole.pt').unlink()
        (tmp_path / 'whole_best.pt').unlink()
    assert best_step < 6
    predictor, best = load(str(tmp_path / 'whole_best.pt'))
    assert (best['step'], best['best']) == (best_step, losses[best_step]) and 'optimizer' not in best
    assert {'loss', 'jump_last', 'clip_steps', 'data', 'recipe', 'version'} <= set(best)
    assert f'the best on val was step {best_step}: {tmp_path}/whole_best.pt' in said
    run('train.py', *args, f'--out={tmp_path}/stopped.pt', f'--stop_at={best_step}')
    # A kill between the two files.
    (tmp_path / 'stopped_best.pt').unlink()
    run('train.py', *args, f'--out={tmp_path}/stopped.pt', '--resume=True')
    for name in '', '_best':
        assert same(tmp_path / f'whole{name}.pt', tmp_path / f'stopped{name}.pt')
    assert content(tmp_path / 'stopped_best.pt')['step'] == best_step
    # The best weights cannot be resumed, and those of another run are not overwritten.
    line = refused(run('train.py', *args, f'--out={tmp_path}/whole_best.pt', '--resume=True', ok=False))
    assert f'weights of step {best_step} alone, without the optimiser' in line
    (tmp_path / 'whole.pt').unlink()
    before = (tmp_path / 'whole_best.pt').read_bytes()
    assert f'{tmp_path}/whole_best.pt exists' in refused(run('train.py', *args, f'--out={tmp_path}/whole.pt', ok=False))
    assert (tmp_path / 'whole_best.pt').read_bytes() == before


def test_it_is_saved_by_time_too(tiny, tmp_path):
    """Killed long before the first evaluation, it goes on from the last checkpoint, and nothing differs in the end."""
    args = [*TINY, f'--data={tiny}', '--model=vit', '--eval_interval=1000', '--max_iters=60']
    (tmp_path / 'project').mkdir()
    often = changed_copy(tmp_path / 'project', SAVE_EVERY=0)
    out = tmp_path / 'killed.pt'

    def kill(pid):
        while not out.exists():
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
    assert run(often, *args, f'--out={out}', meanwhile=kill, ok=False).returncode == -signal.SIGKILL
    assert 1 <= content(out)['step'] < 60
    run('train.py', *args, f'--out={out}', '--resume=True')
    run('train.py', *args, f'--out={tmp_path}/whole.pt')
    assert same(out, tmp_path / 'whole.pt')


def test_another_machine_is_taken_and_said(tiny, trained, tmp_path):
    """Accumulation, the path of the set and the number of threads change the last bits alone: no reason to refuse."""
    (tmp_path / 'moved').symlink_to(tiny)
    args = [*TINY, f'--out={tmp_path}/x.pt']
    run('train.py', *args, f'--data={tiny}', '--stop_at=3')
    whole = content(tmp_path / 'x.pt')
    threads = torch.get_num_threads()
    expected = {'device': 'cpu', 'precision': 'float32', 'threads': threads, 'processes': 1, 'accumulation': 1}
    assert whole['rounding'] == expected
    whole['rounding']['threads'] = threads + 1
    write_sealed(f'{tmp_path}/x.pt', whole)
    said = run('train.py', *args, f'--data={tmp_path}/moved', '--accumulation=2', '--resume=True').stdout
    assert f'going on with threads = {threads} (was {threads + 1}), accumulation = 2 (was 1)' in said
    assert close(tmp_path / 'x.pt', trained['hope'], atol=2e-4)


def test_another_precision_is_said(tiny, tmp_path):
    args = [*TINY, f'--data={tiny}', '--model=vit', f'--out={tmp_path}/x.pt']
    assert ', bfloat16' not in run('train.py', *args, '--stop_at=3').stdout
    said = run('train.py', *args, '--dtype=bfloat16', '--resume=True').stdout
    assert 'going on with precision = bfloat16 (was float32)' in said and 'cpu, bfloat16' in said


def test_a_checkpoint_of_impossible_jumps_is_refused(trained, tmp_path):
    whole = content(trained['vit'])
    for last in 0, 8, 'x':
        write_sealed(f'{tmp_path}/x.pt', {**whole, 'jump_last': last})
        with pytest.raises(Refusal, match='x.pt is not a checkpoint of this code'):
            load(f'{tmp_path}/x.pt')


def test_sigterm_ends_the_preparation_too(tmp_path):
    script = changed_copy(tmp_path)
    job = subprocess.Popen([sys.executable, script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           env={**os.environ, 'OMP_NUM_THREADS': '1'}, start_new_session=True)
    while not (tmp_path / 'data' / 'slide').exists():
        assert job.poll() is None
        time.sleep(0.05)
    job.terminate()
    assert job.wait(timeout=30) == 128 + signal.SIGTERM
    # No process of the session is left.
    with pytest.raises(ProcessLookupError):
        os.killpg(job.pid, 0)


@pytest.mark.skipif(sys.platform != 'linux', reason='the C library of Linux')
def test_the_memory_of_freed_tensors_is_used_again():
    """After a few blocks of 64 MiB the next ones touch no page for the first time, of their 16,384 each."""
    script = """if True:
        import resource, torch
        from support.running import keep_freed_memory
        keep_freed_memory()
        for _ in range(16):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(2**24)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    faults = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(faults) < 1000


def test_importing_it_does_not_train():
    with pytest.raises(ImportError, match='trains from top to bottom'):
        import train  # noqa: F401


# ---- losses ------------------------------------------------------------------------------------------------------------

def test_rollout_is_the_other_second_loss(tiny, tmp_path):
    out = run('train.py', *TINY, f'--data={tiny}', '--loss=rollout', f'--out={tmp_path}/x.pt').stdout
    assert 'rollout' in out and 'jump' not in out
    assert content(tmp_path / 'x.pt')['loss'] == 'rollout'


def test_the_loss_is_the_two_terms_weighted_by_lambda(tiny, tmp_path):
    """With lambda = 0 the second loss moves no weight, with lambda = 1 teacher forcing moves none."""
    args = [*TINY, f'--data={tiny}', '--model=vit', '--max_iters=2']
    for name, lam, more in (('tf_1', 0, '--jump_last=1'), ('tf_3', 0, '--jump_last=3'),
                            ('jump_1', 1, '--teacher_every=1'), ('jump_2', 1, '--teacher_every=2')):
        run('train.py', *args, f'--lambda_start={lam}', f'--lambda_end={lam}', more, f'--out={tmp_path}/{name}.pt')
        column = 'jump' if lam else 'teacher_forcing'
        assert all(float(row['loss']) == float(row[column]) for row in training_rows(tmp_path / f'{name}.csv'))
    assert same(tmp_path / 'tf_1.pt', tmp_path / 'tf_3.pt')
    assert same(tmp_path / 'jump_1.pt', tmp_path / 'jump_2.pt')
    assert not close(tmp_path / 'tf_1.pt', tmp_path / 'jump_1.pt', atol=1e-4)


# ---- optimiser ---------------------------------------------------------------------------------------------------------

def test_only_matrices_decay(tiny, tmp_path):
    """Chosen by dim() > 1, decay reached the memory's retention. It moves the matrices of linear maps and nothing else."""
    args = [*TINY, f'--data={tiny}', '--max_iters=1', '--warmup=0', '--decay=0', '--learning_rate=0.5']
    run('train.py', *args, '--weight_decay=0', f'--out={tmp_path}/without.pt')
    run('train.py', *args, '--weight_decay=1', f'--out={tmp_path}/with.pt')
    plain, decayed = weights(tmp_path / 'without.pt'), weights(tmp_path / 'with.pt')
    moved = {name for name in plain if not torch.equal(plain[name], decayed[name])}
    linear = {name for name, tensor in plain.items() if tensor.dim() == 2 and name.endswith('.weight')}
    assert moved == linear
    for name in 'alpha_bias', 'eta_bias', 'memory', 'conv.weight':
        assert f'predictor_blocks.0.titan.{name}' in set(plain) - moved


def test_the_rate_rises_from_its_start_stays_and_falls_to_zero(tiny, tmp_path):
    args = [*TINY, f'--data={tiny}']
    run('train.py', *args, '--max_iters=20', '--start_rate=1e-4', '--learning_rate=1e-3', '--warmup=0.25', '--decay=0.25',
        f'--out={tmp_path}/x.pt')
    rates = [float(row['learning_rate']) for row in training_rows(tmp_path / 'x.csv')]
    rising = [1e-4 + 9e-4 * (i + 1) / 6 for i in range(5)]
    assert rates == pytest.approx(rising + [1e-3] * 11 + [8e-4, 6e-4, 4e-4, 2e-4])


def test_a_non_finite_step_stops_before_the_optimiser(tiny, tmp_path):
    args = [*TINY, f'--data={tiny}', f'--out={tmp_path}/x.pt', '--warmup=0', '--learning_rate=1e30']
    run('train.py', *args, '--stop_at=1')
    before = (tmp_path / 'x.pt').read_bytes()
    line = refused(run('train.py', *args, '--resume=True', ok=False))
    assert 'step 2' in line and 'not finite' in line
    assert (tmp_path / 'x.pt').read_bytes() == before


# ---- log ---------------------------------------------------------------------------------------------------------------

def test_the_terminal_says_what_runs(tiny, tmp_path):
    out = run('train.py', *TINY, f'--data={tiny}', '--out=x.pt', cwd=tmp_path).stdout
    for words in ('parameters', '40 tokens per clip', '48 training clips', 'cpu', 'copy baseline', 'λ 0.20', 'λ 0.80',
                  'clips/s', 'left', 'below copy', 'below blank', 'on this machine',
                  'with steps 6 and 8 swapped', 'finished'):
        assert words in out, words
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize('left_behind', ['4,9,9\r\n', '4,9'], ids=['whole row', 'cut row'])
def test_a_resumed_run_appends_to_its_log(left_behind, tiny, trained, tmp_path):
    """What a killed run logged after its checkpoint stays there, even half a row; the later row of a step counts."""
    args = [*TINY, f'--data={tiny}', f'--out={tmp_path}/x.pt']
    run('train.py', *args, '--stop_at=3')
    log = tmp_path / 'x.csv'
    with open(log, 'a', newline='') as f:
        f.write(left_behind)
    before = log.read_bytes()
    run('train.py', *args, '--resume=True')
    assert log.read_bytes().startswith(before)
    assert [row['step'] for row in training_rows(log)] == ['1', '2', '3', '4', '4', '5', '6']
    assert last_of_each_step(log) == last_of_each_step(trained['hope'].replace('.pt', '.csv'))


def test_a_log_without_a_checkpoint_is_begun_anew(tiny, trained, tmp_path):
    header = open(trained['hope'].replace('.pt', '.csv'), newline='').readline().replace('jump', 'rollout')
    (tmp_path / 'x.csv').write_text(f'{header}1,9,9,9\r\n', newline='')
    run('train.py', *TINY, f'--data={tiny}', f'--out={tmp_path}/x.pt')
    rows = training_rows(tmp_path / 'x.csv')
    assert [row['step'] for row in rows] == ['1', '2', '3', '4', '5', '6'] and 'jump' in rows[0]


def test_a_file_that_is_not_its_log_is_left_alone(tiny, tmp_path):
    args = [*TINY, f'--data={tiny}', f'--out={tmp_path}/x.pt']
    log = tmp_path / 'x.csv'
    for notes in 'my notes\n', 'step,loss,teacher_forcing,jump,mine\n1,9,9,9,9\n':
        log.write_text(notes)
        assert f'{log} is not the log' in refused(run('train.py', *args, ok=False))
        assert log.read_text() == notes and not (tmp_path / 'x.pt').exists()
    log.unlink()
    run('train.py', *args, '--stop_at=3')
    before = (tmp_path / 'x.pt').read_bytes()
    log.write_text('step,loss,teacher_forcing,another figure\r\n')
    assert f'{log} is not the log' in refused(run('train.py', *args, '--resume=True', ok=False))
    assert 'another figure' in log.read_text() and (tmp_path / 'x.pt').read_bytes() == before


# ---- states and pushes -------------------------------------------------------------------------------------------------

def test_what_a_loss_cannot_see_is_refused():
    """A jump sees the first push alone, the action memory knows one, and a set without states has none to give."""
    check_clips = function_of('train.py', 'check_clips')
    knobs = SimpleNamespace(data='x', split='train', loss='jump', action_memory=True, states=False, jump_last=3,
                            rollout_steps=2)
    one = SimpleNamespace(name='split val', actions=np.zeros((4, 8, 2)), states=None, several_pushes=False)
    check_clips(knobs, one, one)
    several = SimpleNamespace(**{**vars(one), 'several_pushes': True})
    for change, words in (({}, '--loss=rollout'), ({'loss': 'rollout'}, '--action_memory=False'),
                          ({'loss': 'rollout', 'action_memory': False, 'states': True}, 'has no states')):
        with pytest.raises(Refusal, match=words):
            check_clips(SimpleNamespace(**{**vars(knobs), **change}), several, one)
    check_clips(SimpleNamespace(**{**vars(knobs), 'loss': 'rollout', 'action_memory': False}), several, one)


def test_fine_tuning_with_states(tmp_path):
    """Clips of several pushes with states: the published predictor's state encoder, of the clips' size, is trained."""
    source = own_clips(tmp_path / 'clips', layout='pictures')
    for number, clip in enumerate(sorted(source.glob('*/*'))):
        rng = np.random.default_rng(number)
        np.save(clip / 'actions_states' / 'actions.npy', rng.normal(size=(8, 2)))
        np.save(clip / 'actions_states' / 'states.npy', rng.normal(size=(8, 3)))
    run('prepare.py', f'--source={source}', f'--name={tmp_path}/set', '--size=32', '--dim=24')
    args = ['config/finetune_vjepa2_ac.py', *TINY, f'--init_from={official_predictor(tmp_path / "ac.pt")}', '--batch_size=2',
            f'--data={tmp_path}/set', '--accumulation=1', '--action_memory=False']
    said = run('train.py', *args, f'--out={tmp_path}/without.pt', '--max_iters=1').stdout
    assert 'the clips have states, which are not used' in said and 'state_encoder' in said
    args.append('--states=True')
    run('train.py', *args, f'--out={tmp_path}/first.pt', '--max_iters=1', '--learning_rate=1e-9')
    run('train.py', *args, f'--out={tmp_path}/last.pt', '--stop_at=3')
    run('train.py', *args, f'--out={tmp_path}/last.pt', '--resume=True')
    assert content(tmp_path / 'last.pt')['sizes']['state_dim'] == 3
    first, last = weights(tmp_path / 'first.pt'), weights(tmp_path / 'last.pt')
    for name in 'state_encoder.weight', 'state_encoder.bias':
        assert not torch.allclose(first[name], last[name], atol=1e-5)
