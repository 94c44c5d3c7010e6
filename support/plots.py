"""All plots, one function per picture or panel. Each gets its numbers as parameters."""
import os
import sys

import numpy as np

# Width in inches of what is printed: 16 cm.
WIDTH = 6.3
# The read-out's own error, and what is drawn on a right axis. No method has these.
REFERENCE = '0.55'
BESIDE = '0.4'


def pyplot():
    """matplotlib.pyplot, set to draw into files, except in a notebook. Raises ImportError where matplotlib is missing."""
    if 'matplotlib' not in sys.modules:
        # What a notebook has set there for its own Python may not exist here, and would fail.
        os.environ['MPLBACKEND'] = 'Agg'
    import matplotlib.pyplot as plt
    return plt


# ---- adapt.py and compare.py: the stream -----------------------------------------------------------------------------

def draw_stream(file, stream, lines, memory=None, kind='png'):
    """
    A stream of phases, one panel below the other: loss, position error, held-out probes, and what one memory does.

    file: an open file, written as `kind`, 'png' or 'pdf'.
    stream: a dict
        labels, away   the name of each phase, and whether it is away from home
        clips          n in each phase
        loss, bands    the label of the loss, and what the bands are
        probes         what the held-out clips are called
        readout        the read-out's own error in each phase in metres, or None
    lines: a dict for each method
        title, colour, style, width
        loss, metres   bands: (mean, lowest, highest), each (m,) for the last m clips, the latter two or None
        probes         {what they are called: (clips seen, losses)}
    memory: {'title', 'colour', 'seen': {diagnostic: (seeds, clips)}}, or None.
    """
    plt = pyplot()
    heights = {'loss': 2.0}
    if any(line['metres'] is not None for line in lines):
        heights['metres'] = 1.35
    for domain in stream['probes']:
        heights[domain] = 1.05
    if memory:
        heights['memory'] = 0.9
        heights['surprise'] = 0.9
    # In inches: what stands left and right of the panels, above and below them, and between two.
    left, right = 0.75, 0.3 + 0.062 * max(len(line['title']) for line in lines)
    top, bottom, between = 0.25, 0.4, 0.2
    height = top + bottom + sum(heights.values()) + between * (len(heights) - 1)
    look = {'font.size': 8, 'axes.spines.top': False, 'axes.linewidth': 0.6, 'xtick.major.width': 0.6,
            'ytick.major.width': 0.6, 'pdf.fonttype': 42}
    with plt.rc_context(look):
        fig, axes = plt.subplots(len(heights), 1, figsize=(WIDTH, height), sharex=True, squeeze=False,
                                 height_ratios=heights.values())
        mean_height = sum(heights.values()) / len(heights)
        fig.subplots_adjust(left=left / WIDTH, right=1 - right / WIDTH, top=1 - top / height, bottom=bottom / height,
                            hspace=between / mean_height)
        axes = dict(zip(heights, axes[:, 0]))
        for ax in axes.values():
            shade_phases(ax, stream)
        name_phases(axes['loss'], stream)
        band_panel(axes['loss'], lines, 'loss', stream)
        axes['loss'].set_ylabel(stream['loss'])
        if 'metres' in axes:
            metres_panel(axes['metres'], lines, stream)
        for domain in stream['probes']:
            probe_panel(axes[domain], lines, domain)
        if memory:
            memory_panels(axes['memory'], axes['surprise'], memory)
        fig.align_ylabels(list(axes.values()))
        axes[list(heights)[-1]].set_xlabel('clip of the stream')
        for name, ax in axes.items():
            if name not in ('memory', 'surprise'):
                label_ends(ax)
        fig.savefig(file, dpi=160, format=kind)
    plt.close(fig)


def shade_phases(ax, stream):
    """Phases away from home are shaded, and a thin line stands between two phases."""
    n = stream['clips']
    for i, away in enumerate(stream['away']):
        if away:
            ax.axvspan(i * n, (i + 1) * n, color='0.93', lw=0, zorder=0)
        if i:
            ax.axvline(i * n, color='0.8', lw=0.6, zorder=0)
    ax.set_xlim(0, n * len(stream['labels']))
    ax.spines['right'].set_visible(False)


