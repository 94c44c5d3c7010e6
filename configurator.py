"""
Config files and --key=value over a script's knobs.

    python train.py config/hope_jump.py --max_iters=100        files and flags apply in the order given
    python train.py --max-iters 100 --resume                   the same, and True for a knob that is True or False
    python train.py --help                                     every knob, its default and its comment

The knobs of a script are the plain globals above its `settings = configure(globals())` line. The trailing comment of a
knob is its help text. A bracket at the end of that comment gives the allowed values, which configure() enforces:

    batch_size = 32      # clips per optimiser step [1..]
    decay = 0.3          # share of the run in which the rate falls [0..1]
    learning_rate = 1e-3 # peak rate [>0]
    loss = 'jump'        # second loss term [jump | rollout]
"""
import ast
import atexit
import difflib
import functools
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
import time

ROOT = os.path.dirname(os.path.abspath(__file__))
SCRIPTS = 'prepare.py', 'train.py', 'adapt.py', 'compare.py', 'bench.py', 'ablate.py'
# What else people call a knob, where the spelling does not tell.
SYNONYMS = {
    'learning_rate': 'lr', 'ln_rate': 'lr', 'weight_decay': 'wd', 'max_iters': 'steps epochs iterations num_steps',
    'batch_size': 'bs', 'depth': 'layers n_layer num_layers', 'heads': 'n_head num_heads', 'width': 'n_embd embed_dim',
    'out': 'save_dir', 'ckpt': 'checkpoint weights', 'dtype': 'precision amp bf16 fp16', 'device': 'gpu',
}


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
        if os.environ.get('RANK', '0') != '0':
            # Under torchrun all processes refuse the same. Where the first one does, the others are ended meanwhile.
            time.sleep(1)
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
    if re.search('(closed|reset) by peer|remote process exited', str(error)):
        return Refusal('another process of this run has ended; the reason is in its own line')
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
        if 'configure(globals()' in line and number in nodes:
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


def within(value, allowed):
    """Whether a value is one that a bracket allows."""
    if '|' in allowed:
        return value in [choice.strip() for choice in allowed.split('|')]
    if allowed.startswith('>'):
        return value > float(allowed[1:])
    low, high = allowed.split('..')
    return float(low or '-inf') <= value <= float(high or 'inf')


def check(name, value, default, comment, where):
    """The value, if the knob's type and bracket allow it; else raises Refusal. A float may be given as a whole number."""
    kind = type(default)
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**1000 else math.inf
    if type(value) is not kind:
        word = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text'}[kind]
        raise Refusal(f'{where}: {name} must be {word}, not {value!r}')
    if kind is float and not math.isfinite(value):
        raise Refusal(f'{where}: {name} must be finite, not {value}')
    bracket = re.search(r'\[([^\]]+)\]$', comment)
    if bracket and not within(value, bracket[1]):
        raise Refusal(f'{where}: {name} = {value!r} is not allowed; allowed: {bracket[1]}')
    if kind is int and abs(value) > 2**40:
        raise Refusal(f'{where}: {name} = {value} is too large')
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


