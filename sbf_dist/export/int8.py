"""An ONNX file in int8: quantised by ONNX Runtime, and held against the one in float.

Static quantisation with a scale for each channel of weights, and ranges of activations measured on
images; QuantizeLinear and DequantizeLinear around the operators (QDQ), which all runtimes read.
Where the predictions suffer, each layer is quantised alone to see which are to blame, and those
stay in float, the worst first, until the rest agrees.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbf_dist.errors import UserError

# Mean divergence from the predictions in float that a file may have: nats of classifiers, otherwise
# the share of the outputs' variance.
LIMIT = 0.01
_OPERATORS = (
    *("Conv", "Gemm", "MatMul", "Add", "Concat", "Gather", "Relu", "Clip"),
    *("MaxPool", "AveragePool", "GlobalAveragePool"),
)
_WITH_WEIGHTS = ("Conv", "Gemm", "MatMul")
_BASIS = ".basis"  # of an SBF layer, behind whose name its transformations are nodes of their own

Outputs = list[NDArray[np.float32]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class FloatLayer:
    """A layer that is left in float. divergence: from quantising it alone."""

    name: str
    form: str
    divergence: float


@dataclass(frozen=True)
class Quantised:
    """What quantisation came to. divergence: of the file from the one in float."""

    divergence: float
    layers: int
    left_float: list[FloatLayer]


def quantise_onnx(
    source: Path,
    target: Path,
    *,
    calibration: Sequence[NDArray[np.float32]],
    held_out: NDArray[np.float32],
    limit: float = LIMIT,
    progress: Progress = lambda *_: None,
) -> Quantised:
    """Write the file `source`, of `sbf_dist.export.onnx.export_onnx`, in int8 to `target`.

    calibration: batches of normalised images (N, C, H, W) that ranges are measured on; held_out:
    others, on which predictions are compared. The metadata of `source` stay, with sbf.precision
    and sbf.float_layers added. Raises UserError if it diverges by more than `limit` whatever is
    left in float.
    """
    import onnx

    if any(not isinstance(side, int) for side in _input_shape(source)[1:]):
        raise UserError(f"ONNX file {source}: its input has no fixed size")
    with tempfile.TemporaryDirectory(prefix="sbf-int8-") as folder, _quiet():
        trial = _Trial(source, Path(folder), calibration, held_out)
        names = list(trial.layers)
        left: list[FloatLayer] = []
        reached = trial.divergence()
        if not reached <= limit:
            alone = {}
            for number, name in enumerate(names, 1):
                alone[name] = trial.divergence(only=name)
                progress("quantise layers", number, len(names))
            worst = sorted(names, key=lambda name: -alone[name])
            count, reached = _fewest(trial, worst, limit)
            left = [
                FloatLayer(name, trial.form(name), alone[name])
                for name in names
                if name in worst[:count]
            ]
        if not reached <= limit:
            raise UserError(
                f"ONNX file {source}: in int8 its predictions diverge by {reached:.3g}, more "
                f"than {limit:g}, even with all {len(names)} layers in float"
            )
        proto = onnx.load(trial.write(without=[layer.name for layer in left]))
    _describe(proto, onnx.load(source), left)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, target)
    return Quantised(reached, len(names), left)


def divergence(found: Outputs, wanted: Outputs, *, logits: bool) -> float:
    """Return how far outputs are from those in float, mean over the images.

    KL divergence in nats if they are `logits`; otherwise the squared error, in units of the
    variance of each output, mean over the outputs.
    """
    if logits:
        logs, known = _log_softmax(found[0]), _log_softmax(wanted[0])
        return float((np.exp(known) * (known - logs)).sum(1).mean())
    errors = [
        np.square(one.astype(np.float64) - other).mean() / max(float(other.var()), 1e-12)
        for one, other in zip(found, wanted, strict=True)
    ]
    return float(np.mean(errors))


def run_onnx(
    path: Path, images: NDArray[np.float32], *, threads: int = 0, batch: int = 32
) -> Outputs:
    """Run a file of one input on images (N, C, H, W), on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    parts = [
        session.run(None, {session.get_inputs()[0].name: images[start : start + batch]})
        for start in range(0, len(images), batch)
    ]
    return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


