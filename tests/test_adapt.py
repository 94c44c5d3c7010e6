"""The A→B→A protocol: scored before shown, frozen where the rate is 0, and every file that it promises."""
import csv
import json
import os
import runpy
import sys

import pytest
import torch
from conftest import ROOT, refused, run

FEW = ['--clips=6', '--probe_clips=6', '--probe_every=6', '--tune_clips=1']


@pytest.fixture(scope='module')
def adapt(tiny, trained, tmp_path_factory):
    """The globals of a finished comparison of both checkpoints, to call its functions; 'out' is its folder."""
    out = tmp_path_factory.mktemp('aba')
    argv, sys.argv = sys.argv, ['adapt.py', f'--ckpt={trained["hope"]},{trained["vit"]}', f'--data={tiny}', f'--out={out}', *FEW]
    hook = sys.excepthook
    try:
        return runpy.run_path(os.path.join(ROOT, 'adapt.py'))
    finally:
        sys.argv, sys.excepthook = argv, hook


METHODS = [('LN-TTA', 1e-2), ('action TTA', 1e-2), ('full TTA', 1e-2), ('memory', None), ('CMS', 1.0), ('memory + CMS', 1.0)]


def losses(adapt, method, rate, stream):
    return adapt['run_stream'](adapt['checkpoints'][0], method, rate, stream)['loss']


@pytest.mark.parametrize('method, rate', METHODS)
def test_a_clip_is_scored_before_it_is_shown(adapt, method, rate):
    """Known mistake 8: changing clip t beyond its target steps, or later clips, leaves the losses up to t untouched."""
    z, a = adapt['stream']
    before, t = losses(adapt, method, rate, (z, a)), 5
    z2, a2 = z.clone(), a.clone()
    z2[t, 1:5] += torch.randn_like(z2[t, 1:5])           # steps 2-5 of clip t are no targets
    z2[t + 1:] = z2[t + 1:].flip(0)
    a2[t + 1:] += 1
    after = losses(adapt, method, rate, (z2, a2))
    assert after[:t + 1] == before[:t + 1]
    assert after[t + 1:] != before[t + 1:]


@pytest.mark.parametrize('method, rate', METHODS)
def test_every_method_learns_from_the_look_back(adapt, method, rate):
    """The loss of clip t depends on what was shown at t-1."""
    z, a = adapt['stream']
    z2 = z.clone()
    z2[3, 1:] = z[4, 1:]
    assert losses(adapt, method, rate, (z2, a))[4:] != losses(adapt, method, rate, (z, a))[4:]


@pytest.mark.parametrize('method', ['LN-TTA', 'action TTA', 'full TTA'])
def test_rate_zero_is_frozen_bit_for_bit(adapt, method):
    assert losses(adapt, method, 0.0, adapt['stream']) == losses(adapt, 'frozen', None, adapt['stream'])


def test_cms_at_rate_zero_is_without_cms(adapt):
    """Written weights run through batched products, so the last bit may differ."""
    for method, without in (('memory + CMS', 'memory'), ('CMS', 'frozen')):
        assert losses(adapt, method, 0.0, adapt['stream']) == pytest.approx(losses(adapt, without, None, adapt['stream']), rel=1e-5)


def test_a_kept_memory_goes_on_where_it_stopped(adapt):
    """A stream cut in two, with the state handed in, is the uncut stream; without it the second half differs."""
    z, a = adapt['stream']
    c, whole = adapt['checkpoints'][0], losses(adapt, 'memory + CMS', 1.0, adapt['stream'])
    first = adapt['run_stream'](c, 'memory + CMS', 1.0, (z[:7], a[:7]))
    second = adapt['run_stream'](c, 'memory + CMS', 1.0, (z[7:], a[7:]), start=first['state'])
    assert not any(x.requires_grad for x in first['state']['cms']['changes'].values())  # no graph that grows with the stream
    assert first['loss'] + second['loss'] == whole
    assert adapt['run_stream'](c, 'memory + CMS', 1.0, (z[7:], a[7:]))['loss'] != whole[7:]


def test_diagnostics(adapt):
    """Every block's memory and every CMS level report along the stream; what is not asked for is not computed."""
    row = adapt['run_stream'](adapt['checkpoints'][0], 'memory + CMS', 1.0, adapt['stream'])
    last = row['diagnostics'][-1]
    for b in (1, 2):
        assert 0 < last[f'surprise, block {b}'] < 2 and 0 < last[f'write strength, block {b}'] < 1
        assert 0 < last[f'gate, block {b}'] < 1 and 0 < last[f'retention, block {b}'] < 1
        assert last[f'drift, block {b}'] > 0 and last[f'write norm, block {b}'] > 0
    assert [last[f'writes, CMS every {c}'] for c in (1, 4, 16)] == [18, 4, 1]
    z, targets = adapt['stream'][0][-1], adapt['checkpoints'][0]['targets']
    assert last['surprise'] == pytest.approx(row['loss'][-1] / (z[targets] - z[0]).abs().mean().item())  # over what copying loses
    assert last['drift, CMS every 1'] > 0
    assert 'drift, block 1' not in adapt['run_stream'](adapt['checkpoints'][0], 'CMS', 1.0, adapt['stream'])['diagnostics'][-1]


def test_a_run_leaves_the_checkpoint_untouched(adapt):
    before = {k: v.clone() for k, v in adapt['checkpoints'][0]['predictor'].state_dict().items()}
    for method, rate in METHODS:
        losses(adapt, method, rate, adapt['stream'])
    after = adapt['checkpoints'][0]['predictor'].state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_ln_tta_changes_layer_norms_only(adapt):
    net = adapt['checkpoints'][1]['predictor']
    chosen = {id(p) for p in adapt['layer_norm_parameters'](net)}
    assert {n for n, p in net.named_parameters() if id(p) in chosen} == {n for n, _ in net.named_parameters() if 'norm' in n}


