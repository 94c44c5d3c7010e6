"""
The ablation table: train every variant of HOPE with several seeds, run A→B→A with each, print one table.

    python ablate.py                                       every variant at full length, three seeds
    python ablate.py --variants="HOPE,delta rule"          some of them
    python ablate.py --oracle=out/oracle.pt                with the share of the gap that each closes

Every variant is config/hope_jump.py with the flags below; all have the same steps, clips and seeds. What is finished is
kept, so an interrupted table goes on where it stopped, and seeds and variants may be added. What was made with other
settings, data or code is refused: by train.py, and by adapt.py, whose folder may then be deleted.
"""
import os
import subprocess
import sys
from types import SimpleNamespace

from compare import cell, laid_out, mean_and_half, over_what, read_results
from configurator import ROOT, Refusal, configure, listed, read_config
from hope import load
from support.files import claim, read_manifest, write_text
from support.running import make_slide

# what to run
config = 'config/hope_jump.py'   # config file of HOPE, which its variants change
vit = 'config/vit_jump.py'       # config file of the ViT-AC that it is compared with
variants = ''            # run only these, separated by commas; '' = all
seeds = '1,2,3'          # training seeds, separated by commas
max_iters = 0            # optimiser steps of each training; 0 = those of the config [0..]
data = 'slide'           # data set
clips = 200              # clips per phase of A→B→A, and of its probes [1..]
tune_clips = 25          # clips per phase of the tuning stream [1..]
oracle = ''              # checkpoint fine-tuned on other clips of B, or one for each seed: the bound of the gap
out = 'out/ablation'     # folder for checkpoints, results and table.txt
extra = ''               # more flags for every training, separated by blanks
device = 'auto'          # auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps or cpu
settings = configure(globals()) if __name__ == '__main__' else {}

# A row of the table: its name, the method by which it adapts, the knob that names its config file, and its flags for
# train.py. Rows with the same config and flags share their checkpoints.
VARIANTS = {
    'HOPE': ('memory', 'config', ''),
    'ViT-AC': ('LN-TTA', 'vit', ''),
    'ViT-AC with the memory': ('memory', 'vit', ''),
    "the plan's own HOPE": ('CMS', 'config', '--action_memory=False --mixer=titan --memory_hidden=24 --conv=False '
                                             '--cms_hidden=300'),
    'Hope-Attention': ('memory', 'config', '--mixer=attention --cms_hidden=300'),
    'Titan without attention': ('memory', 'config', '--mixer=titan --cms_hidden=300'),
    'no zoomed clips': ('memory', 'config', '--zoom=False'),
    'delta rule': ('memory', 'config', '--rule=delta'),
    'no self-generated targets': ('memory', 'config', '--self_targets=False'),
    'no surprise gate': ('memory', 'config', '--surprise=False'),
    'no convolution': ('memory', 'config', '--conv=False'),
    'one CMS level': ('memory', 'config', '--cms_periods=1 --cms_hidden=708'),
}
# Columns of the table: heading, method (None: the row's own), figure of figures.py, format.
COLUMNS = [
    ('A frozen', 'frozen', 'A1', '.4f'),
    ('A₁', None, 'A1', '.4f'),
    ('B frozen', 'frozen', 'B', '.4f'),
    ('B', None, 'B', '.4f'),
    ('1-25', None, 'B_first', '.4f'),
    ('return', None, 'return_cost', '+.4f'),
    ('forget', None, 'forgetting', '+.4f'),
    ('gap', None, 'gap_closed', '.0%'),
    ('to A', None, 'way_back', '.0%'),
]


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


def file_name(variant):
    """What the files of a variant are called: the first variant that is trained alike, without blanks."""
    _, *training = VARIANTS[variant]
    first = next(name for name, (_, *other) in VARIANTS.items() if other == training)
    return ''.join(c if c.isalnum() else '_' for c in first)


def finished(path, wanted, checksum):
    """Whether a checkpoint was trained to its end with the settings that are wanted, {knob: value}, on this data."""
    _, kept = load(path, 'cpu', recipe=dict, data=str, step=int)
    recipe = kept['recipe']
    same = all(str(recipe[knob]) == str(value) for knob, value in wanted.items() if knob in recipe)
    return same and kept['data'] == checksum and kept['step'] == recipe['max_iters']


