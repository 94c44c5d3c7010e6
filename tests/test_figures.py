"""Figures of streams of any phases, continual learning by its formulas, and intervals that hold what they say."""
import numpy as np
import pytest

import figures


def results_of(domains, losses, streams=1, noise=0.0, probes=None, beyond=None):
    """Results of rows {(model, method): the loss of each phase}, 50 clips a phase; probes: {domain: values} of all."""
    rng = np.random.default_rng(0)
    rows = []
    for (model, method), levels in losses.items():
        loss = np.repeat(levels, 50) + rng.normal(0, noise, (streams, 50 * len(domains)))
        rows.append({'model': model, 'method': method, 'seed': 1, 'loss': loss.tolist(), 'metres': None,
                     'seconds': [0.002], 'probes': probes or {}})
    return {'domains': list(domains), 'phases': list(domains), 'streams': streams, 'clips': 50, 'rows': rows,
            'beyond': beyond, 'probe_at': [50 * i for i in range(len(domains) + 1)]}


def figures_of(results, model='HOPE', method='memory'):
    figures.add_figures(results)
    return figures.row_of(results['rows'], model, method)['figures']


# ---- one stream ------------------------------------------------------------------------------------------------------

BLANK = {('', 'blank'): (0.05, 0.055, 0.05)}


def test_a_b_a_by_hand():
    """Every figure of A→B→A from losses that are constant but for the start of B and the return."""
    levels = {**BLANK, ('HOPE', 'frozen'): (0.01, 0.07, 0.01), ('HOPE', 'memory'): (0.02, 0.03, 0.02),
              ('oracle', 'frozen'): (0.06, 0.02, 0.06)}
    results = results_of('ABA', levels, probes={'A': [[1.0, 2.0, 5.0, 3.0]], 'B': [[7.0, 7.0, 4.0, 6.0]]})
    row = results['rows'][2]
    # The first 20 clips of B as bad as frozen; the first 5 back in A cost 0.05 more.
    row['loss'][0][50:70] = [0.07] * 20
    row['loss'][0][100:105] = [0.07] * 5
    row['metres'] = [[0.01] * 50 + [0.03] * 50 + [0.02] * 50]
    found = {name: value for name, [value] in figures_of(results).items()}
    expected = {
        'A1': 0.02, 'B': 0.046, 'B_first': (20 * 0.07 + 5 * 0.03) / 25, 'B_last': 0.03, 'A2': 0.025, 'A2_first': 0.03,
        'phase 1': 0.02, 'phase 2': 0.046, 'phase 3': 0.025, 'metres_A1': 0.01, 'metres_B': 0.03, 'ms_per_clip': 2,
        'forgetting': 5 - 2, 'return_cost': (5 * 0.06 + 20 * 0.01) / 25, 'gap_closed': 0.024 / 0.05,
        # Windows of 10 clips: half of them from clip 16 on, nine of ten from clip 20 on.
        't50': 16, 't90': 20,
        'Top1_L1': (3 + 6) / 2, 'StreamForgetting': ((3 - 2) + (6 - 4)) / 2, 'forgetting_from_best': (1 + 2) / 2,
        'backward_transfer': -1.5, 'forward_transfer': 7 - 7, 'plasticity': 7 - 4,
    }
    assert found == pytest.approx(expected)
    assert row['R_matrix'] == [[1, 7], [2, 7], [5, 4], [3, 6]]


def test_streams_are_independent():
    """A figure of stream s is that of a run with stream s alone; clips that slide far may differ."""
    rng = np.random.default_rng(1)
    levels = {**BLANK, ('HOPE', 'frozen'): (0.01, 0.07, 0.01), ('HOPE', 'memory'): (0.02, 0.03, 0.02)}
    far = np.zeros((4, 150), int)
    far[:, 50:100] = rng.integers(2, size=(4, 50))
    probes = {domain: rng.normal(0.05, 0.01, (4, 4)).tolist() for domain in 'AB'}
    many = results_of('ABA', levels, 4, 0.002, probes, far.tolist())
    together = figures_of(many)
    assert {'B_within', 'B_beyond', 't50', 'way_back', 'forgetting', 'return_cost', 'plasticity'} <= set(together)
    for s in range(4):
        one = {**many, 'streams': 1, 'beyond': many['beyond'][s:s + 1], 'rows': []}
        for row in many['rows']:
            own = {domain: values[s:s + 1] for domain, values in row['probes'].items()}
            one['rows'].append({**row, 'loss': row['loss'][s:s + 1], 'probes': own})
        alone = figures_of(one)
        assert {name: values[s] for name, values in together.items()} == pytest.approx(
            {name: value for name, [value] in alone.items()})


