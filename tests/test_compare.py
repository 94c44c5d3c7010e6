"""compare.py: figures that mean something, and tables and pictures of several finished runs."""
import csv
import json
import os
import re

import numpy as np
import pytest
from conftest import fake_results, refused, run

import compare


@pytest.fixture(scope='module')
def three(tmp_path_factory):
    """The folders of three runs, the second with a gap that is not to be seen."""
    folder = tmp_path_factory.mktemp('runs')
    return [fake_results(folder / f'aba_{seed}', seed=seed) for seed in range(3)]


def shares(frozen, bound, adapted, blank=(0.05, 0.055), known=None, noise=0.001):
    """The shares of a row of losses (A, B); frozen, bound, blank and known likewise."""
    rng = np.random.default_rng(0)

    def row(model, method, levels):
        loss = np.repeat([levels[0], levels[1], levels[0]], 50) + rng.normal(0, noise, 150)
        return {'model': model, 'method': method, 'loss': loss.tolist()}
    rows = [row('', 'blank', blank), row('HOPE', 'frozen', frozen), row('HOPE', 'memory', adapted)]
    if bound:
        rows.append(row('oracle', 'frozen', bound))
    if known:
        rows.append(row('HOPE', 'push known', known))
    return compare.shares(rows[2], rows[1], rows)


def test_a_share_is_given_where_it_means_something():
    good = shares((0.01, 0.07), (0.06, 0.02), (0.01, 0.03), known=(0.01, 0.03))
    assert good == {'gap_closed': pytest.approx(0.8, abs=0.02), 'of_known': pytest.approx(1, abs=0.02)}
    assert shares((0.01, 0.07), None, (0.01, 0.04)) == {'way_back': pytest.approx(0.5, abs=0.02)}


@pytest.mark.parametrize('why, levels', [
    ('a model that has learned nothing', dict(frozen=(0.06, 0.07), bound=(0.06, 0.02), adapted=(0.06, 0.03))),
    ('an oracle worse than an empty scene', dict(frozen=(0.01, 0.07), bound=(0.06, 0.06), adapted=(0.01, 0.03))),
    ('an oracle that is worse than the model', dict(frozen=(0.01, 0.02), bound=(0.06, 0.03), adapted=(0.01, 0.02))),
    ('a gap of 4 %', dict(frozen=(0.01, 0.05), bound=(0.06, 0.048), adapted=(0.01, 0.049))),
    ('a gap within the noise', dict(frozen=(0.01, 0.04), bound=(0.06, 0.037), adapted=(0.01, 0.038), noise=0.02)),
    ('no loss to come back from', dict(frozen=(0.01, 0.0101), bound=None, adapted=(0.01, 0.01))),
    ('a known push of no use', dict(frozen=(0.01, 0.05), bound=(0.06, 0.05), adapted=(0.01, 0.04), known=(0.01, 0.05))),
])
def test_a_share_of_nothing_stays_empty(why, levels):
    assert shares(**levels) == {}


def compared(tmp_path, *args, **more):
    return run('compare.py', *args, f'--out={tmp_path}/compare', **more)


