"""Hooks on a network that are removed again, whatever happens."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def registered(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Keep hooks for the length of a `with` block, and remove them after it.

    handles: what PyTorch's `register_…_hook` return. A generator registers them here, so that a
    module that cannot be found leaves no hook on those before it.
    """
    held: list[RemovableHandle] = []
    try:
        held.extend(handles)
        yield
    finally:
        for handle in held:
            handle.remove()


@contextmanager
def leaves(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Let gradients reach all `modules` in a `with` block, also behind code under no_grad.

    Where the input of a module needs no gradient, it becomes a leaf that does. The list that is
    given holds these leaves: differentiate by them, too, and clear it after each pass.
    """
    found: list[Tensor] = []

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not torch.is_grad_enabled() or inputs[0].requires_grad:
            return None
        found.append(inputs[0].detach().requires_grad_())
        return (found[-1], *inputs[1:])

    with registered(module.register_forward_pre_hook(hook) for module in modules):
        yield found
