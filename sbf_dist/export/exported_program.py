"""Export as torch.export's program: PyTorch alone loads it, without sbf_dist and its extension."""

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sbf_dist.errors import UserError
from sbf_dist.export.portable import exporters_reason, free_batch, portable, program_of
from sbf_dist.export.saved import Card
from sbf_dist.export.student_files import CARD
from sbf_dist.export.tracing import example_inputs
from sbf_dist.files import write_bytes
from sbf_dist.surgery import unwrapped


def export_program(model: nn.Module, path: Path, card: Card, *, half: bool = False) -> None:
    """Write `model`, folded and in eval mode, as a program of any batch size.

    Input: float32 (N, *card.input_shape), or float16 with `half`, in which it then computes;
    further inputs as its plan has them. Output: the network's, or a tuple of tensors where it gives
    several. The card is the extra file card.json (torch.export.load's `extra_files`). Raises
    UserError if the network cannot be exported.
    """
    examples = example_inputs(2, card)
    network, _ = portable(unwrapped(model), examples)
    if half:
        network = network.half()
        examples = tuple(one.half() if one.is_floating_point() else one for one in examples)
    try:
        program = program_of(network, examples, free_batch(network, examples))
    except Exception as error:  # torch.export raises whatever the traced code raises
        raise UserError(
            f"model {card.model!r} cannot be exported by torch.export: {exporters_reason(error)}"
        ) from error
    for node in program.graph.nodes:  # places in somebody's files
        node.meta.pop("stack_trace", None)
    archive = io.BytesIO()  # of a file, its name would stand in the archive
    torch.export.save(program, archive, extra_files={CARD: card.model_dump_json(indent=2)})
    write_bytes(path, archive.getvalue())


def load_program(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return the module of a program, and its card. UserError, naming the file, if damaged."""
    extra = {CARD: ""}
    try:
        program = torch.export.load(path, extra_files=extra)
        return program.module(), json.loads(extra[CARD])
    except Exception as error:  # of zip, of JSON, of PyTorch
        raise UserError(f"program {path} cannot be read: {exporters_reason(error)}") from error
