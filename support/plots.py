"""All pictures, one function each. run and groups: what report.read() and report.grouped() return."""
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

import data
from support.planning import positions

if 'ipykernel' not in sys.modules:
    # Into files. A notebook shows figures in its own way.
    matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.animation import PillowWriter

# What is drawn first, where there is more than can be drawn; and how the first, the second ... line looks, in
# colours that the colour-blind can tell apart (Okabe and Ito, 2008).
FIRST = ['HOPE memory', 'HOPE frozen', 'ViT-AC LN-TTA', 'ViT-AC memory', 'HOPE LN-TTA', 'blank']
COLOURS = ['#D55E00', 'black', '#0072B2', '#009E73', '#56B4E9', '0.6']
DASHES = ['-', '--', '-.', (0, (7, 1)), (0, (2, 1)), ':']
STYLE = {'font.size': 8, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.linewidth': 0.6,
         'legend.frameon': False, 'legend.fontsize': 7, 'legend.title_fontsize': 7}
BESIDE = {'loc': 'upper left', 'bbox_to_anchor': (1, 1)}


def drawn(groups, most):
    """At most so many of the groups, those of FIRST first → {name: rows}; a rate of the plan is not drawn."""
    def rank(name):
        plain = f'{groups[name][0]["model"]} {groups[name][0]["method"]}'.strip()
        return [*FIRST, plain].index(plain), not groups[name][0]['model']
    tuned = [name for name in groups if groups[name][0]['rate_from'] != 'plan']
    return {name: groups[name] for name in sorted(tuned, key=rank)[:most]}


def repeats(values):
    """What intervals are over, of values (seeds,S,...): the seeds' means; of one seed its streams."""
    return values.mean(1) if len(values) > 1 else values[0]


def running_mean(values, width=10):
    """Mean of each window of `width` neighbours along the last axis, (...,n) → (...,n-width+1)."""
    width = min(width, values.shape[-1])
    return np.lib.stride_tricks.sliding_window_view(values, width, axis=-1).mean(-1)


# ---- the stream --------------------------------------------------------------------------------------------

def draw_stream(path, run, groups):
    """A stream of phases: loss, position error, held-out probes, and what one memory reports."""
    groups = drawn(groups, 6)
    home, *others = dict.fromkeys(run['domains'])
    panels = [(2.2, draw_losses, 'loss', f'{run["loss"]} L1\nmean of 10 clips')]
    if any(rows[0]['metres'] is not None for rows in groups.values()):
        panels.append((1.5, draw_losses, 'metres', 'position error [m]\nmean of 10 clips'))
    panels.append((1.1, draw_probes, [home], f'loss on held-\nout clips of {home}'))
    if others:
        name = others[0] if len(others) == 1 else 'others'
        panels.append((1.1, draw_probes, others, f'loss on held-\nout clips of {name}'))
    for kind, lines in reported(groups).items():
        panels.append((0.8, draw_diagnostics, lines, kind))
    heights = [height for height, *_ in panels]
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(len(panels), 1, figsize=(6.3, 0.7 + sum(heights)), height_ratios=heights,
                                 sharex=True, squeeze=False, layout='constrained')
        for ax, (_, draw, what, label) in zip(axes[:, 0], panels):
            shade_phases(ax, run)
            draw(ax, run, groups, what)
            ax.set_ylabel(label)
        top, bottom = axes[0, 0], axes[-1, 0]
        for i, label in enumerate(run['labels']):
            place = (i + 0.5) / len(run['labels']), 1.03
            top.annotate(label, place, xycoords='axes fraction', ha='center')
        top.legend(**BESIDE)
        bottom.set_xlabel('clip of the stream; bands: one standard deviation of seeds, or of streams of one')
        fig.align_ylabels()
        fig.savefig(path, dpi=160)
        plt.close(fig)


def reported(groups):
    """What the first memory that reports more than a surprise has to say → {kind: {line: (seeds,clips)}}."""
    kinds = {}
    for name, rows in groups.items():
        first = rows[0]['diagnostics'][0] if rows[0]['diagnostics'] else {}
        if len(first) > 1 and not kinds:
            for key in first:
                kind, _, block = key.partition(', ')
                values = [[clip[key] for clip in row['diagnostics']] for row in rows]
                kinds.setdefault(kind, {})[f'{name} {block}'.strip()] = np.array(values)
    return kinds


