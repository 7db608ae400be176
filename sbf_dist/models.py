"""Students and teachers by name: our CIFAR networks, timm's and torchvision's."""

import difflib
import pickle
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sbf_dist.cifar import NAME, CifarResNet, CifarVGG, build_cifar, cifar_name
from sbf_dist.errors import UserError
from sbf_dist.files import replacing

LIBRARIES = ("timm", "torchvision")
EXAMPLES = "cifar_resnet20, cifar_vgg16, timm:resnet50, torchvision:resnet18"
INCEPTIONS = ("googlenet", "inception_v3")  # torchvision's networks with auxiliary heads
AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")  # of the published weights
# What wrappers of a network put before the names of its weights.
WRAPPERS = ("module.", "_orig_mod.", "model.")


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


def name_of(model: nn.Module, classes: int) -> str:
    """Return the name that `build` makes a network like `model`, with `classes` outputs, of.

    It is found by building the networks that `model` may be, without memory, and comparing names
    and shapes of their tensors and all that their modules say of themselves. A network that is
    none of them has the name of its class instead: 'package.module:Class'.
    """
    kind = type(model)
    for name in _names_it_may_have(model):
        with torch.device("meta"):
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
        from torchvision.models import list_models

        return [f"torchvision:{name}" for name in list_models(module=sys.modules[module])]
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


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the state dict of `model` as safetensors, in one step."""
    state = {  # cloned: safetensors refuses one tensor under two names, as shared modules have
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        save_file(state, partial)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file of weights into `model`; UserError naming the first key that does not fit.

    Safetensors, or torch.save's file of a state dict, or of a dict with one as "state_dict", of
    which nothing but tensors is unpickled. The message says so where all keys fit but for what a
    wrapper (DataParallel, torch.compile) put before them.
    """
    state = _read_state(path)
    if getattr(model, "aux_logits", None) is False:  # torchvision's, built without these heads
        state = {name: x for name, x in state.items() if not name.startswith(AUXILIARY)}
    own = model.state_dict()
    for wrapper in WRAPPERS:
        if state and {name.removeprefix(wrapper) for name in state} == own.keys() != state.keys():
            raise UserError(
                f"weights {path} have {wrapper!r} before every name, as a wrapper writes it: save "
                "the state dict of the network inside"
            )
    for name, tensor in own.items():
        if name not in state:
            raise UserError(f"weights {path} lack {name}, which the model has")
        if state[name].shape != tensor.shape:
            raise UserError(
                f"weights {path}: {name} is {tuple(state[name].shape)}, the model wants "
                f"{tuple(tensor.shape)}"
            )
    for name in state:
        if name not in own:
            raise UserError(f"weights {path} have {name}, which the model does not know")
    load_state(model, state)


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise UserError(f"weights {path} do not exist")
    if not zipfile.is_zipfile(path):
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"weights {path} are neither a safetensors file nor torch.save's: {error}"
            ) from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError):
        raise UserError(
            f"weights {path} hold more than tensors, which is not unpickled: write the state dict "
            "alone, best with safetensors.torch.save_file"
        ) from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(x, Tensor) for x in content.values()):
        raise UserError(f"weights {path} are no state dict: wanted tensors by name")
    return dict(content)


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a whole state dict that came out of a safetensors file into `model`.

    Such a file does not have the versions of the modules that wrote it, without which some refuse
    to load (torchvision's MNASNet): they are taken to be those of `model`. Raises RuntimeError
    as load_state_dict does.
    """
    versioned = model.state_dict()
    versioned.clear()  # which leaves the versions
    versioned.update(state)
    model.load_state_dict(versioned)
