"""
A→B→A: how a trained predictor adapts when the physics changes, and what it forgets.

    python adapt.py --ckpt=out/hope.pt                       every method that this checkpoint can do
    python adapt.py --ckpt=out/hope.pt,out/vit.pt            compared in one table
    python adapt.py --ckpt=out/hope.pt --methods=all         with the controls that could refute the result
    python adapt.py --ckpt=out/hope.pt --phases=A,B,A,B      any other stream of worlds
    python adapt.py --ckpt=out/hope.pt --plan=True           and how well pushes are chosen with what was learned
    python adapt.py config/report.py                         five seeds, twenty orders of the clips, with intervals

The stream: clips of one world after the other, one clip at a time; nobody tells the model where a phase ends. Every clip
is predicted and scored from its first step and action alone; only then is it shown, and the method may learn from it.
Learning rates are tuned on other shifts (tune_on), never on those of the stream, with the same number of trials for every
method. Writes table.txt, results.json, results.csv (the loss of every clip), compare.csv and pictures into `out`, which
compare.py reads. An interrupted run keeps its finished rows there in unfinished.pt; the same command goes on.
"""
import functools
import os
import time
from types import SimpleNamespace

import numpy as np
import torch

from compare import compare_csv, format_table, grouped, in_words, on_the_edge, results_csv, results_json
from compare import seeded, title
from configurator import Refusal, configure, listed
from data import median_scene, pictures
from drawing import draw, draw_animation, draw_predictions, shown_clips
from experiment import batches, build_experiment, check_clips, further_than_training, groups, labels_of, open_splits
from experiment import phases_of, read_checkpoints, read_decoder, split_of, tuned_on
from figures import add_figures
from hope import CMSWriter
from methods import METHODS, TTA, LNTTA, WrongWorld, check_methods
from metres import fit_readout, readout_error
from model import feature_loss, pick_device
from planning import make_goals, milliseconds, plan_pushes, plan_with_simulator, reached
from support.files import MALFORMED, claim, read_manifest, read_sealed, write_sealed, write_text
from support.finished import FILES, check_memory_out, resume, run_key
from support.running import keep_freed_memory, make_slide
from support.terminal import duration, progress

# what to run
ckpt = 'out/hope.pt'     # checkpoint, or several separated by commas; several of a kind are seeds
data = 'slide'           # the data set whose splits make the stream
phases = 'auto'          # worlds of the stream: A,B,A or A,B,A,B or A1,B,A2 or val,B,A2; auto = A,B,A as it is there
clips = 200              # clips per phase [1..]
streams = 1              # orders of the clips; with several, intervals are over them, too [1..]
out = 'out/aba'          # folder for the results
# the methods
methods = ''             # run only these, separated by commas, as they are called in the table; '' = no controls, all = all
oracle = ''              # checkpoint fine-tuned on other clips of the shift: the bound of gaps; one, or one for each seed
memory_in = ''           # start HOPE's memory and CMS from this file instead of fresh
memory_out = ''          # keep HOPE's memory and CMS, as they are at the end of the stream, in this file
plan = False             # at the end of every phase, choose pushes that bring objects to goals
# their learning rates
tune_on = 'auto'         # domains X: streams A→X→A choose the rates; scaled = val, pushes scaled; auto = C or scaled
tune_clips = 25          # clips per phase of the tuning streams [1..]
ln_rate = 0.0            # LN-TTA; 0 = tuned, or with --tune_on= the default that was measured on C [0..]
action_rate = 0.0        # action TTA, likewise [0..]
full_rate = 0.0          # full TTA, likewise [0..]
titan_share = 0.0        # Titan memory: share of its state that is kept for the next clip, likewise [0..1]
cms_rate = 0.0           # CMS, likewise [0..]
gain_rate = 0.0          # gain writer, likewise [0..]
# what to measure
probe_clips = 200        # clips of the held-out probe set of each world, and goals of --plan [1..]
probe_every = 100        # clips of the stream between two probes [1..]
device = 'auto'          # auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps or cpu
dtype = 'auto'           # auto = bfloat16 where the device has it and the model gains by it [auto | float32 | bfloat16]
settings = configure(globals()) if __name__ == '__main__' else {}