def name_phases(ax, stream):
    """The names of the phases above a panel."""
    n = stream['clips']
    for i, (label, away) in enumerate(zip(stream['labels'], stream['away'])):
        weight = 'bold' if away else 'normal'
        ax.annotate(label, ((i + 0.5) * n, 1), (0, 3), xycoords=('data', 'axes fraction'), textcoords='offset points',
                    ha='center', va='bottom', fontsize=9, weight=weight)
    ax.text(1.04, 1, stream['bands'], transform=ax.transAxes, va='center', fontsize=7, color='0.35')


def draw_line(ax, line, x, y, **more):
    """One method's line, named at its end by label_ends()."""
    ax.plot(x, y, color=line['colour'], ls=line['style'], lw=line['width'], label=line['title'], **more)


def band_panel(ax, lines, key, stream, scale=1):
    """Lines with bands along the stream, of what the lines hold under a key."""
    last = stream['clips'] * len(stream['labels'])
    for line in lines:
        if line[key] is None:
            continue
        mean, low, high = line[key]
        x = np.arange(last - len(mean), last) + 1
        draw_line(ax, line, x, scale * mean)
        if low is not None:
            ax.fill_between(x, scale * low, scale * high, color=line['colour'], alpha=0.2, lw=0)
    ax.set_ylim(0, None)


def metres_panel(ax, lines, stream):
    """Error of the position that is read out of predicted features, in cm, and that of the read-out itself in grey."""
    band_panel(ax, lines, 'metres', stream, scale=100)
    ax.set_ylabel('position error\n[cm]')
    if stream['readout']:
        n = stream['clips']
        for i, metres in enumerate(stream['readout']):
            ax.plot((i * n, (i + 1) * n), (100 * metres, 100 * metres), color=REFERENCE, lw=0.8, ls=(0, (1, 1)),
                    label='read-out itself' if i == len(stream['readout']) - 1 else '')


def probe_panel(ax, lines, name):
    """Losses on held-out clips, of what is called `name`."""
    for line in lines:
        if name in line['probes']:
            clips, losses = line['probes'][name]
            draw_line(ax, line, clips, losses, marker='.', ms=4, clip_on=False)
    ax.set(ylabel=f'loss on held-out\nclips of {name}', ylim=(0, None))


def label_ends(ax):
    """The names of the lines of a panel right of their ends, moved apart where they would overlap."""
    lines = [line for line in ax.get_lines() if not line.get_label().startswith('_') and line.get_label()]
    ends = np.array([line.get_ydata()[-1] for line in lines])
    low, high = ax.get_ylim()
    # Height of a line of text, in the units of the axis.
    points = ax.get_window_extent().height * 72 / ax.figure.dpi
    text = 9.5 / points * (high - low)
    for line, end, place in zip(lines, ends, spread(ends, text, low, high)):
        ax.annotate(line.get_label(), (1, end), (1.035, place), xycoords=('axes fraction', 'data'),
                    textcoords=('axes fraction', 'data'), color=line.get_color(), fontsize=8, va='center',
                    annotation_clip=False, arrowprops={'arrowstyle': '-', 'color': line.get_color(), 'lw': 0.6,
                                                       'shrinkA': 1, 'shrinkB': 0, 'relpos': (0, 0.5)})


def spread(places, gap, low, high):
    """
    Places (n,) moved as little as possible until each two are `gap` apart, in the same order and within low..high.

    Least squares: less their gaps they must not decrease, so neighbours that would are put at their common mean.
    """
    order = np.argsort(places, kind='stable')
    groups = []
    for i, place in enumerate(np.asarray(places)[order]):
        groups.append([place - i * gap])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    moved = np.concatenate([[np.mean(group)] * len(group) for group in groups])
    moved = np.clip(moved, low, max(low, high - gap * (len(order) - 1)))
    result = np.empty(len(order))
    result[order] = moved + gap * np.arange(len(order))
    return result


