import pytest
import torch
from torch import nn

from launchers.estimate.memory import (
    FLOAT_BYTES,
    activation_bytes,
    frozen_bytes,
    state_memory,
)
from sbf_dist import models

SHAPE = (3, 32, 32)


def really_kept(model: nn.Module, images: int, precision: str) -> int:
    """Bytes that a real forward pass keeps for its backward pass."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
    ):
        model.train()(torch.randn(images, *SHAPE))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("images", [2, 5, 16])
def test_traced_activations_are_those_of_a_real_forward_pass(images, precision):
    model = models.build("cifar_resnet8", 10)
    traced = activation_bytes(model, SHAPE, images, precision)
    # A batch norm keeps its means in fp32, which a trace in lower precision does not know.
    within = 0 if precision == "fp32" else 0.005
    assert traced == pytest.approx(really_kept(model, images, precision), rel=within)


def test_tracing_leaves_the_network_as_it_was():
    model = models.build("cifar_resnet8", 10).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    activation_bytes(model, SHAPE, 4, "fp32")
    frozen_bytes(model, SHAPE, 4, "fp32")
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_network_that_is_only_run_keeps_its_weights_and_one_layer():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    weights = FLOAT_BYTES * sum(p.numel() for p in model.parameters())
    layer = FLOAT_BYTES * (8 + 8) * 32 * 32  # in and out
    assert frozen_bytes(model, SHAPE, 10, "fp32") == weights + 10 * layer


def test_stages_divide_what_they_are_known_to_divide():
    sizes = [1_000_000, 1_000_000]
    whole = FLOAT_BYTES * sum(sizes)
    plain = state_memory(0, "sgd", sizes, 8)
    assert (plain.weights, plain.gradients, plain.optimizer) == (whole, whole, whole)
    divided = state_memory(1, "adamw", sizes, 8)
    assert (divided.weights, divided.optimizer) == (whole + whole // 8, 2 * whole // 8)
    assert state_memory(3, "sgd", sizes, 8).weights == 2 * whole // 8
    assert divided.total == divided.weights + divided.gradients + divided.optimizer
