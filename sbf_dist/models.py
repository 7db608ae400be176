"""Students and teachers by name: our CIFAR networks, timm's, torchvision's and the user's own."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sbf_dist import user_code
from sbf_dist.cifar import NAME, CifarResNet, CifarVGG, build_cifar, cifar_name
from sbf_dist.errors import UserError
from sbf_dist.hooks import number_of_hooks

LIBRARIES = ("timm", "torchvision")
EXAMPLES = "cifar_resnet20, timm:resnet50, torchvision:resnet18, nets/mine.py:function"
RGB = 3  # channels of the images that libraries build for
INCEPTIONS = ("googlenet", "inception_v3")  # torchvision's networks with auxiliary heads


# What modules say of their state, and of where timm's weights came from.
NO_FACTS = ("training", "pretrained_cfg", "default_cfg", "pretrained_model_args")

# What the arguments begin with by which libraries would fetch or read weights.
WEIGHTS = ("pretrained", "weights", "checkpoint_path", "cache_dir")


@dataclass(frozen=True)
class Architecture:
    """What a network is built of, as `build` takes it.

    classes: None where its outputs are to tell; arguments: all that the user's own code is called
    with.
    """

    name: str
    classes: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, name: str, classes: int | None, arguments: Mapping[str, Any] | None = None
    ) -> "Architecture":
        """Describe what `build` makes of these arguments."""
        if is_user_code(name):
            return cls(name, None, user_code.complete(name, classes, arguments or {}))
        return cls(name, classes, dict(arguments or {}))

    def build(self) -> nn.Module:
        """Build it, with random weights."""
        return build(self.name, self.classes, self.arguments)


def build(name: str, classes: int | None, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """Build a randomly initialised network with `classes` outputs.

    `cifar_resnetD[_wW]` and `cifar_vggD[_wW]` are our networks for small images, of depth D and W
    channels in the first convolution (16 and 64 if not given). `timm:NAME` and `torchvision:NAME`
    are those libraries' networks, without auxiliary heads, made with further `arguments`
    (`in_chans`, `features_only`, …); of timm's, 0 classes leave out the classifier.
    `path/to/file.py:function` and `package.module:function` are the user's own: called with
    `arguments`, and with `num_classes` if they have such a parameter. The caller must have named
    that code: never give here what a folder or a file from elsewhere says.

    Raises UserError for an unknown name, for arguments that do not fit, and where `classes` are
    needed but None.
    """
    library, _, rest = name.rpartition(":")
    given = dict(arguments or {})
    if is_user_code(name):
        return user_code.build(name, user_code.complete(name, classes, given))
    if classes is None and "num_classes" not in given:
        raise UserError(
            f"model {name!r}: how many classes it has is not known; give their number (--classes)"
        )
    classes = given.pop("num_classes", classes)
    if type(classes) is not int or classes < 0:
        raise UserError(
            f"model {name!r}: num_classes = {classes!r} must be a number of classes, a whole "
            "number of at least 0"
        )
    if library:
        _refuse_weights(name, given)
        make = _timm if library == "timm" else _torchvision
        try:
            return make(rest, classes, given)
        except UserError:
            raise
        except Exception as error:  # the library's own of any kind, for what the user gave it
            if not given:
                raise
            raise UserError(
                f"model {name!r} cannot be built with {given}: {' '.join(str(error).split())[:300]}"
            ) from error
    network = build_cifar(name, classes)
    if network is None:
        raise UserError(f"model {name!r} is unknown; names look like {EXAMPLES}")
    if given:
        raise UserError(f"model {name!r} takes no arguments, not {', '.join(given)}")
    return network


def _refuse_weights(name: str, arguments: Mapping[str, Any]) -> None:
    for argument in arguments:
        if argument.startswith(WEIGHTS):
            raise UserError(
                f"model {name!r}: {argument} is not an argument here: weights come from a file"
            )


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


def architecture_of(model: nn.Module, classes: int) -> Architecture:
    """Return what `build` makes a network like `model`, with `classes` outputs, of.

    It is found by building the networks that `model` may be, without memory, and comparing names
    and shapes of their tensors and all that their modules say of themselves. A network that is
    not among them has the name of its class instead: 'package.module:Class'.
    """
    kind = type(model)
    for architecture in _architectures_it_may_have(model, classes):
        with _WithoutMemory():
            candidate = architecture.build()
        if type(candidate) is kind and _looks_like(candidate, model):
            return architecture
    return Architecture(f"{kind.__module__}:{kind.__qualname__}", classes)


def is_user_code(name: str) -> bool:
    """Whether `name` is that of a function of the user's: only they may have it run."""
    library = name.rpartition(":")[0]
    return bool(library) and library not in LIBRARIES


def is_buildable(name: str) -> bool:
    """Whether `build` knows the network of a plan, not only its user."""
    library, _, rest = name.rpartition(":")
    return library in LIBRARIES or (not library and NAME.fullmatch(rest) is not None)


