"""
What the user can mend, in one table: the script, its arguments, and words of the one line that it ends with.

A row is checked in this process, by the functions that the script calls before it begins. One row of each script goes
through the script itself, which must exit with status 2 and write nothing; so does every row under -m trust. Elsewhere: bad
clips in test_prepare.py, files of official weights in test_vjepa2.py, damaged and hostile files in trust/.
"""
import ast
import importlib.util
import os
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
from conftest import FEW, ROOT, TINY, counted, fake_results, official_predictor, official_weights, run

import adapt
import compare
import hope
import prepare
from configurator import Refusal, configure
from data import open_split
from model import Sizes, pick_device
from support import own_clips
from support.files import read_sealed, write_sealed
from support.running import refuse_existing
from vjepa2 import MODELS, start_from

# What every row of a script begins with. {names} are files and folders of the fixture `places`.
BEGINNINGS = {
    'train.py': [*TINY, '--data={tiny}', '--out={empty}/x.pt'],
    'adapt.py': [*FEW, '--ckpt={vit}', '--data={tiny}', '--out={empty}/aba'],
    'prepare.py': ['--name={empty}/set', '--device=cpu'],
    'compare.py': ['--out={empty}/compare'],
    'bench.py': [],
    'ablate.py': [],
}

# Refused by configure(), which every script begins with.
KNOBS = [
    # A name that is no knob.
    ('train.py', '--lr=1e-3', "no knob is called 'lr'; did you mean --learning_rate?"),
    ('train.py', '--lr 1e-3', "no knob is called 'lr'; did you mean --learning_rate?"),
    ('adapt.py', '--lr=1e-3', 'did you mean --ln_rate?'),
    ('train.py', '--bs=8', 'did you mean --batch_size?'),
    ('train.py', '--steps=8', 'did you mean --max_iters?'),
    ('train.py', '--n-layer=8', 'did you mean --depth?'),
    ('train.py', '--dataset=x', 'did you mean --data?'),
    ('train.py', '--output=x', 'did you mean --out?'),
    ('adapt.py', '--checkpoint=x', 'did you mean --ckpt?'),
    ('train.py', '--max_iterz=3', "'max_iterz'; did you mean --max_iters?"),
    ('train.py', '--clips=10', "no knob is called 'clips'; it is a knob of prepare.py, adapt.py, ablate.py"),
    ('train.py', '--=3', "no knob is called ''"),
    ('adapt.py', '--batch_size=8', "'batch_size'; it is a knob of train.py"),
    ('adapt.py', 'config/hope_jump.py', "no knob is called 'model'; it is a knob of train.py"),
    ('prepare.py', '--nam=x', "did you mean --name?"),
    # What is no --name=value.
    ('train.py', '--batch_size', '--batch_size needs a value: --batch_size=...'),
    ('train.py', '--batch-size --resume', '--batch-size needs a value'),
    ('train.py', '--', "no knob is called ''"),
    ('train.py', 'batch_size=8', 'two dashes: --batch_size=8'),
    ('train.py', '-batch_size=8', 'two dashes: --batch_size=8'),
    ('train.py', 'config', 'neither a config file (something.py) nor --key=value'),
    ('train.py', 'config/nowhere.py', 'config file config/nowhere.py not found'),
    ('train.py', 'config/hope_jump.py.py', 'config file config/hope_jump.py.py not found'),
    # A value of another type.
    ('train.py', '--batch_size=many', "batch_size must be a whole number, not 'many'"),
    ('train.py', '--batch_size=2.5', 'batch_size must be a whole number, not 2.5'),
    ('train.py', '--batch_size=True', 'batch_size must be a whole number, not True'),
    ('train.py', '--batch_size=', "batch_size must be a whole number, not ''"),
    ('train.py', '--max_iters=1e3', 'max_iters must be a whole number, not 1000.0'),
    ('train.py', '--max_iters=[3]', 'max_iters must be a whole number, not [3]'),
    ('train.py', '--learning_rate=fast', "learning_rate must be a number, not 'fast'"),
    ('train.py', '--learning_rate=inf', "learning_rate must be a number, not 'inf'"),
    ('train.py', '--learning_rate=nan', "learning_rate must be a number, not 'nan'"),
    ('train.py', '--learning_rate=1e999', 'learning_rate must be finite'),
    ('train.py', '--learning_rate=1' + 400 * '0', 'learning_rate must be finite'),
    ('train.py', '--width=1' + 20 * '0', 'width = 100000000000000000000 is too large'),
    ('train.py', '--resume=yes', "resume must be True or False, not 'yes'"),
    ('train.py', '--resume=1', 'resume must be True or False, not 1'),
    ('train.py', '--resume 1', '1: neither a config file (something.py) nor --key=value'),
    ('prepare.py', '--clips=many', "clips must be a whole number, not 'many'"),
    # A value out of range.
    ('train.py', '--learning_rate=0', 'learning_rate = 0.0 is not allowed; allowed: >0'),
    ('train.py', '--learning_rate=-1', 'learning_rate = -1.0 is not allowed; allowed: >0'),
    ('train.py', '--batch_size=0', 'batch_size = 0 is not allowed; allowed: 1..'),
    ('train.py', '--seed=-1', 'allowed: 0..4294967295'),
    ('train.py', '--seed -1', 'allowed: 0..4294967295'),
    ('train.py', '--seed=99999999999999999999', 'allowed: 0..4294967295'),
    ('train.py', '--lambda_start=1.5', 'lambda_start = 1.5 is not allowed; allowed: 0..1'),
    ('train.py', '--lambda_start=-0.1', 'lambda_start = -0.1 is not allowed; allowed: 0..1'),
    ('train.py', '--beta2=1', 'allowed: 0..0.9999'),
    ('train.py', '--heads=0', 'heads = 0 is not allowed'),
    ('train.py', '--depth=-1', 'depth = -1 is not allowed'),
    ('train.py', '--model=transformer', "model = 'transformer' is not allowed; allowed: hope | vit"),
    ('train.py', '--model=HOPE', "model = 'HOPE' is not allowed; allowed: hope | vit"),
    ('train.py', '--loss=l2', 'allowed: jump | rollout'),
    ('train.py', '--mixer=both,titan', 'allowed: titan | attention | both'),
    ('adapt.py', '--clips=0', 'clips = 0 is not allowed'),
    ('adapt.py', '--streams=0', 'streams = 0 is not allowed'),
    ('adapt.py', '--ln_rate=-1', 'ln_rate = -1.0 is not allowed; allowed: 0..'),
    ('adapt.py', '--dtype=float16', 'allowed: auto | float32 | bfloat16'),
    ('prepare.py', '--dim=0', 'allowed: 3..1536'),
    ('prepare.py', '--encoder=resnet', '| patch | vitl'),
    ('prepare.py', '--content=sound', '| features | pictures'),
]

