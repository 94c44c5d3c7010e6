"""What came out of adapt.py: figures of every row, intervals, tables and pictures, in seconds.

    python report.py --runs=out/aba_1,out/aba_2 --out=out/both       rows of several runs count as more seeds

In names of figures A is home, the world of the first phase, and B all else. S streams, P phases of n clips.
"""
import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from configurator import configure, listed, refuse
from support import plots

runs = 'out/aba'         # folders of finished runs of adapt.py, separated by commas
out = 'out/tables'       # folder for tables and pictures
config = configure(globals()) if __name__ == '__main__' else {}

EARLY = 25               # clips at the start and at the end of a phase whose mean is a figure of its own
# Columns of the tables: figure, heading, format, and what it is.
COLUMNS = [
    ('B_first', '1-25', '.4f', 'the first 25 clips of each phase away from home'),
    ('B_last', 'last 25', '.4f', 'their last 25 clips'),
    ('return_cost', 'return', '+.3f', 'loss minus frozen loss on the first 25 clips back home'),
    ('forgetting', 'forget', '+.3f', 'loss on held-out clips of home after the first shift minus before it'),
    ('gap_closed', 'gap', '.0%', "share of the way from the own frozen loss away from home to the oracle's"),
    ('way_back', 'to A', '.0%', 'share of the way from the own frozen loss away from home to that at home'),
    ('t50', 't50', '.0f', 'clips to half of the own final gain (never: no gain of 1 %; 2/5: in two of five)'),
    ('savings', 'saving', '.2f', 'clips to 90 % of the final gain, second visit over first'),
    ('harm', 'harm', '+.4f', 'loss minus frozen loss where nothing changes'),
    ('cm_B', 'cm', '.1f', 'distance of the object from where the prediction has it, away from home'),
    ('ms', 'ms', '.1f', 'time of a clip: predicted, scored and shown'),
]
# What is compared, with which other rows (first of all tuned LN-TTA), and on which figures.
OURS = 'HOPE world head'
AGAINST = ['ViT-AC LN-TTA', 'ViT-AC LN-TTA x5', 'HOPE LN-TTA', 'ViT-AC + head world head']
COMPARED = ['gap_closed', 'way_back', 'return_cost', 'harm']


def read(folders):
    """Folders of runs on the same stream → the run.json of the first, {model and method: rows of all}."""
    first, groups = None, {}
    for folder in map(Path, folders):
        if not (folder / 'run.json').is_file():
            refuse(f'{folder} has no run.json; python adapt.py --out={folder} makes one')
        run = json.loads((folder / 'run.json').read_text('utf-8'))
        first = first or run
        for name in ('phases', 'clips', 'streams', 'loss', 'target_steps'):
            if run[name] != first[name]:
                refuse(f'{folders[0]} and {folder} cannot be compared: {name} = {first[name]}, {run[name]}')
        files = [folder / name for name in run['rows'] if (folder / name).is_file()]
        rows = [json.loads(file.read_text('utf-8')) | {'run': str(folder)} for file in files]
        shape = run['streams'], len(run['phases']), run['clips']
        for row in rows:
            row |= {name: np.reshape(row[name], shape) for name in ('loss', 'metres') if row[name]}
        for row in rows:
            row['figures'] = figures(row, rows, run)
            groups.setdefault(f'{row["model"]} {row["method"]}'.strip(), []).append(row)
    return first, groups


def over(values, phases):
    """Mean of values (S,P,n) over the clips of some phases → (S,), or None where there are none."""
    return values[:, phases].mean((1, 2)) if phases else None


