"""
A→B→A: how a trained predictor adapts when the physics changes, and what it forgets.

    python adapt.py --ckpt=out/hope.pt                       every method that this checkpoint can do
    python adapt.py --ckpt=out/hope.pt,out/vit.pt            compared in one table
    python adapt.py --ckpt=out/hope.pt --methods=all         with the controls that could refute the result
    python adapt.py --ckpt=out/hope.pt --shift=turned        another shift in place of B

The stream: phase A, phase B, phase A again, one clip at a time; nobody tells the model where a phase ends. Every clip
is predicted and scored from its first step and action alone; only then is it shown, and the method may learn from it.
Learning rates are tuned on other shifts (tune_on), never on B, with the same number of trials for every method.
Writes table.txt, results.json, results.csv (the loss of every clip), results.png and predictions.png into `out`. An
interrupted run keeps its finished rows there in unfinished.pt; the same command goes on.
"""
import copy
import csv
import io
import json
import os
import time
from dataclasses import dataclass

import numpy as np
import torch

from configurator import ROOT, Refusal, configure
from data import TUBELET, median_scene, open_split, pictures, progress
from hope import CMSWriter, earned_retention, load
from model import feature_loss, pick_device, rollout, teacher_forcing_loss
from support import plots
from support.files import MALFORMED, claim, folder_of, read_sealed, sha256, verify, write_atomically, write_sealed

# what to run
ckpt = 'out/hope.pt'     # checkpoint, or several separated by commas
data = 'slide'           # the data set whose test splits make the stream
shift = 'B'              # the domain of the middle phase
clips = 200              # clips per phase [1..]
out = 'out/aba'          # folder for the results
# the methods
ln_rate = 1e-4           # LN-TTA's untuned, conservative learning rate [0..]
methods = ''             # run only these, separated by commas, as they are called in the table; '' = no controls, all = all
tune_on = 'C'            # domains whose streams A→X→A choose the learning rates; '' = leave tuned methods out
tune_clips = 25          # clips per phase of the tuning streams [1..]
oracle = ''              # checkpoint fine-tuned on other clips of the shift: the bound that gaps are measured against
memory_in = ''           # start HOPE's memory and CMS from this file instead of fresh
memory_out = ''          # keep HOPE's memory and CMS, as they are at the end of the stream, in this file
# what to measure
probe_clips = 200        # clips of the held-out probe sets of A and of the shift [1..]
probe_every = 100        # clips of the stream between two probes [1..]
device = 'auto'          # auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps or cpu
settings = configure(globals()) if __name__ == '__main__' else {}


# ---- methods: one class each, and one line of METHODS ----------------------------------------------------------------

