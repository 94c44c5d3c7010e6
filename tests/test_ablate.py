"""The table of variants: what is kept is shown only where it was made with the same settings, data and code."""
import json

import pytest

import ablate
from configurator import Refusal

DEPENDS = {'max_iters': 6, 'clips': 4, 'data': 'abc', 'depth in config': 2, 'train.py': 'def', 'variant HOPE': 'memory: '}


def keep(folder, **changed):
    """Hand in settings, some of them changed; names may have blanks and dots."""
    ablate.check_same(str(folder), {**DEPENDS, **changed})


def test_the_same_settings_and_further_variants_are_taken(tmp_path):
    keep(tmp_path)
    keep(tmp_path)
    others = {name: value for name, value in DEPENDS.items() if name != 'variant HOPE'}
    ablate.check_same(str(tmp_path), {**others, 'variant delta rule': 'memory: --rule=delta'})
    kept = json.loads((tmp_path / 'settings.json').read_text())
    assert kept == {**DEPENDS, 'variant delta rule': 'memory: --rule=delta'}


@pytest.mark.parametrize('name, value, words', [
    ('max_iters', 2500, 'max_iters = 2500 (was 6)'), ('data', 'x', 'data'), ('depth in config', 3, 'depth in config = 3'),
    ('width in config', 8, 'width in config'), ('train.py', 'x', 'train.py'),
    ('variant HOPE', 'memory: --conv=False', 'variant HOPE'),
])
def test_anything_else_is_refused(name, value, words, tmp_path):
    keep(tmp_path)
    before = (tmp_path / 'settings.json').read_bytes()
    with pytest.raises(Refusal) as refusal:
        keep(tmp_path, **{name: value})
    assert words in str(refusal.value) and '; name another --out' in str(refusal.value)
    assert (tmp_path / 'settings.json').read_bytes() == before


def test_results_of_unknown_settings_are_refused(tmp_path):
    (tmp_path / 'HOPE_1.pt').write_text('')
    with pytest.raises(Refusal, match='not the settings that they depend on'):
        keep(tmp_path)
    assert not (tmp_path / 'settings.json').exists()


def test_what_results_depend_on(tiny):
    knobs = ablate.SimpleNamespace(config='config/hope_jump.py', max_iters=6, clips=4, tune_clips=1, extra='', data=tiny)
    depends = ablate.depends_on(knobs, ['HOPE'])
    assert depends['width in config'] == 96 and depends['variant HOPE'] == 'memory: '
    assert {'max_iters', 'data', 'extra', 'train.py', 'adapt.py', 'hope.py'} <= set(depends)
    json.dumps(depends)
