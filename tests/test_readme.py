"""Commands and examples of README and docs/ run as written, on tiny options; links lead somewhere."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import pytest
import torch
from conftest import FEW, ROOT, TINY, run

README, *DOCS = [Path(ROOT, 'README.md'), *sorted(Path(ROOT, 'docs').glob('*.md'))]
PAGES = {path: path.read_text('utf-8') for path in (README, *DOCS)}
EACH_PAGE = pytest.mark.parametrize('page', PAGES, ids=[path.name for path in PAGES])
IMAGEIO = find_spec('imageio')
try:
    from support import mujoco_world
except SystemExit:
    mujoco_world = None
# On top, so that all commands take seconds. Other tests run bench.py, torchrun, and official weights.
CODED = ['--size=32', '--dim=24', '--encoder=patch', '--device=cpu']
SMALL = {
    'tests/thesis_folder.py': ['--train=80', '--test=24', '--size=32', *['--content=both'] * bool(IMAGEIO)],
    'prepare.py': ['--clips=6', '--test_clips=4', *CODED],
    'train.py': [*TINY, '--accumulation=1', '--max_iters=7'],
    'adapt.py': [*FEW, '--clips=2', '--probe_clips=2', '--streams=1'],
    'report.py': ['--runs=out/mine_1'],
    'bench.py': ['--help'],
}
UNDRAWN = 'draw_stream = draw_diagnostics = draw_animation = lambda *args: None\n'
MADE = shutil.ignore_patterns('.*', '__pycache__', 'out', 'data', 'assets', 'venv', 'env')


def small(script, *args):
    if '--source=clips' in args:
        content = CODED if '--content=pictures' in args else ['--content=features']
        return ['--split=train:17000-17079,B:22000-22011,fit_B:22012-22023,A2:23000-23023', *content]
    if script == 'adapt.py' and '--methods=all' not in args:
        given = '--methods' in str(args) and '--plan' not in args
        return [*SMALL[script], '--tune_on=', *['--methods=frozen, world head'] * (not given)]
    return SMALL[script] + ['--init_from='] * ('config/finetune_vjepa2_ac.py' in args)


def commands_in(text):
    """The commands of a page, each as a list of words; of those that differ in a seed or a name the first."""
    text = '\n'.join(re.findall(r'^```bash\n(.*?)^```$', text, re.S | re.M)).replace('$shift', 'C')
    text = re.sub(r'torchrun .*_node=\d', 'python', text.replace(' && ', '\n').replace('$seed', '1'))
    found = {}
    for words in [shlex.split(line, comments=True) for line in text.splitlines()]:
        same = re.sub(r' --(seed|max_iters|out|init_from)=\S+|_?\d', '', ' '.join(words))
        found.setdefault(same, words)
    return [words for words in found.values() if words and words[0] not in ('for', 'done')]


def supply(place, words, tiny, trained):
    """Put what a command reads, and none before it has made, where the command looks for it."""
    text = ' '.join([*words, *[(place / word).read_text() for word in words if word.startswith('config/')]])
    text = text if '--resume' in words else re.sub(r"(--out=|--name=|out = ')\S+", '', text)
    for name in ['slide', *re.findall(r"data ?= ?'?(\w+)", text)]:
        if not (place / 'data' / name).exists():
            shutil.copytree(tiny, place / 'data' / name)
    for path in re.findall(r'(?:out|assets)/\w+\.pt', text):
        (place / path).parent.mkdir(exist_ok=True)
        if not (place / path).exists():
            first = place / re.sub(r'\d(?=\.pt)', '1', path)    # of a loop over seeds, which was run
            shutil.copy(first if first.exists() else trained['hope' if 'hope' in path else 'vit'], place / path)
    if '--source=clips' in words and not (place / 'clips').exists():
        run(place / 'tests/thesis_folder.py', 'clips', *SMALL['tests/thesis_folder.py'], cwd=place)


@EACH_PAGE
def test_commands(page, tiny, trained, tmp_path):
    """In a copy without what commands have made here. Pictures take long: tests/test_report.py draws them."""
    place = shutil.copytree(ROOT, tmp_path / 'project', ignore=MADE)
    (place / 'support/plots.py').open('a').write(UNDRAWN)
    for program, *words in commands_in(PAGES[page]):
        needed = IMAGEIO or '--content=pictures' not in words, mujoco_world or '--source=mujoco' not in words
        if program == 'python' and all(needed):
            supply(place, words, tiny, trained)
            run(place / words[0], *words[1:], *small(*words), cwd=place)
        else:
            assert program in ('pip', 'pytest', 'python') or (place / words[0]).exists()


def test_the_tests_pass_in_a_folder_that_has_been_used(tmp_path):
    """They neither read, refuse nor change what the first command has left there."""
    place = shutil.copytree(ROOT, tmp_path / 'project', ignore=MADE)
    left = [place / name for name in ('out/hope.pt', 'out/hope_best.pt', 'out/aba/run.json', 'data/slide/x')]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('left')
    chosen = ['tests/test_train.py', '-k', 'another_seed', '-n0', '-q', '-p', 'no:cacheprovider']
    # Not one of this run's processes: those share a folder of what is trained.
    alone = {name: value for name, value in os.environ.items() if not name.startswith('PYTEST_')}
    subprocess.run([sys.executable, '-m', 'pytest', *chosen], cwd=place, env=alone, check=True)
    assert [path.read_text() for path in left] == ['left'] * len(left)


def test_the_python_examples(tiny, trained):
    """That of docs/code.md, the encoder of docs/own_data.md where its package is, and the notebook."""
    [example] = re.findall(r'^```python\n(.*?)^```$', PAGES[Path(ROOT, 'docs', 'code.md')], re.S | re.M)
    exec(example.replace('out/hope.pt', trained['hope']).replace("'slide'", repr(tiny)), scope := {})
    assert scope['z_8'].shape == scope['z'][:, 7].shape
    [example] = re.findall(r'^```python\n(.*?)^```$', PAGES[Path(ROOT, 'docs', 'own_data.md')], re.S | re.M)
    if find_spec('efficientnet_lite_pytorch'):
        exec(example, scope)
        assert scope['encode'](torch.rand(2, 3, 128, 128)).shape == (2, 80, 8, 8)
    matplotlib.use('Agg')
    for cell in json.loads(Path(ROOT, 'example.ipynb').read_text('utf-8'))['cells']:
        source = ''.join(cell['source']).replace('assets', f'{ROOT}/assets')
        exec(source if cell['cell_type'] == 'code' else '', scope)
    z, far = scope['z_new'], scope['F'].l1_loss
    assert far(scope['adapted'], z[:, 7]) < 0.5 * far(scope['step_8'](z, scope['a_new']), z[:, 7])


@EACH_PAGE
def test_page(page):
    """Links lead somewhere; the pages are short, and the README links all of them."""
    for link, anchor in re.findall(r'\]\((?!http)([^)#\s]*)#?([^)\s]*)\)', PAGES[page]):
        target = (page.parent / link).resolve(strict=True) if link else page
        headings = re.findall(r'^#+ (.*)$', PAGES[target].lower(), re.M) if anchor else ['']
        assert anchor in [re.sub(r'[^\w\- ]', '', heading).replace(' ', '-') for heading in headings]
    assert len(PAGES[README].split()) <= 900 and sum(len(PAGES[path].split()) for path in DOCS) <= 6000
    assert len([path for path in DOCS if f'](docs/{path.name})' in PAGES[README]]) == len(DOCS) == 7


def test_the_figures_of_the_readme_are_those_of_its_page():
    rows = re.findall(r'^\|\W*((?:HOPE|ViT-AC),.*)\|$', PAGES[README].replace('**', ''), re.M)
    assert len(rows) == 6
    for name, *cells in [row.replace(',', '').split('|') for row in rows]:
        line, *_ = re.findall(rf'^\|{name}\|(.*)\|$', PAGES[Path(ROOT, 'docs', 'results.md')], re.M)
        assert {*filter(None, cells)} <= {*line.replace('%', '').split('|')}, name