# What stands in a config file of train.py.
CONFIGS = [
    ('batch_size = "8"', "batch_size must be a whole number, not '8'"),
    ('batch_size = True', 'batch_size must be a whole number, not True'),
    ('depth = 2.0', 'depth must be a whole number, not 2.0'),
    ('seed = [1]', 'seed must be a whole number, not [1]'),
    ('model = None', 'model must be text, not None'),
    ('batch_size = = 8', 'line 1: SyntaxError'),
    ('while', 'line 1: SyntaxError'),
    ('"unfinished', 'line 1: SyntaxError: unterminated string'),
    ('\x00', 'null bytes'),
    ('seed = 1\nbatch_size = 1 / 0', 'line 2: ZeroDivisionError'),
    ('import os', 'line 1: ImportError'),
    ('print(1)', "line 1: NameError: name 'print'"),
    ('eval("1")', "line 1: NameError: name 'eval'"),
    ('def f(): pass', "no knob is called 'f'"),
    ('x = 1', "no knob is called 'x'"),
    ('clips = 10', 'it is a knob of prepare.py, adapt.py, ablate.py'),
    ('max_iterz = 3', 'did you mean --max_iters?'),
]

# Refused by what a script checks before it begins.
REQUESTS = [
    # Sizes that do not fit together.
    ('train.py', '--width=25', 'multiple of heads'),
    ('train.py', '--heads=96', 'at least 6 channels per head'),
    ('train.py', '--cms_periods=', "cms_periods = '': must be whole numbers"),
    ('train.py', '--cms_periods=1;4', "cms_periods = '1;4': must be whole numbers"),
    ('train.py', '--cms_periods=1,x', "cms_periods = '1,x': must be whole numbers"),
    ('train.py', '--cms_periods=1,0', 'more often than at every tick'),
    ('train.py', '--adapts=', "adapts = '': allowed are k, v, mem, eta, alpha"),
    ('train.py', '--adapts=key', "adapts = 'key': allowed are k, v, mem, eta, alpha"),
    ('train.py', '--memory_hidden=4 --adapts=mem', 'share the hidden layer'),
    ('train.py', '--memory_hidden=4 --self_targets=False', 'share the hidden layer'),
    # Knobs that do not go together.
    ('train.py', '--accumulation=3', 'multiple of accumulation x processes x teacher_every = 6'),
    ('train.py', '--start_rate=0.1', 'rises from it to learning_rate'),
    ('train.py', '--states=True', "set model = 'vit', rope = 'vjepa2' and loss = 'rollout'"),
    ('train.py', '--states=True --model=vit --rope=vjepa2 --loss=rollout', 'has no states'),
    ('train.py', '--jump_last=8', 'at most 7 can be jumped to'),
    ('train.py', '--loss=rollout --rollout_steps=8', 'at most 7 can be predicted'),
    ('adapt.py', '--out=', 'must name a folder for the results'),
    ('adapt.py', '--methods=frozen,TTA', '--methods=frozen,TTA: allowed are frozen, LN-TTA'),
    ('adapt.py', '--methods=LN-TTA,CMS', 'CMS can adapt none of'),
    ('adapt.py', '--tune_on= --methods=CMS', 'CMS can adapt none of'),
    ('adapt.py', '--cms_rate=3', '--cms_rate=3: CMS is not among the methods of this run'),
    ('adapt.py', '--phases=A,C,A --tune_on=C', 'would prove nothing'),
    ('adapt.py', '--phases=', 'name one domain or more'),
    ('adapt.py', '--streams=2 --plan=True', 'goes with one stream'),
    ('adapt.py', '--phases=A1,nowhere,A2', "no split 'test_A1', 'test_nowhere', 'test_A2'; it has train, val"),
    ('adapt.py', '--tune_on=B', 'would prove nothing'),
    ('adapt.py', '--tune_on=C,A', 'would prove nothing'),
    ('adapt.py', '--tune_on=C,val', 'would prove nothing'),
    ('adapt.py', '--memory_out=x.pt --memory_in=x.pt', 'which this run needs'),
    ('adapt.py', '--memory_out=x.pt --methods=frozen', 'has a memory to keep'),
    ('adapt.py', '--memory_out={vit}', 'which this run needs'),
    ('adapt.py', '--memory_out={empty}/aba/table.txt', 'which this run needs'),
    ('adapt.py', '--memory_out={hope}', 'is no memory that could be replaced'),
    ('adapt.py', '--out={results}', 'clips = 6 (was 5)'),
    ('adapt.py', '--out={tables}', 'holds results.json of another run: an earlier version of adapt.py'),
    ('compare.py', '--runs=', 'name the folders of finished runs'),
    ('compare.py', '{results} {empty}', 'no results at'),
    ('compare.py', '{results} {results}/', 'the same run twice'),
    ('compare.py', '{results} {copied}', 'are the same run'),
    ('compare.py', '{results} {shorter}', 'cannot be compared: clips = 5 and 4'),
    ('compare.py', '{tables}', 'is not what this version of adapt.py writes'),
    ('compare.py', '{results} --methods=memory,TTA', '--methods=memory,TTA: allowed are copy, blank, frozen'),
    ('compare.py', '{results} --labels=Ours', 'write row=label'),
    ('compare.py', '{results} --labels=TTA=Ours', "no row is called 'TTA'; there are copy, blank, HOPE frozen"),
    ('compare.py', '{results} --labels=copy=blank', 'two rows would have the same name'),
    ('compare.py', '{results} --out={results}', 'of other runs (not of compare.py)'),
    ('prepare.py', '--size=33', 'must be a multiple of 16'),
    ('prepare.py', '--split=train:1-2', 'name their folder with --source'),
    ('prepare.py', '--content=pictures', 'name their folder with --source'),
    ('prepare.py', '--in_place=True', 'name their folder with --source'),
    ('prepare.py', '--skip_bad=True', 'name their folder with --source'),
    ('prepare.py', '--source={both} --clips=9', '--clips=9: is for the built-in physics'),
    ('prepare.py', '--source={both}', 'has features and pictures; choose --content=features'),
    ('prepare.py', '--source={both} --content=features --encoder=vitl', '--encoder=vitl: features are taken as they are'),
    ('prepare.py', '--source={both} --content=features --size=32', '--size=32: features are taken as they are'),
    ('prepare.py', '--source={both} --content=pictures --in_place=True', '--in_place=True: is for features'),
    ('prepare.py', '--dtype=bfloat16', '--dtype=bfloat16: is for V-JEPA 2'),
    ('prepare.py', '--weights=x.pt', '--weights=x.pt: is for V-JEPA 2'),
    ('prepare.py', '--encoder=vitl --dim=24', '--dim=24: is for the patch encoder'),
    ('prepare.py', '--encoder=vitb2.1 --weights={weights_2_1} --size=16', 'two rows and two columns'),
    ('bench.py', '--steps=8,x', '--steps=8,x: must be whole numbers'),
    ('bench.py', '--steps=0', '--steps=0: must be whole numbers from 1 to 1,000,000'),
    ('ablate.py', '--seeds=', '--seeds=: name one'),
    ('ablate.py', '--variants=HOPE,LSTM', '--variants=HOPE,LSTM: allowed are HOPE, ViT-AC'),
    # Devices.
    ('train.py', '--device=tpu', 'allowed are auto'),
    ('train.py', '--device=cuda:x', 'allowed are auto'),
    ('train.py', '--device=cpu:', 'allowed are auto'),
    ('train.py', '--device=cuda:²', 'allowed are auto'),
    ('train.py', '--device=cuda:99', 'no such device'),
    ('prepare.py', '--device=cuda:99', 'no such device'),
    # Data sets and splits that are not there, or not enough.
    ('train.py', '--data=', 'a data set needs a name'),
    ('train.py', '--data=./nowhere', 'make it with: python prepare.py --name=./nowhere'),
    ('train.py', '--split=nowhere', "has no split 'nowhere'; it has train, val"),
    ('adapt.py', '--data=./nowhere', 'no data set at'),
    ('adapt.py', '--tune_on=moon', "has no split 'test_moon'; it has train, val"),
    ('adapt.py', '--clips=200', 'lower --clips, --probe_clips or --tune_clips'),
    ('adapt.py', '--tune_clips=200', 'lower --clips, --probe_clips or --tune_clips'),
    ('adapt.py', '--data={other}', 'trained on features of size 24'),
    ('prepare.py', '--name=', 'a data set needs a name'),
    ('prepare.py', '--name=..', "'..' is no name of a data set"),
    ('prepare.py', '--name={folder}', 'exists and is not a data set'),
    ('prepare.py', '--source={both} --name={both}/set', 'is in the folder of your clips'),
    ('prepare.py', '--source=nowhere', 'neither "physics" nor a folder'),
    # Checkpoints and weights that are not there, or are no such thing.
    ('train.py', '--out=', 'must name a file'),
    ('train.py', '--out=x.csv', 'and not the log'),
    ('train.py', '--out={vit}', 'exists; go on with --resume=True'),
    ('train.py', '--resume=True', 'no checkpoint at'),
    ('train.py', '--resume=True --model=vit --out={vit} --max_iters=9', 'other settings: max_iters = 9 (was 6)'),
    ('train.py', '--init_from=nowhere.pt', 'there is no such file'),
    ('train.py', '--init_from={vit}', 'does not fit this predictor'),
    ('train.py', '--model=vit --init_from={official}', "set rope = 'vjepa2'"),
    ('train.py', '--model=vit --init_from={official} --rope=vjepa2 --depth=1', 'predictor_blocks.1'),
    ('adapt.py', '--ckpt=', '--ckpt=: name a checkpoint'),
    ('adapt.py', '--ckpt=nowhere.pt', 'no checkpoint at nowhere.pt'),
    ('adapt.py', '--oracle=nowhere.pt', 'no checkpoint at nowhere.pt'),
    ('adapt.py', '--ckpt={text}', 'text.pt is damaged or cut short, or was not written by this code'),
    ('adapt.py', '--ckpt={short}', 'short.pt is damaged or cut short'),
    ('adapt.py', '--ckpt={foreign}', 'foreign.pt is damaged or cut short, or was not written by this code'),
    ('adapt.py', '--ckpt={no_jump}', 'jump_last = 0 of clips of 8 steps'),
    ('adapt.py', '--ckpt={long_jump}', 'jump_last = 8 of clips of 8 steps'),
    ('adapt.py', '--ckpt={rollout},{vit}', 'trained with different losses'),
    ('adapt.py', '--memory_in=nowhere.pt', 'nowhere.pt could not be read'),
    ('prepare.py', '--encoder=vitl --weights=none.pt', "no V-JEPA 2 weights at 'none.pt'"),
    ('prepare.py', '--encoder=vitb2.1', 'vjepa2_1_vitb_dist_vitG_384.pt and name it with --weights'),
    ('prepare.py', '--encoder=vitg2.1', 'get https://dl.fbaipublicfiles.com/vjepa2/vjepa2_1_vitg_384.pt'),
    ('prepare.py', '--encoder=vitb2.1 --weights={weights_2_1} --part=encoder', "no part 'encoder'; it has 'ema_encoder'"),
    ('bench.py', '--vit=nowhere.py', 'config file nowhere.py not found'),
]

