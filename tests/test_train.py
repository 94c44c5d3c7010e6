"""Training: repeatable, resumable, the same on several processes, and stopped before damage is done."""
import csv

import pytest
import torch
from conftest import TINY, refused, run



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


def test_accumulation_and_processes_change_nothing(tiny, tmp_path):
    """One process, two micro-batches, two processes: the same clips, so the same step but for rounding."""
    args = [*TINY, f'--data={tiny}', '--model=vit', '--max_iters=3']
    run('train.py', *args, f'--out={tmp_path}/one.pt')
    run('train.py', *args, f'--out={tmp_path}/two.pt', '--accumulation=2')
    assert close(tmp_path / 'one.pt', tmp_path / 'two.pt', atol=2e-4)
    args.append(f'--out={tmp_path}/ddp.pt')
    assert '2 processes' in run('train.py', *args, '--stop_at=2', processes=2).stdout
    assert run('train.py', *args, '--resume=True', processes=2).stdout.count('finished') == 1
    assert close(tmp_path / 'one.pt', tmp_path / 'ddp.pt', atol=2e-4)


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
                  'clips/s', 'left', 'below copy', 'with steps 6 and 8 swapped', 'finished'):
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
    (tmp_path / 'x.csv').write_text('step,loss,teacher_forcing,rollout\r\n1,9,9,9\r\n', newline='')
    run('train.py', *TINY, f'--data={tiny}', f'--out={tmp_path}/x.pt')
    rows = training_rows(tmp_path / 'x.csv')
    assert [row['step'] for row in rows] == ['1', '2', '3', '4', '5', '6'] and 'jump' in rows[0]


def test_a_file_that_is_not_its_log_is_left_alone(tiny, tmp_path):
    args = [*TINY, f'--data={tiny}', f'--out={tmp_path}/x.pt']
    log = tmp_path / 'x.csv'
    log.write_text('my notes\n')
    assert f'{log} is not the log' in refused(run('train.py', *args, ok=False))
    assert log.read_text() == 'my notes\n' and not (tmp_path / 'x.pt').exists()
    log.unlink()
    run('train.py', *args, '--stop_at=3')
    before = (tmp_path / 'x.pt').read_bytes()
    log.write_text('step,loss,teacher_forcing,another figure\r\n')
    assert f'{log} is not the log' in refused(run('train.py', *args, '--resume=True', ok=False))
    assert 'another figure' in log.read_text() and (tmp_path / 'x.pt').read_bytes() == before
