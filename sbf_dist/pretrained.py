"""Weights that timm and torchvision publish, from their hubs or this machine's cache of them."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from sbf_dist.errors import UserError

PUBLISHED = ("timm", "torchvision")  # libraries that publish weights
_LOGS = ("huggingface_hub", "timm")  # say of each attempt that it has failed, line by line


def build_pretrained(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build 'timm:NAME' or 'torchvision:NAME' with its published weights and classes.

    The network and its `arguments` must be known to be right (models.build).

    UserError: there are none for it, or their hub cannot be reached and the cache has none.
    """
    library, _, rest = name.partition(":")
    make = _timm if library == "timm" else _torchvision
    with _quiet():
        return make(name, rest, arguments)


def normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return mean and deviation of the input that published weights expect, where they say so."""
    library, _, rest = name.partition(":")
    if library == "timm":
        import timm

        card = timm.get_pretrained_cfg(rest)
        return (tuple(card.mean), tuple(card.std)) if card is not None else None
    from torchvision.models import get_model_weights

    transforms: Any = get_model_weights(rest).DEFAULT.transforms()
    if not hasattr(transforms, "mean"):  # some networks normalise by themselves
        return None
    return tuple(transforms.mean), tuple(transforms.std)


def _timm(name: str, rest: str, arguments: Mapping[str, Any]) -> nn.Module:
    import timm

    card = timm.get_pretrained_cfg(rest)
    if card is None or not card.has_weights:
        raise UserError(f"model {name!r}: timm publishes no weights for it{_remedy()}")
    return _asked(name, lambda: timm.create_model(rest, pretrained=True, **arguments))


def _torchvision(name: str, rest: str, arguments: Mapping[str, Any]) -> nn.Module:
    from torchvision.models import get_model, get_model_weights

    if not len(get_model_weights(rest)):
        raise UserError(f"model {name!r}: torchvision publishes no weights for it{_remedy()}")
    return _asked(name, lambda: get_model(rest, weights="DEFAULT", **arguments))


def _asked(name: str, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except Exception as error:  # of huggingface_hub, httpx, urllib, and of damaged files
        what = f"{type(error).__name__}: {' '.join(str(error).split()).partition('. ')[0][:200]}"
        raise UserError(
            f"model {name!r}: its published weights cannot be fetched ({what}){_remedy()}"
        ) from error


def _remedy() -> str:
    return "; give start_from: FILE with weights from elsewhere, or pretrained: false"


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _LOGS]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
