import torch
from torch import nn

from sbf_dist import models
from sbf_dist.compression.convert import convert
from sbf_dist.compression.plan import DenseLayer, Plan, SBFLayer


def half_of_every_block(sources: int, transform_size: int = 3) -> Plan:
    """A plan for cifar_resnet8 that keeps the even channels of all block convolutions."""
    layers: dict[str, SBFLayer | DenseLayer] = {}
    for name, conv in models.build("cifar_resnet8", 10).named_modules():
        if not isinstance(conv, nn.Conv2d):
            continue
        if ".conv" not in name:
            layers[name] = DenseLayer(reason="stem or shortcut", macs=1, convertible=False)
            continue
        channels = conv.out_channels
        kept = list(range(0, channels, 2))
        layers[name] = SBFLayer(
            channels=channels,
            kept=kept,
            sources=[[kept[(i + s) % len(kept)] for s in range(sources)] for i in range(len(kept))],
            transform_size=transform_size,
            macs_before=2,
            macs_after=1,
            error=0.1,
            reason="test",
        )
    return Plan(
        model="cifar_resnet8",
        classes=10,
        input_shape=(3, 16, 16),
        budget={"macs": 0.5},
        macs_before=2,
        macs_after=1,
        params_before=2,
        params_after=1,
        layers=layers,
    )


def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter and every running statistic a value that matters."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    for name, parameter in model.named_parameters():
        if name.endswith("transforms"):
            nn.init.normal_(parameter, std=0.2)
    return model


def make_student(plan: Plan) -> nn.Module:
    torch.manual_seed(0)
    return randomise(convert(models.build(plan.model, plan.classes), plan)).eval()
