"""report.py: figures by hand, intervals, paired tests, tables and pictures."""
import itertools
import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

import data
import report
from support import plots

N = 50  # clips a phase
AGES = [0.25, *[0.0] * 10, 0.75]
LEVELS = {'copy': (0.06, 0.09), 'HOPE frozen': (0.01, 0.07), 'HOPE world head': (0.01, 0.02),
          'ViT-AC frozen': (0.01, 0.07), 'ViT-AC LN-TTA': (0.01, 0.04), 'oracle frozen': (0.06, 0.015)}


def row_of(name, loss, seed=1, **more):
    *model, method = name.split(' ', 1)
    return dict(rate=None, rate_from='', tried=None, metres=None, seconds=[0.002], probes={}, diagnostics=[{}],
                planning=None, model=''.join(model), method=method, seed=seed, loss=loss.tolist()) | more


def write_run(folder, rows, domains='ABA', **more):
    """A finished run of adapt.py, of N clips a phase → its folder."""
    phases = list(domains)
    about = dict(config={'data': 'none'}, phases=phases, labels=phases, domains=phases, clips=N, loss='jump',
                 streams=len(rows[0]['loss']), target_steps=[6, 7, 8], tuned_on='C',
                 probe_at=[N * i for i in range(len(phases) + 1)], rows=[])
    folder.mkdir()
    for row in rows:
        file = str(len(about['rows']))
        about['rows'].append(f'{file}.json')
        (folder / f'{file}.json').write_text(json.dumps(row | {'file': file}))
    (folder / 'run.json').write_text(json.dumps(about | more))
    return str(folder)


def noisy(seeds=1, domains='ABA', shift=0, **more):
    """The rows of LEVELS, with a little noise."""
    rng = np.random.default_rng(shift)
    rows = []
    for name, seed in itertools.product(LEVELS, range(1, seeds + 1)):
        loss = levelled(*[LEVELS[name][domain != domains[0]] for domain in domains])
        loss = loss + rng.normal(0, 0.001) + rng.normal(0, 0.001, loss.shape)
        probes = {domain: rng.normal(0.05, 0.01, (1, len(domains) + 1)).tolist() for domain in domains}
        reported = {'surprise': 1.0, 'ages': AGES} if 'world head' in name else {'drift, block 1': 2.0}
        more['diagnostics'] = [{} if name == 'copy' else reported] * loss.size
        rows.append(row_of(name, loss, seed, probes=probes, **more))
    return rows


def levelled(*levels):
    return np.repeat(levels, N)[None]


def figures_of(folder, rows, **more):
    _, groups = report.read([write_run(folder, rows, **more)])
    return groups['HOPE world head'][0]['figures']


def test_a_b_a_by_hand(tmp_path):
    loss = levelled(0.02, 0.03, 0.02)
    loss[0, 50:70] = loss[0, 100:105] = 0.07
    memory = row_of('HOPE world head', loss, metres=levelled(0.01, 0.03, 0.02).tolist(),
                    probes={'A': [[1.0, 2.0, 5.0, 3.0]], 'B': [[7.0, 7.0, 4.0, 6.0]]})
    levels = {'oracle frozen': (0, 0.02, 0), 'HOPE frozen': (0.01, 0.07, 0)}
    rows = [row_of(name, levelled(*level)) for name, level in levels.items()] + [memory]
    found = figures_of(tmp_path / 'run', rows)
    assert {name: value for name, [value] in found.items()} == pytest.approx({
        'B_first': (20 * 0.07 + 5 * 0.03) / 25, 'B_last': 0.03, 'phase 1': 0.02, 'phase 2': 0.046,
        'phase 3': 0.025, 'cm_B': 3, 'ms': 2, 'forgetting': 5 - 2, 'return_cost': (5 * 0.07 + 20 * 0.02) / 25,
        # Windows of 10 clips: half of them from clip 16 on.
        'gap_closed': 0.024 / 0.05, 't50': 16})
    assert figures_of(tmp_path / 'no_oracle', rows[1:])['way_back'] == pytest.approx(0.024 / 0.06)
    # Worse than copying, it has come no part of the way.
    rows.append(row_of('copy', levelled(1, 0.04, 1)))
    assert 'gap_closed' not in figures_of(tmp_path / 'worse', rows)


def test_other_phases(tmp_path):
    rows = [row_of('HOPE frozen', levelled(1, 1, 1)), row_of('HOPE world head', levelled(1, 1.3, 1))]
    assert figures_of(tmp_path / 'harm', rows, domains='AAA')['harm'] == pytest.approx([0.1])
    loss = levelled(0.01, 0.02, 0.02, 0.03, 0.03)
    loss[0, 50:70] = 0.07
    rows = [row_of('HOPE frozen', levelled(0.01, 0.07, 0.01, 0.07, 0.01)), row_of('HOPE world head', loss)]
    found = figures_of(tmp_path / 'savings', rows, domains='ABABA')
    assert found['savings'] == pytest.approx([1 / 20]) and found['return_cost'] == pytest.approx([0.015])


