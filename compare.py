"""
What came out of adapt.py: tables and pictures of finished runs, in seconds.

    python compare.py out/aba_1 out/aba_2 out/aba_3           their rows are taken together, as seeds
    python compare.py out/aba_1 --labels="HOPE memory=Ours,ViT-AC LN-TTA 0.01=TTA"

Nothing is run again: all of it is read from the results.json of each folder. Writes table.txt, table.tex, compare.csv
(one line for each run, row, seed, stream and figure), results.pdf and results.png into `out`. What the figures are: in
figures.py. adapt.py takes its own tables from here.
"""
import csv
import io
import json
import os
import textwrap
from types import SimpleNamespace

import numpy as np

from configurator import Refusal, configure, listed
from drawing import draw
from figures import DIGITS, EARLY, add_figures, away_phases, interval, return_phases, versus
from support.files import MALFORMED, claim, write_text

# what to compare
runs = ''                # folders of finished runs of adapt.py, separated by commas, or by blanks without --runs
methods = ''             # show only these, separated by commas, as they are called in the table; '' = all
labels = ''              # other names for rows: 'HOPE memory=Ours,ViT-AC LN-TTA=TTA'
out = 'out/compare'      # folder for the tables and the picture
settings = configure(globals(), files='runs') if __name__ == '__main__' else {}

# Columns of the table: name of the figure, heading, format. What a figure is: in figures.py. In the names, A and B
# stand for the home phases and those away, whatever they are called.
COLUMNS = [
    ('A1', 'A₁', '.4f'),
    ('B', 'B', '.4f'),
    ('B_within', 'within', '.4f'),
    ('B_beyond', 'beyond', '.4f'),
    ('B_first', '1-25', '.4f'),
    ('return_cost', 'return', '+.3f'),
    ('forgetting', 'forget', '+.3f'),
    ('gap_closed', 'gap', '.0%'),
    ('way_back', 'to A', '.0%'),
    ('of_known', 'known', '.0%'),
    ('t50', 't50', '.0f'),
    ('savings', 'saving', '.2f'),
    ('harm', 'harm', '+.4f'),
    ('metres_B', 'cm', 'cm'),
    ('ms_per_clip', 'ms', '.1f'),
]

# Columns of a terminal that a table may fill.
WIDEST = 100
# What the columns are, in the words of the table. {first}, {shift}, {away}, {back}: names of phases; {home}: a domain.
EXPLAINED = {
    'B_within': 'within / beyond: clips of {away} that slide no further / further than any training clip of {home}.',
    'B_first': f'1-25: the first {EARLY} clips of {{away}}.',
    'return_cost': f'return: loss minus frozen loss on the first {EARLY} clips of {{back}}.',
    'forgetting': 'forget: loss on held-out clips of {home} after {shift} minus before {shift}.',
    'gap_closed': "gap: share of the way from the own frozen loss on {away} to the oracle's.",
    'way_back': 'to A: share of the way from the own frozen loss on {away} to that on {first}.',
    'of_known': 'known: share of what the best constant map of the push, known in advance, gains.',
    't50': 't50: clips of {shift} to half of the own final gain (never: no gain of 1 %).',
    'savings': 'saving: clips to 90 % of the final gain, second visit over first.',
    'harm': 'harm: loss minus frozen loss, over the whole stream.',
    'metres_B': 'cm: distance of the object from where the prediction has it, on {away}.',
}


# ---- files of one run ------------------------------------------------------------------------------------------------

def title(row):
    """Name of a row: model, method and learning rate."""
    rate = '' if row['rate'] is None else f'{row["rate"]:g}'
    return ' '.join(part for part in (row['model'], row['method'], rate) if part)


def seeded(name, seed):
    """'HOPE memory' → 'HOPE memory, seed 2'; the first seed is not named."""
    return name if seed == 1 else f'{name}, seed {seed}'


def rounded(value):
    """Numbers in lists and dicts, rounded to DIGITS decimals."""
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return value


