"""
The methods of adaptation: one short class each, and one line of METHODS.

    method = METHODS['memory'](checkpoint)            # see adapt.Checkpoint
    z_hat = method.predict(z[:, None], a[:, None])    # z (S,T,N,D), a (S,T,A): a clip of each of S streams
    method.look_back(z, a)                            # the clips have been scored: learn from them

To add a method, derive a class from Method, say in look_back() what it learns, and add its line to METHODS.
"""
import copy

import torch
import torch.nn.functional as F

from data import median_scene
from hope import CMSWriter, earned_retention
from model import LOSSES, feature_loss, repeated, teacher_forcing_loss


class Method:
    """
    What all methods have in common: a copy of the checkpoint's predictor, and how clips are predicted.

    rates: the learning rates that tuning tries, () = it has none; default: {model: the rate without tuning}.
    batched: all streams run as one batch; a method that learns by gradients adapts one stream.
    control: it is run only where it is asked for, and may know from adapt.Experiment what no method can know.
    needs_other: it needs clips of a shift to tune on. fits: whether it can run on these model.Sizes.
    """
    rates = ()
    default = {}
    batched = True
    control = False
    needs_other = False
    fits = staticmethod(lambda sizes: True)

    def __init__(self, checkpoint, rate=None, experiment=None, streams=1):
        self.rate, self.experiment, self.streams = rate, experiment, streams
        self.loss = LOSSES[checkpoint.loss]
        self.targets = checkpoint.targets
        self.precision = checkpoint.precision
        self.predictor = copy.deepcopy(checkpoint.predictor).requires_grad_(False)
        # What predicts: the predictor, or the same with written weights.
        self.net = self.predictor
        # That of every stream, as the predictor takes it.
        self.memory = None
        self.start()

    def start(self):
        """What a method needs before the first clip."""

    def predict(self, z, a, targets=None):
        """
        Predict b clips for each stream, z (S,b,T,N,D), a (S,b,T,A), from step 1 and the action alone.

        targets (K,): the steps to predict, 0-based; None for those of training → z_hat (S,b,K,N,D).
        """
        targets = self.targets if targets is None else targets
        b = z.shape[1]
        memory = repeated(self.memory, b)
        z_hat = self.loss.predict(self.net, z.flatten(0, 1), a.flatten(0, 1), targets, memory)
        # Kept, with its graph, for look_back().
        self.z_hat = z_hat.unflatten(0, (-1, b))
        return self.z_hat

    @torch.no_grad()
    def jump(self, z, push):
        """
        The last step of clips z (b,1,N,D) after pushes (b,A), as the first stream predicts it → (b,N,D).
        """
        # A rollout has an action at every step.
        a = F.pad(push[:, None], (0, 0, 0, int(self.targets[-1])))
        with self.precision:
            return self.predict(z[None], a[None], self.targets[-1:])[0, :, 0]

    def look_back(self, z, a):
        """Learn from the clips that were predicted last, one of each stream: z (S,T,N,D), a (S,T,A)."""

    def diagnostics(self):
        """Figures of the last look-back, {name: number}, as means over the streams."""
        return {}

    def losses(self, z, a):
        """Of the last clip, two scalars: the loss, with its graph, and that of the weights as trained."""
        loss = feature_loss(self.z_hat[:, 0], z[:, self.targets])
        with torch.no_grad():
            unwritten = self.loss.predict(self.predictor, z, a, self.targets)
        return loss[0], feature_loss(unwritten, z[:, self.targets])[0]


class Frozen(Method):
    """The checkpoint as it is."""


class TTA(Method):
    """
    Test-time adaptation as in tent (Wang et al., 2021): a step of Adam a clip, on its prediction's loss.
    """
    batched = False

    def start(self):
        self.parameters = [p.requires_grad_(True) for p in self.adapts(self.predictor)]
        self.optimizer = torch.optim.Adam(self.parameters, lr=self.rate)

    def look_back(self, z, a):
        loss = feature_loss(self.z_hat[:, 0], z[:, self.targets]).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()


class LNTTA(TTA):
    """TTA of the gain and bias of every LayerNorm."""
    rates = 1e-3, 3e-3, 1e-2, 3e-2
    default = {'vit': 3e-3, 'hope': 1e-2}

    @staticmethod
    def adapts(net):
        norms = [module for module in net.modules() if isinstance(module, torch.nn.LayerNorm)]
        return [p for norm in norms for p in norm.parameters()]


class FullTTA(TTA):
    """TTA of every parameter."""
    rates = 1e-5, 3e-5, 1e-4, 3e-4
    default = {'vit': 1e-5}
    fits = staticmethod(lambda sizes: sizes.model == 'vit')
    adapts = staticmethod(lambda net: net.parameters())


