"""
What came out of adapt.py: figures, tables and pictures of finished runs, in seconds.

    python compare.py out/aba_1 out/aba_2 out/aba_3           mean and standard deviation over the runs
    python compare.py out/aba_1 --labels="HOPE memory=Ours,ViT-AC LN-TTA 0.01=TTA"

Nothing is run again: all of it is read from the results.json of each folder. Writes table.txt, table.tex, compare.csv
(one line for each run, row and figure), results.pdf and results.png into `out`. adapt.py takes its own figures from here.
"""
import csv
import io
import json
import os
from types import SimpleNamespace

import numpy as np

from configurator import Refusal, configure, listed
from support import plots
from support.files import MALFORMED, claim, write_atomically, write_text

# what to compare
runs = ''                # folders of finished runs of adapt.py, separated by commas, or by blanks without --runs
methods = ''             # show only these, separated by commas, as they are called in the table; '' = all
labels = ''              # other names for rows: 'HOPE memory=Ours,ViT-AC LN-TTA=TTA'
out = 'out/compare'      # folder for the tables and the picture
settings = configure(globals(), files='runs') if __name__ == '__main__' else {}

EARLY = 25                   # clips at the start of a phase whose mean has a column of its own
# Key in results.json, heading in the table, format. What a figure is: in figures() and below it. In the keys, A and B
# stand for the home phases and the shift, whatever they are called.
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
    ('ms_per_clip', 'ms', '.1f'),
]

# What the columns are, in the words of the table. {first}, {shift}, {last}: names of the phases; {home}: of the probes.
EXPLAINED = {
    'B_within': 'within / beyond: clips of {shift} that slide no further / further than any training clip of A.',
    'B_first': f'1-25: the first {EARLY} clips of {{shift}}.',
    'return_cost': f'return: loss minus frozen loss on the first {EARLY} clips of {{last}}.',
    'forgetting': 'forget: loss on held-out clips of {home} after {shift} minus before {shift}.',
    'gap_closed': "gap: share of the way from the own frozen loss on {shift} to the oracle's.",
    'way_back': 'to A: share of the way from the own frozen loss on {shift} to that on {first}.',
    'of_known': 'known: share of what the best constant map of the push, known in advance, gains.',
    't50': 't50: clips of {shift} to half of the own final gain (never: no gain of 1 %).',
}


# ---- figures of one run ----------------------------------------------------------------------------------------------

def title(row):
    """Name of a row: model, method and learning rate."""
    rate = '' if row['rate'] is None else f'{row["rate"]:g}'
    return ' '.join(part for part in (row['model'], row['method'], rate) if part)


def running_mean(values, width=10):
    """Mean of each window of `width` neighbours, (n-width+1,)."""
    width = min(width, len(values))
    return np.convolve(values, np.ones(width) / width, 'valid')


def by_phase(row):
    """The losses of a row in each of its three phases, (n,) each."""
    return np.split(np.array(row['loss']), 3)


def row_of(rows, model, method):
    """The row of a model and a method, or None."""
    return next((row for row in rows if (row['model'], row['method']) == (model, method)), None)


def figures(row, rows, beyond):
    """
    The figures of one row of the table, {name: number, or None for "never"}.

    beyond (n,): which of the n clips of B slide further than any training clip of A, or None.
    """
    a1, b, a2 = by_phase(row)
    found = {
        'A1': a1.mean(),
        'B': b.mean(),
        'B_first': b[:EARLY].mean(),
        'B_last': b[-EARLY:].mean(),
        'A2': a2.mean(),
        'A2_first': a2[:EARLY].mean(),
        'ms_per_clip': 1e3 * np.median(row['seconds']),
    }
    if beyond is not None:
        beyond = np.array(beyond, bool)
        if not beyond.all():
            found['B_within'] = b[~beyond].mean()
        if beyond.any():
            found['B_beyond'] = b[beyond].mean()
    if row['probes']:
        found['forgetting'] = forgetting(row['probes']['A'], len(b))
    frozen = row_of(rows, row['model'], 'frozen')
    if frozen and row is not frozen:
        found |= against_frozen(row, frozen)
        found |= shares(row, frozen, rows)
    return found


