"""Export as ONNX: standard operators only, checked, with what a user of the file must know."""

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbf_dist.errors import UserError
from sbf_dist.export.fold import UnscaledSBFConv2d, fold_batchnorm
from sbf_dist.export.saved import Card
from sbf_dist.layers import SBFConv2d

OPSET = 18  # ONNX 1.13 (2022), which the runtimes in use read


class DepthwiseExpand(nn.Module):
    """An SBF layer written with operators that every ONNX runtime has, and has in a fast form.

    Slot s of every output channel is one depthwise convolution over gathered basis features; a
    kept channel is a centre tap of one in slot 0, so nothing is concatenated or reordered, and
    the bias belongs to slot 0. Equals the layer, with S (C_out m²) instead of S (P m²) MACs per
    pixel for expand.
    """

    sources: Tensor

    def __init__(self, layer: SBFConv2d | UnscaledSBFConv2d) -> None:
        super().__init__()
        self.basis = layer.basis
        outputs = layer.out_channels
        entries = layer.order[:outputs]
        kept = layer.basis.out_channels
        _, slots, m, _ = layer.transforms.shape
        centre_taps = layer.transforms.new_zeros(kept, slots, m, m)
        centre_taps[:, 0, m // 2, m // 2] = 1
        own = torch.arange(kept, device=entries.device)[:, None].expand(-1, slots)
        weight = torch.cat([centre_taps, layer.transforms.detach()])[entries]
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("sources", torch.cat([own, layer.sources])[entries])
        bias = None if layer.bias is None else layer.bias.detach()[:outputs].clone()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H', W')."""
        z = self.basis(x)
        channels, slots, m, _ = self.weight.shape
        y = None
        for slot in range(slots):
            part = F.conv2d(
                z[:, self.sources[:, slot]],
                self.weight[:, slot : slot + 1],
                self.bias if slot == 0 else None,
                padding=m // 2,
                groups=channels,
            )
            y = part if y is None else y + part
        assert y is not None
        return y


def with_standard_operators(model: nn.Module) -> nn.Module:
    """Return a copy of `model` in which each SBF layer is a `DepthwiseExpand`."""
    portable = copy.deepcopy(model)
    for name, layer in list(portable.named_modules()):
        if isinstance(layer, SBFConv2d | UnscaledSBFConv2d):
            portable.set_submodule(name, DepthwiseExpand(layer), strict=True)
    return portable


def to_onnx(model: nn.Module, path: Path, card: Card, *, dynamic_batch: bool = True) -> None:
    """Write `model`, folded and in eval mode, as an ONNX file of standard operators.

    Input "images": float32 (N, *card.input_shape), normalised with the card's mean and std; N is
    free, or 1 if not `dynamic_batch`. Output "logits": float32 (N, classes). The card stands in
    the file's metadata under the keys sbf.FIELD, as JSON. The file is checked, and replaced in
    one step. Raises UserError if the network cannot be exported.
    """
    import onnx

    portable = with_standard_operators(fold_batchnorm(model)).cpu().float()
    batch = 2 if dynamic_batch else 1
    example = torch.zeros(batch, *card.input_shape)
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
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model {card.model!r} cannot be exported as ONNX: {reason}") from error
    assert program is not None
    proto = program.model_proto
    foreign = {entry.domain for entry in proto.opset_import} - {""}
    if foreign or proto.functions:
        raise UserError(
            f"model {card.model!r} needs operators outside standard ONNX: {sorted(foreign)}"
        )
    _forget_where_it_was_made(proto)
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, dict(_metadata(card)))
    onnx.checker.check_model(proto, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(proto.SerializeToString())
    partial.replace(path)


def _metadata(card: Card) -> Iterator[tuple[str, str]]:
    for field, value in card.model_dump(mode="json").items():
        yield f"sbf.{field}", json.dumps(value, ensure_ascii=False)


def _forget_where_it_was_made(proto: Any) -> None:
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
    reference = copy.deepcopy(model).cpu().float().eval()
    largest = 0.0
    for part in images.cpu().split(batch if isinstance(batch, int) else 64):
        (found,) = session.run(["logits"], {"images": part.numpy()})
        with torch.inference_mode():
            expected = reference(part)
        largest = max(largest, (torch.from_numpy(found) - expected).abs().max().item())
    return largest
