"""
What came out of adapt.py: figures of every row, intervals, tables and pictures, in seconds.

    python report.py --runs=out/aba_1,out/aba_2 --out=out/both       rows of several runs count as more seeds

It reads run.json and the rows beside it and writes table.txt, table.tex (LaTeX package booktabs),
figures.csv (a line for each run, row, seed, stream and figure), results.png, and where features can be
turned back into pictures predictions.png and switch.gif. In the names of figures, A is home, the world of
the first phase, and B all that is away from it. S streams, P phases of n clips each.
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
methods = ''             # show only these, separated by commas, as they are called in the table; '' = all
out = 'out/tables'       # folder for tables and pictures
config = configure(globals()) if __name__ == '__main__' else {}

EARLY = 25               # clips at the start and at the end of a phase whose mean is a figure of its own
WIDEST = 100             # columns of a terminal
# Columns of the tables: the figure, its heading, its format, and what it is.
COLUMNS = [
    ('B_first', '1-25', '.4f', 'the first 25 clips of each phase away from home'),
    ('return_cost', 'return', '+.3f', 'loss minus frozen loss on the first 25 clips back home'),
    ('forgetting', 'forget', '+.3f', 'loss on held-out clips of home after the first shift minus before it'),
    ('gap_closed', 'gap', '.0%', "share of the way from the own frozen loss away from home to the oracle's"),
    ('way_back', 'to A', '.0%', 'share of the way from the own frozen loss away from home to that at home'),
    ('t50', 't50', '.0f', 'clips of the shift to half of the own final gain (never: no gain of 1 %)'),
    ('savings', 'saving', '.2f', 'clips to 90 % of the final gain, second visit over first'),
    ('harm', 'harm', '+.4f', 'loss minus frozen loss where nothing changes'),
    ('metres_B', 'cm', 'cm', 'distance of the object from where the prediction has it, away from home'),
    ('ms', 'ms', '.1f', 'time of a clip: predicted, scored and shown'),
]
CONTINUAL = [
    ('StreamForgetting', 'forgot', '+.3f', 'lost by the end, positive is worse'),
    ('backward_transfer', 'backward', '+.3f', ''),
    ('forward_transfer', 'forward', '+.3f', 'transfer, positive is better (formulas: report.continual)'),
    ('plasticity', 'plastic', '+.3f', 'gained by the first visit of a shift'),
]
# What HOPE's memory is compared with, first of all with tuned LN-TTA, and on which figures.
AGAINST = [('ViT-AC', 'LN-TTA'), ('HOPE', 'LN-TTA'), ('ViT-AC', 'memory')]
COMPARED = ['gap_closed', 'way_back', 'return_cost', 'harm']


# ---- reading -----------------------------------------------------------------------------------------------

def read(folders):
    """
    The run.json of the first of some folders, the finished rows of all, arrays (S,P,n); all of one stream.
    """
    first, every = None, []
    for folder in folders:
        if not Path(folder, 'run.json').is_file():
            refuse(f'{folder} has no run.json; python adapt.py --out={folder} makes one')
        run = json.loads(Path(folder, 'run.json').read_text('utf-8'))
        first = first or run
        for name in ('phases', 'clips', 'streams', 'loss', 'target_steps'):
            if run[name] != first[name]:
                refuse(f'{folders[0]} and {folder} cannot be compared: {name} = {first[name]}, {run[name]}')
        shape = run['streams'], len(run['phases']), run['clips']
        files = [Path(folder, name) for name in run['rows'] if Path(folder, name).is_file()]
        rows = [json.loads(file.read_text('utf-8')) | {'run': folder, 'file': file} for file in files]
        for row in rows:
            row['loss'] = np.reshape(row['loss'], shape)
            row['metres'] = None if row['metres'] is None else np.reshape(row['metres'], shape)
        for row in rows:
            row['figures'] = figures(row, rows, run)
        every += rows
    return first, every


def grouped(rows, methods=()):
    """Rows that belong together, of all runs and seeds → {model, method and learning rate: rows}."""
    # With several seeds no rate, because each may have tuned another; that of the plan is a row of its own.
    several = len({(row['run'], row['seed']) for row in rows}) > 1
    groups = {}
    for row in rows:
        name = f'{row["model"]} {row["method"]}'.strip()
        if row['rate'] is not None and (not several or row['rate_from'] == 'plan'):
            name += f' {row["rate"]:g}'
        if not methods or row['method'] in methods:
            groups.setdefault(name, []).append(row)
    return groups


# ---- figures of one row ------------------------------------------------------------------------------------

def away_phases(domains):
    """Numbers, from 0, of the phases that are not in the world of the first one."""
    return [i for i, domain in enumerate(domains) if domain != domains[0]]


def return_phases(domains):
    """Numbers, from 0, of the phases that come home from another world."""
    return [i for i in range(1, len(domains)) if domains[i] == domains[0] != domains[i - 1]]


def over(values, phases):
    """Mean of values (S,P,n) over the clips of some phases → (S,)."""
    return values[:, phases].mean((1, 2))


def figures(row, rows, run):
    """The figures of one row → {name: (S,)}, nan for "never". rows: those of the same run."""
    loss = row['loss']
    away, back = away_phases(run['domains']), return_phases(run['domains'])
    found = {f'phase {i + 1}': over(loss, [i]) for i in range(len(run['domains']))}
    found['A1'] = over(loss, [0])
    if away:
        found['B'] = over(loss, away)
        found['B_first'] = over(loss[..., :EARLY], away)
        found['B_last'] = over(loss[..., -EARLY:], away)
    if away and row['metres'] is not None:
        found['metres_B'] = over(row['metres'], away)
    if back:
        found['A2'] = over(loss, back)
    # Streams that are run as one batch have no time of their own.
    if len(loss) == 1:
        found['ms'] = [1000 * np.median(row['seconds'])]
    if row['probes']:
        found |= of_probes(row['probes'], run)
    return found | of_planning(row['planning']) | against_frozen(row, rows, run['domains'])


def of_planning(phases):
    """How well pushes were chosen after each phase → {name: (1,)}: goals within 2 and 5 cm, median."""
    found = {}
    for phase in phases or []:
        label, cm = phase['phase'], 100 * np.array(phase['distance'])
        found |= {f'{label} <{near}cm': [np.mean(cm <= near)] for near in (2, 5)}
        found[f'{label} cm'] = [np.median(cm)]
        if phase['ms']:
            found['plan ms'] = [phase['ms']]
    return found


def of_probes(probes, run):
    """Figures of held-out clips → {name: (S,)}: Rij, the loss on domain j after phase i, and what follows."""
    domains = list(dict.fromkeys(run['domains']))
    at = [run['probe_at'].index(i * run['clips']) for i in range(len(run['phases']) + 1)]
    R = np.stack([np.array(probes[domain])[:, at] for domain in domains], axis=2)    # (S,1+P,domains)
    found = continual(R, run['domains'])
    for j, domain in enumerate(domains):
        found |= {f'R{i}{domain}': R[:, i, j] for i in range(len(at))}
    for phase in away_phases(run['domains'])[:1]:
        found['forgetting'] = R[:, phase + 1, 0] - R[:, phase, 0]
    return found


def continual(R, domains):
    """
    Figures of continual learning → {name: (S,)}, of R (S,1+P,domains) of of_probes() and each phase's domain.

    Written for losses, so signs turn where the source has accuracies. d(i): the domain of phase i; v(j): the
    phase of the first visit of j. StreamForgetting: mean over j with v(j) < P of R[P]j - R[v(j)]j (Avalanche,
    arXiv:2104.00405). backward_transfer: mean over i < P of R[i]d(i) - R[P]d(i). forward_transfer: mean over
    j with v(j) > 1 of R[0]j - R[v(j)-1]j, from the checkpoint before the stream, not random weights (both:
    Lopez-Paz & Ranzato 2017, arXiv:1706.08840). plasticity: mean over the same j of R[v(j)-1]j - R[v(j)]j.
    """
    last = len(domains)
    order = list(dict.fromkeys(domains))
    differences = {name: [] for name, *_ in CONTINUAL}
    for j, domain in enumerate(order):
        first = domains.index(domain) + 1
        if first < last:
            differences['StreamForgetting'].append(R[:, last, j] - R[:, first, j])
        if first > 1:
            differences['forward_transfer'].append(R[:, 0, j] - R[:, first - 1, j])
            differences['plasticity'].append(R[:, first - 1, j] - R[:, first, j])
    for i, j in enumerate(map(order.index, domains[:-1]), 1):
        differences['backward_transfer'].append(R[:, i, j] - R[:, last, j])
    return {name: np.mean(several, axis=0) for name, several in differences.items() if several}


def clips_to(share, loss, frozen):
    """
    First clip of a phase from which on the 10-clip mean has a share of the method's own final gain → (S,).

    loss, frozen (S,n): of the method and of the same model frozen. Half of a gain of nearly nothing would be
    reached with the first clip, so a final gain below 1 % of the frozen loss is never reached: nan.
    """
    gain = plots.running_mean(frozen - loss)
    final = gain[:, -EARLY:].mean(1)
    reached = gain >= share * final[:, None]
    never = (final <= 0.01 * frozen.mean(1)) | ~reached.any(1)
    return np.where(never, np.nan, reached.argmax(1) + 1)


def against_frozen(row, rows, domains):
    """The figures that compare a row with the same model frozen → {name: (S,)}."""
    losses = {(other['model'], other['method'], other['seed']): other['loss'] for other in rows}
    loss, seed = row['loss'], row['seed']
    frozen = losses.get((row['model'], 'frozen', seed))
    # Where there is one oracle only, it serves all seeds.
    oracle = losses.get(('oracle', 'frozen', seed), losses.get(('oracle', 'frozen', 1)))
    away, back = away_phases(domains), return_phases(domains)
    if frozen is None or row['method'] == 'frozen':
        return {}
    if not away:
        return {'harm': (loss - frozen).mean((1, 2))}
    t90 = [clips_to(0.9, loss[:, i], frozen[:, i]) for i in range(len(domains))]
    found = {'t50': clips_to(0.5, loss[:, away[0]], frozen[:, away[0]]), 't90': t90[away[0]]}
    for again in [i for i in away if domains[i] in domains[:i]][:1]:
        found['savings'] = t90[again] / t90[domains.index(domains[again])]
    if back:
        found['return_cost'] = over((loss - frozen)[..., :EARLY], back)
    # Share of what could be gained: by the oracle, or without one down to the loss at home.
    gained = over(frozen - loss, away)
    if oracle is None:
        found['way_back'] = gained / (over(frozen, away) - over(frozen, [0]))
    else:
        found['gap_closed'] = gained / over(frozen - oracle, away)
    return found


# ---- tables ------------------------------------------------------------------------------------------------

def cell(rows, figure, form):
    """
    A figure of a row of the table → its mean and half its 95 % t interval, over plots.repeats(), as text.

    'never', or in how many, where it was not reached in all: a mean over the others would be a lie.
    """
    if any(figure not in row['figures'] for row in rows):
        return '', ''
    values = np.array([row['figures'][figure] for row in rows], float)
    reached = np.isfinite(values).sum()
    if figure in ('t50', 'savings') and reached < values.size:
        return f'{reached}/{values.size}' if reached else 'never', ''
    if form == 'cm':
        values, form = 100 * values, '.1f'
    means = plots.repeats(values)
    if len(means) == 1:
        return format(means[0], form), ''
    half = stats.t.ppf(0.975, len(means) - 1) * stats.sem(means)
    return format(means.mean(), form), format(half, form.lstrip('+'))


def table(corner, groups, columns):
    """What some group has of the columns, as far as a terminal is wide → DataFrame, sentences on columns."""
    there = {figure for rows in groups.values() for figure in rows[0]['figures']}
    columns = [column for column in columns if column[0] in there]
    width = max(map(len, [corner, *groups]))
    lines = []
    for name, rows in groups.items():
        cells = [cell(rows, figure, form) for figure, _, form, _ in columns]
        for title, texts in zip((name.ljust(width), '±'.rjust(width)), zip(*cells)):
            lines += [[title, *texts]] if any(texts) else []
    frame = pd.DataFrame(lines, columns=[corner.ljust(width), *(heading for _, heading, _, _ in columns)])
    text = [f'{heading}: {what}.' for _, heading, _, what in columns if what]
    while len(frame.to_string(index=False).partition('\n')[0]) > WIDEST:
        frame = frame.iloc[:, :-1]
    return frame, text if len(frame.columns) > len(columns) else [*text, 'Further columns: figures.csv.']


def tidy(groups):
    """A line for each run, row, seed, stream and figure → DataFrame; the value is missing for "never"."""
    about = ['run', 'model', 'method', 'rate', 'rate_from', 'seed']
    lines = []
    for name, row in ((name, row) for name, rows in groups.items() for row in rows):
        first = [name, *(row[key] for key in about)]
        for figure, values in row['figures'].items():
            lines += [[*first, stream, figure, value] for stream, value in enumerate(values, 1)]
    return pd.DataFrame(lines, columns=['row', *about, 'stream', 'figure', 'value'])


def comparisons(lines):
    """Sentences of the lines of tidy(): HOPE's memory minus AGAINST, paired by seed, or by stream of one."""
    sentences = []
    ours = 'HOPE', 'memory'
    for other, figure in itertools.product(AGAINST, COMPARED):
        chosen = lines[(lines.figure == figure) & (lines.rate_from != 'plan')]
        wide = chosen.pivot(index=['run', 'seed', 'stream'], columns=['model', 'method'], values='value')
        if ours not in wide or other not in wide:
            continue
        pairs = wide[[ours, other]].dropna()
        seeds = pairs.groupby(['run', 'seed']).mean()
        one, two = (seeds if len(seeds) > 1 else pairs).to_numpy().T
        if len(one) > 1:
            test = stats.ttest_rel(one, two)
            low, high = test.confidence_interval(0.95)
            sentences.append(f'HOPE memory minus {" ".join(other)}, {figure}: {np.mean(one - two):+.4f} '
                             f'[{low:+.4f}, {high:+.4f}], p = {test.pvalue:.2g}')
    return sentences