# ---- the stream ------------------------------------------------------------------------------------------------------

def run_stream(method, streams, probes=None, probe_at=(), shown=(), readout=None, after=None, label=None):
    """
    Run one method over the clips of S streams at once, test-then-train: predict, score, look back, note.

    method: an instance of a class of METHODS for S streams; streams: Clips, or whatever gives (z, a) for a slice; readout:
    see metres.fit_readout; after: {clips: function of the method whose result is noted after so many clips}; the others:
    see Experiment; label: a progress line is shown under it. Returns a dict: loss and metres (S,n), seconds per clip and
    stream (n,), probes {domain: (S,len(probe_at))}, diagnostics [{...} per clip], shown {clip of the first stream:
    predictions (K,N,D)}, after [...], state of the method at the end.
    """
    probes, after = probes or {}, after or {}
    notes = {'loss': [], 'metres': [], 'seconds': [], 'probes': {domain: [] for domain in probes}, 'diagnostics': [],
             'shown': {}, 'after': []}
    if 0 in probe_at:
        score_probes(method, probes, notes)
    numbers = range(len(streams[0]))
    for i in progress(numbers, label) if label else numbers:
        z, a = clip_of_each(streams, i)
        started = time.perf_counter()
        # Left after each clip: within, bfloat16 copies of weights are kept, and would hide what has been learned.
        with method.precision:
            z_hat = method.predict(z[:, None], a[:, None])[:, 0]
            loss = feature_loss(z_hat, z[:, method.targets])
            # The clips have been scored. Only now are they shown.
            method.look_back(z, a)
        notes['seconds'].append((time.perf_counter() - started) / len(streams))
        z_hat, loss = z_hat.detach().float(), loss.detach().float()
        notes['loss'].append(loss)
        surprise = loss / copy_loss(z, method.targets)
        notes['diagnostics'].append({'surprise': surprise.mean().item(), **method.diagnostics()})
        if readout:
            notes['metres'].append(misplaced(readout(z_hat), streams, i, method.targets))
        if i in shown:
            notes['shown'][i] = z_hat[0].half()
        if i + 1 in probe_at:
            score_probes(method, probes, notes)
        if i + 1 in after:
            notes['after'].append(after[i + 1](method))
    notes['loss'] = by_stream(notes['loss'])
    notes['metres'] = by_stream(notes['metres'])
    notes['probes'] = {domain: by_stream(losses) for domain, losses in notes['probes'].items()}
    return {**notes, 'state': method.state()}


def by_stream(values):
    """Values (S,) of each of n clips → a list of n for each stream; None where there are none."""
    return torch.stack(values, 1).tolist() if values else None


def clip_of_each(streams, i):
    """Clip i of each of S streams: z (S,T,N,D), a (S,T,A)."""
    features, pushes = zip(*[stream[i:i + 1] for stream in streams])
    return torch.cat(features), torch.cat(pushes)


def copy_loss(z, targets):
    """What predicting step 1 again loses on clips z (S,T,N,D): the loss relative to it is what was not foreseen, (S,)."""
    return feature_loss(z[:, :1], z[:, targets]).clamp(min=1e-12)


def misplaced(places, streams, i, targets):
    """How far the objects of clip i of each stream are from `places` (S,K,2): the mean over target steps in metres, (S,)."""
    true = torch.cat([stream.positions([i], targets) for stream in streams])
    return (places - true).norm(dim=-1).mean(1)


def score_probes(method, probes, notes):
    """Note what each stream loses on each probe set by now."""
    for domain, clips in probes.items():
        scored = notes['probes'][domain]
        # What does not learn scores the same for ever.
        known = scored and not method.learns
        scored.append(scored[-1] if known else score(method, clips))


def score(method, clips):
    """The mean loss of a probe set in each stream, (S,)."""
    S = method.streams if method.learns else 1
    losses = []
    for z, a in batches(clips, S):
        with torch.no_grad(), method.precision:
            z_hat = method.predict(z.expand(S, *z.shape), a.expand(S, *a.shape))
            wanted = z[:, method.targets].expand(z_hat.shape)
            losses.append(feature_loss(z_hat.flatten(0, 1), wanted.flatten(0, 1)).unflatten(0, (S, len(z))))
    return torch.cat(losses, 1).float().mean(1).expand(method.streams)


