"""bench.py builds what a config file describes."""
from conftest import run

import hope
from configurator import read_config
from model import Sizes


def test_a_config_with_two_cms_levels_gives_two(tmp_path):
    """cms_periods is text in a config file. Read character by character, '1,4' gave three levels."""
    path = tmp_path / 'two.py'
    path.write_text('model = "hope"\ndepth = 1\nwidth = 24\nheads = 2\ncms_hidden = 10\ncms_periods = "1,4"\n')
    small = ['--features=24', '--grid=2', '--steps=2', '--repeats=1', '--device=cpu']
    said = run('bench.py', f'--hope={path}', '--vit=config/vit_jump.py', *small).stdout
    net = hope.build(Sizes.from_settings({**read_config(path), 'cms_periods': (1, 4)}, feature_dim=24, grid=(2, 2)))
    parameters = sum(p.numel() for p in net.parameters())
    assert f'{parameters:,} parameters' in next(line for line in said.splitlines() if line.startswith(str(path)))
    # The peak of memory comes from a process of its own.
    assert 'nan' not in said
