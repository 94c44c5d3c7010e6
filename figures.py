"""
What the losses of a stream say: figures of one row, and intervals and comparisons over seeds and streams.

    add_figures(results)                     row['figures'] of every row, {name: one value for each stream}
    interval(values)                         mean and 95 % interval of values, seeds x streams
    versus(one, other)                       the mean difference of two methods, its 95 % interval and p

Numbers only: nothing is read or written here. In the names of figures, A stands for the home world and B for all that
is away from it, whatever they are called. S streams, P phases of n clips each.
"""
import functools

import numpy as np

EARLY = 25               # clips at the start and at the end of a phase whose mean is a figure of its own
DIGITS = 6               # decimals of losses and metres, in results.json and in all that is computed
DRAWS = 10_000           # resamples of a bootstrap


# ---- the stream ------------------------------------------------------------------------------------------------------

def row_of(rows, model, method, seed=None):
    """The first row of a model, a method and, unless it is None, a seed; None where there is none."""
    for row in rows:
        if (row['model'], row['method']) == (model, method) and (seed is None or row['seed'] == seed):
            return row
    return None


def oracle_of(rows, seed):
    """The oracle's row of a seed, or None; where there is one oracle only, it serves all seeds."""
    oracles = [row for row in rows if row['model'] == 'oracle']
    return oracles[0] if len(oracles) == 1 else row_of(rows, 'oracle', 'frozen', seed)


def running_mean(values, width=10):
    """Mean of each window of `width` neighbours, (n-width+1,)."""
    width = min(width, len(values))
    return np.convolve(values, np.ones(width) / width, 'valid')


def by_phase(values, results):
    """Losses or metres of a row, S x (P*n) → (S,P,n)."""
    shape = results['streams'], len(results['phases']), results['clips']
    return np.round(np.array(values, float), DIGITS).reshape(shape)


def away_phases(domains):
    """Numbers, from 0, of the phases that are not in the world of the first one."""
    return [i for i, domain in enumerate(domains) if domain != domains[0]]


def return_phases(domains):
    """Numbers, from 0, of the phases that come home from another world."""
    return [i for i in range(1, len(domains)) if domains[i] == domains[0] != domains[i - 1]]


# ---- figures of one row ----------------------------------------------------------------------------------------------

def add_figures(results):
    """
    Set row['figures'] = {name: [a value for each stream, None where it is not reached]} for every row of results, and
    row['R_matrix'] (1+P, domains), the mean over the streams, for every row with probes.
    """
    for row in results['rows']:
        found = figures(row, results)
        row['figures'] = {name: list(np.array(values, object)) for name, values in found.items()}
        if row['probes']:
            row['R_matrix'] = np.round(probe_matrix(row, results).mean(0), DIGITS).tolist()


def figures(row, results):
    """The figures of one row, {name: (S,) values, or a list with None for "never"}."""
    domains = results['domains']
    away, back = away_phases(domains), return_phases(domains)
    loss = by_phase(row['loss'], results)
    found = {'A1': loss[:, 0].mean(1)}
    if away:
        found['B'] = loss[:, away].mean((1, 2))
        found['B_first'] = loss[:, away, :EARLY].mean((1, 2))
        found['B_last'] = loss[:, away, -EARLY:].mean((1, 2))
        if results['beyond'] is not None:
            found |= within_and_beyond(loss[:, away], by_phase(results['beyond'], results)[:, away] > 0)
    if back:
        found['A2'] = loss[:, back].mean((1, 2))
        found['A2_first'] = loss[:, back, :EARLY].mean((1, 2))
    for i in range(len(domains)):
        found[f'phase {i + 1}'] = loss[:, i].mean(1)
    if row['metres'] is not None:
        metres = by_phase(row['metres'], results)
        found['metres_A1'] = metres[:, 0].mean(1)
        if away:
            found['metres_B'] = metres[:, away].mean((1, 2))
    found['ms_per_clip'] = np.full(len(loss), 1e3 * np.median(row['seconds']))
    if row['probes']:
        R = probe_matrix(row, results)
        if away:
            found['forgetting'] = R[:, away[0] + 1, 0] - R[:, away[0], 0]
        found |= continual(R, domains)
    frozen = row_of(results['rows'], row['model'], 'frozen', row['seed'])
    if frozen and row is not frozen:
        found |= against_frozen(loss, by_phase(frozen['loss'], results), domains)
        if away:
            found |= shares(row, frozen, results)
    return found


