"""Checkpoints are whole or as before."""
import pytest
import torch
from conftest import small_predictor

import hope
from support import files


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    predictor = small_predictor().float()
    path = str(tmp_path / 'folder' / 'x.pt')
    files.save(path, predictor, step=6, loss='jump')
    again, checkpoint = hope.load(path)
    assert checkpoint['step'] == 6 and again.sizes == predictor.sizes and not again.training
    for name, tensor in predictor.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    def half(f):
        f.write(b'half')
        raise OSError('no space left')
    path = tmp_path / 'x.pt'
    path.write_bytes(b'whole')
    with pytest.raises(OSError):
        files.write_atomically(str(path), half)
    assert path.read_bytes() == b'whole'


@pytest.mark.parametrize('at', [0.1, 0.5, 0.9])
def test_a_flipped_bit_and_a_cut_are_refused(tmp_path, capsys, at):
    """A bit within a tensor too, which torch.load would take."""
    path = tmp_path / 'x.pt'
    files.save(str(path), small_predictor(), step=6)
    raw = bytearray(path.read_bytes())
    raw[int(at * len(raw))] ^= 0x10
    for content in (raw, raw[:int(at * len(raw))]):
        path.write_bytes(content)
        with pytest.raises(SystemExit) as end:
            hope.load(str(path))
        assert end.value.code == 2 and 'x.pt is damaged' in capsys.readouterr().err


def test_a_device_that_is_not_here_is_refused(capsys):
    assert files.pick_device('cpu') == 'cpu' and files.pick_device('auto') in ('cpu', 'cuda', 'mps')
    with pytest.raises(SystemExit) as end:
        files.pick_device('xpu:77')
    assert end.value.code == 2 and '--device=xpu:77: there is no such device' in capsys.readouterr().err