def forgetting(probes, n):
    """Loss on held-out clips of A after B minus before B: probes [(clips seen, loss), ...], n clips a phase."""
    before = [loss for seen, loss in probes if seen <= n][-1]
    after = [loss for seen, loss in probes if seen <= 2 * n][-1]
    return after - before


def against_frozen(row, frozen):
    """The figures that compare a row with the model's own frozen row."""
    _, b, a2 = by_phase(row)
    _, frozen_b, frozen_a2 = by_phase(frozen)
    gain = running_mean(frozen_b - b)
    final = gain[-EARLY:].mean()
    reached = np.flatnonzero(gain >= 0.5 * final)
    found = {'t50': None}
    # Half of a gain of nearly nothing would be reached with the first clip.
    if final > 0.01 * frozen_b.mean() and len(reached):
        found['t50'] = int(reached[0]) + 1
    found['return_cost'] = (a2 - frozen_a2)[:EARLY].mean()
    return found


def shares(row, frozen, rows):
    """
    Which shares of what could be gained on B a row gains: of the way to the oracle, back to A₁, and of the known push.

    A share is left out where it would say nothing: where what could be gained is not clearly above zero, where the bound
    is no better than an empty scene, and for a model that is no better than that in A₁, which has learned nothing.
    """
    blank_a1, blank_b, _ = by_phase(row_of(rows, '', 'blank'))
    frozen_a1, frozen_b, _ = by_phase(frozen)
    _, b, _ = by_phase(row)
    if frozen_a1.mean() >= blank_a1.mean():
        return {}
    bound = row_of(rows, 'oracle', 'frozen')
    known = row_of(rows, row['model'], 'push known')
    best = {}
    if bound:
        best['gap_closed'] = by_phase(bound)[1]
    else:
        best['way_back'] = frozen_a1
    if known:
        best['of_known'] = by_phase(known)[1]
    found = {}
    for name, best_b in best.items():
        gain = frozen_b - best_b
        error = gain.std() / len(gain) ** 0.5
        clear = gain.mean() > max(2 * error, 0.05 * frozen_b.mean())
        if clear and best_b.mean() < blank_b.mean():
            found[name] = (frozen_b - b).mean() / gain.mean()
    return found


# ---- files of one run ------------------------------------------------------------------------------------------------

def results_json(results):
    """The text of results.json. What is kept in memory for pictures alone is left out."""
    rows = [{key: value for key, value in row.items() if key not in ('shown', 'state')} for row in results['rows']]
    return json.dumps({**results, 'rows': rows}, indent=1)


