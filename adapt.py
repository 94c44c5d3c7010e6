"""
A→B→A: how a trained predictor adapts when the physics changes, and what it forgets.

    python adapt.py --ckpt=out/hope.pt                     every method that this checkpoint can do
    python adapt.py --ckpt=out/hope.pt,out/vit.pt          compared in one table
    python adapt.py --ckpt=out/hope.pt --methods=all       with the controls that could refute the result
    python adapt.py --ckpt=out/hope.pt --phases=A,B,A,B    any other stream of worlds
    python adapt.py --ckpt=out/hope.pt --plan              and how well pushes are chosen with what is learned
    python adapt.py config/report.py                       five seeds, twenty orders of the clips, intervals

The stream: clips of one world after the other, one at a time; nobody tells the model where a phase ends.
Every clip is predicted and scored from its first step and action alone; only then is it shown, and the
method may learn from it. Learning rates are tuned on other shifts, never on those of the stream, with as
many trials for every method. Each row of the table is a file in `out`; the same command, given again, runs
what is missing.
"""
import functools
import json
import multiprocessing
import os
import time
import zlib
from collections import Counter, namedtuple
from concurrent.futures import ProcessPoolExecutor, as_completed

import numpy as np
import torch
from tqdm import tqdm

from configurator import configure, listed, refuse
from data import Clips, folder_of, has_split, make_slide, read_meta
from hope import load
from methods import METHODS
from model import feature_loss
from support import planning
from support.files import autocast, pick_device, write_atomically

# what to run
ckpt = 'out/hope.pt'     # checkpoint, or several separated by commas; several of a kind are seeds
oracle = ''              # checkpoint fine-tuned on other clips of the shift: the bound; one, or one a seed
data = 'slide'           # the data set whose splits make the stream
phases = 'auto'          # worlds of the stream: A,B,A or A,B,A,B or val,B,A2; auto = what is there
clips = 200              # clips per phase; fewer where there are fewer, as for the two options below [1..]
tune_clips = 25          # clips per phase of the streams on which learning rates are tuned [1..]
probe_clips = 200        # clips of the held-out probe set of each world, and goals of --plan [1..]
probe_every = 100        # clips of the stream between two probes [1..]
streams = 1              # orders of the clips; with several, intervals are over them, too [1..]
plan = False             # at the end of every phase, choose pushes that bring objects to goals
# the methods and their learning rates
methods = ''             # as they are called in the table, separated by commas; '' = no controls, or all
rates = ''               # learning rates that are given instead of tuned: LN-TTA=0.003,CMS=10
tune_on = 'C'            # domains X of tuning streams A→X→A; without one, rates are the defaults
# where
out = 'out/aba'          # folder for the results
processes = 0            # rows run side by side; 0 = one per core, on a GPU 1 [0..]
device = 'auto'          # auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps or cpu
dtype = 'auto'           # auto = bfloat16 where device and model gain by it [auto | float32 | bfloat16]
config = configure(globals()) if __name__ == '__main__' else {}

# LN-TTA's learning rate in V-JEPA 2 experiments before these: a row of its own, never tuned.
PLAN_RATE = 1e-4
MODELS = {'vit': 'ViT-AC', 'hope': 'HOPE'}

# targets (K,): target steps of its jumps, 0-based; precision: see support.files.autocast; about: its file.
Checkpoint = namedtuple('Checkpoint', 'path name seed predictor loss targets precision about')


def read_checkpoint(path, name, seed, config):
    """The Checkpoint in a file, called by its model where it has no other name."""
    predictor, about = load(path, config['device'])
    steps = about['clip_steps']
    targets = torch.arange(steps - about['jump_last'], steps, device=config['device'])
    precision = autocast(config['device'], config['dtype'], predictor.sizes.width)
    name = name or MODELS[predictor.sizes.model]
    return Checkpoint(path, name, seed, predictor, about['loss'], targets, precision, about)


def read_checkpoints(config):
    """Those of --ckpt and --oracle. Refuses what cannot be compared, or was trained on other data."""
    named = [(path, '') for path in listed(config['ckpt'])]
    named += [(path, 'oracle') for path in listed(config['oracle'])]
    found, seeds = [], Counter()
    for path, name in named:
        if named.count((path, name)) > 1:
            refuse(f'{path} is named twice; several checkpoints of a kind are seeds')
        checkpoint = read_checkpoint(path, name, 0, config)
        seeds[checkpoint.name] += 1
        found.append(checkpoint._replace(seed=seeds[checkpoint.name]))
    make_slide(config['data'])
    here = read_meta(config['data'])['config']
    for checkpoint in found:
        path, there = checkpoint.path, checkpoint.about['data']
        # How many clips there are, and which of them, makes no other world and no other features.
        for key in sorted({*here, *there} - {'clips', 'test_clips', 'split', 'seed', 'zoom'}):
            if here.get(key) != there.get(key):
                refuse(f'{path} was trained on data with {key} = {there.get(key)}, and {config["data"]} has '
                       f'{here.get(key)}; name the data set of the checkpoint with --data')
        if not torch.equal(checkpoint.targets, found[0].targets):
            refuse(f'{path} and {found[0].path} have other target steps, so their losses cannot be compared')
    return found