def tune(checkpoint, name, streams):
    """Mean loss over the streams of every rate of a method → {rate: loss}. All trials are run at once, as far as they fit."""
    trials = [(rate, stream) for rate in METHODS[name].rates for stream in streams]
    losses = {rate: [] for rate in METHODS[name].rates}
    adapted = METHODS[name].adapts(checkpoint.predictor)
    for together in groups([stream for _, stream in trials], adapted):
        now, trials = trials[:len(together)], trials[len(together):]
        rates = torch.tensor([rate for rate, _ in now])
        method = METHODS[name](checkpoint, rates, streams=len(now))
        done = run_stream(method, together, label=seeded(f'tuning {checkpoint.name} {name}', checkpoint.seed))
        for (rate, _), loss in zip(now, done['loss']):
            losses[rate] += loss
    return {rate: float(np.mean(loss)) for rate, loss in losses.items()}


def tuned_rate(checkpoint, name, streams, kept, unfinished):
    """The best of a method's rates on the tuning streams. They are tried once: see run_rows for `kept`."""
    key = seeded(f'{checkpoint.name} {name}', checkpoint.seed)
    if key not in kept['tried']:
        kept['tried'][key] = tune(checkpoint, name, streams)
        write_sealed(unfinished, kept)
    tried = kept['tried'][key]
    best = min(tried, key=tried.get)
    if on_the_edge(best, tried):
        print(f'warning: {best:g}, the best rate of {key}, lies on the edge of what is tried')
    return best


# The learning rate of LN-TTA in the plan that these experiments began with: a row of its own, never tuned.
PLAN_RATE = 1e-4


def rows_of(checkpoint, chosen, given, tuning, other):
    """
    The rows of a checkpoint in the order of the table → [(method, rate, where the rate is from)].

    The last is '' (the method has no rate), 'given', 'tuned' (the rate is None until it is), 'default' or 'plan'.
    chosen: the names of methods to run. given: {method: rate set by its knob, 0 where it is not}. tuning, other: whether
    there are streams to tune on, and clips of another domain.
    """
    if checkpoint.name == 'oracle':
        return [('frozen', None, '')]
    sizes = checkpoint.predictor.sizes
    rows = []
    for name, method in METHODS.items():
        if name not in chosen or not method.fits(sizes) or (method is WrongWorld and not other):
            continue
        rate = given.get(name, 0) or method.default.get(sizes.model)
        if not method.rates:
            rows.append((name, None, ''))
        elif given.get(name):
            rows.append((name, rate, 'given'))
        elif tuning:
            rows.append((name, None, 'tuned'))
        elif rate:
            rows.append((name, rate, 'default'))
        if method is LNTTA and sizes.model == 'vit' and rate != PLAN_RATE:
            rows.append((name, PLAN_RATE, 'plan'))
    return rows


def run_rows(plans, experiment, kept, unfinished, start=None, keep_state=False, readout=None, after=None):
    """
    Run the planned rows of checkpoints, [(checkpoint, its rows)], tuning where it is due → rows of the table.

    kept: what is finished already (see resume), written to the file `unfinished` after every row. start: see Method;
    readout, after: see run_stream.
    """
    rows = []
    time_left = TimeLeft(plans, experiment)
    for checkpoint, planned in plans:
        parameters = sum(p.numel() for p in checkpoint.predictor.parameters())
        print(f'{seeded(checkpoint.name, checkpoint.seed)}: {checkpoint.path}, {parameters:,} parameters, '
              f'{checkpoint.step} steps of training', flush=True)
        for name, rate, rate_from in planned:
            if rate_from == 'tuned':
                rate = tuned_rate(checkpoint, name, experiment.tuning, kept, unfinished)
            method = METHODS[name]
            kind = 'oracle' if checkpoint.name == 'oracle' else checkpoint.predictor.sizes.model
            row = {'model': checkpoint.name, 'kind': kind, 'seed': checkpoint.seed, 'method': name, 'rate': rate,
                   'rate_from': rate_from, 'tta': issubclass(method, TTA), 'carries': list(method.carries)}
            key = seeded(title(row), checkpoint.seed)
            new = key not in kept['finished']
            if new:
                result = run_row(checkpoint, row, experiment, start, readout, after)
                if not keep_state:
                    del result['state']
                kept['finished'][key] = result
                write_sealed(unfinished, kept)
            time_left.row_done(name, rate_from, new)
            rows.append({**row, **kept['finished'][key]})
    return rows


