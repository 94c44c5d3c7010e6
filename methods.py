"""
The methods of adaptation: one class each, and one line of METHODS.

    method = METHODS['memory'](checkpoint)          # checkpoint: see experiment.read_checkpoints
    z_hat = method.predict(z[:, None], a[:, None])  # z (S,T,N,D), a (S,T,A): the next clip of each of S streams
    method.look_back(z, a)                          # the clips have been scored: learn from them

A method runs along S streams at once. Each stream has its own memory and its own adapted weights, and never sees another.
"""
import copy
import warnings

import numpy as np
import torch
import torch.nn.functional as F

from configurator import Refusal
from hope import CMSWriter, earned_retention, per_stream
from model import feature_loss, rollout, teacher_forcing_loss

# Attention with the weights of several streams has no kernel of its own, which torch says at length.
warnings.filterwarnings('ignore', message='There is a performance drop because we have not yet implemented the batching rule')


def predict_targets(net, loss, targets, z, a, memory=None):
    """
    Predict the target steps of clips from step 1 and the action alone, as the checkpoint's loss ('jump' or 'rollout') did.

    z (B,T,N,D), a (B,T,A), targets (K,) 0-based; memory: a list of tensors (B,...) or None → z_hat (B,K,N,D).
    """
    B, K = len(z), len(targets)
    if loss == 'rollout':
        return rollout(net, z, a, int(targets.max()), memory)[:, targets - 1]
    # One row for each clip and target step.
    first = z[:, :1].repeat_interleave(K, 0)                           # (B*K,1,N,D)
    push = a[:, :1].repeat_interleave(K, 0)                            # (B*K,1,A)
    if memory is not None:
        memory = [state.repeat_interleave(K, 0) for state in memory]
    z_hat, _ = net(first, push, tau=targets.repeat(B), memory=memory)
    return z_hat.unflatten(0, (B, K))


class Method:
    """
    What the methods have in common: a copy of the checkpoint's predictor, and how clips are predicted.

    To add a method, derive a class with these members and add its line to METHODS:

        rates            the learning rates that are tried; () = it has none
        adapts(net)      the parameters of net that change along a stream; none if it is left out
        look_back(z, a)  learn from the clips that were predicted last, one of each stream: z (S,T,N,D) and a (S,T,A)

    models: those that it can adapt. default: {model: the rate without tuning}. knob: the name of the knob that sets it.
    carries: what state() hands to a later run, which gets it as `start`. learns: False where all streams predict the same for
    ever. control: it is run only where it is asked for, and may look at the Experiment to know what a method cannot know
    (None in tuning).

    rate: a number, or a tensor with one for each of the S `streams`.
    """
    models = 'vit', 'hope'
    default = {}
    knob = ''
    carries = ()
    learns = True
    control = False

    @classmethod
    def fits(cls, sizes):
        """Whether the method can run on a predictor of these sizes."""
        return sizes.model in cls.models

    def __init__(self, checkpoint, rate=None, start=None, experiment=None, streams=1):
        self.loss, self.targets, self.precision = checkpoint.loss, checkpoint.targets, checkpoint.precision
        self.predictor = copy.deepcopy(checkpoint.predictor).requires_grad_(False)
        self.streams = streams
        self.rate = rate
        chosen = {id(p) for p in self.adapts(self.predictor)}
        # The adapted parameters as they were trained, {name: (...)}, and those of each stream, {name: (S,...)}.
        self.trained = {name: p for name, p in self.predictor.named_parameters() if id(p) in chosen}
        self.adapted = {name: p.repeat(streams, *[1] * p.dim()) for name, p in self.trained.items()}
        self.adapted = {name: p.requires_grad_(True) for name, p in self.adapted.items()}
        self.memory = start['memory'] if start and 'memory' in self.carries else None

    @staticmethod
    def adapts(net):
        """The parameters of net that change along the stream."""
        return []

    def predict(self, z, a, targets=None):
        """
        Predict b clips for each stream, z (S,b,T,N,D), a (S,b,T,A), from step 1 and the action alone.

        targets (K,): the steps to predict, 0-based; None for those of training → z_hat (S,b,K,N,D).
        """
        targets = self.targets if targets is None else targets
        # Kept, with its graph, for look_back().
        self.z_hat = self.predict_with(self.adapted, z, a, targets)
        return self.z_hat

    def predict_with(self, adapted, z, a, targets):
        """predict(), with these weights of each stream, {name: (S,...)}, in place of the trained ones."""
        def of_one_stream(weights, z, a):
            def net(*args, **kwargs):
                return torch.func.functional_call(self.predictor, weights, args, kwargs)
            return predict_targets(net, self.loss, targets, z, a)
        if adapted and self.streams > 1:
            return torch.vmap(of_one_stream)(adapted, z, a)
        if adapted:
            only = {name: p.squeeze(0) for name, p in adapted.items()}
            return of_one_stream(only, z[0], a[0])[None]
        # All streams have the same weights, so their clips form one batch.
        S, b = z.shape[:2]
        memory = self.memory
        if memory is not None:
            memory = [state.repeat_interleave(b, 0) for state in memory]
        z_hat = predict_targets(self.predictor, self.loss, targets, z.flatten(0, 1), a.flatten(0, 1), memory)
        return z_hat.unflatten(0, (S, b))

    @torch.no_grad()
    def jump(self, z, a):
        """The last step of clips z (b,1,N,D), a (b,1,A), as the first stream predicts it by now → (b,N,D)."""
        # A rollout has an action at every step.
        a = F.pad(a, (0, 0, 0, int(self.targets[-1])))
        with self.precision:
            return self.predict(z[None], a[None], self.targets[-1:])[0, :, 0]

    def losses(self, z, a):
        """The loss of each stream's last clip, with its graph, and that of the unwritten predictor, (S,) both."""
        loss = feature_loss(self.z_hat[:, 0], z[:, self.targets])
        with torch.no_grad():
            unwritten = predict_targets(self.predictor, self.loss, self.targets, z, a, self.memory)
            initial_loss = feature_loss(unwritten, z[:, self.targets])
        return loss, initial_loss

    def diagnostics(self):
        """Figures of the last look-back, {name: number}, as means over the streams."""
        return {}

    def state(self):
        """What a later run can start from."""
        return {'memory': self.memory, 'cms': None}


