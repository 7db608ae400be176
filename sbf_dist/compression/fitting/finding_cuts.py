"""Finds the points of a forward pass from which a network can go on, see cuts.py.

A forward pass is watched once, without a graph of the network's code: which tensors its operators
read and make, and which modules have finished. Where a module finishes, what has been made and will
still be read is the network's state. If all of it are outputs of modules, the pass can go on from
there. Each point is tried out before it is believed: with blanks for all that is left out, the
network gives what it gave, and for another number of images.

A network that takes values out of its tensors, as in `if x.mean() > 0`, has no such points: what
its code does could depend on what is left out.
"""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sbf_dist.compression.fitting.cuts import Blank, Cut, Keeping, Resuming, State
from sbf_dist.compression.named_outputs import named_tensors
from sbf_dist.hooks import registered

logger = logging.getLogger(__name__)

SPAN = 8  # layers without a point of one tensor after which a point of several tensors will do
TOLERANCE = 1e-5  # of the outputs, for kernels that do not repeat themselves exactly
# Outputs or shapes that follow from values, and methods that give values without an operator.
DEPEND_ON_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
TAKEN_OUT = {"tolist", "numpy", "__array__", "__dlpack__"}


@torch.no_grad()
def find_cuts(model: nn.Module, images: Tensor, layers: Sequence[str]) -> dict[str, Cut]:
    """Find, for each of `layers` that has one, the last point before it to go on from.

    `model` is in eval mode; three of `images` are used. Points where one tensor is all are taken,
    and others only where there is none for SPAN layers.
    """
    observed = _observe(model, images[:2], layers)
    if observed is None:
        return {}
    layers = sorted(layers, key=lambda name: observed.before.get(name, -1))
    chosen: list[Cut] = []
    last, since = -1, 0
    for name in layers:
        step = observed.before.get(name, -1)
        # The last of all the points between the layer before and this one.
        points = list(filter(None, map(observed.cut, range(step, last, -1))))
        single = [cut for cut in points if len(cut.kept) == 1]
        if single or (points and since >= SPAN):
            chosen.append((single or points)[0])
            since = 0
        elif step > last:
            since += 1
        last = max(last, step)
    proven = _proven(model, images[:3], chosen)
    cuts: dict[str, Cut] = {}
    for name in layers:
        before = [cut for cut in proven if cut.position <= observed.before.get(name, -1)]
        if before:
            cuts[name] = before[-1]
    return cuts


def _proven(model: nn.Module, images: Tensor, cuts: list[Cut]) -> list[Cut]:
    """Return those of `cuts`, in forward order, from which the network gives what it gives."""
    expected = _tensors(model(images))
    others = _others(images)
    proven: list[Cut] = []
    last: tuple[Cut, State] | None = None
    for proposed in cuts:
        state = _state_at(model, images, last, proposed)
        for solid in (False, True):
            cut = dataclasses.replace(proposed, solid=solid)
            try:
                # What modules keep as attributes is then not of `images`, as in any later pass.
                model(others)
                with Resuming(model, cut, _copied(state), len(images)) as blank:
                    found = _tensors(model(blank))
            except Exception as error:  # whatever the network's own code makes of blanks
                logger.debug("%s cannot go on from %s: %s", type(model).__name__, cut.last, error)
                continue
            if expected and _are_alike(found, expected):
                proven.append(cut)
                last = cut, state
            break
    return proven


def _others(images: Tensor) -> Tensor:
    """Return images that differ from `images` (N, C, H, W), or (N, L), each from its own."""
    turned = images.flip(0, -1) if images.ndim == 4 else images.flip(0)
    return (0.5 * turned).to(images.dtype)  # what were indices are indices still


def _copied(state: State) -> State:
    return {name: output.clone() for name, output in state.items()}


class _Reached(Exception):  # noqa: N818  (it is control flow, not an error)
    pass


def _state_at(model: nn.Module, images: Tensor, last: tuple[Cut, State] | None, cut: Cut) -> State:
    def stop() -> None:
        raise _Reached

    keeping = Keeping(model, cut)
    with registered(keeping.hooks(stop)):
        try:
            if last is None:
                model(images)
            else:
                with Resuming(model, last[0], _copied(last[1]), len(images)) as blank:
                    model(blank)
        except _Reached:
            pass
    assert keeping.state is not None
    return keeping.state


def _tensors(output: object) -> list[Tensor]:
    return list(named_tensors(output).values())


def _are_alike(found: list[Tensor], expected: list[Tensor]) -> bool:
    def alike(one: Tensor, other: Tensor) -> bool:
        if one.shape != other.shape or torch.equal(one, other):
            return one.shape == other.shape
        if not other.isfinite().all():
            return False
        return torch.allclose(one, other, TOLERANCE, TOLERANCE * float(other.abs().max()))

    return len(found) == len(expected) and all(map(alike, found, expected))


# --- watching a pass -----------------------------------------------------------------------------


@dataclass
class _Life:
    """From when to when a tensor's memory is in use: made in one step, last read in another.

    Steps are counted by the modules that have finished: what a module does itself, before it
    finishes as the k-th, is done in step k − 1.
    """

    made: int
    read: int = -1


