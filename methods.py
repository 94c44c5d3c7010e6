"""The methods of adaptation, a short class each. To add one, derive a class from Method, say in look_back()
what it learns, and add its line to METHODS.

    method = METHODS['world head'](checkpoint)        # see adapt.Checkpoint
    z_hat = method.predict(z, a)                      # z (S,T,N,D), a (S,T,A): the next clip of S streams
    method.look_back(z, a)                            # they have been scored: learn from them"""
import copy

import torch
import torch.nn.functional as F

from data import median_scene
from hope import CMSWriter, earned_retention
from model import LOSSES, feature_loss, teacher_forcing_loss


class Method:
    """The checkpoint as it is, and what all methods have in common: its copy, and how clips are predicted.

    rates: the learning rates that tuning tries, () = it has none; default: {model: the rate without tuning}.
    control: it is run only where it is asked for, and may know from adapt.Experiment what no method can know.
    batched: its streams run as one batch; a method that learns by gradients adapts one stream."""
    rates = ()
    default = {'vit': None, 'hope': None}
    control = False
    batched = True
    fits = classmethod(lambda method, sizes: sizes.model in method.default)    # model.Sizes it can run on

    def __init__(self, checkpoint, rate=None, experiment=None, streams=1):
        self.rate, self.experiment, self.streams = rate, experiment, streams
        self.loss = LOSSES[checkpoint.loss]
        self.targets, self.precision = checkpoint.targets, checkpoint.precision
        self.predictor = copy.deepcopy(checkpoint.predictor).requires_grad_(False)
        self.net = self.predictor    # what predicts: the same with written weights, where a method writes
        self.memory = self.predictor.start(streams)    # home, until a method writes it
        self.start()

    def start(self):
        """What a method needs before the first clip."""

    def predict(self, z, a, targets=None):
        """Clips z (S*b,T,N,D), a (S*b,T,A), b a stream, at targets (K,) from z_1, a_1 alone → (S*b,K,N,D)."""
        targets = self.targets if targets is None else targets
        # With its graph, for look_back().
        self.z_hat = self.loss.predict(self.net, z, a, targets, self.memory)
        return self.z_hat

    @torch.no_grad()
    def jump(self, z, push):
        """The last step of clips z (b,1,N,D) after pushes (b,A) → (b,N,D)."""
        a = F.pad(push[:, None], (0, 0, 0, int(self.targets[-1])))    # a rollout has one at every step
        with self.precision:
            return self.predict(z, a, self.targets[-1:])[:, 0]

    @torch.no_grad()
    def score(self, split, indices):
        """What each stream loses on clips that are not shown, a list of S means."""
        losses = []
        for first in range(0, len(indices), 16):
            z, a = self.experiment.read(split, indices[first:first + 16])
            z, a = z.repeat(self.streams, 1, 1, 1), a.repeat(self.streams, 1, 1)
            with self.precision:
                loss = feature_loss(self.predict(z, a), z[:, self.targets])
            losses.append(loss.float().view(self.streams, -1))
        return torch.cat(losses, 1).mean(1).tolist()

    def look_back(self, z, a):
        """Learn from the clips that were predicted last, one of each stream: z (S,T,N,D), a (S,T,A)."""

    def diagnostics(self):
        """Figures of the last look-back, {'name' or 'name, part': number}, as means over the streams."""
        return {}

    def losses(self, z, a):
        """Of the last clip, two scalars: the loss, with its graph, and that of the weights as trained."""
        loss = feature_loss(self.z_hat, z[:, self.targets])
        with torch.no_grad():
            unwritten = self.loss.predict(self.predictor, z, a, self.targets, self.memory)
        return loss[0], feature_loss(unwritten, z[:, self.targets])[0]


