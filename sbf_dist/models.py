"""Students and teachers by name: our CIFAR networks, timm's and torchvision's."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sbf_dist.cifar import NAME, CifarResNet, CifarVGG, build_cifar, cifar_name
from sbf_dist.errors import UserError

LIBRARIES = ("timm", "torchvision")
EXAMPLES = "cifar_resnet20, cifar_vgg16, timm:resnet50, torchvision:resnet18"
INCEPTIONS = ("googlenet", "inception_v3")  # torchvision's networks with auxiliary heads


def build(name: str, classes: int) -> nn.Module:
    """Build a randomly initialised network with `classes` outputs.

    `cifar_resnetD[_wW]` and `cifar_vggD[_wW]` are our networks for small images, of depth D and W
    channels in the first convolution (16 and 64 if not given); `timm:NAME` and `torchvision:NAME`
    are those libraries' networks, without auxiliary heads. Raises UserError for an unknown name.
    """
    library, _, rest = name.rpartition(":")
    if library == "timm":
        return _timm(rest, classes)
    if library == "torchvision":
        return _torchvision(rest, classes)
    network = build_cifar(name, classes)
    if network is None:
        raise UserError(f"model {name!r} is unknown; names look like {EXAMPLES}")
    return network


class _WithoutMemory(TorchFunctionMode):
    """Creates weights without memory for them, but numbers that networks are built by with it.

    Under `torch.device("meta")`, torchvision's RegNets cannot compute their widths.
    """

    def __torch_function__(
        self,
        func: Callable,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones) and kwargs.get("device") is None:
            kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


def name_of(model: nn.Module, classes: int) -> str:
    """Return the name that `build` makes a network like `model`, with `classes` outputs, of.

    It is found by building the networks that `model` may be, without memory, and comparing names
    and shapes of their tensors and all that their modules say of themselves. A network that is
    not among them has the name of its class instead: 'package.module:Class'.
    """
    kind = type(model)
    for name in _names_it_may_have(model):
        with _WithoutMemory():
            candidate = build(name, classes)
        if type(candidate) is kind and _looks_like(candidate, model):
            return name
    return f"{kind.__module__}:{kind.__qualname__}"


def is_buildable(name: str) -> bool:
    """Whether `build` knows the network of a plan, not only its user."""
    library, _, rest = name.rpartition(":")
    return library in LIBRARIES or (not library and NAME.fullmatch(rest) is not None)


def _names_it_may_have(model: nn.Module) -> list[str]:
    module = type(model).__module__
    if isinstance(model, CifarResNet | CifarVGG):
        name = cifar_name(model)
        return [] if name is None else [name]
    if module.startswith("timm."):
        import timm

        card = getattr(model, "pretrained_cfg", None) or {}
        architecture = card.get("architecture", "")
        return [f"timm:{architecture}"] if timm.is_model(architecture) else []
    if module.startswith("torchvision.models."):
        import torchvision
        from torchvision.models import get_model_builder, list_models

        names = list_models(module=torchvision.models)
        alike = [name for name in names if get_model_builder(name).__module__ == module]
        return [f"torchvision:{name}" for name in alike]
    return []


def _looks_like(one: nn.Module, other: nn.Module) -> bool:
    shapes = [{n: x.shape for n, x in network.state_dict().items()} for network in (one, other)]
    return shapes[0] == shapes[1] and repr(one) == repr(other)


def _timm(name: str, classes: int) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise UserError(f"model 'timm:{name}' is unknown{_nearest(name, timm.list_models())}")
    return timm.create_model(name, num_classes=classes)


def _torchvision(name: str, classes: int) -> nn.Module:
    import torchvision
    from torchvision.models import get_model, list_models

    known = list_models(module=torchvision.models)  # classification only
    if name not in known:
        raise UserError(f"model 'torchvision:{name}' is unknown{_nearest(name, known)}")
    settings = {}
    if name in INCEPTIONS:
        # The heads would return logits of their own in training. The initial weights are those
        # that torchvision announces; the old ones take seconds to draw.
        settings = {"aux_logits": False, "init_weights": False}
    return get_model(name, weights=None, num_classes=classes, **settings)


def _nearest(name: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
