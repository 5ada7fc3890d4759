"""An epoch that goes on in its midst is the one that was left there."""

import pytest
import torch
from accelerate import Accelerator

from detrlib.engine.epoch import EpochSoFar


@pytest.fixture
def epoch():
    def epoch(steps=0):
        """The third one, in which every step draws its loss at random."""
        made = EpochSoFar(2, seed=7, accelerator=Accelerator(cpu=True))
        made.begin()
        return go_on(made, steps)

    return epoch


def go_on(so_far, steps):
    for _ in range(steps):
        so_far.add({"loss": torch.rand(()), "class_error": torch.rand(())}, padding=0.25 * so_far.steps)
    return so_far


def test_an_epoch_gone_on_with_draws_and_means_the_same(epoch):
    whole, saved, second = epoch(5), epoch(2).state_dict(), epoch()
    second.load_state_dict(saved)
    torch.rand(3)  # by somebody else
    second.begin()
    assert go_on(second, 3).means() == whole.means()
    assert whole.means()["extra/padding"] == 0.5 and whole.means().keys() > {"epoch/loss", "epoch/class_error"}
    assert epoch(5).means() == whole.means()


def test_another_number_of_processes_goes_on_with_the_same_means(epoch):
    saved, one = epoch(2).state_dict(), epoch()
    two = [{**saved["processes"][0], "sums": torch.tensor(sums)} for sums in ([1.0, 2.0], [3.0, 8.0])]
    one.load_state_dict(saved | {"processes": two})
    assert one.means() == {"epoch/loss": 1.0, "epoch/class_error": 2.5, "extra/padding": 0.125}
