"""Config files and flags over a script's knobs, and what is refused."""
import ast
import os
import sys

import pytest
from conftest import ROOT, TINY, refused, run

from configurator import configure

SCRIPT = '''"""What the script does."""
# first group
rate = 1e-3              # a rate [>0]
steps = 10               # how many [1..100]
share = 0.5              # a share [0..1]
loss = 'jump'            # which [jump | rollout]
name = 'x'               # any text
periods = (1, 4, 16)     # some numbers
flag = False             # yes or no
config = configure(globals())
not_a_knob = 3           # below the line
'''


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """configured(*argv) → the globals of a small script after it was run with these arguments."""
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT)

    def configured(*argv):
        scope = {'__file__': str(path), '__doc__': 'What the script does.', 'configure': configure}
        monkeypatch.setattr(sys, 'argv', [str(path), *argv])
        exec(SCRIPT, scope)
        return scope
    return configured


def test_flags_and_files_apply_in_order(configured, tmp_path):
    (tmp_path / 'a.py').write_text("'''What it is.'''\nsteps = 20\nname = 'from file'\nshare = 1 / 4\n")
    scope = configured('--steps=5', str(tmp_path / 'a.py'), '--rate=2')
    assert (scope['steps'], scope['name'], scope['share'], scope['rate']) == (20, 'from file', 0.25, 2.0)
    assert type(scope['rate']) is float and scope['config'].items() <= scope.items()
    assert 'not_a_knob' not in scope['config']


@pytest.mark.parametrize('flag, value', [
    ('--name=a=b', 'a=b'), ('--name=12', '12'), ('--flag', True), ('--flag=True', True),
    ('--rate=1e-4', 1e-4), ('--periods=(1,2)', (1, 2)), ('--periods=1,2', (1, 2))])
def test_ways_to_write_a_flag(configured, flag, value):
    assert configured(flag)[flag.strip('-').partition('=')[0]] == value


@pytest.mark.parametrize('written, words', [
    ('stepz = 3', "no option is called 'stepz'; did you mean --steps?"),
    ('not_a_knob = 3', "no option is called 'not_a_knob'"),
    ('steps = 2.5', 'steps must be of type int, not 2.5'), ('flag = 1', 'flag must be of type bool, not 1'),
    ('periods = 3', 'periods must be of type tuple, not 3'),
    ('steps = 0', 'steps = 0 is not allowed; allowed: 1..100'),
    ('rate = 0', 'rate = 0.0 is not allowed; allowed: >0'),
    ('share = 1.5', 'share = 1.5 is not allowed; allowed: 0..1'),
    ("loss = 'jmp'", "loss = 'jmp' is not allowed; allowed: jump | rollout"),
])
@pytest.mark.parametrize('in_a_file', [False, True])
def test_what_is_refused(configured, tmp_path, capsys, written, words, in_a_file):
    """On the command line and in a config file alike: one line, with the knob, the value, what is allowed."""
    path = tmp_path / 'a.py'
    path.write_text(written + '\n')
    with pytest.raises(SystemExit) as end:
        configured(str(path) if in_a_file else '--' + written.replace(' = ', '=').replace("'", ''))
    said = capsys.readouterr().err
    assert end.value.code == 2 and words in said and said.count('\n') == 1 and ('a.py' in said) == in_a_file


@pytest.mark.parametrize('argument, words', [
    ('missing.py', 'config file missing.py not found'), ('steps=5', 'options are written --key=value'),
    ('--steps', 'steps must be of type int, not True'),
])
def test_other_arguments_are_refused(configured, capsys, argument, words):
    with pytest.raises(SystemExit):
        configured(argument)
    assert words in capsys.readouterr().err


def test_help_prints_every_knob_with_default_and_comment(configured, capsys):
    with pytest.raises(SystemExit) as end:
        configured('--help')
    text = capsys.readouterr().out
    assert end.value.code == 0 and max(map(len, text.splitlines())) <= 100
    for piece in ('What the script does.', '--steps=10', 'how many [1..100]', '--flag=False'):
        assert piece in text


def test_scripts_and_configs_are_found_from_any_folder(tiny, tmp_path):
    for script in ('prepare.py', 'train.py', 'adapt.py', 'report.py', 'bench.py'):
        assert '--out' in run(script, '--help', cwd=tmp_path).stdout or script in ('prepare.py', 'bench.py')
    args = ['config/hope_jump.py', *TINY, f'--data={tiny}', '--max_iters=1', '--out=here/x.pt']
    run('train.py', *args, cwd=tmp_path)
    assert (tmp_path / 'here' / 'x.pt').exists()
    assert 'did you mean --width?' in refused(run('train.py', *args, '--widht=8', cwd=tmp_path, ok=False))


def test_imports_run_one_way():
    """None of these files imports a later one."""
    order = ['configurator', 'support.files', 'model', 'hope', 'support.worlds', 'data', 'vjepa2',
             'support.own_clips', 'support.planning', 'methods', 'support.plots', 'report']
    for place, module in enumerate(order):
        with open(os.path.join(ROOT, *module.split('.')) + '.py', encoding='utf-8') as f:
            nodes = list(ast.walk(ast.parse(f.read())))
        imported = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        imported += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        assert not set(imported) & {*order[place + 1:], 'prepare', 'train', 'adapt', 'bench'}, module