def run_row(checkpoint, row, experiment, start, readout, after):
    """All streams of one row, as many at once as fit → what run_stream returns."""
    parts = []
    adapted = METHODS[row['method']].adapts(checkpoint.predictor)
    for together in groups(experiment.streams, adapted):
        method = METHODS[row['method']](checkpoint, row['rate'], start, experiment, len(together))
        parts.append(run_stream(method, together, experiment.probes, experiment.probe_at, experiment.shown, readout, after,
                                label=seeded(title(row), checkpoint.seed)))
    whole = parts[0]
    for part in parts[1:]:
        whole['loss'] += part['loss']
        whole['metres'] = whole['metres'] and whole['metres'] + part['metres']
        for domain, losses in part['probes'].items():
            whole['probes'][domain] += losses
    whole['planning'] = whole.pop('after') or None
    return whole


class TimeLeft:
    """The time that a run still takes, from the rows that it has run, their tuning included."""

    def __init__(self, plans, experiment):
        self.experiment = experiment
        planned = [row for _, rows in plans for row in rows]
        self.left = sum(self.work(name, rate_from) for name, _, rate_from in planned)
        self.total = len(planned)
        self.rows = self.worked = 0
        self.started = time.time()

    def work(self, name, rate_from):
        """
        Roughly what a row costs, in predicted clips: one that is learned from by gradients counts three times, and one
        of the probes, which are predicted many at once, a quarter.
        """
        experiment = self.experiment
        clips = sum(map(len, experiment.streams))
        if rate_from == 'tuned':
            clips += len(METHODS[name].rates) * sum(map(len, experiment.tuning))
        if METHODS[name].rates:
            clips *= 3
        probed = len(experiment.streams) * len(experiment.probe_at) * sum(map(len, experiment.probes.values()))
        return clips + probed / 4

    def row_done(self, name, rate_from, new):
        """Count a row, and say what is left; new: whether it was run just now."""
        work = self.work(name, rate_from)
        self.left -= work
        self.rows += 1
        if new:
            self.worked += work
        if self.left and self.worked:
            seconds = (time.time() - self.started) / self.worked * self.left
            print(f'row {self.rows} of {self.total} is done, about {duration(seconds)} left in all', flush=True)


def guesses(experiment, targets, empty, readout=None):
    """
    The rows of two predictions that know nothing of motion: the first step again, and an empty scene (N,D).

    A method that only learns to erase the object scores like `blank`, so a method has to be better than that.
    """
    losses = {'copy': [], 'blank': []}
    metres = []
    for i in range(len(experiment.streams[0])):
        z, _ = clip_of_each(experiment.streams, i)
        losses['copy'].append(feature_loss(z[:, :1], z[:, targets]))
        losses['blank'].append(feature_loss(empty, z[:, targets]))
        if readout:
            places = readout(z[:, :1]).expand(-1, len(targets), -1)
            metres.append(misplaced(places, experiment.streams, i, targets))
    found = {'copy': torch.stack(metres, 1).tolist() if readout else None, 'blank': None}
    rows = []
    for name, loss in losses.items():
        rows.append({'model': '', 'kind': '', 'seed': 1, 'method': name, 'rate': None, 'rate_from': '', 'tta': False,
                     'carries': [], 'loss': torch.stack(loss, 1).tolist(), 'metres': found[name], 'seconds': [0.0],
                     'probes': {}, 'diagnostics': [], 'shown': {}, 'planning': None, 'state': {'memory': None}})
    return rows


# ---- planning with what was learned ----------------------------------------------------------------------------------

