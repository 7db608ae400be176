"""The plan of a network of which nothing is converted or removed yet."""

from torch import Tensor, nn

from sbf_dist import models
from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.candidates import forward_order
from sbf_dist.compression.cost import count
from sbf_dist.compression.inputs import Packing
from sbf_dist.compression.outputs import number_of_classes
from sbf_dist.compression.plan import DenseLayer, Layer, OtherInput, Plan
from sbf_dist.models import Architecture
from sbf_dist.settings import Compression

NEVER_REACHED = "no forward pass in evaluation mode reaches it"


def dense_plan(
    model: nn.Module,
    images: Calibration,
    name: str | Architecture | None,
    settings: Compression,
) -> Plan:
    """Return the plan of a network, in eval mode, of which nothing is converted or removed.

    `name` is the network's; None finds it out (`models.architecture_of`). Raises UserError as
    `Yardstick.of` does.
    """
    examples = images.first(2)
    order = forward_order(model, examples)
    architecture = architecture_of(model, examples, name, settings)
    cost = count(model, images.shape, examples)
    layers: dict[str, Layer] = {
        layer: DenseLayer(reason="", macs=cost.layers[layer], convertible=True) for layer in order
    }
    for layer, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and layer not in layers:
            layers[layer] = DenseLayer(reason=NEVER_REACHED, macs=0, convertible=False)
    return Plan(
        model=architecture.name,
        classes=architecture.classes or 0,
        arguments=dict(architecture.arguments),
        input_shape=images.image_shape,
        other_inputs=_other_inputs(images.packing),
        budget={},
        macs_before=cost.macs,
        macs_after=cost.macs,
        params_before=cost.params,
        params_after=cost.params,
        layers=layers,
    )


def architecture_of(
    model: nn.Module, examples: Tensor, name: str | Architecture | None, settings: Compression
) -> Architecture:
    """Return what `model` is built of, as far as `name` does not say it."""
    if isinstance(name, Architecture) and name.classes is not None:
        return name
    classes = number_of_classes(model, examples, settings)
    if isinstance(name, Architecture):
        return Architecture(name.name, classes, name.arguments)
    return Architecture(name, classes) if name else models.architecture_of(model, classes)


def _other_inputs(packing: Packing | None) -> list[OtherInput]:
    if packing is None:
        return []
    pairs = zip(packing.shapes[1:], packing.dtypes[1:], strict=True)
    return [
        OtherInput(shape=shape, dtype="float" if dtype.is_floating_point else str(dtype)[6:])
        for shape, dtype in pairs
    ]
