"""
Which rows of a run are drawn, in which colours, and what the pictures show of them. How a panel looks: support/plots.py.

    draw('out/aba/results.pdf', [results], groups)          results: see figures.py; groups: see compare.grouped
"""
import numpy as np

from figures import away_phases, row_of, running_mean
from support import plots
from support.files import write_atomically

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
    ('vit', 'memory'): ('#009E73', (0, (7, 1))),
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

    Of several rows, which are seeds or runs, each a mean over its streams: the range. Of one row: two standard errors
    of the mean over its streams, or no band (None) where other groups have several rows, `repeats`.
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
            losses = np.concatenate([row['probes'][domain] for row in rows for domain in domains])
            probes[held_out] = results['probe_at'], losses.mean(0)
    width = 1.0
    if 'memory' in rows[0]['carries']:
        width = 1.6
    if not rows[0]['model']:
        width = 0.8
    return {'title': name, 'colour': colour, 'style': style, 'width': width, 'loss': band(rows, 'loss', repeats),
            'metres': band(rows, 'metres', repeats), 'probes': probes}


def diagnosed(drawn, streams):
    """
    The diagnostics of a drawn group with an action memory, or else of the last that carries something → its 'title',
    'colour' and 'seen', {name: (seeds, clips)}, the retention as 10-clip means, or None.
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
    # Single clips flicker between keeping and forgetting.
    if 'retention, action memory' in seen:
        seen['retention, action memory'] = np.array([running_mean(kept) for kept in seen['retention, action memory']])
    title = f'{name}, mean of {streams} streams' if streams > 1 else name
    return {'title': title, 'colour': colour, 'seen': seen}


def draw(path, found, groups):
    """The picture of one or several runs, PNG or PDF by its name's end. Raises ImportError without matplotlib."""
    one = found[0]
    drawn = drawn_groups(groups)
    repeats = max(len(rows) for rows, _, _ in drawn.values())
    bands = ''
    if repeats > 1:
        what = 'runs' if len(found) > 1 else 'seeds'
        bands = f'bands: range of\n{repeats} {what}'
    elif one['streams'] > 1:
        bands = f'bands: 2 std. errors\nover {one["streams"]} streams'
    readout = one['readout'] and [one['readout'][domain] for domain in one['domains']]
    stream = {'labels': one['labels'], 'clips': one['clips'], 'bands': bands, 'readout': readout,
              'away': [i in away_phases(one['domains']) for i in range(len(one['domains']))],
              'loss': f'{one["loss"]} L1\nmean of 10 clips', 'probes': list(probed(one))}
    lines = [line_of(name, *look, one, repeats) for name, look in drawn.items()]

    def draw_results(file):
        plots.draw_stream(file, stream, lines, diagnosed(drawn, one['streams']), path.rpartition('.')[2])
    write_atomically(path, draw_results)


# ---- pictures of predictions -----------------------------------------------------------------------------------------

def shown_clips(results, groups, clips, decode):
    """
    Pictures of the clips of the first stream whose predictions were kept, row['shown'], and of these predictions.

    clips: what gives (z, a) for a list of numbers of clips of the first stream. decode: features (m,k,N,D) → pictures
    (m,k,H,W,3), numpy, in 0..1. Returns None where nothing was kept, or a dict:
    phases   the label of the phase of each clip
    numbers  of each clip within its phase, from 1
    steps    the target steps, K of them
    seen     (clips,1+K,H,W,3), step 1 and the target steps
    pushes   (clips,2), or None where an action is not two numbers
    rows     [{'title', 'colour', 'predicted': (clips,K,H,W,3), 'loss': (clips,)}, ...], with the row's model, method,
             seed and carries
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
                     'seed': row['seed'], 'carries': row['carries'], 'predicted': predicted,
                     'loss': np.array(row['loss'][0])[places]})
    n, steps = results['clips'], results['target_steps']
    return {
        'phases': [results['labels'][place // n] for place in places],
        'numbers': [place % n + 1 for place in places],
        'steps': steps,
        'seen': decode(z[:, [0] + [step - 1 for step in steps]]),
        'pushes': a[:, 0].cpu().numpy() if a.shape[-1] == 2 else None,
        'rows': rows,
    }


def animated_rows(shown):
    """The two rows that the animation compares, a model frozen and with a memory that it carries; None without both."""
    for row in shown['rows']:
        frozen = row_of(shown['rows'], row['model'], 'frozen', row['seed'])
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
