"""The head of a network: the layer that gives its classes."""

from torch import nn

LIBRARIES = ("timm.", "torchvision.", "sbf_dist.")


def head_of(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that are the head; several where there are several heads.

    timm's networks name theirs. Of others it is the last linear layer, or the last convolution
    where there is none. Empty for a network that has neither.
    """
    named = getattr(model, "get_classifier", None)
    if callable(named):
        found = named()
        heads = set(found if isinstance(found, tuple | list) else [found])
        names = tuple(name for name, module in model.named_modules() if module in heads)
        if any(True for head in heads for _ in head.parameters()):
            return names
    for kind in (nn.Linear, nn.Conv2d):
        layers = [name for name, module in model.named_modules() if isinstance(module, kind)]
        if layers:
            return (layers[-1],)
    return ()


def is_known(model: nn.Module) -> bool:
    """Whether the head of a network is certain: it is a library's, not the user's own."""
    return type(model).__module__.startswith(LIBRARIES)


def is_within(name: str, modules: tuple[str, ...]) -> bool:
    """Whether a parameter of that name belongs to one of `modules`."""
    return any(name.startswith(f"{module}.") for module in modules)