def within_and_beyond(loss, beyond):
    """
    Mean loss of the clips that slide no further, and further, than any training clip: loss, beyond (S,phases,n).

    Left out where a stream has no such clip.
    """
    found = {}
    for name, chosen in (('B_within', ~beyond), ('B_beyond', beyond)):
        if chosen.any((1, 2)).all():
            found[name] = loss.mean((1, 2), where=chosen)
    return found


def clips_to(share, loss, frozen):
    """
    First clip of a phase from which on the 10-clip mean has a share of the method's own final gain, or None for never.

    loss, frozen (n,): of the method and of the same model frozen. Half of a gain of nearly nothing would be reached
    with the first clip, so a final gain below 1 % of the frozen loss is never reached.
    """
    gain = running_mean(frozen - loss)
    final = gain[-EARLY:].mean()
    reached = np.flatnonzero(gain >= share * final)
    if final <= 0.01 * frozen.mean() or not len(reached):
        return None
    return int(reached[0]) + 1


def against_frozen(loss, frozen, domains):
    """The figures that compare losses (S,P,n) with those of the model's own frozen row."""
    away, back = away_phases(domains), return_phases(domains)
    if not away:
        return {'harm': (loss - frozen).mean((1, 2))}
    streams = range(len(loss))
    found = {}
    for name, share in (('t50', 0.5), ('t90', 0.9)):
        found[name] = [clips_to(share, loss[s, away[0]], frozen[s, away[0]]) for s in streams]
    if back:
        found['return_cost'] = (loss - frozen)[:, back, :EARLY].mean((1, 2))
    again = [i for i in away if domains[i] in domains[:i]]
    if again:
        second = again[0]
        first = domains.index(domains[second])
        found['savings'] = []
        for s in streams:
            before, after = (clips_to(0.9, loss[s, i], frozen[s, i]) for i in (first, second))
            found['savings'].append(after / before if before and after else None)
    return found


def shares(row, frozen, results):
    """
    Which shares of what could be gained away from home a row gains, {name: (S,)}: of the way to the oracle
    (gap_closed), or without one back to A₁ (way_back), and of what the known push gains (of_known).

    A share is left out where it would say nothing: where what could be gained is not clearly above zero, where the
    bound is no better than an empty scene, and for a model that is no better than that in A₁, which has learned
    nothing. This is judged on all streams together.
    """
    rows, away = results['rows'], away_phases(results['domains'])
    blank = by_phase(row_of(rows, '', 'blank')['loss'], results)
    still = by_phase(frozen['loss'], results)
    if still[:, 0].mean() >= blank[:, 0].mean():
        return {}
    best = {}
    bound, known = oracle_of(rows, row['seed']), row_of(rows, row['model'], 'push known', row['seed'])
    if bound:
        best['gap_closed'] = by_phase(bound['loss'], results)[:, away]
    else:
        best['way_back'] = still[:, :1]
    if known:
        best['of_known'] = by_phase(known['loss'], results)[:, away]
    gained = (still - by_phase(row['loss'], results))[:, away].mean((1, 2))
    found = {}
    for name, best_b in best.items():
        gain = still[:, away] - best_b
        error = gain.std() / gain.size ** 0.5
        clear = gain.mean() > max(2 * error, 0.05 * still[:, away].mean())
        if clear and best_b.mean() < blank[:, away].mean():
            found[name] = gained / gain.mean((1, 2))
    return found