def shade_phases(ax, run):
    """Phases away from home are shaded, and a thin line stands between two phases."""
    n = run['clips']
    for i, domain in enumerate(run['domains']):
        if domain != run['domains'][0]:
            ax.axvspan(i * n, (i + 1) * n, color='0.93', lw=0, zorder=0)
        ax.axvline(i * n, color='0.8', lw=0.6, zorder=0)
    ax.set_xlim(0, n * len(run['domains']))


def draw_band(ax, values, **style):
    """10-clip means of values (repeats,clips) along the stream: mean and standard deviation."""
    smooth = running_mean(values)
    mean = smooth.mean(0)
    x = np.arange(values.shape[1] - len(mean), values.shape[1]) + 1
    ax.plot(x, mean, lw=1.2, **style)
    if len(values) > 1:
        std = smooth.std(0, ddof=1)
        ax.fill_between(x, mean - std, mean + std, color=style['color'], alpha=0.2, lw=0)


def draw_losses(ax, run, groups, key):
    """The losses, or the errors in metres, of each group along the stream."""
    for (name, rows), colour, dashes in zip(groups.items(), COLOURS, DASHES):
        if rows[0][key] is not None:
            values = repeats(np.array([row[key] for row in rows]))               # (repeats,P,n)
            draw_band(ax, values.reshape(len(values), -1), label=name, color=colour, ls=dashes)
    ax.set_ylim(0, None)


def draw_probes(ax, run, groups, domains):
    """Mean loss on held-out clips of some domains, at the clips of the stream after which it was measured."""
    for rows, colour in zip(groups.values(), COLOURS):
        if rows[0]['probes']:
            loss = np.mean([row['probes'][domain] for row in rows for domain in domains], axis=(0, 1))
            ax.plot(run['probe_at'], loss, 'o', color=colour, ms=4, mfc='none', clip_on=False)
    ax.set_ylim(0, None)


def draw_diagnostics(ax, run, groups, lines):
    """What a memory reports of one kind, such as its surprise: a line for each block or level."""
    for (name, values), dashes in zip(lines.items(), DASHES):
        draw_band(ax, values, label=name, color='black', ls=dashes)
    ax.legend(**BESIDE)


# ---- predictions -------------------------------------------------------------------------------------------

def shown_clips(run, groups):
    """
    Pictures of the clips of the first stream whose predictions adapt.py kept; None where that cannot be.

    A dict: clips ('A₁, clip 7'), steps ('step 1' and the targets), pictures {'what came' or a group's name:
    (clips,steps,H,W,3)}, loss {group's name: (clips,)}, places (clips,steps,2) of the object in px, or None.
    """
    folder = Path(data.folder_of(run['config']['data']))
    kept = {name: rows[0]['file'].with_suffix('.npz') for name, rows in drawn(groups, 5).items()}
    kept = {name: np.load(file) for name, file in kept.items() if file.is_file()}
    if not kept or not (folder / 'decoder.npy').is_file():
        return None
    clips = [(data.Clips(str(folder), split), index) for split, index in run['shown']]
    meta = clips[0][0].meta
    decoder = torch.from_numpy(np.load(folder / 'decoder.npy'))

    def decode(z):
        """Features (clips,k,N,D) → pictures (clips,k,H,W,3)."""
        seen = data.pictures(z.flatten(0, 1).float(), decoder, meta['grid'], meta['patch'])
        return seen.unflatten(0, z.shape[:2]).numpy()
    at = [0] + [step - 1 for step in run['target_steps']]
    came = decode(torch.stack([split[index][0] for split, index in clips])[:, at])
    shown, losses = {'what came': came}, {}
    for name, file in kept.items():
        predicted = decode(torch.from_numpy(file['predicted']))
        shown[name] = np.concatenate([came[:, :1], predicted], 1)
        losses[name] = groups[name][0]['loss'][0].ravel()[file['numbers']]
    places = None
    if all('position' in split.physics for split, _ in clips):
        metres = torch.cat([positions(split, [index]) for split, index in clips])
        places = metres[:, at].numpy() / data.WORLD * came.shape[2] - 0.5
    titles = [f'{run["labels"][i // run["clips"]]}, clip {i % run["clips"] + 1}' for i in file['numbers']]
    steps = [f'step {step + 1}' for step in at]
    return {'clips': titles, 'steps': steps, 'pictures': shown, 'loss': losses, 'places': places}