# ---- which clips are streamed, tuned on and probed: a clip is (split, index)
# -----------------------------------

def domain_of(phase):
    """The world of a phase: its name without a number behind it (A2 is A); val is of A."""
    return 'A' if phase == 'val' else phase.rstrip('0123456789') or phase


def split_of(phase):
    """The split with the clips of a phase, or of a shift that is tuned on."""
    return 'val' if phase == 'val' else f'test_{phase}'


def labels_of(phases):
    """How the phases are called: ['A', 'B', 'A'] → ['A₁', 'B', 'A₂']; names that come once stay."""
    labels = []
    for i, phase in enumerate(phases):
        visit = '₁₂₃₄₅₆₇₈₉'[phases[:i].count(phase)]
        labels.append(phase + visit if phases.count(phase) > 1 else phase)
    return labels


def resolved(config):
    """The config with phases and tune_on as lists, as the data set has them."""
    phases = listed(config['phases'])
    if phases == ['auto']:
        phases = ['A', 'B', 'A'] if has_split(config['data'], 'test_A') else ['val', 'B', 'A2']
    shifts = listed(config['tune_on'])
    if shifts == ['C'] and ('C' in phases or not has_split(config['data'], 'test_C')):
        print('no other shift to tune on (--tune_on): learning rates are the defaults')
        shifts = []
    if {'A', 'B', 'val', *phases} & set(shifts):
        refuse(f'--tune_on={config["tune_on"]}: rates tuned on a domain under test prove nothing')
    return {**config, 'phases': phases, 'tune_on': shifts}