def rates(groups, run):
    """Where learning rates come from, with a warning for each that lies on the edge of what was tried."""
    lines = []
    for name, rows in groups.items():
        chosen = sorted({row['rate'] for row in rows if row['rate_from'] not in ('', 'plan')})
        tried = sorted(map(float, rows[0]['tried'] or []))
        if chosen:
            among = f' on {", ".join(run["tuned_on"])} among {str(tried)[1:-1]}' if tried else ''
            lines.append(f'Rate of {name}: {str(chosen)[1:-1]}, {rows[0]["rate_from"]}{among}.')
        if chosen and {*tried[:1], *tried[-1:]} & set(chosen):
            lines.append(f'Warning: that of {name} lies on the edge of these; one beyond may be better.')
    return lines


def tables(run, groups):
    """The text of table.txt, and its first table as a DataFrame."""
    labels, away = run['labels'], away_phases(run['domains'])
    seeds, streams = max(map(len, groups.values())), run['streams']
    phases = [0, *away] if away else range(len(labels))
    losses = [(f'phase {i + 1}', labels[i][:7], '.4f', '') for i in phases]
    main, text = table('loss on the stream', groups, losses + COLUMNS)
    steps = ', '.join(map(str, run['target_steps']))
    lines = [main.to_string(index=False), '', f'{run["loss"]} L1, mean over target steps {steps}; '
             f'{run["clips"]} clips a phase, scored before the look-back.', *text]
    if seeds * streams > 1:
        over = f'{seeds} seeds (means over streams)' if seeds > 1 else f'{streams} streams of one seed'
        lines.append(f'±: half the 95 % t interval over {over}.')
    found = comparisons(tidy(groups))
    if found:
        lines += ['', *found, 'Paired t tests, two-sided (scipy.stats.ttest_rel), and their 95 % intervals.']
    lines += ['', *rates(groups, run)]
    simulated = of_planning(run['simulator'])
    pushes = [(name, name, '.0%' if '<' in name else '.1f', '') for name in simulated]
    pushes.append(('plan ms', 'ms', '.0f', 'of a plan; before, distances from the goal as the clip ends'))
    for corner, members, columns in [
        ('held-out clips', groups, CONTINUAL),
        ('choosing pushes', groups | {'true simulator': [{'figures': simulated}]}, pushes),
    ]:
        frame, text = table(corner, members, columns)
        if len(frame):
            lines += ['', frame.to_string(index=False), '', *text]
    return '\n'.join(lines).rstrip() + '\n', main