def test_a_kind_of_clip_that_a_stream_lacks_is_left_out():
    far = [[1] * 150, [0, 1] * 75]
    found = figures_of(results_of('ABA', {('HOPE', 'frozen'): (0.01, 0.07, 0.01)}, 2, beyond=far), method='frozen')
    assert 'B_beyond' in found and 'B_within' not in found


def test_a_gain_of_nothing_is_never_reached():
    still = np.full(50, 0.07)
    assert figures.clips_to(0.5, still - 0.0005, still) is None
    assert figures.clips_to(0.5, still - 0.001, still) == 1


def test_other_phases():
    """Harm where nothing changes, savings where a shift comes back, and returns only from away."""
    levels = {('HOPE', 'frozen'): (0.01,) * 3, ('HOPE', 'memory'): (0.01, 0.013, 0.01)}
    found = figures_of(results_of('AAA', levels))
    assert found['harm'] == pytest.approx([0.001]) and not {'B', 'A2', 't50', 'return_cost'} & set(found)
    levels = {('', 'blank'): (0.05,) * 5, ('HOPE', 'frozen'): (0.01, 0.07, 0.01, 0.07, 0.01),
              ('HOPE', 'memory'): (0.01, 0.02, 0.02, 0.03, 0.03)}
    results = results_of('ABABA', levels)
    results['rows'][2]['loss'][0][50:70] = [0.07] * 20
    found = figures_of(results)
    assert found['t90'] == [20] and found['savings'] == [1 / 20]
    assert found['A2'] == pytest.approx([0.025]) and found['return_cost'] == pytest.approx([0.015])
    assert found['B'] == pytest.approx([(20 * 0.07 + 30 * 0.02 + 50 * 0.03) / 100])
    # Never there the first time: no ratio.
    results['rows'][2]['loss'][0][50:100] = [0.07] * 50
    assert figures_of(results)['savings'] == [None]
    assert figures.return_phases(list('AABAAB')) == [3] and figures.away_phases(list('AABAAB')) == [2, 5]


def test_the_references_are_of_the_same_seed():
    """A seed is measured against its own frozen row; the only oracle serves all, several serve their own."""
    def row(model, method, seed, levels):
        return {**results_of('ABA', {(model, method): levels})['rows'][0], 'seed': seed}
    rows = [row('', 'blank', 1, (0.05, 0.055, 0.05))]
    for seed, frozen in ((1, 0.07), (2, 0.06)):
        rows += [row('HOPE', 'frozen', seed, (0.01, frozen, 0.01)), row('HOPE', 'memory', seed, (0.01, 0.04, 0.01))]
    results = {**results_of('ABA', {}), 'rows': [*rows, row('oracle', 'frozen', 1, (0.06, 0.02, 0.06))]}
    figures.add_figures(results)
    memories = [figures.row_of(rows, 'HOPE', 'memory', seed)['figures']['gap_closed'] for seed in (1, 2)]
    assert memories == pytest.approx(np.array([[3 / 5], [2 / 4]]))
    results['rows'].append(row('oracle', 'frozen', 2, (0.06, 0.03, 0.06)))
    figures.add_figures(results)
    assert figures.row_of(rows, 'HOPE', 'memory', 2)['figures']['gap_closed'] == pytest.approx([2 / 3])


# ---- shares ----------------------------------------------------------------------------------------------------------

def shares(frozen, bound, adapted, blank=(0.05, 0.055), known=None, noise=0.001):
    """The shares of a row of losses (A, B); frozen, bound, blank and known likewise."""
    levels = {('', 'blank'): blank, ('HOPE', 'frozen'): frozen, ('HOPE', 'memory'): adapted}
    if bound:
        levels['oracle', 'frozen'] = bound
    if known:
        levels['HOPE', 'push known'] = known
    results = results_of('ABA', {name: (a, b, a) for name, (a, b) in levels.items()}, streams=2, noise=noise)
    found = figures.shares(results['rows'][2], results['rows'][1], results)
    return {name: values.mean() for name, values in found.items()}


