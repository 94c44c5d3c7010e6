"""
The ablation table: train HOPE once per variant, run A→B→A with each, print one table.

    python ablate.py                                       every variant at reduced length, one seed
    python ablate.py --seeds=1,2,3 --max_iters=2500        at full length

Every variant is config/hope_jump.py with the knobs below changed and the same steps, clips and seeds. Finished runs are
kept, so an interrupted table goes on where it stopped, and seeds and variants may be added. What the results depend on is in
<out>/settings.json; with other settings, another data set or other code a run is refused there.
"""
import csv
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np

from configurator import ROOT, Refusal, configure, listed, read_config
from support.files import claim, read_bytes, read_manifest, sha256, write_text
from support.running import make_slide

# what to run
config = 'config/hope_jump.py'   # config file that the variants change
variants = ''            # run only these, separated by commas; '' = all
seeds = '1'              # training seeds, separated by commas
max_iters = 600          # optimiser steps of each run [1..]
data = 'slide'           # data set
clips = 100              # clips per phase of A→B→A, and of its probes [1..]
tune_clips = 25          # clips per phase of the tuning stream [1..]
out = 'out/ablation'     # folder for checkpoints, results and table.txt
extra = ''               # more flags for every training run, separated by blanks
device = 'auto'          # auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps or cpu
settings = configure(globals()) if __name__ == '__main__' else {}

# Code that results depend on. That of prepare.py is in the manifest of the data set.
CODE = 'train.py', 'adapt.py', 'experiment.py', 'compare.py', 'model.py', 'hope.py', 'data.py'
# A row of the table: its name, the method by which it adapts, and its flags for train.py.
VARIANTS = {
    'HOPE': ('memory', ''),
    'ViT-AC': ('LN-TTA', '--model=vit --depth=4'),
    'ViT-AC with the memory': ('memory', '--model=vit --depth=4'),
    "the plan's own HOPE": ('CMS', '--action_memory=False --mixer=titan --memory_hidden=24 --conv=False --cms_hidden=300'),
    'no zoomed clips': ('memory', '--zoom=False'),
    'Titan without attention': ('memory', '--mixer=titan --cms_hidden=300'),
    'attention without Titan': ('memory', '--mixer=attention --cms_hidden=300'),
    'two-layer Titan memory': ('memory', '--memory_hidden=24'),
    'delta rule': ('memory', '--rule=delta'),
    'only M_mem adapts': ('memory', '--adapts=mem'),
    'no self-generated targets': ('memory', '--self_targets=False'),
    'no surprise gate': ('memory', '--surprise=False'),
    'no convolution': ('memory', '--conv=False'),
    'one CMS level': ('memory', '--cms_periods=1 --cms_hidden=708'),
}


def choose(names, variants):
    """'HOPE, ViT-AC' → ['HOPE', 'ViT-AC'], '' → all of them; raises Refusal for an unknown one."""
    chosen = listed(names) or list(variants)
    if set(chosen) - set(variants):
        raise Refusal(f'--variants={names}: allowed are {", ".join(variants)}')
    return chosen


def chosen_seeds(text):
    """'1,2' → ['1', '2']; raises Refusal where there is none."""
    if not listed(text):
        raise Refusal('--seeds=: name one, or several separated by commas')
    return listed(text)


def run(script, *flags):
    """Run a script of the project with its output on the terminal. If it fails, the table ends."""
    done = subprocess.run([sys.executable, os.path.join(ROOT, script), *flags])
    if done.returncode:
        sys.exit(2)


def train_and_adapt(name, method, flags, seed, knobs):
    """Train with these flags, or go on with an interrupted training → <name>.pt; then run A→B→A → the folder <name>."""
    checkpoint = f'{name}.pt'
    run('train.py', knobs.config, f'--max_iters={knobs.max_iters}', f'--seed={seed}', f'--data={knobs.data}',
        f'--device={knobs.device}', f'--eval_interval={knobs.max_iters}', *knobs.extra.split(), *flags,
        f'--out={checkpoint}', f'--resume={os.path.exists(checkpoint)}')
    run('adapt.py', f'--ckpt={checkpoint}', f'--data={knobs.data}', f'--clips={knobs.clips}',
        f'--probe_clips={knobs.clips}', f'--tune_clips={knobs.tune_clips}', f'--device={knobs.device}',
        f'--out={name}', f'--methods=frozen,{method}')