@dataclass
class Checkpoint:
    """A trained predictor and what it was trained on; targets: the target steps of its jumps, 0-based (K,)."""
    name: str
    path: str
    predictor: torch.nn.Module
    loss: str
    step: int
    clip_steps: int
    targets: torch.Tensor


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

    models: those that it can adapt. carries: what state() hands to a later run, which gets it as `start`. control: it is
    run only where it is asked for, and may look at the Experiment to know what a method cannot know (None in tuning).
    """
    models = 'vit', 'hope'
    carries = ()
    control = False

    @classmethod
    def fits(cls, sizes):
        """Whether the method can run on a predictor of these sizes."""
        return sizes.model in cls.models

    def __init__(self, checkpoint, rate=None, start=None, experiment=None):
        self.loss, self.targets = checkpoint.loss, checkpoint.targets
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

    @staticmethod
    def adapts(net):
        norms = [module for module in net.modules() if isinstance(module, torch.nn.LayerNorm)]
        return [p for norm in norms for p in norm.parameters()]


class ActionTTA(TTA):
    """TTA of the action encoder alone: a control that any ViT-AC can have."""
    rates = 1e-3, 3e-3, 1e-2, 3e-2
    models = ('vit',)

    @staticmethod
    def adapts(net):
        return list(net.action_encoder.parameters())


class FullTTA(TTA):
    """TTA of every parameter."""
    rates = 1e-5, 3e-5, 1e-4, 3e-4
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
        self.phase = len(experiment.stream[0]) // 3
        self.known = best_map(checkpoint, *experiment.probes['B'])
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
        z, a = experiment.other
        for i in range(len(z)):
            self.write(z[i:i + 1], a[i:i + 1, 0])

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


def best_map(checkpoint, z, a, steps=100):
    """
    The constant map of the push under which a predictor loses least on clips z (n,T,N,D), a (n,T,A): the state of an action
    memory that holds it, (1,2A,3A). The map is found by gradient descent.
    """
    net = copy.deepcopy(checkpoint.predictor).requires_grad_(False)
    layer = net.action_memory
    M = layer.matrix(layer.start(1))[0].requires_grad_(True)
    optimizer = torch.optim.Adam([M], lr=0.05)
    for step in range(steps):
        optimizer.param_groups[0]['lr'] = 0.05 * (1 - step / steps)
        batch = torch.randperm(len(z), generator=torch.Generator().manual_seed(step))[:50]
        z_hat = predict_targets(net, checkpoint.loss, checkpoint.targets, z[batch], a[batch], [layer.state_of(M)])
        feature_loss(z_hat, z[batch][:, checkpoint.targets]).mean().backward()
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

@dataclass
class Experiment:
    """
    What every method goes through. Clips are (z, a) with z (n,T,N,D) and a (n,T,A), on the device.

    stream: phases A, B (or another shift) and A. probes: {'A': clips, 'B': clips} that are not in the stream. probe_at:
    after how many clips of the stream they are scored. shown: the clips of the stream whose predictions are kept. tuning:
    streams A→X→A. other: clips of the first domain that is tuned on, None where there is none.
    """
    stream: tuple
    probes: dict
    probe_at: set
    shown: list
    tuning: list
    other: tuple


def run_stream(method, stream, probes=None, probe_at=(), shown=(), label=None):
    """
    Run one method over a stream of clips, test-then-train: predict, score, look back, note.

    method: an instance of a class of METHODS; the others: see Experiment; label: a progress line is shown under it.
    Returns a dict: loss (n,), seconds per clip, probes {name: [(clip, loss), ...]}, diagnostics [{...} per clip], shown
    {clip: prediction of the last step (N,D)}, state of the method at the end.
    """
    z, a = stream
    probes = probes or {}
    notes = {'loss': [], 'seconds': [], 'probes': {name: [] for name in probes}, 'diagnostics': [], 'shown': {}}
    score_probes(method, probes, 0, notes)
    numbers = range(len(z))
    for i in progress(numbers, label) if label else numbers:
        started = time.perf_counter()
        z_i, a_i = z[i:i + 1], a[i:i + 1]
        z_hat = method.predict(z_i, a_i)
        loss = feature_loss(z_hat, z_i[:, method.targets]).item()
        # The clip has been scored. Only now is it shown.
        method.look_back(z_i, a_i)
        notes['seconds'].append(time.perf_counter() - started)
        notes['loss'].append(loss)
        surprise = loss / copy_loss(z_i, method.targets)
        notes['diagnostics'].append({'surprise': surprise, **method.diagnostics()})
        if i in shown:
            notes['shown'][i] = z_hat[0, -1].detach()
        if i + 1 in probe_at:
            score_probes(method, probes, i + 1, notes)
    return {**notes, 'state': method.state()}


def copy_loss(z, targets):
    """What predicting step 1 again loses on a clip z (1,T,N,D): the loss relative to it is what was not foreseen."""
    return max(feature_loss(z[:, :1], z[:, targets]).item(), 1e-12)


def score_probes(method, probes, seen, notes):
    """Note the mean loss of each probe set after `seen` clips of the stream."""
    for name, (z, a) in probes.items():
        with torch.no_grad():
            loss = feature_loss(method.predict(z, a), z[:, method.targets])
        notes['probes'][name].append((seen, loss.mean().item()))


def tune(checkpoint, name, streams):
    """Mean loss over the streams of every rate of a method → {rate: loss}."""
    tried = {}
    for rate in progress(METHODS[name].rates, f'tuning {checkpoint.name} {name}', 'rates'):
        losses = [run_stream(METHODS[name](checkpoint, rate), stream)['loss'] for stream in streams]
        tried[rate] = float(np.mean(np.concatenate(losses)))
    return tried


def tuned_rate(checkpoint, name, streams, kept, unfinished):
    """The best of a method's rates on the tuning streams. They are tried once: see run_checkpoint for `kept`."""
    key = f'{checkpoint.name} {name}'
    if key not in kept['tried']:
        kept['tried'][key] = tune(checkpoint, name, streams)
        write_sealed(unfinished, kept)
    tried = kept['tried'][key]
    return min(tried, key=tried.get)


