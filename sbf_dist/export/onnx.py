"""Export as ONNX: standard operators only, checked, with what a user of the file must know."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sbf_dist.compression.remembered import plan_of
from sbf_dist.errors import UserError
from sbf_dist.export.fold import fold_batchnorm
from sbf_dist.export.saved import Card
from sbf_dist.export.standard_operators import with_standard_operators
from sbf_dist.files import write_bytes
from sbf_dist.surgery import deep_copy

OPSET = 18  # ONNX 1.13 (2022), which the runtimes in use read


def export_onnx(
    model: nn.Module,
    path: str | Path,
    card: Card | None = None,
    *,
    input_shape: tuple[int, int, int] | None = None,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dynamic_batch: bool = True,
) -> None:
    """Write `model`, folded and in eval mode, as an ONNX file of standard operators.

    model: a student as `compress`, `shrink`, `convert` or `load` returned it, or any network with a
        card or an `input_shape`. classes, mean, std: what the file's metadata says of a student's
        classes and normalisation, see `Card.of`.

    Input "images": float32 (N, *input_shape), (channels, height, width); N is free, or 1 if not
    `dynamic_batch`. Output "logits": float32 (N, classes). A card gives the shape, and the mean and
    std that the images are to be normalised with; it stands in the file's metadata under the keys
    sbf.FIELD, as JSON. The file is checked, and replaced in one step. Raises UserError if the
    network cannot be exported, if both `card` and `input_shape` are given, and if neither is given
    for a network that is no student.
    """
    import onnx

    if card is not None and input_shape is not None:
        raise UserError("export_onnx: give either a card or input_shape=(channels, height, width)")
    if card is None and input_shape is None:
        card = Card.of(plan_of(model), classes=classes, mean=mean, std=std)
    name, shape = type(model).__name__, input_shape
    if card is not None:
        name, shape = card.model, card.input_shape
    assert shape is not None
    portable = with_standard_operators(fold_batchnorm(model)).cpu().float()
    example = torch.zeros(2 if dynamic_batch else 1, *shape)
    try:
        program = torch.onnx.export(
            portable,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},) if dynamic_batch else None,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UserError(f"model {name!r} cannot be exported as ONNX: {_reason(error)}") from error
    assert program is not None
    proto = program.model_proto
    foreign = {entry.domain for entry in proto.opset_import} - {""}
    if foreign or proto.functions:
        raise UserError(f"model {name!r} needs operators outside standard ONNX: {sorted(foreign)}")
    _remove_traces(proto)
    del proto.metadata_props[:]
    if card is not None:
        onnx.helper.set_model_props(proto, dict(_metadata(card)))
    onnx.checker.check_model(proto, full_check=True)
    write_bytes(Path(path), proto.SerializeToString())


def _reason(error: Exception) -> str:
    """Return what is behind an error of the exporter, whose own text is advice in many lines."""
    behind: BaseException = error
    while behind.__cause__ is not None:
        behind = behind.__cause__
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(behind)).split("\n")
    first = next((line.strip() for line in lines if line.strip()), "no reason given")
    return f"{type(behind).__name__}: {first[:300]}"


def _metadata(card: Card) -> Iterator[tuple[str, str]]:
    for field, value in card.model_dump(mode="json").items():
        yield f"sbf.{field}", json.dumps(value, ensure_ascii=False)


def _remove_traces(proto: Any) -> None:
    """Remove stack traces and source paths, which the exporter writes beside every node."""
    graph = proto.graph
    for item in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        del item.metadata_props[:]
        item.doc_string = ""
    for tensor in graph.initializer:
        del tensor.metadata_props[:]
        tensor.doc_string = ""


def verify_onnx(path: Path, model: nn.Module, images: Tensor) -> float:
    """Return the largest absolute difference between the logits of the file and of `model`.

    images: float32 (N, C, H, W), normalised; both run on the CPU, `model` in eval mode.
    Raises UserError if ONNX Runtime cannot read the file.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise UserError(f"ONNX file {path} cannot be read: {error}") from error
    batch = session.get_inputs()[0].shape[0]
    reference = deep_copy(model).cpu().float().eval()
    largest = 0.0
    for part in images.cpu().split(batch if isinstance(batch, int) else 64):
        (found,) = session.run(["logits"], {"images": part.numpy()})
        with torch.inference_mode():
            expected = reference(part)
        largest = max(largest, (torch.from_numpy(found) - expected).abs().max().item())
    return largest