def memory_panels(upper, lower, memory):
    """What a memory does along the stream, and below it its surprise and retention; bands: the range over the seeds."""
    seen, colour = memory['seen'], memory['colour']
    upper.set_title(memory['title'], fontsize=8, loc='left', pad=3, color=colour)
    if 'gain, action memory' not in seen:
        drift_panel(upper, seen)
        draw_range(lower, seen['surprise'], colour, '-')
        lower.set(ylabel="surprise\n(loss / copy's)", ylim=(0, None))
        return
    gain, angle = seen['gain, action memory'], seen['angle, action memory']
    upper.axhline(1, color='0.8', lw=0.6, zorder=0)
    draw_range(upper, gain, colour, '-')
    upper.set(ylim=(0, 1.15 * max(2, gain.max())), yticks=(0, 1, 2))
    upper.set_ylabel('M multiplies\nthe push by', color=colour)
    if np.isfinite(angle).all():
        right = right_axis(upper, 'turns it by\n[degrees]')
        draw_range(right, angle, BESIDE, '--')
        right.set(ylim=(-90, 90), yticks=(-60, 0, 60))
    draw_range(lower, seen['surprise, action memory'], colour, '-')
    lower.set_ylim(0, None)
    lower.set_ylabel('surprise\n[share of push]', color=colour)
    right = right_axis(lower, 'retention,\nmean of 10')
    draw_range(right, seen['retention, action memory'], BESIDE, '--')
    right.set(ylim=(0, 1.05), yticks=(0, 0.5, 1))


def right_axis(ax, label):
    """A second axis on the right."""
    right = ax.twinx()
    right.spines['right'].set_visible(True)
    right.set_ylabel(label, color=BESIDE)
    return right


def draw_range(ax, values, colour, style):
    """The mean of values (repeats, clips) along the stream, and the band that they span."""
    last = int(ax.get_xlim()[1])
    x = np.arange(last - values.shape[1], last) + 1
    ax.plot(x, values.mean(0), color=colour, ls=style, lw=1)
    if len(values) > 1:
        ax.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.2, lw=0)


def drift_panel(ax, seen):
    """Distance of each block's memory and of each CMS level from its initial weights."""
    styles = ['-', '--', ':', '-.']
    for key, values in seen.items():
        kind, _, name = key.partition(', ')
        if kind == 'drift':
            draw_range(ax, values, 'black', styles[0])
            ax.get_lines()[-1].set_label(name)
            styles = styles[1:] + styles[:1]
    ax.set(ylabel='drift from\ninitial weights', yscale='log', ylim=(1e-4, 20))
    ax.legend(fontsize=7, loc='upper left', ncols=3, frameon=False)


# ---- adapt.py: pictures of predictions -------------------------------------------------------------------------------

def places_of(pictures):
    """
    Where the object is: pictures (m,H,W,3) of one camera → (m,2), x and y in pixels.

    The object is what differs from the median of all pictures by more than half of the most.
    """
    differs = np.abs(pictures - np.median(pictures, axis=0)).sum(-1)
    differs[differs < 0.5 * differs.max((1, 2), keepdims=True)] = 0
    mass = np.maximum(differs.sum((1, 2)), 1e-12)
    y, x = np.indices(differs.shape[1:])
    return np.stack([(differs * x).sum((1, 2)) / mass, (differs * y).sum((1, 2)) / mass], -1)


def marks_of(shown):
    """
    Where the object really is at each step (clips,1+K,2), and how far its push reaches (clips,2), in pixels.

    Two times None without pushes: what moves then need not be one object.
    """
    if shown['pushes'] is None:
        return None, None
    seen = shown['seen']
    places = places_of(seen.reshape(-1, *seen.shape[2:])).reshape(*seen.shape[:2], 2)
    longest = np.linalg.norm(shown['pushes'], axis=1).max()
    # The longest is two fifths of a picture.
    return places, 0.4 * seen.shape[3] / max(longest, 1e-12) * shown['pushes']


def show_picture(ax, picture):
    """A picture, enlarged smoothly, without axes."""
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax.imshow(picture, interpolation='bicubic')


def show_push(ax, start, reach):
    """The arrow of a push."""
    return ax.annotate('', start + reach, start, annotation_clip=False,
                       arrowprops={'arrowstyle': '-|>', 'color': 'white', 'lw': 1.2, 'shrinkA': 0, 'shrinkB': 0})


