"""Every command and example of the README and of docs/ runs, on tiny settings; every link leads somewhere."""
import glob
import os
import re
import shlex
import sys

import pytest
import torch
from conftest import ROOT, TINY, fake_results, official_predictor, official_weights, own_clip, own_clips, run

README = os.path.join(ROOT, 'README.md')
PAGES = [README, *sorted(glob.glob(os.path.join(ROOT, 'docs', '**', '*.md'), recursive=True))]


def read(path):
    with open(path, encoding='utf-8') as f:
        return f.read()


def fences(*paths):
    """The fenced blocks of some pages → [(language, text)]."""
    return [block for path in paths for block in re.findall(r'^```([^\n]*)\n(.*?)^```$', read(path), re.S | re.M)]


def unrolled(script):
    """A shell script in which each loop `for x in 1 2; do ... done` stands for its first value alone."""
    return re.sub(r'^for (\w+) in (\S+).*?; do\n(.*?)^done$', lambda loop: loop[3].replace(f'${loop[1]}', loop[2]),
                  script, flags=re.S | re.M)


def commands_in(*paths):
    """The commands of every fenced block of some pages, split at && and without their comments."""
    scripts = [unrolled(text) for language, text in fences(*paths) if language == 'bash']
    lines = [line.split('   #')[0].strip() for script in scripts for line in script.splitlines()]
    return list(dict.fromkeys(part.strip() for line in lines for part in line.split('&&') if part.strip()))


def readme_commands():
    """The commands of all pages but the one that tests/test_own_data.py runs as a whole."""
    return commands_in(*[page for page in PAGES if not page.endswith('own_data.md')])


def small_prepare(args, tiny, trained, tmp_path):
    args.append(f'--name={tmp_path}/set')
    encoded = any(arg.startswith('--encoder=vit') for arg in args)
    if encoded:
        args += ['--size=32', f'--weights={official_weights(tmp_path / "vitl.pt")}']
    if '--source=clips' in args:
        args.append(f'--source={own_clips(tmp_path / "clips", layout="pictures" if encoded else "features")}')
    else:
        args += ['--clips=6', '--test_clips=4'] if encoded else ['--size=32', '--dim=24', '--clips=6', '--test_clips=4']
    if any(arg.startswith('--split=') for arg in args):
        for i, number in enumerate((17000, 17001, 22000, 23000)):
            own_clip(tmp_path / 'clips' / f'clip_{number}', i + 1)
        args += [f'--source={tmp_path}/clips', '--split=train:17000-17001,B:22000-22000,A2:23000-23000']
    return args


def small_train(args, tiny, trained, tmp_path):
    starts = {
        'config/oracle.py': trained['vit'],
        'config/finetune_vjepa2_ac.py': official_predictor(tmp_path / 'ac.pt'),
    }
    init_from = [f'--init_from={starts[arg]}' for arg in args if arg in starts]
    args += [*TINY, f'--data={tiny}', f'--out={tmp_path}/x.pt', '--accumulation=1', *init_from]
    if '--resume=True' in args:
        run('train.py', *[arg for arg in args if arg != '--resume=True'], '--stop_at=3')
    return args


# The run of adapt.py with every row and every picture, the oracle's among them.
ALL_DRAWN = '--out=out/aba_both'


def small_adapt(args, tiny, trained, tmp_path):
    # The checkpoints of assets/ do not fit the tiny set; tests/test_data.py runs them.
    files = {'out/hope.pt': trained['hope'], 'out/vit.pt': trained['vit'], 'out/oracle.pt': trained['vit'],
             'out/hope_medium.pt': trained['hope'], 'out/memory.pt': f'{tmp_path}/memory.pt',
             'assets/hope.pt': trained['hope'], 'assets/vit.pt': trained['vit']}
    for file, small in files.items():
        args = [arg.replace(file, small) for arg in args]
    if ALL_DRAWN not in args and not any(arg.startswith(('--methods=', 'config/')) for arg in args):
        # Every method, and the tuning of their rates: once here, and in tests/test_adapt.py.
        args.append('--methods=frozen, memory')
    args += [f'--data={tiny}', f'--out={tmp_path}/aba', '--clips=4', '--probe_clips=4', '--tune_clips=1', '--device=cpu']
    if 'config/report.py' in args:
        args += [f'--ckpt={trained["hope"]},{trained["vit"]}', f'--oracle={trained["vit"]}', '--streams=2']
    if f'--memory_in={tmp_path}/memory.pt' in args:
        run('adapt.py', *[arg.replace('memory_in', 'memory_out') for arg in args], f'--out={tmp_path}/first')
    return args


def small_bench(args, tiny, trained, tmp_path):
    return [*args, '--features=24', '--grid=2', '--steps=2', '--repeats=1', '--vit=config/vit_jump.py',
            '--hope=config/hope_jump.py', '--device=cpu']


def small_ablate(args, tiny, trained, tmp_path):
    args = [f'--oracle={trained["vit"]}' if arg.startswith('--oracle=') else arg for arg in args]
    return [*args, f'--data={tiny}', f'--out={tmp_path}/ablation', '--clips=4', '--tune_clips=1', '--seeds=1',
            '--max_iters=2', '--variants=HOPE', '--extra=' + ' '.join(TINY), '--device=cpu']


