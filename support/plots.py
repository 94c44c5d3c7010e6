"""All pictures, one function each. run and groups: what report.read() and report.grouped() return."""
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from matplotlib.patches import Circle

import data
from support.planning import positions

# What is drawn first, and how, in colours that the colour-blind can tell apart (Okabe and Ito, 2008).
FIRST = ['HOPE memory', 'HOPE frozen', 'ViT-AC LN-TTA', 'ViT-AC memory', 'HOPE LN-TTA', 'blank']
COLOURS = ['#D55E00', 'black', '#0072B2', '#009E73', '#56B4E9', '0.6']
DASHES = ['-', '--', '-.', (0, (7, 1)), (0, (2, 1)), ':']
STYLE = {'font.size': 8, 'legend.fontsize': 7, 'axes.spines.top': False, 'axes.spines.right': False}
BESIDE = {'loc': 'upper left', 'bbox_to_anchor': (1, 1), 'frameon': False}


def drawn(groups, most):
    """At most so many of the groups, those of FIRST first → {name: rows}; a rate of the plan is not drawn."""
    tuned = [name for name, rows in groups.items() if rows[0]['rate_from'] != 'plan']
    names = sorted(tuned, key=[*FIRST, *groups].index)
    return {name: groups[name] for name in names[:most]}


def running_mean(values, width=10):
    """Mean of each window of `width` neighbours along the last axis, (...,n) → (...,n-width+1)."""
    width = min(width, values.shape[-1])
    return np.lib.stride_tricks.sliding_window_view(values, width, axis=-1).mean(-1)


@matplotlib.rc_context(STYLE)
def draw_stream(path, run, groups):
    """A stream of phases: loss, position error, held-out probes, and what one memory reports."""
    groups = drawn(groups, 6)
    panels = [(draw_losses, 'loss', f'{run["loss"]} loss\nmean of 10 clips')]
    if any(rows[0]['metres'] is not None for rows in groups.values()):
        panels.append((draw_losses, 'metres', 'position error [m]\nmean of 10 clips'))
    for domain in dict.fromkeys(run['domains']):
        panels.append((draw_probes, domain, f'loss on held-\nout clips of {domain}'))
    for kind, lines in reported(groups).items():
        panels.append((draw_diagnostics, lines, kind))
    heights = [2, *[1 for _ in panels[1:]]]
    fig = Figure(figsize=(6.3, 0.8 + 1.1 * sum(heights)), layout='constrained')
    axes = fig.subplots(len(panels), 1, height_ratios=heights, sharex=True)
    for ax, (draw, what, label) in zip(axes, panels):
        shade_phases(ax, run)
        draw(ax, run, groups, what)
        ax.set_ylabel(label)
    for i, label in enumerate(run['labels']):
        middle = (i + 0.5) * run['clips']
        axes[0].text(middle, 1.03, label, transform=axes[0].get_xaxis_transform(), ha='center')
    axes[0].legend(**BESIDE)
    axes[-1].set_xlabel('clip of the stream; bands: one standard deviation of seeds, or of streams of one')
    fig.align_ylabels()
    fig.savefig(path, dpi=160)


def reported(groups):
    """What the first memory that reports more than a surprise has to say → {kind: {line: (seeds,clips)}}."""
    kinds = {}
    for name, rows in groups.items():
        keys = rows[0]['diagnostics'][0] if rows[0]['diagnostics'] else []
        if len(keys) > 1 and not kinds:
            for key in keys:
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
            values = np.array([row[key] for row in rows])                        # (seeds,S,P,n)
            repeats = values.mean(1) if len(rows) > 1 else values[0]
            draw_band(ax, repeats.reshape(len(repeats), -1), label=name, color=colour, ls=dashes)
    ax.set_ylim(0, None)


def draw_probes(ax, run, groups, domain):
    """Mean loss on held-out clips of a domain, at the clips of the stream after which it was measured."""
    for rows, colour in zip(groups.values(), COLOURS):
        if rows[0]['probes']:
            loss = np.mean([row['probes'][domain] for row in rows], axis=(0, 1))
            ax.plot(run['probe_at'], loss, 'o', color=colour, ms=4, mfc='none', clip_on=False)
    ax.set_ylim(0, None)


def draw_diagnostics(ax, run, groups, lines):
    """What a memory reports of one kind, such as its surprise: a line for each block or level."""
    for (name, values), dashes in zip(lines.items(), DASHES):
        draw_band(ax, values, label=name, color='black', ls=dashes)
    ax.legend(**BESIDE)


