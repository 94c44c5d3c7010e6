"""
A→B→A: how a trained predictor adapts when the physics changes, and what it forgets.

    python adapt.py --ckpt=out/hope.pt                       every method that this checkpoint can do
    python adapt.py --ckpt=out/hope.pt,out/vit.pt            compared in one table
    python adapt.py --ckpt=out/hope.pt --methods=all         with the controls that could refute the result
    python adapt.py --ckpt=out/hope.pt --phases=A,turned,A   another shift in place of B

The stream: a home world, a shift, home again, one clip at a time; nobody tells the model where a phase ends. Every clip
is predicted and scored from its first step and action alone; only then is it shown, and the method may learn from it.
Learning rates are tuned on other shifts (tune_on), never on B, with the same number of trials for every method.
Writes table.txt, results.json, results.csv (the loss of every clip), results.png and predictions.png into `out`, which
compare.py reads. An interrupted run keeps its finished rows there in unfinished.pt; the same command goes on.
"""
import copy
import os
import time
from types import SimpleNamespace

import numpy as np
import torch

from compare import draw, drawn_rows, figures, format_table, grouped, in_words, on_the_edge, results_csv, results_json
from compare import title
from configurator import Refusal, configure, listed
from data import median_scene, pictures
from experiment import batches, build_experiment, check_clips, further_than_training, labels_of, open_splits, phases_of
from experiment import read_checkpoints, read_decoder, split_of, tuned_on
from hope import CMSWriter, earned_retention
from model import feature_loss, pick_device, rollout, teacher_forcing_loss
from support import plots
from support.files import MALFORMED, claim, read_manifest, read_sealed, write_atomically, write_sealed, write_text
from support.finished import FILES, check_memory_out, resume, run_key
from support.running import make_slide
from support.terminal import duration, progress

# what to run
ckpt = 'out/hope.pt'     # checkpoint, or several separated by commas
data = 'slide'           # the data set whose splits make the stream
phases = 'auto'          # home, shift, home again, by their splits: A,B,A or A1,B,A2 or val,B,A2; auto = what is there
clips = 200              # clips per phase [1..]
out = 'out/aba'          # folder for the results
# the methods
methods = ''             # run only these, separated by commas, as they are called in the table; '' = no controls, all = all
oracle = ''              # checkpoint fine-tuned on other clips of the shift: the bound that gaps are measured against
memory_in = ''           # start HOPE's memory and CMS from this file instead of fresh
memory_out = ''          # keep HOPE's memory and CMS, as they are at the end of the stream, in this file
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
probe_clips = 200        # clips of the held-out probe sets of home and of the shift [1..]
probe_every = 100        # clips of the stream between two probes [1..]
device = 'auto'          # auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps or cpu
dtype = 'auto'           # auto = bfloat16 on a CUDA device that has it, else float32 [auto | float32 | bfloat16]
settings = configure(globals()) if __name__ == '__main__' else {}


# ---- methods: one class each, and one line of METHODS ----------------------------------------------------------------

def predict_targets(net, loss, targets, z, a, memory=None):
    """
    Predict the target steps of clips from step 1 and the action alone, as the checkpoint's loss ('jump' or 'rollout') did.

    z (B,T,N,D), a (B,T,A), targets (K,) 0-based; the memory of one clip is shared by all. → z_hat (B,K,N,D).
    """
    B, K = len(z), len(targets)
    if memory is not None:
        rows = B if loss == 'rollout' else B * K
        memory = [m.expand(rows, *m.shape[1:]) for m in memory]
    if loss == 'rollout':
        return rollout(net, z, a, int(targets.max()), memory)[:, targets - 1]
    # One row for each clip and target step.
    first = z[:, :1].repeat_interleave(K, 0)                           # (B*K,1,N,D)
    push = a[:, :1].repeat_interleave(K, 0)                            # (B*K,1,A)
    z_hat, _ = net(first, push, tau=targets.repeat(B), memory=memory)
    return z_hat.unflatten(0, (B, K))