def show_picture(ax, shown, title, clip, step):
    """A picture of a clip, its loss below it, and in it a ring where the object really is."""
    picture = shown['pictures'][title][clip, step]
    ax.imshow(picture, interpolation='bicubic')
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_xlabel(f'loss {shown["loss"][title][clip]:.3f}' if step and title in shown['loss'] else '')
    if shown['places'] is not None:
        place = shown['places'][clip, step]
        ax.add_patch(plt.Circle(place, 0.15 * len(picture), fill=False, color='white', lw=0.8))


def draw_predictions(path, shown):
    """The last five of the shown_clips(): what was given, what came, what was predicted for the last step."""
    last = len(shown['steps']) - 1
    columns = [('what came', 0, 'given:\nstep 1')]
    columns += [(title, last, title.replace(' ', '\n', 1)) for title in shown['pictures']]
    clips = range(len(shown['clips']))[-5:]
    size = 0.95 * len(columns), 1.15 * len(clips) + 0.7
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(len(clips), len(columns), figsize=size, squeeze=False, layout='constrained')
        for line, clip in zip(axes, clips):
            for ax, (title, step, heading) in zip(line, columns):
                show_picture(ax, shown, title, clip, step)
                ax.set_title(heading if clip == clips[0] else '', fontsize=8)
            line[0].set_ylabel(shown['clips'][clip].replace(', ', '\n'))
        fig.suptitle(f'{shown["steps"][-1]}, from step 1 and the action; ring: the object', fontsize=8)
        fig.savefig(path, dpi=160)
        plt.close(fig)


def draw_animation(path, shown):
    """GIF of the first twelve of the shown_clips(), step by step: what came, what two methods predicted."""
    titles = list(shown['pictures'])[:3]
    writer = PillowWriter(fps=3)
    fig, axes = plt.subplots(1, len(titles), figsize=(2.4 * len(titles), 3.1), squeeze=False)
    fig.subplots_adjust(left=0.01, right=0.99, bottom=0.08, top=0.82, wspace=0.03)
    with writer.saving(fig, path, dpi=80):
        for clip, step in np.ndindex(min(12, len(shown['clips'])), len(shown['steps'])):
            for ax, title in zip(axes[0], titles):
                for artist in (*ax.images, *ax.patches, *ax.texts):
                    artist.remove()
                ax.set_title(title)
                show_picture(ax, shown, title, clip, step)
            fig.suptitle(f'{shown["clips"][clip]}: {shown["steps"][step]}')
            writer.grab_frame()
    plt.close(fig)


# ---- prepare.py --------------------------------------------------------------------------------------------

def draw_domains(path, rows):
    """
    Clips of each domain: a row per domain, a picture per clip. The first frame is dim, the last one bright.

    rows: {label: frames (n,F,H,W,3) float in [0,1]}, n the same in all.
    """
    shown = len(next(iter(rows.values())))
    size = 1.3 * shown, 1.4 * len(rows)
    fig, axes = plt.subplots(len(rows), shown, figsize=size, squeeze=False, layout='constrained')
    for row, (label, frames) in zip(axes, rows.items()):
        middle = frames.shape[1] // 2
        brightest = np.maximum(0.4 * frames[:, 0], 0.65 * frames[:, middle])
        for ax, picture in zip(row, np.maximum(brightest, frames[:, -1])):
            ax.imshow(picture)
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(label, fontsize=8)
    fig.suptitle('The same impulses in every domain: first (dim), middle and last (bright) frame')
    fig.savefig(path, dpi=90)
    plt.close(fig)
