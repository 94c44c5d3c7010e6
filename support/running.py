"""
Around a run: its data, files, log and signals.

    file = open_log('out/hope.csv', columns, 'out/hope.pt', resume=False)
    received = note_signals()                        # empty until Ctrl-C or SIGTERM
    keep_freed_memory()                              # before the first tensor
"""
import csv
import ctypes
import os
import signal
import subprocess
import sys

from configurator import ROOT, Refusal
from support.files import claim, read_manifest


def make_slide(name):
    """
    Have prepare.py make data/slide, the default data set, where that is asked for and is missing or unfinished.

    Ends the script where that fails, or is stopped.
    """
    if name != 'slide':
        return
    try:
        read_manifest(name)
    except Refusal:
        print('preparing data/slide first (built-in physics, nothing is downloaded)', flush=True)
        # As an exception, SIGTERM ends prepare.py, too.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        if subprocess.run([sys.executable, os.path.join(ROOT, 'prepare.py')]).returncode:
            sys.exit(2)


# ---- files -------------------------------------------------------------------------------------------------------------

def best_of(out):
    """The file of the best weights, beside the checkpoint `out`."""
    return os.path.splitext(out)[0] + '_best.pt'


def refuse_existing(out, resume):
    """Raise Refusal for files of another run, last or best, which would be overwritten."""
    for path in out, best_of(out):
        if os.path.exists(path) and not resume:
            raise Refusal(f'{path} exists; go on with --resume=True --out={out}, or name another --out, or delete it')


def open_log(path, columns, out, resume):
    """
    Open the CSV log and keep other runs out. A resumed run appends to it, any other begins it anew.

    Raises Refusal while another run writes there, and for a file that is not exactly such a log, which is left as it is.
    """
    file = open(path, 'a+', newline='', encoding='utf-8', errors='replace')
    claim(path, out, best_of(out))
    # Another run may have been quicker.
    refuse_existing(out, resume)
    file.seek(0)
    header = file.readline(10_000)
    ours = ','.join(columns) + '\r\n'
    if not resume:
        # The log of a run with the other loss may be begun anew, too.
        ours, header = ours.replace('rollout', 'jump'), header.replace('rollout', 'jump')
    if header and header != ours:
        raise Refusal(f'{path} is not the log of {out}; move it away, or name another --out')
    if not resume:
        file.truncate(0)
    if not resume or not header:
        csv.writer(file).writerow(columns)
    elif not (header + file.read()).endswith('\n'):
        # A full disk cut the last row short.
        file.write('\r\n')
    return file


def log(file, columns, head, row, tail, wandb_run=None):
    """
    Write a row {figure: value} to the CSV and, between head and tail, to the terminal.

    columns: {figure: how the terminal shows it, '' for not at all}. A figure without a column is for the terminal alone.
    """
    figures = {name: row[name] for name in columns if name in row}
    shown = [columns[name].format(value, **row) for name, value in figures.items() if columns[name]]
    print('  '.join([head, *shown, tail]), flush=True)
    csv.DictWriter(file, columns).writerow(figures)
    file.flush()
    if wandb_run:
        wandb_run.log(figures, step=row['step'])


# ---- signals -------------------------------------------------------------------------------------------------------

def note_signals():
    """Have SIGINT and SIGTERM put their number into the list returned; a second one ends the run at once."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, note)
    return received


# ---- memory --------------------------------------------------------------------------------------------------------

def keep_freed_memory():
    """
    Have the C library keep the memory of freed tensors for the next ones. On Linux; elsewhere it does nothing.

    Otherwise large blocks go back to the system, which clears every page before it gives it out again.
    """
    if sys.platform != 'linux':
        return
    library = ctypes.CDLL(None)
    # musl does not have it.
    if hasattr(library, 'mallopt'):
        # The numbers of malloc.h. The heap is never trimmed, and blocks of any size come from it.
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        library.mallopt(M_TRIM_THRESHOLD, -1)
        library.mallopt(M_MMAP_MAX, 0)