class Method:
    """
    What the methods have in common: a copy of the checkpoint's predictor to adapt, and how a clip is predicted.

    To add a method, derive a class with these members and add its line to METHODS:

        rates            the learning rates that are tried; () = it has none
        adapts(net)      the parameters of net that change along the stream; none if it is left out
        look_back(z, a)  learn from the clip that was predicted last, z (1,T,N,D) and a (1,T,A)

    models: those that it can adapt. default: {model: the rate without tuning}. knob: the name of the knob that sets it.
    carries: what state() hands to a later run, which gets it as `start`. control: it is run only where it is asked for, and
    may look at the Experiment to know what a method cannot know (None in tuning).
    """
    models = 'vit', 'hope'
    default = {}
    knob = ''
    carries = ()
    control = False

    @classmethod
    def fits(cls, sizes):
        """Whether the method can run on a predictor of these sizes."""
        return sizes.model in cls.models

    def __init__(self, checkpoint, rate=None, start=None, experiment=None):
        self.loss, self.targets, self.precision = checkpoint.loss, checkpoint.targets, checkpoint.precision
        self.predictor = copy.deepcopy(checkpoint.predictor).requires_grad_(False)
        self.adapted = self.adapts(self.predictor)
        for p in self.adapted:
            p.requires_grad_(True)
        # What is called to predict: the predictor, or what a method puts in front of it.
        self.net = self.predictor
        self.memory = start['memory'] if start and 'memory' in self.carries else None

    @staticmethod
    def adapts(net):
        """The parameters of net that change along the stream."""
        return []

    def predict(self, z, a):
        """Predict clips z (B,T,N,D), a (B,T,A) from step 1 and the action alone → z_hat (B,K,N,D)."""
        # Kept, with its graph, for look_back().
        self.z_hat = predict_targets(self.net, self.loss, self.targets, z, a, self.memory)
        return self.z_hat

    def losses(self, z, a):
        """The loss of the clip that was predicted last, with its graph, and that of the unwritten predictor: two scalars."""
        loss = feature_loss(self.z_hat, z[:, self.targets])[0]
        with torch.no_grad():
            unwritten = predict_targets(self.predictor, self.loss, self.targets, z, a, self.memory)
            initial_loss = feature_loss(unwritten, z[:, self.targets])[0]
        return loss, initial_loss

    def diagnostics(self):
        """Figures of the last look-back, {name: number}."""
        return {}

    def state(self):
        """What a later run can start from."""
        return {'memory': self.memory, 'cms': None}


class Frozen(Method):
    """The checkpoint as it is."""
    rates = ()

    def look_back(self, z, a):
        """Nothing is learned."""


class TTA(Method):
    """Test-time adaptation of some parameters: one step of Adam a clip, on the loss of the clip's prediction."""

    def __init__(self, checkpoint, rate, start=None, experiment=None):
        super().__init__(checkpoint, rate, start)
        self.optimizer = torch.optim.Adam(self.adapted, lr=rate)

    def look_back(self, z, a):
        feature_loss(self.z_hat, z[:, self.targets]).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.adapted, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class LNTTA(TTA):
    """TTA of the gain and bias of every LayerNorm."""
    rates = 1e-3, 3e-3, 1e-2, 3e-2
    default = {'vit': 3e-3, 'hope': 1e-2}
    knob = 'ln_rate'

    @staticmethod
    def adapts(net):
        norms = [module for module in net.modules() if isinstance(module, torch.nn.LayerNorm)]
        return [p for norm in norms for p in norm.parameters()]


class ActionTTA(TTA):
    """TTA of the action encoder alone: a control that any ViT-AC can have."""
    rates = 1e-3, 3e-3, 1e-2, 3e-2
    default = {'vit': 3e-3}
    knob = 'action_rate'
    models = ('vit',)

    @staticmethod
    def adapts(net):
        return list(net.action_encoder.parameters())


class FullTTA(TTA):
    """TTA of every parameter."""
    rates = 1e-5, 3e-5, 1e-4, 3e-4
    default = {'vit': 1e-5}
    knob = 'full_rate'
    models = ('vit',)

    @staticmethod
    def adapts(net):
        return list(net.parameters())


class Memory(Method):
    """The action memory is carried from clip to clip: see hope.ActionMemory. One forward pass of the shown features."""
    rates = ()
    carries = ('memory',)

    @classmethod
    def fits(cls, sizes):
        return super().fits(sizes) and sizes.action_memory

    def look_back(self, z, a):
        self.write(z, a[:, 0])

    def write(self, z, push):
        """Show clips z (1,T,N,D) with the push (1,A) to the action memory: teacher forcing shows all steps but the last."""
        layer = self.predictor.action_memory
        layer.diagnostics = []
        state = self.memory[0] if self.memory else None
        self.memory = [layer.write(z[:, :-1], push, state)]

    def diagnostics(self):
        """What the memory reported of the clip."""
        layer = self.predictor.action_memory
        seen = {f'{key}, action memory': value.item() for key, value in layer.diagnostics[0].items()}
        layer.diagnostics = None
        return seen


