"""Config files and flags over a script's knobs, and how a script ends. What is refused: test_refusals.py."""
import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, run

from configurator import Refusal, configure, launched

SCRIPT = '''"""What the script does."""
# first group
rate = 1e-3              # a rate [>0]
steps = 10               # how many [1..100]
share = 0.5              # a share [0..1]
loss = 'jump'            # which [jump | rollout]
# second group
name = 'x'               # any text
second_name = 'quite a long text, which leaves its comment no room'  # a text whose comment is also rather long, so long
flag = False             # yes or no
settings = configure(globals())
derived = steps * 2
'''


@pytest.fixture
def script(tmp_path):
    """configured(*argv) → the globals of a small script after it was run with these arguments."""
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT)

    def configured(*argv):
        scope = {'__file__': str(path), '__doc__': 'What the script does.'}
        scope['configure'] = lambda s: configure(s, list(argv))
        exec(SCRIPT, scope)
        return scope
    return configured


ENDS = f'''"""Ends as it is told to."""
import sys
sys.path.insert(0, {ROOT!r})
from configurator import Refusal, configure
what = 'refusal'         # how it ends
torchrun = False         # whether torchrun has started it
settings = configure(globals())
if torchrun:
    import torch.distributed
    torch.distributed.init_process_group('gloo')
    if what == 'disk' and torch.distributed.get_rank() == 1:
        torch.distributed.barrier()
if what == 'many':
    print('x' * 10**6)
if what == 'arrow':
    print('A→B')
if what in ('many', 'arrow', 'nothing'):
    sys.exit()
errors = {{'refusal': Refusal('two\\nlines'), 'disk': OSError(28, 'No space left on device', 'x.pt'),
          'memory': MemoryError(), 'stop': KeyboardInterrupt(), 'bug': ZeroDivisionError()}}
raise errors[what]
'''


@pytest.fixture
def ends(tmp_path):
    path = tmp_path / 'ends.py'
    path.write_text(ENDS, encoding='utf-8')
    return str(path)


def test_flags_and_files_apply_in_order(script, tmp_path):
    (tmp_path / 'a.py').write_text("steps = 20\nname = 'from file'\n")
    scope = script('--steps=5', str(tmp_path / 'a.py'), '--rate=2')
    assert (scope['steps'], scope['name'], scope['rate'], scope['derived']) == (20, 'from file', 2.0, 40)
    assert type(scope['rate']) is float and scope['settings']['steps'] == 20


def test_text_may_hold_equals_signs_and_numbers(script):
    assert script('--name=a=b')['name'] == 'a=b'
    assert script('--name=12')['name'] == '12'
    assert script('--flag=True')['flag'] is True


@pytest.mark.parametrize('argv, knob, value', [
    ('--steps 5', 'steps', 5),
    ('--rate 1e-4 --steps 5', 'rate', 1e-4),
    ('--name -1', 'name', '-1'),
    ('--name True', 'name', 'True'),
    ('--flag', 'flag', True),
    ('--flag --steps 5', 'flag', True),
    ('--flag False --steps 5', 'flag', False),
    ('--flag true', 'flag', True),
    ('--flag=FALSE', 'flag', False),
    ('--second-name=a-b', 'second_name', 'a-b'),
    ('--second-name x.py', 'second_name', 'x.py'),
])
def test_ways_to_write_a_flag(script, argv, knob, value):
    assert script(*argv.split(' '))[knob] == value


def test_a_flag_takes_no_config_file_for_its_value(script, tmp_path):
    (tmp_path / 'a.py').write_text('steps = 20\n')
    scope = script('--flag', str(tmp_path / 'a.py'))
    assert scope['flag'] is True and scope['steps'] == 20


def test_arguments_that_are_files(tmp_path):
    """files= names the knob that takes them; without it they are refused (test_refusals.py)."""
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT)
    scope = {'__file__': str(path)}
    values = configure(scope, ['out/a', '--steps', '5', 'out/b=1', 'name', '--flag'], files='name')
    assert values['name'] == scope['name'] == 'out/a,out/b=1,name' and values['steps'] == 5 and values['flag']
    assert configure(scope, ['--name=x,y'], files='name')['name'] == 'x,y'


def test_nothing_is_changed_by_a_refusal(tmp_path):
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT)
    scope = {'__file__': str(path), 'steps': 10}
    with pytest.raises(Refusal):
        configure(scope, ['--steps=5', '--stepz=3'])
    assert scope['steps'] == 10


def test_help_prints_every_knob_with_default_and_comment(script, capsys):
    with pytest.raises(SystemExit) as end:
        script('--help')
    text = capsys.readouterr().out
    assert end.value.code == 0
    for piece in ('What the script does.', 'first group', '--steps=10', 'how many [1..100]', 'second group',
                  '--flag=False'):
        assert piece in text


