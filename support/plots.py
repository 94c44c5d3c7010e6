"""All pictures, one function each. run and groups: what report.read() returns."""
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
FIRST = ['HOPE world head', 'HOPE frozen', 'ViT-AC LN-TTA', 'ViT-AC LN-TTA x5', 'ViT-AC + head world head',
         'HOPE LN-TTA', 'blank']
COLOURS = ['#D55E00', 'black', '#0072B2', '#009E73', '#56B4E9', '0.6']
DASHES = ['-', '--', '-.', (0, (7, 1)), (0, (2, 1)), ':']
STYLE = {'font.size': 8, 'legend.fontsize': 7, 'axes.spines.top': False, 'axes.spines.right': False}
# In clips; the last hypothesis of a world head is that the world is home again.
AGES = ['0', '1', '2-3', '4-7', '8-15', '16-31', '32-63', '64-127', '128-255', '256-511', '512+', 'home']
DIAGNOSTICS = 'surprise', 'gradient norm', 'drift'
BESIDE = {'loc': 'upper left', 'bbox_to_anchor': (1, 1), 'frameon': False}


def drawn(groups, most):
    """At most so many of the groups, those of FIRST first → {name: rows}."""
    names = sorted(groups, key=[*FIRST, *groups].index)
    return {name: groups[name] for name in names[:most]}


def running_mean(values, width=10):
    """Mean of each window of `width` neighbours along the last axis, (...,n) → (...,n-width+1)."""
    width = min(width, values.shape[-1])
    return np.lib.stride_tricks.sliding_window_view(values, width, axis=-1).mean(-1)


def draw_stream(path, run, groups):
    """A stream of phases: loss, position error, held-out probes, the ages of one world head's hypotheses."""
    groups = drawn(groups, 6)
    panels = [(draw_losses, 'loss', f'{run["loss"]} loss\nmean of 10 clips')]
    if any(rows[0]['metres'] is not None for rows in groups.values()):
        panels.append((draw_losses, 'metres', 'position error [m]\nmean of 10 clips'))
    for domain in dict.fromkeys(run['domains']):
        panels.append((draw_probes, domain, f'loss on held-\nout clips of {domain}'))
    if reported(groups, 'ages'):
        panels.append((draw_ages, 'ages', 'clips since the\nworld changed'))
    draw_panels(path, run, groups, panels)


def draw_diagnostics(path, run, groups):
    """What the methods report along the stream, each of DIAGNOSTICS in a panel."""
    groups = drawn({name: rows for name, rows in groups.items() if rows[0]['diagnostics'][0]}, 6)
    panels = [(draw_reports, kind, kind) for kind in DIAGNOSTICS if reported(groups, kind)]
    if panels:
        draw_panels(path, run, groups, panels)


@matplotlib.rc_context(STYLE)
def draw_panels(path, run, groups, panels):
    """Panels (draw, what it draws, label) below each other, along a stream whose shifts are shaded."""
    fig = Figure(figsize=(6.3, 0.8 + 1.3 * len(panels)), layout='constrained')
    axes = fig.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    n, domains = run['clips'], run['domains']
    for ax, (draw, what, label) in zip(axes, panels):
        # Phases away from home are shaded, and a thin line stands between two phases.
        for i, domain in enumerate(domains):
            ax.axvspan(i * n, (i + 1) * n, color='white' if domain == domains[0] else '0.93', lw=0, zorder=0)
            ax.axvline(i * n, color='0.8', lw=0.6, zorder=1)
        ax.set(ylabel=label, xlim=(0, n * len(domains)))
        draw(ax, run, groups, what)
    for i, label in enumerate(run['labels']):
        axes[0].text((i + 0.5) * n, 1.03, label, transform=axes[0].get_xaxis_transform(), ha='center')
    axes[0].legend(**BESIDE)
    axes[-1].set_xlabel('clip of the stream; bands: one standard deviation of seeds, or of streams of one')
    fig.align_ylabels()
    fig.savefig(path, dpi=160)


def reported(groups, kind):
    """What the groups report of a kind, such as surprise → {(group, part): (seeds,clips,...)}."""
    found = {}
    for name, rows in groups.items():
        for key in rows[0]['diagnostics'][0]:
            if key.partition(', ')[0] == kind:
                values = [[clip[key] for clip in row['diagnostics']] for row in rows]
                found[name, key.partition(', ')[2]] = np.array(values)
    return found


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


def draw_ages(ax, run, groups, kind):
    """The weights of a world head's hypotheses by AGES, the mean of seeds, at each clip of the stream."""
    weights, *_ = reported(groups, kind).values()                                # (seeds,clips,ages)
    clips, ages = weights.shape[1:]
    ax.imshow(weights.mean(0).T, 'Greys', vmin=0, vmax=1, aspect='auto', interpolation='nearest',
              origin='lower', extent=(0, clips, -0.5, ages - 0.5))
    ax.set_yticks(range(ages), AGES, fontsize=6)


def draw_reports(ax, run, groups, kind):
    """What methods report of one kind: a colour for each, a line for each block or level."""
    for (name, rows), colour in zip(groups.items(), COLOURS):
        for ((_, part), values), dashes in zip(reported({name: rows}, kind).items(), DASHES):
            draw_band(ax, values, label=f'{name} {part}', color=colour, ls=dashes)
    if kind != 'surprise':
        ax.set_yscale('log')
    ax.legend(**BESIDE)


