"""A→B→A: how a trained predictor adapts when the physics changes, and what it forgets.

    python adapt.py --ckpt=out/hope.pt                     every method that this checkpoint can do
    python adapt.py --ckpt=out/hope.pt,out/vit.pt          compared in one table
    python adapt.py --ckpt=out/hope.pt --methods=all       with the controls that could refute the result
    python adapt.py --ckpt=out/hope.pt --phases=A,B,A,B    any other stream of worlds
    python adapt.py --ckpt=out/hope.pt --plan              and how well pushes are chosen with what is learned
    python adapt.py config/report.py                       five seeds, five orders, with intervals

Nobody tells the model where a phase ends. Each clip is predicted and scored from its first step and action
alone; only then is it shown, and the method may learn from it. Each row of the table is a file in `out`; the
same command, given again, runs what is missing."""
import copy
import functools
import json
import multiprocessing
import time
from collections import Counter, namedtuple
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

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
methods = ''             # by commas, as in the table, with its model or for all; '' = no controls, or all
rates = ''               # learning rates that are given instead of tuned: LN-TTA=0.003,CMS=10
tune_on = 'C'            # domain X of the tuning stream A→X→A; without one, rates are the defaults
out = 'out/aba'          # folder for the results
processes = 0            # rows run side by side; 0 = one per core, on a GPU 1 [0..]
device = 'auto'          # auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps or cpu
dtype = 'auto'           # auto = bfloat16 where device and model gain by it [auto | float32 | bfloat16]
config = configure(globals()) if __name__ == '__main__' else {}

# By model, and whether it has a world head.
MODELS = {('vit', False): 'ViT-AC', ('vit', True): 'ViT-AC + head',
          ('hope', False): 'HOPE - head', ('hope', True): 'HOPE'}
# targets (K,): target steps of its jumps, 0-based; precision: see support.files.autocast; about: its file.
Checkpoint = namedtuple('Checkpoint', 'path name seed predictor loss targets precision about')


def read_checkpoint(path, config):
    """The Checkpoint in a file."""
    predictor, about = load(path, config['device'])
    sizes = predictor.sizes
    name = MODELS[sizes.model, sizes.world] + ' rollout' * (about['loss'] == 'rollout')
    name = 'oracle' if path in listed(config['oracle']) else name
    steps = about['clip_steps']
    targets = torch.arange(steps - about['jump_last'], steps, device=config['device'])
    precision = autocast(config['device'], config['dtype'], sizes.width)
    return Checkpoint(path, name, 1, predictor, about['loss'], targets, precision, about)


def read_checkpoints(config):
    """Those of --ckpt and --oracle. Refuses what cannot be compared, or was trained on other data."""
    found = []
    for path in listed(config['ckpt']) + listed(config['oracle']):
        checkpoint = read_checkpoint(path, config)
        seed = 1 + sum(other.name == checkpoint.name for other in found)
        found.append(checkpoint._replace(seed=seed))
    make_slide(config['data'])
    here = read_meta(config['data'])['config']
    for checkpoint in found:
        path, there = checkpoint.path, checkpoint.about['data']
        # How many clips there are, and which of them, makes no other features.
        for key in 'source', 'size', 'encoder', 'dim', 'encode':
            if here[key] != there[key]:
                refuse(f'{path} was trained on data with {key} = {there[key]}, not {here[key]}: '
                       f'name the data set of the checkpoint with --data')
        if not torch.equal(checkpoint.targets, found[0].targets):
            refuse(f'{path} and {found[0].path} have other target steps: their losses cannot be compared')
    return found


# ---- which clips are streamed, tuned on and probed: a clip is (split, index) -------------------------------

def domain_of(phase):
    """The world of a phase: its name without a number behind it (A2 is A); val is of A."""
    return 'A' if phase == 'val' else phase.rstrip('0123456789') or phase


def split_of(phase):
    """The split with the clips of a phase, or of a shift that is tuned on."""
    return 'val' if phase == 'val' else f'test_{phase}'


def labels_of(phases):
    """How the phases are called: ['A', 'B', 'A'] → ['A₁', 'B', 'A₂']; names that come once stay."""
    numbers = ['₁₂₃₄₅₆₇₈₉'[phases[:i].count(phase)] for i, phase in enumerate(phases)]
    return [phase + number * (phases.count(phase) > 1) for phase, number in zip(phases, numbers)]