def test_one_clip_or_many_score_the_same(adapt):
    """A probe set is scored in one batch, the stream clip by clip: the same numbers."""
    c, (z, a) = adapt['checkpoints'][0], adapt['stream']
    with torch.no_grad():
        memory = c['predictor'](z[:1], a[:1])[1]
        many = adapt['predict'](c['predictor'], 'jump', c['targets'], z[:4], a[:4], memory)[1]
        each = [adapt['predict'](c['predictor'], 'jump', c['targets'], z[i:i + 1], a[i:i + 1], memory)[1] for i in range(4)]
    torch.testing.assert_close(many, torch.cat(each))


def test_tuning_never_touches_b(adapt):
    assert 'B' not in adapt['TUNE_ON'] and set(adapt['TUNE_ON']) <= set(adapt['clip_data'].DOMAINS)
    assert len({len(grid) for grid in adapt['GRIDS'].values()}) == 1  # the same number of trials for every method


def test_results(adapt):
    out = adapt['out']
    results = json.load(open(os.path.join(out, 'results.json')))
    names = [' '.join(filter(None, (r['model'], r['method']))) for r in results['rows']]
    hope, vit = ('memory', 'CMS', 'memory + CMS'), ('LN-TTA', 'action TTA', 'full TTA')
    assert names == ['copy', 'blank', *(f'HOPE {m}' for m in ('frozen', 'LN-TTA', *hope)),
                     *(f'ViT-AC {m}' for m in ('frozen', 'LN-TTA', *vit))]
    with open(os.path.join(out, 'results.csv')) as f:
        rows = list(csv.reader(f))
    assert len(rows) == 1 + 18 and [r[1] for r in rows[1:]] == ['A1'] * 6 + ['B'] * 6 + ['A2'] * 6
    for column, row in enumerate(results['rows'], 3):
        assert len(row['loss']) == 18
        assert [float(r[column]) for r in rows[1:]] == pytest.approx(row['loss'], abs=1e-6)
        assert row['figures']['B'] == pytest.approx(sum(row['loss'][6:12]) / 6)
    for file in ('results.png', 'predictions.png'):
        assert os.path.getsize(os.path.join(out, file)) > 5000
    table = open(os.path.join(out, 'table.txt')).read()
    assert 'HOPE memory + CMS' in table and max(map(len, table.splitlines())) <= 100


def test_bad_requests_are_one_line(tiny, trained, tmp_path):
    args = [f'--ckpt={trained["vit"]}', f'--data={tiny}', f'--out={tmp_path}/aba']
    assert 'would prove nothing' in refused(run('adapt.py', *args, '--tune_on=B', ok=False))
    assert 'lower --clips' in refused(run('adapt.py', *args, '--clips=200', ok=False))
    assert 'no data set at' in refused(run('adapt.py', *args, f'--data={tmp_path}/none', ok=False))
    other = tmp_path / 'other'
    run('prepare.py', f'--name={other}', '--size=32', '--dim=12', '--clips=4', '--test_clips=24')
    assert 'features of size 24' in refused(run('adapt.py', *args, f'--data={other}', *FEW, ok=False))
    assert 'allowed are' in refused(run('adapt.py', *args, '--methods=frozen,TTA', ok=False))
    assert not (tmp_path / 'aba').exists()


def test_a_rollout_checkpoint_is_scored_by_rollout(tiny, trained, tmp_path):
    from conftest import TINY
    run('train.py', *TINY, f'--data={tiny}', '--loss=rollout', '--max_iters=2', f'--out={tmp_path}/x.pt')
    out = run('adapt.py', f'--ckpt={tmp_path}/x.pt', f'--data={tiny}', f'--out={tmp_path}/aba', *FEW, '--tune_on=').stdout
    assert 'rollout L1' in out and 'tuned' not in out
    assert 'different losses' in refused(run('adapt.py', f'--ckpt={tmp_path}/x.pt,{trained["vit"]}', f'--data={tiny}',
                                             f'--out={tmp_path}/aba2', *FEW, ok=False))


def test_the_oracle_is_the_bound_that_gaps_are_measured_against(tiny, trained, tmp_path):
    args = [f'--data={tiny}', *FEW, '--tune_on=', f'--out={tmp_path}/aba']
    run('adapt.py', f'--ckpt={trained["hope"]}', f'--oracle={trained["vit"]}', '--methods=frozen,memory', *args,
        f'--memory_out={tmp_path}/memory.pt')
    rows = {f"{r['model']} {r['method']}": r for r in json.load(open(tmp_path / 'aba' / 'results.json'))['rows']}
    assert list(rows) == [' copy', ' blank', 'HOPE frozen', 'HOPE memory', 'oracle frozen']
    b = slice(6, 12)
    frozen, memory, bound = (sum(rows[name]['loss'][b]) for name in ('HOPE frozen', 'HOPE memory', 'oracle frozen'))
    assert rows['HOPE memory']['figures']['gap_closed'] == pytest.approx((frozen - memory) / (frozen - bound))
    run('adapt.py', f'--ckpt={trained["hope"]}', '--methods=memory', *args, f'--memory_in={tmp_path}/memory.pt')
    again = json.load(open(tmp_path / 'aba' / 'results.json'))['rows'][-1]
    assert again['loss'][0] != rows['HOPE memory']['loss'][0]
