"""
What adapt.py puts together before it begins: checkpoints, and which clips are streamed, probed and tuned on.

    experiment = build_experiment(...)
    z, a = experiment.stream[0:1]           # the first clip of the first phase: z (1,T,N,D), a (1,T,A)

Everything that does not fit or is too little is refused here. Features are read when they are asked for.
"""
import os
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from configurator import Refusal, listed
from data import TUBELET, no_such_split, open_split
from hope import load
from model import autocast
from support.files import MALFORMED, folder_of, verify

# ---- checkpoints -----------------------------------------------------------------------------------------------------

@dataclass
class Checkpoint:
    """
    A trained predictor and what it was trained on; targets: the target steps of its jumps, 0-based (K,). precision: the
    context in which it computes, see model.autocast.
    """
    name: str
    path: str
    predictor: torch.nn.Module
    loss: str
    step: int
    clip_steps: int
    targets: torch.Tensor
    precision: torch.autocast


MODELS = {'vit': 'ViT-AC', 'hope': 'HOPE'}


def read_checkpoints(paths, oracle_path, where, dtype='float32'):
    """
    The checkpoints of --ckpt and --oracle on the device `where` → list of Checkpoint, the oracle last.

    Raises Refusal for a file that is missing or damaged, and for scores that could not be compared.
    """
    roles = [(path, '') for path in listed(paths)]
    if not roles:
        raise Refusal('--ckpt=: name a checkpoint, or several separated by commas')
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
        found.append(Checkpoint(name, path, predictor, stored['loss'], stored['step'], steps, targets,
                                autocast(where, dtype)))
    for checkpoint in found:
        if (checkpoint.loss, len(checkpoint.targets)) != (found[0].loss, len(found[0].targets)):
            raise Refusal(f'{paths}: trained with different losses or target steps, so their scores cannot be compared')
    return found


def check_clips(checkpoints, splits, name):
    """Raises Refusal, which names all that do not fit, unless the checkpoints fit the splits of the data set `name`."""
    example = next(iter(splits.values()))
    steps, _, size = example.manifest['shape']
    grid = example.manifest['grid']
    numbers = example.actions.shape[-1]
    several = [split.name for split in splits.values() if split.several_pushes]
    wrong = []
    for checkpoint in checkpoints:
        sizes = checkpoint.predictor.sizes
        if (checkpoint.clip_steps, sizes.action_dim) != (steps, numbers):
            wrong.append(f'{checkpoint.path} was trained on clips of {checkpoint.clip_steps} steps with actions of '
                         f'{sizes.action_dim} numbers, but data set {name} has {steps} steps and {numbers} numbers')
        if (sizes.feature_dim, list(sizes.grid)) != (size, grid):
            wrong.append(f'{checkpoint.path} was trained on features of size {sizes.feature_dim} on a grid '
                         f'{sizes.grid}, but data set {name} has {size} on {tuple(grid)}')
        if sizes.state_dim:
            wrong.append(f'{checkpoint.path} takes states, which are not known before a clip is seen')
        if several and checkpoint.loss == 'jump':
            wrong.append(f'{checkpoint.path} jumps, which takes one push a clip; {several[0]} has clips with several')
    if wrong:
        raise Refusal('; '.join(wrong))


def travelled(split):
    """Displacement in metres over each clip, (clips,)."""
    position = split.physics['position']
    return np.linalg.norm(position[:, -1] - position[:, 0], axis=1)


def further_than_training(train, b, n):
    """Which of the first n clips of B slide further than any training clip, n booleans; None without positions."""
    if not b.physics:
        return None
    return (travelled(b)[:n] > travelled(train).max()).tolist()


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


# ---- clips -----------------------------------------------------------------------------------------------------------

# Numbers in the features of the clips that are scored at once: 64 MiB.
AT_ONCE = 2 ** 24
# Without another shift, rates are tuned on clips whose pushes are divided by these. They move further than the push says.
SCALED = 1.5, 2.0


class Clips:
    """
    Clips of some splits, in order, read when they are asked for: clips[3:5] → z (2,T,N,D), a (2,T,A), on a device.

    parts: (split, indices of its clips, number by which their pushes are divided).
    """

    def __init__(self, where, *parts):
        self.where = where
        self.places = [(split, index, divisor) for split, indices, divisor in parts for index in indices]

    def __len__(self):
        return len(self.places)

    def __getitem__(self, chosen):
        """chosen: a slice, or a list of numbers."""
        features, pushes = [], []
        for i in np.arange(len(self))[chosen]:
            split, index, divisor = self.places[i]
            z, a = split[[index]]
            features.append(z)
            pushes.append(a / divisor)
        return torch.cat(features).to(self.where), torch.cat(pushes).to(self.where)


