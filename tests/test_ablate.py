"""The table of variants: one training for each set of flags and seed, one run of adapt.py for each row."""
import os

import pytest
from conftest import TINY, run

import ablate
import figures
from configurator import Refusal
from hope import read_checkpoint


def test_rows_with_the_same_flags_share_their_checkpoints():
    assert ablate.file_name('ViT-AC with the memory') == ablate.file_name('ViT-AC') == 'ViT_AC'
    names = {tuple(trained): ablate.file_name(name) for name, (_, *trained) in ablate.VARIANTS.items()}
    assert len(set(names.values())) == len(names) and names['config', ''] == 'HOPE'


def test_what_is_finished(trained):
    """The same settings and data, and the last step; settings that change no weight do not matter."""
    kept = read_checkpoint(trained['hope'], 'cpu', data=str)
    wanted = {'model': 'hope', 'depth': '2', 'seed': '1', 'max_iters': 6, 'device': 'cpu', 'eval_interval': '1'}
    assert ablate.finished(trained['hope'], wanted, kept['data'])
    assert not ablate.finished(trained['hope'], wanted, 'another data set')
    for knob, value in {'depth': '3', 'seed': '2', 'max_iters': '7', 'rule': 'delta', 'zoom': 'False'}.items():
        assert not ablate.finished(trained['hope'], {**wanted, knob: value}, kept['data'])


def test_no_row_is_trained_shorter_than_another(monkeypatch):
    steps = {'a.pt': 6, 'b.pt': 6, 'c.pt': 4}
    monkeypatch.setattr(ablate, 'load', lambda path, where, step: (None, {'step': steps[path]}))
    assert ablate.same_steps(['a.pt', 'b.pt']) == 6
    with pytest.raises(Refusal, match='c.pt was trained for 4 steps, a.pt for 6: they cannot be compared'):
        ablate.same_steps(list(steps))


def test_the_table():
    """Means over the seeds, with intervals below them; a column that no row has is left out."""
    def rows(*values):
        same = {'A1': [0.01], 'B_first': [0.03], 'return_cost': [0.001]}
        return [{'figures': {**same, 'B': [value]}} for value in values]
    found = {'HOPE': ('memory', {'frozen': rows(0.07, 0.08), 'memory': rows(0.02, 0.03)}),
             'ViT-AC': ('LN-TTA', {'frozen': rows(0.07, 0.09), 'LN-TTA': rows(0.04, 0.05)})}
    lines = ablate.table(found, 4000).splitlines()
    assert lines[0].split() == '4,000 steps A frozen A₁ B frozen B 1-25 return'.split()
    assert lines[1].split() == ['HOPE', '0.0100', '0.0100', '0.0750', '0.0250', '0.0300', '+0.0010']
    _, low, high = figures.interval([[0.02], [0.03]])
    assert lines[2].split() == ['±', '0.0000', '0.0000', f'{(high - low) / 2:.4f}', f'{(high - low) / 2:.4f}', '0.0000',
                                '0.0000']
    assert lines[3].startswith('ViT-AC ') and lines[-1].startswith('±: half the 95 % interval over 2 seeds')
    one = {'HOPE': ('memory', {'frozen': rows(0.07), 'memory': rows(0.02)})}
    assert '±' not in ablate.table(one, 4000)


def test_two_seeds_of_a_row(tiny, tmp_path):
    """Each seed is trained, one run of adapt.py has both; what is there is not made again."""
    folder = tmp_path / 'ablation'
    args = [f'--data={tiny}', f'--out={folder}', '--clips=4', '--tune_clips=1', '--seeds=1,2', '--max_iters=2',
            '--extra=' + ' '.join(TINY), '--variants=ViT-AC with the memory', '--device=cpu']
    done = run('ablate.py', *args)
    made = [folder / name for name in ('ViT_AC_1.pt', 'ViT_AC_2.pt', 'ViT_AC_memory_1_2/results.json')]
    before = [os.stat(path).st_mtime_ns for path in made]
    text = (folder / 'table.txt').read_text()
    assert text in done.stdout and text.startswith('2 steps') and ' ± ' in text
    again = run('ablate.py', *args)
    assert again.stdout.endswith(text + '\n') and 'step ' not in again.stdout
    assert before == [os.stat(path).st_mtime_ns for path in made]