def small_compare(args, tiny, trained, tmp_path):
    # The arguments without dashes are folders of results.
    for seed, folder in enumerate(arg for arg in args if not arg.startswith('--')):
        fake_results(tmp_path / folder, seed=seed)
    args = [arg if arg.startswith('--') else str(tmp_path / arg) for arg in args]
    return [*args, f'--out={tmp_path}/compare']


# The arguments of each script's commands, on the smallest settings that still run everything.
SMALL = {'prepare.py': small_prepare, 'train.py': small_train, 'adapt.py': small_adapt,
         'compare.py': small_compare, 'bench.py': small_bench, 'ablate.py': small_ablate}


@pytest.mark.parametrize('command', [c for c in readme_commands() if c.startswith(('python', 'torchrun'))])
def test_command(command, tiny, trained, tmp_path):
    program, *words = shlex.split(command)
    launcher = ()
    if program == 'torchrun':
        while words[0].startswith('--'):
            launcher += re.sub('nproc_per_node=.*', 'nproc_per_node=2', words.pop(0)),
        launcher = sys.executable, '-m', 'torch.distributed.run', *launcher
    script, *args = words
    if '--help' in args:
        assert '--' in run(script, *args).stdout
        return
    args = SMALL[script](args, tiny, trained, tmp_path)
    run(script, *args, launcher=launcher, pictures=ALL_DRAWN in words)


def test_other_commands():
    """The requirements are there, and so are the tests and the markers that pytest is called with."""
    markers = re.findall('^markers = (.*?):', read(os.path.join(ROOT, 'pytest.ini')), re.M)
    others = [shlex.split(c) for c in readme_commands() if not c.startswith(('python', 'torchrun'))]
    assert {words[0] for words in others} == {'pip', 'pytest'}
    for program, *words in others:
        for option, value in zip(words, words[1:]):
            assert option != '-r' or os.path.exists(os.path.join(ROOT, value))
            assert option != '-m' or value in markers


def test_licence_and_citation():
    licence = read(os.path.join(ROOT, 'LICENSE'))
    assert licence.startswith('MIT License\n') and 'nanoHOPE contributors' in licence and 'WITHOUT WARRANTY' in licence
    lines = read(os.path.join(ROOT, 'CITATION.cff')).splitlines()
    # A YAML of plain lines: what a version 1.2.0 must have, and the licence.
    keys = [line.partition(':')[0] for line in lines if line[0] not in ' -']
    assert keys == ['cff-version', 'message', 'title', 'type', 'license', 'authors', 'references']
    assert all(re.fullmatch(r' *(- )*(?=[a-z-])[a-z-]+:( [^ ].*)?', line) for line in lines), lines
    assert 'cff-version: 1.2.0' in lines and 'license: MIT' in lines
    assert [line.split('year: ')[1] for line in lines if 'year: ' in line] == ['2025', '2025']


def test_the_two_commands_are_there():
    text = read(README)
    trained = 'python train.py config/hope_jump.py && python adapt.py --ckpt=out/hope.pt'
    assert f'pip install -r requirements.txt && {trained}' in text
    assert 'pip install -r requirements.txt && pytest' in text


def test_the_python_examples(tiny, trained, tmp_path):
    encode, predict = sorted((text for language, text in fences(*PAGES) if language == 'python'), key=len)
    scope = {}
    exec(predict.replace('out/hope.pt', trained['hope']).replace("'slide'", repr(tiny)), scope)
    assert scope['z_8'].shape == scope['z'][:, 7].shape
    scope = {'video': torch.randn(2, 3, 4, 32, 32)}
    exec(encode.replace('vitl.pt', official_weights(str(tmp_path / 'vitl.pt'))), scope)
    assert scope['features'].shape == (2, 2 * 4, 768)


# ---- the pages themselves ----------------------------------------------------------------------------------------------

def anchors(path):
    """The anchors of a page, made from its headings as GitHub does."""
    headings = re.findall(r'^#+ (.*)$', re.sub(r'^```.*?^```$', '', read(path), flags=re.S | re.M), re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def links(path):
    """The links and pictures of a page to other files → [(file, anchor)]; '' for a file or anchor that is not named."""
    targets = re.findall(r'\]\(([^)\s]+)\)', read(path))
    return [target.partition('#')[::2] for target in targets if not target.startswith(('http:', 'https:'))]


@pytest.mark.parametrize('page', PAGES, ids=lambda page: os.path.relpath(page, ROOT))
def test_page(page):
    """Links lead somewhere, commands are where the tests find them, tables are whole, pictures say what is on them."""
    for file, anchor in links(page):
        target = os.path.normpath(os.path.join(os.path.dirname(page), file)) if file else page
        assert os.path.exists(target), file
        assert not anchor or anchor in anchors(target), (file, anchor)
    text = read(page)
    assert text.count('```') == 2 * len(fences(page))
    for language, block in fences(page):
        assert language in ('', 'bash', 'python')
        assert language == 'bash' or not re.search(r'^(\$|python |torchrun |pip )', block, re.M), block
    assert not re.search('`(python|torchrun) ', text), 'a command that is not in a block of its own'
    for table in re.findall(r'(?:^\|.*\n)+', text, re.M):
        rows = table.splitlines()
        assert set(rows[1]) <= set('|-') and len({row.count('|') for row in rows}) == 1, table
    assert '![]' not in text


def test_readme_leads_everywhere():
    """The README is short, and every page of docs/ is linked there."""
    assert len(read(README).split()) <= 1600
    assert {os.path.relpath(page, ROOT) for page in PAGES} - {'README.md'} <= {file for file, _ in links(README)}
