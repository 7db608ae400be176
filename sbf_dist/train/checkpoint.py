"""Training checkpoints: DeepSpeed's shards, each rank's state, and a manifest that covers them.

A checkpoint is a folder:

    manifest.json                step, ranks, digests, every file with its size and SHA-256
    deepspeed/state/*.pt         weights (from rank 0) and each rank's optimizer shard
    ranks/00000.json             loader state and Python's random state of rank 0, and so on, and
                                 by what engine it was written
    ranks/00000.safetensors      PyTorch's and NumPy's random state of rank 0, and so on, and the
                                 batch norm statistics of its own images

The manifest is written last, so a folder without one is not a checkpoint. verify() compares every
file with it before anything is read. Our own files are JSON and safetensors; DeepSpeed's .pt files
are read with weights_only, so that a checkpoint from a stranger cannot run code.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, ValidationError

from sbf_dist.errors import UserError
from sbf_dist.files import flush, move_durably, sha256, write_text
from sbf_dist.train.engine import load_shards, save_shards
from sbf_dist.train.finite import refuse_non_finite
from sbf_dist.train.manifest import (
    FORMAT,
    MANIFEST,
    FileEntry,
    Manifest,
    entry_of,
    read_manifest,
)
from sbf_dist.train.rank_state import (
    read_loader_state,
    read_state,
    restore,
    shared_statistics,
    write_rank_state,
)
from sbf_dist.train.resharding import base_optimizer
from sbf_dist.train.shards import Whole, file_names, read

_SHARDS = "deepspeed"
_TAG = "state"


class Written(BaseModel):
    """By what a checkpoint was written, as far as a training that goes on must be alike.

    shapes  of parameters and buffers, by name
    reads   the recipe's values that the training depends on, by key
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    zero_stage: int
    optimizer: str
    shapes: dict[str, list[int]]
    reads: dict[str, Any]

    @classmethod
    def by(cls, engine: Any) -> "Written":
        """What `engine` writes."""
        module = engine.module
        shapes = {n: getattr(p, "ds_shape", p.shape) for n, p in module.named_parameters()}
        shapes |= {name: buffer.shape for name, buffer in module.named_buffers()}
        return cls(
            zero_stage=engine.zero_optimization_stage(),
            optimizer=type(base_optimizer(engine)).__name__,
            shapes={name: list(shape) for name, shape in shapes.items()},
            reads=engine.reads,
        )

    def difference(self, other: "Written") -> str | None:
        """What is another in `other`, in words, beside the recipe; None where nothing is."""
        if self.zero_stage != other.zero_stage:
            return f"at ZeRO stage {self.zero_stage}, this training at {other.zero_stage}"
        if self.optimizer != other.optimizer:
            return f"with the optimizer {self.optimizer}, this training with {other.optimizer}"
        for name in [*self.shapes, *(name for name in other.shapes if name not in self.shapes)]:
            if self.shapes.get(name) != other.shapes.get(name):
                return f"{_shape(self, name)}, this training {_shape(other, name)}"
        return None

    def changed_values(self, other: "Written") -> list[str]:
        """The values of the recipe that differ, in words."""
        keys = [*self.reads, *(key for key in other.reads if key not in self.reads)]
        return [
            f"{key} = {self.reads.get(key)!r}, this run has {other.reads.get(key)!r}"
            for key in keys
            if self.reads.get(key) != other.reads.get(key)
        ]


def _shape(written: Written, name: str) -> str:
    shape = written.shapes.get(name)
    if shape is None:
        return f"without {name}"
    return f"with {name} of shape ({', '.join(map(str, shape))})"


class Restored(BaseModel):
    """What load() gives back to the caller."""

    step: int
    loader_state: dict[str, Any]  # of this rank, or of rank 0 if the number of ranks has changed


