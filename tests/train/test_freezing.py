import pytest
import torch
from tiny import TinyLoader, TinyTask
from torch import nn

from sbf_dist.errors import UserError
from sbf_dist.settings import Optimizer
from sbf_dist.train.freezing import freeze, frozen_names
from sbf_dist.train.loop import Every, fit
from sbf_dist.train.single import SingleEngine


class Named(nn.Module):
    """Parameters with names of two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.layer10 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, 2)


def test_patterns_are_those_of_shells_over_whole_names() -> None:
    network = Named()
    assert frozen_names(network, ["layer1.*"]) == [
        f"layer1.{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias")
    ]
    assert frozen_names(network, ["*.bias"]) == [
        "layer1.0.bias", "layer1.1.bias", "layer10.0.bias", "layer10.1.bias", "fc.bias",
    ]  # fmt: skip
    assert frozen_names(network, []) == []


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layer1", "no parameter matches 'layer1'; did you mean 'layer1.*'?"),
        ("layr1.*", "no parameter matches 'layr1.*'; similar are layer1"),
        ("zzz", "no parameter matches 'zzz'; there are layer1.0.weight, layer1.0.bias"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_similar_names(
    pattern: str, message: str
) -> None:
    with pytest.raises(UserError) as error:
        frozen_names(Named(), ["fc.*", pattern])
    assert message in str(error.value)


def test_freezing_everything_is_refused() -> None:
    with pytest.raises(UserError, match="matches all parameters, so none is trained"):
        frozen_names(Named(), ["*"])


def test_frozen_layers_and_their_statistics_stay_and_all_others_move() -> None:
    torch.manual_seed(0)
    task = TinyTask()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    freeze(task.student, ["0.*", "1.*"])
    engine = SingleEngine(task, Optimizer(lr=0.1))  # puts everything into training mode
    records = Every(None, lambda record: None)
    fit(engine, TinyLoader(0, 1), steps=2, lr_at=lambda step: 0.1, log=records)
    for name, value in task.state_dict().items():
        assert torch.equal(value, before[name]) is name.startswith(("student.0.", "student.1.")), (
            name
        )


def test_a_batch_norm_with_a_parameter_that_is_trained_measures_its_statistics() -> None:
    task = TinyTask()
    freeze(task.student, ["1.bias"])
    task.train()
    task.student(torch.randn(4, 3, 6, 6))
    assert int(task.student[1].num_batches_tracked) == 1


def test_a_frozen_batch_norm_normalises_with_its_statistics() -> None:
    network = Named()
    freeze(network, ["layer1.1.*"])
    norm = network.train().layer1[1]
    x = torch.randn(2, 4, 3, 3) * 3 + 5
    torch.testing.assert_close(norm(x), x / (1 + norm.eps) ** 0.5)
