"""Students and teachers by name: our CIFAR networks, timm's and torchvision's."""

import difflib

from torch import nn

from sbf_dist.cifar import build_cifar
from sbf_dist.errors import UserError

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
