"""What a sweep refuses before any work, each in one line."""

import pytest

from finetune.sweeping.config import SchedulerConfig
from tests.finetune.test_sweeping import FIELDS, both
from vim_backbone.errors import UserError


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ({"space": {"optim.base_lrr": {"uniform": [0, 1]}}}, r"space\.optim\.base_lrr.*did you mean 'optim\.base_lr'"),
        ({"fields": {"epoch": 3}}, r"fields\.epoch.*did you mean 'epochs'"),
        ({"fields": {"name": "x"}}, r"fields\.name: the sweep sets it"),
        ({"fields": FIELDS | {"optim.base_lr": 1}}, r"optim\.base_lr stands in fields and in space"),
        ({"space": {}}, "space is {}"),
        ({"space": {"optim.base_lr": {"choice": []}}}, r"space\.optim\.base_lr: choice is \[\], an empty space"),
        ({"space": {"optim.base_lr": {"uniform": [1, 1]}}}, "an empty space"),
        ({"space": {"optim.base_lr": {"loguniform": [0, 1]}}}, "low must be above 0"),
        ({"space": {"optim.base_lr": {"normal": [0, 1]}}}, "must be one of {choice"),
        ({"space": {"optim.base_lr": [0, 1]}}, "must be one of {choice"),
        ({"space": {"batch_size": {"uniform": [1.5, 3]}}}, r"has 1\.5: it must be a whole number"),
        (
            {"fields": FIELDS, "space": {"optim.layer_decay": {"uniform": [0.5, 1.5]}}},
            r"1\.5: optim\.layer_decay is 1\.5",
        ),
        ({"fields": FIELDS, "space": {"model.img_size": {"choice": [32, "big"]}}}, r"space\.model\.img_size, 'big'"),
        (
            {"fields": FIELDS | {"data.source": "nowhere"}},
            r"fields\.data\.source is 'nowhere': there is no such folder",
        ),
        ({"fields": {"data.source": "hf:NAME"}, "space": {"backbone": {"choice": ["./no"]}}}, r"'\./no': there is no"),
        ({"task": "clasification"}, "task is 'clasification': there is no such task; did you mean 'classification'"),
        ({"metric": "acc"}, "metric is 'acc': classification reports no such"),
        ({"metric": "mIoU"}, "metric is 'mIoU': classification reports no such"),
        ({"trials": None}, "trials is None: say how many"),
        ({"searcher": "grid"}, "searcher is 'grid'"),
        ({"searcher": "grid", "space": {"batch_size": {"grid": [2, 4]}}, "trials": 3}, "the grid has 2 combinations"),
        ({"base": "no.yaml"}, r"base: cannot read no\.yaml"),
        ({"trials": 0}, "trials is 0"),
        ({"hours": 0}, "hours is 0"),
        ({"name": "a/b"}, "plain folder name"),
        (
            {"fields": FIELDS, "space": {"model.img_size": {"choice": [32]}}, "scheduler": SchedulerConfig(kind="pbt")},
            "no field of the space can change in a running trial",
        ),
    ],
)
def test_what_cannot_work_is_one_line(spec, line):
    with pytest.raises(UserError, match=line) as raised:
        both(**spec)
    assert "\n" not in str(raised.value)