def train(variant, seed, knobs, checksum):
    """The checkpoint of a variant and a seed → its path. Trains it, or goes on, unless that was done before."""
    _, config, own = VARIANTS[variant]
    config = getattr(knobs, config)
    path = os.path.join(knobs.out, f'{file_name(variant)}_{seed}.pt')
    flags = [*knobs.extra.split(), *own.split(), f'--seed={seed}']
    if knobs.max_iters:
        flags.append(f'--max_iters={knobs.max_iters}')
    wanted = read_config(config) | dict(flag.lstrip('-').split('=', 1) for flag in flags if '=' in flag)
    there = os.path.exists(path)
    if not there or not finished(path, wanted, checksum):
        print(f'\n== {variant}, seed {seed}', flush=True)
        run('train.py', config, f'--data={knobs.data}', f'--device={knobs.device}', *flags, f'--out={path}',
            f'--resume={there}')
    return path


def adapt(variant, paths, knobs):
    """Run A→B→A with the checkpoints of all seeds, unless that was done before → its rows, {method: [a row a seed]}."""
    method, *_ = VARIANTS[variant]
    seeds = '_'.join(chosen_seeds(knobs.seeds))
    folder = os.path.join(knobs.out, f'{file_name(variant)}_{method}_{seeds}')
    print(f'\n== {variant}', flush=True)
    run('adapt.py', f'--ckpt={",".join(paths)}', f'--oracle={knobs.oracle}', f'--methods=frozen,{method}',
        f'--data={knobs.data}', f'--clips={knobs.clips}', f'--probe_clips={knobs.clips}',
        f'--tune_clips={knobs.tune_clips}', f'--device={knobs.device}', f'--out={folder}')
    rows = {'frozen': [], method: []}
    for row in read_results(folder)['rows']:
        # The plan's rate is no row of this table.
        if row['kind'] in ('hope', 'vit') and row['rate_from'] != 'plan':
            rows[row['method']].append(row)
    return rows


def same_steps(paths):
    """How long all checkpoints were trained; raises Refusal where one was trained shorter than another."""
    steps = {path: load(path, 'cpu', step=int)[1]['step'] for path in paths}
    few, many = min(steps, key=steps.get), max(steps, key=steps.get)
    if steps[few] < steps[many]:
        raise Refusal(f'{few} was trained for {steps[few]} steps, {many} for {steps[many]}: they cannot be compared; '
                      'set --max_iters, or name another --out')
    return steps[few]


def table(found, steps):
    """The text of table.txt. found: {variant: (its method, {method: [a row a seed]})}; steps: of training."""
    columns = []
    for column in COLUMNS:
        _, own, figure, _ = column
        if any(figure in rows[own or method][0]['figures'] for method, rows in found.values()):
            columns.append(column)
    _, first = next(iter(found.values()))
    seeds = len(first['frozen'])
    lines = [[f'{steps:,} steps', *(heading for heading, *_ in columns)]]
    for variant, (method, rows) in found.items():
        pairs = [mean_and_half(rows[own or method], figure) for _, own, figure, _ in columns]
        lines.append([variant, *(cell(mean, form) for (mean, _), (*_, form) in zip(pairs, columns))])
        if seeds > 1:
            lines.append(['±', *(cell(half, form.lstrip('+')) for (_, half), (*_, form) in zip(pairs, columns))])
    text = laid_out(lines)
    text += ['', "ViT-AC adapts by tuned LN-TTA, the plan's own HOPE by CMS writes, the others by the action memory."]
    if seeds > 1:
        text.append(f'±: half the 95 % interval over {over_what(seeds, 1)} (figures.resampled).')
    return '\n'.join(text) + '\n'


def main(knobs):
    """Run what is missing and print the table."""
    chosen, seeds = choose(knobs.variants, VARIANTS), chosen_seeds(knobs.seeds)
    make_slide(knobs.data)
    checksum = read_manifest(knobs.data)['checksum']
    for path in listed(knobs.oracle):
        # A wrong one is refused now, not after all the trainings.
        load(path)
    os.makedirs(knobs.out, exist_ok=True)
    claim(knobs.out, os.path.join(knobs.out, 'table.txt'))
    paths = {variant: [train(variant, seed, knobs, checksum) for seed in seeds] for variant in chosen}
    steps = same_steps(sum(paths.values(), []))
    found = {variant: (VARIANTS[variant][0], adapt(variant, paths[variant], knobs)) for variant in chosen}
    text = table(found, steps)
    print('\n' + text)
    write_text(os.path.join(knobs.out, 'table.txt'), text)


if __name__ == '__main__':
    main(SimpleNamespace(**settings))
