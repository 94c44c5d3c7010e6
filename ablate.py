"""
The ablation table: train HOPE once per variant, run A→B→A with each, print one table.

    python ablate.py                                       every variant at reduced length, one seed
    python ablate.py --seeds=1,2,3 --max_iters=2500        at full length

Every variant is config/hope_jump.py with the knobs below changed and the same steps, clips and seeds. A run that is
there already is not made again, so an interrupted table goes on where it stopped.
"""
import csv
import io
import json
import os
import subprocess
import sys

import numpy as np

from configurator import ROOT, Refusal, configure
from support.files import claim, write_atomically

# what to run
config = 'config/hope_jump.py'   # the variants change this
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

VARIANTS = {                     # name: flags for train.py
    'HOPE': [],
    'ViT-AC': ['--model=vit', '--depth=4'],
    "the plan's own HOPE": ['--mixer=titan', '--memory_hidden=24', '--rule=dgd', '--conv=False', '--cms_hidden=300'],
    'Titan without attention': ['--mixer=titan', '--cms_hidden=300'],
    'attention without Titan': ['--mixer=attention', '--cms_hidden=300'],
    'two-layer memory': ['--memory_hidden=24'],
    'delta rule': ['--rule=delta'],
    'only M_mem adapts': ['--adapts=mem'],
    'no self-generated targets': ['--self_targets=False'],
    'no surprise gate': ['--surprise=False'],
    'no convolution': ['--conv=False'],
    'one CMS level': ['--cms_periods=1', '--cms_hidden=708'],
    'streams in the last fifth': ['--stream=4', '--stream_from=0.8', '--action_gain=0.7', '--cms_rate=10'],
}
chosen = [v.strip() for v in variants.split(',')] if variants else list(VARIANTS)
if set(chosen) - set(VARIANTS):
    raise Refusal(f'--variants={variants}: allowed are {", ".join(VARIANTS)}')


def run(script, *flags):
    """Run a script of the project, its output straight to the terminal; stops the table where it fails."""
    if subprocess.run([sys.executable, os.path.join(ROOT, script), *flags]).returncode:
        sys.exit(2)


def results(variant, seed):
    """Train and adapt one variant, unless that was done → {column: value}."""
    name = os.path.join(out, f'{"".join(c if c.isalnum() else "_" for c in variant)}_{seed}')
    if not os.path.exists(os.path.join(name, 'results.json')):
        print(f'\n== {variant}, seed {seed}', flush=True)
        run('train.py', config, f'--max_iters={max_iters}', f'--seed={seed}', f'--data={data}', f'--device={device}',
            f'--eval_interval={max_iters}', *extra.split(), *VARIANTS[variant], f'--out={name}.pt',
            f'--resume={os.path.exists(f"{name}.pt")}')
        run('adapt.py', f'--ckpt={name}.pt', f'--data={data}', f'--clips={clips}', f'--probe_clips={clips}',
            f'--tune_clips={tune_clips}', f'--device={device}', f'--out={name}',
            '--methods=frozen,' + ('LN-TTA' if variant == 'ViT-AC' else 'CMS'))
    with open(os.path.join(name, 'results.json'), encoding='utf-8') as f:
        rows = json.load(f)['rows']
    frozen, adapted = (next(r['figures'] for r in rows[::-1] if r['method'] in names)
                       for names in (('frozen',), ('CMS', 'LN-TTA')))
    with open(f'{name}.csv', newline='', encoding='utf-8') as f:
        speed = np.median([float(row['clips_per_s']) for row in csv.DictReader(f) if row['clips_per_s']])
    return {'A frozen': frozen['A1'], 'A₁': adapted['A1'], 'B frozen': frozen['B'], 'B': adapted['B'],
            'return': adapted['return_cost'], 'forget': adapted['forgetting'], 'clips/s': speed}


os.makedirs(out, exist_ok=True)
claim(out, os.path.join(out, 'table.txt'))
table = io.StringIO()
for variant in chosen:
    runs = [results(variant, seed) for seed in seeds.split(',')]
    means = {column: np.mean([one[column] for one in runs]) for column in runs[0]}
    if variant == chosen[0]:
        print(f'{f"{max_iters} steps, seeds {seeds}":<28}' + ''.join(f'{column:>10}' for column in means), file=table)
    print(f'{variant:<28}' + ''.join(f'{v:>10.0f}' if c == 'clips/s' else f'{v:>10.4f}' for c, v in means.items()), file=table)
print('ViT-AC adapts by tuned LN-TTA, the others by CMS writes at their tuned rate; clips/s in training.', file=table)
print('\n' + table.getvalue())
write_atomically(os.path.join(out, 'table.txt'), lambda f: f.write(table.getvalue().encode()))
