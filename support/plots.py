"""Everything that is drawn, one function per picture: the numbers come in as parameters, the file goes to a path."""
import numpy as np


def draw_domains(path, rows):
    """
    What clips of each domain look like: a row per domain, a picture per clip.

    rows: {label: frames (n,F,H,W,3) float in [0,1]}, n the same in all. In each picture the first frame is dim, the
    middle one brighter and the last one bright.
    """
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
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
    """Histograms of how far the objects of A and of B slide over a clip: a, b (clips,) in cm, the same impulses in both."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
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
