"""Config files and flags over a script's knobs, and how a script ends. What is refused: test_refusals.py."""
import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, run

from configurator import Refusal, configure

SCRIPT = '''"""What the script does."""
# first group
rate = 1e-3              # a rate [>0]
steps = 10               # how many [1..100]
share = 0.5              # a share [0..1]
loss = 'jump'            # which [jump | rollout]
# second group
name = 'x'               # any text
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


def test_flags_and_files_apply_in_order(script, tmp_path):
    (tmp_path / 'a.py').write_text("steps = 20\nname = 'from file'\n")
    scope = script('--steps=5', str(tmp_path / 'a.py'), '--rate=2')
    assert (scope['steps'], scope['name'], scope['rate'], scope['derived']) == (20, 'from file', 2.0, 40)
    assert type(scope['rate']) is float and scope['settings']['steps'] == 20


def test_text_may_hold_equals_signs_and_numbers(script):
    assert script('--name=a=b')['name'] == 'a=b'
    assert script('--name=12')['name'] == '12'
    assert script('--flag=True')['flag'] is True


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


def test_config_files_are_found_from_any_folder(tiny, tmp_path):
    done = run('train.py', 'config/hope_jump.py', *TINY, f'--data={tiny}', '--max_iters=1', '--out=here/x.pt', cwd=tmp_path)
    assert (tmp_path / 'here' / 'x.pt').exists() and 'finished' in done.stdout


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
errors = {{'refusal': Refusal('two\\nlines'), 'disk': OSError(28, 'No space left on device', 'x.pt'),
          'memory': MemoryError(), 'stop': KeyboardInterrupt(), 'bug': ZeroDivisionError()}}
raise errors[what]
'''


@pytest.fixture
def ends(tmp_path):
    path = tmp_path / 'ends.py'
    path.write_text(ENDS)
    return str(path)


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
    """init_process_group puts a hook of its own before ours, and what ours prints before it exits is lost there."""
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=1']
    done = subprocess.run([*torchrun, ends, f'--what={what}', '--torchrun=True'], capture_output=True, text=True)
    assert line in done.stderr.splitlines() and 'exitcode  : 2' in done.stderr
    assert 'ends.py", line' not in done.stderr


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