class TitanMemory(Method):
    """
    HOPE's Titan memories are carried from clip to clip, without the action memory; the clip is shown as in training.

    The rate is the share of its state that a memory keeps for the next clip.
    """
    rates = 0.05, 0.2, 0.5, 1.0
    default = {'hope': 0.05}
    knob = 'titan_share'
    models = ('hope',)
    carries = ('memory',)

    def __init__(self, checkpoint, rate, start=None, experiment=None):
        super().__init__(checkpoint, rate, start)
        self.share = rate
        self.titans = [block.titan for block in self.predictor.predictor_blocks]

    @classmethod
    def fits(cls, sizes):
        return super().fits(sizes) and sizes.mixer != 'attention'

    def look_back(self, z, a):
        for titan in self.titans:
            titan.diagnostics = []
        with torch.no_grad():
            _, memory = teacher_forcing_loss(self.net, z, a, self.memory)
        self.memory = [self.share * state for state in memory]
        if self.predictor.action_memory is not None:
            self.memory[0] = self.predictor.action_memory.start(1)

    def diagnostics(self):
        """What each block's memory reported of the clip, as the mean over its steps."""
        seen = {}
        for b, titan in enumerate(self.titans, 1):
            for key in titan.diagnostics[0]:
                seen[f'{key}, block {b}'] = float(np.mean([step[key].item() for step in titan.diagnostics]))
            titan.diagnostics = None
        return seen


class CMS(Method):
    """Online writes of HOPE's CMS levels: see hope.CMSWriter."""
    rates = 3.0, 10.0, 30.0, 100.0
    default = {'hope': 10.0}
    knob = 'cms_rate'
    models = ('hope',)
    carries = ('cms',)

    def __init__(self, checkpoint, rate, start=None, experiment=None):
        super().__init__(checkpoint, rate, start)
        self.net = self.writer = CMSWriter(self.predictor, rate)
        if start and start['cms']:
            self.writer.load(start['cms'])

    @staticmethod
    def adapts(net):
        return [p for name, p in net.named_parameters() if '.cms.levels.' in name]

    def look_back(self, z, a):
        self.writer.tick(*self.losses(z, a))

    def diagnostics(self):
        """What each level reports, fast to slow."""
        seen = {}
        for period, level in zip(self.writer.periods, self.writer.diagnostics()):
            for key, value in level.items():
                seen[f'{key}, CMS every {period}'] = value
        return seen

    def state(self):
        return {'memory': self.memory, 'cms': self.writer.state()}


# Controls: what could refute that a memory which sees the clips is what helps.

class GainWriter(Method):
    """One number by which every push is multiplied, written by the rule of the CMS, for any model."""
    rates = 10.0, 20.0, 40.0, 80.0
    default = {'vit': 20.0, 'hope': 20.0}
    knob = 'gain_rate'
    control = True

    def __init__(self, checkpoint, rate, start=None, experiment=None):
        super().__init__(checkpoint, rate, start)
        self.rate = rate
        self.change = torch.zeros((), device=self.targets.device, requires_grad=True)

    def predict(self, z, a):
        return super().predict(z, a * (1 + self.change))

    def look_back(self, z, a):
        loss, initial_loss = self.losses(z, a)
        gradient, = torch.autograd.grad(loss.square() / 2, self.change)
        with torch.no_grad():
            self.change.copy_(earned_retention(loss, initial_loss) * self.change - self.rate * gradient)

    def diagnostics(self):
        return {'gain, written': 1 + self.change.item()}


class PushKnown(Memory):
    """
    The best constant map of the push in the middle phase, known in advance: what any memory of the push could reach.

    It is fitted to the probes, so what it loses on them says nothing.
    """
    control = True
    carries = ()

    def __init__(self, checkpoint, rate=None, start=None, experiment=None):
        super().__init__(checkpoint)
        self.phase = len(experiment.stream) // 3
        self.known = best_map(checkpoint, experiment.probes['B'])
        self.seen = 0

    def look_back(self, z, a):
        self.seen += 1
        in_the_middle = self.phase <= self.seen < 2 * self.phase
        self.memory = [self.known] if in_the_middle else None

    def diagnostics(self):
        return {}


