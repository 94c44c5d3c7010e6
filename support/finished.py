"""What an earlier run of adapt.py has left, and what a run must not write over."""
import json
import os

from configurator import ROOT, Refusal
from support.files import read_sealed, sha256

FILES = ('table.txt', 'results.json', 'results.csv', 'compare.csv', 'results.png', 'results.pdf', 'predictions.png',
         'switch.gif', 'unfinished.pt')

# The code that the rows of a run depend on. That of prepare.py is in the manifest of the data set.
CODE = ('adapt.py', 'data.py', 'experiment.py', 'figures.py', 'hope.py', 'methods.py', 'metres.py', 'model.py',
        'planning.py')


def run_key(settings, files, checksum):
    """
    What the rows of a run depend on: its settings, and the content of the files that it reads, as sha256.

    settings: {knob: value}; files: {knob: paths}, whose names do not matter; checksum: that of the data set.
    """
    code = [os.path.join(ROOT, file) for file in CODE]
    content = {name: [sha256(path) for path in paths] for name, paths in {**files, 'code': code}.items()}
    names_only = {*files, 'data', 'out'}
    chosen = {name: value for name, value in settings.items() if name not in names_only}
    return {'settings': chosen, 'content': {**content, 'data': checksum}}


def differences(old, new):
    """In what two keys of run_key differ, in words."""
    if not isinstance(old, dict) or old.keys() != new.keys():
        return 'an earlier version of adapt.py'
    was, now = old['settings'], new['settings']
    found = []
    for name in now | was:
        if now.get(name) != was.get(name):
            found.append(f'{name} = {now.get(name)} (was {was.get(name)})')
    for name, value in new['content'].items():
        if old['content'].get(name) != value:
            found.append(f'another content of {name}')
    return ', '.join(found)


def resume(folder, key, where):
    """
    What an earlier run of the same key has left in the folder of results, as {'key', 'tried': {model and method:
    {rate: loss}}, 'finished': {title: result of run_stream}}; None where it has finished.

    Raises Refusal where the folder holds anything else that this run would write over.
    """
    there = [file for file in FILES if os.path.exists(os.path.join(folder, file))]
    if not there:
        return {'key': key, 'tried': {}, 'finished': {}}
    kept = {}
    if 'unfinished.pt' in there:
        kept = read_sealed(os.path.join(folder, 'unfinished.pt'), where)
    elif 'results.json' in there:
        try:
            with open(os.path.join(folder, 'results.json'), encoding='utf-8') as f:
                kept = json.load(f)
        except ValueError:
            raise Refusal(f'{folder}: its results.json is damaged; name another folder with --out') from None
    if kept.get('key') != key:
        why = differences(kept.get('key'), key)
        raise Refusal(f'{folder} holds {there[0]} of another run: {why}; name another folder with --out')
    return kept if 'unfinished.pt' in there else None


def check_memory_out(path, key):
    """Raises Refusal where a memory would be written over anything but that of an earlier run of the same key."""
    if not os.path.exists(path):
        return
    try:
        kept = read_sealed(path)
    except Refusal:
        kept = None
    if not isinstance(kept, dict) or not {'memory', 'cms'} <= kept.keys():
        raise Refusal(f'--memory_out={path}: exists, and is no memory that could be replaced; name another file')
    if kept.get('key') != key:
        why = differences(kept.get('key'), key)
        raise Refusal(f'--memory_out={path}: holds the memory of another run ({why}); name another file, or delete it')
