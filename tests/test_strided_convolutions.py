"""Gradients of strided 1 x 1 convolutions of few channels, in channels_last, on a CPU.

Without `keep_inputs_contiguous` oneDNN gives wrong ones, hangs, or damages memory.
"""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sbf_dist import compress, load, models, optimize, save
from sbf_dist.settings import Optimizer
from sbf_dist.strided_convolutions import keep_inputs_contiguous
from sbf_dist.train.single import SingleEngine


@pytest.mark.parametrize("channels", [2, 4, 5, 8, 14, 16])
@pytest.mark.parametrize("side", [56, 64])
def test_the_gradient_of_the_weights_is_right(channels: int, side: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 8, 1, stride=2, bias=False)
    keep_inputs_contiguous(conv)
    x = torch.randn(8, channels, side, side).contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        conv.weight.grad = None
        y = conv(x)
        gradient = torch.randn_like(y)
        y.backward(gradient)
        weight = conv.weight.detach().double().requires_grad_()
        F.conv2d(x.double().contiguous(), weight, stride=2).backward(gradient.double())
        torch.testing.assert_close(conv.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-3)


def test_all_other_convolutions_keep_their_layout() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 1, stride=1),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.Conv2d(32, 8, 1, stride=2),
        nn.Conv2d(64, 8, 1, stride=2, groups=8),
        nn.Conv2d(8, 8, 1, stride=(1, 2)),
    )
    keep_inputs_contiguous(model)
    assert [bool(module._forward_pre_hooks) for module in model] == [False] * 3 + [True] * 2


@pytest.mark.parametrize("channels", [1, 8])
def test_inputs_that_are_given_by_keyword_are_made_contiguous_too(channels: int) -> None:
    conv = nn.Conv2d(channels, 16, 1, stride=2)
    seen = []
    keep_inputs_contiguous(conv)
    conv.register_forward_hook(
        lambda _, __, given, ___: seen.append(given["input"]), with_kwargs=True
    )
    images = torch.randn(2, channels, 8, 8)
    conv(input=images.to(memory_format=torch.channels_last))
    assert seen[0].stride() == images.stride()


def test_a_training_takes_care_of_it() -> None:
    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 1, stride=2)
            self.conv.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))

        def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"loss": self.conv(batch["image"]).square().mean()}

    seen: list[torch.Tensor] = []
    engine = SingleEngine(Task(), Optimizer())
    images = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    engine.backward(engine({"image": images})["loss"])
    assert seen[0].is_contiguous()
    with torch.no_grad():
        engine({"image": images})
    assert not seen[1].is_contiguous()  # inference is as it was


def test_a_network_that_was_trained_so_is_saved_loaded_and_optimized_as_any_other(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    network = models.build("cifar_resnet8_w4", 5).eval()
    keep_inputs_contiguous(network)
    assert any(module._forward_pre_hooks for module in network.modules())
    images = torch.randn(32, 3, 16, 16)
    student, _ = compress(network, images, macs=0.7)
    save(student, tmp_path / "student")
    assert torch.equal(load(tmp_path / "student")(images), student(images))
    fused = optimize(student)
    assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.testing.assert_close(fused(images), student(images), rtol=1e-3, atol=1e-4)
