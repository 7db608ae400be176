"""Measured latencies of layers: kept in a JSON file, interpolated where they are smooth."""

import fcntl
import functools
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from sbf_dist import _C
from sbf_dist.compression.inputs import packing_of
from sbf_dist.compression.planning.latency import Form, layer_latencies
from sbf_dist.compression.recognition import as_plain
from sbf_dist.errors import UserError
from sbf_dist.files import cache_folder, replacing, sha256
from sbf_dist.padding import pad_of

GRID = 4  # numbers of kept filters at which more sources are measured

Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _File(BaseModel):
    """What the file holds: by machine and software, by layer, by form."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    milliseconds: dict[str, dict[str, dict[str, Milliseconds]]] = Field(default_factory=dict)


def default_path() -> Path:
    """Return the table's place in the cache folder."""
    return cache_folder() / "latency.json"


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of layers in their possible forms on this machine, measured where unknown.

    `path` is the JSON file that keeps them, `batch` the images of a forward pass. Entries are kept
    apart by all that they depend on: the processor, threads, PyTorch, the very build of the
    extension, dtype, layout, batch, the layer's shape and its form. Several processes may share
    the file.
    """

    path: Path = field(default_factory=default_path)
    batch: int = 1

    def estimate(
        self, conv: nn.Conv2d, input_size: tuple[int, int], forms: Sequence[Form]
    ) -> list[float]:
        """Return the milliseconds of each form of `conv` on images of (height, width).

        A convolution's time has steps in B, at the width of the processor's vectors, and those of
        more sources have the same steps. So with the fewest sources every B is measured, if it is
        not in the table; for each larger S only GRID of them, between which what S adds is
        interpolated linearly in B. Raises UserError, naming the file, if it is damaged or cannot
        be read or written, and if the machine is too busy to measure.
        """
        conv = as_plain(conv)
        machine = environment(conv.weight)
        layer = _describe(conv, input_size, self.batch)
        known = self._read().milliseconds.get(machine, {}).get(layer, {})
        rows = _rows(forms)
        wanted = dict.fromkeys(form for row in rows.values() for form in (*row.base, *row.grid))
        missing = [form for form in wanted if str(form) not in known]
        if missing:
            measured = layer_latencies(conv, input_size, missing, batch=self.batch)
            found = {str(form): ms for form, ms in zip(missing, measured, strict=True)}
            self._add(machine, layer, found)
            known = known | found
        return [rows[f.sources, f.transform_size].interpolate(f.kept, known) for f in forms]

    def _read(self) -> _File:
        try:
            return _File.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return _File()
        except OSError as error:
            raise UserError(f"latency table {self.path} cannot be read: {error.strerror}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            what = f"{where}: {first['msg']}" if where else first["msg"]
            raise UserError(
                f"latency table {self.path} is damaged ({what}): delete it; it is measured again"
            ) from None

    def _add(self, machine: str, layer: str, found: dict[str, float]) -> None:
        """Merge new entries into the file: one process at a time, replacing it as a whole."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.with_name(f"{self.path.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                content = self._read()
                content.milliseconds.setdefault(machine, {}).setdefault(layer, {}).update(found)
                with replacing(self.path) as partial:
                    partial.write_text(json.dumps(content.model_dump(), indent=1) + "\n")
        except OSError as error:
            raise UserError(
                f"latency table {self.path} cannot be written: {error.strerror}; choose another "
                "place for it"
            ) from None


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


@dataclass(frozen=True)
class Timing:
    """How layers and networks are timed, where the budget is a time.

    table: stores the layers' times, and sets the batch size of a forward pass; for_inference:
    converts a network into the form that is timed, for instance `sbf_dist.optimize`; default:
    unchanged.
    """

    table: LatencyTable = field(default_factory=LatencyTable)
    for_inference: Callable[[nn.Module], nn.Module] = _as_it_is

    def prepare(self, network: nn.Module) -> nn.Module:
        """Return the form of `network` that is timed; it takes packed inputs if `network` does."""
        prepared, packing = self.for_inference(network), packing_of(network)
        return prepared if packing is None else packing.install(prepared)


@dataclass(frozen=True)
class _Row:
    """Forms of one S and m: those of `grid` are measured, and their like in `base` for every B."""

    base: list[Form]
    grid: list[Form]

    def interpolate(self, kept: int, known: dict[str, float]) -> float:
        base = {form.kept: known[str(form)] for form in self.base}
        at = [form.kept for form in self.grid]
        # More sources are more work: what says otherwise is noise.
        added = [max(0.0, known[str(form)] - base[form.kept]) for form in self.grid]
        return base[kept] + float(np.interp(kept, at, added))


def _rows(forms: Sequence[Form]) -> dict[tuple[int, int], _Row]:
    """Choose the forms to measure, by (S, m); a grid is evenly spread over B, with both ends."""
    rows = {}
    for sources, size in {(form.sources, form.transform_size) for form in forms}:
        if sources == 0:
            alike = [form for form in forms if form.sources == 0]
        else:
            alike = [form for form in forms if form.sources and form.transform_size == size]
        fewest = min(form.sources for form in alike)
        base = [Form(kept, fewest, size) for kept in sorted({form.kept for form in alike})]
        row = sorted({form.kept for form in alike if form.sources == sources})
        places = np.linspace(0, len(row) - 1, min(GRID, len(row))).round().astype(int)
        grid = [Form(row[place], sources, size) for place in places]
        rows[sources, size] = _Row(base, grid)
    return rows


def _describe(conv: nn.Conv2d, input_size: tuple[int, int], batch: int) -> str:
    """Name all of a layer's shape that its latency depends on."""
    height, width = input_size
    pad = pad_of(conv)
    padding = f"{conv.padding} {conv.padding_mode}" if pad is None else repr(pad)
    return (
        f"{batch} x {conv.in_channels} x {height} x {width} -> {conv.out_channels}, "
        f"kernel {conv.kernel_size}, stride {conv.stride}, padding {padding}, "
        f"dilation {conv.dilation}, groups {conv.groups}"
    )


def environment(weight: torch.Tensor) -> str:
    """Name the machine and the software that a layer with such a weight is timed on."""
    if weight.is_cuda:
        processor = torch.cuda.get_device_name(weight.device)
    else:
        processor = f"{_cpu_name()} {torch.backends.cpu.get_cpu_capability()}"
    dtype = str(weight.dtype).removeprefix("torch.")
    return (
        f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"extension {_extension_digest()}, {dtype}, channels_last"
    )


@functools.cache
def _cpu_name() -> str:
    described = Path("/proc/cpuinfo")
    if described.exists():
        for line in described.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


@functools.cache
def _extension_digest() -> str:
    """First digits of the SHA-256 of the extension's file: its version does not change so often."""
    return sha256(Path(_C.__file__))[:12]