def read_results(name, method):
    """The figures of a finished run → {column: value}."""
    with open(os.path.join(name, 'results.json'), encoding='utf-8') as f:
        rows = json.load(f)['rows']
    figures = {}
    for row in rows:
        # Of LN-TTA the first row is the tuned one, the second has the plan's rate.
        figures.setdefault(row['method'], row['figures'])
    frozen = figures['frozen']
    adapted = figures[method]
    with open(f'{name}.csv', newline='', encoding='utf-8') as f:
        speeds = [float(row['clips_per_s']) for row in csv.DictReader(f) if row['clips_per_s']]
    return {
        'A frozen': frozen['A1'],
        'A₁': adapted['A1'],
        'B frozen': frozen['B'],
        'B': adapted['B'],
        'return': adapted['return_cost'],
        'forget': adapted['forgetting'],
        'clips/s': np.median(speeds),
    }


def results(variant, seed, knobs):
    """The figures of one variant and seed → {column: value}. Trains and adapts first, unless that was done before."""
    method, flags = VARIANTS[variant]
    plain = ''.join(c if c.isalnum() else '_' for c in variant)
    name = os.path.join(knobs.out, f'{plain}_{seed}')
    if not os.path.exists(os.path.join(name, 'results.json')):
        print(f'\n== {variant}, seed {seed}', flush=True)
        train_and_adapt(name, method, flags.split(), seed, knobs)
    return read_results(name, method)


def line(label, cells):
    """One line of the table."""
    columns = ''.join(f'{cell:>10}' for cell in cells)
    return f'{label:<28}{columns}\n'


def depends_on(knobs, chosen):
    """What the results of variants depend on, but for seed and device → {name: plain value}. Makes data/slide if missing."""
    make_slide(knobs.data)
    manifest = read_manifest(knobs.data)
    depends = {name: getattr(knobs, name) for name in ('max_iters', 'clips', 'tune_clips', 'extra')}
    depends['data'] = manifest['checksum']
    for name, value in read_config(knobs.config).items():
        depends[f'{name} in config'] = value
    for script in CODE:
        depends[script] = sha256(os.path.join(ROOT, script))
    for variant in chosen:
        depends[f'variant {variant}'] = ': '.join(VARIANTS[variant])
    return depends


def check_same(out, depends):
    """Keep in the folder `out` what its results depend on; raises Refusal where they depend on something else."""
    path = os.path.join(out, 'settings.json')
    kept = {}
    if os.path.exists(path):
        try:
            kept = json.loads(read_bytes(path))
        except ValueError:
            raise Refusal(f'{path} is damaged; name another --out') from None
    elif any(name.endswith('.pt') for name in os.listdir(out)):
        raise Refusal(f'{out} holds results, but not the settings that they depend on; name another --out')
    other = []
    for name in sorted({**kept, **depends}) if kept else []:
        added = name.startswith('variant') and not (name in kept and name in depends)
        if not added and kept.get(name) != depends.get(name):
            numbers = isinstance(kept.get(name), int) and isinstance(depends.get(name), int)
            other.append(f'{name} = {depends[name]} (was {kept[name]})' if numbers else name)
    if other:
        raise Refusal(f'{out} holds results with other settings, data or code: {", ".join(other)}; name another --out')
    text = json.dumps({**kept, **depends}, indent=1)
    write_text(path, text)


def main(knobs):
    """Run what is missing and print the table."""
    chosen = choose(knobs.variants, VARIANTS)
    seeds = chosen_seeds(knobs.seeds)
    depends = depends_on(knobs, chosen)
    os.makedirs(knobs.out, exist_ok=True)
    claim(knobs.out, os.path.join(knobs.out, 'table.txt'))
    check_same(knobs.out, depends)
    table = ''
    for variant in chosen:
        runs = [results(variant, seed, knobs) for seed in seeds]
        means = {column: np.mean([one[column] for one in runs]) for column in runs[0]}
        if not table:
            table = line(f'{knobs.max_iters} steps, seeds {knobs.seeds}', means)
        cells = []
        for column, mean in means.items():
            digits = 0 if column == 'clips/s' else 4
            cells.append(f'{mean:.{digits}f}')
        table += line(variant, cells)
    table += "ViT-AC adapts by tuned LN-TTA, the plan's own HOPE by CMS writes, the others by the action memory.\n"
    print('\n' + table)
    write_text(os.path.join(knobs.out, 'table.txt'), table)


if __name__ == '__main__':
    main(SimpleNamespace(**settings))
