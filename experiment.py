"""
What adapt.py puts together before it begins: checkpoints, and which clips are streamed, probed and tuned on.

    experiment = build_experiment(...)
    z, a = experiment.streams[0][0:1]       # the first clip of the first phase: z (1,T,N,D), a (1,T,A)

Everything that does not fit or is too little is refused here. Features are read when they are asked for.
"""
import os
import zlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from configurator import Refusal, listed
from data import TUBELET, no_such_split, open_split
from figures import away_phases
from hope import load
from metres import positions
from model import autocast
from support.files import MALFORMED, folder_of, verify

# ---- checkpoints -----------------------------------------------------------------------------------------------------

@dataclass
class Checkpoint:
    """
    A trained predictor and what it was trained on; targets: the target steps of its jumps, 0-based (K,). precision: the
    context in which it computes, see model.autocast. Several of a name are seeds, counted from 1.
    """
    name: str
    seed: int
    path: str
    predictor: torch.nn.Module
    loss: str
    step: int
    clip_steps: int
    targets: torch.Tensor
    precision: torch.autocast


MODELS = {'vit': 'ViT-AC', 'hope': 'HOPE'}


def read_checkpoints(paths, oracle_paths, where, dtype='float32'):
    """
    The checkpoints of --ckpt and --oracle on the device `where` → list of Checkpoint, the oracles last.

    Raises Refusal for a file that is missing, damaged or named twice, and for scores that could not be compared.
    """
    roles = [(path, '') for path in listed(paths)]
    if not roles:
        raise Refusal('--ckpt=: name a checkpoint, or several separated by commas')
    for path, count in Counter(path for path, _ in roles).items():
        if count > 1:
            raise Refusal(f'--ckpt={paths}: {path} is named twice; several checkpoints of a kind are seeds')
    roles += [(path, 'oracle') for path in listed(oracle_paths)]
    found = []
    seeds = Counter()
    for path, role in roles:
        predictor, stored = load(path, where, loss=str, step=int, clip_steps=int, jump_last=int)
        name = role or MODELS[predictor.sizes.model]
        seeds[name] += 1
        steps = stored['clip_steps']
        targets = torch.arange(steps - stored['jump_last'], steps, device=where)
        found.append(Checkpoint(name, seeds[name], path, predictor, stored['loss'], stored['step'], steps, targets,
                                autocast(where, dtype, predictor.sizes.width)))
    for name in seeds:
        if name != 'oracle' and seeds['oracle'] > 1 and seeds['oracle'] != seeds[name]:
            raise Refusal(f'--oracle={oracle_paths}: name one oracle for all seeds, or one for each of the {seeds[name]} '
                          f'of {name}')
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


def further_than_training(train, streams):
    """Which clips of the streams slide further than any training clip, a list of 0 and 1 each; None without positions."""
    splits = {split for stream in streams for split, _, _ in stream.places}
    if not train.physics or not all(split.physics for split in splits):
        return None
    furthest = travelled(train).max()
    far = {split: (travelled(split) > furthest).astype(int).tolist() for split in splits}
    return [[far[split][index] for split, index, _ in stream.places] for stream in streams]


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

# Numbers in the features of the clips of all streams that are run at once: 64 MiB.
AT_ONCE = 2 ** 24
# The same for probes, where a processor is quickest with few clips and a GPU with many.
PROBED_AT_ONCE = {'cpu': 2 ** 18}
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

    def positions(self, chosen, steps):
        """Where the objects of some clips are at the end of time steps (K,), 0-based → (clips,K,2) metres."""
        found = []
        for i in np.arange(len(self))[chosen]:
            split, index, _ = self.places[i]
            found.append(positions(split, [index]))
        return torch.cat(found).to(self.where)[:, steps]

    def source(self):
        """The split that all clips are from, and their indices in it."""
        split, _, _ = self.places[0]
        return split, [index for _, index, _ in self.places]

    @property
    def has_positions(self):
        """Whether it is known where the objects are."""
        return all(split.physics for split in {split for split, _, _ in self.places})