# These go through the script in the quick suite, too: one of each.
SCRIPTS = [
    ('train.py', '--max_iterz=3', "'max_iterz'; did you mean --max_iters?"),
    ('train.py', '--resume=True --model=vit --out={vit} --max_iters=9', 'other settings: max_iters = 9 (was 6)'),
    ('adapt.py', '--data={other}', 'trained on features of size 24'),
    ('compare.py', '{results} {shorter}', 'cannot be compared: clips = 5 and 4'),
    ('prepare.py', '--source=nowhere', 'neither "physics" nor a folder'),
    ('bench.py', '--steps=8,x', '--steps=8,x: must be whole numbers'),
    ('ablate.py', '--variants=HOPE,LSTM', '--variants=HOPE,LSTM: allowed are HOPE, ViT-AC'),
]


@pytest.fixture(scope='module')
def places(tiny, trained, tmp_path_factory):
    """The files and folders that rows name: {name: path}."""
    folder = tmp_path_factory.mktemp('refusals')
    whole = open(trained['vit'], 'rb').read()
    (folder / 'empty').mkdir()
    (folder / 'text.pt').write_text('hello')
    (folder / 'short.pt').write_bytes(whole[:len(whole) // 2])
    torch.save({'a': 1}, folder / 'foreign.pt')
    run('train.py', *TINY, f'--data={tiny}', '--loss=rollout', '--max_iters=1', f'--out={folder}/rollout.pt')
    run('prepare.py', f'--name={folder}/other', '--size=32', '--dim=12', '--clips=4', '--test_clips=24')
    official_predictor(folder / 'official.pt')
    official_weights(folder / 'weights_2_1.pt', part='ema_encoder', version='2.1')
    for name in ('results', 'copied'):
        fake_results(folder / name, clips=5)
    fake_results(folder / 'shorter', clips=4, seed=1)
    fake_results(folder / 'tables', key=None, rows=None)
    stored = read_sealed(trained['vit'])
    write_sealed(f'{folder}/no_jump.pt', {**stored, 'jump_last': 0})
    write_sealed(f'{folder}/long_jump.pt', {**stored, 'jump_last': 8})
    names = 'text', 'short', 'foreign', 'rollout', 'official', 'weights_2_1', 'no_jump', 'long_jump'
    files = {name: f'{folder}/{name}.pt' for name in names}
    for clip in conftest.own_clips(folder / 'both', ('train', 'val'), 'pictures').glob('*/*'):
        (clip / 'feature_maps').mkdir()
        np.save(clip / 'feature_maps' / 'z.npy', np.ones((8, 4, 24), np.float16))
    folders = {name: f'{folder}/{name}' for name in ('empty', 'other', 'both', 'results', 'copied', 'shorter', 'tables')}
    return {**files, **trained, **folders, 'tiny': tiny, 'folder': folder}


def arguments(script, written, places):
    """The whole command line of a row."""
    return [word.format(**places) for word in [*BEGINNINGS[script], *written.split(' ')]]


# ---- in this process ---------------------------------------------------------------------------------------------------

def settings_of(script, args):
    """The settings that configure() makes of a command line."""
    return configure({'__file__': os.path.join(ROOT, script)}, args, files='runs' if script == 'compare.py' else '')


def function_of(script, name, **more):
    """A function of a script that cannot be imported; `more`: what it uses and does not get handed in."""
    with open(os.path.join(ROOT, script), encoding='utf-8') as f:
        tree = ast.parse(f.read())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    scope = {'os': os, 'importlib': importlib, 'Refusal': Refusal, 'refuse_existing': refuse_existing, **more}
    exec(compile(tree, script, 'exec'), scope)
    return scope[name]


def check_train(settings):
    knobs = SimpleNamespace(**settings)
    where = pick_device(knobs.device)
    function_of('train.py', 'check_settings')(knobs, processes=1)
    Sizes.from_settings(settings)
    if knobs.resume:
        hope.load(knobs.out)
    train_clips = open_split(knobs.data, knobs.split)
    function_of('train.py', 'check_clips')(knobs, train_clips, open_split(knobs.data, 'val'))
    if knobs.init_from:
        sizes = Sizes.from_settings(settings, feature_dim=24, grid=(2, 2))
        start_from(hope.build(sizes).to(where), knobs.init_from)


def check_adapt(settings):
    adapt.prepared(SimpleNamespace(**settings))


def check_compare(settings):
    compare.prepared(SimpleNamespace(**settings))


def check_prepare(settings):
    knobs = SimpleNamespace(**settings)
    where = pick_device(knobs.device)
    prepare.check_settings(settings)
    if knobs.source != 'physics':
        found, _ = own_clips.find_clips(knobs.source, knobs.split)
        own_clips.choose_content(knobs.content, found)
    if knobs.encoder in MODELS:
        part = knobs.part or MODELS[knobs.encoder].part
        prepare.load_vjepa2_encoder(knobs.encoder, knobs.weights, part, knobs.size, knobs.encode, where)


CHECKS = {'train.py': check_train, 'adapt.py': check_adapt, 'compare.py': check_compare, 'prepare.py': check_prepare}


def says(refusal, words):
    """Whether a Refusal is one line with these words in it."""
    return words in str(refusal.value) and '\n' not in str(refusal.value)


@pytest.mark.parametrize('script, written, words', KNOBS)
def test_knobs(script, written, words):
    with pytest.raises(Refusal) as refusal:
        settings_of(script, written.split(' '))
    assert says(refusal, words), refusal.value


@pytest.mark.parametrize('text, words', CONFIGS)
def test_configs(text, words, tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(text)
    with pytest.raises(Refusal) as refusal:
        settings_of('train.py', [str(path)])
    assert says(refusal, words) and 'config.py' in str(refusal.value), refusal.value


@pytest.mark.parametrize('script, written, words', [row for row in REQUESTS if row not in SCRIPTS and row[0] in CHECKS])
def test_requests(script, written, words, places):
    settings = settings_of(script, arguments(script, written, places))
    with pytest.raises(Refusal) as refusal:
        CHECKS[script](settings)
    assert says(refusal, words), refusal.value


def test_a_good_command_line_passes(places):
    """What the rows begin with is refused by nothing."""
    for script, check in CHECKS.items():
        written = '{results}' if script == 'compare.py' else '--device=cpu'
        check(settings_of(script, arguments(script, written, places)))


# ---- through the scripts -----------------------------------------------------------------------------------------------

@counted(len(SCRIPTS), len(KNOBS) + len(CONFIGS) + len(REQUESTS))
def test_scripts(count, places, tmp_path, note):
    """One line, which begins with the script's name, exit status 2, and nothing written."""
    cwd, config = tmp_path / 'cwd', tmp_path / 'config.py'
    cwd.mkdir()
    rows, wrong = SCRIPTS, []
    if count > len(SCRIPTS):
        rows = [*KNOBS, *REQUESTS, *(('train.py', None, *row) for row in CONFIGS)]
    for script, written, *text, words in rows:
        if text:
            config.write_text(text[0])
            written = str(config)
        done = run(script, *arguments(script, written, places), cwd=cwd, ok=False)
        said, left = done.stderr.strip(), os.listdir(cwd) + os.listdir(places['empty'])
        one_line = said.startswith(f'{script}: ') and words in said and '\n' not in said
        if done.returncode != 2 or not one_line or left:
            wrong.append((script, written, done.returncode, done.stderr[-500:], left))
    note('malformed command lines and configs', len(rows),
         f'{len(wrong)} without one line, status 2 and nothing written')
    assert not wrong, '\n'.join(map(str, wrong))