def planners(experiment, phases, train, where):
    """
    For run_stream: {clips: function of a method} that plan at the end of every phase, in its world, for the clips of its
    probes; and what the true simulator reaches. Raises Refusal where the physics is not known.
    """
    largest = float(np.linalg.norm(train.actions[:, 0], axis=-1).max())
    after, simulated = {}, []
    for number, (label, domain) in enumerate(zip(labels_of(phases), experiment.domains), 1):
        split, indices = experiment.probes[domain].source()
        goals = make_goals(split, domain, indices, where)
        after[number * experiment.clips] = functools.partial(plan_phase, label, goals, largest)
        distance = reached(goals, plan_with_simulator(goals, largest))
        simulated.append({'phase': label, 'distance': distance.tolist(), 'ms': None})
    return after, simulated


def plan_phase(label, goals, largest, method):
    """Plan for all goals with a method → {'phase', 'distance' of each goal in metres, 'ms' of one plan alone}."""
    def predict(z, push):
        return method.jump(z, push[:, None])
    distance = reached(goals, plan_pushes(predict, goals, largest))
    return {'phase': label, 'distance': distance.tolist(), 'ms': milliseconds(predict, goals, largest)}


# ---- memories to start from ------------------------------------------------------------------------------------------

def read_memory(path, checkpoint, clip, where):
    """
    What an earlier run put into its --memory_out: sizes, memory and CMS. clip: any one clip (z, a).

    Raises Refusal unless it fits the checkpoint.
    """
    start = read_sealed(path, where)
    try:
        if start['sizes'] != vars(checkpoint.predictor.sizes):
            raise Refusal(f'--memory_in={path}: the memory of another predictor than {checkpoint.path}')
        pairs = []
        if start['memory']:
            with torch.no_grad():
                _, memory = checkpoint.predictor(*clip)
            if len(start['memory']) > len(memory):
                raise ValueError('more memories than the predictor has')
            pairs += zip(start['memory'], memory)
        if start['cms']:
            for name, change in CMSWriter(checkpoint.predictor, 0.0).changes.items():
                pairs += [(start['cms']['changes'][name], change), (start['cms']['sums'][name], change)]
            if type(start['cms']['ticks']) is not int:
                raise ValueError('ticks is not a number')
        if not all(kept.shape == fresh.shape and kept.isfinite().all() for kept, fresh in pairs):
            raise ValueError('not finite, or of another shape')
    except MALFORMED as error:
        raise Refusal(f'--memory_in={path}: not what --memory_out wrote ({" ".join(str(error).split())[:200]})') from None
    return start


def keep_memory(path, checkpoints, rows, key):
    """Write the state of the last row that has a memory, for read_memory."""
    row = [row for row in rows if row['state']['memory'] is not None][-1]
    same = [c for c in checkpoints if (c.name, c.seed) == (row['model'], row['seed'])]
    predictor = same[0].predictor
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    write_sealed(path, {'sizes': vars(predictor.sizes), 'key': key, **row['state']})


# ---- the run ---------------------------------------------------------------------------------------------------------

def chosen_methods(text):
    """The methods that --methods names: '' → all but the controls, 'all' → all."""
    if text == 'all':
        return list(METHODS)
    return listed(text) or [name for name, method in METHODS.items() if not method.control]


def check_settings(knobs, table):
    """Raises Refusal for knobs that cannot be run with a table of methods {name: class}; nothing is read or written."""
    check_methods(table)
    if knobs.methods != 'all' and set(listed(knobs.methods)) - set(table):
        raise Refusal(f'--methods={knobs.methods}: allowed are {", ".join(table)}, or all')
    if not knobs.out:
        raise Refusal('--out=: must name a folder for the results')
    for name in ('memory_in', 'memory_out', 'plan'):
        if getattr(knobs, name) and knobs.streams > 1:
            raise Refusal(f'--{name}={getattr(knobs, name)}: goes with one stream; leave --streams={knobs.streams} out')
    if knobs.memory_out:
        results = [os.path.join(knobs.out, file) for file in FILES]
        for path in [*listed(knobs.ckpt), *listed(knobs.oracle), *listed(knobs.memory_in), *results]:
            if os.path.realpath(path) == os.path.realpath(knobs.memory_out):
                raise Refusal(f'--memory_out={knobs.memory_out}: is {path}, which this run needs; name another file')