class CMS(Method):
    """Online writes of HOPE's CMS levels: see hope.CMSWriter."""
    rates = 3.0, 10.0, 30.0, 100.0
    default = {'hope': 10.0}
    batched = False
    fits = staticmethod(lambda sizes: sizes.model == 'hope')

    def start(self):
        self.net = CMSWriter(self.predictor, self.rate)

    def look_back(self, z, a):
        self.net.tick(*self.losses(z, a))

    def diagnostics(self):
        seen = {}
        for period, level in zip(self.net.periods, self.net.diagnostics()):
            seen |= {f'{key}, CMS every {period}': value for key, value in level.items()}
        return seen


class Memory(Method):
    """The action memory is carried from clip to clip, by one forward pass: see hope.ActionMemory."""
    fits = staticmethod(lambda sizes: sizes.action_memory)

    def look_back(self, z, a):
        self.write(z, a[:, 0])

    def write(self, z, push):
        """Show clips z (S,T,N,D) with the pushes (S,A): teacher forcing shows all steps but the last."""
        layer = self.predictor.action_memory
        layer.diagnostics = []
        state = self.memory['action'] if self.memory else None
        self.memory = {'action': layer.write(z[:, :-1], push, state)}

    def diagnostics(self):
        seen = {}
        for report in self.predictor.action_memory.diagnostics or []:
            seen |= {f'{key}, action memory': value.item() for key, value in report.items()}
        return seen


class TitanMemory(Method):
    """
    HOPE's Titan memories are carried from clip to clip, without the action memory. A clip is shown as in
    training. The rate is the share of its state that a memory keeps for the next clip.
    """
    rates = 0.05, 0.2, 0.5, 1.0
    default = {'hope': 0.05}
    fits = staticmethod(lambda sizes: sizes.model == 'hope' and sizes.mixer != 'attention')

    @torch.no_grad()
    def look_back(self, z, a):
        self.titans = [block.titan for block in self.predictor.predictor_blocks]
        for titan in self.titans:
            titan.diagnostics = []
        _, memory = teacher_forcing_loss(self.predictor, z, a, self.memory)
        self.memory = {'titan': [self.rate * state for state in memory['titan']]}

    def diagnostics(self):
        seen = {}
        for b, titan in enumerate(self.titans, 1):
            for key in titan.diagnostics[0]:
                steps = torch.stack([step[key] for step in titan.diagnostics])
                seen[f'{key}, block {b}'] = steps.mean().item()
        return seen


# ---- controls: what could refute that a memory which sees the clips is what helps

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
        with torch.no_grad():
            kept = earned_retention(loss, unwritten) * self.change
            self.change.copy_(kept - self.rate * gradient)

    def diagnostics(self):
        return {'gain, written': 1 + self.change.item()}


class WrongWorld(Memory):
    """The memory of clips of another domain, kept as it is."""
    control = True
    needs_other = True

    def start(self):
        for clip in self.experiment.other:
            z, a = self.experiment.read([clip])
            with self.precision:
                self.write(z, a[:, 0])
        self.memory = {'action': self.memory['action'].repeat(self.streams, 1, 1)}

    def look_back(self, z, a):
        """Nothing more is learned."""


class Shuffled(Memory):
    """Each clip is shown with the push of the clip before."""
    control = True
    push_before = None

    def look_back(self, z, a):
        push = a[:, 0] if self.push_before is None else self.push_before
        self.write(z, push)
        self.push_before = a[:, 0]


class NoCarry(Memory):
    """The memory is written, but not kept for the next clip."""
    control = True

    def look_back(self, z, a):
        self.write(z, a[:, 0])
        self.memory = None


class Copy(Method):
    """Predicts the first step again: a row of no model, like the next one."""
    fits = staticmethod(lambda sizes: False)

    def predict(self, z, a, targets=None):
        return z[:, :, :1].expand(-1, -1, len(self.targets), -1, -1)


class Blank(Copy):
    """Predicts an empty scene. What only learns to erase the object scores like this."""

    def start(self):
        self.scene = median_scene(self.experiment.splits['train']).to(self.targets.device)

    def predict(self, z, a, targets=None):
        return self.scene.expand(*z.shape[:2], len(self.targets), -1, -1)


METHODS = {
    'copy': Copy,
    'blank': Blank,
    'frozen': Frozen,
    'LN-TTA': LNTTA,
    'full TTA': FullTTA,
    'Titan memory': TitanMemory,
    'CMS': CMS,
    'memory': Memory,
    'gain writer': GainWriter,
    'wrong world': WrongWorld,
    'shuffled': Shuffled,
    'no carry': NoCarry,
}