def test_never_and_intervals_over_seeds_or_over_the_streams_of_one():
    still = np.full((2, N), 0.07)
    gain = np.array([[0.0005], [0.001]])
    assert report.clips_to(0.5, still - gain, still) == pytest.approx([np.nan, 1], nan_ok=True)
    by = pd.MultiIndex.from_tuples([('run', seed) for seed in (1, 1, 2, 2, 3, 3)], names=['run', 'seed'])
    B = pd.Series([0, 2, 1, 3, 2, 4], by)
    assert report.cell(B.where(B > 1), '.0f') == '4/6' and report.cell(B.where(B > 9), '.0f') == 'never'
    # t(0.975, 2) = 4.302653 and t(0.975, 1) = 12.706205, of the tables.
    assert report.cell(B, '.4f') == f'2.0000±{4.302653 / 3 ** 0.5:.4f}'
    assert report.cell(B[:2], '+.3f') == '+1.000±12.706' and report.cell(B[:1], '.0f') == '0'


def test_several_runs_are_seeds_and_are_compared_in_pairs(tmp_path, capsys):
    out = tmp_path / 'out'
    report.write([write_run(tmp_path / f'run{i}', noisy(shift=i)) for i in range(3)], out)
    table, lines = (out / 'table.txt').read_text(), pd.read_csv(out / 'figures.csv')
    gap = lines[lines.figure == 'gap_closed'].pivot(index='run', columns='row', values='value')
    test = stats.ttest_1samp(gap['HOPE world head'] - gap['ViT-AC LN-TTA'], 0)
    low, high = test.confidence_interval()
    assert f'[{low:+.4f}, {high:+.4f}], p = {test.pvalue:.2g}' in table and '3 seeds, 1 stream,' in table
    assert table in capsys.readouterr().out and 'ttest_rel' in table
    cells = [line.count('&') for line in (out / 'table.tex').read_text().splitlines() if '&' in line]
    assert len(cells) == 1 + len(LEVELS) and len(set(cells)) == 1


@pytest.mark.parametrize('domains', ['ABA', 'AAA', 'A', 'ABAB', ['A', 'friction', 'ice', 'A', 'mass']])
def test_a_table_for_any_phases_fits_a_terminal(domains, tmp_path):
    planning = [{'phase': label, 'distance': [0.01, 0.03, 0.2], 'ms': 9.0} for label in domains]
    rows = noisy(2, domains, planning=planning, rate=0.003, rate_from='tuned', tried={'0.003': 1.0, '1': 2.0})
    text, _ = report.tables(*report.read([write_run(tmp_path / 'run', rows, domains)]))
    assert max(len(line) for line in text.splitlines() if ':' not in line) <= 100
    assert 'Warning: that of HOPE world head lies on the edge' in text
    assert '33%±0% 67%±0% 3.0±0.0' in ' '.join(text.split())


def test_runs_that_cannot_be_compared_are_refused(tmp_path, capsys):
    runs = [write_run(tmp_path / name, noisy(domains=name), name) for name in ('ABA', 'ABAB')]
    for folders, why in (runs, 'phases ='), ([str(tmp_path)], 'run.json'):
        with pytest.raises(SystemExit):
            report.read(folders)
        assert why in capsys.readouterr().err


def test_pictures(tiny, tmp_path):
    shown = [('test_A', 0), ('test_A', 1), ('test_B', 0), ('test_B', 1), ('test_B', 2)]
    rows = noisy(metres=levelled(1, 2, 1).tolist())
    folder = write_run(tmp_path / 'run', rows, config={'data': tiny}, shown=shown)
    z = np.stack([data.Clips(tiny, split)[index][0] for split, index in shown])
    for i in range(len(LEVELS)):
        np.savez(tmp_path / 'run' / f'{i}.npz', numbers=range(48, 53), predicted=z[:, 5:].astype(np.float16))
    report.write([folder], folder)
    drawn = plots.shown_clips(*report.read([folder]))
    came = drawn['pictures']['what came']
    assert came.shape == (5, 4, 32, 32, 3)
    assert drawn['pictures']['HOPE world head'] == pytest.approx(came, abs=0.01)
    assert drawn['clips'][1:3] == ['A, clip 50', 'B, clip 1'] and drawn['places'].shape == (5, 4, 2)
    assert Image.open(tmp_path / 'run' / 'switch.gif').n_frames == 5 * 4
    for name, side in ('results', 600), ('diagnostics', 500):
        picture = Image.open(tmp_path / 'run' / f'{name}.png')
        assert min(picture.size) > side and np.std(picture) > 10


def test_ages_of_a_world_are_drawn_as_an_image(tmp_path):
    """Those of the group that reports them: clips from left to right, ages upwards, the mean of seeds."""
    first, groups = report.read([write_run(tmp_path / 'run', noisy(seeds=2))])
    for clip in groups['HOPE world head'][1]['diagnostics'][:N]:
        clip['ages'] = AGES[::-1]
    ax = Figure().subplots()
    plots.draw_ages(ax, first, groups, 'ages')
    image = ax.images[0].get_array()
    assert image.shape == (12, 3 * N) and (image[:, N:].T == AGES).all() and (image[[0, -1], :N] == 0.5).all()
    assert ax.get_yticklabels()[-1].get_text() == 'home' and ax.get_xlim() == (0, 3 * N)