def draw_predictions(file, shown, clips=5):
    """The last of drawing.shown_clips(): what was given, what came, and what methods predicted for the last step."""
    plt = pyplot()
    clips = range(len(shown['numbers']))[-clips:]
    truth, reach = marks_of(shown)
    headings = [('given:\nstep 1, push', 'black'), (f'what came:\nstep {shown["steps"][-1]}', 'black')]
    headings += [(row['title'].replace(' ', '\n', 1), row['colour']) for row in shown['rows']]
    side = WIDTH / 7
    with plt.rc_context({'font.size': 8}):
        size = side * len(headings), (side + 0.12) * len(clips) + 0.75
        fig, axes = plt.subplots(len(clips), len(headings), figsize=size, squeeze=False)
        for line, clip in zip(axes, clips):
            show_picture(line[0], shown['seen'][clip, 0])
            line[0].set_ylabel(f'clip {shown["numbers"][clip]}', fontsize=7)
            show_picture(line[1], shown['seen'][clip, -1])
            for ax, row in zip(line[2:], shown['rows']):
                show_picture(ax, row['predicted'][clip, -1])
                ax.set_xlabel(f'loss {row["loss"][clip]:.3f}', fontsize=7, labelpad=1.5)
            if truth is None:
                continue
            show_push(line[0], truth[clip, 0], reach[clip])
            for ax in line[1:]:
                ax.plot(*truth[clip, -1], 'o', ms=15, mfc='none', mec='white', mew=0.6)
        for ax, (heading, colour) in zip(axes[0], headings):
            ax.set_title(heading, fontsize=8, color=colour)
        ring = '' if truth is None else '; ring: where the object came to be'
        phase = shown['phases'][-1]
        fig.suptitle(f'Last clips of {phase}, predicted from step 1 and the push alone{ring}', fontsize=8.5)
        fig.tight_layout(pad=0.4, w_pad=0.4, h_pad=0.3)
        fig.savefig(file, dpi=160, format='png')
    plt.close(fig)


# Milliseconds that the animation shows step 1, a target step, the last target step, and the very last picture.
SHOWN_FOR = 900, 350, 1100, 3500


def draw_animation(file, shown, clips=12):
    """
    GIF of the first of drawing.shown_clips(), one after the other: what came, and what two methods predicted.

    shown['rows']: the two. Each clip begins with step 1 and the push. A ring stands where the object really came to be.
    The strip below shows the losses so far.
    """
    plt = pyplot()
    from PIL import Image
    clips = min(clips, len(shown['numbers']))
    last = len(shown['steps'])
    fig, update = animation(plt, shown, clips)
    frames, durations = [], []
    for clip in range(clips):
        for step in range(last + 1):
            update(clip, step)
            fig.canvas.draw()
            frames.append(Image.fromarray(np.asarray(fig.canvas.buffer_rgba())[..., :3].copy()))
            durations.append(SHOWN_FOR[1])
        durations[-last - 1] = SHOWN_FOR[0]
        durations[-1] = SHOWN_FOR[2]
    durations[-1] = SHOWN_FOR[3]
    plt.close(fig)
    palette = common_palette(frames)
    # Without dithering: nothing flickers, and what does not change takes no space.
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(file, format='GIF', save_all=True, append_images=frames[1:], duration=durations, loop=0,
                   optimize=False)


def common_palette(frames):
    """
    One palette for all frames, a picture of mode P.

    White, black and the other most frequent colours stay as they are. The rest, the shades of the objects, share 240.
    """
    from PIL import Image
    codes = [np.asarray(frame).astype(np.int32) @ [65536, 256, 1] for frame in frames]
    counts = np.bincount(np.concatenate([code.ravel() for code in codes]), minlength=2 ** 24)
    there = np.flatnonzero(counts)
    # The most frequent ones last.
    there = there[np.argsort(counts[there], kind='stable')]
    colours = np.stack([there >> 16, there >> 8 & 255, there & 255], -1).astype(np.uint8)
    rest = Image.fromarray(colours[None]).quantize(240, method=Image.Quantize.MEDIANCUT)
    palette = Image.new('P', (1, 1))
    palette.putpalette(colours[-16:].ravel().tolist() + rest.getpalette()[:720])
    return palette


