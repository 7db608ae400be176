"""The manifest of a checkpoint: what it is of, and its files with their digests.

Whoever only asks what checkpoints there are needs neither PyTorch nor DeepSpeed.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sbf_dist.errors import UserError
from sbf_dist.files import sha256
from sbf_dist.schema import equals

FORMAT = 1
MANIFEST = "manifest.json"


class FileEntry(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int
    sha256: str


class Manifest(BaseModel):
    """What manifest.json says.

    digests     of what the run depends on: plan, recipe, data
    top1        the network's on the validation images, if it was evaluated: a share
    mlflow_run  id of the run's MLflow run, where it was known
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int
    step: int
    world_size: int
    digests: dict[str, str]
    files: dict[str, FileEntry]
    top1: float | None = Field(None, exclude_if=equals(None))
    mlflow_run: str | None = Field(None, exclude_if=equals(None))


def entry_of(path: Path) -> FileEntry:
    """What a manifest says of a file."""
    return FileEntry(size=path.stat().st_size, sha256=sha256(path))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`. UserError if it is missing or damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"checkpoint {folder}: has no {MANIFEST}: not a checkpoint, or an incomplete one"
        )
    return parsed_manifest(path.read_bytes(), str(path))


def parsed_manifest(content: bytes, where: str) -> Manifest:
    """What a manifest's file, which is at `where`, says. UserError if it is damaged."""
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "JSON"
        raise UserError(f"checkpoint {where}: is damaged: {key}: {first['msg']}") from error
    if manifest.format != FORMAT:
        raise UserError(
            f"checkpoint {where}: format {manifest.format}, this version reads {FORMAT}"
        )
    return manifest