def flush_stdout():
    """Write what is still to be written; where nobody reads it any more, as after `| head`, drop it."""
    try:
        print(end='', flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def install_hook(knobs):
    """Let an interruption, an error of the system or a closed pipe end the script without a traceback, too."""
    def hook(kind, error, trace):
        if kind is BrokenPipeError:
            # As the shell reports it.
            raise SystemExit(141)
        refusal = as_refusal(error, knobs)
        if refusal:
            raise refusal
        sys.__excepthook__(kind, error, trace)
    sys.excepthook = hook
    # Python's own last flush would print a traceback.
    atexit.register(flush_stdout)


def print_start(script, argv):
    """The first line of a run: its command. Importing torch took a second already."""
    line = shlex.join([os.path.basename(script), *argv])
    print(textwrap.fill(line, 100, subsequent_indent='  ', break_long_words=False, break_on_hyphens=False), flush=True)


def print_help(doc, knobs):
    """Print what a script does and its knobs, under their headings: {name: (default, comment, heading)}."""
    print((doc or '').strip())
    width = max(40, shutil.get_terminal_size((100, 24)).columns)
    column = ' ' * (31 if width >= 80 else 8)
    last = None
    for name, (default, comment, heading) in knobs.items():
        if heading != last:
            print(f'\n{heading}')
            last = heading
        flag = f'  --{name}={default}'
        if len(flag) >= len(column):
            print(flag)
            flag = ''
        print(textwrap.fill(comment, width, initial_indent=flag.ljust(len(column)), subsequent_indent=column))


def unknown(name, knobs, where):
    """The Refusal for a knob that a script does not have. It names the scripts that have it, and what may be meant."""
    others = []
    for script in SCRIPTS:
        path = os.path.join(ROOT, script)
        if os.path.exists(path) and name in [knob[0] for knob in read_knobs(path)]:
            others.append(script)
    meant = [knob for knob in knobs if name in SYNONYMS.get(knob, '').split()]
    near = meant or difflib.get_close_matches(name, knobs, n=1, cutoff=0.5)
    hint = ''
    if others and not meant:
        hint = f'; it is a knob of {", ".join(others)}'
    elif near:
        hint = f'; did you mean --{near[0]}?'
    return Refusal(f'{where}: no knob is called {name!r}{hint} (--help lists them all)')


def read_value(text, default):
    """What text on the command line means for a knob with this default. check() refuses what is of another type."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool) and text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def listed(text):
    """The items of a list separated by commas: 'a, b' → ['a', 'b']."""
    return [item.strip() for item in text.split(',') if item.strip()]


def read_flag(arg, rest, knobs):
    """--name=value, or --name with the value as the next argument, which is taken from the rest → name and value."""
    name, equals, text = arg[2:].partition('=')
    name = name.replace('-', '_')
    if name not in knobs:
        raise unknown(name, knobs, arg)
    default = knobs[name][0]
    if not equals:
        follows = rest[0] if rest else '--'
        if isinstance(default, bool) and follows.lower() not in ('true', 'false'):
            return name, True
        if follows.startswith('--'):
            raise Refusal(f'{arg} needs a value: {arg}=...')
        text = rest.pop(0)
    return name, read_value(text, default)


def launched():
    """
    (rank, rank on this machine, number of processes), as torchrun puts them into the environment; (0, 0, 1) without it.
    Raises Refusal for numbers that cannot be.
    """
    given = {'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '1', 'MASTER_ADDR': '', 'MASTER_PORT': ''}
    for name in given:
        given[name] = os.environ.get(name, given[name])
    *numbers, address, port = given.values()
    whole = all(number.isdecimal() for number in numbers)
    rank, local_rank, processes = map(int, numbers) if whole else (0, 0, 0)
    if rank >= processes or (processes > 1 and not (address and port.isdecimal())):
        words = ' '.join(f'{name}={value}' for name, value in given.items())
        raise Refusal(f'{words} in the environment: torchrun sets them; for a single process, unset all of them')
    return rank, local_rank, processes


def configure(scope, argv=None, files=''):
    """
    Override a script's knobs from the command line; returns {knob: value} with the values of this run.

    scope: the script's globals(). files: the knob of text that takes the arguments that are neither, joined by commas.
    Raises Refusal (one line, exit status 2) for an unknown key, a wrong type, a value out of range, a missing or broken
    config file, or an argument that is neither file nor key. Nothing is changed in that case.
    """
    knobs = {}
    for name, default, comment, heading in read_knobs(scope['__file__']):
        knobs[name] = default, comment, heading
    install_hook(knobs)
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, 'reconfigure'):
            # A terminal that is not UTF-8 shows a question mark for what it does not have.
            stream.reconfigure(errors='replace')
    rest = list(sys.argv[1:] if argv is None else argv)
    if '--help' in rest or '-h' in rest:
        print_help(scope['__doc__'], knobs)
        sys.exit(0)
    values = {name: default for name, (default, comment, heading) in knobs.items()}
    given = []
    while rest:
        arg = rest.pop(0)
        if arg.startswith('--'):
            name, value = read_flag(arg, rest, knobs)
            assigned = {name: value}
        elif arg.startswith('-') or ('=' in arg and arg.partition('=')[0] in knobs):
            raise Refusal(f'{arg}: a knob is set with two dashes: --{arg.lstrip("-")}')
        elif arg.endswith('.py'):
            assigned = read_config(arg)
        elif files:
            given.append(arg)
            assigned = {files: ','.join(given)}
        else:
            raise Refusal(f'{arg}: neither a config file (something.py) nor --key=value')
        for name, value in assigned.items():
            if name not in knobs:
                raise unknown(name, knobs, arg)
            default, comment, heading = knobs[name]
            values[name] = check(name, value, default, comment, arg)
    scope.update(values)
    if argv is None and scope['__name__'] == '__main__' and os.environ.get('RANK', '0') == '0':
        print_start(scope['__file__'], sys.argv[1:])
    return values