def resolved(config):
    """The config with its lists as lists, and with phases and a shift to tune on that the data set has."""
    phases, shift = listed(config['phases']), config['tune_on']
    if phases == ['auto']:
        phases = ['A', 'B', 'A'] if has_split(config['data'], 'test_A') else ['val', 'B', 'A2']
    if shift == 'C' and ('C' in phases or not has_split(config['data'], 'test_C')):
        print('no other shift to tune on (--tune_on): learning rates are the defaults')
        shift = ''
    if shift in ('A', 'B', 'val', *phases):
        refuse(f'--tune_on={shift}: rates tuned on a domain under test prove nothing')
    methods, rates = listed(config['methods']), dict(item.split('=') for item in listed(config['rates']))
    return {**config, 'phases': phases, 'tune_on': shift, 'methods': methods, 'rates': rates}


class Experiment:
    """What every method goes through, of a resolved config. No clip serves twice.

    streams: clips (split, index) of all phases, in each order. tuning: the stream A→X→A; other: its X.
    probes: {domain: (split, indices)}, scored after probe_at clips. shown: the numbers of clips to be drawn.
    goals, with --plan: {clips seen by the end of a phase: (its label, planning.Goals)}, pushes up to largest.
    """

    def __init__(self, config):
        self.config = config
        phases = config['phases']
        shifts = [split_of(config['tune_on'])] if config['tune_on'] else []
        self.labels = labels_of(phases)
        self.domains = [domain_of(phase) for phase in phases]
        streamed = [split_of(phase) for phase in phases]
        probed = dict(zip(self.domains, streamed))
        self.splits = {split: Clips(config['data'], split) for split in ['train', 'val', *streamed, *shifts]}
        tuned = ['val', 'val', *shifts, *shifts] if shifts else []
        uses = {'clips': streamed, 'probe_clips': [*probed.values()], 'tune_clips': tuned}
        asked = {option: config[option] for option in uses}

        def share(counts):
            """What the scarcest split has of what is needed of it, at most all."""
            needed = Counter(split for option in uses for split in counts[option] * uses[option])
            return min(1, *(len(self.splits[split]) / count for split, count in needed.items()))
        # As many clips as asked for, or if a split has too few, the same share of each.
        counts = {option: max(1, int(share(asked) * count)) for option, count in asked.items()}
        if share(counts) < 1:
            refuse(f'data set {config["data"]} has too few clips for stream, tuning and probes')
        if counts != asked:
            print(f'data set {config["data"]} has no more clips: {counts}')
        self.clips, self.probe_clips, few = counts.values()
        n = self.clips
        # Probes and tuning take the first clips of a split; streams take others, each in an order of its own.
        free = {split: [*range(len(clips))] for split, clips in self.splits.items()}
        self.probes = {domain: (split, [free[split].pop(0) for _ in range(self.probe_clips)])
                       for domain, split in probed.items()}
        self.other = [(split, i) for split in shifts for i in range(2 * few)]
        home = [('val', free['val'].pop(0)) for _ in self.other]
        self.tuning = home[:few] + self.other + home[few:]
        self.streams = []
        for number in range(config['streams']):
            random = np.random.default_rng(number)
            orders = {split: iter(random.permutation(free[split]) if number else free[split])
                      for split in dict.fromkeys(streamed)}
            self.streams.append([(split, int(next(orders[split]))) for split in streamed for _ in range(n)])
        end = n * len(phases)
        self.probe_at = sorted({*range(0, end, config['probe_every']), *range(0, end + 1, n)})
        self.largest = float(np.linalg.norm(self.splits['train'].actions[:, 0], axis=-1).max())
        self.goals = {}
        for i, domain in enumerate(self.domains if config['plan'] else []):
            split, indices = self.probes[domain]
            goals = planning.make_goals(self.splits[split], domain, indices, config['device'])
            self.goals[(i + 1) * n] = self.labels[i], goals
        # The last two clips of the first phase, and the first nine of the second.
        drawable = Path(folder_of(config['data']), 'decoder.npy').exists()
        self.shown = [*range(end)][max(0, n - 2):n + min(n, 9)] if drawable else []

    def bare(self, readout=None):
        """The same without probes, goals and clips to be drawn."""
        bare = copy.copy(self)
        vars(bare).update(probes={}, goals={}, shown=[], readout=readout)
        return bare

    def read(self, split, indices):
        """Clips → z (n,T,N,D), a (n,T,A) on the device."""
        z, a = self.splits[split][indices]
        return z.to(self.config['device']), a.to(self.config['device'])

    @functools.cached_property
    def readout(self):
        """What reads the object's position from features, or None where positions are not known."""
        if all('position' in split.physics for split in self.splits.values()):
            return planning.fit_readout(self.splits['train'], self.config['device'])