class Experiment:
    """
    What every method goes through, of a resolved config. No clip serves twice.

    domains, labels: of each phase. shift: the first domain away from home. clips, probe_clips, tune_clips:
    how many there are. streams: the clips of all phases, in each order. tuning: streams A→X→A. other: clips
    of the first X. probes: {domain: clips}. probe_at: after how many clips they are scored. shown: which
    clips of the first stream are drawn.
    """

    def __init__(self, config):
        self.config = config
        phases, shifts = config['phases'], [split_of(shift) for shift in config['tune_on']]
        self.labels = labels_of(phases)
        self.domains = [domain_of(phase) for phase in phases]
        away = next((i for i, domain in enumerate(self.domains) if domain != self.domains[0]), 0)
        self.shift = self.domains[away]
        streamed = [split_of(phase) for phase in phases]
        self.splits = {split: Clips(config['data'], split) for split in {'train', 'val', *streamed, *shifts}}
        probed = {domain_of(phase): split_of(phase) for phase in phases}
        self.count(streamed, shifts, probed)
        taken = Counter()

        def take(split, count):
            """The next clips of a split."""
            taken[split] += count
            return [(split, i) for i in range(taken[split] - count, taken[split])]
        n, few = self.clips, self.tune_clips
        self.streams = [sum((take(split, n) for split in streamed), [])]
        used = Counter(taken)
        home = take('val', 2 * few) if shifts else []
        self.probes = {domain: take(split, self.probe_clips) for domain, split in probed.items()}
        for number in range(2, config['streams'] + 1):
            self.streams.append(self.draw(number, streamed, used, taken))
        others = [[(split, i) for i in range(len(self.splits[split]))] for split in shifts]
        self.tuning = [home[:few] + other[:2 * few] + home[few:] for other in others]
        self.other = others[0][:25] if others else []
        # Before the stream and at the end of each phase, too.
        seen = range(n * len(phases) + 1)
        self.probe_at = [i for i in seen if i % config['probe_every'] == 0 or i % n == 0]
        # The first and the last clips of the first shift, and two from before it.
        begin = n * away
        shown = {*range(begin - 2, begin + min(12, n)), *range(begin + n - 5, begin + n)}
        drawable = os.path.exists(os.path.join(folder_of(config['data']), 'decoder.npy'))
        self.shown = sorted(i for i in shown if i >= 0 and drawable)
        self.known = all('position' in split.physics for split in self.splits.values())

    def count(self, streamed, shifts, probed):
        """
        How many clips there are for each phase, tuning and probes: as many as are asked for, if all fit.
        """
        name, counts = self.config['data'], {}
        for option in 'clips', 'probe_clips', 'tune_clips':
            counts[option] = self.config[option]
        uses = [(split, 'clips') for split in streamed] + [(split, 'probe_clips') for split in probed.values()]
        uses += 2 * bool(shifts) * [('val', 'tune_clips')]
        for split, clips in self.splits.items():
            options = [option for other, option in uses if other == split]
            # Where there are too few, the largest number is lowered.
            while sum(counts[option] for option in options) > len(clips):
                counts[max(options, key=counts.get)] -= 1
        for option, count in counts.items():
            if not count:
                refuse(f'data set {name} has too few clips for stream, tuning and probes')
            if count < self.config[option]:
                print(f'{option} = {count}: data set {name} has no more')
        self.clips, self.probe_clips, self.tune_clips = counts.values()

    def draw(self, number, streamed, used, taken):
        """
        Stream `number` (2, 3, ...), drawn from the clips of the first one and those that nothing else
        takes.
        """
        orders = {}
        for split in streamed:
            pool = [*range(used[split]), *range(taken[split], len(self.splits[split]))]
            random = np.random.default_rng([number, zlib.crc32(split.encode())])
            orders[split] = iter(random.permutation(pool).tolist())
        return [(split, next(orders[split])) for split in streamed for _ in range(self.clips)]

    def read(self, clips):
        """Clips [(split, index)] → z (n,T,N,D), a (n,T,A) on the device."""
        pairs = [self.splits[split][index] for split, index in clips]
        return tuple(torch.stack(parts).to(self.config['device']) for parts in zip(*pairs))

    def positions(self, clips):
        """Where the objects of clips are at each step, (n,T,2) metres on the device."""
        found = [planning.positions(self.splits[split], [index]) for split, index in clips]
        return torch.cat(found).to(self.config['device'])

    @functools.cached_property
    def readout(self):
        """What reads the object's position from features, or None where positions are not known."""
        return planning.fit_readout(self.splits['train'], self.config['device']) if self.known else None

    @functools.cached_property
    def goals(self):
        """With --plan, {clips seen by the end of a phase: (its label, the goals there, the largest push)}."""
        largest = float(np.linalg.norm(self.splits['train'].actions[:, 0], axis=-1).max())
        goals = {}
        for i, domain in enumerate(self.domains if self.config['plan'] else [], 1):
            split, indices = self.probes[domain][0][0], [index for _, index in self.probes[domain]]
            made = planning.make_goals(self.splits[split], domain, indices, self.config['device'])
            goals[i * self.clips] = self.labels[i - 1], made, largest
        return goals


@functools.cache
def experiment_of(config):
    """The Experiment of a resolved config, as JSON text; every process makes it once."""
    return Experiment(json.loads(config))


# ---- the stream
# ------------------------------------------------------------------------------------------------

def run_stream(method, streams, experiment, measured=True):
    """
    Run one method over the clips of S streams at once, test-then-train: predict, score, look back, note.

    method: for S streams, of a class of METHODS. Returns a dict: loss S x n, seconds per clip and stream (n),
    diagnostics [{name: number} per clip]; if measured also metres S x n, probes {domain: S x len(probe_at)},
    planning, predicted (K,N,D) of the clips to be shown.
    """
    notes = {name: [] for name in ('loss', 'metres', 'seconds', 'diagnostics', 'planning', 'predicted')}
    notes['probes'] = {domain: [] for domain in experiment.probes}
    quiet = bool(multiprocessing.parent_process()) or None
    for i, clips in enumerate(tqdm(list(zip(*streams)), type(method).__name__, leave=False, disable=quiet)):
        if measured:
            measure(method, experiment, i, notes)
        z, a = experiment.read(clips)
        started = time.perf_counter()
        # Left after each clip: within, bfloat16 copies of weights are kept, and hide what has been learned.
        with method.precision:
            z_hat = method.predict(z[:, None], a[:, None])[:, 0]
            loss = feature_loss(z_hat, z[:, method.targets])
            # The clips have been scored. Only now are they shown.
            method.look_back(z, a)
        # Copied to the CPU, which waits for a GPU.
        z_hat, loss = z_hat.detach().float(), loss.detach().float()
        notes['loss'].append(loss.tolist())
        notes['seconds'].append((time.perf_counter() - started) / len(streams))
        # Relative to predicting step 1 again: what was not foreseen.
        surprise = loss / feature_loss(z[:, :1], z[:, method.targets]).clamp(min=1e-12)
        notes['diagnostics'].append({'surprise': surprise.mean().item(), **method.diagnostics()})
        if measured and experiment.readout:
            off = experiment.readout(z_hat) - experiment.positions(clips)[:, method.targets]
            notes['metres'].append(off.norm(dim=-1).mean(1).tolist())
        if measured and i in experiment.shown:
            notes['predicted'].append(z_hat[0].half().cpu().numpy())
    if measured:
        measure(method, experiment, len(streams[0]), notes)
    # One list for each stream.
    for name in 'loss', 'metres':
        notes[name] = np.transpose(notes[name]).tolist()
    notes['probes'] = {domain: np.transpose(losses).tolist() for domain, losses in notes['probes'].items()}
    return notes


