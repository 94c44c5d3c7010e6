"""bench.py builds what a config file describes."""
from conftest import run


def test_a_config_with_fewer_cms_levels_has_fewer_parameters(tmp_path):
    path = tmp_path / 'two.py'
    path.write_text("model = 'hope'\ncms_periods = (1, 4)\n")
    flags = ['--features=24', '--grid=2', '--steps=2,3', '--repeats=1', '--device=cpu', f'--out={tmp_path}/x.png']
    lines = run('bench.py', '--vit=config/hope_jump.py', f'--hope={path}', *flags).stdout.splitlines()
    three, two = [int(line.split()[1].replace(',', '')) for line in lines[:2]]
    # In each of two blocks, two maps of width 96 and hidden width 236, with their biases.
    assert three - two == 2 * (2 * 96 * 236 + 96 + 236)
    assert lines[-2].startswith('jump to step 3') and lines[-1].startswith('rollout to step 3')
    assert (tmp_path / 'x.png').stat().st_size > 5000