def save(
    engine: Any,
    folder: Path,
    *,
    step: int,
    loader_state: Mapping[str, Any],
    digests: Mapping[str, str],
) -> None:
    """Write this rank's part of a checkpoint into `folder`; every rank calls it, at the same step.

    `folder` may be one that all ranks share, or one per rank whose contents are merged afterwards.
    `loader_state` must be JSON. UserError: as write_rank() raises it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".rank-{_rank()}-") as own:
        write_rank(engine, Path(own), loader_state=loader_state)
        publish(Path(own), folder, step=step, digests=digests)


def write_rank(engine: Any, own: Path, *, loader_state: Mapping[str, Any]) -> None:
    """Write this rank's files into `own`, a folder of its own; every rank calls it, at one step.

    When it returns, the training may go on: `publish` needs nothing but these files. The shards
    have batch norm statistics of all ranks together. The training keeps those of each rank, and a
    checkpoint is no step of it: it ends with the same bits whenever it was saved. UserError, raised
    on all ranks alike: a number is not finite, and nothing is written.
    """
    refuse_non_finite(engine)
    with shared_statistics(engine) as statistics:
        save_shards(engine, own / _SHARDS, _TAG)
    write_rank_state(
        own / "ranks", loader_state, Written.by(engine).model_dump(mode="json"), statistics
    )


def publish(
    own: Path,
    folder: Path,
    *,
    step: int,
    digests: Mapping[str, str],
    group: Any = None,
    top1: float | None = None,
    mlflow_run: str | None = None,
) -> None:
    """Move what write_rank wrote into `folder`, and write the manifest last; every rank calls it.

    Every file is on the disk before the manifest is. In another thread than the training's, give
    a `group` of torch.distributed that nothing else uses, of a backend that takes CPU tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, FileEntry] = {}
    for name, path in files_of(own).items():
        files[name] = entry_of(path)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        move_durably(path, folder / name)
    for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        flush(place)
    manifest = manifest_of(
        files, step=step, digests=digests, group=group, top1=top1, mlflow_run=mlflow_run
    )
    if _rank() == 0:
        write_text(folder / MANIFEST, manifest.model_dump_json(indent=1))
    if dist.is_initialized():
        dist.barrier(group=group)


def files_of(own: Path) -> dict[str, Path]:
    """What write_rank wrote into `own`, by the names that the files have in a checkpoint."""
    found = sorted(path for path in own.rglob("*") if path.is_file())
    return {path.relative_to(own).as_posix(): path for path in found}


def manifest_of(
    files: Mapping[str, FileEntry],
    *,
    step: int,
    digests: Mapping[str, str],
    group: Any = None,
    top1: float | None = None,
    mlflow_run: str | None = None,
) -> Manifest:
    """The manifest of a checkpoint of which `files` are this rank's; every rank calls it."""
    per_rank: list[dict[str, FileEntry]] = [dict(files)]
    if dist.is_initialized():
        per_rank *= _world_size()
        dist.all_gather_object(per_rank, dict(files), group=group)
    return Manifest(
        format=FORMAT,
        step=step,
        world_size=_world_size(),
        digests=dict(digests),
        files={name: entry for rank_files in per_rank for name, entry in rank_files.items()},
        top1=top1,
        mlflow_run=mlflow_run,
    )