def write(folders, out, methods=()):
    """Print the table of one or several finished runs; write it, its figures and pictures into a folder."""
    run, rows = read(folders)
    groups = grouped(rows, methods)
    assert groups, f'--methods={methods}: there are only {", ".join({row["method"] for row in rows})}'
    text, main = tables(run, groups)
    print(f'\n{text}\ntables, figures and pictures: in {out}')
    Path(out).mkdir(parents=True, exist_ok=True)
    Path(out, 'table.txt').write_text(text, 'utf-8')
    latex = main.to_latex(index=False, escape=True, column_format='l' + 'r' * (main.shape[1] - 1))
    symbols = str.maketrans({'±': r'$\pm$', '₁': '$_1$', '₂': '$_2$', '₃': '$_3$', '₄': '$_4$', '₅': '$_5$'})
    Path(out, 'table.tex').write_text(latex.translate(symbols), 'utf-8')
    tidy(groups).to_csv(Path(out, 'figures.csv'), index=False)
    plots.draw_stream(Path(out, 'results.png'), run, groups)
    shown = plots.shown_clips(run, groups)
    if shown:
        plots.draw_predictions(Path(out, 'predictions.png'), shown)
        plots.draw_animation(Path(out, 'switch.gif'), shown)


if __name__ == '__main__':
    write(listed(runs), out, listed(methods))
