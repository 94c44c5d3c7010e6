"""Fixtures: a tiny data set made by prepare.py, two tiny trained checkpoints, and a way to run the scripts."""
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
import torch

try:
    import resource
except ImportError:
    # Windows has no limits, and no fork server.
    resource = None

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TESTS)
sys.path.insert(0, ROOT)
torch.set_num_threads(1)

TINY = ['--depth=2', '--width=24', '--heads=2', '--mlp_hidden=32', '--cms_hidden=10', '--batch_size=8', '--max_iters=6',
        '--teacher_every=2', '--inverse_batch=8', '--eval_interval=3', '--eval_clips=8', '--log_interval=1', '--device=cpu']
# A stream of adapt.py with every kind of clip in it.
FEW = ['--clips=6', '--probe_clips=6', '--probe_every=6', '--tune_clips=1', '--device=cpu']
FEW_KNOBS = SimpleNamespace(clips=6, probe_clips=6, probe_every=6, tune_clips=1, streams=3)
# A data set of 2 x 2 patches, D = 24.
SMALL_SET = ['--size=32', '--dim=24', '--clips=48', '--test_clips=24', '--device=cpu']


def counted(few, every):
    """Run a test with its argument `count` = few in the quick suite, = every under -m trust."""
    return pytest.mark.parametrize('count', [few, pytest.param(every, marks=pytest.mark.trust)])


def optional(module):
    """An optional package; skips the test where it is missing, or installed but broken, which can raise anything."""
    try:
        return importlib.import_module(module)
    except Exception as error:
        pytest.skip(f'{module} cannot be imported: {error}')


# ---- running the scripts -----------------------------------------------------------------------------------------------

# It imports torch once; a script then starts in a fork of it, in a tenth of the time.
FORKS = multiprocessing.get_context('forkserver' if resource else 'spawn')
if resource:
    FORKS.set_forkserver_preload(['torch', 'torch._dynamo', 'numpy', 'matplotlib.pyplot'])


def child(path, args, cwd, environment, out, err, limits, pictures):
    """Run a script as `python path args` would, in this fresh process."""
    # What torch has created is not searched for garbage: that took most of the time of a small script.
    gc.freeze()
    for stream, file in ((1, out), (2, err)):
        if file:
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(1)
    if not pictures:
        # Importing it fails, as where it is not installed.
        sys.modules['matplotlib'] = None
    # A GPU's threads would not survive a fork.
    if resource and not torch.cuda.is_available():
        subprocess.run = fork_script
    for name, most in limits.items():
        if name == 'RLIMIT_AS':
            # Bytes beyond what is mapped already.
            with open('/proc/self/statm') as f:
                most += int(f.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(getattr(resource, name), (most, most))
    sys.argv = [path, *args]
    # As for a user, the project is found by the folder of the script and in no other way.
    sys.path[:] = [os.path.dirname(path), *(folder for folder in sys.path if folder not in ('', ROOT, TESTS))]
    try:
        runpy.run_path(path, run_name='__main__')
    except (Exception, KeyboardInterrupt):
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def text_of(file):
    """What stands in a file; nothing where it is missing."""
    if not os.path.exists(file):
        return ''
    with open(file, encoding='utf-8') as f:
        return f.read()


REAL_RUN = subprocess.run


def fork_script(command, *more, capture_output=False, text=False, **options):
    """
    subprocess.run for a script that starts another one of the project: a fork is quicker than a new Python. Any other
    command is run as ever: check_output, which libraries call, ends here, too.
    """
    if command[0] != sys.executable or more or options:
        return REAL_RUN(command, *more, capture_output=capture_output, text=text, **options)
    with tempfile.TemporaryDirectory() as folder:
        out, err = [os.path.join(folder, name) for name in ('out', 'err')] if capture_output else (None, None)
        pictures = sys.modules['matplotlib'] is not None
        args = command[1], command[2:], os.getcwd(), {}, out, err, {}, pictures
        process = multiprocessing.get_context('fork').Process(target=child, args=args)
        process.start()
        process.join()
        said = [text_of(out), text_of(err)] if capture_output else []
    return subprocess.CompletedProcess(command, process.exitcode, *said)


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])


