"""The pictures of results: what is drawn, that nothing overlaps, and that they are written for every form of stream."""
import io

import numpy as np
import pytest
import torch

import compare
import drawing
from support import plots

METHODS = [('', '', 'copy'), ('', '', 'blank'),
           ('HOPE', 'hope', 'frozen'), ('HOPE', 'hope', 'LN-TTA'), ('HOPE', 'hope', 'CMS'), ('HOPE', 'hope', 'memory'),
           ('ViT-AC', 'vit', 'frozen'), ('ViT-AC', 'vit', 'LN-TTA'), ('ViT-AC', 'vit', 'memory'),
           ('oracle', 'oracle', 'frozen')]
N, K, PATCHES, D = 6, 3, 4, 5


def fake(domains=('A', 'B', 'A'), seeds=1, streams=1, metres=True, methods=METHODS):
    """Results of adapt.py, made up, and their groups."""
    rng = np.random.default_rng(0)
    clips = N * len(domains)
    at = [0] + [N * (i + 1) for i in range(len(domains))]
    rows = []
    for model, kind, method in methods:
        for seed in range(1, seeds + 1 if model else 2):
            carries = ['memory'] if method == 'memory' else []
            seen = {'surprise': 0.1}
            if carries:
                seen |= {f'{name}, action memory': rng.random() for name in ('surprise', 'retention', 'gain', 'angle')}
            rows.append({
                'model': model, 'kind': kind, 'seed': seed, 'method': method, 'rate': None, 'rate_from': '',
                'tta': method == 'LN-TTA', 'carries': carries, 'loss': rng.random((streams, clips)).tolist(),
                'metres': rng.random((streams, clips)).tolist() if metres and model else None, 'seconds': [0.0],
                'probes': {d: rng.random((streams, len(at))).tolist() for d in set(domains)} if model else {},
                'diagnostics': [seen] * clips if model else [],
            })
    results = {'labels': list(domains), 'domains': list(domains), 'clips': N, 'streams': streams, 'loss': 'jump',
               'target_steps': [6, 7, 8], 'probe_at': at, 'readout': dict.fromkeys(domains, 0.01) if metres else None,
               'rows': rows}
    return results, grouped(rows)


def grouped(rows):
    groups = {}
    for row in rows:
        groups.setdefault(compare.title(row), []).append(row)
    return groups


def test_at_most_six_lines_in_colours_of_their_own():
    _, groups = fake()
    drawn = drawing.drawn_groups(groups)
    assert list(drawn) == ['blank', 'HOPE frozen', 'HOPE LN-TTA', 'HOPE memory', 'ViT-AC LN-TTA', 'ViT-AC memory']
    assert len({colour for _, colour, _ in drawn.values()}) == 6
    # A method looks the same whatever is drawn beside it, and what is not in the list is drawn where there is room.
    few = drawing.drawn_groups({name: groups[name] for name in ('HOPE memory', 'HOPE CMS', 'oracle frozen')})
    assert few['HOPE memory'] == drawn['HOPE memory'] and len({colour for _, colour, _ in few.values()}) == 3


def test_bands():
    """Over seeds the range of their means over streams; of one seed two standard errors over its streams."""
    rows = [{'loss': [[1.0] * 20, [3.0] * 20]}, {'loss': [[4.0] * 20, [4.0] * 20]}]
    assert [values[0] for values in drawing.band(rows, 'loss', 2)] == pytest.approx([3, 2, 4])
    mean, low, high = drawing.band(rows[:1], 'loss', 1)
    assert len(mean) == 11 and mean[0] == pytest.approx(2) and (high - low)[0] == pytest.approx(4)
    assert drawing.band(rows[1:], 'loss', 2)[1] is None


@pytest.mark.parametrize('places', [[0.5, 0.5, 0.5], [0, 0.01, 0.9], [1, 1, 0.99, 0.98], [0.3], [0.2, 0.1, 0.15, 0.9]])
def test_labels_do_not_overlap(places):
    moved = plots.spread(places, 0.2, 0, 1)
    assert np.diff(np.sort(moved)).min(initial=1) > 0.2 - 1e-9 and moved.min() >= 0 and moved.max() <= 1 + 1e-9
    assert (np.argsort(moved, kind='stable') == np.argsort(places, kind='stable')).all()