# ---- continual learning ----------------------------------------------------------------------------------------------

def probe_matrix(row, results):
    """
    R (S,1+P,domains): loss on the held-out clips of each domain before the stream (row 0) and after phase i (row i).

    The domains are in the order in which the stream visits them.
    """
    after = [results['probe_at'].index(i * results['clips']) for i in range(len(results['phases']) + 1)]
    domains = dict.fromkeys(results['domains'])
    return np.stack([np.round(np.array(row['probes'][domain], float), DIGITS)[:, after] for domain in domains], axis=2)


def continual(R, domains):
    """
    Figures of continual learning → {name: (S,)}, of R (S,1+P,domains), see probe_matrix(), and each phase's domain.

    Written for losses, so that the signs of the differences turn where the source has accuracies. d(i): the domain of
    phase i; v(j): the phase in which domain j is visited first; what has no domain to take a mean over is left out.

    Top1_L1
        mean over all j of R[P][j]. ACC of Lopez-Paz & Ranzato 2017 (arXiv:1706.08840); in the naming of Avalanche
        (Lomonaco et al. 2021, arXiv:2104.00405), whose Top1_Acc_Stream is an accuracy.
    StreamForgetting
        mean over j with v(j) < P of R[P][j] - R[v(j)][j], positive is worse. Avalanche: what was measured right after
        an experience was first trained on, against the end. A domain that comes back counts with its first visit, so
        A,B,A has in it what is left in A and what is forgotten of B.
    forgetting_from_best
        mean over j with v(j) < P of R[P][j] - min of R[v(j)..P-1][j], positive is worse. F of Chaudhry et al. 2018
        (arXiv:1801.10112), who take the best of all earlier rows; here from the first visit on.
    backward_transfer
        mean over phases i < P of R[i][d(i)] - R[P][d(i)], positive is better. BWT of Lopez-Paz & Ranzato 2017, whose
        tasks are the phases, each with the probes of its domain. It is -StreamForgetting unless a domain comes back
        before the last phase.
    forward_transfer
        mean over j with v(j) > 1 of R[0][j] - R[v(j)-1][j], positive is better. FWT of Lopez-Paz & Ranzato 2017, with
        the checkpoint before the stream in place of random weights.
    plasticity
        mean over j other than home of R[v(j)-1][j] - R[v(j)][j], positive is better: what the first visit gains.
    """
    P = len(domains)
    column = {domain: j for j, domain in enumerate(dict.fromkeys(domains))}
    visit = {domain: domains.index(domain) + 1 for domain in column}
    earlier = [domain for domain in column if visit[domain] < P]
    later = [domain for domain in column if visit[domain] > 1]

    def over(of, difference):
        """The mean over domains, or phases, of a difference of losses (S,)."""
        return np.mean([difference(item) for item in of], axis=0)

    found = {'Top1_L1': R[:, P].mean(1)}
    if earlier:
        found['StreamForgetting'] = over(earlier, lambda j: R[:, P, column[j]] - R[:, visit[j], column[j]])
        found['forgetting_from_best'] = over(
            earlier, lambda j: R[:, P, column[j]] - R[:, visit[j]:P, column[j]].min(1))
        found['backward_transfer'] = over(
            range(1, P), lambda i: R[:, i, column[domains[i - 1]]] - R[:, P, column[domains[i - 1]]])
    if later:
        found['forward_transfer'] = over(later, lambda j: R[:, 0, column[j]] - R[:, visit[j] - 1, column[j]])
        found['plasticity'] = over(later, lambda j: R[:, visit[j] - 1, column[j]] - R[:, visit[j], column[j]])
    return found


# ---- intervals and comparisons ---------------------------------------------------------------------------------------