def figures(row, rows, run):
    """The figures of one row → {name: (S,)}, nan for "never". rows: those of the same run."""
    loss, domains = row['loss'], run['domains']
    away = [i for i, domain in enumerate(domains) if domain != domains[0]]
    back = [i for i in range(1, len(domains)) if i not in away and i - 1 in away]
    found = {f'phase {i + 1}': over(loss, [i]) for i in range(len(domains))}
    found['B_first'] = over(loss[..., :EARLY], away)
    found['B_last'] = over(loss[..., -EARLY:], away)
    if row['metres'] is not None:
        found['cm_B'] = over(100 * row['metres'], away)
    if len(loss) == 1:      # streams that are run as one batch have no time of their own
        found['ms'] = [1000 * np.median(row['seconds'])]
    if row['probes'] and away:
        before, after = (run['probe_at'].index((away[0] + i) * run['clips']) for i in (0, 1))
        probes = np.array(row['probes'][domains[0]])                   # (S, times)
        found['forgetting'] = probes[:, after] - probes[:, before]
    losses = {(other['model'], other['method'], other['seed']): other['loss'] for other in rows}
    frozen = losses.get((row['model'], 'frozen', row['seed']))
    # Where there is one oracle only, it serves all seeds.
    oracle = losses.get(('oracle', 'frozen', row['seed']), losses.get(('oracle', 'frozen', 1)))
    if frozen is not None and row['method'] != 'frozen':
        found |= against_frozen(loss, frozen, oracle, domains, away, back)
        # A share would flatter a row that is worse than copying step 1.
        copied = losses.get(('', 'copy', 1))
        if away and copied is not None and over(loss, away).mean() > over(copied, away).mean():
            for share in ('gap_closed', 'way_back'):
                found.pop(share, None)
    found |= of_planning(row['planning'])
    return {name: values for name, values in found.items() if values is not None}


def of_planning(phases):
    """How well pushes were chosen after each phase → {name: (1,)}: goals within 2 and 5 cm, median."""
    found = {}
    for phase in phases or []:
        label, cm = phase['phase'], 100 * np.array(phase['distance'])
        found |= {f'{label} <{limit}cm': [np.mean(cm <= limit)] for limit in (2, 5)}
        found[f'{label} cm'] = [np.median(cm)]
        found['plan ms'] = [phase['ms']]
    return found


def clips_to(share, loss, frozen):
    """Clips until the 10-clip mean of the gain, frozen - loss (S,n), has a share of its end → (S,)."""
    gain = plots.running_mean(frozen - loss)
    final = gain[:, -EARLY:].mean(1)
    reached = gain >= share * final[:, None]
    # Half of nearly nothing would be reached with the first clip.
    never = final <= 0.01 * frozen.mean(1)
    return np.where(never | ~reached.any(1), np.nan, reached.argmax(1) + 1)


def against_frozen(loss, frozen, oracle, domains, away, back):
    """Figures of losses (S,P,n) beside those of the model frozen, and of an oracle or None → {name: (S,)}."""
    gain = frozen - loss
    if not away:
        return {'harm': -gain.mean((1, 2))}
    visits = [i for i in away if domains[i] == domains[away[0]]]
    t90 = [clips_to(0.9, loss[:, i], frozen[:, i]) for i in visits]
    # Share of what could be gained: by the oracle, or without one down to the loss at home.
    name, best = ('way_back', over(frozen, [0])) if oracle is None else ('gap_closed', over(oracle, away))
    return {
        't50': clips_to(0.5, loss[:, away[0]], frozen[:, away[0]]),
        'savings': t90[1] / t90[0] if len(t90) > 1 else None,
        'return_cost': over(-gain[..., :EARLY], back),
        name: over(gain, away) / (over(frozen, away) - best),
    }


def tidy(groups):
    """A line for each run, row, seed, stream and figure → DataFrame; the value is missing for "never"."""
    return pd.DataFrame([
        {'row': name, **{key: row.get(key) for key in ('run', 'rate', 'seed')},
         'stream': stream, 'figure': figure, 'value': value}
        for name, rows in groups.items() for row in rows
        for figure, values in row['figures'].items() for stream, value in enumerate(values, 1)])


def cell(values, form):
    """Mean ± half the 95 % t interval over means of seeds or streams of one; values: by run, seed."""
    # A mean without those that never got there would be a lie.
    if values.hasnans:
        return f'{values.count()}/{len(values)}' if values.count() else 'never'
    seeds = values.groupby(['run', 'seed']).mean()
    means = seeds if len(seeds) > 1 else values
    half = stats.t.ppf(0.975, len(means) - 1) * means.sem()
    return format(means.mean(), form) + (f'±{format(half, form.lstrip("+"))}' if len(means) > 1 else '')