def plan(checkpoint, chosen, untuned_rate, tuning):
    """
    The rows of a checkpoint in the order of the table → [(method, rate)], rate None (has none), 'tuned' or a number.

    chosen: the names of methods to run. untuned_rate: of the row of LN-TTA that is not tuned. tuning: whether there are
    streams to tune on; without them tuned methods are left out.
    """
    rows = []
    for name, method in METHODS.items():
        if name not in chosen or not method.fits(checkpoint.predictor.sizes):
            continue
        if checkpoint.name == 'oracle' and method is not Frozen:
            continue
        if method is WrongWorld and not tuning:
            continue
        if not method.rates:
            rows.append((name, None))
        elif tuning:
            rows.append((name, 'tuned'))
        if method is LNTTA and checkpoint.predictor.sizes.model == 'vit':
            rows.append((name, untuned_rate))
    return rows


def run_checkpoint(checkpoint, planned, experiment, kept, unfinished, start=None, keep_state=False):
    """
    Run the planned methods of a checkpoint, tuning where it is due → rows of the table.

    kept: what is finished already (see resume), written to the file `unfinished` after every row.
    """
    parameters = sum(p.numel() for p in checkpoint.predictor.parameters())
    print(f'{checkpoint.name}: {checkpoint.path}, {parameters:,} parameters, {checkpoint.step} steps of training',
          flush=True)
    rows = []
    for name, rate in planned:
        if rate == 'tuned':
            rate = tuned_rate(checkpoint, name, experiment.tuning, kept, unfinished)
        row = {'model': checkpoint.name, 'method': name, 'rate': rate}
        if title(row) not in kept['finished']:
            method = METHODS[name](checkpoint, rate, start, experiment)
            result = run_stream(method, experiment.stream, experiment.probes, experiment.probe_at, experiment.shown,
                                label=title(row))
            if not keep_state:
                del result['state']
            kept['finished'][title(row)] = result
            write_sealed(unfinished, kept)
        rows.append({**row, **kept['finished'][title(row)]})
    return rows


def guesses(stream, targets, empty):
    """
    The rows of two predictions that know nothing of motion: the first step again, and an empty scene (N,D).

    A method that only learns to erase the object scores like `blank`, so a method has to be better than that.
    """
    z, _ = stream
    rows = []
    for name, guess in (('copy', z[:, :1]), ('blank', empty)):
        rows.append({
            'model': '',
            'method': name,
            'rate': None,
            'seconds': [0.0],
            'diagnostics': [],
            'probes': {},
            'shown': {},
            'state': {'memory': None},
            'loss': feature_loss(guess, z[:, targets]).tolist(),
        })
    return rows


# ---- checkpoints and clips -------------------------------------------------------------------------------------------

MODELS = {'vit': 'ViT-AC', 'hope': 'HOPE'}


def read_checkpoints(paths, oracle_path, where):
    """
    The checkpoints of --ckpt and --oracle on the device `where` → list of Checkpoint, the oracle last.

    Raises Refusal for a file that is missing or damaged, and for scores that could not be compared.
    """
    roles = [(path.strip(), '') for path in paths.split(',')]
    if oracle_path:
        roles.append((oracle_path.strip(), 'oracle'))
    found = []
    for path, role in roles:
        predictor, stored = load(path, where, loss=str, step=int, clip_steps=int, jump_last=int)
        name = role or MODELS[predictor.sizes.model]
        if name in [checkpoint.name for checkpoint in found]:
            name = f'{name} {len(found) + 1}'
        steps = stored['clip_steps']
        targets = torch.arange(steps - stored['jump_last'], steps, device=where)
        found.append(Checkpoint(name, path, predictor, stored['loss'], stored['step'], steps, targets))
    for checkpoint in found:
        if (checkpoint.loss, len(checkpoint.targets)) != (found[0].loss, len(found[0].targets)):
            raise Refusal(f'{paths}: trained with different losses or target steps, so their scores cannot be compared')
    return found


