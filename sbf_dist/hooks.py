"""Hooks on a network that are removed again, whatever happens."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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
