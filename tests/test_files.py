"""Checkpoints are whole or as before; devices and precision; what torchrun says."""
import pytest
import torch
from conftest import sizes

import hope
from support import files


@pytest.fixture
def predictor():
    torch.manual_seed(0)
    return hope.build(sizes(width=24, heads=2, cms_hidden=10))


def test_a_checkpoint_comes_back_as_it_was(predictor, tmp_path):
    path = str(tmp_path / 'folder' / 'x.pt')
    files.save(path, predictor, step=6, loss='jump')
    again, checkpoint = hope.load(path)
    assert checkpoint['step'] == 6 and again.sizes == predictor.sizes and not again.training
    for name, tensor in predictor.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_a_write_that_fails_leaves_what_was_there(predictor, tmp_path):
    path = str(tmp_path / 'x.pt')
    files.save(path, predictor, step=6)

    def half(f):
        f.write(b'half')
        raise OSError('no space left')
    with pytest.raises(OSError):
        files.write_atomically(path, half)
    assert hope.load(path)[1]['step'] == 6


@pytest.mark.parametrize('at', [0.1, 0.5, 0.9])
def test_a_flipped_bit_and_a_cut_are_refused(predictor, tmp_path, capsys, at):
    """A bit within a tensor too, which torch.load would take."""
    path = tmp_path / 'x.pt'
    files.save(str(path), predictor, step=6)
    raw = bytearray(path.read_bytes())
    raw[int(at * len(raw))] ^= 0x10
    for content in (raw, raw[:int(at * len(raw))]):
        path.write_bytes(content)
        with pytest.raises(SystemExit) as end:
            hope.load(str(path))
        assert end.value.code == 2 and 'x.pt is damaged' in capsys.readouterr().err


def test_a_missing_checkpoint_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        hope.load(str(tmp_path / 'none.pt'))
    assert 'no checkpoint at' in capsys.readouterr().err


def test_devices_precision_and_processes(monkeypatch, capsys):
    assert files.pick_device('cpu') == 'cpu'
    with pytest.raises(SystemExit):
        files.pick_device('cuda:77')
    assert '--device=cuda:77: there is no such device here' in capsys.readouterr().err
    with files.autocast('cpu', 'bfloat16', 8):
        assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == torch.bfloat16
    with files.autocast('cpu', 'auto', 96):
        assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == torch.float32
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)
    assert files.launched() == (0, 0, 1)
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert files.launched() == (1, 0, 2)
