"""
The ablation table: train HOPE once per variant, run A→B→A with each, print one table.

    python ablate.py                                       every variant at reduced length, one seed
    python ablate.py --seeds=1,2,3 --max_iters=2500        at full length

Every variant is config/hope_jump.py with the knobs below changed and the same steps, clips and seeds. Finished runs are
kept, so an interrupted table goes on where it stopped.
"""
import csv
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np

from configurator import ROOT, Refusal, configure
from support.files import claim, write_atomically

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
settings = configure(globals())
knobs = SimpleNamespace(**settings)

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
    if not names:
        return list(variants)
    chosen = [name.strip() for name in names.split(',')]
    if set(chosen) - set(variants):
        raise Refusal(f'--variants={names}: allowed are {", ".join(variants)}')
    return chosen


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
    figures = {row['method']: row['figures'] for row in rows}
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


chosen = choose(variants, VARIANTS)
os.makedirs(out, exist_ok=True)
claim(out, os.path.join(out, 'table.txt'))
table = ''
for variant in chosen:
    runs = [results(variant, seed, knobs) for seed in seeds.split(',')]
    means = {column: np.mean([one[column] for one in runs]) for column in runs[0]}
    if not table:
        table = line(f'{max_iters} steps, seeds {seeds}', means)
    cells = []
    for column, mean in means.items():
        digits = 0 if column == 'clips/s' else 4
        cells.append(f'{mean:.{digits}f}')
    table += line(variant, cells)
table += "ViT-AC adapts by tuned LN-TTA, the plan's own HOPE by CMS writes, the others by the action memory.\n"
print('\n' + table)
write_atomically(os.path.join(out, 'table.txt'), lambda f: f.write(table.encode()))