# Every process makes the Experiment of a resolved config, as JSON text, once.
experiment_of = functools.cache(lambda config: Experiment(json.loads(config)))


# ---- the stream --------------------------------------------------------------------------------------------

def run_stream(method, streams):
    """Run a method over S streams at once, of the same phases, test-then-train: predict, score, look back.

    Returns loss and metres (S values of each clip), seconds, diagnostics, and what the Experiment asks for:
    probes {domain: S losses each time}, planning and predicted (K,N,D) of the first stream."""
    experiment = method.experiment
    notes = {name: [] for name in ('loss', 'metres', 'seconds', 'diagnostics', 'planning', 'predicted')}
    notes['probes'] = {domain: [] for domain in experiment.probes}
    for i, clips in enumerate([*zip(*streams), None]):
        if i in experiment.probe_at:
            for domain, probes in experiment.probes.items():
                notes['probes'][domain].append(method.score(*probes))
        if i in experiment.goals:
            label, goals = experiment.goals[i]
            distance, ms = planning.plan(method.jump, goals, experiment.largest)
            notes['planning'].append({'phase': label, 'distance': distance.tolist(), 'ms': ms})
        if clips is None:
            return notes
        split, indices = clips[0][0], [index for _, index in clips]
        z, a = experiment.read(split, indices)
        started = time.perf_counter()
        # Left after each clip: within, bfloat16 copies of weights are kept, and hide what has been learned.
        with method.precision:
            z_hat = method.predict(z, a)
            loss = feature_loss(z_hat, z[:, method.targets])
            # The clips have been scored. Only now are they shown.
            method.look_back(z, a)
        notes['loss'].append(loss.tolist())     # waits for a GPU
        notes['seconds'].append((time.perf_counter() - started) / len(clips))
        notes['diagnostics'].append(method.diagnostics())
        z_hat = z_hat.detach().float()
        if experiment.readout:
            there = planning.positions(experiment.splits[split], indices).to(z.device)
            off = experiment.readout(z_hat) - there[:, method.targets]
            notes['metres'].append(off.norm(dim=-1).mean(1).tolist())
        if i in experiment.shown:
            notes['predicted'].append(z_hat[0].half().cpu().numpy())


# ---- rows --------------------------------------------------------------------------------------------------

def row_of(checkpoint, method, rate=None, rate_from=''):
    """What is known of a row of the table before it is run."""
    model = checkpoint.name and f'{checkpoint.name} {checkpoint.seed}'
    file = '_'.join(filter(None, [model, method, rate_from])).replace(' ', '_')
    return {'file': file, 'path': checkpoint.path, 'model': checkpoint.name, 'seed': checkpoint.seed,
            'method': method, 'rate': rate, 'rate_from': rate_from}


def rows_of(checkpoint, config):
    """The rows of a checkpoint. Where rates are from: '' (there is none), given, tuned or default."""
    if checkpoint.name == 'oracle':
        return [row_of(checkpoint, 'frozen')]
    sizes = checkpoint.predictor.sizes
    given, asked = config['rates'], config['methods']
    usual = 'tuned' if config['tune_on'] else 'default'
    rows = []
    for name, method in METHODS.items():
        named = name in asked or f'{checkpoint.name} {name}' in asked
        wanted = named or asked == ['all'] or not asked and not method.control
        # The wrong world is the first that is tuned on.
        possible = method.fits(sizes) and (name != 'wrong world' or config['tune_on'])
        if not wanted or not possible:
            continue
        choice = (method.default[sizes.model], usual) if method.rates else ()
        if method.rates and name in given:
            choice = float(given[name]), 'given'
        rows.append(row_of(checkpoint, name, *choice))
    return rows


