"""Exchanging modules of a network."""

from torch import nn


def become(module: nn.Module, other: nn.Module) -> None:
    """Turn `module` into `other`, in place, wherever a network holds it.

    Setting an attribute of the parent would leave the old module where it has a second name, or
    stands in a plain list. `other`, whose parts `module` takes over, must not be used afterwards.
    """
    module.__class__ = other.__class__
    module.__dict__.clear()
    module.__dict__.update(other.__dict__)