class _Trial:
    """One file, quantised in part again and again; ranges are measured once."""

    def __init__(
        self,
        source: Path,
        folder: Path,
        calibration: Sequence[NDArray[np.float32]],
        held_out: NDArray[np.float32],
    ) -> None:
        import onnx
        from onnxruntime.quantization import quant_pre_process

        self._folder = folder
        self._calibration = calibration
        self._held_out = held_out
        self._source = folder / "shapes.onnx"
        # Shapes alone: nodes keep their names.
        quant_pre_process(source, self._source, skip_optimization=True, skip_symbolic_shape=True)
        graph = onnx.load(self._source).graph
        self._logits = [output.name for output in graph.output] == ["logits"]
        self._wanted = run_onnx(source, held_out)
        self.layers = _layers(graph)
        self._nodes = {node.name: node for node in graph.node}

    def divergence(self, *, only: str | None = None, without: Sequence[str] = ()) -> float:
        """Return how far the predictions go with one layer, or all `without` some, in int8."""
        found = run_onnx(self.write(only=only, without=without), self._held_out)
        return divergence(found, self._wanted, logits=self._logits)

    def write(self, *, only: str | None = None, without: Sequence[str] = ()) -> Path:
        """Quantise one layer, or all `without` some; return the file, which the next replaces."""
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        target = self._folder / "quantised.onnx"
        quantize_static(
            self._source,
            target,
            _Feed(self._source, self._calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_OPERATORS),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=None if only is None else self.layers[only],
            nodes_to_exclude=[node for name in without for node in self.layers[name]],
            calibration_cache_path=self._folder / "ranges.json",
        )
        return target

    def form(self, name: str) -> str:
        """Say in which form a layer stands in the file."""
        nodes = [self._nodes[node] for node in self.layers[name]]
        own = [node for node in nodes if not node.name.startswith(f"{name}{_BASIS}/")]
        if len(own) == len(nodes):
            return "dense"
        kinds = {node.op_type for node in own}
        if "Concat" in kinds:
            return "SBF, kept channels beside depthwise convolutions"
        grouped = [
            attribute.i
            for node in own
            for attribute in node.attribute
            if node.op_type == "Conv" and attribute.name == "group"
        ]
        if max(grouped, default=1) > 1:
            return "SBF, depthwise convolutions"
        return "SBF, a matrix product"


class _Feed:
    """Batches as ONNX Runtime's calibration asks for them (a CalibrationDataReader)."""

    def __init__(self, file: Path, batches: Sequence[NDArray[np.float32]]) -> None:
        self._name = _input_name(file)
        self._batches: Iterator[NDArray[np.float32]] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch}


def _fewest(trial: _Trial, worst: Sequence[str], limit: float) -> tuple[int, float]:
    """Return how many of the `worst` layers have to stay in float, and the divergence then.

    By halving: the divergence falls as layers are added.
    """
    low, high = 0, len(worst)  # `low` is too few
    best = trial.divergence(without=worst)
    while best <= limit and high - low > 1:
        middle = (low + high) // 2
        found = trial.divergence(without=worst[:middle])
        if found <= limit:
            high, best = middle, found
        else:
            low = middle
    return high, best


def _layers(graph: Any) -> dict[str, list[str]]:
    """Map each layer with weights to its nodes, by the names that export_onnx gives."""
    layers: dict[str, list[str]] = {}
    for node in graph.node:
        if node.op_type in _WITH_WEIGHTS:
            layers.setdefault(_layer(node), [])
    for node in graph.node:
        if node.op_type in _OPERATORS and _layer(node) in layers:
            layers[_layer(node)].append(node.name)
    return layers


def _layer(node: Any) -> str:
    scope = node.name.rpartition("/")[0].removesuffix(_BASIS)
    return scope or node.name


def _describe(proto: Any, source: Any, left: Sequence[FloatLayer]) -> None:
    import onnx

    known = {entry.key: entry.value for entry in source.metadata_props}
    del proto.metadata_props[:]
    layers = [layer.name for layer in left]
    onnx.helper.set_model_props(
        proto,
        known | {"sbf.precision": json.dumps("int8"), "sbf.float_layers": json.dumps(layers)},
    )


def _input_name(file: Path) -> str:
    import onnx

    return onnx.load(file, load_external_data=False).graph.input[0].name


def _input_shape(file: Path) -> list[int | str]:
    import onnx

    dims = onnx.load(file).graph.input[0].type.tensor_type.shape.dim
    return [dim.dim_param or dim.dim_value for dim in dims]


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the advice of ONNX Runtime's quantiser, which it logs at every call, to itself."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)
