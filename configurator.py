"""
Config files and --key=value over a script's knobs.

    python train.py config/hope_jump.py --max_iters=100        files and flags apply in the order given
    python train.py --help                                     every knob, its default and its comment

The knobs of a script are the plain globals above its `settings = configure(globals())` line. The trailing comment of a
knob is its help text. A bracket at the end of that comment gives the allowed values, which configure() enforces:

    batch_size = 32      # clips per optimiser step [1..]
    decay = 0.3          # share of the run in which the rate falls [0..1]
    learning_rate = 1e-3 # peak rate [>0]
    loss = 'jump'        # second loss term [jump | rollout]
"""
import ast
import difflib
import functools
import math
import os
import re
import shutil
import sys
import textwrap

ROOT = os.path.dirname(os.path.abspath(__file__))
SCRIPTS = 'prepare.py', 'train.py', 'adapt.py', 'bench.py', 'ablate.py'


class Refusal(SystemExit):
    """
    A mistake that the user can correct. If it is not caught, it ends the script with one line on stderr and exit status 2.

    It is a SystemExit, so Python prints no traceback, and `except Exception` does not catch it.
    """

    def __init__(self, line, status=2):
        super().__init__(line)
        self.status = status

    @functools.cached_property
    def code(self):
        """The exit status. Python reads it when the script ends, so this prints the line, once."""
        print(f'{os.path.basename(sys.argv[0])}: {" ".join(str(self).split())}', file=sys.stderr)
        return self.status


# What to do when memory runs out, by the knob that a script has.
LESS_MEMORY = {
    'accumulation': 'raise --accumulation, which changes no result, or lower --batch_size',
    'batch': 'lower --batch',
    'probe_clips': 'lower --probe_clips or --clips',
}


def as_refusal(error, knobs):
    """An interruption or an error of the system (a full disk, no memory) as a Refusal; None for a bug in the code."""
    if isinstance(error, KeyboardInterrupt):
        return Refusal('interrupted; what was finished is kept', 130)
    if isinstance(error, OSError):
        line = str(error.strerror or error)
        if error.filename:
            line += f': {error.filename}'
        return Refusal(line)
    # PyTorch's own errors: OutOfMemoryError on a GPU, a RuntimeError with these words on a CPU.
    full = type(error).__name__ == 'OutOfMemoryError' or re.search('(not enough|allocate) memory', str(error))
    if full or isinstance(error, MemoryError):
        advice = [LESS_MEMORY[knob] for knob in LESS_MEMORY if knob in knobs]
        return Refusal(f'out of memory; {advice[0] if advice else "use less"}')
    return None


def read_knobs(script):
    """The knobs of a script, in order: list of (name, default, comment, heading above it)."""
    with open(script, encoding='utf-8') as f:
        source = f.read()
    lines = source.splitlines()
    heading = ''
    knobs = []
    nodes = {node.lineno: node for node in ast.parse(source).body}
    for number, line in enumerate(lines, 1):
        if 'configure(globals())' in line and number in nodes:
            return knobs
        if line.startswith('# '):
            heading = line[2:].strip(' -')
        node = nodes.get(number)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            default = ast.literal_eval(node.value)
            comment = lines[node.end_lineno - 1][node.end_col_offset:].lstrip(' #')
            knobs.append((name, default, comment, heading))
    raise ValueError(f'{script} has no line "settings = configure(globals())"')


def check(name, value, default, comment, where):
    """The value, if the knob's type and bracket allow it; else raises Refusal. A float may be given as a whole number."""
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
        ok = float(low or '-inf') <= value <= float(high or 'inf')
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
    # The file is the user's, so any error in it is one that the user can correct.
    except Exception as error:
        line = getattr(error, 'lineno', None)
        if line is None and error.__traceback__.tb_next:
            line = error.__traceback__.tb_next.tb_lineno
        where = f', line {line}' if line else ''
        raise Refusal(f'config file {path}{where}: {type(error).__name__}: {error}') from None
    # A docstring, __doc__, is not a knob.
    return {name: value for name, value in values.items() if not name.startswith('__')}


def install_hook(knobs):
    """Let an interruption or an error of the system end the script with one line, too."""
    def hook(kind, error, trace):
        refusal = as_refusal(error, knobs)
        if refusal:
            raise refusal
        sys.__excepthook__(kind, error, trace)
    sys.excepthook = hook


def print_help(doc, knobs):
    """Print what a script does and its knobs, under their headings: {name: (default, comment, heading)}."""
    print((doc or '').strip())
    width = shutil.get_terminal_size((100, 24)).columns
    last = None
    for name, (default, comment, heading) in knobs.items():
        if heading != last:
            print(f'\n{heading}')
            last = heading
        flag = f'  --{f"{name}={default}":<26} '
        print(textwrap.fill(comment, width, initial_indent=flag, subsequent_indent=' ' * 31))


def unknown(name, knobs, where):
    """The Refusal for a knob that a script does not have. It names the scripts that have it, or the nearest spelling."""
    others = []
    for script in SCRIPTS:
        names = [knob[0] for knob in read_knobs(os.path.join(ROOT, script))]
        if name in names:
            others.append(script)
    near = difflib.get_close_matches(name, knobs, n=1, cutoff=0.5)
    hint = ''
    if others:
        hint = f'; it is a knob of {", ".join(others)}'
    elif near:
        hint = f'; did you mean {near[0]!r}?'
    return Refusal(f'{where}: no knob is called {name!r}{hint} (--help lists them all)')


def read_flag(arg, knobs):
    """--name=value → name and value. The value is text, unless the knob's default is a number, True or False."""
    if not arg.startswith('--'):
        if '=' in arg:
            raise Refusal(f'{arg}: a knob is set with two dashes: --{arg.lstrip("-")}')
        raise Refusal(f'{arg}: neither a config file (something.py) nor --key=value')
    name, equals, value = arg[2:].partition('=')
    if not equals:
        raise Refusal(f'{arg}: write --{name}=value, with an equals sign')
    if name in knobs and type(knobs[name][0]) is not str:
        try:
            return name, ast.literal_eval(value)
        except (ValueError, SyntaxError):
            # The value stays text, and check() refuses it by its type.
            pass
    return name, value


def configure(scope, argv=None):
    """
    Override a script's knobs from the command line; returns {knob: value} with the values of this run.

    scope: the script's globals(). Raises Refusal (one line, exit status 2) for an unknown key, a wrong type, a value out of
    range, a missing or broken config file, or an argument that is neither file nor key. Nothing is changed in that case.
    """
    knobs = {}
    for name, default, comment, heading in read_knobs(scope['__file__']):
        knobs[name] = default, comment, heading
    install_hook(knobs)
    if argv is None:
        argv = sys.argv[1:]
    if '--help' in argv or '-h' in argv:
        print_help(scope['__doc__'], knobs)
        sys.exit(0)
    values = {name: default for name, (default, comment, heading) in knobs.items()}
    for arg in argv:
        if arg.endswith('.py') and not arg.startswith('--') and '=' not in arg:
            assigned = read_config(arg)
        else:
            name, value = read_flag(arg, knobs)
            assigned = {name: value}
        for name, value in assigned.items():
            if name not in knobs:
                raise unknown(name, knobs, arg)
            default, comment, heading = knobs[name]
            values[name] = check(name, value, default, comment, arg)
    scope.update(values)
    return values
