"""
A→B→A: how a trained predictor adapts when the physics changes, and what it forgets.

    python adapt.py --ckpt=out/hope.pt                       every method that this checkpoint can do
    python adapt.py --ckpt=out/hope.pt,out/vit.pt            compared in one table

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

import numpy as np
import torch

import data as clip_data
from configurator import ROOT, Refusal, configure
from hope import CMSWriter, load
from model import pick_device, rollout, teacher_forcing_loss
from support.files import MALFORMED, claim, folder_of, read_sealed, sha256, verify, write_atomically, write_sealed

# what to run
ckpt = 'out/hope.pt'     # checkpoint, or several separated by commas
data = 'slide'           # the data set whose test splits make the stream
clips = 200              # clips per phase [1..]
out = 'out/aba'          # folder for the results
# the methods
ln_rate = 1e-4           # LN-TTA's untuned, conservative learning rate [0..]
methods = ''             # run only these, separated by commas, as they are called in the table; '' = all
tune_on = 'C'            # domains whose streams A→X→A choose the learning rates; '' = leave tuned methods out
tune_clips = 25          # clips per phase of the tuning streams [1..]
oracle = ''              # checkpoint fine-tuned on other clips of B: the bound that gaps are measured against
memory_in = ''           # start HOPE's memory and CMS from this file instead of fresh
memory_out = ''          # keep HOPE's memory and CMS, as they are at the end of the stream, in this file
# what to measure
probe_clips = 200        # clips of the held-out probe sets of A and of B [1..]
probe_every = 100        # clips of the stream between two probes [1..]
device = 'auto'          # auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps or cpu
settings = configure(globals())
device = pick_device(device)

GRIDS = {                        # learning rates tried for each method
    'LN-TTA': (1e-3, 3e-3, 1e-2, 3e-2),
    'full TTA': (1e-5, 3e-5, 1e-4, 3e-4),
    'action TTA': (1e-3, 3e-3, 1e-2, 3e-2),
    'CMS': (3.0, 10.0, 20.0, 40.0),                                    # of memory + CMS too
}
METHODS = 'frozen', 'LN-TTA', 'action TTA', 'full TTA', 'memory', 'CMS', 'memory + CMS'
chosen = [method.strip() for method in methods.split(',')] if methods else METHODS
if set(chosen) - set(METHODS):
    raise Refusal(f'--methods={methods}: allowed are {", ".join(METHODS)}')
TUNE_ON = [domain.strip() for domain in tune_on.split(',') if domain.strip()]
if {'A', 'B'} & set(TUNE_ON):
    raise Refusal(f'--tune_on={tune_on}: rates tuned on the domains under test would prove nothing; name other shifts')


# ---- scoring and methods -------------------------------------------------------------------------------------------

def predict(predictor, trained_on, targets, z, a, memory=None):
    """
    Prediction and loss of clips from step 1 and the action alone, for each target step (0-based tensor (K,)).

    z (B,T,N,D), a (B,T,A); memory of one clip is shared by all. → z_hat (B,K,N,D), loss (B,) as the mean over targets.
    """
    B, K = len(z), len(targets)
    if trained_on == 'rollout':
        if memory is not None:
            memory = [m.expand(B, *m.shape[1:]) for m in memory]
        z_hat = rollout(predictor, z, a, int(targets.max()), memory)[:, targets - 1]
    else:
        if memory is not None:
            memory = [m.expand(B * K, *m.shape[1:]) for m in memory]
        first, push = z[:, :1].repeat_interleave(K, 0), a[:, :1].repeat_interleave(K, 0)
        z_hat = predictor(first, push, tau=targets.repeat(B), memory=memory)[0].unflatten(0, (B, K))
    return z_hat, (z_hat - z[:, targets]).abs().mean((1, 2, 3))


def layer_norm_parameters(predictor):
    """The affine parameters of every LayerNorm: what LN-TTA adapts."""
    norms = [m for m in predictor.modules() if isinstance(m, torch.nn.LayerNorm)]
    return [p for m in norms for p in m.parameters()]


def run_stream(checkpoint, method, rate, stream, probes=None, label=None, start=None):
    """
    Run one method over a stream of clips, test-then-train.

    checkpoint: a row of `checkpoints`; stream: (z, a) with z (n,T,N,D); probes: {'A': (z, a), 'B': (z, a)}; start: an
    earlier result's `state`. Returns a dict: loss (n,), seconds per clip, probes {name: [(clip, loss), ...]}, diagnostics
    [{...} per clip], state (HOPE's memory and CMS at the end), and shown (n_shown,N,D), the predictions of the last step
    for the clips in SHOWN.
    """
    predictor = copy.deepcopy(checkpoint['predictor'])
    trained_on, targets = checkpoint['loss'], checkpoint['targets']
    z, a = stream
    result = {'loss': [], 'seconds': [], 'probes': {name: [] for name in probes or {}}, 'diagnostics': [], 'shown': {}}
    memory, learned, optimizer, writer = None, [], None, None
    carries, writes = method.startswith('memory'), method.endswith('CMS')
    if method == 'LN-TTA':
        learned = layer_norm_parameters(predictor)
    elif method == 'action TTA':
        learned = list(predictor.action_encoder.parameters())
    elif method == 'full TTA':
        learned = list(predictor.parameters())
    elif writes:
        writer = CMSWriter(predictor, rate)
        for log_rate in writer.log_rates.values():
            log_rate.requires_grad_(False)                             # else the graph of every write so far would be kept
    if start:
        memory = start['memory'] if carries else None
        if writer and start['cms']:
            writer.load(start['cms'])
    if learned:
        predictor.requires_grad_(False)
        for p in learned:
            p.requires_grad_(True)
        optimizer = torch.optim.Adam(learned, lr=rate)
    titans = [block.titan for block in predictor.predictor_blocks] if carries else []
    net = writer or predictor

    def probe(seen):
        with torch.no_grad():
            for name, (pz, pa) in (probes or {}).items():
                result['probes'][name].append((seen, predict(net, trained_on, targets, pz, pa, memory)[1].mean().item()))

    probe(0)
    for i in (range(len(z)) if label is None else clip_data.progress(range(len(z)), label)):
        clock = time.perf_counter()
        z_i, a_i = z[i:i + 1], a[i:i + 1]
        with torch.set_grad_enabled(bool(learned or writer)):
            z_hat, loss = predict(net, trained_on, targets, z_i, a_i, memory)
        result['loss'].append(loss.item())                             # scored; only now is the clip shown
        if i in SHOWN:
            result['shown'][i] = z_hat[0, -1].detach()
        if optimizer:
            loss.sum().backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if writer:
            with torch.no_grad():
                initial = predict(predictor, trained_on, targets, z_i, a_i, memory)[1]
            writer.tick(loss, initial)
        if carries:
            for titan in titans:
                titan.diagnostics = []
            with torch.no_grad():
                memory = teacher_forcing_loss(net, z_i, a_i, memory)[1]  # shown as in training
        result['seconds'].append(time.perf_counter() - clock)
        copied = (z_i[:, :1] - z_i[:, targets]).abs().mean().item()
        seen = {'surprise': loss.item() / max(copied, 1e-12)}          # the share of what changed that was not foreseen
        for b, titan in enumerate(titans):
            seen |= {f'{key}, block {b + 1}': float(np.mean([step[key].item() for step in titan.diagnostics]))
                     for key in titan.diagnostics[0]}
            titan.diagnostics = None
        for period, level in zip(predictor.sizes.cms_periods, writer.diagnostics() if writer else ()):
            seen |= {f'{key}, CMS every {period}': value for key, value in level.items()}
        result['diagnostics'].append(seen)
        if probes and ((i + 1) % probe_every == 0 or (i + 1) % clips == 0):  # at the end of each phase, too
            probe(i + 1)
    result['state'] = {'memory': memory, 'cms': writer and writer.state()}
    return result


def tune(checkpoint, method):
    """Mean loss of every rate of the method's grid over A→X→A for each X in TUNE_ON → {rate: loss}."""
    tried = {}
    for rate in clip_data.progress(GRIDS[method], f'tuning {checkpoint["name"]} {method}', 'rates'):
        tried[rate] = float(np.mean([run_stream(checkpoint, method, rate, stream)['loss'] for stream in tuning_streams]))
    return tried


# ---- checkpoints and clips -----------------------------------------------------------------------------------------

NAMES = {'vit': 'ViT-AC', 'hope': 'HOPE'}
checkpoints = []
for path, role in [(path, '') for path in ckpt.split(',')] + [(oracle, 'oracle')] * bool(oracle):
    path = path.strip()
    predictor, stored = load(path, device, loss=str, step=int, clip_steps=int, jump_last=int)
    name = role or NAMES[predictor.sizes.model]
    if any(name == c['name'] for c in checkpoints):
        name = f'{name} {len(checkpoints) + 1}'
    steps = stored['clip_steps']
    checkpoints.append({'name': name, 'path': path, 'predictor': predictor, 'loss': stored['loss'], 'step': stored['step'],
                        'clip_steps': steps, 'targets': torch.arange(steps - stored['jump_last'], steps, device=device)})
test_a, test_b, validation = (clip_data.open_split(data, s) for s in ('test_A', 'test_B', 'val'))
(T, N, D), A = test_a.manifest['shape'], test_a.actions.shape[-1]
for c in checkpoints:
    sizes = c['predictor'].sizes
    if (c['clip_steps'], sizes.action_dim) != (T, A):
        raise Refusal(f'{c["path"]} was trained on clips of {c["clip_steps"]} steps with actions of {sizes.action_dim} '
                      f'numbers, but data set {data} has {T} steps and {A} numbers')
    if (sizes.feature_dim, list(sizes.grid)) != (D, test_a.manifest['grid']):
        raise Refusal(f'{c["path"]} was trained on features of size {sizes.feature_dim} on a grid {sizes.grid}, '
                      f'but data set {data} has {D} on {tuple(test_a.manifest["grid"])}')
    if any((c['loss'], len(c['targets'])) != (o['loss'], len(o['targets'])) for o in checkpoints):
        raise Refusal(f'{ckpt}: trained with different losses or target steps, so their scores cannot be compared')
for split, needed, what in ((test_a, 2 * clips + probe_clips, 'test_A'), (test_b, clips + probe_clips, 'test_B')):
    if len(split) < needed:
        raise Refusal(f'split {what} of {data} has {len(split)} clips, the stream and its probes need {needed}; '
                      'lower --clips or --probe_clips')


def take(split, start, count):
    """Clips start..start+count of a split on the device: z (count,T,N,D), a (count,T,A)."""
    return tuple(x.to(device) for x in split[range(start, start + count)])


def join(*parts):
    """Several (z, a) one after the other."""
    return tuple(torch.cat(x) for x in zip(*parts))


stream = join(take(test_a, 0, clips), take(test_b, 0, clips), take(test_a, clips, clips))
probes = {'A': take(test_a, 2 * clips, probe_clips), 'B': take(test_b, clips, probe_clips)}
tuning_streams = []
if len(validation) < 2 * tune_clips:
    raise Refusal(f'split val of {data} has {len(validation)} clips, tuning needs {2 * tune_clips}; lower --tune_clips')
for domain in TUNE_ON:
    split = clip_data.open_split(data, f'test_{domain}')
    tuning_streams.append(join(take(validation, 0, tune_clips), take(split, 0, min(2 * tune_clips, len(split))),
                               take(validation, tune_clips, tune_clips)))
SHOWN = [2 * clips - 1 - i for i in range(min(5, clips))][::-1]        # the last clips of B
phase_b = slice(clips, 2 * clips)


def travelled(split, count):
    """Displacement in metres over each of the first `count` clips."""
    position = split.physics['position'][:count]
    return np.linalg.norm(position[:, -1] - position[:, 0], axis=1)


def read_memory(path, predictor):
    """What an earlier run put into its --memory_out: sizes, memory and CMS; raises Refusal unless it fits the predictor."""
    start = read_sealed(path, device)
    try:
        if start['sizes'] != vars(predictor.sizes):
            raise Refusal(f'--memory_in={path}: the memory of another predictor than {checkpoints[0]["path"]}')
        with torch.no_grad():
            pairs = list(zip(start['memory'], predictor(*(x[:1] for x in stream))[1], strict=True)) if start['memory'] else []
        if start['cms']:
            fresh = CMSWriter(predictor, 0.0).changes
            pairs += [(start['cms'][part][name], value) for part in ('changes', 'sums') for name, value in fresh.items()]
            start['cms']['ticks'] + 1
        if not all(x.shape == y.shape and x.isfinite().all() for x, y in pairs):
            raise ValueError('not finite, or of another shape')
    except MALFORMED as error:
        raise Refusal(f'--memory_in={path}: not what --memory_out wrote ({" ".join(str(error).split())[:200]})') from None
    return start


def read_decoder(manifest):
    """The linear map from features to pixels that prepare.py fitted (see data.pictures), or None for imported features."""
    if 'decoder' not in manifest:
        return None
    verify(folder_of(data), manifest, [manifest['decoder']])
    try:
        decoder = np.load(os.path.join(folder_of(data), manifest['decoder']), mmap_mode='r')
        if decoder.shape != (D + 1, 3 * clip_data.TUBELET * manifest['patch'] ** 2) or not np.isfinite(decoder).all():
            raise ValueError('not finite, or of another shape')
        return torch.from_numpy(np.array(decoder))
    except (*MALFORMED, EOFError, OSError) as error:
        raise Refusal(f'{manifest["decoder"]} of data set {data} is not a decoder ({error})') from None


train_clips = clip_data.open_split(data, 'train')
beyond = None                                                          # B clips that move as A never showed
if test_b.physics:
    beyond = travelled(test_b, clips) > travelled(train_clips, len(train_clips)).max()

# ---- run everything ------------------------------------------------------------------------------------------------
rows = []
start = None
if memory_in and memory_out and os.path.realpath(memory_in) == os.path.realpath(memory_out):
    raise Refusal(f'--memory_out={memory_out}: is --memory_in too; name another file, so that the run can be run again')
if memory_in:
    start = read_memory(memory_in, checkpoints[0]['predictor'])
carriers = [c for c in checkpoints if c['predictor'].sizes.model == 'hope' and c['predictor'].sizes.mixer != 'attention']
if memory_out and not (carriers and ('memory' in chosen or ('memory + CMS' in chosen and TUNE_ON))):
    raise Refusal(f'--memory_out={memory_out}: none of --methods={methods} of {ckpt} has a memory to keep')
decoder = read_decoder(test_b.manifest)
os.makedirs(out, exist_ok=True)
unfinished = os.path.join(out, 'unfinished.pt')
files = ['table.txt', 'results.json', 'results.csv', 'results.png', 'predictions.png', 'unfinished.pt']
claim(out, *(os.path.join(out, file) for file in files))
# Rows that an interrupted run has finished, as long as everything that they depend on is the same.
depends_on = [os.path.join(ROOT, file) for file in ('adapt.py', 'data.py', 'hope.py', 'model.py')]
depends_on += [c['path'] for c in checkpoints] + [memory_in] * bool(memory_in)
key = json.dumps([{**settings, 'out': ''}, device, test_a.manifest['checksum'], *map(sha256, depends_on)])
kept = {'key': key, 'tried': {}, 'finished': {}}
if os.path.exists(unfinished):
    found = read_sealed(unfinished, device)
    if found.get('key') == key:
        kept = found
        print(f'going on after {len(kept["finished"])} finished rows')
    else:
        print(f'{unfinished} is of other settings, checkpoints, data or code: starting afresh')
tried, finished = kept['tried'], kept['finished']
targets = checkpoints[0]['targets']
# Two predictions that know nothing of motion: the first step again, and an empty scene (each patch's median feature).
# An adapter that only learns to paint over what it cannot place comes down to `blank`: lower is better than that.
empty = train_clips[range(min(256, len(train_clips)))][0].flatten(0, 1).median(0).values.to(device)  # (N,D)
for method, guess in (('copy', stream[0][:, :1]), ('blank', empty)):
    rows.append({'model': '', 'method': method, 'rate': None, 'seconds': [0.0], 'diagnostics': [], 'probes': {}, 'shown': {},
                 'state': {'memory': None}, 'loss': (guess - stream[0][:, targets]).abs().mean((1, 2, 3)).tolist()})
for c in checkpoints:
    print(f'{c["name"]}: {c["path"]}, {sum(p.numel() for p in c["predictor"].parameters()):,} parameters, '
          f'{c["step"]} steps of training', flush=True)
    plan = [('frozen', None)]
    if c['name'] != 'oracle':
        plan += [('LN-TTA', 'tuned')]
        sizes = c['predictor'].sizes
        if sizes.model == 'hope':
            carrying = sizes.mixer != 'attention'                   # else there is no memory to carry
            plan += [('memory', None)] * carrying + [('CMS', 'tuned')] + [('memory + CMS', 'tuned')] * carrying
        else:
            plan += [('LN-TTA', ln_rate), ('action TTA', 'tuned'), ('full TTA', 'tuned')]
    for method, rate in plan:
        if method not in chosen or (rate == 'tuned' and not TUNE_ON):
            continue
        if rate == 'tuned':
            grid = method.removeprefix('memory + ')
            name = f'{c["name"]} {grid}'
            if name not in tried:
                tried[name] = tune(c, grid)
                write_sealed(unfinished, kept)
            rate = min(tried[name], key=tried[name].get)
        name = f'{c["name"]} {method}' + ('' if rate is None else f' {rate:g}')
        if name not in finished:
            row = run_stream(c, method, rate, stream, probes, name, start)
            finished[name] = {k: v for k, v in row.items() if k != 'state' or memory_out}
            write_sealed(unfinished, kept)
        rows.append({'model': c['name'], 'method': method, 'rate': rate, **finished[name]})
if memory_out:                                                         # of the last method that has one
    state = [row['state'] for row in rows if row['state']['memory'] is not None][-1]
    os.makedirs(os.path.dirname(os.path.abspath(memory_out)), exist_ok=True)
    write_sealed(memory_out, {'sizes': vars(checkpoints[0]['predictor'].sizes), **state})


# ---- figures -------------------------------------------------------------------------------------------------------

def running_mean(values, width=10):
    """Mean of each window of `width` neighbours, (n-width+1,)."""
    return np.convolve(values, np.ones(min(width, len(values))) / min(width, len(values)), 'valid')


def frozen_row(model):
    """The row of a model that does not adapt, or None."""
    return next((r for r in rows if r['model'] == model and r['method'] == 'frozen'), None)


def figures(row):
    """The figures of one row of the table."""
    loss, early = np.array(row['loss']), min(25, clips)
    f = {'A1': loss[:clips].mean(), 'B': loss[phase_b].mean(), 'B_first': loss[phase_b][:early].mean(),
         'B_last': loss[phase_b][-early:].mean(), 'A2': loss[2 * clips:].mean(), 'A2_first': loss[2 * clips:][:early].mean(),
         'ms_per_clip': 1e3 * float(np.median(row['seconds']))}
    if beyond is not None:
        for name, part in (('B_within', ~beyond), ('B_beyond', beyond)):
            if part.any():
                f[name] = loss[phase_b][part].mean()
    frozen, bound = frozen_row(row['model']), frozen_row('oracle')
    if row['probes']:
        probe = dict(row['probes']['A'])
        before, after = (probe[max(k for k in probe if k <= end)] for end in (clips, 2 * clips))
        f['forgetting'] = after - before
    if frozen and row is not frozen:
        gain = running_mean((np.array(frozen['loss']) - loss)[phase_b])
        final = gain[-early:].mean()
        reached = np.flatnonzero(gain >= 0.5 * final)
        worth = final > 0.01 * np.mean(frozen['loss'][phase_b])        # half of next to nothing is reached at once
        f['t50'] = int(reached[0]) + 1 if worth and len(reached) else None
        gap = (np.array(frozen['loss']) - bound['loss'])[phase_b].mean() if bound else 0
        if gap:
            f['gap_closed'] = (np.array(frozen['loss']) - loss)[phase_b].mean() / gap
        f['return_cost'] = (loss - np.array(frozen['loss']))[2 * clips:][:early].mean()
    return {key: value if value is None or isinstance(value, int) else float(value) for key, value in f.items()}


COLUMNS = [('A1', 'A₁', '.4f'), ('B', 'B', '.4f'), ('B_within', 'within', '.4f'), ('B_beyond', 'beyond', '.4f'),
           ('B_first', 'B 1-25', '.4f'), ('return_cost', 'return', '+.3f'),
           ('forgetting', 'forget', '+.3f'), ('gap_closed', 'gap', '.0%'), ('t50', 't50', 'd'),
           ('ms_per_clip', 'ms', '.1f')]


def cell(row, key, form):
    """One cell of the table: empty where the figure has no meaning for the row."""
    value = row['figures'].get(key, '')
    return 'never' if value is None else format(value, form if value != '' else '')


def title(row):
    """Name of a row: model, method and learning rate."""
    return ' '.join(x for x in (row['model'], row['method'], '' if row['rate'] is None else f'{row["rate"]:g}') if x)


for row in rows:
    row['figures'] = figures(row)
columns = [column for column in COLUMNS if any(column[0] in row['figures'] for row in rows)]
table = io.StringIO()
print(f'{"loss on the stream":<24}'
      + ''.join(f'{head:>7}' for _, head, _ in columns), file=table)
for row in rows:
    print(f'{title(row):<24}' + ''.join(f'{cell(row, key, form):>7}' for key, _, form in columns), file=table)
print(f"""
{checkpoints[0]["loss"]} L1, mean over target steps {", ".join(str(int(t) + 1) for t in targets)}; {clips} clips a phase, scored before the look-back.
within / beyond: clips of B that slide no further / further than any training clip of A.
return: loss minus frozen loss on the first 25 clips of A₂.
forget: loss on held-out clips of A after B minus before B.
t50: clips of B to half of the own final gain (never: no gain of 1 %).
gap: share of the way from the own frozen loss on B to the oracle's.""", file=table)
for k, v in tried.items():
    print(f'Rate of {k} tuned on {", ".join(TUNE_ON)} among {", ".join(f"{r:g}" for r in v)}.', file=table)
print('\n' + table.getvalue())


def write(file, text):
    write_atomically(os.path.join(out, file), lambda f: f.write(text.encode()))


write('table.txt', table.getvalue())
write('results.json', json.dumps({
    'settings': settings, 'tuning': {k: {str(r): l for r, l in v.items()} for k, v in tried.items()},
    'checkpoints': [{'name': c['name'], 'path': c['path'], 'steps': c['step']} for c in checkpoints],
    'rows': [{k: v for k, v in row.items() if k not in ('shown', 'state')} for row in rows]}, indent=1))
listing = io.StringIO()
writer = csv.writer(listing)
writer.writerow(['clip', 'phase', 'beyond_A'] + [title(row) for row in rows])
for i in range(3 * clips):
    far = '' if beyond is None else int(beyond[i - clips]) if clips <= i < 2 * clips else 0
    writer.writerow([i + 1, ('A1', 'B', 'A2')[i // clips], far] + [f'{row["loss"][i]:.6f}' for row in rows])
write('results.csv', listing.getvalue())


# ---- pictures ------------------------------------------------------------------------------------------------------

def draw():
    """results.png: loss along the stream, probes, memory drift. predictions.png: what the last clips of B looked like."""
    try:
        import matplotlib
        matplotlib.use('Agg')
        import matplotlib.pyplot as plt
    except ImportError:
        print('no pictures: pip install matplotlib')
        return
    several = any(row['model'].startswith('ViT') for row in rows)      # then TTA is drawn for ViT-AC alone
    drawn = [row for row in rows if not (several and row['model'].startswith('HOPE') and 'TTA' in row['method'])]
    colours = dict(zip(map(title, drawn), ['0.6', '0.8'] + [f'C{i % 10}' for i in range(len(drawn))]))
    diagnosed = next((row for row in reversed(rows) if row['method'].startswith('memory') or row['method'] == 'CMS'), None)
    panels = 4 if diagnosed else 2
    fig, axes = plt.subplots(panels, 1, figsize=(9, 2.6 + 2.2 * panels), sharex=True, height_ratios=[2, 1.2, 1, 1][:panels])
    for ax in axes:
        ax.axvspan(clips, 2 * clips, color='0.93', zorder=0)
        ax.margins(x=0.01)
    for row in drawn:
        mean = running_mean(row['loss'])
        axes[0].plot(np.arange(len(mean)) + (len(row['loss']) - len(mean)) + 1, mean, label=title(row),
                     color=colours[title(row)], lw=2 if 'memory' in row['method'] else 1.2,
                     ls='-' if row['model'] else ':')
        for name, style in (('A', '-'), ('B', '--')):
            if row['probes']:
                axes[1].plot(*zip(*row['probes'][name]), style, color=colours[title(row)], marker='.')
    axes[0].set(ylabel=f'{checkpoints[0]["loss"]} L1, mean of 10 clips', ylim=(0, None))
    for x, phase in zip((0.5, 1.5, 2.5), ('A₁', 'B: less friction, less mass', 'A₂')):
        axes[0].text(x * clips, axes[0].get_ylim()[1] * 0.97, phase, ha='center', va='top')
    axes[0].legend(fontsize=8, loc='lower center', bbox_to_anchor=(0.5, 1), ncols=4)
    axes[1].set(ylabel='held-out probes\nA (solid), B (dashed)', ylim=(0, None))
    if diagnosed:
        seen = {key: np.array([d[key] for d in diagnosed['diagnostics']]) for key in diagnosed['diagnostics'][0]}
        reference, frozen, bound = "copy's", frozen_row(diagnosed['model']), frozen_row('oracle')
        if frozen and bound:                                           # how far an object moves cancels better
            known = np.array(frozen['loss'])
            known[phase_b] = np.array(bound['loss'])[phase_b]
            seen['surprise'], reference = diagnosed['loss'] / known, 'that of a model of the phase'
        starts = [phase * clips + 2 ** i - 1 for phase in range(3) for i in range(clips.bit_length()) if 2 ** i <= clips]
        widths = np.diff(starts + [3 * clips])                         # means over 1, 2, 4, ... clips since the last switch
        x = np.arange(3 * clips) + 1
        for key, values in seen.items():
            kind, _, name = key.partition(', ')
            if kind == 'surprise':
                values = values / values[:clips].mean()
                line, = axes[2].plot(x, np.repeat(np.add.reduceat(values, starts) / widths, widths), lw=1.2,
                                     label=name or f'loss over {reference}')
                axes[2].plot(x, values, color=line.get_color(), alpha=0.25, lw=0.8)
            elif kind == 'drift':
                axes[3].plot(x, values, label=name, ls='--' if 'CMS' in key else '-', lw=1.2)
        axes[2].set(ylabel=f'surprise, over its mean in A₁\n{title(diagnosed)}', ylim=(0, 1.3 * axes[2].get_ylim()[1]))
        axes[3].set(ylabel=f'drift from initial weights\n{title(diagnosed)}', yscale='log', ylim=(1e-4, 20))
        for ax in axes[2:]:
            ax.legend(fontsize=8, loc='upper left', ncols=3)
    axes[-1].set_xlabel('clip of the stream')
    fig.tight_layout()
    write_atomically(os.path.join(out, 'results.png'), lambda f: fig.savefig(f, dpi=100))
    plt.close(fig)

    manifest = test_b.manifest
    if decoder is None:
        return                                                         # imported features come without pixels
    seen = stream[0][SHOWN].cpu()
    columns = [('step 1', seen[:, 0]), (f'step {T}', seen[:, -1])]
    columns += [(title(row).replace(' ', '\n', 1), torch.stack([row['shown'][i] for i in SHOWN]).cpu())
                for row in drawn if row['shown']]
    fig, axes = plt.subplots(len(SHOWN), len(columns), figsize=(1.35 * len(columns), 1.4 * len(SHOWN) + 0.4), squeeze=False)
    for column, (head, features) in zip(axes.T, columns):
        for ax, picture in zip(column, clip_data.pictures(features, decoder, manifest['grid'], manifest['patch'])):
            ax.imshow(picture.numpy())
            ax.set_xticks([]), ax.set_yticks([])
        column[0].set_title(head, fontsize=8)
    fig.suptitle('Last clips of B: what was seen, and what each method predicted for the last step', fontsize=9)
    fig.tight_layout()
    write_atomically(os.path.join(out, 'predictions.png'), lambda f: fig.savefig(f, dpi=100))
    plt.close(fig)


draw()
if os.path.exists(unfinished):
    os.unlink(unfinished)
print(f'results: {os.path.join(out, "results.png")}, predictions.png, results.csv, results.json, table.txt')
