"""The checkpoints of one training in an object store: written, judged, fetched and removed.

A store has no rename, so a checkpoint TRAINING-STEP.TOKEN counts once its manifest is there, which
is written last. The token is the attempt's: none overwrites another's files. One that is damaged
gets an object `damaged` beside its files, which says why, and does not count from then on.
"""

import fcntl
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launchers.on_ray.checkpoints import Shelf, best_of
from launchers.storage.working_copy import CHECKPOINTS, cached, is_plain
from sbf_dist.errors import RunError, UserError
from sbf_dist.object_storage import ObjectFolder, is_address
from sbf_dist.patience import patiently
from sbf_dist.train import checkpoint
from sbf_dist.train.manifest import MANIFEST, Manifest, entry_of, parsed_manifest

_DAMAGED = "damaged"
_WHOLE = ".whole"  # in a folder that was fetched and compared with its manifest
_AT_ONCE = 8  # files on their way

_log = logging.getLogger(__name__)


def _nothing() -> None:
    """Do nothing before a checkpoint counts."""


def shelf_at(
    place: str,
    training: str,
    keep_last: int = 2,
    before: Callable[[], None] = _nothing,
    *,
    keep_best: bool = False,
    mlflow_run: str | None = None,
) -> "Shelf | StoredShelf":
    """Return the checkpoints of a training below a folder, or an address.

    before  see StoredShelf
    """
    if is_address(place):
        store = ObjectFolder.at(place)
        return StoredShelf(store, training, keep_last, before, keep_best, mlflow_run)
    return Shelf(Path(place), training, keep_last, keep_best, mlflow_run)


