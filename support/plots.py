"""All plots, one function per panel. Each gets its numbers as parameters."""
import os
import sys

import numpy as np


def pyplot():
    """matplotlib.pyplot, set to draw into files, except in a notebook. Raises ImportError where matplotlib is missing."""
    if 'matplotlib' not in sys.modules:
        # What a notebook has set there for its own Python may not exist here, and would fail.
        os.environ['MPLBACKEND'] = 'Agg'
    import matplotlib.pyplot as plt
    return plt


# ---- adapt.py and compare.py -----------------------------------------------------------------------------------------

def draw_stream(file, rows, n, loss_label, labels, home, diagnosed=None, kind='png'):
    """
    A→X→A with n clips a phase: loss along the stream, held-out probes, and the diagnostics of one row.

    file: an open file, written as `kind`, 'png' or 'pdf'. rows: [{'title', 'losses': a running mean of each run,
    'probes': {'A': [(clip, loss), ...], 'B': ...}, 'bold', 'dotted'}, ...]. labels: the names of the phases; home: that
    of the home probes. diagnosed: (title, {name: values (3n,)}, reference of the surprise) or None.
    """
    plt = pyplot()
    heights = [2, 1.2, 1, 1] if diagnosed else [2, 1.2]
    size = 9, 2.6 + 2.2 * len(heights)
    fig, axes = plt.subplots(len(heights), 1, figsize=size, sharex=True, height_ratios=heights)
    for ax in axes:
        ax.axvspan(n, 2 * n, color='0.93', zorder=0)
        ax.margins(x=0.01)
    # Grey for the two guesses, the baselines without a model.
    greys = ['0.6', '0.8']
    bright = [f'C{i % 10}' for i in range(len(rows))]
    colours = [greys.pop(0) if row['dotted'] else bright.pop(0) for row in rows]
    loss_panel(axes[0], rows, colours, n, loss_label, labels)
    probe_panel(axes[1], rows, colours, home, labels[1])
    if diagnosed:
        title, seen, reference = diagnosed
        surprise_panel(axes[2], title, seen, n, reference, labels[0])
        if 'gain, action memory' in seen:
            map_panel(axes[3], seen)
        else:
            drift_panel(axes[3], seen)
    axes[-1].set_xlabel('clip of the stream')
    fig.tight_layout()
    fig.savefig(file, dpi=100, format=kind)
    plt.close(fig)


def loss_panel(ax, rows, colours, n, label, labels):
    """Running means of the rows' losses along the stream: their mean over the runs, and the band that the runs span."""
    for row, colour in zip(rows, colours):
        last = 3 * n
        losses = np.array(row['losses'])
        x = np.arange(last - losses.shape[1], last) + 1
        width = 2 if row['bold'] else 1.2
        style = ':' if row['dotted'] else '-'
        ax.plot(x, losses.mean(0), label=row['title'], color=colour, lw=width, ls=style)
        if len(losses) > 1:
            ax.fill_between(x, losses.min(0), losses.max(0), color=colour, alpha=0.2, lw=0)
    ax.set(ylabel=label, ylim=(0, None))
    for x, phase in zip((0.5, 1.5, 2.5), labels):
        ax.text(x * n, ax.get_ylim()[1] * 0.97, phase, ha='center', va='top')
    ax.legend(fontsize=8, loc='lower center', bbox_to_anchor=(0.5, 1), ncols=4)


def probe_panel(ax, rows, colours, home, shift):
    """Losses on the held-out clips of the home world and of the shift."""
    for row, colour in zip(rows, colours):
        for name, style in (('A', '-'), ('B', '--')):
            if row['probes']:
                clips, losses = zip(*row['probes'][name])
                ax.plot(clips, losses, style, color=colour, marker='.')
    ax.set(ylabel=f'held-out probes\n{home} (solid), {shift} (dashed)', ylim=(0, None))


def surprise_panel(ax, title, seen, n, reference, first):
    """
    Surprises over their mean in the first phase, and in bold their means over 1, 2, 4, ... clips since the last switch
    of worlds.

    Where there is an action memory, its retention is drawn above, from 0 to 1.
    """
    x = np.arange(3 * n) + 1
    # The interval of 2^i clips starts at clip 2^i - 1 of a phase.
    starts = []
    for phase in range(3):
        for i in range(n.bit_length()):
            starts.append(phase * n + 2 ** i - 1)
    lengths = np.diff(starts + [3 * n])
    for key, values in seen.items():
        kind, _, name = key.partition(', ')
        if kind == 'surprise':
            values = values / values[:n].mean()
            means = np.add.reduceat(values, starts) / lengths
            line, = ax.plot(x, np.repeat(means, lengths), lw=1.2, label=name or f'loss over {reference}')
            ax.plot(x, values, color=line.get_color(), alpha=0.25, lw=0.8)
    ax.set(ylabel=f'surprise, over\nits mean in {first}', ylim=(0, 1.3 * ax.get_ylim()[1]))
    ax.legend(fontsize=8, loc='center left', title=title, title_fontsize=8)
    if 'retention, action memory' in seen:
        right = ax.twinx()
        right.plot(x, seen['retention, action memory'], color='C2', lw=0.6, alpha=0.7)
        # In the upper part of the panel.
        right.set(ylabel='retention', ylim=(-2, 1.1), yticks=(0, 1))
        right.yaxis.label.set_color('C2')