def _architectures_it_may_have(model: nn.Module, classes: int) -> list[Architecture]:
    module = type(model).__module__
    if isinstance(model, CifarResNet | CifarVGG):
        name = cifar_name(model)
        return [] if name is None else [Architecture(name, classes)]
    if module.startswith("timm."):
        return _of_timm(model, classes)
    if module.startswith("torchvision.models."):
        import torchvision
        from torchvision.models import get_model_builder, list_models

        tried: list[dict[str, Any]] = [{}]
        family = torchvision.models
        if module.startswith("torchvision.models.segmentation."):
            family, tried = torchvision.models.segmentation, [{}, {"aux_loss": True}]
            heads = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
            auxiliary = getattr(model, "aux_classifier", None)
            inside = set() if auxiliary is None else set(auxiliary.modules())
            classes = [head for head in heads if head not in inside][-1].out_channels
        if type(model).__name__ in ("GoogLeNet", "Inception3"):
            asked = ("transform_input", "aux_logits")
            tried = [{name: True for name in asked if getattr(model, name, False)}]
        alike = [n for n in list_models(family) if get_model_builder(n).__module__ == module]
        alike.sort(key=lambda name: not _has_published_size(name, model))
        return [Architecture(f"torchvision:{n}", classes, given) for n in alike for given in tried]
    return []


def _of_timm(model: nn.Module, classes: int) -> list[Architecture]:
    import timm

    card = getattr(model, "pretrained_cfg", None) or {}
    architecture = card.get("architecture", "")
    if not timm.is_model(architecture):
        return []
    arguments: dict[str, Any] = {}
    stem = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if stem is not None and stem.in_channels != RGB:
        arguments["in_chans"] = stem.in_channels
    if hasattr(model, "feature_info") and not hasattr(model, "num_classes"):
        arguments["features_only"] = True
    tried = [arguments]
    chosen = _chosen_features(model)
    if chosen is not None:
        tried.append(arguments | {"out_indices": chosen})
    return [Architecture(f"timm:{architecture}", classes, given) for given in tried]


def _chosen_features(model: nn.Module) -> list[int] | None:
    """Return the stages whose features a timm network gives; None of a classifier."""
    chosen = getattr(getattr(model, "feature_info", None), "out_indices", None)
    return None if chosen is None else list(chosen)


def _has_published_size(name: str, model: nn.Module) -> bool:
    """Whether torchvision's weights of `name` have as many numbers as `model` with 1000 classes.

    It takes no network to know, and a wrong answer costs the time to build one.
    """
    from torchvision.models import get_model_weights

    sizes = {entry.meta.get("num_params") for entry in get_model_weights(name)}
    heads = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    own = sum(parameter.numel() for parameter in model.parameters())
    if heads:
        weight = heads[-1].weight
        own += (1000 - len(weight)) * (weight[0].numel() + (heads[-1].bias is not None))
    return own in sizes


def _looks_like(one: nn.Module, other: nn.Module) -> bool:
    # None stands for what is no tensor: get_extra_state.
    shapes = [
        {name: getattr(x, "shape", None) for name, x in network.state_dict().items()}
        for network in (one, other)
    ]
    if shapes[0] != shapes[1] or repr(one) != repr(other):
        return False
    # What neither tensors nor repr show, such as transform_input of torchvision's GoogLeNet.
    return all(_are_alike(a, b) for a, b in zip(one.modules(), other.modules(), strict=True))


def _are_alike(one: nn.Module, other: nn.Module) -> bool:
    if _conduct(one) != _conduct(other):
        return False
    facts = _facts(one), _facts(other)
    for name in facts[0].keys() | facts[1].keys():
        if name in facts[0] and name in facts[1]:
            if facts[0][name] != facts[1][name]:
                return False
        elif name not in vars(one) or name not in vars(other):
            return False  # where it is in both, but data in one alone, it is a cache of tensors
    return True


def _conduct(module: nn.Module) -> tuple[Any, ...]:
    """Return what a call of a module runs beside its class's forward, and which stages it gives.

    timm's hooks, by which some of its networks give features, are in the network that is built too.
    """
    return number_of_hooks(module), "forward" in vars(module), _chosen_features(module)


def _facts(module: nn.Module) -> dict[str, Any]:
    """Return the values that tell a module from others of its class, by their names."""
    return {
        name: value
        for name, value in vars(module).items()
        if _is_data(value) and name[0] != "_" and name not in NO_FACTS
    }


def _is_data(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_data(key) and _is_data(part) for key, part in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_data, value))
    return value is None or isinstance(value, bool | int | float | str)


def _timm(name: str, classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise UserError(f"model 'timm:{name}' is unknown{_nearest(name, timm.list_models())}")
    architecture, _, tag = name.partition(".")
    known = timm.models.get_arch_pretrained_cfgs(architecture)
    tags = [tagged.partition(".")[2] for tagged in known]
    if tag and tag not in tags:
        raise UserError(
            f"model 'timm:{name}' is unknown: {architecture} has the weights "
            f"{', '.join(tags) or 'none'}"
        )
    if arguments.get("features_only"):  # which have no classifier
        return timm.create_model(name, **arguments)
    return timm.create_model(name, num_classes=classes, **arguments)


def _torchvision(name: str, classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    import torchvision
    from torchvision.models import get_model, list_models

    classifiers = list_models(module=torchvision.models)
    segmentation = list_models(module=torchvision.models.segmentation)
    if name not in classifiers + segmentation:
        known = classifiers + segmentation
        raise UserError(f"model 'torchvision:{name}' is unknown{_nearest(name, known)}")
    settings: dict[str, Any] = {}
    if name in INCEPTIONS:
        # The heads would return logits of their own in training. The initial weights are those
        # that torchvision announces; the old ones take seconds to draw.
        settings = {"aux_logits": False, "init_weights": False}
    if name in segmentation:
        settings = {"weights_backbone": None}
    return get_model(name, weights=None, num_classes=classes, **(settings | dict(arguments)))


def _nearest(name: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