class Frozen(Method):
    """The checkpoint as it is."""
    rates = ()
    learns = False

    def look_back(self, z, a):
        """Nothing is learned."""


class TTA(Method):
    """Test-time adaptation of some parameters: one step of Adam a clip, on the loss of the clip's prediction."""

    def __init__(self, checkpoint, rate, start=None, experiment=None, streams=1):
        super().__init__(checkpoint, rate, start, experiment, streams)
        # What Adam has added so far, at a learning rate of 1: every stream may have a rate of its own.
        self.steps = {name: torch.zeros_like(p) for name, p in self.adapted.items()}
        self.optimizer = torch.optim.Adam(self.steps.values(), lr=1.0)

    def look_back(self, z, a):
        loss = feature_loss(self.z_hat[:, 0], z[:, self.targets])
        # Of parameters that no prediction depends on, the gradient is zero.
        gradients = torch.autograd.grad(loss.sum(), list(self.adapted.values()), allow_unused=True, materialize_grads=True)
        # Clipped to a norm of 1 in each stream.
        squares = [gradient.flatten(1).square().sum(1) for gradient in gradients]
        norm = torch.stack(squares).sum(0).sqrt()                      # (S,)
        clipping = (1 / (norm + 1e-6)).clamp(max=1)
        for step, gradient in zip(self.steps.values(), gradients):
            step.grad = per_stream(clipping, gradient) * gradient
        self.optimizer.step()
        for name, step in self.steps.items():
            self.adapted[name] = (self.trained[name] + per_stream(self.rate, step) * step).requires_grad_(True)


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
        """Show clips z (S,T,N,D) with the pushes (S,A) to the action memory: teacher forcing shows all steps but the last."""
        layer = self.predictor.action_memory
        layer.diagnostics = []
        state = self.memory[0] if self.memory else None
        self.memory = [layer.write(z[:, :-1], push, state)]

    def diagnostics(self):
        """What the memory reported of the clips."""
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

    def __init__(self, checkpoint, rate, start=None, experiment=None, streams=1):
        super().__init__(checkpoint, rate, start, experiment, streams)
        self.titans = [block.titan for block in self.predictor.predictor_blocks]

    @classmethod
    def fits(cls, sizes):
        return super().fits(sizes) and sizes.mixer != 'attention'

    def look_back(self, z, a):
        for titan in self.titans:
            titan.diagnostics = []
        with torch.no_grad():
            _, memory = teacher_forcing_loss(self.predictor, z, a, self.memory)
        self.memory = [per_stream(self.rate, state) * state for state in memory]
        if self.predictor.action_memory is not None:
            self.memory[0] = self.predictor.action_memory.start(self.streams)

    def diagnostics(self):
        """What each block's memory reported of the clips, as the mean over their steps."""
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

    def __init__(self, checkpoint, rate, start=None, experiment=None, streams=1):
        super().__init__(checkpoint, rate, start, experiment, streams)
        self.writer = CMSWriter(self.predictor, rate, streams)
        if start and start['cms']:
            self.writer.load(start['cms'])
        self.adapted = self.writer.weights

    @staticmethod
    def adapts(net):
        return [p for name, p in net.named_parameters() if '.cms.levels.' in name]

    def look_back(self, z, a):
        self.writer.tick(*self.losses(z, a))
        self.adapted = self.writer.weights

    def diagnostics(self):
        """What each level reports, fast to slow."""
        seen = {}
        for period, level in zip(self.writer.periods, self.writer.diagnostics()):
            for key, value in level.items():
                seen[f'{key}, CMS every {period}'] = value
        return seen

    def state(self):
        return {'memory': self.memory, 'cms': self.writer.state()}