def json_text(value, indent=''):
    """JSON in which a list or an object that holds no other stands on one line."""
    items = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(value, (dict, list)) or not any(isinstance(item, (dict, list)) for item in items):
        return json.dumps(value, separators=(',', ': '))
    inner = indent + ' '
    lines = [json_text(item, inner) for item in items]
    if isinstance(value, dict):
        lines = [f'{json.dumps(key)}: {line}' for key, line in zip(value, lines)]
        return '{\n' + inner + f',\n{inner}'.join(lines) + f'\n{indent}' + '}'
    return f'[\n{inner}' + f',\n{inner}'.join(lines) + f'\n{indent}]'


def results_json(results):
    """The text of results.json. What is kept in memory for pictures alone is left out."""
    rows = []
    for row in results['rows']:
        kept = {key: value for key, value in row.items() if key not in ('shown', 'state')}
        # A rate may be smaller than what is left of a loss.
        rows.append({**rounded(kept), 'rate': row['rate']})
    return json_text({**results, 'rows': rows}) + '\n'


def results_csv(results):
    """The text of results.csv: the loss of every clip of every stream, and the error in metres."""
    n, rows = results['clips'], results['rows']
    columns = {seeded(title(row), row['seed']): row['loss'] for row in rows}
    for row in rows:
        if row['metres'] is not None:
            columns[f'{seeded(title(row), row["seed"])} [m]'] = row['metres']
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(['stream', 'clip', 'phase', 'beyond_A', *columns])
    for stream in range(results['streams']):
        for i in range(n * len(results['phases'])):
            far = '' if results['beyond'] is None else int(results['beyond'][stream][i])
            values = [f'{values[stream][i]:.{DIGITS}f}' for values in columns.values()]
            writer.writerow([stream + 1, i + 1, plain(results['labels'][i // n]), far, *values])
    return text.getvalue()


def plain(label):
    """A₁ → A1."""
    return label.translate(str.maketrans('₁₂₃₄₅₆₇₈₉', '123456789'))


# What this version of adapt.py writes.
PARTS = ('key', 'phases', 'labels', 'domains', 'clips', 'streams', 'loss', 'target_steps', 'tuned_on', 'tuning',
         'beyond', 'probe_at', 'rows')


def read_results(folder):
    """
    The results.json of a finished run, its figures computed anew → dict.

    Raises Refusal where there is none, or none that this version wrote.
    """
    path = os.path.join(folder, 'results.json')
    if not os.path.isfile(path):
        raise Refusal(f'no results at {path}; python adapt.py --out={folder} makes them')
    try:
        with open(path, encoding='utf-8') as f:
            results = json.load(f)
        for name in PARTS:
            if name not in results:
                raise ValueError(f'it has no {name}')
        for row in results['rows']:
            row['run'] = folder
        add_figures(results)
        return results
    except MALFORMED as error:
        why = ' '.join(str(error).split())[:200]
        raise Refusal(f'{path} is not what this version of adapt.py writes ({why}); run adapt.py again') from None


def check_runs(found):
    """Raises Refusal for runs, {folder: results}, that cannot be compared, or the same one twice."""
    (first, one), *others = found.items()
    for folder, other in others:
        for name in ('labels', 'clips', 'streams', 'loss', 'target_steps'):
            if other[name] != one[name]:
                raise Refusal(f'{first} and {folder} cannot be compared: {name} = {one[name]} and {other[name]}')
    seen = {}
    for folder, results in found.items():
        twin = seen.setdefault(json.dumps(results['key'], sort_keys=True), folder)
        if twin != folder:
            raise Refusal(f'{twin} and {folder} are the same run')


# ---- rows that belong together ---------------------------------------------------------------------------------------

def grouped(found, names=None, wanted=()):
    """
    The rows of one or several runs (a list of results) that belong together → {name: the rows of all seeds and runs}.

    With several seeds or runs a name has no learning rate, because each may have tuned another. names: {name: another
    name for it}; wanted: show the rows of these methods only.
    """
    several = len(found) > 1 or any(row['seed'] > 1 for row in found[0]['rows'])
    together = {}
    for results in found:
        for row in results['rows']:
            bare = several and row['rate_from'] != 'plan'
            name = title({**row, 'rate': None}) if bare else title(row)
            if not wanted or row['method'] in wanted:
                together.setdefault(name, []).append(row)
    names = names or {}
    strange = [name for name in names if name not in together]
    if strange:
        raise Refusal(f'--labels: no row is called {strange[0]!r}; there are {", ".join(together)}')
    labelled = {names.get(name, name): rows for name, rows in together.items()}
    if len(labelled) < len(together):
        raise Refusal('--labels: two rows would have the same name')
    return labelled


def mean_and_half(rows, name):
    """
    Mean of a figure over the rows of a group, and half the width of its 95 % interval (None for one seed and stream).

    None where it has no meaning for one of them; 'never', or in how many of them, where it was not reached in all.
    """
    values = [row['figures'][name] for row in rows if name in row['figures']]
    if len(values) < len(rows):
        return None, None
    every = [value for stream in values for value in stream]
    reached = [value for value in every if value is not None]
    if len(reached) < len(every):
        return f'{len(reached)}/{len(every)}' if reached else 'never', None
    mean, low, high = interval(values)
    return mean, None if low is None else (high - low) / 2


# ---- tables ----------------------------------------------------------------------------------------------------------

def short(label):
    """A label that fits above a column."""
    return label if len(label) <= 7 else f'{label[:6]}.'


def shown_columns(results, groups):
    """
    The columns that some row has a figure for: (figure, heading, format) of each.

    B is one column for each phase away from home; where there is none, for each phase after the first.
    """
    domains, labels = results['domains'], results['labels']
    middle = away_phases(domains) or range(1, len(domains))
    there = {name for rows in groups.values() for row in rows for name in row['figures']}
    columns = []
    for name, text, form in COLUMNS:
        if name == 'A1':
            columns.append((name, short(labels[0]), form))
        elif name == 'B':
            columns += [(f'phase {i + 1}', short(labels[i]), form) for i in middle]
        elif name in there and not (name == 'ms_per_clip' and results['streams'] > 1):
            columns.append((name, text, form))
    return columns


def cell(value, form):
    """A figure in the format of its column; 'never' and the like as they are."""
    if value is None or isinstance(value, str):
        return value or ''
    return f'{100 * value:.1f}' if form == 'cm' else format(value, form)


def laid_out(lines):
    """Lines of cells → text: the first cell of each line to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = []
    for first, *others in lines:
        name = first.rjust(widths[0]) if first == '±' else first.ljust(widths[0])
        text.append(' '.join([name, *(other.rjust(width) for other, width in zip(others, widths[1:]))]).rstrip())
    return text


def wrapped(lines):
    """Sentences, a line each, cut where they are too wide for a terminal."""
    cut = [textwrap.wrap(line, WIDEST, subsequent_indent='  ') for line in lines]
    return [piece for pieces in cut for piece in pieces or ['']]


def format_table(found, groups):
    """The text of table.txt: found is a list of results, one or several; groups: see grouped()."""
    one = found[0]
    columns = shown_columns(one, groups)
    lines = [['loss on the stream', *(heading for _, heading, _ in columns)]]
    for name, rows in groups.items():
        pairs = [mean_and_half(rows, figure) for figure, _, _ in columns]
        forms = [form for _, _, form in columns]
        lines.append([name, *(cell(mean, form) for (mean, _), form in zip(pairs, forms))])
        if any(half is not None for _, half in pairs):
            lines.append(['±', *(cell(half, form.lstrip('+')) for (_, half), form in zip(pairs, forms))])
    text = laid_out(lines)
    steps = ', '.join(map(str, one['target_steps']))
    text += ['', f'{one["loss"]} L1, mean over target steps {steps}; {one["clips"]} clips a phase, scored before the '
                 'look-back.']
    for lines in (explanations(one, columns), interval_lines(found, groups), comparison_lines(groups),
                  rate_lines(found, groups)):
        text += wrapped(lines)
    text += matrix_lines(one, groups)
    if any(row['planning'] for rows in groups.values() for row in rows):
        text += ['', planning_table(one, groups).rstrip()]
    return '\n'.join(text) + '\n'


def explanations(results, columns):
    """What the columns are, a line each."""
    domains, labels = results['domains'], results['labels']
    away = [labels[i] for i in away_phases(domains)]
    back = [labels[i] for i in return_phases(domains)]
    names = {'first': labels[0], 'home': domains[0], 'shift': away[0] if away else '', 'away': spoken(away),
             'back': spoken(back)}
    return [EXPLAINED[name].format(**names) for name, _, _ in columns if name in EXPLAINED]


def spoken(names):
    """['friction', 'mass', 'ice'] → 'friction, mass and ice'."""
    return ' and '.join([', '.join(names[:-1]), *names[-1:]] if len(names) > 1 else names)


def over_what(seeds, streams):
    """'5 seeds x 20 streams', '5 seeds' or '20 streams of one seed'."""
    if seeds == 1:
        return f'{streams} streams of one seed'
    return f'{seeds} seeds x {streams} streams' if streams > 1 else f'{seeds} seeds'


def interval_lines(found, groups):
    """What the lines with ± are; nothing for one seed and one stream."""
    streams, seeds = found[0]['streams'], max(map(len, groups.values()))
    if streams * seeds == 1:
        return []
    lines = [f'Mean and, with ±, half the 95 % interval over {over_what(seeds, streams)}: a bootstrap by seed, then by '
             'stream, widened for so few of them (figures.resampled). 3/5: so many of them got there.']
    if seeds == 1:
        lines.append('How much another training would differ is not in it.')
    if len(set(map(len, groups.values()))) > 1:
        lines.append('Rows that are there once (copy, blank, the oracle): over the streams alone.')
    for name, rows in groups.items():
        if len(rows) < seeds and rows[0]['model'] not in ('', 'oracle'):
            lines.append(f'{name} is in {len(rows)} of them.')
    return lines


# Who is compared with whom, in pairs: (model, method). The first pair is the primary comparison.
PAIRS = [
    (('HOPE', 'memory'), ('ViT-AC', 'LN-TTA')),
    (('HOPE', 'memory'), ('HOPE', 'LN-TTA')),
    (('HOPE', 'memory'), ('ViT-AC', 'memory')),
]
# The figures that are compared: what they are called, factor, format and unit of their differences.
COMPARED = {
    'gap_closed': ('gap closed', 100, '+.1f', ' points'),
    'way_back': ('way back to A', 100, '+.1f', ' points'),
    'return_cost': ('return', 1, '+.4f', ''),
    'harm': ('harm', 1, '+.5f', ''),
}


def compared(groups, pair):
    """
    Two groups over the same clips → (name, name, {figure: what versus() says, and over what}).

    None where one is missing; a rate of the plan is no candidate. Rows are paired by run and seed.
    """
    members = []
    for wanted in pair:
        for name, rows in groups.items():
            if (rows[0]['model'], rows[0]['method']) == wanted and rows[0]['rate_from'] != 'plan':
                members.append((name, {(row.get('run'), row['seed']): row['figures'] for row in rows}))
                break
    if len(members) < 2:
        return None
    (name, one), (other_name, other) = members
    both = [key for key in one if key in other]
    found = {}
    for figure in COMPARED:
        if both and all(figure in side[key] for side in (one, other) for key in both):
            sides = [[side[key][figure] for key in both] for side in (one, other)]
            found[figure] = {**versus(*sides), 'over': over_what(len(both), len(sides[0][0]))}
    return name, other_name, found


def comparison_lines(groups):
    """The comparisons of PAIRS, a line for each figure; nothing for one seed and one stream."""
    lines = []
    for pair in PAIRS:
        name, other, found = compared(groups, pair) or ('', '', {})
        for figure, result in found.items():
            if result['p'] is None:
                continue
            text, factor, form, unit = COMPARED[figure]
            mean, low, high = (format(factor * result[key], form) for key in ('mean', 'low', 'high'))
            p = f'p = {result["p"]:.3f}' if result['p'] >= 0.001 else 'p < 0.001'
            lines.append(f'{name} minus {other}, {text}: {mean} [{low}, {high}]{unit}, {p} ({result["over"]}).')
    if lines:
        lines = ['', *lines, 'Paired; in brackets the 95 % interval; p: the larger of a bootstrap and a t test, '
                             'two-sided.']
    return lines


CONTINUAL = {'StreamForgetting': 'forgot', 'backward_transfer': 'backward', 'forward_transfer': 'forward',
             'plasticity': 'plastic'}


def matrix_lines(results, groups):
    """The matrix R of each group and what continual learning makes of it: see figures.continual."""
    groups = {name: rows for name, rows in groups.items() if all('R_matrix' in row for row in rows)}
    if not groups:
        return []
    domains = list(dict.fromkeys(results['domains']))
    shown = [name for name in CONTINUAL if all(name in row['figures'] for rows in groups.values() for row in rows)]
    lines = [['held-out clips', *(f'of {domain}' for domain in domains), *(CONTINUAL[name] for name in shown)]]
    for name, rows in groups.items():
        R = np.mean([row['R_matrix'] for row in rows], axis=0)                 # (1+P,domains)
        cells = [' '.join(f'{loss:.3f}'.lstrip('0') for loss in column) for column in R.T]
        cells += [f'{np.mean([row["figures"][figure] for row in rows]):+.3f}' for figure in shown]
        lines.append([name, *cells])
    after = ', '.join(results['labels'])
    where = f'of X: loss before the stream and after {after}.'
    if max(map(len, laid_out(lines))) > WIDEST:
        lines = [[line[0], *line[1 + len(domains):]] for line in lines]
        where = f'Losses before the stream and after {after}: R_matrix in results.json.'
    text = ['', *laid_out(lines), '', where]
    if shown:
        text += ['forgot: what is lost at the end, positive is worse. backward, forward: transfer; plastic: what the',
                 'first visit of a shift gains; positive is better. Formulas: figures.continual.']
    return text


def in_words(shifts):
    """What rates are tuned on: ['C', 'scaled'] → 'C, clips with scaled pushes'."""
    return ', '.join(shifts).replace('scaled', 'clips with scaled pushes')


def on_the_edge(rate, tried):
    """Whether a rate is the lowest or the highest of those that were tried, so that one beyond may be better."""
    return rate in (min(tried), max(tried))


def rate_lines(found, groups):
    """Where learning rates come from, with a warning for each that lies on the edge of what was tried."""
    lines = []
    for name, rows in groups.items():
        for source in ('tuned', 'given', 'default'):
            chosen = [row for row in rows if row['rate_from'] == source]
            if not chosen:
                continue
            if name == title(chosen[0]):
                name = title({**chosen[0], 'rate': None})
            rates = ', '.join(f'{row["rate"]:g}' for row in chosen)
            rates = f'Rate{"s" if len(chosen) > 1 else ""} of {name}: {rates}'
            if source == 'given':
                lines.append(f'{rates}, as given; not tuned.')
            elif source == 'default':
                lines.append(f'{rates}, the default, measured on the built-in physics; not tuned.')
            else:
                tried, shifts = tuning_of(chosen[0], found)
                lines.append(f'{rates}, tuned on {in_words(shifts)} among {", ".join(f"{rate:g}" for rate in tried)}.')
                edge = [row['rate'] for row in chosen if on_the_edge(row['rate'], tuning_of(row, found)[0])]
                for rate in dict.fromkeys(edge):
                    lines.append(f'Warning: {rate:g} lies on the edge of them; a rate beyond may be better.')
    return [''] * bool(lines) + lines


def tuning_of(row, found):
    """The rates that were tried for a row of one of the results, and what it was tuned on."""
    results = next(results for results in found if any(other is row for other in results['rows']))
    tried = results['tuning'][seeded(title({**row, 'rate': None}), row['seed'])]
    return [float(rate) for rate in tried], results['tuned_on']


NEAR = 0.02, 0.05        # metres from the goal within which a push has succeeded


def planning_table(results, groups):
    """
    How well pushes are chosen with each row's predictor, and with the true simulator: how near to the goal the object is
    at the end of the clip. Text.

    The intervals are over the seeds, or for one seed a bootstrap over its goals (see figures.resampled).
    """
    planned = {name: rows for name, rows in groups.items() if all(row['planning'] for row in rows)}
    if results['simulator']:
        planned['true simulator'] = [{'planning': results['simulator']}]
    phases = [phase['phase'] for phase in next(iter(planned.values()))[0]['planning']]
    headings = [f'{label} {what}' for label in phases for what in ('<2cm', '<5cm', 'cm')]
    lines = [['choosing pushes', *headings, 'ms']]
    for name, rows in planned.items():
        means, halves = [], []
        for k in range(len(phases)):
            distance = np.array([row['planning'][k]['distance'] for row in rows])              # (seeds,goals)
            for near in NEAR:
                reached = (distance <= near).astype(float)
                mean, low, high = interval(reached.mean(1, keepdims=True) if len(rows) > 1 else reached)
                means.append(f'{mean:.0%}')
                halves.append('' if low is None else f'{(high - low) / 2:.0%}')
            means.append(f'{100 * np.median(distance):.1f}')
            halves.append('')
        spent = [phase['ms'] for row in rows for phase in row['planning'] if phase['ms'] is not None]
        lines.append([name, *means, f'{np.mean(spent):.0f}' if spent else ''])
        lines.append(['±', *halves, ''])
    goals = len(next(iter(planned.values()))[0]['planning'][0]['distance'])
    text = laid_out(lines)
    text += ['', f'Share of {goals} goals a phase that the object is within 2 cm and 5 cm of at the end of the clip,',
             'median distance, ms per plan. ±: half the 95 % interval, over the seeds or over the goals of one.']
    return '\n'.join(text) + '\n'


# What LaTeX would take for a command, and what it cannot read.
ESCAPES = {character: '\\' + character for character in '&%$#_{}'}
ESCAPES |= {'\\': r'\textbackslash{}', '~': r'\textasciitilde{}', '^': r'\textasciicircum{}'}
ESCAPES |= {low: f'$_{number}$' for number, low in enumerate('₁₂₃₄₅₆₇₈₉', 1)}


def escaped(text):
    """Text for LaTeX."""
    return text.translate(str.maketrans(ESCAPES))


def latex_table(found, groups):
    """The text of table.tex, a tabular without packages: mean, and half the 95 % interval where there is one."""
    columns = shown_columns(found[0], groups)
    headings = ['loss on the stream'] + [heading for _, heading, _ in columns]
    lines = [r'\begin{tabular}{l' + 'r' * len(columns) + '}', r'\hline']
    lines += [' & '.join(map(escaped, headings)) + r' \\', r'\hline']
    for name, rows in groups.items():
        cells = [escaped(name)]
        for figure, _, form in columns:
            mean, half = mean_and_half(rows, figure)
            if mean is None or isinstance(mean, str):
                cells.append(mean or '')
                continue
            text = cell(mean, form)
            if half is not None:
                # The unit stands once, behind both.
                text = text.rstrip('%') + r' \pm ' + cell(half, form.lstrip('+'))
            cells.append('$' + text.replace('%', r'\,\%') + '$')
        lines.append(' & '.join(cells) + r' \\')
    lines += [r'\hline', r'\end{tabular}']
    return '\n'.join(lines) + '\n'


def compare_csv(groups):
    """
    The text of compare.csv: one line for each run, row, seed, stream and figure; the value is empty for "never".

    pandas.read_csv(path).pivot_table('value', ['row', 'seed', 'stream'], 'figure') is one line for each stream.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(['run', 'row', 'model', 'method', 'rate', 'seed', 'stream', 'figure', 'value'])
    for name, rows in groups.items():
        for row in rows:
            first = [row.get('run', ''), name, row['model'], row['method'], row['rate'], row['seed']]
            for figure, values in row['figures'].items():
                for stream, value in enumerate(values, 1):
                    writer.writerow([*first, stream, figure, value])
    return text.getvalue()


# ---- comparing finished runs -----------------------------------------------------------------------------------------

FILES = 'table.txt', 'table.tex', 'compare.csv', 'results.pdf', 'results.png'


def check_out(folder, runs):
    """Raises Refusal where a folder holds anything of these names but what was made of the same runs before."""
    there = [file for file in FILES + ('results.json',) if os.path.exists(os.path.join(folder, file))]
    if not there:
        return
    earlier = []
    if 'compare.csv' in there and 'results.json' not in there:
        with open(os.path.join(folder, 'compare.csv'), newline='', encoding='utf-8', errors='replace') as f:
            earlier = sorted({row.get('run') or '?' for row in csv.DictReader(f)})
    if earlier != sorted(runs):
        raise Refusal(f'{folder} holds {there[0]} of other runs ({", ".join(earlier) or "not of compare.py"}); name '
                      'another folder with --out')


def read_labels(text):
    """'HOPE memory=Ours,frozen=none' → {'HOPE memory': 'Ours', 'frozen': 'none'}."""
    pairs = [item.partition('=') for item in listed(text)]
    for name, equals, label in pairs:
        if not equals or not label.strip():
            raise Refusal(f'--labels={text}: write row=label, separated by commas; {name!r} is not that')
    return {name.strip(): label.strip() for name, _, label in pairs}


def prepared(knobs):
    """Read and check what is to be compared; nothing is written → {folder: results}, groups (see grouped())."""
    folders = [os.path.normpath(folder) for folder in listed(knobs.runs)]
    if not folders:
        raise Refusal('name the folders of finished runs: python compare.py out/aba_1 out/aba_2')
    found = {folder: read_results(folder) for folder in folders}
    if len(found) < len(folders):
        raise Refusal(f'{", ".join(folders)}: the same run twice')
    check_runs(found)
    wanted = listed(knobs.methods)
    known = dict.fromkeys(row['method'] for results in found.values() for row in results['rows'])
    if set(wanted) - set(known):
        raise Refusal(f'--methods={knobs.methods}: allowed are {", ".join(known)}')
    groups = grouped(list(found.values()), read_labels(knobs.labels), wanted)
    check_out(knobs.out, folders)
    return found, groups


def main(knobs):
    """Compare finished runs: print the table, and write it and the picture."""
    found, groups = prepared(knobs)
    os.makedirs(knobs.out, exist_ok=True)
    paths = {file: os.path.join(knobs.out, file) for file in FILES}
    claim(knobs.out, *paths.values())
    every = list(found.values())
    table = format_table(every, groups)
    print(table)
    write_text(paths['compare.csv'], compare_csv(groups))
    write_text(paths['table.txt'], table)
    write_text(paths['table.tex'], latex_table(every, groups))
    written = list(FILES)
    try:
        draw(paths['results.pdf'], every, groups)
        draw(paths['results.png'], every, groups)
    except ImportError:
        written = written[:3]
        print('no pictures: pip install matplotlib')
    print(f'{", ".join(written)}: in {knobs.out}')


if __name__ == '__main__':
    main(SimpleNamespace(**settings))