def measure(method, experiment, seen, notes):
    """Score the probes, and plan, where that is due after so many clips."""
    if seen in experiment.probe_at:
        for domain, clips in experiment.probes.items():
            notes['probes'][domain].append(score(method, experiment, clips))
    if seen in experiment.goals:
        label, goals, largest = experiment.goals[seen]
        distance, ms = planning.plan(method.jump, goals, largest)
        notes['planning'].append({'phase': label, 'distance': distance.tolist(), 'ms': ms})


@torch.no_grad()
def score(method, experiment, clips, at_once=16):
    """The mean loss of a probe set in each stream, a list (S)."""
    S = method.streams
    losses = []
    for first in range(0, len(clips), at_once):
        z, a = experiment.read(clips[first:first + at_once])
        with method.precision:
            z_hat = method.predict(z.expand(S, *z.shape), a.expand(S, *a.shape))
            wanted = z[:, method.targets].expand(z_hat.shape)
            loss = feature_loss(z_hat.flatten(0, 1), wanted.flatten(0, 1))
        losses.append(loss.float().unflatten(0, (S, -1)))
    return torch.cat(losses, 1).mean(1).tolist()


# ---- rows
# ------------------------------------------------------------------------------------------------------

def row_of(checkpoint, method, rate=None, rate_from=''):
    """What is known of a row of the table before it is run."""
    model = checkpoint.name and f'{checkpoint.name} {checkpoint.seed}'
    file = '_'.join(filter(None, [model, method, rate_from])).replace(' ', '_')
    return {'file': file, 'path': checkpoint.path, 'model': checkpoint.name, 'seed': checkpoint.seed,
            'method': method, 'rate': rate, 'rate_from': rate_from}


def rows_of(checkpoint, config):
    """
    The rows of a checkpoint in the order of the table. Where their rates are from: '' (the method has
    none), 'given', 'tuned' (it is None until then), 'default' or 'plan'.
    """
    if checkpoint.name == 'oracle':
        return [row_of(checkpoint, 'frozen')]
    sizes = checkpoint.predictor.sizes
    given = dict(item.split('=') for item in listed(config['rates']))
    asked = listed(config['methods'])
    rows = []
    for name, method in METHODS.items():
        wanted = name in asked or asked == ['all'] or not asked and not method.control
        if not wanted or not method.fits(sizes) or method.needs_other and not config['tune_on']:
            continue
        if not method.rates:
            rows.append(row_of(checkpoint, name))
        elif name in given:
            rows.append(row_of(checkpoint, name, float(given[name]), 'given'))
        elif config['tune_on']:
            rows.append(row_of(checkpoint, name, None, 'tuned'))
        else:
            rows.append(row_of(checkpoint, name, method.default[sizes.model], 'default'))
        if name == 'LN-TTA' and sizes.model == 'vit':
            rows.append(row_of(checkpoint, name, PLAN_RATE, 'plan'))
    return rows


def run_streams(row, checkpoint, experiment, streams, measured=True):
    """All streams of a row, as one batch or one after the other → as run_stream; times are of the first."""
    method = METHODS[row['method']]
    parts = []
    for some in [streams] if method.batched else [[stream] for stream in streams]:
        adapted = method(checkpoint, row['rate'], experiment, len(some))
        parts.append(run_stream(adapted, some, experiment, measured))
    whole = parts[0]
    for part in parts[1:]:
        whole['loss'] += part['loss']
        whole['metres'] += part['metres']
        for domain, losses in part['probes'].items():
            whole['probes'][domain] += losses
    return whole