def test_a_share_is_given_where_it_means_something():
    good = shares((0.01, 0.07), (0.06, 0.02), (0.01, 0.03), known=(0.01, 0.03))
    assert good == {'gap_closed': pytest.approx(0.8, abs=0.02), 'of_known': pytest.approx(1, abs=0.02)}
    assert shares((0.01, 0.07), None, (0.01, 0.04)) == {'way_back': pytest.approx(0.5, abs=0.02)}


@pytest.mark.parametrize('why, levels', [
    ('a model that has learned nothing', dict(frozen=(0.06, 0.07), bound=(0.06, 0.02), adapted=(0.06, 0.03))),
    ('an oracle worse than an empty scene', dict(frozen=(0.01, 0.07), bound=(0.06, 0.06), adapted=(0.01, 0.03))),
    ('an oracle that is worse than the model', dict(frozen=(0.01, 0.02), bound=(0.06, 0.03), adapted=(0.01, 0.02))),
    ('a gap of 4 %', dict(frozen=(0.01, 0.05), bound=(0.06, 0.048), adapted=(0.01, 0.049))),
    ('a gap within the noise', dict(frozen=(0.01, 0.04), bound=(0.06, 0.037), adapted=(0.01, 0.038), noise=0.03)),
    ('no loss to come back from', dict(frozen=(0.01, 0.0101), bound=None, adapted=(0.01, 0.01))),
    ('a known push of no use', dict(frozen=(0.01, 0.05), bound=(0.06, 0.05), adapted=(0.01, 0.04), known=(0.01, 0.05))),
])
def test_a_share_of_nothing_stays_empty(why, levels):
    assert shares(**levels) == {}


# ---- continual learning ----------------------------------------------------------------------------------------------

def continual(R, domains):
    return {name: value for name, [value] in figures.continual(np.array([R], float), list(domains)).items()}


def test_three_domains_as_in_the_papers():
    """Each domain once: the formulas of Lopez-Paz & Ranzato and of Chaudhry et al., written out."""
    R = [[9, 9, 9], [1, 8, 7], [3, 2, 6], [2, 5, 1]]
    assert continual(R, 'ABC') == pytest.approx({
        'Top1_L1': (2 + 5 + 1) / 3,
        'StreamForgetting': ((2 - 1) + (5 - 2)) / 2,
        'forgetting_from_best': ((2 - 1) + (5 - 2)) / 2,
        'backward_transfer': ((1 - 2) + (2 - 5)) / 2,
        'forward_transfer': ((9 - 8) + (9 - 6)) / 2,
        'plasticity': ((8 - 2) + (6 - 1)) / 2,
    })


def test_a_domain_that_comes_back():
    """A counts with its first visit in forgetting, with each but the last phase in backward transfer."""
    R = [[1, 9], [2, 8], [6, 3], [1, 7], [5, 4]]
    assert continual(R, 'ABAB') == pytest.approx({
        'Top1_L1': (5 + 4) / 2,
        'StreamForgetting': ((5 - 2) + (4 - 3)) / 2,
        'forgetting_from_best': ((5 - 1) + (4 - 3)) / 2,
        'backward_transfer': ((2 - 5) + (3 - 4) + (1 - 5)) / 3,
        'forward_transfer': 9 - 8,
        'plasticity': 8 - 3,
    })
    # What was lower before the first visit does not count.
    assert continual([[5, 1], [5, 1], [5, 4], [5, 6]], 'ABA')['forgetting_from_best'] == pytest.approx((0 + 2) / 2)


def test_streams_without_a_shift():
    assert continual([[1], [2], [4], [3]], 'AAA') == pytest.approx(
        {'Top1_L1': 3, 'StreamForgetting': 3 - 2, 'forgetting_from_best': 3 - 2,
         'backward_transfer': ((2 - 3) + (4 - 3)) / 2})
    assert continual([[1], [2]], 'A') == {'Top1_L1': 2}