def batches(clips, streams=1):
    """All clips in batches (z, a) that are small enough to be predicted for so many streams at once."""
    z, _ = clips[:1]
    most = PROBED_AT_ONCE.get(z.device.type, AT_ONCE)
    size = max(1, most // (streams * z.numel()))
    for first in range(0, len(clips), size):
        yield clips[first:first + size]


def groups(streams, adapted=()):
    """The streams in groups that are small enough to be run at once; adapted: the parameters that each has of its own."""
    z, _ = streams[0][:1]
    size = max(1, AT_ONCE // max(z.numel(), sum(p.numel() for p in adapted)))
    for first in range(0, len(streams), size):
        yield streams[first:first + size]


def phases_of(text, splits):
    """The names of the phases that --phases asks for, of a data set with these splits. Raises Refusal where there is none."""
    if text == 'auto' and 'test_A' in splits:
        return ['A', 'B', 'A']
    if text == 'auto':
        return ['A1' if 'test_A1' in splits else 'val', 'B', 'A2']
    phases = listed(text)
    if not phases:
        raise Refusal('--phases=: name one domain or more, separated by commas: A,B,A')
    return phases


def domain_of(phase):
    """The world that a phase shows: its name without a number behind it (A2 is A again); val is of A, that of training."""
    if phase == 'val':
        return 'A'
    return phase.rstrip('0123456789') or phase


def first_away(domains):
    """The number, from 0, of the first phase that is not in the world of the first one; 0 where there is none."""
    return (away_phases(domains) or [0])[0]


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
    """How the phases are called: ['A', 'B', 'A'] → ['A₁', 'B', 'A₂'], and names that come once as they are."""
    visits = Counter()
    labels = []
    for phase in phases:
        visits[phase] += 1
        number = ''.join('₀₁₂₃₄₅₆₇₈₉'[int(digit)] for digit in str(visits[phase]))
        labels.append(phase + number if phases.count(phase) > 1 else phase)
    return labels


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

    clips: how many a phase has. domains: that of each phase. streams: Clips of all phases, in one order or several. probes:
    {domain: Clips} that are in no stream. probe_at: after how many clips of a stream they are scored. shown: the clips of
    the first stream whose predictions are kept. tuning: streams A→X→A. other: Clips of the first domain that is tuned on,
    None where there is none.
    """
    clips: int
    domains: list
    streams: list
    probes: dict
    probe_at: list
    shown: list
    tuning: list
    other: Clips

    @property
    def shift(self):
        """The first domain of the stream that is not home, or home where there is no other."""
        return self.domains[first_away(self.domains)]


def build_experiment(knobs, phases, shifts, splits, where):
    """
    The Experiment that the knobs ask for, of {name: Split}; shifts: what rates are tuned on. No clip is read.

    What is used twice, such as the split of both home phases, gives other clips each time. The first stream takes the first
    clips of each split, further ones draw from all that probes and tuning leave. Raises Refusal that names all splits with
    too few clips.
    """
    n, n_tune, n_probe = knobs.clips, knobs.tune_clips, knobs.probe_clips
    taken = Counter()

    def unseen(split, count):
        """The next clips of a split, with their pushes as they are."""
        first = taken[split]
        taken[split] += count
        return splits[split], range(first, first + count), 1

    first_stream = [unseen(split_of(phase), n) for phase in phases]
    kept_apart = Counter(taken)
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
    probes = {}
    domains = [domain_of(phase) for phase in phases]
    for domain in dict.fromkeys(domains):
        own = [split_of(phase) for phase in phases if domain_of(phase) == domain]
        enough = [split for split in own if len(splits[split]) - taken[split] >= n_probe]
        probes[domain] = Clips(where, unseen((enough or own[-1:])[0], n_probe))
    short = [f'{splits[split].name} has {len(splits[split])} clips, of which {count} are needed'
             for split, count in taken.items() if count > len(splits[split])]
    if short:
        raise Refusal(f'{"; ".join(short)} for stream, probes and tuning; lower --clips, --probe_clips or --tune_clips')
    streams = [Clips(where, *first_stream)]
    for number in range(2, knobs.streams + 1):
        streams.append(drawn_stream(number, phases, n, splits, kept_apart, taken, where))
    # Before the stream and at the end of each phase, too.
    probe_at = [seen for seen in range(len(phases) * n + 1) if seen % knobs.probe_every == 0 or seen % n == 0]
    # The first and the last clips of the first shift, and two from before it.
    begin = n * first_away(domains)
    shown = sorted({*range(max(0, begin - 2), begin + min(12, n)), *range(begin + max(0, n - 5), begin + n)})
    tuned = [splits[split_of(shift)] for shift in shifts if shift != 'scaled']
    other = Clips(where, (tuned[0], range(min(25, len(tuned[0]))), 1)) if tuned else None
    return Experiment(n, domains, streams, probes, probe_at, shown, tuning, other)


def drawn_stream(number, phases, n, splits, streamed, taken, where):
    """
    Stream `number` (2, 3, ...) of n clips a phase: Clips drawn at random, none of them twice.

    The first `streamed` clips of a split are those of the first stream; the next, up to `taken`, are for probes and tuning.
    """
    orders = {}
    for name in {split_of(phase) for phase in phases}:
        pool = [*range(streamed[name]), *range(taken[name], len(splits[name]))]
        random = np.random.default_rng([number, zlib.crc32(name.encode())])
        orders[name] = random.permutation(pool).tolist()
    parts = []
    for phase in phases:
        order = orders[split_of(phase)]
        parts.append((splits[split_of(phase)], order[:n], 1))
        del order[:n]
    return Clips(where, *parts)
