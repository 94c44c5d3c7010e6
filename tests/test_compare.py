"""compare.py: tables, files and pictures of finished runs, of one seed or several."""
import csv
import json
import os
import re

import numpy as np
import pytest
from conftest import fake_results, refused, run

import compare
import figures
from configurator import Refusal


@pytest.fixture(scope='module')
def three(tmp_path_factory):
    """The folders of three runs, the second with a gap that is not to be seen."""
    folder = tmp_path_factory.mktemp('runs')
    return [fake_results(folder / f'aba_{seed}', seed=seed) for seed in range(3)]


def compared(tmp_path, *args, **more):
    return run('compare.py', *args, f'--out={tmp_path}/compare', **more)


def table_of(*folders, **more):
    """The groups of finished runs, and the lines of their table."""
    found = [compare.read_results(folder) for folder in folders]
    groups = compare.grouped(found, **more)
    return groups, compare.format_table(found, groups).splitlines()


def line_of(lines, name):
    """The number of the first line that begins with a name."""
    return next(i for i, line in enumerate(lines) if line.startswith(name))


def test_several_runs(three, tmp_path):
    """Runs are further seeds: means and intervals of the figures, in every file; the pictures are there."""
    done = compared(tmp_path, *three, '--labels=HOPE memory=Ours & only,ViT-AC LN-TTA=TTA', pictures=True)
    folder = tmp_path / 'compare'
    assert set(compare.FILES) <= set(os.listdir(folder))
    assert all(os.path.getsize(folder / file) > 5000 for file in ('results.pdf', 'results.png'))
    assert open(folder / 'results.pdf', 'rb').read(5) == b'%PDF-'
    memories = [figures.row_of(compare.read_results(one)['rows'], 'HOPE', 'memory') for one in three]
    gaps = [row['figures']['gap_closed'] for row in memories]
    mean, low, high = figures.interval(gaps)
    table = (folder / 'table.txt').read_text()
    assert table in done.stdout
    lines = table.splitlines()
    ours = line_of(lines, 'Ours & only')
    assert f'{mean:.0%}' in lines[ours] and '±' in lines[ours + 1]
    assert f'{(high - low) / 2:.0%}' in lines[ours + 1]
    assert 'half the 95 % interval over 3 seeds' in table
    # The plan's own rate keeps its row; the others' rates are listed.
    assert 'ViT-AC LN-TTA 0.0001' in table and 'Rates of TTA: 0.003, 1.003, 2.003, as given' in table
    with open(folder / 'compare.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    found = [[float(row['value'])] for row in rows if (row['row'], row['figure']) == ('Ours & only', 'gap_closed')]
    assert found == pytest.approx(np.array(gaps)) and {row['run'] for row in rows} == set(three)
    keys = [tuple(row[name] for name in ('run', 'row', 'seed', 'stream', 'figure')) for row in rows]
    assert len(set(keys)) == len(rows)


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
    assert compare.escaped('A₁ B₂') == 'A$_1$ B$_2$'


def test_seeds_and_streams_of_one_run(tmp_path):
    """Rows of several seeds are one group with an interval over both, and the primary comparison is made."""
    folder = fake_results(tmp_path / 'aba', seeds=3, streams=4)
    groups, lines = table_of(folder)
    assert list(groups) == ['copy', 'blank', 'HOPE frozen', 'HOPE memory', 'ViT-AC frozen', 'ViT-AC LN-TTA',
                            'ViT-AC LN-TTA 0.0001', 'oracle frozen']
    assert [row['seed'] for row in groups['HOPE memory']] == [1, 2, 3]
    text = '\n'.join(lines)
    assert '95 % interval over 3 seeds x 4 streams' in text and ' ms' not in lines[0]
    gap = compare.compared(groups, compare.PAIRS[0])[2]['gap_closed']
    sides = [[row['figures']['gap_closed'] for row in groups[name]] for name in ('HOPE memory', 'ViT-AC LN-TTA')]
    assert gap == {**figures.versus(*sides), 'over': '3 seeds x 4 streams'}
    line = lines[line_of(lines, 'HOPE memory minus ViT-AC LN-TTA, gap closed')]
    mean, low, high = (100 * gap[key] for key in ('mean', 'low', 'high'))
    assert f'{mean:+.1f} [{low:+.1f}, {high:+.1f}] points, p < 0.001 (' in line and max(map(len, lines)) <= 100
    # HOPE LN-TTA and the ViT-AC's memory were not run.
    assert text.count(' minus ViT-AC') == 2
    groups, lines = table_of(fake_results(tmp_path / 'one_seed', streams=4))
    text = ' '.join(' '.join(lines).split())
    assert 'over 4 streams of one seed' in text and '(4 streams of one seed)' in text


def test_rows_are_paired_by_run_and_seed(three):
    """A seed that one of two rows lacks is in no comparison, and the order of the rows does not matter."""
    groups, _ = table_of(*three)
    expected = compare.compared(groups, compare.PAIRS[0])[2]
    turned = {name: rows[::-1] if name == 'HOPE memory' else rows for name, rows in groups.items()}
    again = compare.compared(turned, compare.PAIRS[0])[2]
    assert again['gap_closed']['mean'] == pytest.approx(expected['gap_closed']['mean'])
    assert again['gap_closed']['p'] == pytest.approx(expected['gap_closed']['p'], rel=0.5)
    fewer = {name: rows[1:] if name == 'HOPE memory' else rows for name, rows in groups.items()}
    assert compare.compared(fewer, compare.PAIRS[0])[2]['gap_closed']['over'] == '2 seeds'
    only_plan = {name: rows for name, rows in groups.items() if name != 'ViT-AC LN-TTA'}
    assert compare.compared(only_plan, compare.PAIRS[0]) is None


@pytest.mark.parametrize('phases, headings', [
    ('ABA', 'A1 B 1-25 return forget gap t50 ms'), ('AAA', 'A1 A2 A3 harm ms'), ('A', 'A harm ms'),
    ('ABAB', 'A1 B1 B2 1-25 return forget gap t50 saving ms'),
    (['A', 'friction', 'ice', 'A'], 'A1 fricti. ice 1-25 return forget gap t50 ms'),
])
def test_a_table_for_any_phases(phases, headings, tmp_path):
    """A column for each phase away from home, every line of the table within a terminal's 100 columns."""
    results = compare.read_results(fake_results(tmp_path / 'run', phases=phases, seeds=2))
    groups = compare.grouped([results])
    lines = compare.format_table([results], groups).splitlines()
    assert lines[0].split() == ['loss', 'on', 'the', 'stream', *headings.split()]
    assert max(map(len, lines[:lines.index('')])) <= 100 and max(map(len, lines)) <= 120
    assert any('ViT-AC LN-TTA, harm: ' in line for line in lines) == ('harm' in headings)
    tables = compare.latex_table([results], groups), compare.results_csv(results), compare.compare_csv(groups)
    assert all(tables)


def test_the_widest_table_of_a_b_a(tmp_path):
    """With metres, clips that slide far and the known push it still fits, with the names of all methods."""
    results = json.load(open(os.path.join(fake_results(tmp_path / 'aba', seeds=2), 'results.json')))
    results['beyond'] = [[0, 1] * 45]
    for row in list(results['rows']):
        row['metres'] = [[0.123] * 90]
        for method in {'memory': ('push known', 'Titan memory'), 'LN-TTA': ('action TTA',)}.get(row['method'], ()):
            results['rows'].append({**row, 'method': method, 'rate': 0.003, 'rate_from': 'given'})
    figures.add_figures(results)
    lines = compare.format_table([results], compare.grouped([results])).splitlines()
    assert lines[0].split()[4:] == 'A1 B within beyond 1-25 return forget gap known t50 cm ms'.split()
    assert max(map(len, lines)) <= 100 and '12.3' in lines[line_of(lines, 'HOPE memory')]
    assert any(line.startswith('cm: distance of the object') for line in lines)


def test_the_matrix_below_the_table(tmp_path):
    folder = fake_results(tmp_path / 'aba')
    results = json.load(open(os.path.join(folder, 'results.json')))
    row = figures.row_of(results['rows'], 'HOPE', 'memory')
    row['probes'] = {'A': [[0.01, 0.01, 0.052, 0.011]], 'B': [[0.07, 0.071, 0.021, 0.069]]}
    figures.add_figures(results)
    lines = compare.format_table([results], compare.grouped([results])).splitlines()
    title = line_of(lines, 'held-out clips')
    assert lines[title].split() == 'held-out clips of A of B forgot backward forward plastic'.split()
    line = lines[title + line_of(lines[title:], 'HOPE memory')]
    assert line.split()[2:] == '.010 .010 .052 .011 .070 .071 .021 .069 +0.025 -0.025 -0.001 +0.050'.split()


def test_files_of_a_run(tmp_path):
    """results.json holds everything but pictures, a stream's losses on one line; results.csv every loss and metre."""
    results = compare.read_results(fake_results(tmp_path / 'aba', seeds=2, streams=2))
    memory = figures.row_of(results['rows'], 'HOPE', 'memory', 2)
    memory['loss'][1][3], memory['rate'] = 0.12345678, 1e-9
    memory['metres'] = (np.array(memory['loss']) * 2).tolist()
    memory['shown'] = memory['state'] = object()
    text = compare.results_json(results)
    kept = json.loads(text)
    again = figures.row_of(kept['rows'], 'HOPE', 'memory', 2)
    assert again['loss'][1][3] == 0.123457 and again['rate'] == 1e-9 and not {'shown', 'state'} & set(again)
    assert set(again) == set(memory) - {'shown', 'state'} and set(kept) == set(results)
    assert sum(len(line) > 500 for line in text.splitlines()) == 2 * len(results['rows']) + 2
    rows = list(csv.reader(compare.results_csv(results).splitlines()))
    assert rows[0][:4] == ['stream', 'clip', 'phase', 'beyond_A'] and len(rows) == 1 + 2 * 90
    column = rows[0].index('HOPE memory 1e-09, seed 2')
    line = rows[1 + 90 + 3]
    assert line[:4] == ['2', '4', 'A1', ''] and float(line[column]) == 0.123457
    assert float(line[rows[0].index('HOPE memory 1e-09, seed 2 [m]')]) == 0.246914


def test_a_thousand_clips_stay_small(tmp_path):
    """5 seeds x 20 streams x 600 clips of a row are below 0.6 MB."""
    rows = [{'loss': np.random.default_rng(0).random((20, 600)).tolist(), 'rate': None}] * 5
    assert len(compare.results_json({'rows': rows})) < 600_000


def test_planning(tmp_path):
    results = json.load(open(os.path.join(fake_results(tmp_path / 'aba', seeds=3), 'results.json')))
    for row in results['rows']:
        if row['method'] == 'memory':
            near = [0.01] * (50 + 10 * row['seed']) + [0.04] * 20 + [0.3] * (130 - 10 * row['seed'])
            row['planning'] = [{'phase': label, 'distance': near, 'ms': 12.0} for label in results['labels']]
    figures.add_figures(results)
    groups = compare.grouped([results])
    lines = compare.format_table([results], groups).splitlines()
    assert lines[line_of(lines, 'choosing pushes'):] == compare.planning_table(results, groups).splitlines()
    at = line_of(lines, 'choosing pushes')
    _, low, high = figures.interval([[0.3], [0.35], [0.4]])
    assert lines[at + 1].split() == ['HOPE', 'memory', *['35%', '45%', '30.0'] * 3, '12']
    assert lines[at + 2].split() == ['±', *[f'{(high - low) / 2:.0%}'] * 6]
    assert max(map(len, lines[at:])) <= 100 and lines[at + 3] == '' and '200 goals' in lines[at + 4]
    # A single goal has no interval.
    one = {'HOPE memory': [{'planning': [{'phase': 'B', 'distance': [0.01], 'ms': 12.0}]}]}
    assert compare.planning_table(results, one).splitlines()[2].split() == ['±']


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
    rows = [{'figures': {'t50': [3], 'gap_closed': [0.5]}}, {'figures': {'t50': [None]}}, {'figures': {'t50': [5]}}]
    assert compare.mean_and_half(rows, 't50') == ('2/3', None)
    assert compare.mean_and_half(rows[1:2], 't50') == ('never', None)
    assert compare.mean_and_half(rows, 'gap_closed') == (None, None)
    mean, low, high = figures.interval([[3], [5]])
    assert compare.mean_and_half(rows[::2], 't50') == (4, (high - low) / 2) and mean == 4


def test_a_rate_on_the_edge_is_said(tmp_path):
    results = json.load(open(os.path.join(fake_results(tmp_path / 'aba', seeds=2), 'results.json')))
    rows = [row for row in results['rows'] if row['rate_from'] == 'given']
    for row, rate in zip(rows, (0.003, 0.01)):
        row['rate'], row['rate_from'], results['tuned_on'] = rate, 'tuned', ['C', 'scaled']
    tried = {'0.003': 1.0, '0.01': 2.0, '0.03': 3.0}
    results['tuning'] = {'ViT-AC LN-TTA': tried, 'ViT-AC LN-TTA, seed 2': tried}
    warning = 'Warning: 0.003 lies on the edge of them; a rate beyond may be better.'
    said = 'tuned on C, clips with scaled pushes among 0.003, 0.01, 0.03.'
    groups = compare.grouped([results])
    assert compare.rate_lines([results], groups) == ['', f'Rates of ViT-AC LN-TTA: 0.003, 0.01, {said}', warning]
    rows[0]['rate'] = 0.01
    assert warning not in compare.rate_lines([results], groups)
    one = {'ViT-AC LN-TTA 0.01': rows[:1]}
    assert compare.rate_lines([results], one) == ['', f'Rate of ViT-AC LN-TTA: 0.01, {said}']


def test_results_of_an_earlier_version_are_refused(tmp_path):
    folder = fake_results(tmp_path / 'aba')
    old = json.load(open(os.path.join(folder, 'results.json')))
    del old['streams']
    with open(os.path.join(folder, 'results.json'), 'w') as f:
        json.dump(old, f)
    with pytest.raises(Refusal, match=r'not what this version of adapt.py writes \(it has no streams\)'):
        compare.read_results(folder)