def check_plans(knobs, plans):
    """Raises Refusal for a method that --methods names and that no row runs, or where none has a memory to keep."""
    plans = [(checkpoint, rows) for checkpoint, rows in plans if checkpoint.name != 'oracle']
    planned = {name for _, rows in plans for name, *_ in rows}
    asked = list(METHODS) if knobs.methods == 'all' else listed(knobs.methods)
    for name in asked:
        if name in planned:
            continue
        fits = any(METHODS[name].fits(checkpoint.predictor.sizes) for checkpoint, _ in plans)
        why = 'needs another domain, named by --tune_on' if fits else f'can adapt none of {knobs.ckpt}'
        if knobs.methods != 'all':
            raise Refusal(f'--methods={knobs.methods}: {name} {why}')
        print(f'left out: {name}, which {why}')
    for name, method in METHODS.items():
        if method.knob and getattr(knobs, method.knob) and name not in planned:
            raise Refusal(f'--{method.knob}={getattr(knobs, method.knob):g}: {name} is not among the methods of this run')
    if knobs.memory_out and not any('memory' in METHODS[name].carries for name in planned):
        raise Refusal(f'--memory_out={knobs.memory_out}: none of --methods={knobs.methods} of {knobs.ckpt} has a memory '
                      'to keep')


def write_results(folder, results, experiment, decoder, manifest):
    """Write tables and pictures → the names of the files that were written."""
    groups = grouped([results])
    table = format_table([results], groups)
    print('\n' + table)
    write_text(os.path.join(folder, 'table.txt'), table)
    write_text(os.path.join(folder, 'results.json'), results_json(results))
    write_text(os.path.join(folder, 'results.csv'), results_csv(results))
    write_text(os.path.join(folder, 'compare.csv'), compare_csv(groups))
    written = ['table.txt', 'results.json', 'results.csv', 'compare.csv']
    try:
        draw(os.path.join(folder, 'results.png'), [results], groups)
        draw(os.path.join(folder, 'results.pdf'), [results], groups)
        written += ['results.png', 'results.pdf']
        if decoder is not None:
            written += draw_shown(folder, results, groups, experiment, decoder, manifest)
    except ImportError:
        print(f'no pictures: pip install matplotlib, then python compare.py {folder} draws the stream')
    if decoder is None:
        print('no predictions.png: features that were imported without pictures cannot be turned back into pictures')
    return written


def draw_shown(folder, results, groups, experiment, decoder, manifest):
    """Draw the clips whose predictions were kept → the names of the files that were written."""
    def decode(z):
        """Features (m,k,N,D) → pictures (m,k,H,W,3)."""
        seen = pictures(z.cpu().float().flatten(0, 1), decoder, manifest['grid'], manifest['patch'])
        return seen.unflatten(0, z.shape[:2]).numpy()
    shown = shown_clips(results, groups, experiment.streams[0], decode)
    written = []
    if shown:
        draw_predictions(os.path.join(folder, 'predictions.png'), shown)
        written.append('predictions.png')
        if draw_animation(os.path.join(folder, 'switch.gif'), shown):
            written.append('switch.gif')
    return written