def run(script, *args, cwd=ROOT, launcher=(), processes=1, ok=True, meanwhile=None, limits=(), pictures=False):
    """
    Run a script of the project as a user would → CompletedProcess; ok=True asserts that it exits with 0.

    launcher: the command that starts it, such as torchrun. processes: so many at once, told of each other as torchrun
    would; one that fails counts. meanwhile(pid) is called once it runs. limits: {'RLIMIT_FSIZE': bytes, ...}. pictures:
    with matplotlib, which takes longer than all the rest.
    """
    if limits and not resource:
        pytest.skip('limits of a process are not known here')
    command = [os.path.join(ROOT, script), *map(str, args)]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'COLUMNS': '100'}
    if launcher:
        done = subprocess.run([*launcher, *command], cwd=cwd, capture_output=True, text=True, env=environment)
        assert not ok or done.returncode == 0, done.stdout + done.stderr
        return done
    if processes > 1:
        environment.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port(), WORLD_SIZE=str(processes))
    with tempfile.TemporaryDirectory() as folder:
        outs, errs = ([os.path.join(folder, f'{name}{rank}') for rank in range(processes)] for name in ('out', 'err'))
        started = []
        for rank in range(processes):
            ranked = {**environment, 'RANK': str(rank), 'LOCAL_RANK': str(rank)} if processes > 1 else environment
            arguments = command[0], command[1:], str(cwd), ranked, outs[rank], errs[rank], dict(limits), pictures
            started.append(FORKS.Process(target=child, args=arguments))
            started[-1].start()
        if meanwhile:
            meanwhile(started[0].pid)
        for process in started:
            process.join()
        status = next((process.exitcode for process in started if process.exitcode), 0)
        done = subprocess.CompletedProcess(command, status, ''.join(map(text_of, outs)), ''.join(map(text_of, errs)))
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


def refused(done):
    """The one line of a refusal: status 2, one line on stderr, no traceback."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and 'Traceback' not in done.stderr, done.stderr
    return lines[0]


# ---- what several tests look at ---------------------------------------------------------------------------------------

def pytest_xdist_auto_num_workers(config):
    """One process, which starts sooner than several, where files or tests are named."""
    if config.option.keyword or any('.py' in arg for arg in config.args):
        return 0


@pytest.fixture
def note(record_property):
    """note(what, count, outcome) adds a row to the table that `pytest -m trust` ends with."""
    return lambda *row: record_property('trust', row)


def pytest_terminal_summary(terminalreporter, config):
    if config.option.markexpr == 'trust':
        terminalreporter.section('trust')
        for report in terminalreporter.getreports('passed') + terminalreporter.getreports('failed'):
            for _, (what, count, outcome) in report.user_properties:
                terminalreporter.write_line(f'{what:<36}{count:>5}   {outcome}')


def common(tmp_path_factory, name, make):
    """
    A folder that all processes of this run of pytest have in common → its path.

    make(folder) fills it in the process that asks first; the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        base = base.parent
    folder, made = base / name, base / f'{name}.made'
    with filelock.FileLock(base / f'{name}.lock'):
        if not made.exists():
            # Of another process, whose attempt failed.
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    """The folder of a small data set, with its pictures."""
    def make(folder):
        run('prepare.py', f'--name={folder}/tiny', *SMALL_SET, pictures=True)
    return str(common(tmp_path_factory, 'data', make) / 'tiny')


@pytest.fixture(scope='session')
def trained(tiny, tmp_path_factory):
    """{'hope': path, 'vit': path}: checkpoints of a few steps on the tiny set."""
    def make(folder):
        for kind in ('hope', 'vit'):
            run('train.py', *TINY, f'--model={kind}', f'--data={tiny}', f'--out={folder}/{kind}.pt')
    folder = common(tmp_path_factory, 'out', make)
    return {kind: str(folder / f'{kind}.pt') for kind in ('hope', 'vit')}


@pytest.fixture(scope='session')
def checkpoints(trained):
    """HOPE and ViT-AC, as adapt.py reads them."""
    from experiment import read_checkpoints
    return read_checkpoints(f'{trained["hope"]},{trained["vit"]}', '', 'cpu')


@pytest.fixture(scope='session')
def hope(checkpoints):
    return checkpoints[0]


@pytest.fixture(scope='session')
def experiment(tiny):
    """The experiment that FEW_KNOBS asks for."""
    from data import open_split
    from experiment import build_experiment
    splits = {name: open_split(tiny, name) for name in ('test_A', 'test_B', 'test_C', 'val')}
    return build_experiment(FEW_KNOBS, ['A', 'B', 'A'], ['C'], splits, 'cpu')