def animation(plt, shown, clips):
    """The figure of the animation, and the function update(clip, step) that sets it; step 0 is step 1 of a clip."""
    phases, numbers, steps, seen = shown['phases'], shown['numbers'], shown['steps'], shown['seen']
    rows = shown['rows']
    truth, reach = marks_of(shown)
    width, height = 7.2, 4.2
    fig = plt.figure(figsize=(width, height), dpi=100)
    title = fig.text(0.02, 0.945, '', fontsize=13, weight='bold')
    moment = fig.text(0.98, 0.945, '', fontsize=12, ha='right')
    panels, pictures, rings, pushes = [], [], [], []
    headings = [('what happens', 'black')] + [(f'{row["title"]} predicts', row['colour']) for row in rows]
    for i, (heading, colour) in enumerate(headings):
        ax = fig.add_axes((0.02 + 0.325 * i, 0.335, 0.31, 0.31 * width / height))
        ax.set_title(heading, fontsize=11, color=colour, weight='bold', pad=4)
        panels.append(ax)
        pictures.append(show_picture(ax, seen[0, 0]))
        rings += ax.plot([], [], 'o', ms=26, mfc='none', mec='white', mew=1)
    if truth is not None:
        fig.text(0.98, 0.325, 'ring: where the object really is', fontsize=8, ha='right', va='top', color='0.35')
    curves = loss_strip(fig, shown, clips)

    def update(clip, step):
        after = ' after the switch' if phases[clip] != phases[0] else ''
        title.set_text(f'{phases[clip]}: clip {numbers[clip]}{after}')
        moment.set_text(f'step {steps[step - 1]} of {steps[-1]}' if step else 'given: step 1 and the push')
        pictures[0].set_data(seen[clip, step])
        for picture, row in zip(pictures[1:], rows):
            picture.set_data(row['predicted'][clip, step - 1] if step else seen[clip, 0])
        while pushes:
            pushes.pop().remove()
        if truth is not None:
            for ring in rings:
                ring.set_data(*truth[clip, step][:, None])
                ring.set_visible(step > 0)
            if step == 0:
                pushes.extend(show_push(ax, truth[clip, 0], reach[clip]) for ax in panels)
        # A clip is scored at its last step.
        scored = clip + (step == len(steps))
        for curve, row in zip(curves, rows):
            curve.set_data(np.arange(scored) + 1, row['loss'][:scored])
    return fig, update


def loss_strip(fig, shown, clips):
    """The strip of losses below the pictures of the animation → an empty curve for each row."""
    rows = shown['rows']
    highest = max(row['loss'][:clips].max() for row in rows)
    strip = fig.add_axes((0.085, 0.095, 0.74, 0.17))
    strip.spines[['top', 'right']].set_visible(False)
    strip.set(xlim=(0.5, clips + 0.5), ylim=(0, 1.35 * highest), ylabel='loss')
    strip.set_xticks(range(1, clips + 1), [str(number) for number in shown['numbers'][:clips]])
    strip.locator_params(axis='y', nbins=3)
    strip.tick_params(labelsize=8)
    strip.set_xlabel('clip', fontsize=9, labelpad=1)
    # The phase that is switched to is shaded.
    before = shown['phases'][:clips].count(shown['phases'][0])
    if before < clips:
        strip.axvspan(before + 0.5, clips + 0.5, color='0.93', lw=0, zorder=0)
    for begin, end in ((0, before), (before, clips)):
        if begin < end:
            strip.text((begin + end + 1) / 2, 1.33 * highest, shown['phases'][begin], ha='center', va='top', fontsize=9)
    curves = []
    for row, style, marker in zip(rows, ('--', '-'), ('s', 'o')):
        curves += strip.plot([], [], color=row['colour'], ls=style, marker=marker, ms=5, lw=1.4, clip_on=False)
    ends = [row['loss'][clips - 1] for row in rows]
    for row, place in zip(rows, spread(ends, 0.35 * highest, 0, highest)):
        strip.annotate(row['title'], (1.01, place), xycoords=('axes fraction', 'data'), color=row['colour'],
                       va='center', fontsize=10, annotation_clip=False)
    return curves


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
