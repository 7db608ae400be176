"""A network as exporters need it: standard operators, outputs as plain tensors, example inputs."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sbf_dist.compression.named_outputs import named_tensors
from sbf_dist.export.fold import fold_batchnorm
from sbf_dist.export.standard_operators import with_standard_operators

logger = logging.getLogger(__name__)

_MAX_REASON = 300


def portable(model: nn.Module, examples: tuple[Tensor, ...]) -> tuple[nn.Module, list[str] | None]:
    """Return `model`, which is in eval mode, folded and in standard operators, in fp32 on the CPU.

    And the names of its outputs, where they are more than a tensor; it gives them as a tuple then.
    """
    network = with_standard_operators(fold_batchnorm(model, examples), examples)
    network = network.cpu().float()
    with torch.no_grad():
        outputs = network(*examples)
    if isinstance(outputs, Tensor):
        return network, None
    return Flat(network).eval(), list(named_tensors(outputs))


class Flat(nn.Module):
    """Gives all tensors of a network's outputs as one tuple, which exporters understand."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(named_tensors(self.network(*inputs)).values())


def program_of(
    network: nn.Module, examples: tuple[Tensor, ...], shapes: tuple | None = None
) -> torch.export.ExportedProgram:
    """Return what torch.export makes of `network`, of `portable`.

    shapes: what varies, `free_batch` or nothing. Raises whatever the traced code raises, and where
    it fixes what must vary.
    """
    try:
        return torch.export.export(network, examples, dynamic_shapes=shapes)
    except Exception as error:  # whatever the traced code raises
        reason = error
    # Python's own len(x) is a number to plain tracing; Dynamo follows it.
    try:
        with _without_guards_log():
            return torch.export.export(network, examples, dynamic_shapes=shapes, strict=True)
    except Exception as error:
        logger.debug("%s, traced by Dynamo: %s", type(network).__name__, error)
        raise reason from None


@contextmanager
def _without_guards_log() -> Iterator[None]:
    """Keep quiet what Dynamo logs, with a stack, before it raises it."""

    def drop(_: logging.LogRecord) -> bool:
        return False

    log = logging.getLogger("torch._guards")
    log.addFilter(drop)
    try:
        yield
    finally:
        log.removeFilter(drop)


def free_batch(network: nn.Module, examples: tuple[Tensor, ...]) -> tuple:
    """Return dynamic shapes for torch.export: the first side of all inputs is any number."""
    free = torch.export.Dim("batch")
    shapes = tuple({0: free} for _ in examples)
    return (shapes,) if isinstance(network, Flat) else shapes


def exporters_reason(error: Exception) -> str:
    """Return what is behind an error of an exporter, whose own text is advice in many lines."""
    behind: BaseException = error
    while behind.__cause__ is not None:
        behind = behind.__cause__
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(behind)).split("\n")
    if lines[0].startswith("Constraints violated (batch)"):
        what = next((line.strip(" -") for line in lines[1:] if line.strip()), lines[0])
        sentence = what.partition(". ")[0]
        return f"its code fixes the number of images in a batch: {sentence[:_MAX_REASON]}"
    first = next((line.strip() for line in lines if line.strip()), "no reason given")
    return f"{type(behind).__name__}: {first[:_MAX_REASON]}"