def check_clips(checkpoints, manifest, numbers, name):
    """Raises Refusal unless the checkpoints fit the data set `name`, whose actions have so many numbers."""
    steps, _, size = manifest['shape']
    grid = manifest['grid']
    for checkpoint in checkpoints:
        sizes = checkpoint.predictor.sizes
        if (checkpoint.clip_steps, sizes.action_dim) != (steps, numbers):
            raise Refusal(f'{checkpoint.path} was trained on clips of {checkpoint.clip_steps} steps with actions of '
                          f'{sizes.action_dim} numbers, but data set {name} has {steps} steps and {numbers} numbers')
        if (sizes.feature_dim, list(sizes.grid)) != (size, grid):
            raise Refusal(f'{checkpoint.path} was trained on features of size {sizes.feature_dim} on a grid '
                          f'{sizes.grid}, but data set {name} has {size} on {tuple(grid)}')


def check_lengths(knobs, splits):
    """Raises Refusal where a split, of {name: split}, has fewer clips than the knobs ask for."""
    n, n_probes = knobs['clips'], knobs['probe_clips']
    needs = [('test_A', 2 * n + n_probes, 'the stream and its probes need', '--clips or --probe_clips'),
             ('shift', n + n_probes, 'the stream and its probes need', '--clips or --probe_clips'),
             ('val', 2 * knobs['tune_clips'], 'tuning needs', '--tune_clips')]
    for name, needed, what, lower in needs:
        if len(splits[name]) < needed:
            raise Refusal(f'{splits[name].name} has {len(splits[name])} clips, {what} {needed}; lower {lower}')


def take(split, start, count, where):
    """Clips start..start+count of a split on the device: z (count,T,N,D), a (count,T,A)."""
    z, a = split[range(start, start + count)]
    return z.to(where), a.to(where)


def join(*parts):
    """Several (z, a) one after the other."""
    return tuple(torch.cat(tensors) for tensors in zip(*parts))


def tuning_stream(validation, shift, n, where):
    """A stream A→X→A: n clips of validation, 2n of the shift (fewer where it has fewer), n of validation."""
    middle = take(shift, 0, min(2 * n, len(shift)), where)
    return join(take(validation, 0, n, where), middle, take(validation, n, n, where))


def build_experiment(knobs, splits, shifts, where):
    """The Experiment that the knobs ask for, of {name: split}, tuned on the domains `shifts`."""
    n, n_probes = knobs['clips'], knobs['probe_clips']
    a, b = splits['test_A'], splits['shift']
    stream = join(take(a, 0, n, where), take(b, 0, n, where), take(a, n, n, where))
    probes = {'A': take(a, 2 * n, n_probes, where), 'B': take(b, n, n_probes, where)}
    # At the end of each phase, too.
    probe_at = {seen for seen in range(1, 3 * n + 1) if seen % knobs['probe_every'] == 0 or seen % n == 0}
    # The last clips of B.
    shown = list(range(2 * n - min(5, n), 2 * n))
    tuning = [tuning_stream(splits['val'], splits[f'test_{name}'], knobs['tune_clips'], where) for name in shifts]
    other = None
    if shifts:
        first = splits[f'test_{shifts[0]}']
        other = take(first, 0, min(25, len(first)), where)
    return Experiment(stream, probes, probe_at, shown, tuning, other)


def travelled(split):
    """Displacement in metres over each clip, (clips,)."""
    position = split.physics['position']
    return np.linalg.norm(position[:, -1] - position[:, 0], axis=1)


def further_than_training(train, b, n):
    """Which of the first n clips of B slide further than any training clip (n,); None where positions are not known."""
    if not b.physics:
        return None
    return travelled(b)[:n] > travelled(train).max()


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


def read_decoder(name, manifest):
    """
    The linear map from features to pixels that prepare.py fitted (see data.pictures), or None for imported features.

    Raises Refusal where the data set `name` has a file in its place that is none.
    """
    if 'decoder' not in manifest:
        return None
    verify(folder_of(name), manifest, [manifest['decoder']])
    rows = manifest['shape'][-1] + 1
    try:
        decoder = np.load(os.path.join(folder_of(name), manifest['decoder']), mmap_mode='r')
        if decoder.shape != (rows, 3 * TUBELET * manifest['patch'] ** 2) or not np.isfinite(decoder).all():
            raise ValueError('not finite, or of another shape')
        return torch.from_numpy(np.array(decoder))
    except (*MALFORMED, EOFError, OSError) as error:
        raise Refusal(f'{manifest["decoder"]} of data set {name} is not a decoder ({error})') from None


# ---- figures ---------------------------------------------------------------------------------------------------------