@dataclass
class _Watched:
    """What was seen of a pass.

    images: what was given; finished: the outermost modules that had finished at each step; before:
    the step in which a layer begins; outputs: of modules, with Blank for tensors, and the lives of
    those; lives: of all memory; usable: modules that can be left out; taken: what took values out
    of tensors, if anything did.
    """

    images: Blank
    finished: list[tuple[str, ...]] = field(default_factory=list)
    before: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, tuple[Any, list[_Life | None]]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    lives: list[_Life] = field(default_factory=list)
    usable: set[str] = field(default_factory=set)
    taken: str | None = None

    def cut(self, step: int) -> Cut | None:
        """Return the point after the module that was the `step`-th to finish, if it is one."""
        done = self.finished[step]
        if any(self.calls[name] > 1 or name not in self.usable for name in done):
            return None
        kept: dict[int, str] = {}
        for name in done:
            output, lives = self.outputs[name]
            if isinstance(output, Blank) and output.batched and lives[0] is not None:
                kept[id(lives[0])] = name  # the last one of the same memory
        live = [life for life in self.lives if life.made < step <= life.read]
        if not live or any(id(life) not in kept for life in live):
            return None
        names = {kept[id(life)] for life in live}
        return Cut(
            position=step,
            last=done[-1],
            kept=tuple(name for name in done if name in names),
            blanks={name: self.outputs[name][0] for name in done if name not in names},
            images=self.images,
        )


class _Memory(TorchDispatchMode):
    """Notes, while active, when each tensor's memory comes into use and is last read."""

    def __init__(self, watched: _Watched) -> None:
        super().__init__()
        self.watched = watched
        self.now: dict[int, _Life] = {}  # by address; freed memory is overwritten by its next use

    @property
    def step(self) -> int:
        """The number of the module that finished last."""
        return len(self.watched.finished) - 1

    def begin(self, tensor: Tensor) -> None:
        """Note that a tensor's memory is new."""
        address = _address(tensor)
        if address:
            life = _Life(self.step)
            self.now[address] = life
            self.watched.lives.append(life)

    def life(self, tensor: Tensor) -> _Life | None:
        """Return the life of a tensor's memory; None where it was there before the pass."""
        return self.now.get(_address(tensor))

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        by_mask = func is torch.ops.aten.index.Tensor and any(
            leaf.dtype in (torch.bool, torch.uint8) for leaf in given[1:]
        )
        if by_mask or DEPEND_ON_VALUES & set(func.tags):
            self.watched.taken = str(func)
        result = func(*args, **kwargs)
        read = {_address(tensor) for tensor in given}
        # torch.tensor(…) wraps memory that no operator has made.
        fresh = func is torch.ops.aten.lift_fresh.default
        for address in read:
            if address in self.now:
                self.now[address].read = self.step
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (fresh or _address(leaf) not in read):
                self.begin(leaf)
        return result


class _Values(TorchFunctionMode):
    """Notes, while active, that values are taken out of tensors in other ways than by operators."""

    def __init__(self, watched: _Watched) -> None:
        super().__init__()
        self.watched = watched

    def __torch_function__(
        self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if getattr(func, "__name__", "") in TAKEN_OUT:
            self.watched.taken = func.__name__
        return func(*args, **(kwargs or {}))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _observe(model: nn.Module, images: Tensor, layers: Sequence[str]) -> _Watched | None:
    """Watch a pass of two images; None where what it does could depend on their values."""
    names = {module: name for name, module in reversed(list(model.named_modules()))}
    watched = _Watched(_blank_of(images, len(images)))
    memory = _Memory(watched)
    wanted = set(layers)
    inner = [module for module in model.modules() if module is not model]
    # What a hook returns, or does, would come a second time.
    hooked = {m for m in inner if m._forward_hooks or m._forward_pre_hooks}

    def blank(leaf: object) -> object:
        return _blank_of(leaf, len(images)) if isinstance(leaf, Tensor) else leaf

    def start(module: nn.Module, _: object) -> None:
        name = names[module]
        if name in wanted and watched.finished:
            watched.before.setdefault(name, memory.step)

    def finish(module: nn.Module, _: object, output: object) -> None:
        name = names[module]
        watched.calls[name] = watched.calls.get(name, 0) + 1
        inside = f"{name}."
        before = watched.finished[-1] if watched.finished else ()
        kept = (other for other in before if other != name and not other.startswith(inside))
        leaves = tree_leaves(output)
        if module not in hooked and all(
            leaf is None or isinstance(leaf, Tensor | int | float | str) for leaf in leaves
        ):
            watched.usable.add(name)
        lives = [memory.life(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        watched.outputs[name] = tree_map(blank, output), lives
        watched.finished.append((*kept, name))

    handles = (
        handle
        for module in inner
        for handle in (
            module.register_forward_pre_hook(start),
            module.register_forward_hook(finish),
        )
    )
    with registered(handles), _Values(watched), memory:
        memory.begin(images)
        output = model(images)
    if watched.taken is not None:
        logger.debug("%s takes values out of tensors: %s", type(model).__name__, watched.taken)
        return None
    for tensor in _tensors(output):  # which are read in the end
        life = memory.life(tensor)
        if life is not None:
            life.read = len(watched.finished)
    return watched


def _blank_of(leaf: Tensor, images: int) -> Blank:
    batched = leaf.ndim > 0 and len(leaf) == images
    shape = tuple(leaf.shape[1:] if batched else leaf.shape)
    return Blank(shape, leaf.dtype, leaf.device, batched)