def prepared(knobs):
    """
    Read and check everything that a run needs, before its first minute of work → a namespace of it; nothing is written.

    Its `kept` is what an earlier run has left, see resume().
    """
    check_settings(knobs, METHODS)
    where = pick_device(knobs.device)
    checkpoints = read_checkpoints(knobs.ckpt, knobs.oracle, where, knobs.dtype)
    make_slide(knobs.data)
    manifest = read_manifest(knobs.data)
    phases = phases_of(knobs.phases, manifest['splits'])
    shifts = tuned_on(knobs.tune_on, phases, manifest['splits'])
    domains = [split_of(shift) for shift in shifts if shift != 'scaled']
    wanted = dict.fromkeys(['train', *map(split_of, phases), *domains])
    if shifts:
        wanted['val'] = None
    splits = open_splits(knobs.data, wanted, manifest)
    check_clips(checkpoints, splits, knobs.data)
    experiment = build_experiment(knobs, phases, shifts, splits, where)
    given = {name: getattr(knobs, method.knob) for name, method in METHODS.items() if method.knob}
    chosen = chosen_methods(knobs.methods)
    plans = []
    for checkpoint in checkpoints:
        plans.append((checkpoint, rows_of(checkpoint, chosen, given, bool(shifts), experiment.other)))
    check_plans(knobs, plans)
    after, simulated = planners(experiment, phases, splits['train'], where) if knobs.plan else ({}, None)
    resolved = {**vars(knobs), 'phases': ','.join(phases), 'tune_on': ','.join(shifts), 'device': where}
    files = {name: listed(getattr(knobs, name)) for name in ('ckpt', 'oracle', 'memory_in')}
    start = None
    if knobs.memory_in:
        start = read_memory(knobs.memory_in, checkpoints[0], experiment.streams[0][:1], where)
    key = run_key(resolved, files, manifest['checksum'])
    if knobs.memory_out:
        check_memory_out(knobs.memory_out, key)
    decoder = read_decoder(knobs.data, manifest)
    kept = resume(knobs.out, key, where)
    return SimpleNamespace(where=where, checkpoints=checkpoints, manifest=manifest, phases=phases, shifts=shifts,
                           splits=splits, experiment=experiment, plans=plans, after=after, simulated=simulated,
                           start=start, key=key, decoder=decoder, kept=kept)


def main(knobs):
    """Run every method of every checkpoint over the phases and write what comes out."""
    ready = prepared(knobs)
    if ready.kept is None:
        with open(os.path.join(knobs.out, 'table.txt'), encoding='utf-8') as f:
            print(f.read())
        print(f'nothing to do: {knobs.out} holds the results of this very run')
        return
    os.makedirs(knobs.out, exist_ok=True)
    claim(knobs.out, *(os.path.join(knobs.out, file) for file in FILES))
    phases, experiment, kept = ready.phases, ready.experiment, ready.kept
    tuning = f'tuned on {in_words(ready.shifts)}' if ready.shifts else 'not tuned'
    orders = f', in {knobs.streams} orders' if knobs.streams > 1 else ''
    print(f'phases {", ".join(phases)}, {knobs.clips} clips each{orders}; probes of {", ".join(experiment.probes)}; '
          f'rates {tuning}')
    if kept['finished']:
        print(f'going on after {len(kept["finished"])} finished rows')

    unfinished = os.path.join(knobs.out, 'unfinished.pt')
    first = ready.checkpoints[0]
    train = ready.splits['train']
    readout = None
    if train.physics and all(stream.has_positions for stream in experiment.streams):
        readout = fit_readout(train, ready.where)
    rows = guesses(experiment, first.targets, median_scene(train).to(ready.where), readout)
    rows += run_rows(ready.plans, experiment, kept, unfinished, ready.start, bool(knobs.memory_out), readout, ready.after)
    if knobs.memory_out:
        keep_memory(knobs.memory_out, ready.checkpoints, rows, ready.key)
    results = {
        'settings': vars(knobs),
        'key': ready.key,
        'phases': phases,
        'labels': labels_of(phases),
        'domains': experiment.domains,
        'clips': knobs.clips,
        'streams': knobs.streams,
        'loss': first.loss,
        'target_steps': (first.targets + 1).tolist(),
        'tuned_on': ready.shifts,
        'tuning': {name: {str(rate): loss for rate, loss in losses.items()} for name, losses in kept['tried'].items()},
        'beyond': further_than_training(train, experiment.streams),
        'probe_at': experiment.probe_at,
        'readout': None,
        'simulator': ready.simulated,
        'checkpoints': [{'name': c.name, 'seed': c.seed, 'path': c.path, 'steps': c.step} for c in ready.checkpoints],
        'rows': rows,
    }
    if readout:
        errors = {domain: readout_error(readout, *clips.source()) for domain, clips in experiment.probes.items()}
        results['readout'] = errors
    add_figures(results)
    written = write_results(knobs.out, results, experiment, ready.decoder, ready.manifest)
    if os.path.exists(unfinished):
        os.unlink(unfinished)
    print(f'results: {os.path.join(knobs.out, written[0])}, {", ".join(written[1:])}')


if __name__ == '__main__':
    keep_freed_memory()
    main(SimpleNamespace(**settings))
