"""Networks with hooks, and with a forward that was put on a module."""

import types
from collections.abc import Callable

import pytest
import torch
from students import half_of_every_block, make_student, randomise
from torch import Tensor, nn

from sbf_dist.export.fold import fold_batchnorm
from sbf_dist.export.onnx import export_onnx, verify_onnx
from sbf_dist.export.optimize import optimize
from sbf_dist.layers import SBFConv2d

SIZE = (3, 16, 16)


def plain() -> nn.Module:
    torch.manual_seed(0)
    return randomise(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Identity(),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.Dropout(),
        )
    ).eval()


def sbf() -> nn.Module:
    """Layers of several sources, whose order is left free, and of one."""
    torch.manual_seed(0)
    kept = [0, 2, 5, 6, 9, 11]
    several = [[kept[(i + s) % 6] for s in range(4)] for i in range(6)]
    return randomise(
        nn.Sequential(
            SBFConv2d(3, 12, 3, kept, several, padding=1, bias=True),
            nn.ReLU(),
            SBFConv2d(12, 12, 3, kept, [[one] for one in kept], padding=1, bias=True),
            nn.ReLU(),
            nn.Conv2d(12, 4, 1),
        )
    ).eval()


def scaled(channels: Tensor) -> Tensor:
    """Make every channel another, so that their order counts."""
    return channels * torch.linspace(0.5, 1.5, channels.shape[1]).view(-1, 1, 1)


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda _, inputs, output: scaled(output).clamp(max=0.4))


def hook_with_keywords(module: nn.Module) -> None:
    module.register_forward_hook(
        lambda _, inputs, keywords, output: scaled(output).clamp(max=0.4), with_kwargs=True
    )


def pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda _, inputs: (scaled(inputs[0]) - 0.1,))


def own_forward(module: nn.Module) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return scaled(type(self).forward(self, x)) - 0.1

    module.forward = types.MethodType(forward, module)


ALTERATIONS = [hook, hook_with_keywords, pre_hook, own_forward]
PLACES = [(make, str(place)) for make in (plain, sbf) for place in range(len(make()))]


@pytest.mark.parametrize("alter", ALTERATIONS)
@pytest.mark.parametrize(("make", "place"), [(plain, ""), (sbf, ""), *PLACES, (sbf, "0.basis")])
@torch.no_grad()
def test_what_was_added_to_a_module_is_in_the_prepared_network(
    make: Callable[[], nn.Module], place: str, alter: Callable[[nn.Module], None]
) -> None:
    model = make()
    alter(model.get_submodule(place))
    images = torch.randn(2, *SIZE)
    for prepare in (fold_batchnorm, optimize):
        torch.testing.assert_close(prepare(model)(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alter", [hook, pre_hook])
@pytest.mark.parametrize(
    ("make", "place"),
    [(plain, "0"), (plain, "1"), (plain, ""), *((sbf, str(i)) for i in range(5)), (sbf, "0.basis")],
)
def test_what_was_added_to_a_module_is_in_the_onnx_file(make, place, alter, tmp_path) -> None:
    model = make()
    alter(model.get_submodule(place))
    export_onnx(model, tmp_path / "model.onnx", input_shape=SIZE)
    assert verify_onnx(tmp_path / "model.onnx", model, torch.randn(3, *SIZE)) < 1e-4


def test_a_hook_leaves_the_other_layers_folded_and_fused() -> None:
    student = make_student(half_of_every_block(sources=1))
    before = optimize(student)
    name, first = next((n, m) for n, m in student.named_modules() if isinstance(m, nn.BatchNorm2d))
    first.register_forward_hook(lambda *_: None)
    left = [n for n, m in optimize(student).named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert left == [name]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in before.modules())