# ---- controls: what could refute that a memory which sees the clips is what helps --------------------------------------

class GainWriter(Method):
    """One number by which every push is multiplied, written by the rule of the CMS, for any model."""
    rates = 10.0, 20.0, 40.0, 80.0
    default = {'vit': 20.0, 'hope': 20.0}
    knob = 'gain_rate'
    control = True

    def __init__(self, checkpoint, rate, start=None, experiment=None, streams=1):
        super().__init__(checkpoint, rate, start, experiment, streams)
        self.change = torch.zeros(streams, device=self.targets.device, requires_grad=True)

    def predict(self, z, a, targets=None):
        return super().predict(z, a * per_stream(1 + self.change, a), targets)

    def look_back(self, z, a):
        loss, initial_loss = self.losses(z, a)
        gradient, = torch.autograd.grad((loss.square() / 2).sum(), self.change)
        with torch.no_grad():
            kept = earned_retention(loss, initial_loss) * self.change
            self.change.copy_(kept - per_stream(self.rate, gradient) * gradient)

    def diagnostics(self):
        return {'gain, written': 1 + self.change.mean().item()}


class PushKnown(Memory):
    """
    The best constant map of the push in the first other world of the stream, known in advance: what any memory of the push
    could reach there.

    It is fitted to the probes, so what it loses on them says nothing.
    """
    control = True
    carries = ()

    def __init__(self, checkpoint, rate=None, start=None, experiment=None, streams=1):
        super().__init__(checkpoint, streams=streams)
        self.worlds = np.repeat(experiment.domains, experiment.clips)
        self.world = experiment.shift
        known = best_map(checkpoint, experiment.probes[self.world])
        self.known = known.repeat(streams, 1, 1)
        self.seen = 0

    def look_back(self, z, a):
        self.seen += 1
        there = self.seen < len(self.worlds) and self.worlds[self.seen] == self.world
        self.memory = [self.known] if there else None

    def diagnostics(self):
        return {}


class WrongWorld(Memory):
    """The memory of clips of another domain, kept as it is."""
    control = True
    carries = ()

    def __init__(self, checkpoint, rate=None, start=None, experiment=None, streams=1):
        super().__init__(checkpoint, streams=streams)
        with self.precision:
            for i in range(len(experiment.other)):
                z, a = experiment.other[i:i + 1]
                self.write(z, a[:, 0])
        self.memory = [state.repeat(streams, 1, 1) for state in self.memory]

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
        memory = [layer.state_of(M).expand(len(z), -1, -1)]
        with checkpoint.precision:
            z_hat = predict_targets(net, checkpoint.loss, checkpoint.targets, z, a, memory)
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