@pytest.mark.parametrize('width', [1, 40, 100, 300])
def test_help_fits_the_terminal(script, width, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', str(width))
    with pytest.raises(SystemExit):
        script('--help')
    text = capsys.readouterr().out
    flags = [line for line in text.splitlines() if line.startswith('  --')]
    comments = [line for line in text.splitlines() if line.startswith('   ')]
    assert len(flags) == 7 and 'rather long, so long' in ' '.join(text.split())
    # A flag that is longer than its column has a line of its own.
    assert '  --second_name=quite a long text, which leaves its comment no room' in flags
    assert max(map(len, comments)) <= max(width, 40)


def test_the_first_line_is_the_command(ends):
    """Before anything that takes time, of the first process only."""
    for rank, said in (('0', 'ends.py --what nothing\n'), ('1', '')):
        done = subprocess.run([sys.executable, ends, '--what', 'nothing'], capture_output=True, text=True,
                              env={**os.environ, 'RANK': rank})
        assert (done.returncode, done.stdout) == (0, said)


@pytest.mark.parametrize('arguments', [['--help'], ['--what=many']])
def test_a_closed_pipe_ends_quietly(ends, arguments):
    """As with `| head -3`: what is still to be written has no reader."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, ends, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == '' and done.returncode in (0, 141)


def test_a_terminal_without_utf_8(ends):
    done = subprocess.run([sys.executable, ends, '--what=arrow'], capture_output=True, text=True,
                          env={**os.environ, 'PYTHONIOENCODING': 'ascii'})
    assert (done.returncode, done.stderr) == (0, '') and 'A?B' in done.stdout


@pytest.mark.parametrize('environment, words', [
    ('RANK=x WORLD_SIZE=2', 'RANK=x'),
    ('RANK=-1 WORLD_SIZE=2', 'RANK=-1'),
    ('RANK=2 WORLD_SIZE=2', 'RANK=2 LOCAL_RANK=0 WORLD_SIZE=2'),
    ('RANK=1', 'RANK=1'),
    ('WORLD_SIZE=0', 'WORLD_SIZE=0'),
    ('WORLD_SIZE=', 'WORLD_SIZE='),
    ('LOCAL_RANK=x', 'LOCAL_RANK=x'),
    ('RANK=0 WORLD_SIZE=2', 'MASTER_ADDR= '),
    ('RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=x', 'MASTER_PORT=x'),
])
def test_what_torchrun_does_not_set_is_refused(environment, words, monkeypatch):
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    assert launched() == (0, 0, 1)
    for pair in environment.split(' '):
        monkeypatch.setenv(*pair.split('='))
    with pytest.raises(Refusal, match=words):
        launched()


def test_config_files_are_found_from_any_folder(tiny, tmp_path):
    done = run('train.py', 'config/hope_jump.py', *TINY, f'--data={tiny}', '--max_iters=1', '--out=here/x.pt', cwd=tmp_path)
    assert (tmp_path / 'here' / 'x.pt').exists() and 'finished' in done.stdout


@pytest.mark.parametrize('what, status, line', [
    ('refusal', 2, 'ends.py: two lines'),
    ('disk', 2, 'ends.py: No space left on device: x.pt'),
    ('memory', 2, 'ends.py: out of memory; use less'),
    ('stop', 130, 'ends.py: interrupted; what was finished is kept'),
])
def test_what_the_user_can_mend_is_one_line(ends, what, status, line):
    done = subprocess.run([sys.executable, ends, f'--what={what}'], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, line + '\n')


def test_a_mistake_of_the_code_keeps_its_traceback(ends):
    done = subprocess.run([sys.executable, ends, '--what=bug'], capture_output=True, text=True)
    assert done.returncode == 1 and 'ZeroDivisionError' in done.stderr and 'Traceback' in done.stderr


@pytest.mark.parametrize('what, line', [
    pytest.param('refusal', 'ends.py: two lines', marks=pytest.mark.trust),
    ('disk', 'ends.py: No space left on device: x.pt'),
])
def test_torchrun_shows_the_line_too(ends, what, line):
    """
    Once, whether both processes refuse or one of them, while the other waits for it. init_process_group puts a hook of its
    own before ours, and what ours prints before it exits is lost there.
    """
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    done = subprocess.run([*torchrun, ends, f'--what={what}', '--torchrun'], capture_output=True, text=True)
    assert done.stderr.splitlines().count(line) == 1 and 'exitcode  : 2' in done.stderr
    assert 'ends.py", line' not in done.stderr and '[rank' not in done.stderr


def test_scripts_find_the_project_from_any_folder(tmp_path):
    """support/ is no installed package: the folder of the script is what counts."""
    for script in ('prepare.py', 'train.py', 'adapt.py', 'bench.py', 'ablate.py'):
        assert '--device' in run(script, '--help', cwd=tmp_path).stdout


def test_imports_run_one_way():
    """None of these files imports a later one, neither at its top nor in a function."""
    order = ['configurator', 'support.files', 'data', 'model', 'hope', 'vjepa2']
    for place, module in enumerate(order):
        with open(os.path.join(ROOT, *module.split('.')) + '.py', encoding='utf-8') as f:
            nodes = list(ast.walk(ast.parse(f.read())))
        imported = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        imported += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        assert not set(imported) & set(order[place + 1:]), module