@dataclass
class StoredShelf:
    """The checkpoints of `training` in `store`, which may hold those of other trainings as well.

    before  is called on rank 0 before a checkpoint counts: what must be in the store by then

    Its methods are those of Shelf. Where the store does not answer, they try again for a while.
    """

    store: ObjectFolder
    training: str
    keep_last: int = 2
    before: Callable[[], None] = _nothing
    keep_best: bool = False
    mlflow_run: str | None = None
    _top1s: dict[str, float | None] = field(default_factory=dict, init=False)  # by name
    _last: str | None = field(default=None, init=False)  # the newest that this process knows

    @property
    def folder(self) -> Path:
        """Where this node keeps checkpoints that it has fetched."""
        return cached(CHECKPOINTS, self.store.address)

    def newest_whole(self) -> str | None:
        """Fetch the newest checkpoint that is whole; its name, None where there never was one.

        A warning names those that are damaged, and the one that is taken instead. UserError that
        lists them where none is whole.
        """
        damaged: list[tuple[str, str]] = []
        for name in self._newest_first():
            try:
                self._here(name)
            except _DamagedError as error:
                damaged.append((name, str(error)))
                continue
            for bad, fault in damaged:
                about = json.dumps({"fault": fault}).encode()
                patiently(partial(self.store.write, f"{bad}/{_DAMAGED}", about))
                _log.warning(
                    "checkpoint %s/%s: %s; it is ignored from now on; training %s resumes from %s",
                    self.store.address,
                    bad,
                    fault,
                    self.training,
                    name,
                )
            return name
        if damaged:
            listed = "; ".join(f"{name}: {fault}" for name, fault in damaged)
            raise UserError(
                f"training {self.training}: none of its checkpoints in {self.store.address} is "
                f"whole ({listed}); restore one, or repeat the stage with --again STAGE"
            )
        return None

    def tidy(self) -> None:
        """Remove what was cut in the middle of being written or removed, whose ever it was."""
        for name, keys in self._objects().items():
            if MANIFEST not in keys:
                self._remove(name)

    def here(self, name: str) -> Path:
        """Return this node's folder with the checkpoint `name`, which one of its ranks fetches.

        It is the only one that is kept on this node. UserError if it is damaged.
        """
        try:
            return self._here(name)
        except _DamagedError as error:
            raise UserError(f"checkpoint {self.store.address}/{name}: {error}") from error

    def _here(self, name: str) -> Path:
        folder = self.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            folder.mkdir(exist_ok=True)
            if not (folder / _WHOLE).exists():
                self._fetch(name, folder)
                (folder / _WHOLE).touch()
            for other in self.folder.iterdir():
                if other.is_dir() and other != folder:
                    shutil.rmtree(other)
        self._last = name
        return folder

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
        """Put on the shelf what write_rank wrote into `own`; every rank calls it.

        UserError, on all ranks alike, that names the cause and the checkpoint before.
        """
        name = f"{self.training}-{step:08d}.{token}"
        paths = checkpoint.files_of(own)
        entries = {key: entry_of(path) for key, path in paths.items()}
        self._together(lambda: self._upload(name, paths), step, group)
        manifest = checkpoint.manifest_of(
            entries,
            step=step,
            digests=digests,
            group=group,
            top1=top1,
            mlflow_run=self.mlflow_run,
        )
        self._together(lambda: self._accept(name, manifest), step, group)
        self._last = name

    def names(self) -> set[str]:
        """Return the names of all checkpoints in the folder, of all trainings."""
        return {name for name, keys in self._objects().items() if _counts(keys)}

    def _together(self, work: Callable[[], None], step: int, group: Any) -> None:
        """Do work() on every rank; where it fails on one, all raise the same."""
        fault: UserError | RunError | None = None
        try:
            work()
        except (UserError, RunError) as error:
            fault = error
        faults = [fault] * dist.get_world_size()
        dist.all_gather_object(faults, fault, group=group)
        found = next((one for one in faults if one is not None), None)
        if found is not None:
            before = f"the one before, {self._last}, is whole" if self._last else "there is none"
            cause = str(found).replace(f"{self.store.address}/", "")
            raise type(found)(
                f"checkpoint of step {step} in {self.store.address}: {cause} ({before})"
            )

    def _upload(self, name: str, paths: Mapping[str, Path]) -> None:
        for key, path in paths.items():
            patiently(partial(self.store.put, path, f"{name}/{key}"))

    def _accept(self, name: str, manifest: Manifest) -> None:
        """On rank 0: let a checkpoint count, and remove old ones."""
        if dist.get_rank() != 0:
            return
        self.before()
        there = patiently(lambda: self.store.objects(name))
        for key, entry in manifest.files.items():
            found = there.get(f"{name}/{key}")
            if found is None or found.size != entry.size:
                raise UserError(f"{key} was removed by another process")
        content = manifest.model_dump_json(indent=1).encode()
        patiently(lambda: self.store.write(f"{name}/{MANIFEST}", content))
        for old in self._superseded():
            self._remove(old)

    def _fetch(self, name: str, folder: Path) -> None:
        """Write a checkpoint to `folder`, compared with its manifest."""
        where = f"{self.store.address}/{name}"
        content = self._read(f"{name}/{MANIFEST}")
        if content is None:
            raise _DamagedError(f"has no {MANIFEST}")
        try:
            manifest = parsed_manifest(content, where)
        except UserError as error:
            raise _DamagedError(str(error).removeprefix(f"checkpoint {where}: ")) from error

        strange = next((key for key in manifest.files if not is_plain(key)), None)
        if strange is not None:
            raise _DamagedError(f"{MANIFEST} lists {strange!r}")

        def get(key: str) -> None:
            path = folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and entry_of(path) == manifest.files[key]:
                return
            try:
                patiently(lambda: self.store.fetch(f"{name}/{key}", path))
            except FileNotFoundError:
                raise _DamagedError(f"{key} is missing") from None
            found, entry = entry_of(path), manifest.files[key]
            if found.size != entry.size:
                raise _DamagedError(f"{key} is damaged: {found.size} bytes instead of {entry.size}")
            if found != entry:
                raise _DamagedError(f"{key} is damaged: its SHA-256 is not the one written")

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for done in [pool.submit(get, key) for key in manifest.files]:
                done.result()
        (folder / MANIFEST).write_bytes(content)

    def _read(self, key: str) -> bytes | None:
        try:
            return patiently(lambda: self.store.read(key))
        except FileNotFoundError:
            return None

    def _objects(self) -> dict[str, dict[str, float]]:
        """Return when each file was written, by checkpoint and name."""
        found: dict[str, dict[str, float]] = {}
        for key, stored in patiently(self.store.objects).items():
            name, _, file = key.partition("/")
            found.setdefault(name, {})[file] = stored.modified
        return found

    def _newest_first(self) -> list[str]:
        """Return this training's checkpoints, whole or damaged."""
        return [name for _, _, name in self._by_step()]

    def _by_step(self) -> list[tuple[int, float, str]]:
        found: list[tuple[int, float, str]] = []
        for name, keys in self._objects().items():
            named = re.fullmatch(rf"{re.escape(self.training)}-(\d+)\.\w+", name)
            if named and _counts(keys):
                found.append((int(named[1]), keys[MANIFEST], name))
        return sorted(found, reverse=True)

    def _superseded(self) -> list[str]:
        """Return the checkpoints that need not be kept, and older ones of the same step."""
        kept: dict[int, str] = {}
        twice, old = [], []
        for step, _, name in self._by_step():
            if step in kept:
                twice.append(name)
            else:
                kept[step] = name
        newest_first = list(kept.values())
        old = newest_first[self.keep_last :]
        if self.keep_best:
            best = best_of([self._top1(name) for name in newest_first])
            old = [name for name in old if best is None or name != newest_first[best]]
        return old + twice

    def _top1(self, name: str) -> float | None:
        if name not in self._top1s:
            content = self._read(f"{name}/{MANIFEST}")
            try:
                parsed = content and parsed_manifest(content, name)
            except UserError:  # a damaged one; newest_whole() says so
                parsed = None
            self._top1s[name] = parsed.top1 if parsed else None
        return self._top1s[name]

    def _remove(self, name: str) -> None:
        """Remove a checkpoint, the manifest first: a kill in the middle leaves none."""
        patiently(lambda: self.store.remove(f"{name}/{MANIFEST}"))
        patiently(lambda: self.store.remove_all(name))


class _DamagedError(Exception):
    """A checkpoint that is not what was written; the message says how."""


def _counts(keys: Mapping[str, float]) -> bool:
    return MANIFEST in keys and _DAMAGED not in keys