def batches(clips):
    """All clips in batches (z, a) of bounded size."""
    z, _ = clips[:1]
    size = max(1, AT_ONCE // z.numel())
    for first in range(0, len(clips), size):
        yield clips[first:first + size]


def phases_of(text, splits):
    """
    The names of the three phases that --phases asks for, of a data set with these splits.

    Raises Refusal unless they are three, with a shift in the middle.
    """
    if text == 'auto' and 'test_A' in splits:
        return ['A', 'B', 'A']
    if text == 'auto':
        return ['A1' if 'test_A1' in splits else 'val', 'B', 'A2']
    phases = listed(text)
    if len(phases) != 3:
        raise Refusal(f'--phases={text}: must be three names, home, shift, home again: A,B,A')
    if phases[1] in (phases[0], phases[2]):
        raise Refusal(f'--phases={text}: the shift in the middle is the world of the phase before or after it')
    return phases


def tuned_on(text, phases, splits):
    """The shifts that --tune_on asks for, of a data set with these splits. Raises Refusal for those under test."""
    if text == 'auto':
        return ['C'] if 'test_C' in splits and 'C' not in phases else ['scaled']
    shifts = listed(text)
    if {'A', 'B', 'val', *phases} & set(shifts):
        raise Refusal(f'--tune_on={text}: rates tuned on the domains under test would prove nothing; name other shifts')
    return shifts


def split_of(phase):
    """The split that the clips of a phase come from."""
    return 'val' if phase == 'val' else f'test_{phase}'


def labels_of(phases):
    """How the phases are called: ['A', 'B', 'A'] → ['A₁', 'B', 'A₂'], and other names as they are."""
    first, shift, last = phases
    return [f'{first}₁', shift, f'{last}₂'] if first == last else phases


def open_splits(name, wanted, manifest):
    """Splits of a data set → {name: Split}. Raises Refusal that names all that it lacks."""
    missing = [split for split in wanted if split not in manifest['splits']]
    if missing:
        raise Refusal(no_such_split(name, missing, manifest))
    return {split: open_split(name, split) for split in wanted}


@dataclass
class Experiment:
    """
    What every method goes through.

    stream: Clips of the three phases. probes: {'A': Clips, 'B': Clips} of home and shift that are not in the stream;
    home: the phase whose split those of home are from. probe_at: after how many clips of the stream they are scored.
    shown: the clips of the stream whose predictions are kept. tuning: streams A→X→A. other: Clips of the first domain
    that is tuned on, None where there is none.
    """
    stream: Clips
    probes: dict
    home: str
    probe_at: set
    shown: list
    tuning: list
    other: Clips


def build_experiment(knobs, phases, shifts, splits, where):
    """
    The Experiment that the knobs ask for, of {name: Split}; shifts: what rates are tuned on. No clip is read.

    What is used twice, such as the split of both home phases, gives other clips each time. Raises Refusal that names
    all splits with too few clips.
    """
    n, n_tune = knobs.clips, knobs.tune_clips
    taken = Counter()

    def unseen(split, count):
        """The next clips of a split, with their pushes as they are."""
        first = taken[split]
        taken[split] += count
        return splits[split], range(first, first + count), 1

    stream = [unseen(split_of(phase), n) for phase in phases]
    tuning = []
    if shifts:
        start, end = unseen('val', n_tune), unseen('val', n_tune)
    for shift in shifts:
        if shift == 'scaled':
            split, indices, _ = unseen('val', 2 * n_tune)
            middles = [(split, indices, divisor) for divisor in SCALED]
        else:
            split = splits[split_of(shift)]
            middles = [(split, range(min(2 * n_tune, len(split))), 1)]
        tuning += [Clips(where, start, middle, end) for middle in middles]
    left = {phase: len(splits[split_of(phase)]) - taken[split_of(phase)] for phase in phases}
    first, shift, last = phases
    home = first if left[first] >= knobs.probe_clips else last
    probes = {'A': Clips(where, unseen(split_of(home), knobs.probe_clips)),
              'B': Clips(where, unseen(split_of(shift), knobs.probe_clips))}
    short = [f'{splits[split].name} has {len(splits[split])} clips, of which {count} are needed'
             for split, count in taken.items() if count > len(splits[split])]
    if short:
        raise Refusal(f'{"; ".join(short)} for stream, probes and tuning; lower --clips, --probe_clips or --tune_clips')
    # At the end of each phase, too.
    probe_at = {seen for seen in range(1, 3 * n + 1) if seen % knobs.probe_every == 0 or seen % n == 0}
    # The last clips of the shift.
    shown = list(range(2 * n - min(5, n), 2 * n))
    domains = [splits[split_of(shift)] for shift in shifts if shift != 'scaled']
    other = Clips(where, (domains[0], range(min(25, len(domains[0]))), 1)) if domains else None
    return Experiment(Clips(where, *stream), probes, home, probe_at, shown, tuning, other)