EARLY = 25                   # clips at the start of a phase whose mean has a column of its own
# Key in results.json, heading in the table, format. What a figure is: in figures() and below it.
COLUMNS = [
    ('A1', 'A₁', '.4f'),
    ('B', 'B', '.4f'),
    ('B_within', 'within', '.4f'),
    ('B_beyond', 'beyond', '.4f'),
    ('B_first', '1-25', '.4f'),
    ('return_cost', 'return', '+.3f'),
    ('forgetting', 'forget', '+.3f'),
    ('gap_closed', 'gap', '.0%'),
    ('way_back', 'to A', '.0%'),
    ('of_known', 'known', '.0%'),
    ('t50', 't50', 'd'),
    ('ms_per_clip', 'ms', '.1f'),
]


def title(row):
    """Name of a row: model, method and learning rate."""
    rate = '' if row['rate'] is None else f'{row["rate"]:g}'
    return ' '.join(part for part in (row['model'], row['method'], rate) if part)


def running_mean(values, width=10):
    """Mean of each window of `width` neighbours, (n-width+1,)."""
    width = min(width, len(values))
    return np.convolve(values, np.ones(width) / width, 'valid')


def row_of(rows, model, method):
    """The row of a model and a method, or None."""
    return next((row for row in rows if (row['model'], row['method']) == (model, method)), None)


def figures(row, rows, beyond):
    """
    The figures of one row of the table, {name: number, or None for "never"}.

    beyond (n,): which of the n clips of B slide further than any training clip of A, or None.
    """
    a1, b, a2 = np.split(np.array(row['loss']), 3)
    found = {
        'A1': a1.mean(),
        'B': b.mean(),
        'B_first': b[:EARLY].mean(),
        'B_last': b[-EARLY:].mean(),
        'A2': a2.mean(),
        'A2_first': a2[:EARLY].mean(),
        'ms_per_clip': 1e3 * np.median(row['seconds']),
    }
    if beyond is not None and not beyond.all():
        found['B_within'] = b[~beyond].mean()
    if beyond is not None and beyond.any():
        found['B_beyond'] = b[beyond].mean()
    if row['probes']:
        found['forgetting'] = forgetting(row['probes']['A'], len(b))
    frozen = row_of(rows, row['model'], 'frozen')
    if frozen and row is not frozen:
        known = row_of(rows, row['model'], 'push known')
        found |= against_frozen(row, frozen, row_of(rows, 'oracle', 'frozen'), known)
    return found


def forgetting(probes, n):
    """Loss on held-out clips of A after B minus before B: probes [(clips seen, loss), ...], n clips a phase."""
    before = [loss for seen, loss in probes if seen <= n][-1]
    after = [loss for seen, loss in probes if seen <= 2 * n][-1]
    return after - before


def against_frozen(row, frozen, bound, known):
    """
    The figures that compare a row with the model's own frozen row, with the oracle's, `bound`, or None, and with the one
    that knows the push, `known`, or None.
    """
    _, b, a2 = np.split(np.array(row['loss']), 3)
    frozen_a1, frozen_b, frozen_a2 = np.split(np.array(frozen['loss']), 3)
    gain = running_mean(frozen_b - b)
    final = gain[-EARLY:].mean()
    reached = np.flatnonzero(gain >= 0.5 * final)
    found = {'t50': None}
    least = 0.01 * frozen_b.mean()
    # Half of a gain of nearly nothing would be reached with the first clip.
    if final > least and len(reached):
        found['t50'] = int(reached[0]) + 1
    if bound:
        _, bound_b, _ = np.split(np.array(bound['loss']), 3)
        gap = (frozen_b - bound_b).mean()
        if gap:
            found['gap_closed'] = (frozen_b - b).mean() / gap
    lost = frozen_b.mean() - frozen_a1.mean()
    # A share of nearly nothing would say nothing.
    if not bound and lost > least:
        found['way_back'] = (frozen_b - b).mean() / lost
    if known:
        _, known_b, _ = np.split(np.array(known['loss']), 3)
        gain_of_known = (frozen_b - known_b).mean()
        if gain_of_known > least:
            found['of_known'] = (frozen_b - b).mean() / gain_of_known
    found['return_cost'] = (a2 - frozen_a2)[:EARLY].mean()
    return found


def cell(row, key, form):
    """One cell of the table: empty where the figure has no meaning for the row."""
    if key not in row['figures']:
        return ''
    value = row['figures'][key]
    return 'never' if value is None else format(value, form)