def shown_clips(run, groups):
    """
    Clips of the first stream whose predictions adapt.py kept, as pictures; None where that cannot be.

    {clips: ['A₁, clip 7'], steps: ['step 1', and the targets], pictures: {'what came' or name:
    (clips,steps,H,W,3)}, loss: {name: (clips,)}, places: (clips,steps,2) of the object in px, or None}.
    """
    folder = Path(data.folder_of(run['config']['data']))
    files = {name: rows[0]['file'].with_suffix('.npz') for name, rows in drawn(groups, 5).items()}
    kept = {name: np.load(file) for name, file in files.items() if file.is_file()}
    if not kept or not (folder / 'decoder.npy').is_file():
        return None
    decoder = torch.from_numpy(np.load(folder / 'decoder.npy'))
    clips = [(data.Clips(str(folder), split), index) for split, index in run['shown']]
    meta = clips[0][0].meta
    at = [0] + [step - 1 for step in run['target_steps']]

    def decode(z):
        """Features (clips,k,N,D) → pictures (clips,k,H,W,3)."""
        seen = data.pictures(z.flatten(0, 1).float(), decoder, meta['grid'], meta['patch'])
        return seen.unflatten(0, z.shape[:2]).numpy()
    came = decode(torch.stack([split[index][0] for split, index in clips])[:, at])
    pictures, losses = {'what came': came}, {}
    for name, file in kept.items():
        numbers = file['numbers']
        pictures[name] = np.concatenate([came[:, :1], decode(torch.from_numpy(file['predicted']))], 1)
        losses[name] = groups[name][0]['loss'][0].ravel()[numbers]
    places = None
    if all('position' in split.physics for split, _ in clips):
        metres = torch.cat([positions(split, [index]) for split, index in clips])
        places = metres[:, at].numpy() / data.WORLD * came.shape[2] - 0.5
    titles = [f'{run["labels"][i // run["clips"]]}, clip {i % run["clips"] + 1}' for i in numbers]
    steps = [f'step {step + 1}' for step in at]
    return {'clips': titles, 'steps': steps, 'pictures': pictures, 'loss': losses, 'places': places}


def show_picture(ax, shown, title, clip, step):
    """A picture of a clip, its loss below it, and in it a ring where the object really is."""
    picture = shown['pictures'][title][clip, step]
    ax.imshow(picture, interpolation='bicubic')
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if step and title in shown['loss']:
        ax.set_xlabel(f'loss {shown["loss"][title][clip]:.3f}')
    if shown['places'] is not None:
        ring = Circle(shown['places'][clip, step], 0.15 * len(picture), fill=False, color='white', lw=0.8)
        ax.add_patch(ring)


def draw_animation(path, shown):
    """GIF of the first twelve of the shown_clips(), step by step: what came, what two methods predicted."""
    titles = list(shown['pictures'])[:3]
    writer = PillowWriter(fps=3)
    fig = Figure(figsize=(2.4 * len(titles), 3.1))
    axes = fig.subplots(1, len(titles))
    fig.subplots_adjust(left=0.01, right=0.99, bottom=0.08, top=0.82, wspace=0.03)
    with writer.saving(fig, path, dpi=80):
        for clip, step in np.ndindex(min(12, len(shown['clips'])), len(shown['steps'])):
            for ax, title in zip(axes, titles):
                ax.clear()
                ax.set_title(title)
                show_picture(ax, shown, title, clip, step)
            fig.suptitle(f'{shown["clips"][clip]}: {shown["steps"][step]}')
            writer.grab_frame()


def draw_domains(path, rows):
    """Clips of domains, {label: frames (n,F,H,W,3) float in [0,1]}: a row per domain, a picture per clip."""
    fig = Figure(figsize=(9, 1.4 * len(rows)), layout='constrained')
    axes = fig.subplots(len(rows), 1, squeeze=False)
    for ax, (label, frames) in zip(axes[:, 0], rows.items()):
        dimmed = np.maximum(0.4 * frames[:, 0], 0.65 * frames[:, frames.shape[1] // 2])
        pictures = np.maximum(dimmed, frames[:, -1])
        pictures[:, :, -2:] = 1          # a white line between two clips
        ax.imshow(np.hstack(pictures))
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(label, fontsize=8)
    fig.suptitle('The same impulses in every domain: first (dim), middle and last (bright) frame')
    fig.savefig(path, dpi=90)