class WrongWorld(Memory):
    """The memory of clips of another domain, kept as it is."""
    control = True
    carries = ()

    def __init__(self, checkpoint, rate=None, start=None, experiment=None):
        super().__init__(checkpoint)
        with self.precision:
            for i in range(len(experiment.other)):
                z, a = experiment.other[i:i + 1]
                self.write(z, a[:, 0])

    def look_back(self, z, a):
        """Nothing more is learned."""

    def diagnostics(self):
        return {}


class Shuffled(Memory):
    """Each clip is shown with the push of the clip before."""
    control = True
    carries = ()
    push_before = None

    def look_back(self, z, a):
        push = a[:, 0] if self.push_before is None else self.push_before
        self.write(z, push)
        self.push_before = a[:, 0]


class NoCarry(Memory):
    """The memory is written, but not kept for the next clip."""
    control = True
    carries = ()

    def look_back(self, z, a):
        self.write(z, a[:, 0])
        self.memory = None


def best_map(checkpoint, clips, steps=100):
    """
    The constant map of the push under which a predictor loses least on clips: the state of an action memory that holds it,
    (1,2A,3A). The map is found by gradient descent.
    """
    net = copy.deepcopy(checkpoint.predictor).requires_grad_(False)
    layer = net.action_memory
    M = layer.matrix(layer.start(1))[0].requires_grad_(True)
    optimizer = torch.optim.Adam([M], lr=0.05)
    for step in range(steps):
        optimizer.param_groups[0]['lr'] = 0.05 * (1 - step / steps)
        batch = torch.randperm(len(clips), generator=torch.Generator().manual_seed(step))[:50]
        z, a = clips[batch.tolist()]
        with checkpoint.precision:
            z_hat = predict_targets(net, checkpoint.loss, checkpoint.targets, z, a, [layer.state_of(M)])
        feature_loss(z_hat, z[:, checkpoint.targets]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer.state_of(M.detach())


METHODS = {
    'frozen': Frozen,
    'LN-TTA': LNTTA,
    'action TTA': ActionTTA,
    'full TTA': FullTTA,
    'Titan memory': TitanMemory,
    'CMS': CMS,
    'memory': Memory,
    'gain writer': GainWriter,
    'push known': PushKnown,
    'wrong world': WrongWorld,
    'shuffled': Shuffled,
    'no carry': NoCarry,
}


def check_methods(table):
    """Raises Refusal for a method of the table {name: class} that lacks something, or would run frozen under its name."""
    for name, method in table.items():
        for part in ('rates', 'models', 'carries', 'control', 'fits', 'adapts', 'predict', 'look_back', 'diagnostics', 'state'):
            if not hasattr(method, part):
                raise Refusal(f'method {name!r}: its class {method.__name__} has no {part}')
        if method is not Frozen and method.look_back is Frozen.look_back:
            raise Refusal(f'method {name!r}: its class {method.__name__} has no look_back of its own')


# ---- the stream ------------------------------------------------------------------------------------------------------

def run_stream(method, stream, probes=None, probe_at=(), shown=(), label=None):
    """
    Run one method over a stream of clips, test-then-train: predict, score, look back, note.

    method: an instance of a class of METHODS; stream: Clips, or whatever gives (z, a) for a slice; the others: see
    Experiment; label: a progress line is shown under it. Returns a dict: loss (n,), seconds per clip, probes
    {name: [(clip, loss), ...]}, diagnostics [{...} per clip], shown {clip: prediction of the last step (N,D)}, state of
    the method at the end.
    """
    probes = probes or {}
    notes = {'loss': [], 'seconds': [], 'probes': {name: [] for name in probes}, 'diagnostics': [], 'shown': {}}
    score_probes(method, probes, 0, notes)
    numbers = range(len(stream))
    for i in progress(numbers, label) if label else numbers:
        z, a = stream[i:i + 1]
        started = time.perf_counter()
        # Left after each clip: within, bfloat16 copies of weights are kept, and would hide what has been learned.
        with method.precision:
            z_hat = method.predict(z, a)
            loss = feature_loss(z_hat, z[:, method.targets]).item()
            # The clip has been scored. Only now is it shown.
            method.look_back(z, a)
        notes['seconds'].append(time.perf_counter() - started)
        notes['loss'].append(loss)
        surprise = loss / copy_loss(z, method.targets)
        notes['diagnostics'].append({'surprise': surprise, **method.diagnostics()})
        if i in shown:
            notes['shown'][i] = z_hat[0, -1].detach().float()
        if i + 1 in probe_at:
            score_probes(method, probes, i + 1, notes)
    return {**notes, 'state': method.state()}


def copy_loss(z, targets):
    """What predicting step 1 again loses on a clip z (1,T,N,D): the loss relative to it is what was not foreseen."""
    return max(feature_loss(z[:, :1], z[:, targets]).item(), 1e-12)


def score_probes(method, probes, seen, notes):
    """Note the mean loss of each probe set after `seen` clips of the stream."""
    for name, clips in probes.items():
        losses = []
        for z, a in batches(clips):
            with torch.no_grad(), method.precision:
                losses.append(feature_loss(method.predict(z, a), z[:, method.targets]))
        notes['probes'][name].append((seen, torch.cat(losses).mean().item()))


def tune(checkpoint, name, streams):
    """Mean loss over the streams of every rate of a method → {rate: loss}."""
    tried = {}
    for rate in progress(METHODS[name].rates, f'tuning {checkpoint.name} {name}', 'rates'):
        losses = [run_stream(METHODS[name](checkpoint, rate), stream)['loss'] for stream in streams]
        tried[rate] = float(np.mean(np.concatenate(losses)))
    return tried


def tuned_rate(checkpoint, name, streams, kept, unfinished):
    """The best of a method's rates on the tuning streams. They are tried once: see run_rows for `kept`."""
    key = f'{checkpoint.name} {name}'
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


def plan(checkpoint, chosen, given, tuning, other):
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


def run_rows(plans, experiment, kept, unfinished, start=None, keep_state=False):
    """
    Run the planned rows of checkpoints, [(checkpoint, its rows)], tuning where it is due → rows of the table.

    kept: what is finished already (see resume), written to the file `unfinished` after every row.
    """
    rows = []
    time_left = TimeLeft(plans, experiment)
    for checkpoint, planned in plans:
        parameters = sum(p.numel() for p in checkpoint.predictor.parameters())
        print(f'{checkpoint.name}: {checkpoint.path}, {parameters:,} parameters, {checkpoint.step} steps of training',
              flush=True)
        for name, rate, rate_from in planned:
            if rate_from == 'tuned':
                rate = tuned_rate(checkpoint, name, experiment.tuning, kept, unfinished)
            method = METHODS[name]
            kind = 'oracle' if checkpoint.name == 'oracle' else checkpoint.predictor.sizes.model
            row = {'model': checkpoint.name, 'kind': kind, 'method': name, 'rate': rate, 'rate_from': rate_from,
                   'tta': issubclass(method, TTA), 'carries': list(method.carries)}
            new = title(row) not in kept['finished']
            if new:
                result = run_stream(method(checkpoint, rate, start, experiment), experiment.stream, experiment.probes,
                                    experiment.probe_at, experiment.shown, label=title(row))
                if not keep_state:
                    del result['state']
                kept['finished'][title(row)] = result
                write_sealed(unfinished, kept)
            time_left.row_done(name, rate_from, new)
            rows.append({**row, **kept['finished'][title(row)]})
    return rows


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
        clips = len(experiment.stream)
        if rate_from == 'tuned':
            clips += len(METHODS[name].rates) * sum(map(len, experiment.tuning))
        if METHODS[name].rates:
            clips *= 3
        probed = (1 + len(experiment.probe_at)) * sum(map(len, experiment.probes.values()))
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


def guesses(stream, targets, empty):
    """
    The rows of two predictions that know nothing of motion: the first step again, and an empty scene (N,D).

    A method that only learns to erase the object scores like `blank`, so a method has to be better than that.
    """
    losses = {'copy': [], 'blank': []}
    for z, _ in batches(stream):
        losses['copy'] += feature_loss(z[:, :1], z[:, targets]).tolist()
        losses['blank'] += feature_loss(empty, z[:, targets]).tolist()
    rows = []
    for name, loss in losses.items():
        rows.append({'model': '', 'kind': '', 'method': name, 'rate': None, 'rate_from': '', 'tta': False, 'carries': [],
                     'loss': loss, 'seconds': [0.0], 'probes': {}, 'diagnostics': [], 'shown': {},
                     'state': {'memory': None}})
    return rows


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
    predictor = next(checkpoint.predictor for checkpoint in checkpoints if checkpoint.name == row['model'])
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


def predictions(drawn, experiment, decoder, manifest):
    """The columns of predictions.png, {heading: pictures (clips,H,W,3)}: first and last step, what each row predicted."""
    z, _ = experiment.stream[experiment.shown]
    z = z.cpu()
    columns = {'step 1': z[:, 0], f'step {z.shape[1]}': z[:, -1]}
    for entry in drawn:
        shown = entry['row']['shown']
        if shown:
            heading = entry['title'].replace(' ', '\n', 1)
            columns[heading] = torch.stack([shown[clip] for clip in experiment.shown]).cpu()
    for heading, features in columns.items():
        columns[heading] = pictures(features, decoder, manifest['grid'], manifest['patch']).numpy()
    return columns


def write_results(folder, results, experiment, decoder, manifest):
    """Write tables and pictures → the names of the files that were written."""
    groups = grouped([results])
    table = format_table([results], groups)
    print('\n' + table)
    write_text(os.path.join(folder, 'table.txt'), table)
    write_text(os.path.join(folder, 'results.json'), results_json(results))
    write_text(os.path.join(folder, 'results.csv'), results_csv(results))
    written = ['table.txt', 'results.json', 'results.csv']

    def draw_predictions(file):
        columns = predictions(drawn_rows(groups), experiment, decoder, manifest)
        plots.draw_predictions(file, columns, results['labels'][1])
    try:
        draw(os.path.join(folder, 'results.png'), [results], groups)
        written.append('results.png')
        if decoder is not None:
            write_atomically(os.path.join(folder, 'predictions.png'), draw_predictions)
            written.append('predictions.png')
    except ImportError:
        print(f'no pictures: pip install matplotlib, then python compare.py {folder} draws the stream')
    if decoder is None:
        print('no predictions.png: features that were imported without pictures cannot be turned back into pictures')
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
        plans.append((checkpoint, plan(checkpoint, chosen, given, bool(shifts), experiment.other)))
    check_plans(knobs, plans)
    resolved = {**vars(knobs), 'phases': ','.join(phases), 'tune_on': ','.join(shifts), 'device': where}
    files = {name: listed(getattr(knobs, name)) for name in ('ckpt', 'oracle', 'memory_in')}
    start = None
    if knobs.memory_in:
        start = read_memory(knobs.memory_in, checkpoints[0], experiment.stream[:1], where)
    key = run_key(resolved, files, manifest['checksum'])
    if knobs.memory_out:
        check_memory_out(knobs.memory_out, key)
    decoder = read_decoder(knobs.data, manifest)
    kept = resume(knobs.out, key, where)
    return SimpleNamespace(where=where, checkpoints=checkpoints, manifest=manifest, phases=phases, shifts=shifts,
                           splits=splits, experiment=experiment, plans=plans, start=start, key=key, decoder=decoder,
                           kept=kept)


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
    print(f'phases {", ".join(phases)}, {knobs.clips} clips each; probes of {experiment.home} and {phases[1]}; '
          f'rates {tuning}')
    if kept['finished']:
        print(f'going on after {len(kept["finished"])} finished rows')

    unfinished = os.path.join(knobs.out, 'unfinished.pt')
    first = ready.checkpoints[0]
    train = ready.splits['train']
    rows = guesses(experiment.stream, first.targets, median_scene(train).to(ready.where))
    rows += run_rows(ready.plans, experiment, kept, unfinished, ready.start, keep_state=bool(knobs.memory_out))
    if knobs.memory_out:
        keep_memory(knobs.memory_out, ready.checkpoints, rows, ready.key)
    beyond = further_than_training(train, ready.splits[split_of(phases[1])], knobs.clips)
    for row in rows:
        row['figures'] = figures(row, rows, beyond)
    results = {
        'settings': vars(knobs),
        'key': ready.key,
        'labels': labels_of(phases),
        'home': experiment.home,
        'clips': knobs.clips,
        'loss': first.loss,
        'target_steps': (first.targets + 1).tolist(),
        'tuned_on': ready.shifts,
        'tuning': {name: {str(rate): loss for rate, loss in losses.items()} for name, losses in kept['tried'].items()},
        'beyond': beyond,
        'checkpoints': [{'name': c.name, 'path': c.path, 'steps': c.step} for c in ready.checkpoints],
        'rows': rows,
    }
    written = write_results(knobs.out, results, experiment, ready.decoder, ready.manifest)
    if os.path.exists(unfinished):
        os.unlink(unfinished)
    print(f'results: {os.path.join(knobs.out, written[0])}, {", ".join(written[1:])}')


if __name__ == '__main__':
    main(SimpleNamespace(**settings))