# What the columns are, in the words of the table. X stands for the domain of the middle phase.
EXPLAINED = {
    'B_within': 'within / beyond: clips of X that slide no further / further than any training clip of A.',
    'B_first': f'1-25: the first {EARLY} clips of X.',
    'return_cost': f'return: loss minus frozen loss on the first {EARLY} clips of A₂.',
    'forgetting': 'forget: loss on held-out clips of A after X minus before X.',
    'gap_closed': "gap: share of the way from the own frozen loss on X to the oracle's.",
    'way_back': 'to A: share of the way from the own frozen loss on X to that on A₁.',
    'of_known': 'known: share of what the best constant map of the push, known in advance, gains.',
    't50': 't50: clips of X to half of the own final gain (never: no gain of 1 %).',
}


def format_table(rows, tried, shifts, checkpoint, n, middle):
    """
    The text of table.txt.

    tried: {model and method: {rate: loss}}, tuned on the domains `shifts`. checkpoint: one of those compared, which have the
    same loss and targets. n: clips a phase. middle: the domain of the middle phase.
    """
    columns = [column for column in COLUMNS if any(column[0] in row['figures'] for row in rows)]
    headings = [middle[:6] if key == 'B' else heading for key, heading, _ in columns]
    lines = [f'{"loss on the stream":<23}' + ''.join(f'{heading:>7}' for heading in headings)]
    for row in rows:
        lines.append(f'{title(row):<23}' + ''.join(f'{cell(row, key, form):>7}' for key, _, form in columns))
    steps = ', '.join(str(int(t) + 1) for t in checkpoint.targets)
    lines.append(f'\n{checkpoint.loss} L1, mean over target steps {steps}; {n} clips a phase, scored before the look-back.')
    for key, _, _ in columns:
        if key in EXPLAINED:
            lines.append(EXPLAINED[key].replace('X', middle))
    for name, losses in tried.items():
        rates = ', '.join(f'{rate:g}' for rate in losses)
        lines.append(f'Rate of {name} tuned on {", ".join(shifts)} among {rates}.')
    return '\n'.join(lines) + '\n'


# ---- files and pictures ----------------------------------------------------------------------------------------------

FILES = 'table.txt', 'results.json', 'results.csv', 'results.png', 'predictions.png', 'unfinished.pt'


def resume(unfinished, key, where):
    """
    What an interrupted run has finished, as long as everything that it depends on, in `key`, is the same.

    Returns {'key': key, 'tried': {model and method: {rate: loss}}, 'finished': {title: result of run_stream}}.
    """
    if os.path.exists(unfinished):
        kept = read_sealed(unfinished, where)
        if kept.get('key') == key:
            print(f'going on after {len(kept["finished"])} finished rows')
            return kept
        print(f'{unfinished} is of other settings, checkpoints, data or code: starting afresh')
    return {'key': key, 'tried': {}, 'finished': {}}


def results_json(knobs, checkpoints, tried, rows):
    """The text of results.json."""
    return json.dumps({
        'settings': knobs,
        'tuning': {name: {str(rate): loss for rate, loss in losses.items()} for name, losses in tried.items()},
        'checkpoints': [{'name': c.name, 'path': c.path, 'steps': c.step} for c in checkpoints],
        'rows': [{key: value for key, value in row.items() if key not in ('shown', 'state')} for row in rows],
    }, indent=1)


