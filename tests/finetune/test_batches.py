"""Evaluation reads each sample once, however samples are spread; training replaces what cannot be read."""

from types import SimpleNamespace

import pytest
import torch

from finetune.batches import evaluation_batches, training_batches
from launch.data.order import BatchPlan
from vim_backbone import UserError


class Numbers:
    """Sample i is the number i and one draw of the global generator; `broken` ones raise."""

    def __init__(self, count, broken=()):
        self.count = count
        self.broken = broken

    def __len__(self):
        return self.count

    def name(self, index):
        return f"sample {index}"

    def draw(self, index):
        if index in self.broken:
            raise OSError("image file is truncated")
        return torch.tensor(index), torch.rand(())

    def collate(self, samples):
        return torch.stack([a for a, _ in samples]), torch.stack([b for _, b in samples])


def shares(samples, world, batch_size):
    processes = [SimpleNamespace(process_index=rank, num_processes=world) for rank in range(world)]
    return [list(evaluation_batches(samples, process, batch_size, 0)) for process in processes]


@pytest.mark.parametrize("total", [1, 2, 5, 12, 13])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_each_sample_is_counted_once(total, world):
    processes = shares(Numbers(total), world, 3)
    counted = [
        int(image)
        for batches in processes
        for batch in batches
        for image, counts in zip(batch.images, batch.counted, strict=True)
        if counts
    ]
    assert sorted(counted) == list(range(total))
    assert len({len(batches) for batches in processes}) == 1, "a forward pass is for all processes under ZeRO-3"


def test_an_unreadable_sample_is_named_and_not_counted():
    batches = shares(Numbers(6, broken={2}), 1, 4)[0]
    assert [batch.counted for batch in batches] == [[True, True, False, True], [True, True]]
    assert batches[0].bad == [("sample 2", "image file is truncated")]
    with pytest.raises(UserError, match=r"validation data cannot be read: sample 0 \(image file is truncated\)"):
        shares(Numbers(2, broken={0, 1}), 1, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_go_on_where_they_stopped(workers):
    plan = BatchPlan(4, 1, 1, 0)
    samples = Numbers(10, broken={3})
    whole = list(training_batches(samples, 0, plan, 0, 6, workers))
    rest = list(training_batches(samples, 0, plan, 4, 6, workers))
    assert [batch.names for batch in whole[4:]] == [batch.names for batch in rest]
    assert all(torch.equal(a.targets, b.targets) for a, b in zip(whole[4:], rest, strict=True))
    assert {name for batch in whole for name, _ in batch.bad} == {"sample 3"}
    assert "sample 3" not in {name for batch in whole for name in batch.names}
    halves = [list(training_batches(samples, 0, BatchPlan(4, 1, 2, rank), 0, 6, 0)) for rank in (0, 1)]
    assert {n for half in halves for n in half[0].names} == set(whole[0].names)


def test_what_stands_in_has_draws_of_its_own():
    """Or an augmentation that failed for its draws would fail for every picture that stands in."""
    (batch,) = training_batches(Numbers(4, broken={0}), 3, BatchPlan(4, 1, 1, 0), 0, 1, 0)
    assert len(set(batch.targets.tolist())) == 4
    (alone,) = training_batches(Numbers(4), 3, BatchPlan(4, 1, 1, 0), 0, 1, 0)
    usable = [n for n, name in enumerate(alone.names) if name != "sample 0"]
    assert batch.targets[usable].tolist() == alone.targets[usable].tolist()
    assert batch.targets.tolist() != alone.targets.tolist()