class TTA(Method):
    """As tent (Wang et al., 2021): Adam on all parameters, a step a clip. Like a memory it sees all steps."""
    steps = 1
    rates = 1e-5, 3e-5, 1e-4, 3e-4
    default = {'vit': 1e-5}
    batched = False

    def start(self):
        self.adapt(self.predictor)

    def adapt(self, *modules):
        """Adapt the parameters of these modules, which with S streams have S rows each."""
        self.parameters = [p.requires_grad_() for module in modules for p in module.parameters()]
        self.initial = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.Adam(self.parameters, lr=self.rate)

    def look_back(self, z, a):
        for step in range(self.steps):
            z_hat = self.predict(z, a) if step else self.z_hat
            forced, _ = teacher_forcing_loss(self.predictor, z, a, {})
            # A sum over the streams, so that each has its own gradient.
            loss = feature_loss(z_hat, z[:, self.targets]).sum() + len(z) * forced
            self.optimizer.zero_grad()
            loss.backward()
            with_gradient = [p for p in self.parameters if p.grad is not None]
            self.norm = self.norm_of([p.grad for p in with_gradient])
            for p in with_gradient:
                p.grad *= (1 / (self.norm + 1e-6)).clamp(max=1).view(-1, *[1] * (p.dim() - 1))
            self.optimizer.step()

    def norm_of(self, parts):
        """The norm of all that each stream has in some tensors (S*...) → (S,)."""
        return torch.cat([part.reshape(self.streams, -1) for part in parts], 1).norm(dim=1)

    @torch.no_grad()
    def diagnostics(self):
        drift = self.norm_of([p - was for p, was in zip(self.parameters, self.initial)])
        drift = drift / self.norm_of(self.initial)
        return {'gradient norm': self.norm.mean().item(), 'drift': drift.mean().item()}


class StreamNorm(torch.nn.Module):
    """A LayerNorm that has a gain and a bias for each of S streams: (S*b,...,C) → the same shape."""

    def __init__(self, norm, streams):
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = (torch.nn.Parameter(p.repeat(streams, 1)) for p in (norm.weight, norm.bias))

    def forward(self, x):
        of_streams = zip(x.chunk(len(self.weight)), self.weight, self.bias)
        return torch.cat([F.layer_norm(part, part.shape[-1:], weight, bias, self.eps)
                          for part, weight, bias in of_streams])


class LNTTA(TTA):
    """TTA of the gain and bias of every LayerNorm, of each stream its own."""
    rates = 1e-3, 3e-3, 1e-2, 3e-2
    default = {'vit': 3e-3, 'hope': 1e-2}
    batched = True

    def start(self):
        norms = {name: StreamNorm(module, self.streams) for name, module in self.predictor.named_modules()
                 if isinstance(module, torch.nn.LayerNorm)}
        for name, norm in norms.items():
            self.predictor.set_submodule(name, norm)
        self.adapt(*norms.values())


class LNTTA5(LNTTA):
    """LN-TTA with five steps a clip."""
    rates = 1e-4, 3e-4, 1e-3, 3e-3
    default = {'vit': 1e-3, 'hope': 1e-3}
    control = True
    steps = 5


class CMS(Method):
    """Online writes of HOPE's CMS levels: see hope.CMSWriter."""
    rates = 10.0, 30.0, 100.0, 300.0
    default = {'hope': 10.0}
    batched = False

    def start(self):
        self.net = CMSWriter(self.predictor, self.rate)

    def look_back(self, z, a):
        self.net.tick(*self.losses(z, a))

    def diagnostics(self):
        levels = zip(self.net.periods, self.net.diagnostics())
        return {f'{key}, every {period}': value
                for period, level in levels for key, value in level.items()}


class WorldHead(Method):
    """The world head's memory is carried from clip to clip, by forward passes: see hope.WorldHead."""
    fits = staticmethod(lambda sizes: sizes.world)

    def look_back(self, z, a):
        self.predictor.world.diagnostics = []
        self.memory = self.written(self.memory, z, a)

    def written(self, memory, z, a):
        """What a memory becomes when it is shown clips, one of each stream."""
        _, memory = teacher_forcing_loss(self.predictor, z, a, memory)
        return {'world': memory['world']}

    def diagnostics(self):
        *_, report = self.predictor.world.diagnostics or [{}]
        return {key: value.tolist() for key, value in report.items()}

    def memory_of(self, split, indices):
        """The memory of a stream that these clips of a world were shown to."""
        memory = self.predictor.start(1)
        for index in indices:
            memory = self.written(memory, *self.experiment.read(split, [index]))
        return memory


