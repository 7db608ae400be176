"""Hooks on a network that are removed again, whatever happens."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

H = TypeVar("H", bound=Callable[..., Any])
_SAME_VALUES: list[Callable[..., Any]] = []  # others' hooks may have no hash


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


def on_input(module: nn.Module, look: Callable[..., Any]) -> RemovableHandle:
    """Register a forward pre-hook `look(module, input)`, and return its handle.

    The input is what `module` is given first, by keyword as well: `conv(input=images)`. What `look`
    returns takes its place, unless that is None.
    """
    return module.register_forward_pre_hook(_OnInput(look), with_kwargs=True)


def on_output(module: nn.Module, look: Callable[..., Any]) -> RemovableHandle:
    """Register a forward hook `look(module, input, output)`, and return its handle.

    The input as of `on_input`. What `look` returns takes the output's place, unless that is None.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return look(module, first_given(args, kwargs), output)

    return module.register_forward_hook(hook, with_kwargs=True)


@dataclass(frozen=True)
class _OnInput:
    look: Callable[..., Any]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        changed = self.look(module, first_given(args, kwargs))
        if changed is None:
            return None
        if args:
            return (changed, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): changed}


def first_given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the first argument of a call, by keyword as well; None without any."""
    return next(chain(args, kwargs.values()), None)


@contextmanager
def leaves(model: nn.Module, names: Iterable[str]) -> Iterator[list[Tensor]]:
    """Let gradients reach the modules `names` of `model` in a `with` block, also behind no_grad.

    Where the input of a module needs no gradient, it becomes a leaf that does. The list that is
    given holds these leaves: differentiate by them, too, and clear it after each pass. Parameters
    need none meanwhile: they would hide that an input does not depend on the images.
    """
    modules = [model.get_submodule(name) for name in names]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found: list[Tensor] = []

    def hook(_: nn.Module, given: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled() or given.requires_grad:
            return None
        found.append(given.detach().requires_grad_())
        return found[-1]

    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        with registered(on_input(module, hook) for module in modules):
            yield found
    finally:
        for parameter in learning:
            parameter.requires_grad_()


def same_values(hook: H) -> H:
    """Mark a forward hook with which modules give what they give without it.

    Or what `on_input` registers, which is no hook itself.
    """
    _SAME_VALUES.append(hook)
    return hook


def number_of_hooks(module: nn.Module) -> tuple[int, int]:
    """Return how many forward hooks and pre-hooks a module has that may change what it gives."""
    counts = [
        sum(all(_look(hook) is not known for known in _SAME_VALUES) for hook in hooks.values())
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
    ]
    return counts[0], counts[1]


def _look(hook: Callable[..., Any]) -> Callable[..., Any]:
    return hook.look if isinstance(hook, _OnInput) else hook


def is_altered(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class says: it has hooks, or its own forward."""
    return any(number_of_hooks(module)) or "forward" in vars(module)


def take_hooks(module: nn.Module, other: nn.Module) -> None:
    """Give `module`, in place, the forward hooks of `other`, whose place it takes."""
    for name in (
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
    ):
        getattr(module, name).update(getattr(other, name))