def shown_clips(run, groups):
    """Clips of the first stream whose predictions adapt.py kept, as pictures; None where that cannot be.

    {clips: ['A₁, clip 7'], steps: ['step 1', and the targets], pictures: {'what came' or name:
    (clips,steps,H,W,3)}, loss: {name: (clips,)}, places: (clips,steps,2) of the object in px, or None}."""
    folder = Path(data.folder_of(run['config']['data']))
    files = {name: Path(row['run'], f'{row["file"]}.npz') for name, [row, *_] in drawn(groups, 2).items()}
    kept = {name: np.load(file) for name, file in files.items() if file.is_file()}
    if not kept or not (folder / 'decoder.npy').is_file():
        return None
    decoder = torch.from_numpy(np.load(folder / 'decoder.npy'))
    clips = [(data.Clips(str(folder), split), index) for split, index in run['shown']]
    meta, at = clips[0][0].meta, [0, *[step - 1 for step in run['target_steps']]]
    z = {'what came': torch.stack([split[index][0] for split, index in clips])[:, at]}
    losses, places = {}, None
    for name, file in kept.items():
        predicted, numbers = torch.from_numpy(file['predicted']), file['numbers']
        z[name] = torch.cat([z['what came'][:, :1], predicted], 1)               # (clips,steps,N,D)
        losses[name] = groups[name][0]['loss'][0].ravel()[numbers]
    pictures = {}
    for name, features in z.items():
        seen = data.pictures(features.flatten(0, 1), decoder, meta['grid'], meta['patch'])
        pictures[name] = seen.unflatten(0, features.shape[:2]).numpy()
    if 'position' in clips[0][0].physics:
        metres = torch.cat([positions(split, [index]) for split, index in clips])
        places = metres[:, at].numpy() / data.WORLD * pictures['what came'].shape[2] - 0.5
    titles = [f'{run["labels"][i // run["clips"]]}, clip {i % run["clips"] + 1}' for i in numbers]
    steps = [f'step {step + 1}' for step in at]
    return {'clips': titles, 'steps': steps, 'pictures': pictures, 'loss': losses, 'places': places}


def draw_animation(path, shown):
    """GIF of the shown_clips(), step by step: what came, what two methods predicted, a ring where it came."""
    pictures, places = shown['pictures'], shown['places']
    writer = PillowWriter(fps=3)
    fig = Figure(figsize=(2.4 * len(pictures), 3.1))
    axes = fig.subplots(1, len(pictures))
    fig.subplots_adjust(left=0.01, right=0.99, bottom=0.08, top=0.82, wspace=0.03)
    with writer.saving(fig, path, dpi=80):
        for clip, step in np.ndindex(len(shown['clips']), len(shown['steps'])):
            for ax, (title, seen) in zip(axes, pictures.items()):
                ax.clear()
                ax.imshow(seen[clip, step], interpolation='bicubic')
                ax.set(title=title, xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
                if step and title in shown['loss']:
                    ax.set_xlabel(f'loss {shown["loss"][title][clip]:.3f}')
                if places is not None:
                    ax.add_patch(Circle(places[clip, step], 0.15 * seen.shape[2], fill=False, lw=0.8))
            fig.suptitle(f'{shown["clips"][clip]}: {shown["steps"][step]}')
            writer.grab_frame()


def draw_domains(path, seed, world):
    """A row of clips of a world for each domain, with the same random numbers: only the physics differs."""
    rows, labels = [], []
    for domain, physics in data.DOMAINS.items():
        frames = 1 - world.render(world.simulate(domain, 8, seed, 'test_A'), 128).numpy() / 255
        frames[:, :, -2:] = frames[:, :, :, -2:] = 0.7         # a dark line between two pictures
        first, middle, last = frames[:, 0], frames[:, data.FRAMES // 2], frames[:, -1]
        # The plane is light: where frames overlap, the darker one is seen.
        rows.append(np.hstack(1 - np.maximum(np.maximum(0.35 * first, 0.6 * middle), last)))
        special = [f'{field} {value}' for field, value in physics._asdict().items()
                   if value != physics._field_defaults.get(field)]
        labels.append('\n'.join([domain, *special]))
    fig = Figure(figsize=(9, 0.4 + 1.05 * len(rows)), layout='constrained')
    ax = fig.subplots()
    ax.imshow(np.vstack(rows))
    ax.set_yticks(128 * np.arange(len(rows)) + 64, labels, fontsize=8)
    ax.set_xticks([])
    ax.set_title('The same pushes in every domain: first (faint), middle and last (dark) frame', fontsize=9)
    fig.savefig(path, dpi=90)


@matplotlib.rc_context(STYLE)
def draw_growth(path, lengths, growth):
    """Seconds and memory against the steps of a clip; growth: for each [s and MiB of ViT-AC, of HOPE]."""
    fig = Figure(figsize=(6.3, 2.4), layout='constrained')
    for ax, place, label in zip(fig.subplots(1, 2), (0, 1), ('seconds', 'peak memory [MiB]')):
        for name, column, colour in ('ViT-AC', place, COLOURS[2]), ('HOPE', place + 2, COLOURS[0]):
            ax.plot(lengths, [row[column] for row in growth], 'o-', label=name, color=colour)
        ax.set(xlabel='time steps of a clip', ylabel=label, xlim=(0, None), ylim=(0, None))
        ax.legend(frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