class TitanMemory(Method):
    """HOPE's Titan memories, shown clips as in training. The rate is the share that is kept for the next."""
    rates = 0.01, 0.05, 0.2, 1.0
    default = {'hope': 0.05}
    fits = staticmethod(lambda sizes: sizes.model == 'hope' and sizes.mixer != 'attention')

    def look_back(self, z, a):
        for block in self.predictor.predictor_blocks:
            block.titan.diagnostics = []
        titan = {name: self.memory[name] for name in self.memory if name == 'titan'}
        _, memory = teacher_forcing_loss(self.predictor, z, a, titan)
        self.memory = {**self.memory, 'titan': [self.rate * state for state in memory['titan']]}

    def diagnostics(self):
        steps = [block.titan.diagnostics for block in self.predictor.predictor_blocks]
        return {f'{key}, block {b}': torch.stack([step[key] for step in of_block]).mean().item()
                for b, of_block in enumerate(steps, 1) for key in of_block[0]}


# ---- controls: what could refute that a memory which sees the clips is what helps --------------------------
class GainWriter(Method):
    """One number by which every push is multiplied, written by the rule of the CMS, for any model."""
    rates = 10.0, 20.0, 40.0, 80.0
    default = {'vit': 20.0, 'hope': 20.0}
    batched = False
    control = True

    def start(self):
        self.change = torch.zeros((), device=self.targets.device, requires_grad=True)

    def predict(self, z, a, targets=None):
        return super().predict(z, a * (1 + self.change), targets)

    def look_back(self, z, a):
        loss, unwritten = self.losses(z, a)
        gradient, = torch.autograd.grad(loss.square() / 2, self.change)
        kept = earned_retention(loss, unwritten) * self.change
        self.change = (kept - self.rate * gradient).detach().requires_grad_()

    def diagnostics(self):
        return {'gain': 1 + self.change.item()}


class WorldsKnown(WorldHead):
    """It is told when the world changes, and which it is then: what any memory could reach."""
    control = True

    def start(self):
        worlds = [self.memory_of(*self.experiment.probes[domain]) for domain in self.experiment.domains]
        # One for each clip of the stream.
        self.memories = (world for world in worlds for _ in range(self.experiment.clips))
        self.memory = next(self.memories)

    def look_back(self, z, a):
        self.memory = next(self.memories, self.memory)


class WrongWorld(WorldsKnown):
    """The memory of clips of another domain, kept as it is."""

    def start(self):
        (split, _), *_ = self.experiment.other
        self.memory = self.memory_of(split, [index for _, index in self.experiment.other])
        self.memories = iter(())


class Shuffled(WorldHead):
    """Each clip is shown with the push of the clip before."""
    control = True
    before = None

    def look_back(self, z, a):
        super().look_back(z, a if self.before is None else self.before)
        self.before = a


class NoCarry(WorldHead):
    """The memory is written, but not kept for the next clip."""
    control = True

    def look_back(self, z, a):
        super().look_back(z, a)
        self.memory = self.predictor.start(self.streams)


class Copy(Method):
    """Predicts the first step again: a row of no model, like the next one."""
    default = {}

    def predict(self, z, a, targets=None):
        return z[:, [0] * len(self.targets)]


class Blank(Copy):
    """Predicts an empty scene. What only learns to erase the object scores like this."""

    def start(self):
        self.scene = median_scene(self.experiment.splits['train']).to(self.targets.device)

    def predict(self, z, a, targets=None):
        return self.scene.expand_as(super().predict(z, a))


METHODS = {
    'copy': Copy,
    'blank': Blank,
    'frozen': Method,
    'LN-TTA': LNTTA,
    'LN-TTA x5': LNTTA5,
    'full TTA': TTA,
    'Titan memory': TitanMemory,
    'CMS': CMS,
    'world head': WorldHead,
    'gain writer': GainWriter,
    'worlds known': WorldsKnown,
    'wrong world': WrongWorld,
    'shuffled': Shuffled,
    'no carry': NoCarry,
}