def run_row(config, row):
    """Tune one row of the table, run it on all streams, write its file. config: resolved, as JSON text."""
    experiment = experiment_of(config)
    checkpoint = read_checkpoint(row['path'], row['model'], row['seed'], experiment.config)
    tried = {}
    for rate in METHODS[row['method']].rates if row['rate_from'] == 'tuned' else ():
        trial = run_streams({**row, 'rate': rate}, checkpoint, experiment, experiment.tuning, measured=False)
        tried[rate] = float(np.nan_to_num(np.mean(trial['loss']), nan=np.inf))
    if tried:
        row = {**row, 'rate': min(tried, key=tried.get)}
    found = run_streams(row, checkpoint, experiment, experiment.streams)
    predicted = found.pop('predicted')
    if not row['model']:
        # What predicts without a model learns nothing, and where the scene is blank there is no object.
        found['probes'] = found['planning'] = predicted = {}
        found['metres'] *= row['method'] != 'blank'
    path = os.path.join(experiment.config['out'], row['file'])
    if predicted:
        arrays = {'numbers': experiment.shown, 'predicted': np.stack(predicted)}
        write_atomically(f'{path}.npz', lambda f: np.savez_compressed(f, **arrays))
    for name in 'metres', 'planning':
        found[name] = found[name] or None
    write_json(f'{path}.json', {**row, 'tried': tried or None, **found})


def run_rows(config, rows):
    """Run the rows that have no file yet, side by side in processes."""
    rows = [row for row in rows if not os.path.exists(os.path.join(config['out'], f'{row["file"]}.json'))]
    processes = config['processes'] or (os.cpu_count() if config['device'] == 'cpu' else 1)
    text = json.dumps(config)
    if processes == 1:
        for row in tqdm(rows, 'rows', disable=None):
            run_row(text, row)
        return
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        running = [pool.submit(run_row, text, row) for row in rows]
        for done in tqdm(as_completed(running), 'rows', len(rows), disable=None):
            done.result()


def write_json(path, content):
    """Write a JSON file, all of it or nothing."""
    write_atomically(path, lambda f: f.write(json.dumps(content, indent=1).encode()))


def describe(experiment, checkpoints, rows):
    """What run.json says."""
    about = {name: getattr(experiment, name) for name in ('config', 'labels', 'domains', 'clips', 'probe_at')}
    about |= {
        'phases': experiment.config['phases'],
        'streams': len(experiment.streams),
        'tuned_on': experiment.config['tune_on'],
        'shown': [experiment.streams[0][i] for i in experiment.shown],
        'loss': ' and '.join(sorted({checkpoint.loss for checkpoint in checkpoints})),
        'target_steps': (checkpoints[0].targets + 1).tolist(),
        'rows': [f'{row["file"]}.json' for row in rows],
        'simulator': [],
    }
    for label, goals, largest in experiment.goals.values():
        distance = planning.reached(goals, planning.plan_with_simulator(goals, largest))
        about['simulator'].append({'phase': label, 'distance': distance.tolist(), 'ms': None})
    return about


def refuse_another(path, config):
    """Refuses a run.json of another command, naming the first option that differs. Methods may be added."""
    if not os.path.exists(path):
        return
    with open(path, encoding='utf-8') as f:
        there = json.load(f)['config']
    for key, value in json.loads(json.dumps(config)).items():
        if key not in ('methods', 'processes', 'out') and there.get(key) != value:
            refuse(f'{path} is of another run: {key} = {there.get(key)}, not {value}; name another --out')


def main(config):
    """Run every method of every checkpoint over the phases, and have report.py write what comes out."""
    assert not config['plan'] or config['streams'] == 1, '--plan goes with one stream; leave --streams out'
    config = {**config, 'device': pick_device(config['device'])}
    checkpoints = read_checkpoints(config)
    config = resolved(config)
    nobody = checkpoints[0]._replace(name='')
    rows = [row_of(nobody, 'copy'), row_of(nobody, 'blank')]
    for checkpoint in checkpoints:
        rows += rows_of(checkpoint, config)
    unknown = {*listed(config['methods'])} - {'all', *(row['method'] for row in rows)}
    given = {item.split('=')[0] for item in listed(config['rates'])}
    for name in sorted(unknown | given - {row['method'] for row in rows if row['rate_from'] == 'given'}):
        refuse(f'{name} is no method, or can adapt none of {config["ckpt"]}; there are {", ".join(METHODS)}')
    config['checkpoints'] = [[c.path, c.about['step'], c.about['best']] for c in checkpoints]
    run = os.path.join(config['out'], 'run.json')
    refuse_another(run, config)
    write_json(run, describe(experiment_of(json.dumps(config)), checkpoints, rows))
    run_rows(config, rows)
    # Not by the processes of rows, which need no pandas and no matplotlib.
    import report
    report.write([config['out']], config['out'])


if __name__ == '__main__':
    main(config)