def results_csv(results):
    """The text of results.csv: the loss of every clip."""
    n, rows, beyond = results['clips'], results['rows'], results['beyond']
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(['clip', 'phase', 'beyond_A'] + [title(row) for row in rows])
    far = [''] * (3 * n)
    if beyond is not None:
        far = [0] * n + [int(flag) for flag in beyond] + [0] * n
    for i in range(3 * n):
        phase = plain(results['labels'][i // n])
        writer.writerow([i + 1, phase, far[i]] + [f'{row["loss"][i]:.6f}' for row in rows])
    return text.getvalue()


def plain(label):
    """A₁ → A1."""
    return label.replace('₁', '1').replace('₂', '2')


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
        for name in ('key', 'clips', 'labels', 'loss', 'target_steps', 'tuning', 'tuned_on', 'home', 'beyond', 'rows'):
            if name not in results:
                raise ValueError(f'it has no {name}')
        for row in results['rows']:
            row['run'] = folder
            row['figures'] = figures(row, results['rows'], results['beyond'])
        return results
    except MALFORMED as error:
        why = ' '.join(str(error).split())[:200]
        raise Refusal(f'{path} is not what this version of adapt.py writes ({why}); run adapt.py again') from None


def check_runs(found):
    """Raises Refusal for runs, {folder: results}, that cannot be compared, or the same one twice."""
    (first, one), *others = found.items()
    for folder, other in others:
        for name in ('labels', 'clips', 'loss', 'target_steps'):
            if other[name] != one[name]:
                raise Refusal(f'{first} and {folder} cannot be compared: {name} = {one[name]} and {other[name]}')
    seen = {}
    for folder, results in found.items():
        twin = seen.setdefault(json.dumps(results['key'], sort_keys=True), folder)
        if twin != folder:
            raise Refusal(f'{twin} and {folder} are the same run')


# ---- tables of one or several runs -----------------------------------------------------------------------------------

def grouped(found, names=None, wanted=()):
    """
    The rows of one or several runs (a list of results) that belong together → {name: [a row of each run that has it]}.

    With several runs a name has no learning rate, because each run may have tuned another. names: {name: another name
    for it}; wanted: show the rows of these methods only.
    """
    together = {}
    for results in found:
        for row in results['rows']:
            bare = len(found) > 1 and row['rate_from'] != 'plan'
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


def shown_columns(groups):
    """The columns that some row has a figure for."""
    there = {key for rows in groups.values() for row in rows for key in row['figures']}
    return [column for column in COLUMNS if column[0] in there]


def heading(column, results):
    """The heading of a column of the table; phases as they are called."""
    key, text, _ = column
    first, shift, _ = results['labels']
    return {'A1': first[:6], 'B': shift[:6]}.get(key, text)


def mean_and_deviation(rows, key):
    """
    Mean and standard deviation (None for one run) of a figure over the rows of a group.

    None where it has no meaning for one of them; 'never', or in how many runs, where it was not reached in all.
    """
    values = [row['figures'][key] for row in rows if key in row['figures']]
    if len(values) < len(rows):
        return None, None
    reached = [value for value in values if value is not None]
    if len(reached) < len(values):
        return f'{len(reached)} of {len(values)}' if reached else 'never', None
    deviation = np.std(reached, ddof=1) if len(reached) > 1 else None
    return np.mean(reached), deviation


def table_line(name, rows, columns, which):
    """One line of the table: the means (which = 0) or the standard deviations (1) of a group."""
    cells = []
    for key, _, form in columns:
        value = mean_and_deviation(rows, key)[which]
        if value is not None and not isinstance(value, str):
            value = format(value, form if which == 0 else form.lstrip('+'))
        cells.append(f'{value or "":>7}')
    return f'{name:<23}' + ''.join(cells)


def format_table(found, groups):
    """The text of table.txt: found is a list of results, one or several; groups: see grouped()."""
    one = found[0]
    columns = shown_columns(groups)
    lines = [f'{"loss on the stream":<23}' + ''.join(f'{heading(column, one):>7}' for column in columns)]
    for name, rows in groups.items():
        lines.append(table_line(name, rows, columns, 0))
        if len(rows) > 1:
            lines.append(table_line(f'{"±":>22}', rows, columns, 1))
    steps = ', '.join(map(str, one['target_steps']))
    lines.append(f'\n{one["loss"]} L1, mean over target steps {steps}; {one["clips"]} clips a phase, scored before the '
                 'look-back.')
    first, shift, last = one['labels']
    for key, _, _ in columns:
        if key in EXPLAINED:
            lines.append(EXPLAINED[key].format(first=first, shift=shift, last=last, home=one['home']))
    if len(found) > 1:
        lines.append(f'Mean and standard deviation (±) over {len(found)} runs.')
        for name, rows in groups.items():
            rates = [f'{row["rate"]:g}' for row in rows if row['rate_from'] not in ('', 'plan')]
            if rates:
                lines.append(f'Rates of {name}: {", ".join(rates)}.')
            if len(rows) < len(found):
                lines.append(f'{name} is in {len(rows)} of them.')
    else:
        lines += rate_lines(one)
    return '\n'.join(lines) + '\n'


def in_words(shifts):
    """What rates are tuned on: ['C', 'scaled'] → 'C, clips with scaled pushes'."""
    return ', '.join(shifts).replace('scaled', 'clips with scaled pushes')


def on_the_edge(rate, tried):
    """Whether a rate is the lowest or the highest of those that were tried, so that one beyond may be better."""
    return rate in (min(tried), max(tried))


def rate_lines(results):
    """Where the learning rates of a run come from, with a warning for each that lies on the edge of what was tried."""
    lines = []
    for row in results['rows']:
        name = title({**row, 'rate': None})
        if row['rate_from'] == 'tuned':
            tried = [float(rate) for rate in results['tuning'][name]]
            grid = ', '.join(f'{rate:g}' for rate in tried)
            lines.append(f'Rate of {name} tuned on {in_words(results["tuned_on"])} among {grid}.')
            if on_the_edge(row['rate'], tried):
                lines.append(f'Warning: {row["rate"]:g} lies on the edge of them; a rate beyond may be better.')
        elif row['rate_from'] in ('given', 'default'):
            source = {'given': 'as given', 'default': 'the default, measured on the built-in physics'}[row['rate_from']]
            lines.append(f'Rate of {name}: {row["rate"]:g}, {source}; not tuned.')
    return lines


# What LaTeX would take for a command, and what it cannot read.
ESCAPES = {character: '\\' + character for character in '&%$#_{}'}
ESCAPES |= {'\\': r'\textbackslash{}', '~': r'\textasciitilde{}', '^': r'\textasciicircum{}', '₁': '$_1$', '₂': '$_2$'}


def escaped(text):
    """Text for LaTeX."""
    return text.translate(str.maketrans(ESCAPES))


def latex_table(found, groups):
    """The text of table.tex, a tabular without packages: mean, and standard deviation where there are several runs."""
    columns = shown_columns(groups)
    headings = ['loss on the stream'] + [heading(column, found[0]) for column in columns]
    lines = [r'\begin{tabular}{l' + 'r' * len(columns) + '}', r'\hline']
    lines += [' & '.join(map(escaped, headings)) + r' \\', r'\hline']
    for name, rows in groups.items():
        cells = [escaped(name)]
        for key, _, form in columns:
            mean, deviation = mean_and_deviation(rows, key)
            if mean is None or isinstance(mean, str):
                cells.append(mean or '')
                continue
            cell = format(mean, form)
            if deviation is not None:
                # The unit stands once, behind both.
                cell = cell.rstrip('%') + r' \pm ' + format(deviation, form.lstrip('+'))
            cells.append('$' + cell.replace('%', r'\,\%') + '$')
        lines.append(' & '.join(cells) + r' \\')
    lines += [r'\hline', r'\end{tabular}']
    return '\n'.join(lines) + '\n'


def compare_csv(groups):
    """The text of compare.csv: one line for each run, row and figure; the value is empty for "never"."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(['run', 'row', 'model', 'method', 'rate', 'figure', 'value'])
    for name, rows in groups.items():
        for row in rows:
            for figure, value in row['figures'].items():
                writer.writerow([row['run'], name, row['model'], row['method'], row['rate'], figure, value])
    return text.getvalue()


# ---- the pictures ----------------------------------------------------------------------------------------------------

# At most this many lines a panel; more could not be told apart.
DRAWN = 6
# At most this many methods in the pictures of predictions.
PREDICTED = 5
# What is drawn first where more was run, as kind of model and method, with its colour and line style, the same in every
# picture. The colours can be told apart by the colour-blind (Okabe and Ito, 2008), the styles in black and white.
STYLES = {
    ('hope', 'memory'): ('#D55E00', '-'),
    ('hope', 'frozen'): ('black', (0, (5, 1.5))),
    ('vit', 'LN-TTA'): ('#0072B2', (0, (4, 1, 1, 1))),
    ('vit', 'memory'): ('#009E73', '-'),
    ('hope', 'LN-TTA'): ('#56B4E9', (0, (2, 1))),
    ('', 'blank'): ('0.6', ':'),
    ('vit', 'frozen'): ('0.35', (0, (6, 1, 1, 1, 1, 1))),
    ('', 'copy'): ('0.75', ':'),
}
# Of what is not listed above, in order.
OTHERS = [('#CC79A7', '-'), ('#E69F00', '--'), ('#0072B2', '-'), ('#009E73', '--'), ('#56B4E9', '-'), ('black', ':')]


def drawn_groups(groups, most=DRAWN):
    """What is drawn of the groups → {name: (its rows, colour, style)}: of two of a model and method the first."""
    first = {}
    for name, rows in groups.items():
        first.setdefault((rows[0]['model'], rows[0]['method']), name)
    order = list(STYLES)

    def rank(name):
        key = groups[name][0]['kind'], groups[name][0]['method']
        return order.index(key) if key in order else len(order)
    chosen = sorted(first.values(), key=rank)[:most]
    drawn, used, others = {}, set(), list(OTHERS)
    # In the order of the table.
    for name in sorted(chosen, key=list(groups).index):
        key = groups[name][0]['kind'], groups[name][0]['method']
        if key in STYLES and key not in used:
            look = STYLES[key]
        else:
            look = others.pop(0)
        used.add(key)
        drawn[name] = groups[name], *look
    return drawn


def band(rows, key, repeats):
    """
    10-clip means along the stream of the rows of a group → (mean, lowest, highest), or None where one has none.

    Of several rows, which are seeds or runs, each a mean over its streams: the range. Of one row the mean over its streams
    and two standard errors of it; no band (None) where other groups have several rows, `repeats`.
    """
    if any(row[key] is None for row in rows):
        return None
    values = rows[0][key]
    if len(rows) > 1:
        values = [np.mean(row[key], axis=0) for row in rows]
    smooth = np.array([running_mean(losses) for losses in values])
    mean = smooth.mean(0)
    if len(rows) > 1:
        return mean, smooth.min(0), smooth.max(0)
    if repeats > 1 or len(smooth) == 1:
        return mean, None, None
    error = smooth.std(0, ddof=1) / len(smooth) ** 0.5
    return mean, mean - 2 * error, mean + 2 * error


def probed(results):
    """Which held-out clips are drawn → {name: the domains that it is the mean of}: home's, and those of all others."""
    home, *others = dict.fromkeys(results['domains'])
    names = {home: [home]}
    if others:
        names[', '.join(others)] = others
    return names


def line_of(name, rows, colour, style, results, repeats):
    """What plots.draw_stream() needs to draw a group."""
    probes = {}
    for held_out, domains in probed(results).items():
        if rows[0]['probes']:
            losses = np.mean([row['probes'][domain] for row in rows for domain in domains], axis=(0, 1))
            probes[held_out] = results['probe_at'], losses
    width = 1.0
    if 'memory' in rows[0]['carries']:
        width = 1.6
    if not rows[0]['model']:
        width = 0.8
    return {'title': name, 'colour': colour, 'style': style, 'width': width, 'loss': band(rows, 'loss', repeats),
            'metres': band(rows, 'metres', repeats), 'probes': probes}


def away_of(results):
    """Which phases are away from home, that is of another domain than the first."""
    return [domain != results['domains'][0] for domain in results['domains']]


def diagnosed(drawn):
    """
    The diagnostics of a drawn group with an action memory, or else of the last that carries something → its 'title',
    'colour' and 'seen', {name: (seeds, clips)}, or None.
    """
    carrying = [name for name, (rows, _, _) in drawn.items() if rows[0]['carries'] and rows[0]['diagnostics']]
    if not carrying:
        return None
    writing = [name for name in carrying if 'gain, action memory' in drawn[name][0][0]['diagnostics'][0]]
    name = writing[0] if writing else carrying[-1]
    rows, colour, _ = drawn[name]
    seen = {}
    for key in rows[0]['diagnostics'][0]:
        seen[key] = np.array([[clip[key] for clip in row['diagnostics']] for row in rows])
    return {'title': name, 'colour': colour, 'seen': seen}


def draw(path, found, groups):
    """The picture of one or several runs, PNG or PDF by its name's end. Raises ImportError without matplotlib."""
    one = found[0]
    drawn = drawn_groups(groups)
    repeats = max(len(rows) for rows, _, _ in drawn.values())
    bands = ''
    if repeats > 1:
        bands = f'bands: range of\n{repeats} seeds'
    elif one['streams'] > 1:
        bands = f'bands: 2 std. errors\nover {one["streams"]} streams'
    readout = one['readout'] and [one['readout'][domain] for domain in one['domains']]
    stream = {'labels': one['labels'], 'away': away_of(one), 'clips': one['clips'], 'bands': bands, 'readout': readout,
              'loss': f'{one["loss"]} L1\nmean of 10 clips', 'probes': list(probed(one))}
    lines = [line_of(name, *look, one, repeats) for name, look in drawn.items()]

    def draw_results(file):
        plots.draw_stream(file, stream, lines, diagnosed(drawn), path.rpartition('.')[2])
    write_atomically(path, draw_results)


# ---- pictures of predictions -----------------------------------------------------------------------------------------

def shown_clips(results, groups, clips, decode):
    """
    Pictures of the clips of the first stream whose predictions were kept, row['shown'], and of these predictions.

    clips: what gives (z, a) for a list of numbers of clips of the first stream. decode: features (m,k,N,D) → pictures
    (m,k,H,W,3), numpy, in 0..1. Returns None where nothing was kept, or a dict:
    phase    its label
    steps    the target steps, K of them
    numbers  of the clips within the phase, from 1
    seen     (clips,1+K,H,W,3), step 1 and the target steps
    pushes   (clips,2), or None where an action is not two numbers
    rows     [{'title', 'colour', 'model', 'method', 'carries', 'predicted': (clips,K,H,W,3), 'loss': (clips,)}, ...]
    """
    kept = {name: rows for name, rows in groups.items() if rows[0].get('shown')}
    if not kept:
        return None
    first = next(iter(kept.values()))[0]
    places = sorted(first['shown'])
    z, a = clips[places]
    rows = []
    for name, (members, colour, _) in drawn_groups(kept, PREDICTED).items():
        row = members[0]
        predicted = np.concatenate([decode(row['shown'][place][None]) for place in places])
        rows.append({'title': name, 'colour': colour, 'model': row['model'], 'method': row['method'],
                     'carries': row['carries'], 'predicted': predicted, 'loss': np.array(row['loss'][0])[places]})
    phase = places[0] // results['clips']
    begin = phase * results['clips']
    steps = results['target_steps']
    return {
        'phase': results['labels'][phase],
        'steps': steps,
        'numbers': [place - begin + 1 for place in places],
        'seen': decode(z[:, [0] + [step - 1 for step in steps]]),
        'pushes': a[:, 0].cpu().numpy() if a.shape[-1] == 2 else None,
        'rows': rows,
    }


def animated_rows(shown):
    """Which two rows the animation compares: the first that carries a memory and its model frozen; None without both."""
    for row in shown['rows']:
        frozen = row_of(shown['rows'], row['model'], 'frozen')
        if frozen and 'memory' in row['carries']:
            return [frozen, row]
    return None


def draw_predictions(path, shown):
    """The last five of the shown_clips(). Raises ImportError without matplotlib."""
    write_atomically(path, lambda file: plots.draw_predictions(file, shown))


def draw_animation(path, shown):
    """
    A GIF of the first twelve of the shown_clips() → whether there was anything to compare.

    Raises ImportError without matplotlib.
    """
    rows = animated_rows(shown)
    if rows is None:
        return False
    write_atomically(path, lambda file: plots.draw_animation(file, {**shown, 'rows': rows}))
    return True


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