def test_several_runs(three, tmp_path):
    """Means and deviations of the figures, in every file; the pictures are there."""
    done = compared(tmp_path, *three, '--labels=HOPE memory=Ours & only,ViT-AC LN-TTA=TTA', pictures=True)
    folder = tmp_path / 'compare'
    assert set(compare.FILES) <= set(os.listdir(folder))
    assert all(os.path.getsize(folder / file) > 5000 for file in ('results.pdf', 'results.png'))
    assert open(folder / 'results.pdf', 'rb').read(5) == b'%PDF-'
    memories = [compare.row_of(compare.read_results(one)['rows'], 'HOPE', 'memory') for one in three]
    gaps = [row['figures']['gap_closed'] for row in memories]
    table = (folder / 'table.txt').read_text()
    assert table in done.stdout
    lines = table.splitlines()
    ours = next(i for i, line in enumerate(lines) if line.startswith('Ours & only'))
    assert f'{np.mean(gaps):.0%}' in lines[ours] and '±' in lines[ours + 1]
    assert f'{np.std(gaps, ddof=1):.0%}' in lines[ours + 1]
    # The plan's own rate keeps its row; the others' rates are listed.
    assert 'ViT-AC LN-TTA 0.0001' in table and 'Rates of TTA: 0.003, 1.003, 2.003.' in table
    with open(folder / 'compare.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    found = [float(row['value']) for row in rows if (row['row'], row['figure']) == ('Ours & only', 'gap_closed')]
    assert found == pytest.approx(gaps) and {row['run'] for row in rows} == set(three)
    assert len({(row['run'], row['row'], row['figure']) for row in rows}) == len(rows)


def test_latex(three):
    """Every line has as many cells, what LaTeX would read as a command is escaped, and mathematics is closed."""
    found = [compare.read_results(folder) for folder in three]
    text = compare.latex_table(found, compare.grouped(found, {'HOPE memory': 'Ours & only_1 100%'}))
    lines = text.splitlines()
    assert lines[0] == r'\begin{tabular}{l' + 'r' * 8 + '}' and lines[-1] == r'\end{tabular}'
    cells = [line for line in lines if line.endswith(r'\\')]
    assert {len(re.findall(r'(?<!\\)&', line)) for line in cells} == {8} and len(cells) == 1 + 8
    assert r'Ours \& only\_1 100\%' in text and r'$A$' not in text
    assert all(line.count('$') % 2 == 0 and not re.search(r'(?<!\\)[%#_](?!1\$|2\$)', line) for line in lines)
    assert re.search(r'\$9\d \\pm \d\\,\\%\$', text)


def test_one_run_is_that_run(three, tmp_path):
    """Rates stand in the names, as in the run's own table, and nothing is averaged."""
    compared(tmp_path, three[0], '--methods=frozen,LN-TTA')
    table = (tmp_path / 'compare' / 'table.txt').read_text()
    assert '±' not in table and 'memory' not in table
    assert 'ViT-AC LN-TTA 0.003' in table and 'Rate of ViT-AC LN-TTA: 0.003, as given; not tuned.' in table


def test_what_was_made_of_the_same_runs_is_made_again(three, tmp_path):
    compared(tmp_path, *three)
    before = {f.name: open(f, 'rb').read() for f in os.scandir(tmp_path / 'compare')}
    compared(tmp_path, *three[::-1])
    compared(tmp_path, *three)
    assert 'of other runs' in refused(compared(tmp_path, *three[:2], ok=False))
    assert before == {f.name: open(f, 'rb').read() for f in os.scandir(tmp_path / 'compare')}


def test_never_and_missing_figures():
    """A mean over runs that did not all get there would be a lie."""
    rows = [{'figures': {'t50': 3, 'gap_closed': 0.5}}, {'figures': {'t50': None}}, {'figures': {'t50': 5}}]
    assert compare.mean_and_deviation(rows, 't50') == ('2 of 3', None)
    assert compare.mean_and_deviation(rows[1:2], 't50') == ('never', None)
    assert compare.mean_and_deviation(rows, 'gap_closed') == (None, None)
    assert compare.mean_and_deviation(rows[::2], 't50') == (4, pytest.approx(2 ** 0.5))


def test_a_rate_on_the_edge_is_said(tmp_path):
    results = json.load(open(os.path.join(fake_results(tmp_path / 'aba'), 'results.json')))
    row = compare.row_of(results['rows'], 'ViT-AC', 'LN-TTA')
    row['rate_from'], results['tuned_on'] = 'tuned', ['C']
    results['tuning'] = {'ViT-AC LN-TTA': {'0.003': 1.0, '0.01': 2.0, '0.03': 3.0}}
    warning = 'Warning: 0.003 lies on the edge of them; a rate beyond may be better.'
    assert compare.rate_lines(results) == ['Rate of ViT-AC LN-TTA tuned on C among 0.003, 0.01, 0.03.', warning]
    row['rate'] = 0.01
    assert warning not in compare.rate_lines(results)