def verify(folder: Path) -> Manifest:
    """Compare every file of the checkpoint in `folder` with its manifest, which is returned.

    UserError names the first file that is missing, is not what was written, or is there although
    the manifest does not list it. Hidden files, as storage leaves them, are not looked at.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        _check_file(folder, name, entry)
    _check_names(folder, manifest)
    return manifest


def _verify_together(folder: Path) -> Manifest:
    """As verify(), each rank a part of the files; all raise alike."""
    manifest = read_manifest(folder)
    fault: str | None = None
    try:
        for name in list(manifest.files)[_rank() :: _world_size()]:
            _check_file(folder, name, manifest.files[name])
    except UserError as error:
        fault = str(error)
    faults = [fault]
    if dist.is_initialized():
        faults *= _world_size()
        dist.all_gather_object(faults, fault)
    found = next((one for one in faults if one is not None), None)
    if found is not None:
        raise UserError(found)
    _check_names(folder, manifest)  # which reads a file: that it is whole is known by now
    return manifest


def _check_file(folder: Path, name: str, entry: FileEntry) -> None:
    path = folder / name
    if not path.is_file():
        raise UserError(f"checkpoint {folder}: {name} is missing; use an earlier checkpoint")
    size = path.stat().st_size
    if size != entry.size:
        raise UserError(
            f"checkpoint {folder}: {name} is damaged: {size} bytes instead of {entry.size}; "
            "use an earlier checkpoint"
        )
    if sha256(path) != entry.sha256:
        raise UserError(
            f"checkpoint {folder}: {name} is damaged: its SHA-256 is not the one written; "
            "use an earlier checkpoint"
        )


def _check_names(folder: Path, manifest: Manifest) -> None:
    """UserError for a file that the manifest should list, and one that it does not."""
    for name in _expected(folder, manifest):
        if name not in manifest.files:
            raise UserError(
                f"checkpoint {folder}: {MANIFEST} does not list {name}, which a checkpoint of "
                f"{manifest.world_size} workers has; use an earlier checkpoint"
            )
    for name in _files(folder):
        if name not in manifest.files:
            raise UserError(
                f"checkpoint {folder}: {name} is not listed in {MANIFEST}; remove it, or use an "
                "earlier checkpoint"
            )


def _expected(folder: Path, manifest: Manifest) -> list[str]:
    """The files that a checkpoint has, whatever its manifest lists."""
    ranks = range(manifest.world_size)
    expected = [
        f"ranks/{rank:05d}.{ending}" for rank in ranks for ending in ("json", "safetensors")
    ]
    first = written(folder) if expected[0] in manifest.files else None
    stage = None if first is None else first.zero_stage
    shards = file_names(manifest.world_size, stage, folder / _SHARDS / _TAG)
    return expected + [f"{_SHARDS}/{_TAG}/{name}" for name in shards]


def _files(folder: Path) -> list[str]:
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    visible = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    return [name.as_posix() for name in visible if name.as_posix() != MANIFEST]


def load(engine: Any, folder: Path, *, digests: Mapping[str, str]) -> Restored:
    """Put engine and random states back to where `folder` was saved; every rank calls it.

    Every file is verified before it is opened, by one of the ranks. On as many ranks as before
    everything is restored; on another number of ranks all but the random states.

    UserError: `folder` is no checkpoint or is damaged, `digests` are not those it was saved with,
    or it is of another network, optimizer or ZeRO stage.
    """
    manifest = _verify_together(folder)
    before = written(folder)
    for name, digest in digests.items():
        saved = manifest.digests.get(name)
        if saved != digest:
            changed = before.changed_values(Written.by(engine)) if before and engine else []
            found = f"{name} {saved}, this run has {digest}"
            if name == "recipe" and changed:
                more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
                found = changed[0] + more
            raise UserError(
                f"checkpoint {folder}: was written with {found}; "
                f"give the same {name}, or start under another name"
            )
    difference = before.difference(Written.by(engine)) if before else None
    if difference is not None:
        raise UserError(
            f"checkpoint {folder}: was written {difference}; give the same, or start under "
            "another name"
        )
    same_ranks = manifest.world_size == _world_size()
    load_shards(engine, folder / _SHARDS, _TAG, ranks=manifest.world_size)
    if same_ranks:
        restore(folder / "ranks", engine)
    state = read_loader_state(folder / "ranks", _rank() if same_ranks else 0)
    return Restored(step=manifest.step, loader_state=state)


def read_whole(folder: Path) -> Whole:
    """What the shards of a checkpoint hold, put together, after they were verified.

    It needs neither DeepSpeed nor the processes that wrote them. UserError as load() raises it.
    """
    return read(folder / _SHARDS / _TAG, verify(folder).world_size)


def written(folder: Path) -> Written | None:
    """By what the checkpoint in `folder` was written; None if a version before did not note it.

    UserError if the file that says so is missing or damaged.
    """
    state = read_state(folder / "ranks", 0)
    if "written" not in state:
        return None
    try:
        return Written.model_validate(state["written"])
    except ValidationError as error:
        raise UserError(
            f"checkpoint {folder}/ranks/00000.json: is damaged: written: "
            f"{error.errors()[0]['msg']}; use an earlier checkpoint"
        ) from error


def loader_state(folder: Path) -> dict[str, Any]:
    """Where the images of rank 0 were when the checkpoint in `folder` was saved."""
    return read_loader_state(folder / "ranks", 0)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