@functools.cache
def resamples(seeds, streams):
    """
    Weights of a bootstrap by seed, then by stream within each seed that was drawn, (DRAWS, seeds*streams).

    A row sums to 1. They are the same each time.
    """
    rng = np.random.default_rng(0)
    values = seeds * streams
    seed = rng.integers(seeds, size=(DRAWS, seeds, 1))
    stream = rng.integers(streams, size=(DRAWS, seeds, streams))
    drawn = seed * streams + stream                                    # (DRAWS,seeds,streams)
    place = drawn + values * np.arange(DRAWS)[:, None, None]
    return np.bincount(place.ravel(), minlength=DRAWS * values).reshape(DRAWS, values) / values


@functools.cache
def student(freedom):
    """
    Student's t with whole degrees of freedom → (angles, p): p two-sided for |t| = sqrt(freedom) / tan(angle).

    With t so written, its density is the sine of the angle to the power freedom - 1.
    """
    edges = np.linspace(0, np.pi / 2, 200_001)
    middles = (edges[1:] + edges[:-1]) / 2
    share = np.cumsum(np.sin(middles) ** (freedom - 1))
    return edges, np.concatenate([[0], share / share[-1]])


def t_beyond(p, freedom):
    """The t that is exceeded, on both sides together, with probability p."""
    angles, share = student(freedom)
    return freedom ** 0.5 / np.tan(np.interp(p, share, angles))


def t_test(values):
    """p, two-sided, of values (n,) whose true mean were zero; n >= 2."""
    if not np.any(values):
        return 1.0
    n = len(values)
    error = np.std(values, ddof=1) / n ** 0.5
    angles, share = student(n - 1)
    return float(np.interp(np.arctan2((n - 1) ** 0.5 * error, abs(np.mean(values))), angles, share))


def resampled(values):
    """
    Means of values, seeds x streams and more than one of them, as they could have come out, (DRAWS,).

    A bootstrap by seed, then by stream within each seed; with one seed over the streams alone. Few values make a
    bootstrap too sure of itself: for n seeds (or streams, with one seed) its means are moved away from the mean by the
    factor sqrt(n/(n-1)) t(n-1) / t(inf), so that 95 % of them lie about where a t interval would where the values are
    normal. The two parts of the factor: Hesterberg 2015, What Teachers Should Know About the Bootstrap
    (arXiv:1411.5279).
    """
    seeds, streams = values.shape
    n = seeds if seeds > 1 else streams
    wider = (n / (n - 1)) ** 0.5 * t_beyond(0.05, n - 1) / 1.959964
    drawn = resamples(seeds, streams) @ values.ravel()
    return values.mean() + wider * (drawn - values.mean())


def interval(values):
    """
    Mean and 95 % interval of values, seeds x streams → (mean, low, high): see resampled().

    low and high are None for a single value.
    """
    values = np.array(values, float)
    if values.size == 1:
        return values.mean(), None, None
    low, high = np.percentile(resampled(values), (2.5, 97.5))
    return values.mean(), low, high


def versus(one, other):
    """
    Two methods over the same clips: a figure of each, seeds x streams → {mean, low, high, p} of one minus other.

    Paired: only differences of the same seed and stream count. p is two-sided, the larger of the bootstrap's, see
    resampled(), and of a paired t test over the seed means (with one seed: over its streams), so it is below 0.05 only
    where the interval is clear of zero. All but the mean are None for a single value.
    """
    difference = np.array(one, float) - np.array(other, float)
    mean, low, high = interval(difference)
    p = None
    if difference.size > 1:
        drawn = resampled(difference)
        side = min((drawn <= 0).sum(), (drawn >= 0).sum())
        bootstrap = min(1.0, 2 * (side + 1) / (DRAWS + 1))
        means = difference.mean(1) if len(difference) > 1 else difference[0]
        p = max(bootstrap, t_test(means))
    return {'mean': mean, 'low': low, 'high': high, 'p': p}