def table(corner, lines, columns):
    """Those columns that some row has → DataFrame, and text: the table, and what its columns are."""
    columns = {figure: about for figure, *about in columns if figure in set(lines.figure)}
    lines = lines[lines.figure.isin(columns)]
    if lines.empty:
        return None, ''
    values = lines.set_index(['run', 'seed']).groupby(['row', 'figure']).value
    cells = values.apply(lambda values: cell(values, columns[values.name[1]][1]))
    frame = cells.unstack(fill_value='').loc[lines.row.unique(), [*columns]].rename_axis(None)
    frame.columns = pd.Index([heading for heading, *_ in columns.values()], name=corner)
    meanings = [f'{heading}: {what}.' for heading, _, what in columns.values() if what]
    return frame, '\n'.join([frame.to_string(line_width=100), '', *meanings])


def comparisons(lines):
    """Sentences on OURS minus AGAINST in paired t tests, by seed, or by stream of one."""
    sentences = []
    wide = lines.pivot(index=['run', 'seed', 'stream'], columns=['figure', 'row'], values='value')
    for other, figure in itertools.product(AGAINST, COMPARED):
        pairs = wide.reindex(columns=[(figure, OURS), (figure, other)]).dropna()
        seeds = pairs.groupby(['run', 'seed']).mean()
        pairs = seeds if len(seeds) > 1 else pairs
        if len(pairs) > 1:
            test = stats.ttest_rel(*pairs.to_numpy().T)
            low, high = test.confidence_interval()
            sentences.append(f'{figure}, {OURS} minus {other}: {(low + high) / 2:+.4f} '
                             f'[{low:+.4f}, {high:+.4f}], p = {test.pvalue:.2g} (ttest_rel)')
    return '\n'.join(sentences)


def rates(groups, run):
    """Where learning rates come from, with a warning for each that lies on the edge of what was tried."""
    lines = []
    for name, rows in groups.items():
        chosen = sorted({row['rate'] for row in rows} - {None})
        tried = sorted(map(float, rows[0]['tried'] or ()))
        if chosen:
            among = f' on {run["tuned_on"]} among {str(tried)[1:-1]}' if tried else ''
            lines.append(f'Rate of {name}: {str(chosen)[1:-1]}, {rows[0]["rate_from"]}{among}')
        if {*chosen} & {*tried[:1], *tried[-1:]}:
            lines.append(f'Warning: that of {name} lies on the edge of these; one beyond may be better')
    return '\n'.join(lines)


def tables(run, groups):
    """The text of table.txt, and its first table as a DataFrame."""
    lines = tidy(groups)
    losses = [(f'phase {i}', label[:7], '.4f', '') for i, label in enumerate(run['labels'], 1)]
    pushes = [(f'{label} {what}', f'{label} {what}', form, '') for label in run['labels']
              for what, form in (('<2cm', '.0%'), ('<5cm', '.0%'), ('cm', '.1f'))]
    pushes.append(('plan ms', 'ms', '.0f', 'of a plan; before, distances from the goal as the clip ends'))
    main, text = table('loss on the stream', lines, losses + COLUMNS)
    counts = {'seed': max(map(len, groups.values())), 'stream': run['streams']}
    counted = ', '.join(f'{count} {what}' + 's' * (count > 1) for what, count in counts.items())
    steps = ', '.join(map(str, run['target_steps']))
    texts = [
        text,
        f'{run["loss"]} loss at steps {steps}; {counted}, {run["clips"]} clips a phase.\n'
        '±: half the 95 % t interval over means of seeds, or streams of one.',
        comparisons(lines),
        rates(groups, run),
        table('choosing pushes', lines, pushes)[1],
    ]
    return '\n\n'.join(filter(None, texts)) + '\n', main


def write(folders, out):
    """Print the table of one or several finished runs; write it, its figures and pictures into a folder."""
    run, groups = read(folders)
    text, main = tables(run, groups)
    print(f'\n{text}\ntables, figures and pictures: in {out}')
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / 'table.txt').write_text(text, 'utf-8')
    latex = main.to_latex(escape=True, column_format='l' + 'r' * main.shape[1])
    symbols = str.maketrans({'±': r'$\pm$', **{digit: f'$_{i}$' for i, digit in enumerate('₀₁₂₃₄₅₆₇₈₉')}})
    (out / 'table.tex').write_text(latex.translate(symbols), 'utf-8')
    tidy(groups).to_csv(out / 'figures.csv', index=False)
    plots.draw_stream(out / 'results.png', run, groups)
    plots.draw_diagnostics(out / 'diagnostics.png', run, groups)
    if shown := plots.shown_clips(run, groups):
        plots.draw_animation(out / 'switch.gif', shown)


if __name__ == '__main__':
    write(listed(runs), out)
