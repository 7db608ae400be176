"""Export as ONNX: standard operators only, checked, with what a user of the file must know."""

import ast
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sbf_dist.compression.named_outputs import named_tensors
from sbf_dist.compression.remembered import plan_of
from sbf_dist.errors import UserError
from sbf_dist.export.portable import exporters_reason, free_batch, portable, program_of
from sbf_dist.export.saved import Card
from sbf_dist.export.tracing import example_inputs
from sbf_dist.files import write_bytes
from sbf_dist.surgery import deep_copy, unwrapped

_SCOPES = "pkg.torch.onnx.name_scopes"
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
    """Export `model`, folded and in eval mode, as an ONNX file of standard operators.

    model: a student returned by `compress`, `shrink`, `convert` or `load`, or any network with a
        card or an `input_shape`. classes, mean, std: a student's class names and normalisation,
        stored in the file's metadata; see `Card.of`.

    Input "images": float32 (N, *input_shape), (channels, height, width); N is free, or 1 if not
    `dynamic_batch`. Further inputs, of a student's plan, are "input_1", "input_2", … Output
    "logits": float32 (N, classes), or "output" where the card names no classes; several outputs
    are named by `named_outputs.named_tensors`. A card gives the input shape, mean and std; it
    is stored in the file's metadata under the keys sbf.FIELD, as JSON. The file is checked, and
    replaced in one step. Raises UserError if the network cannot be exported, if both `card` and
    `input_shape` are given, or if neither is given for a network that is not a student.
    """
    import onnx

    model = unwrapped(model)
    if card is not None and input_shape is not None:
        raise UserError("export_onnx: give either a card or input_shape=(channels, height, width)")
    if card is None and input_shape is None:
        card = Card.of(plan_of(model), classes=classes, mean=mean, std=std)
    name = type(model).__name__ if card is None else card.model
    examples = example_inputs(2 if dynamic_batch else 1, card, input_shape)
    network, several = portable(model, examples)
    names = several or ["output" if card is not None and not card.classes else "logits"]
    shapes = free_batch(network, examples) if dynamic_batch else None
    try:
        # Of the network itself, the exporter would fix a batch that its code cannot leave free.
        program = torch.onnx.export(
            program_of(network, examples, shapes),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images", *(f"input_{i}" for i in range(1, len(examples)))],
            output_names=names,
            dynamic_shapes=shapes,
            verbose=False,
        )
    except Exception as error:  # both raise whatever the traced code raises
        reason = exporters_reason(error)
        raise UserError(f"model {name!r} cannot be exported as ONNX: {reason}") from error
    assert program is not None
    proto = program.model_proto
    foreign = {entry.domain for entry in proto.opset_import} - {""}
    if foreign or proto.functions:
        raise UserError(f"model {name!r} needs operators outside standard ONNX: {sorted(foreign)}")
    _name_by_layer(proto)
    _remove_traces(proto)
    del proto.metadata_props[:]
    if card is not None:
        onnx.helper.set_model_props(proto, dict(_metadata(card)))
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        # Convolutions in bfloat16, for one, which a network's own autocast asks for.
        reason = exporters_reason(error)
        raise UserError(f"model {name!r} cannot be exported as ONNX: {reason}") from error
    write_bytes(Path(path), proto.SerializeToString())


def _metadata(card: Card) -> Iterator[tuple[str, str]]:
    for field, value in card.model_dump(mode="json").items():
        yield f"sbf.{field}", json.dumps(value, ensure_ascii=False)


def halve_onnx(source: Path, target: Path) -> None:
    """Write the file `source`, of export_onnx, in float16; inputs and outputs stay float32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    proto = convert_float_to_float16(onnx.load(source), keep_io_types=True)
    OnnxModel(proto).topological_sort()  # the casts of inputs stand at the end
    known = {entry.key: entry.value for entry in proto.metadata_props}
    onnx.helper.set_model_props(proto, known | {"sbf.precision": json.dumps("fp16")})
    onnx.checker.check_model(proto, full_check=True)
    write_bytes(target, proto.SerializeToString())


def _name_by_layer(proto: Any) -> None:
    """Call each node LAYER/OPERATOR, by what the exporter notes beside it."""
    for number, node in enumerate(proto.graph.node):
        noted = {entry.key: entry.value for entry in node.metadata_props}
        # The names of all modules around it, and last its own.
        scopes = ast.literal_eval(noted.get(_SCOPES, "[]"))
        layer = scopes[-2] if len(scopes) > 1 else ""
        node.name = f"{layer}/{node.op_type}_{number}"


def _remove_traces(proto: Any) -> None:
    """Remove stack traces and source paths, which the exporter writes beside every node."""
    graph = proto.graph
    for item in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        del item.metadata_props[:]
        item.doc_string = ""
    for tensor in graph.initializer:
        del tensor.metadata_props[:]
        tensor.doc_string = ""


def verify_onnx(path: Path, model: nn.Module, images: Tensor | tuple[Tensor, ...]) -> float:
    """Return the largest absolute difference between the outputs of the file and of `model`.

    NaN where an output of one of them is not finite.
    images: float32 (N, C, H, W), normalised, or a tuple of all inputs; both run on the CPU, `model`
    in eval mode.
    Raises UserError if ONNX Runtime cannot read the file.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise UserError(f"ONNX file {path} cannot be read: {error}") from error
    inputs = [one.name for one in session.get_inputs()]
    batch = session.get_inputs()[0].shape[0]
    size = batch if isinstance(batch, int) else 64
    reference = deep_copy(unwrapped(model)).cpu().float()
    reference.eval()
    largest = 0.0
    given = images if isinstance(images, tuple) else (images,)
    for parts in zip(*(tensor.cpu().split(size) for tensor in given), strict=True):
        feed = {name: part.numpy() for name, part in zip(inputs, parts, strict=True)}
        found = session.run(None, feed)
        with torch.inference_mode():
            expected = named_tensors(reference(*parts)).values()
        for one, other in zip(found, expected, strict=True):
            if other.numel():
                difference = (torch.from_numpy(one) - other).abs().max().item()
                if math.isnan(difference):  # which max() would lose
                    return difference
                largest = max(largest, difference)
    return largest
