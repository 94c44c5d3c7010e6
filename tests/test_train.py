"""Training: repeatable, resumable, the same on several processes, and stopped before damage is done."""
import csv
import sys

import pytest
import torch
from conftest import TINY, refused, run

import hope


def weights(path):
    return torch.load(path, weights_only=True)['predictor']


def same(a, b, **tolerance):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return all(torch.allclose(a[k], b[k], **tolerance) if tolerance else torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('kind', ['hope', 'vit'])
def test_same_seed_same_result_and_resume_is_exact(kind, tiny, trained, tmp_path):
    args = [*TINY, f'--model={kind}', f'--data={tiny}']
    out = tmp_path / 'resumed.pt'
    assert 'stopped at step 4' in run('train.py', *args, f'--out={out}', '--stop_at=4').stdout
    assert 'exists' in refused(run('train.py', *args, f'--out={out}', ok=False))
    run('train.py', *args, f'--out={out}', '--resume=True')
    assert same(out, trained[kind])
    columns = 'step', 'loss', 'grad_norm'
    logs = [[[row[c] for c in columns] for row in csv.DictReader(open(path))]
            for path in (tmp_path / 'resumed.csv', trained[kind].replace('.pt', '.csv'))]
    assert [r for r in logs[0] if r[1]] == [r for r in logs[1] if r[1]] and len(logs[1]) == 8
    done = run('train.py', *args, f'--out={out}', '--resume=True')
    assert 'is finished (6 steps)' in done.stdout
    assert 'max_iters' in refused(run('train.py', *args, f'--out={out}', '--resume=True', '--max_iters=9', ok=False))


STREAMS = ['--stream=4', '--stream_from=0.4', '--action_gain=0.5', '--cms_rate=5']


def test_streams_resume_exactly(tiny, tmp_path):
    """Streams begin in mid-run, carry a memory and write the CMS; stopping between and within changes nothing."""
    args = [*TINY, f'--data={tiny}', *STREAMS]
    run('train.py', *args, f'--out={tmp_path}/whole.pt')
    for stop in ('--stop_at=5', '--stop_at=0'):
        run('train.py', *args, f'--out={tmp_path}/parts.pt', f'--resume={(tmp_path / "parts.pt").exists()}', stop)
    assert same(tmp_path / 'whole.pt', tmp_path / 'parts.pt')
    with open(tmp_path / 'whole.csv', newline='') as f:
        rows = [row for row in csv.DictReader(f) if row['loss']]
    places = [f'jump_{i}' for i in (1, 2, 3, 4)]
    assert [all(row[p] for p in places) for row in rows] == [False] * 3 + [True] * 3
    assert sum(float(rows[-1][p]) for p in places) / 4 == pytest.approx(float(rows[-1]['jump']))
    trained_rates = [v for k, v in weights(tmp_path / 'whole.pt').items() if k.endswith('levels.0.log_rates.gain')]
    assert all(v != 0 for v in trained_rates)                          # the rates of the writes are learned, too


def test_streams_on_processes_and_micro_batches(tiny, tmp_path):
    args = [*TINY, f'--data={tiny}', *STREAMS, '--stream_from=0', '--stream=2', '--max_iters=2', '--seed=3']
    run('train.py', *args, f'--out={tmp_path}/one.pt', '--accumulation=2')
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    run('train.py', *args, f'--out={tmp_path}/ddp.pt', launcher=torchrun)
    assert same(tmp_path / 'one.pt', tmp_path / 'ddp.pt', atol=2e-4)


def test_bad_streams_are_one_line(tiny, tmp_path):
    args = [*TINY, f'--data={tiny}', f'--out={tmp_path}/x.pt']
    assert 'set stream > 1' in refused(run('train.py', *args, '--action_gain=0.5', ok=False))
    assert 'multiple of' in refused(run('train.py', *args, '--stream=3', ok=False))
    assert 'no CMS levels' in refused(run('train.py', *args, '--model=vit', '--stream=2', '--cms_rate=1', ok=False))
    assert 'whole numbers' in refused(run('train.py', *args, '--cms_periods=1,x', ok=False))
    assert 'more often' in refused(run('train.py', *args, '--cms_periods=0,4', ok=False))
    assert 'adapts' in refused(run('train.py', *args, '--adapts=key', ok=False))


def test_only_matrices_decay(tiny, tmp_path):
    """Known mistake 14: decay by role. With no gradient to speak of, decay alone moves the matrices and nothing else."""
    args = [*TINY, f'--data={tiny}', '--max_iters=1', '--warmup=0', '--decay=0', '--learning_rate=0.5']
    run('train.py', *args, '--weight_decay=0', f'--out={tmp_path}/without.pt')
    run('train.py', *args, '--weight_decay=1', f'--out={tmp_path}/with.pt')
    plain, decayed = weights(tmp_path / 'without.pt'), weights(tmp_path / 'with.pt')
    moved = {name for name in plain if not torch.equal(plain[name], decayed[name])}
    linear = {name for name, w in plain.items() if w.dim() == 2 and name.endswith('.weight')}
    assert moved == linear
    assert {f'predictor_blocks.0.titan.{name}' for name in ('alpha_bias', 'eta_bias', 'memory', 'conv.weight')} <= set(plain) - moved


def test_the_rate_rises_from_its_start_stays_and_falls_to_zero(tiny, tmp_path):
    run('train.py', *TINY, f'--data={tiny}', '--max_iters=20', '--start_rate=1e-4', '--learning_rate=1e-3', '--warmup=0.25',
        '--decay=0.25', f'--out={tmp_path}/x.pt')
    with open(tmp_path / 'x.csv', newline='') as f:
        rates = [float(row['learning_rate']) for row in csv.DictReader(f) if row['learning_rate']]
    steps = [1e-4 + 9e-4 * (i + 1) / 6 for i in range(5)]
    assert rates == pytest.approx(steps + [1e-3] * 11 + [8e-4, 6e-4, 4e-4, 2e-4])
    args = [*TINY, f'--data={tiny}', f'--out={tmp_path}/y.pt', '--start_rate=0.1']
    assert 'learning_rate' in refused(run('train.py', *args, ok=False))


def test_starting_from_another_checkpoint(tiny, trained, tmp_path):
    run('train.py', *TINY, f'--data={tiny}', '--max_iters=1', f'--init_from={trained["hope"]}', '--learning_rate=1e-9',
        '--split=fit_B', f'--out={tmp_path}/x.pt')
    assert same(tmp_path / 'x.pt', trained['hope'], atol=1e-6)
    line = refused(run('train.py', *TINY, f'--data={tiny}', '--model=vit', f'--init_from={trained["hope"]}',
                       f'--out={tmp_path}/y.pt', ok=False))
    assert 'init_from' in line


def test_another_seed_gives_another_result(tiny, trained, tmp_path):
    run('train.py', *TINY, f'--data={tiny}', f'--out={tmp_path}/x.pt', '--seed=2')
    assert not same(tmp_path / 'x.pt', trained['hope'], atol=1e-3)


def test_accumulation_and_processes_change_nothing(tiny, tmp_path):
    """One process, two micro-batches, two processes: the same clips, so the same step but for rounding."""
    args = [*TINY, f'--data={tiny}', '--model=vit', '--max_iters=3']
    run('train.py', *args, f'--out={tmp_path}/one.pt')
    run('train.py', *args, f'--out={tmp_path}/two.pt', '--accumulation=2')
    assert same(tmp_path / 'one.pt', tmp_path / 'two.pt', atol=2e-4)
    args.append(f'--out={tmp_path}/ddp.pt')
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    assert '2 processes' in run('train.py', *args, '--stop_at=2', launcher=torchrun).stdout
    assert run('train.py', *args, '--resume=True', launcher=torchrun).stdout.count('finished') == 1
    assert same(tmp_path / 'one.pt', tmp_path / 'ddp.pt', atol=2e-4)
    assert 'multiple of' in refused(run('train.py', *args, f'--out={tmp_path}/x.pt', '--accumulation=3', ok=False))


def test_the_log_says_what_runs(tiny, tmp_path):
    out = run('train.py', *TINY, f'--data={tiny}', '--out=x.pt', cwd=tmp_path).stdout
    for words in ('parameters', '40 tokens per clip', '48 training clips', 'cpu', 'copy baseline', 'λ 0.20', 'λ 0.80',
                  'clips/s', 'left', 'below copy', 'finished'):
        assert words in out, words
    assert max(map(len, out.splitlines())) <= 100


def test_rollout_is_the_other_second_loss(tiny, tmp_path):
    out = run('train.py', *TINY, f'--data={tiny}', '--loss=rollout', f'--out={tmp_path}/x.pt').stdout
    assert 'rollout' in out and 'jump' not in out
    assert hope.load(str(tmp_path / 'x.pt'))[1]['loss'] == 'rollout'


def test_a_non_finite_step_stops_before_the_optimiser(tiny, tmp_path):
    args = [*TINY, f'--data={tiny}', f'--out={tmp_path}/x.pt', '--warmup=0', '--learning_rate=1e30']
    run('train.py', *args, '--stop_at=1')
    before = (tmp_path / 'x.pt').read_bytes()
    line = refused(run('train.py', *args, '--resume=True', ok=False))
    assert 'step 2' in line and 'not finite' in line
    assert (tmp_path / 'x.pt').read_bytes() == before


def test_bad_requests_are_one_line(tiny, tmp_path):
    args = [*TINY, f'--data={tiny}', f'--out={tmp_path}/x.pt']
    assert 'at most 7' in refused(run('train.py', *args, '--jump_last=8', ok=False))
    assert 'no data set at' in refused(run('train.py', *args, f'--data={tmp_path}/none', ok=False))
    assert 'multiple of heads' in refused(run('train.py', *args, '--width=25', ok=False))
    if not torch.cuda.is_available():
        assert 'no such device' in refused(run('train.py', *args, '--device=cuda', ok=False))
    assert 'allowed are auto' in refused(run('train.py', *args, '--device=tpu', ok=False))
    assert not list(tmp_path.iterdir())