def results_csv(rows, beyond, n, middle):
    """The text of results.csv: the loss of every clip, n clips a phase; beyond: see figures; middle: see format_table."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(['clip', 'phase', 'beyond_A'] + [title(row) for row in rows])
    if beyond is None:
        far = [''] * (3 * n)
    else:
        far = [0] * n + [int(flag) for flag in beyond] + [0] * n
    for i in range(3 * n):
        phase = ('A1', middle, 'A2')[i // n]
        writer.writerow([i + 1, phase, far[i]] + [f'{row["loss"][i]:.6f}' for row in rows])
    return text.getvalue()


# The methods that are drawn where all were run; more lines could not be told apart.
DRAWN = 'copy', 'blank', 'frozen', 'LN-TTA', 'memory'


def drawn_rows(rows, checkpoints):
    """The rows that are drawn, with how: of two rows of a method the first, and TTA of HOPE only where there is no ViT-AC."""
    kinds = {c.name: c.predictor.sizes.model for c in checkpoints if c.name != 'oracle'}
    many = len(rows) > 10
    drawn = {}
    for row in rows:
        if many and row['method'] not in DRAWN:
            continue
        # The two guesses are no methods and drawn like frozen predictors.
        method = METHODS.get(row['method'], Frozen)
        if 'vit' in kinds.values() and kinds.get(row['model']) == 'hope' and issubclass(method, TTA):
            continue
        drawn.setdefault((row['model'], row['method']), {
            'title': title(row),
            'loss': running_mean(row['loss']),
            'probes': row['probes'],
            'shown': row['shown'],
            'bold': 'memory' in method.carries,
            'dotted': row['model'] == '',
        })
    return list(drawn.values())


def diagnosed_row(rows, n):
    """
    The diagnostics of the row with an action memory, or else of the last that carries something, of the first model that
    has one → (title, {name: values (3n,)}, reference), or None.

    The surprise is the loss over that of copying. Where there is a model of each phase, its loss is a better reference,
    because it also depends on how far the object moves.
    """
    carrying = [row for row in rows if METHODS.get(row['method'], Frozen).carries]
    if not carrying:
        return None
    first_model = [row for row in carrying if row['model'] == carrying[0]['model']]
    row = row_of(rows, carrying[0]['model'], 'memory') or first_model[-1]
    seen = {key: np.array([clip[key] for clip in row['diagnostics']]) for key in row['diagnostics'][0]}
    frozen, bound = row_of(rows, row['model'], 'frozen'), row_of(rows, 'oracle', 'frozen')
    if not frozen or not bound:
        return title(row), seen, "copy's"
    known = np.array(frozen['loss'])
    known[n:2 * n] = bound['loss'][n:2 * n]
    seen['surprise'] = row['loss'] / known
    return title(row), seen, "the phase's model"


def predictions(drawn, experiment, decoder, manifest):
    """The columns of predictions.png, {heading: pictures (clips,H,W,3)}: first and last step, what each row predicted."""
    z = experiment.stream[0][experiment.shown].cpu()
    columns = {'step 1': z[:, 0], f'step {z.shape[1]}': z[:, -1]}
    for row in drawn:
        if row['shown']:
            heading = row['title'].replace(' ', '\n', 1)
            columns[heading] = torch.stack([row['shown'][clip] for clip in experiment.shown]).cpu()
    for heading, features in columns.items():
        columns[heading] = pictures(features, decoder, manifest['grid'], manifest['patch']).numpy()
    return columns


def draw(folder, rows, checkpoints, experiment, decoder, manifest, middle):
    """results.png and, where the data set has a decoder, predictions.png. Raises ImportError without matplotlib."""
    n = len(experiment.stream[0]) // 3
    drawn = drawn_rows(rows, checkpoints)
    label = f'{checkpoints[0].loss} L1, mean of 10 clips'

    def draw_results(file):
        plots.draw_stream(file, drawn, n, label, middle, diagnosed_row(rows, n))

    def draw_predictions(file):
        plots.draw_predictions(file, predictions(drawn, experiment, decoder, manifest), middle)

    write_atomically(os.path.join(folder, 'results.png'), draw_results)
    if decoder is not None:
        write_atomically(os.path.join(folder, 'predictions.png'), draw_predictions)


# ---- the run ---------------------------------------------------------------------------------------------------------

def listed(text):
    """The items of a list separated by commas: 'a, b' → ['a', 'b']."""
    return [item.strip() for item in text.split(',') if item.strip()]


def chosen_methods(text):
    """The methods that --methods names: '' → all but the controls, 'all' → all."""
    if text == 'all':
        return list(METHODS)
    return listed(text) or [name for name, method in METHODS.items() if not method.control]


def check_settings(knobs, table):
    """Raises Refusal for knobs that cannot be run with a table of methods {name: class}; nothing is read or written."""
    check_methods(table)
    if knobs['methods'] != 'all' and set(listed(knobs['methods'])) - set(table):
        raise Refusal(f'--methods={knobs["methods"]}: allowed are {", ".join(table)}, or all')
    if knobs['shift'] == 'A':
        raise Refusal('--shift=A: the clips of the middle phase would be those of the phases before and after it')
    if {'A', 'B', knobs['shift']} & set(listed(knobs['tune_on'])):
        raise Refusal(f'--tune_on={knobs["tune_on"]}: rates tuned on the domains under test would prove nothing; '
                      'name other shifts')
    if not knobs['out']:
        raise Refusal('--out=: must name a folder for the results')
    kept, given = knobs['memory_out'], knobs['memory_in']
    if kept and given and os.path.realpath(kept) == os.path.realpath(given):
        raise Refusal(f'--memory_out={kept}: is --memory_in too; name another file, so that the run can be run again')


def check_memory_out(knobs, plans):
    """Raises Refusal where a memory is to be kept and no planned method has one."""
    carrying = ['memory' in METHODS[name].carries for rows in plans for name, rate in rows]
    if knobs['memory_out'] and not any(carrying):
        raise Refusal(f'--memory_out={knobs["memory_out"]}: none of --methods={knobs["methods"]} of {knobs["ckpt"]} has a '
                      'memory to keep')


def keep_memory(path, checkpoints, rows):
    """Write the state of the last row that has a memory, for read_memory."""
    row = [row for row in rows if row['state']['memory'] is not None][-1]
    predictor = next(checkpoint.predictor for checkpoint in checkpoints if checkpoint.name == row['model'])
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    write_sealed(path, {'sizes': vars(predictor.sizes), **row['state']})


def run_key(knobs, where, checksum, checkpoints):
    """What the rows of a run depend on, as text: knobs, device, data set, code, checkpoints, memory to start from."""
    files = [os.path.join(ROOT, file) for file in ('adapt.py', 'data.py', 'hope.py', 'model.py')]
    files += [checkpoint.path for checkpoint in checkpoints]
    if knobs['memory_in']:
        files.append(knobs['memory_in'])
    return json.dumps([{**knobs, 'out': ''}, where, checksum, *map(sha256, files)])


def write_text(path, text):
    """Write a text file atomically."""
    def write(file):
        file.write(text.encode())
    write_atomically(path, write)


def main():
    """Run every method of every checkpoint over A→B→A and write what comes out."""
    check_settings(settings, METHODS)
    where = pick_device(device)
    shifts = listed(tune_on)
    checkpoints = read_checkpoints(ckpt, oracle, where)
    splits = {'test_A': open_split(data, 'test_A'), 'shift': open_split(data, f'test_{shift}'), 'val': open_split(data, 'val')}
    check_clips(checkpoints, splits['test_A'].manifest, splits['test_A'].actions.shape[-1], data)
    check_lengths(settings, splits)
    for name in ['train'] + [f'test_{tuned}' for tuned in shifts]:
        splits[name] = open_split(data, name)
    manifest = splits['test_A'].manifest
    experiment = build_experiment(settings, splits, shifts, where)
    plans = [plan(checkpoint, chosen_methods(methods), ln_rate, bool(shifts)) for checkpoint in checkpoints]
    check_memory_out(settings, plans)
    one_clip = take(splits['test_A'], 0, 1, where)
    start = read_memory(memory_in, checkpoints[0], one_clip, where) if memory_in else None
    decoder = read_decoder(data, manifest)
    os.makedirs(out, exist_ok=True)
    claim(out, *(os.path.join(out, file) for file in FILES))

    unfinished = os.path.join(out, 'unfinished.pt')
    kept = resume(unfinished, run_key(settings, where, manifest['checksum'], checkpoints), where)
    targets = checkpoints[0].targets
    rows = guesses(experiment.stream, targets, median_scene(splits['train']).to(where))
    for checkpoint, planned in zip(checkpoints, plans):
        rows += run_checkpoint(checkpoint, planned, experiment, kept, unfinished, start, keep_state=bool(memory_out))
    if memory_out:
        keep_memory(memory_out, checkpoints, rows)

    beyond = further_than_training(splits['train'], splits['shift'], clips)
    for row in rows:
        row['figures'] = figures(row, rows, beyond)
    table = format_table(rows, kept['tried'], shifts, checkpoints[0], clips, shift)
    print('\n' + table)
    write_text(os.path.join(out, 'table.txt'), table)
    write_text(os.path.join(out, 'results.json'), results_json(settings, checkpoints, kept['tried'], rows))
    write_text(os.path.join(out, 'results.csv'), results_csv(rows, beyond, clips, shift))
    try:
        draw(out, rows, checkpoints, experiment, decoder, manifest, shift)
    except ImportError:
        print('no pictures: pip install matplotlib')
    if os.path.exists(unfinished):
        os.unlink(unfinished)
    print(f'results: {os.path.join(out, "results.png")}, predictions.png, results.csv, results.json, table.txt')


if __name__ == '__main__':
    main()
