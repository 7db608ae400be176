import pytest
import torch
from tiny import TinyTask
from torch import nn

from sbf_dist.errors import UserError
from sbf_dist.settings import Optimizer
from sbf_dist.train.engine import build_engine, parameter_groups, torch_optimizer


def test_only_weights_of_convolutions_and_linear_layers_decay() -> None:
    task = TinyTask()
    decayed, free = parameter_groups(task, Optimizer(weight_decay=0.1))
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert [p.shape for p in decayed["params"]] == [(8, 3, 3, 3), (7, 32)]
    assert len(free["params"]) == 4  # two biases, the batch norm's scale and shift


def test_the_small_kernels_of_an_sbf_layer_do_not_decay() -> None:
    task = nn.Module()
    task.basis = nn.Conv2d(3, 4, 3, bias=False)
    task.transforms = nn.Parameter(torch.zeros(2, 1, 3, 3))
    decayed, free = parameter_groups(task, Optimizer(weight_decay=0.1))
    assert [p.shape for p in free["params"]] == [(2, 1, 3, 3)]
    assert [p.shape for p in decayed["params"]] == [(4, 3, 3, 3)]


def test_frozen_parameters_are_in_no_group_and_no_group_is_empty() -> None:
    task = TinyTask().requires_grad_(False)
    task.student[5].weight.requires_grad_(True)
    groups = parameter_groups(task, Optimizer())
    assert [group["params"] for group in groups] == [[task.student[5].weight]]
    assert "lr_scale" not in groups[0]


def test_the_body_has_groups_of_its_own_with_a_share_of_the_learning_rate() -> None:
    task = TinyTask()
    task.student[0].bias.requires_grad_(False)
    groups = parameter_groups(task, Optimizer(weight_decay=0.1, body_lr_share=0.2))
    found = [
        ([tuple(p.shape) for p in g["params"]], g["weight_decay"], g.get("lr_scale"))
        for g in groups
    ]
    assert found == [
        ([(8, 3, 3, 3)], 0.1, 0.2),
        ([(8,), (8,)], 0.0, 0.2),
        ([(7, 32)], 0.1, None),
        ([(7,)], 0.0, None),
    ]


def test_a_network_without_a_head_has_no_share() -> None:
    with pytest.raises(UserError, match="body_lr_share: the network has no linear layer"):
        parameter_groups(nn.BatchNorm2d(3), Optimizer(body_lr_share=0.5))


def test_a_task_without_trainable_parameters_is_refused() -> None:
    task = TinyTask().requires_grad_(False)
    with pytest.raises(UserError, match="nothing to train"):
        build_engine(task, Optimizer(), micro_batch=1)


def test_fp16_on_the_cpu_is_refused() -> None:
    with pytest.raises(UserError, match="precision fp16: needs a GPU"):
        build_engine(TinyTask(), Optimizer(), micro_batch=1, precision="fp16")


def test_a_zero_stage_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match="zero_stage 4"):
        build_engine(TinyTask(), Optimizer(), micro_batch=1, zero_stage=4)


def test_a_misspelt_setting_of_the_optimizer_is_refused() -> None:
    with pytest.raises(UserError, match="wd is not a known key"):
        Optimizer(wd=0.1)  # type: ignore[call-arg]


def test_lamb_is_timms_without_its_own_clipping() -> None:
    from timm.optim import Lamb

    task = TinyTask()
    optimizer = torch_optimizer(task, Optimizer(name="lamb", lr=0.1, betas=(0.8, 0.9)))
    assert isinstance(optimizer, Lamb)
    decayed, free = optimizer.param_groups
    assert (decayed["lr"], decayed["betas"], decayed["weight_decay"]) == (0.1, (0.8, 0.9), 1e-4)
    assert free["weight_decay"] == 0
    assert optimizer.defaults["max_grad_norm"] is None


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_lamb_is_refused_where_layers_are_cut_up(stage: int) -> None:
    with pytest.raises(UserError, match=f"zero_stage {stage}: cannot be combined with lamb"):
        build_engine(TinyTask(), Optimizer(name="lamb"), micro_batch=1, zero_stage=stage)