def run_row(config, row):
    """Tune one row of the table, run it on all streams, write its file. config: resolved, as JSON text."""
    experiment = experiment_of(config)
    checkpoint = read_checkpoint(row['path'], experiment.config)
    method = METHODS[row['method']]
    row['tried'] = tried = {}
    if row['rate_from'] == 'tuned':
        bare = experiment.bare()
        for rate in method.rates:
            loss = run_stream(method(checkpoint, rate, bare), [bare.tuning])['loss']
            tried[rate] = float(np.nan_to_num(np.mean(loss), nan=np.inf))
        row['rate'] = min(tried, key=tried.get)
    if not row['model']:
        # Without a model nothing is learned, and where the scene is blank there is no object.
        experiment = experiment.bare(experiment.readout if row['method'] == 'copy' else None)
    found = []
    for streams in [experiment.streams] if method.batched else [[stream] for stream in experiment.streams]:
        adapted = method(checkpoint, row['rate'], experiment, len(streams))
        found.append(run_stream(adapted, streams))

    def together(values):    # lists (clips, streams) → a list for each stream, or None
        return np.hstack(values).T.tolist() or None
    # Times, diagnostics, plans and predictions are those of the first.
    row |= found[0]
    for name in 'loss', 'metres':
        row[name] = together([notes[name] for notes in found])
    for domain in experiment.probes:
        row['probes'][domain] = together([notes['probes'][domain] for notes in found])
    path = Path(experiment.config['out'], row['file'])
    predicted = row.pop('predicted')
    if predicted:
        arrays = {'numbers': experiment.shown, 'predicted': np.stack(predicted)}
        write_atomically(f'{path}.npz', lambda f: np.savez_compressed(f, **arrays))
    write_atomically(f'{path}.json', lambda f: f.write(json.dumps(row, indent=1).encode()))


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
    names = {name for row in rows for name in (row['method'], f'{row["model"]} {row["method"]}')}
    unknown = {*config['methods']} - names - {'all'}
    unused = {*config['rates']} - {row['method'] for row in rows if row['rate_from'] == 'given'}
    for name in sorted(unknown | unused):
        refuse(f'{name} is no method, or can adapt none of {config["ckpt"]}; there are {", ".join(METHODS)}')
    config['checkpoints'] = [[c.path, c.about['step'], c.about['best']] for c in checkpoints]
    # A run is continued by the same command; methods may be added.
    path = Path(config['out'], 'run.json')
    if path.exists():
        there = json.loads(path.read_text('utf-8'))['config']
        for key, value in config.items():
            if key not in ('methods', 'processes', 'out') and there.get(key) != value:
                refuse(f'{path} is of another run: {key} = {there.get(key)}, not {value}; name another --out')
    text = json.dumps(config)
    experiment = experiment_of(text)
    run = {
        **{name: getattr(experiment, name) for name in ('labels', 'domains', 'clips', 'probe_at')},
        'config': config,
        'phases': config['phases'],
        'streams': config['streams'],
        'tuned_on': config['tune_on'],
        'shown': [experiment.streams[0][i] for i in experiment.shown],
        'loss': ' and '.join(sorted({checkpoint.loss for checkpoint in checkpoints})),
        'target_steps': (checkpoints[0].targets + 1).tolist(),
        'rows': [f'{row["file"]}.json' for row in rows],
    }
    write_atomically(path, lambda f: f.write(json.dumps(run, indent=1).encode()))
    # Side by side in processes, those that have no file yet.
    rows = [row for row in rows if not Path(config['out'], f'{row["file"]}.json').exists()]
    processes = config['processes'] or (multiprocessing.cpu_count() if config['device'] == 'cpu' else 1)
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        work = map if processes == 1 else pool.map
        list(tqdm(work(run_row, [text] * len(rows), rows), 'rows', len(rows), disable=None))
    # Not by the processes of rows, which need no pandas and no matplotlib.
    import report
    report.write([config['out']], config['out'])


if __name__ == '__main__':
    main(config)
