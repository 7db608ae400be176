"""The checkpoints of one training in their folder: found, judged, published and removed.

One rule holds: a folder TRAINING-STEP whose manifest names files that are all there and unchanged
counts, and nothing else does. Ray Train knows of no checkpoint, so that no list of its own has to
agree with the folder. This module knows neither Ray nor workers.
"""

import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sbf_dist.errors import UserError
from sbf_dist.files import flush
from sbf_dist.train import checkpoint
from sbf_dist.train.manifest import read_manifest

_PARTIAL = ".partial"
_DAMAGED = ".damaged"
_MANIFEST = "manifest.json"
# Ray Train's, which kept the checkpoints of earlier versions.
_OF_RAY = ("checkpoint_manager_snapshot.json", ".validate_storage_marker")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shelf:
    """The checkpoints of `training` below `folder`; the newest `keep_last` are kept.

    keep_best   whether the one with the best top-1 is kept as well
    mlflow_run  which new checkpoints name

    `folder` may hold those of other trainings as well. One process at a time may change it, of all
    that share it: rank 0.
    """

    folder: Path
    training: str
    keep_last: int = 2
    keep_best: bool = False
    mlflow_run: str | None = None

    def newest_whole(self) -> Path | None:
        """Return the newest checkpoint that is whole; None where there never was one.

        A warning names those that are damaged, which are set aside, and the one that is taken
        instead. UserError that lists them where none is whole.
        """
        damaged: list[tuple[Path, str]] = []
        for path in self._newest_first():
            try:
                checkpoint.verify(path)
            except (UserError, OSError) as error:
                damaged.append((path, _fault(path, error)))
                continue
            for bad, fault in damaged:
                aside = _free(bad.with_name(bad.name + _DAMAGED))
                bad.rename(aside)
                _log.warning(
                    "checkpoint %s: %s; renamed to %s; training %s resumes from %s",
                    bad,
                    fault,
                    aside.name,
                    self.training,
                    path.name,
                )
            return path
        if damaged:
            listed = "; ".join(f"{path.name}: {fault}" for path, fault in damaged)
            raise UserError(
                f"training {self.training}: none of its checkpoints in {self.folder} is whole "
                f"({listed}); restore one, or repeat the stage with --again STAGE"
            )
        return None

    def tidy(self) -> None:
        """Remove what was cut in the middle of being written or removed, whose ever it was."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            cut = path.name.startswith(".") and path.name.endswith(_PARTIAL)
            of_ray = path.name.startswith("checkpoint_") and not (path / _MANIFEST).exists()
            if path.is_dir() and (cut or of_ray):
                shutil.rmtree(path)
            elif path.name in _OF_RAY:
                path.unlink()

    def here(self, found: Path) -> Path:
        """Return where this rank reads the checkpoint that rank 0 has found."""
        return found

    def write(
        self,
        own: Path,
        *,
        step: int,
        token: str,
        digests: Mapping[str, str],
        group: Any,
        top1: float | None = None,
    ) -> None:
        """Put on the shelf what write_rank wrote into `own`; every rank calls it."""
        partial = self.place_to_write(step, token)
        try:
            checkpoint.publish(
                own,
                partial,
                step=step,
                digests=digests,
                group=group,
                top1=top1,
                mlflow_run=self.mlflow_run,
            )
            if dist.get_rank() == 0:
                self.accept(partial, step)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)  # it may have filled the disk
            raise

    def place_to_write(self, step: int, token: str) -> Path:
        """Return where a checkpoint is written; a `token` keeps two attempts apart."""
        return self.folder / f".{self._name(step)}.{token}{_PARTIAL}"

    def accept(self, partial: Path, step: int) -> Path:
        """Let the whole checkpoint `partial` count as that of `step`, and remove old ones."""
        final = self.folder / self._name(step)
        if final.exists():  # an attempt that was taken for dead has written it
            self._remove(final)
        partial.rename(final)
        flush(self.folder)
        for old in self._superseded():
            self._remove(old)
        return final

    def names(self) -> set[str]:
        """Return the names of all checkpoints in the folder, of all trainings."""
        if not self.folder.is_dir():
            return set()
        found = (path for path in self.folder.iterdir() if _counts(path))
        return {path.name for path in found if (path / _MANIFEST).exists()}

    def _superseded(self) -> list[Path]:
        """Return the checkpoints that need not be kept."""
        newest_first = self._newest_first()
        old = newest_first[self.keep_last :]
        if not self.keep_best:
            return old
        best = best_of([_top1(path) for path in newest_first])
        return [path for path in old if best is None or path != newest_first[best]]

    def _name(self, step: int) -> str:
        return f"{self.training}-{step:08d}"

    def _newest_first(self) -> list[Path]:
        """Return this training's checkpoints, whole or damaged; a step that cannot be read: 0."""
        if not self.folder.is_dir():
            return []
        found: list[tuple[int, float, Path]] = []
        for path in self.folder.iterdir():
            if not _counts(path):
                continue
            named = re.fullmatch(rf"{re.escape(self.training)}-(\d+)", path.name)
            step = int(named[1]) if named else 0
            try:
                manifest = read_manifest(path)
            except (UserError, OSError):
                if not (named or path.name.startswith("checkpoint_")):
                    continue  # another training's
            else:
                if manifest.digests.get("training") != self.training:
                    continue
                step = manifest.step
            found.append((step, path.stat().st_mtime, path))
        return [path for _, _, path in sorted(found, reverse=True)]

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint, so that a kill in the middle leaves none that looks damaged."""
        going = _free(path.with_name(f".{path.name}{_PARTIAL}"))
        path.rename(going)
        shutil.rmtree(going)


def best_of(top1s: Sequence[float | None]) -> int | None:
    """Return the position of the largest, the first of equal ones; None where all are None."""
    known = [(top1, -position) for position, top1 in enumerate(top1s) if top1 is not None]
    return -max(known)[1] if known else None


def _top1(path: Path) -> float | None:
    try:
        return read_manifest(path).top1
    except (UserError, OSError):
        return None


def _counts(path: Path) -> bool:
    hidden = path.name.startswith(".")
    return path.is_dir() and not hidden and _DAMAGED not in path.suffixes


def _fault(path: Path, error: Exception) -> str:
    """Return what is wrong with a checkpoint, without its path and advice."""
    text = str(error).removeprefix(f"checkpoint {path}: ").removeprefix(f"checkpoint {path}/")
    return text.removesuffix("; use an earlier checkpoint")


def _free(path: Path) -> Path:
    """Return `path`, or where it exists a name beside it that is free."""
    number, found = 1, path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return found
