"""Config files and --key=value over a script's knobs.

    python train.py config/hope_jump.py --max_iters=100 --resume     files and flags apply in the order given
    python train.py --help                                           every knob, its default and its comment

The knobs of a script are the plain globals above its `config = configure(globals())` line. The comment
behind a knob is its help text; a bracket at its end gives the allowed values: [1..], [>0], [0..1] or [jump
| rollout]."""
import ast
import difflib
import os
import re
import runpy
import sys
import textwrap

ROOT = os.path.dirname(os.path.abspath(__file__))


def refuse(line):
    """End the script over a mistake that the user can correct: one line on stderr, exit status 2."""
    print(f'{os.path.basename(sys.argv[0])}: {line}', file=sys.stderr)
    sys.exit(2)


def read_knobs(script):
    """The knobs of a script → {name: (default, comment)}, in order."""
    with open(script, encoding='utf-8') as f:
        above, _, _ = f.read().partition('configure(globals()')
    found = re.findall(r'^(\w+) = (.*?) +# (.*)', above, re.M)
    return {name: (ast.literal_eval(value), comment) for name, value, comment in found}


def within(value, allowed):
    """Whether a value is one that a bracket allows."""
    if '|' in allowed:
        return value in [choice.strip() for choice in allowed.split('|')]
    if allowed.startswith('>'):
        return value > float(allowed[1:])
    low, high = allowed.split('..')
    return float(low or '-inf') <= value <= float(high or 'inf')


def check(name, value, knobs, where):
    """The value of a knob if there is such a knob, of this type and range; otherwise refuses it."""
    if name not in knobs:
        near = difflib.get_close_matches(name, knobs, n=1, cutoff=0.5)
        hint = f'; did you mean --{near[0]}?' if near else ''
        refuse(f'{where}: no option is called {name!r}{hint} (--help lists them all)')
    default, comment = knobs[name]
    kind = type(default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        refuse(f'{where}: {name} must be of type {kind.__name__}, not {value!r}')
    bracket = re.search(r'\[([^\]]+)\]$', comment)
    if bracket and not within(value, bracket[1]):
        refuse(f'{where}: {name} = {value!r} is not allowed; allowed: {bracket[1]}')
    return value


def read_config(path):
    """Run a config file (plain Python assignments), looked for here and beside the code → {name: value}."""
    found = [p for p in (path, os.path.join(ROOT, path)) if os.path.isfile(p)]
    if not found:
        refuse(f'config file {path} not found here or in {ROOT}; options are written --key=value')
    values = runpy.run_path(found[0])
    return {name: value for name, value in values.items() if not name.startswith('__')}


def read_flag(arg, knobs):
    """--name=value, or --name for True → {name: value}."""
    name, equals, text = arg[2:].partition('=')
    if not equals:
        return {name: True}
    if isinstance(knobs.get(name, ('',))[0], str):
        return {name: text}
    try:
        return {name: ast.literal_eval(text)}
    except (ValueError, SyntaxError):
        return {name: text}


def listed(text):
    """The items of a list separated by commas: 'a, b' → ['a', 'b']."""
    return [item.strip() for item in text.split(',') if item.strip()]


def configure(scope):
    """Override a script's knobs, its globals(), by the command line → {knob: value}."""
    knobs = read_knobs(scope['__file__'])
    if '--help' in sys.argv:
        print(scope['__doc__'].strip() + '\n')
        for name, (default, comment) in knobs.items():
            flag = f'  --{name}={default}'
            print(textwrap.fill(comment, 100, initial_indent=f'{flag:<30} ', subsequent_indent=' ' * 31))
        sys.exit(0)
    values = {name: default for name, (default, _) in knobs.items()}
    for arg in sys.argv[1:]:
        assigned = read_flag(arg, knobs) if arg.startswith('--') else read_config(arg)
        for name, value in assigned.items():
            values[name] = check(name, value, knobs, arg)
    scope.update(values)
    return values
