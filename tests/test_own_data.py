"""docs/own_data.md: its own commands take a folder in the user's layout to a table, in which the memory adapts."""
import csv
import json
import os
import shlex

import pytest
import torch
from conftest import ROOT, common, run
from test_readme import commands_in

from data import open_split

MAKE_FOLDER, *COMMANDS = commands_in(os.path.join(ROOT, 'docs', 'own_data.md'))
PREPARE = [command for command in COMMANDS if 'prepare.py' in command]
# From train.py to compare.py
LATER = [command for command in COMMANDS if 'prepare.py' not in command]
# Added to the page's commands, so that all of them together take seconds.
SMALLER = {
    'tests/thesis_folder.py': ['--train=240', '--test=60', '--size=32', '--content=both'],
    'prepare.py': ['--split=train:17000-17239,B:22000-22015,fit_B:22016-22059,A2:23000-23015', '--device=cpu'],
    'train.py': ['--depth=1', '--width=32', '--heads=2', '--mlp_hidden=96', '--cms_hidden=32', '--batch_size=16',
                 '--accumulation=1', '--inverse_batch=32', '--eval_interval=1000', '--device=cpu'],
    'adapt.py': ['--clips=8', '--probe_clips=8', '--tune_clips=2', '--device=cpu'],
    'compare.py': [],
}
# What is added for the sake of single files that come out. With fewer steps the memory would adapt less.
MORE = {
    'mine_pictures': ['--encoder=patch', '--size=32', '--dim=24', '--zoom=False'],
    'out/mine_vit.pt': ['--max_iters=250', '--learning_rate=8e-3'],
    'out/mine_hope.pt': ['--max_iters=200', '--learning_rate=8e-3'],
    'out/mine_oracle.pt': ['--max_iters=60', '--learning_rate=3e-3'],
    # The second seed only has to be there.
    'out/mine_vit_2.pt': ['--max_iters=2'],
    'out/mine_hope_2.pt': ['--max_iters=2'],
    'out/mine_2': ['--methods=frozen,memory'],
    'out/mine_oracle': ['--methods=frozen,memory'],
}
# The least of training and of methods that still takes a set all the way.
LEAST = {
    'train.py': ['--max_iters=2'],
    'adapt.py': ['--methods=frozen,memory', '--clips=2', '--probe_clips=2'],
    'compare.py': [],
}


def run_small(command, folder, *more, pictures=False):
    """Run a command of the page in a folder, on small settings → what it prints."""
    _, script, *args = shlex.split(command)
    made = [arg.partition('=')[2] for arg in args if arg.startswith(('--name=', '--out='))]
    small = [flag for file in made for flag in MORE.get(file, [])]
    # A name with a slash is a folder, not one beside the code.
    args = [arg.replace('--name=', '--name=./').replace('--data=', '--data=../') for arg in args]
    return run(script, *args, *SMALLER[script], *small, *more, cwd=folder, pictures=pictures).stdout


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with the page's clips, which have features and pictures, and with the three sets that the page makes."""
    def make(folder):
        run_small(MAKE_FOLDER, folder)
        for command in PREPARE:
            assert 'every tenth' in run_small(command, folder)
    return common(tmp_path_factory, 'thesis', make)


def test_one_set_in_three_ways(folder):
    """Features in place, features copied, and pictures encoded as the features were: the same clips and a decoder."""
    for split in ('train', 'val', 'test_B', 'fit_B', 'test_A2'):
        in_place, copied, pictures = [open_split(f'{folder}/{name}', split) for name in ('mine', 'mine_copied', 'mine_pictures')]
        z, a = in_place[:]
        assert torch.equal(z, copied[:][0]) and torch.equal(a, copied[:][1])
        torch.testing.assert_close(z, pictures[:][0], atol=1e-2, rtol=1e-2)
        assert torch.equal(a, pictures[:][1])
        assert 'decoder' in in_place.manifest and 'decoder' in pictures.manifest


def check_table(place):
    """The table of both seeds has both models."""
    table = (place / 'out/mine/table.txt').read_text(encoding='utf-8')
    assert 'HOPE memory' in table and 'ViT-AC memory' in table and 'over 2 seeds' in table
    with open(place / 'out/mine/compare.csv', newline='', encoding='utf-8') as f:
        assert {row['run'] for row in csv.DictReader(f)} == {'out/mine_1', 'out/mine_2'}


def test_from_features_to_a_comparison(folder):
    """The memory of both models adapts to B and costs nothing at home."""
    place = folder / 'from_features'
    place.mkdir()
    for command in LATER:
        run_small(command, place, pictures='compare.py' in command)
    with open(place / 'out/mine_1/results.json', encoding='utf-8') as f:
        figures = {(row['model'], row['method']): row['figures'] for row in json.load(f)['rows']}
    for model in ('HOPE', 'ViT-AC'):
        memory, frozen = figures[model, 'memory'], figures[model, 'frozen']
        # Over three seeds it is 22 to 26 % below.
        assert memory['B'][0] < 0.9 * frozen['B'][0] and memory['A1'][0] < 1.05 * frozen['A1'][0]
    check_table(place)
    assert (place / 'out/mine/table.tex').exists() and (place / 'out/mine/results.pdf').exists()
    table = (place / 'out/mine_oracle/table.txt').read_text(encoding='utf-8')
    assert 'gap' in table.splitlines()[0]


def test_from_pictures_to_a_comparison(folder):
    """Every step but the oracle; the features are those of the test above, so what is learned from them is, too."""
    place = folder / 'from_pictures'
    place.mkdir()
    for command in LATER:
        if 'oracle' in command:
            continue
        script = command.split()[1]
        run_small(command.replace('--data=mine', '--data=mine_pictures'), place, *LEAST[script],
                  pictures='--out=out/mine_1' in command)
    check_table(place)
    assert (place / 'out/mine_1/predictions.png').exists()