def map_panel(ax, seen):
    """What the action memory does to a push of mean length: by how much it multiplies it, and by how much it turns it."""
    gain = seen['gain, action memory']
    angle = seen['angle, action memory']
    x = np.arange(len(gain)) + 1
    ax.axhline(1, color='0.7', lw=0.8, zorder=0)
    ax.plot(x, gain, color='C0', lw=1.2)
    ax.set(ylabel='push, times', ylim=(0, 1.15 * max(2, gain.max())))
    ax.yaxis.label.set_color('C0')
    if np.isfinite(angle).all():
        right = ax.twinx()
        right.plot(x, angle, color='C1', lw=1.2)
        right.set(ylabel='push, turned by\n[degrees]', ylim=(-90, 90), yticks=(-80, -40, 0, 40, 80))
        right.yaxis.label.set_color('C1')


def drift_panel(ax, seen):
    """Distance of each block's memory and of each CMS level from its initial weights."""
    for key, values in seen.items():
        kind, _, name = key.partition(', ')
        if kind == 'drift':
            x = np.arange(len(values)) + 1
            style = '--' if 'CMS' in key else '-'
            ax.plot(x, values, label=name, ls=style, lw=1.2)
    ax.set(ylabel='drift from\ninitial weights', yscale='log', ylim=(1e-4, 20))
    ax.legend(fontsize=8, loc='upper left', ncols=3)


def draw_predictions(file, columns, middle):
    """The last clips of the middle phase and their predictions: {heading: pictures (clips,H,W,3) in 0..1} → PNG."""
    plt = pyplot()
    rows = len(next(iter(columns.values())))
    size = 1.35 * len(columns), 1.4 * rows + 0.4
    fig, axes = plt.subplots(rows, len(columns), figsize=size, squeeze=False)
    for column, (heading, pictures) in zip(axes.T, columns.items()):
        for ax, picture in zip(column, pictures):
            ax.imshow(picture)
            ax.set_xticks([])
            ax.set_yticks([])
        column[0].set_title(heading, fontsize=8)
    fig.suptitle(f'Last clips of {middle}: what was seen, and what each method predicted for the last step', fontsize=9)
    fig.tight_layout()
    fig.savefig(file, dpi=100)
    plt.close(fig)


# ---- prepare.py ------------------------------------------------------------------------------------------------------

def draw_domains(path, rows):
    """
    Clips of each domain: a row per domain, a picture per clip.

    rows: {label: frames (n,F,H,W,3) float in [0,1]}, n the same in all. In each picture the first frame is dim, the
    middle one brighter and the last one bright.
    """
    plt = pyplot()
    shown = len(next(iter(rows.values())))
    fig, axes = plt.subplots(len(rows), shown, figsize=(shown * 1.3, len(rows) * 1.4))
    for row, (label, frames) in zip(axes, rows.items()):
        middle = frames.shape[1] // 2
        brightest = np.maximum(0.4 * frames[:, 0], 0.65 * frames[:, middle])
        for ax, picture in zip(row, np.maximum(brightest, frames[:, -1])):
            ax.imshow(picture)
            ax.set_xticks([])
            ax.set_yticks([])
        row[0].set_ylabel(label, fontsize=8)
    fig.suptitle('The same impulses in every domain: first (dim), middle and last (bright) frame in one picture')
    fig.tight_layout()
    fig.savefig(path, dpi=90)
    plt.close(fig)


def draw_displacement(path, a, b):
    """Histograms of the displacement over a clip in A and in B: a, b (clips,) in cm, the same impulses in both."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(7, 3))
    edges = np.geomspace(a.min(), b.max(), 40)
    ax.hist(a, edges, alpha=0.6, label='A')
    ax.hist(b, edges, alpha=0.6, label='B')
    ax.axvline(a.max(), color='k', lw=1, ls='--')
    ax.set(xscale='log', xlabel='displacement over the clip [cm]', ylabel='clips')
    ax.set_title(f'{np.mean(b <= a.max()):.0%} of B slide no further than some clip of A; the rest, right of the dashed '
                 f'line,\nmove as A never showed. Median displacement B / A = {np.median(b / a):.2f}', fontsize=9)
    ticks = [1, 2, 5, 10, 20, 50]
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=90)
    plt.close(fig)