def fake_results(folder, clips=30, seed=0, seeds=1, streams=1, phases=('A', 'B', 'A'), **changes):
    """
    Write the results.json of a finished run of adapt.py into a folder → the folder. `changes` replace entries of it.

    Frozen, both models lose 0.01 on A and 0.07 on all else; of that the memory gains 0.05, LN-TTA 0.03, and the oracle
    0.055. seed: that of the noise; seeds: how many checkpoints of each model.
    """
    rng = np.random.default_rng(seed)
    phases, rows = list(phases), []
    probe_at = [i * clips for i in range(len(phases) + 1)]

    def add(model, kind, method, on_a, on_b, number=1, **more):
        levels = np.repeat([on_a if phase == 'A' else on_b for phase in phases], clips)
        loss = levels + rng.normal(0, 0.001, (streams, len(levels)))
        probes = {}
        for phase in phases if model else []:
            probes[phase] = rng.normal(0.05, 0.001, (streams, len(probe_at))).tolist()
        rows.append({'model': model, 'kind': kind, 'seed': number, 'method': method, 'rate': None, 'rate_from': '',
                     'tta': False, 'carries': [], 'loss': loss.tolist(), 'metres': None, 'seconds': [0.002],
                     'probes': probes, 'diagnostics': [{'surprise': 1.0}] * len(levels) if model else [],
                     'planning': None, **more})

    add('', '', 'copy', 0.06, 0.09)
    add('', '', 'blank', 0.05, 0.055)
    kept = {'surprise': 1.0, 'surprise, action memory': 1.0, 'retention, action memory': 0.9,
            'gain, action memory': 1.5, 'angle, action memory': 10.0}
    for number in range(1, seeds + 1):
        add('HOPE', 'hope', 'frozen', 0.01, 0.07, number)
        add('HOPE', 'hope', 'memory', 0.01, 0.02, number, carries=['memory'],
            diagnostics=[kept] * (clips * len(phases)))
    for number in range(1, seeds + 1):
        add('ViT-AC', 'vit', 'frozen', 0.01, 0.07, number)
        add('ViT-AC', 'vit', 'LN-TTA', 0.01, 0.04, number, rate=0.003 + seed, rate_from='given', tta=True)
        add('ViT-AC', 'vit', 'LN-TTA', 0.01, 0.06, number, rate=0.0001, rate_from='plan', tta=True)
    add('oracle', 'oracle', 'frozen', 0.06, 0.015)
    counts = {phase: phases[:i].count(phase) + 1 for i, phase in enumerate(phases)}
    labels = [f'{phase}{phases[:i].count(phase) + 1}' if counts[phase] > 1 else phase for i, phase in enumerate(phases)]
    models = dict.fromkeys((row['model'], row['seed']) for row in rows if row['model'])
    checkpoints = [{'name': model, 'seed': number, 'path': f'{model}_{number}.pt', 'steps': 6}
                   for model, number in models]
    results = {'settings': {'clips': clips}, 'key': {'settings': {'clips': clips}, 'content': {'ckpt': [str(seed)]}},
               'phases': phases, 'labels': labels, 'domains': phases, 'clips': clips, 'streams': streams,
               'loss': 'jump', 'target_steps': [6, 7, 8], 'tuned_on': [], 'tuning': {}, 'beyond': None,
               'probe_at': probe_at, 'readout': None, 'simulator': None, 'checkpoints': checkpoints, 'rows': rows, **changes}
    os.makedirs(folder)
    with open(os.path.join(folder, 'results.json'), 'w', encoding='utf-8') as f:
        json.dump(results, f)
    return str(folder)


def own_clip(clip, number, layout='features'):
    """One clip in one of the user's layouts, with a push of (number, -1) in the fifth row of its actions."""
    rng = np.random.default_rng(number)
    (clip / 'actions_states').mkdir(parents=True)
    actions = np.zeros((16, 2))
    actions[4] = number, -1
    np.save(clip / 'actions_states' / 'actions.npy', actions)
    if layout == 'features':
        (clip / 'feature_maps').mkdir()
        np.save(clip / 'feature_maps' / 'vjepa2_vitl16.npy', rng.normal(size=(2048, 1024)).astype(np.float16))
        return
    # (16,40,48,3)
    video = np.kron(rng.integers(0, 256, (16, 5, 6, 3), dtype=np.uint8), np.ones((1, 8, 8, 1), np.uint8))
    if layout == 'video':
        np.save(clip / 'video.npy', video)
    elif layout == 'pictures':
        from PIL import Image
        (clip / 'rgb').mkdir()
        for i, frame in enumerate(video):
            Image.fromarray(frame).save(clip / 'rgb' / f'frame_{i + 1:05d}.png')


def own_clips(folder, splits=('train', 'val', 'test_A', 'test_B'), layout='features'):
    """A folder of clips in one of the user's layouts, 3 a split → its path."""
    for split in splits:
        for i in range(3):
            own_clip(folder / split / f'clip_{i:05d}', i + 1, layout)
    return folder


def official_weights(path, width=768, depth=1, part='target_encoder', version='2'):
    """A file with the keys of an official V-JEPA 2 checkpoint and random weights → its path."""
    import vjepa2
    torch.manual_seed(0)
    encoder = vjepa2.VideoEncoder(width, vjepa2.HEADS['encoder'][width], depth, width, version)
    torch.save({part: {f'module.backbone.{k}': v for k, v in encoder.state_dict().items()}}, path)
    return path


def official_predictor(path):
    """A file with the keys of an official action-conditioned checkpoint and random weights, as large as TINY → its path."""
    import hope
    import model
    torch.manual_seed(0)
    sizes = model.Sizes(model='vit', feature_dim=24, action_dim=7, state_dim=7, grid=None, depth=2, width=24, heads=2,
                        mlp_hidden=32, rope='vjepa2', action_memory=False)
    net = hope.build(sizes)
    torch.save({'predictor': {f'module.{k}': v for k, v in net.state_dict().items()}}, path)
    return path
