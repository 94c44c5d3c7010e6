"""
Config files and --key=value over a script's knobs.

    python train.py config/hope_jump.py --max_iters=100        files and flags apply in the order given
    python train.py --help                                     every knob, its default and its comment

The knobs of a script are the plain globals above its `settings = configure(globals())` line. The trailing comment
of a knob is its help text; a bracket at the end of that comment is what configure() enforces:

    batch_size = 32      # clips per optimiser step [1..]
    decay = 0.3          # share of the run in which the rate falls [0..1]
    learning_rate = 1e-3 # peak rate [>0]
    loss = 'jump'        # second loss term [jump | rollout]
"""
import ast
import difflib
import math
import os
import re
import shutil
import sys
import textwrap

ROOT = os.path.dirname(os.path.abspath(__file__))
SCRIPTS = 'prepare.py', 'train.py', 'adapt.py', 'bench.py', 'ablate.py'


class Refusal(Exception):
    """A mistake that the user can mend: a script prints its one line and exits with status 2, without a traceback."""


LESS_MEMORY = {              # the knob that a script has → what to do where memory runs out
    'accumulation': 'raise --accumulation, which changes no result, or lower --batch_size',
    'batch': 'lower --batch',
    'probe_clips': 'lower --probe_clips or --clips',
}


def one_line(kind, error, knobs):
    """What to tell the user about an uncaught exception, and the exit status; None where it is a mistake of the code's own."""
    if issubclass(kind, Refusal):
        return str(error), 2
    if issubclass(kind, KeyboardInterrupt):
        return 'interrupted; what was finished is kept', 130
    if issubclass(kind, OSError):                                      # the system refuses: disk full, no permission, ...
        return ': '.join(str(x) for x in (error.strerror or error, error.filename) if x), 2
    full = kind.__name__ == 'OutOfMemoryError' or re.search('(not enough|allocate) memory', str(error))  # PyTorch's: GPU, CPU
    if full or issubclass(kind, MemoryError):
        return 'out of memory; ' + next((advice for knob, advice in LESS_MEMORY.items() if knob in knobs), 'use less'), 2
    return None


def read_knobs(script):
    """The knobs of a script, in order: list of (name, default, comment, heading above it)."""
    with open(script, encoding='utf-8') as f:
        source = f.read()
    lines, heading, knobs = source.splitlines(), '', []
    nodes = {node.lineno: node for node in ast.parse(source).body}
    for number, line in enumerate(lines, 1):
        if 'configure(globals())' in line and number in nodes:
            return knobs
        if line.startswith('# '):
            heading = line[2:].strip(' -')
        node = nodes.get(number)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            comment = lines[node.end_lineno - 1][node.end_col_offset:].lstrip(' #')
            knobs.append((node.targets[0].id, ast.literal_eval(node.value), comment, heading))
    raise ValueError(f'{script} has no line "settings = configure(globals())"')


def check(name, value, default, comment, where):
    """Value of the knob's own type and inside its bracket, or a Refusal. A whole number is accepted for a float."""
    kind = type(default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        word = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text'}[kind]
        raise Refusal(f'{where}: {name} must be {word}, not {value!r}')
    if kind is float and not math.isfinite(value):
        raise Refusal(f'{where}: {name} must be finite, not {value}')
    bracket = re.search(r'\[([^\]]+)\]$', comment)
    if bracket is None:
        return value
    allowed = bracket[1]
    if '|' in allowed:
        ok = value in [choice.strip() for choice in allowed.split('|')]
    elif allowed.startswith('>'):
        ok = value > float(allowed[1:])
    else:
        low, high = allowed.split('..')
        ok = (not low or value >= float(low)) and (not high or value <= float(high))
    if not ok:
        raise Refusal(f'{where}: {name} = {value!r} is not allowed; allowed: {allowed}')
    return value


def read_config(path):
    """Run a config file (plain Python assignments) and return the names that it sets."""
    found = next((p for p in (path, os.path.join(ROOT, path)) if os.path.isfile(p)), None)
    if found is None:
        raise Refusal(f'config file {path} not found (looked here and in {ROOT})')
    values = {}
    try:
        with open(found, encoding='utf-8') as f:
            exec(compile(f.read(), found, 'exec'), {'__builtins__': {}}, values)
    except Exception as error:  # whatever the file does wrong is the user's to mend, in one line
        line = getattr(error, 'lineno', None) or (error.__traceback__.tb_next and error.__traceback__.tb_next.tb_lineno)
        raise Refusal(f'config file {path}{f", line {line}" if line else ""}: {type(error).__name__}: {error}') from None
    return {name: value for name, value in values.items() if not name.startswith('__')}  # a docstring is no knob


def configure(scope, argv=None):
    """
    Override a script's knobs from the command line; returns {knob: value} as it will run.

    scope: the script's globals(). Raises Refusal (one line, exit status 2) for an unknown key, a wrong type, a value
    out of range, a missing or broken config file, or an argument that is neither; nothing is changed in that case.
    """
    knobs = {name: (default, comment, heading) for name, default, comment, heading in read_knobs(scope['__file__'])}

    def hook(kind, error, trace):
        told = one_line(kind, error, knobs)
        if told is None:
            return sys.__excepthook__(kind, error, trace)
        print(f'{os.path.basename(sys.argv[0])}: {" ".join(told[0].split())}', file=sys.stderr)
        sys.exit(told[1])

    sys.excepthook = hook
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print((scope['__doc__'] or '').strip())
        last = None
        for name, (default, comment, heading) in knobs.items():
            if heading != last:
                print(f'\n{heading}')
                last = heading
            width = shutil.get_terminal_size((100, 24)).columns
            print(textwrap.fill(comment, width, initial_indent=f'  --{f"{name}={default}":<26} ', subsequent_indent=' ' * 31))
        sys.exit(0)
    values = {name: default for name, (default, _, _) in knobs.items()}

    def assign(name, value, where):
        if name not in knobs:
            near = difflib.get_close_matches(name, knobs, n=1, cutoff=0.5)
            others = ', '.join(s for s in SCRIPTS if name in (knob for knob, *_ in read_knobs(os.path.join(ROOT, s))))
            raise Refusal(f'{where}: no knob is called {name!r}'
                          + (f'; {others} has one' if others else f'; did you mean {near[0]!r}?' if near else '')
                          + ' (--help lists them all)')
        values[name] = check(name, value, *knobs[name][:2], where)

    for arg in argv:
        if not arg.startswith('--'):
            if '=' in arg:
                raise Refusal(f'{arg}: a knob is set with two dashes: --{arg.lstrip("-")}')
            if not arg.endswith('.py'):
                raise Refusal(f'{arg}: neither a config file (something.py) nor --key=value')
            for name, value in read_config(arg).items():
                assign(name, value, arg)
            continue
        name, equals, text = arg[2:].partition('=')
        if not equals:
            raise Refusal(f'{arg}: write --{name}=value, with an equals sign')
        value = text
        if name in knobs and type(knobs[name][0]) is not str:
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                pass  # stays text, which check() refuses by type
        assign(name, value, arg)
    scope.update(values)
    return values