# ---- intervals and comparisons ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('p, freedom, t', [(0.05, 1, 12.7062), (0.05, 2, 4.3027), (0.05, 4, 2.7764), (0.01, 4, 4.6041),
                                           (0.001, 4, 8.6103), (0.05, 19, 2.0930), (0.05, 1000, 1.9623)])
def test_student_against_the_tables(p, freedom, t):
    assert figures.t_beyond(p, freedom) == pytest.approx(t, abs=1e-4)


def test_a_t_test_by_hand():
    """t = 1.5 sqrt(2), 4 degrees of freedom: p = 1 - I, in closed form."""
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0]) - 1.5
    t = 1.5 / (2.5 / 5) ** 0.5
    x = t / (4 + t * t) ** 0.5
    assert figures.t_test(values) == pytest.approx(1 - (1.5 * x - 0.5 * x ** 3), abs=1e-6)
    assert figures.t_test(np.zeros(3)) == 1 and figures.t_test(np.ones(3)) == 0


def test_the_bootstrap_resamples_seeds_then_streams():
    """Its variance is that of the two steps, and each resample weighs 1."""
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (5, 1)) + rng.normal(0, 1, (5, 20))
    weights = figures.resamples(5, 20)
    assert weights.shape == (figures.DRAWS, 100) and np.allclose(weights.sum(1), 1)
    variance = values.mean(1).var() / 5 + values.var(1).mean() / 100
    assert (weights @ values.ravel()).var() == pytest.approx(variance, rel=0.05)
    # With one seed over the streams alone.
    assert (figures.resamples(1, 20) @ values[0]).var() == pytest.approx(values[0].var() / 20, rel=0.05)


@pytest.mark.parametrize('seeds, streams, of_seeds', [(5, 20, 1.0), (3, 1, 1.0), (1, 20, 0.0)])
def test_the_interval_holds_what_it_says(seeds, streams, of_seeds):
    """Of 400 sets of normal values with mean 0, about 95 % of the intervals hold it; p < 0.05 in about 5 %."""
    rng = np.random.default_rng(2)
    held = small = 0
    for _ in range(400):
        values = rng.normal(0, of_seeds, (seeds, 1)) + rng.normal(0, 1, (seeds, streams))
        mean, low, high = figures.interval(values)
        assert low < mean < high
        p = figures.versus(values, np.zeros_like(values))['p']
        # What one says the other does not deny.
        assert p > 0.05 - 1e-3 or not low <= 0 <= high
        held += low <= 0 <= high
        small += p < 0.05
    assert 0.92 <= held / 400 <= 0.985 and small / 400 <= 0.08


def test_one_value_has_no_interval():
    assert figures.interval([[0.5]]) == (0.5, None, None)
    assert figures.versus([[0.5]], [[0.2]]) == {'mean': pytest.approx(0.3), 'low': None, 'high': None, 'p': None}


def test_a_comparison_is_paired():
    """What clips and seeds have in common does not hide a small difference, and two seeds prove nothing."""
    rng = np.random.default_rng(3)
    common = rng.normal(0, 1, (5, 1)) + rng.normal(0, 1, (5, 20))
    one = common + 0.1 + rng.normal(0, 0.02, (5, 20))
    found = figures.versus(one, common)
    assert found['low'] < found['mean'] < found['high'] and found['mean'] == pytest.approx(0.1, abs=0.01)
    assert found['p'] < 0.001 and figures.versus(common, one)['p'] == pytest.approx(found['p'])
    assert figures.versus(common, common)['p'] == 1
    # All resamples of two values agree, and yet they could have come by chance.
    assert figures.versus([[0.1], [0.3]], [[0.0], [0.0]])['p'] > 0.295


def test_p_is_never_smaller_than_that_of_the_t_test():
    values = np.array([[0.9], [1.0], [1.1], [1.0], [1.05]])
    found = figures.versus(values, 0 * values)
    assert found['p'] == max(2 / (figures.DRAWS + 1), figures.t_test(values[:, 0])) and found['p'] < 0.001
    spread = np.array([[0.1], [1.0], [2.0]])
    assert figures.versus(spread, 0 * spread)['p'] >= figures.t_test(spread[:, 0]) > 0.1
