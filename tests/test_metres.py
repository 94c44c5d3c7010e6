"""metres.py: the object's position read out of features."""
import numpy as np
import pytest
import torch

import metres
from configurator import Refusal
from data import WORLD, open_split


class Bright:
    """
    A split in place of data.Split, of clips in which one patch of 4 x 4 is bright and tells where in it the object is:
    its features are the position, shifted to that patch, and a 1.
    """

    name = 'split train of a test'
    manifest = {'shape': [2, 16, 3]}

    def __init__(self, clips, seed):
        rng = np.random.default_rng(seed)
        self.clips = clips
        self.physics = {'position': rng.uniform(0, WORLD, (clips, 4, 2))}
        # Most clips that were read at once.
        self.read = 0

    def __len__(self):
        return self.clips

    def __getitem__(self, indices):
        self.read = max(self.read, len(indices))
        # Features of a step belong to its last frame.
        place = torch.tensor(self.physics['position'][indices][:, 1::2] / WORLD * 4).float()
        column, row = place.long().clamp(max=3).unbind(-1)
        z = torch.zeros(*place.shape[:2], 16, 3)
        shown = torch.cat([place % 1, torch.ones(*place.shape[:2], 1)], -1)
        z.scatter_(2, (4 * row + column)[..., None, None].expand(-1, -1, 1, 3), shown[:, :, None])
        return z, None


@pytest.fixture(scope='module')
def readout():
    """The read-out of such clips, after fewer steps than usual."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metres, 'READS', 10)
        return metres.fit_readout(Bright(2000, 1), 'cpu')


def test_reads_the_position_of_the_last_frame_of_each_step(readout):
    other = Bright(200, 2)
    assert metres.readout_error(readout, other, range(200)) < 0.02
    z, _ = other[np.arange(7)]
    assert readout(z).shape == (7, 2, 2)
    assert torch.allclose(readout(z[3, 1]), readout(z)[3, 1])
    off = readout(z) - torch.tensor(other.physics['position'][:7, 1::2])
    assert metres.readout_error(readout, other, range(7)) == pytest.approx(off.norm(dim=-1).mean().item(), abs=1e-6)


def test_is_the_same_each_time_and_leaves_the_random_state_alone(monkeypatch):
    monkeypatch.setattr(metres, 'READS', 1)
    first = metres.fit_readout(Bright(50, 1), 'cpu')
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    again = metres.fit_readout(Bright(50, 1), 'cpu')
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), first.parameters()))
    assert not any(p.requires_grad for p in again.parameters())


def test_reads_clips_some_at_a_time(monkeypatch):
    monkeypatch.setattr(metres, 'READS', 2)
    monkeypatch.setattr(metres, 'STEPS', 1)
    monkeypatch.setattr(metres, 'AT_ONCE', 5 * 2 * 16 * 3)
    split = Bright(40, 1)
    readout = metres.fit_readout(split, 'cpu')
    error = metres.readout_error(readout, split, range(40))
    assert split.read == 5
    monkeypatch.setattr(metres, 'AT_ONCE', 2 ** 20)
    assert metres.readout_error(readout, split, range(40)) == pytest.approx(error, rel=1e-5)


def test_large_pictures_do_not_make_it_large():
    count = sum(p.numel() for p in metres.Readout(256, 1024).parameters())
    assert count < 1_000_000


def test_reads_a_prepared_set(tiny, monkeypatch):
    monkeypatch.setattr(metres, 'READS', 3)
    readout = metres.fit_readout(open_split(tiny, 'train'), 'cpu')
    assert metres.readout_error(readout, open_split(tiny, 'test_B'), range(5)) < WORLD


def test_clips_without_positions_are_refused():
    split = Bright(5, 1)
    split.physics = {}
    with pytest.raises(Refusal, match='^split train of a test has no positions'):
        metres.fit_readout(split, 'cpu')