def test_labels_that_fit_stay_where_they_are():
    assert plots.spread([0.9, 0.1, 0.5], 0.2, 0, 1) == pytest.approx([0.9, 0.1, 0.5])


@pytest.mark.parametrize('domains, more', [
    (('A', 'B', 'A'), dict(seeds=2, streams=2)),
    (('A', 'friction', 'ice', 'A', 'B'), dict(streams=3)),
    (('A', 'A'), dict(metres=False)),
    (('A',), dict(methods=METHODS[:3])),
])
def test_streams_of_any_phases(domains, more, tmp_path):
    pytest.importorskip('matplotlib')
    results, groups = fake(domains, **more)
    # Of whatever is drawn, a PDF takes as long again.
    for kind in ('png', 'pdf') if domains == ('A', 'B', 'A') else ('png',):
        drawing.draw(str(tmp_path / f'results.{kind}'), [results], groups)
        assert (tmp_path / f'results.{kind}').stat().st_size > 5000


def test_where_the_object_is():
    pictures = np.full((4, 16, 20, 3), 0.1)
    corners = [(2, 3), (10, 5), (6, 12), (14, 9)]
    for picture, (x, y) in zip(pictures, corners):
        picture[y:y + 2, x:x + 2] = 0.9, 0.2, 0.5
    assert plots.places_of(pictures) == pytest.approx(np.array(corners) + 0.5)


def shown_of(methods=METHODS):
    """shown_clips() of made-up clips whose features are pictures of 2 x 2 px, enlarged to 20 x 20 px."""
    results, groups = fake(methods=methods)
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(3 * N, 8, PATCHES, D, generator=generator)
    a = torch.rand(3 * N, 8, 2, generator=generator)
    for row in results['rows']:
        if row['model']:
            row['shown'] = {clip: z[clip, 5:].half() for clip in range(N - 2, 2 * N)}

    def decode(features):
        small = features[..., :3].float().unflatten(2, (2, 2))
        return small.repeat_interleave(10, 2).repeat_interleave(10, 3).numpy()
    clips = type('Clips', (), {'__getitem__': lambda self, numbers: (z[numbers], a[numbers])})()
    return drawing.shown_clips(results, groups, clips, decode), results


def test_pictures_of_predictions(tmp_path):
    Image = pytest.importorskip('PIL.Image')
    pytest.importorskip('matplotlib')
    shown, results = shown_of()
    assert shown['phases'] == ['A'] * 2 + ['B'] * N and shown['numbers'] == [N - 1, N, *range(1, N + 1)]
    assert shown['seen'].shape == (2 + N, 1 + K, 20, 20, 3)
    titles = [row['title'] for row in shown['rows']]
    assert titles == ['HOPE frozen', 'HOPE LN-TTA', 'HOPE memory', 'ViT-AC LN-TTA', 'ViT-AC memory']
    # What was predicted is what came, in float16.
    assert shown['rows'][0]['predicted'] == pytest.approx(shown['seen'][:, 1:], abs=1e-3)
    frozen = next(row for row in results['rows'] if compare.title(row) == 'HOPE frozen')
    assert shown['rows'][0]['loss'] == pytest.approx(frozen['loss'][0][N - 2:2 * N])
    drawing.draw_predictions(str(tmp_path / 'predictions.png'), shown)
    assert drawing.draw_animation(str(tmp_path / 'clips.gif'), shown)
    gif = Image.open(io.BytesIO((tmp_path / 'clips.gif').read_bytes()))
    assert gif.n_frames == (1 + K) * (2 + N) and gif.info['loop'] == 0 and gif.size[0] <= 800
    assert (tmp_path / 'predictions.png').stat().st_size > 5000


def test_no_animation_without_a_memory_and_a_frozen_row(tmp_path):
    shown, _ = shown_of(METHODS[2:5])
    assert not drawing.draw_animation(str(tmp_path / 'clips.gif'), shown) and not list(tmp_path.iterdir())
    assert shown_of(METHODS[:2])[0] is None
