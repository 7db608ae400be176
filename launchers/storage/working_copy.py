"""The copy of a run on a machine, and the run in an object store, which is the truth.

All that works on a run works on files of the copy. What makes a difference between them is looked
up in a record, as Git does in its index: size and time of each file, and of its object, when they
were last the same. Checkpoints are not copied, see launchers/on_ray/stored_checkpoints.py.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path

from sbf_dist.errors import UserError
from sbf_dist.files import cache_folder, write_json
from sbf_dist.object_storage import ObjectFolder, StoredObject, StoreUnreachableError
from sbf_dist.patience import patiently

CHECKPOINTS = "checkpoints"
LOCK = ".lock"
_WRITER = ".writer"  # which copy has last been the driver's
_RECORD = ".stored.json"
_ALONE = ".stored.lock"
_AT_ONCE = 8  # files on their way
# What counts only with what comes before it is published later, and removed earlier.
_ORDER = (
    "tracking/*",
    "tracking.json",
    "pseudo-labels/origin.json",
    "plan*",
    "*",
    "data/index.json",
    "pseudo-labels/manifest.json",
    "trainings/*",
    "stages/*",
    "read-files.json",
    "recipe.json",
)
_OLD_INDEX = "data/samples-*"  # removed once the new one is there

_log = logging.getLogger(__name__)


def cached(kind: str, address: str) -> Path:
    """Return this machine's folder for copies, of some kind, of what is at an address."""
    digest = hashlib.sha256(address.rstrip("/").encode()).hexdigest()
    return cache_folder() / kind / digest[:16]


_File = tuple[int, int]  # size, and time of the last change


@dataclass
class _Record:
    """What is known of a copy.

    id       of this copy
    session  of the driver that works on it, or did last
    files    local file and object, by name, when they were last the same
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    session: str = ""
    files: dict[str, tuple[_File, _File]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> "_Record":
        """Read a record; one that is missing or damaged knows nothing."""
        try:
            found = json.loads(path.read_text())
            files = {
                str(name): ((int(a), int(b)), (int(c), int(d)))
                for name, ((a, b), (c, d)) in found["files"].items()
            }
            return cls(str(found["id"]), str(found["session"]), files)
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
            return cls()

    def save(self, path: Path) -> None:
        write_json(path, {"id": self.id, "session": self.session, "files": self.files})


def _nothing_forbids() -> None:
    """Let everything be written: what workers do, they do for their driver."""


@dataclass(frozen=True)
class WorkingCopy:
    """The copy `root` of the run in `store`; `guard` raises where this process must not write.

    Methods wait for a store that does not answer as `patiently` does; those that end in _once do
    not. All raise UserError where the store refuses.
    """

    root: Path
    store: ObjectFolder
    guard: Callable[[], None] = _nothing_forbids

    @classmethod
    def of(cls, runs: str, name: str) -> "WorkingCopy":
        """Return this machine's copy of the run `name` at the address `runs`."""
        return cls(cached("runs", runs) / name, ObjectFolder.at(runs).child(name))

    # --- the driver ---

    def take_over(self) -> None:
        """Make the copy equal to the store, for a driver that has the lock.

        What this copy alone has stays, and is published, if no other copy has been a driver's
        since: the store did not take it then.
        """

        def work() -> bool:
            with self._alone() as record:
                record.session = uuid.uuid4().hex
                try:
                    own = self.store.read(_WRITER).decode() == record.id
                except FileNotFoundError:  # a new run, or one that was removed
                    own = False
            self.fetch_once(discard=not own)
            if not own:
                self.guard()
                self.store.write(_WRITER, self.id.encode())
            return own

        if patiently(work):
            self.publish()

    @property
    def id(self) -> str:
        """Which copy this is."""
        with self._alone() as record:
            return record.id

    @property
    def session(self) -> str:
        """Which driver works on this copy."""
        return _Record.load(self.root / _RECORD).session

    def remove(self, path: Path) -> None:
        """Remove a file or folder from the store, and from the copy then."""
        name = self._name(path)

        def work() -> None:
            with self._alone() as record:
                self.guard()
                if self.store.find(name) is not None:
                    self.store.remove(name)
                else:
                    # Checkpoints' manifests first: what is cut in the middle is none.
                    for key in self.store.objects(name):
                        if key.endswith("/manifest.json"):
                            self.store.remove(key)
                    self.store.remove_all(name)
                gone = [n for n in record.files if _is_within(n, (name,))]
                for one in gone:
                    del record.files[one]

        patiently(work)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def has(self, path: Path) -> bool:
        """Whether the store has a file or folder of the run."""
        name = self._name(path)
        return patiently(
            lambda: self.store.find(name) is not None or bool(self.store.objects(name))
        )

    def names_in(self, path: Path) -> set[str]:
        """Return the names of the files and folders that a folder of the run has in the store."""
        start = f"{self._name(path)}/"
        found = patiently(lambda: self.store.objects(start.rstrip("/")))
        return {key.removeprefix(start).partition("/")[0] for key in found if key.startswith(start)}

    # --- everybody ---

    def publish(self, *parts: str) -> None:
        """Let the store have what has changed in the copy, or in some files and folders of it."""
        patiently(lambda: self.publish_once(*parts))

    def fetch(self, *parts: str, discard: bool = False) -> None:
        """Let the copy, or a part of it, have what has changed in the store.

        discard: what has changed in the copy alone is replaced, or removed.
        """
        patiently(lambda: self.fetch_once(*parts, discard=discard))

    def publish_once(self, *parts: str) -> None:
        """As publish(), in one try."""
        with self._alone() as record:
            here = self._files(parts)
            changed = [n for n, file in here.items() if record.files.get(n, (None,))[0] != file]
            gone = [n for n in record.files if _is_within(n, parts) and n not in here]
            if not changed and not gone:
                return
            self.guard()
            at_last = [name for name in gone if fnmatchcase(name, _OLD_INDEX)]
            for name in sorted(set(gone) - set(at_last), key=_order, reverse=True):
                self._remove_object(record, name)
            for _, group in groupby(sorted(changed, key=_order), key=_order):
                self._each(group, lambda name: self._put(record, name, here[name]))
            for name in at_last:
                self._remove_object(record, name)

    def fetch_once(self, *parts: str, discard: bool = False) -> None:
        """As fetch(), in one try."""
        with self._alone() as record:
            there = {
                name: _as_file(found)
                for name, found in self.store.objects().items()
                if _is_copied(name) and _is_within(name, parts)
            }
            here = self._files(parts)
            known = {n: files for n, files in record.files.items() if _is_within(n, parts)}
            wanted: list[str] = []
            left: list[str] = []
            given_up: list[str] = []
            for name in {**there, **here, **known}:
                own, stored = known.get(name, (None, None))
                changed_here = here.get(name) != own
                if there.get(name) == stored and not (discard and changed_here):
                    continue
                (wanted if name in there else left).append(name)
                if changed_here and name in here and name in known:
                    given_up.append(name)
            if discard and given_up:
                _log.warning(
                    "%s: %d local files that %s does not have are discarded, as another machine "
                    "has continued the run: %s",
                    self.root,
                    len(given_up),
                    self.store.address,
                    given_up[0],
                )
            for name in left:
                (self.root / name).unlink(missing_ok=True)
                record.files.pop(name, None)
            for _, group in groupby(sorted(wanted, key=_order), key=_order):
                self._each(group, lambda name: self._get(record, name, there[name]))

    def stored_sizes(self) -> dict[str, int]:
        """Return how many bytes of each file the store is known to have, by name."""
        record = _Record.load(self.root / _RECORD)
        return {name: stored[0] for name, (_, stored) in record.files.items()}

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _files(self, parts: tuple[str, ...]) -> dict[str, _File]:
        """Return size and time of all files of the copy, or a part of it, by name."""
        found = {}
        for folder, folders, names in os.walk(self.root):
            own = Path(folder)
            at_root = own == self.root
            folders[:] = [n for n in folders if n[0] != "." and not (at_root and n == CHECKPOINTS)]
            for name in (self._name(own / n) for n in names if n[0] != "."):
                if _is_within(name, parts):
                    with suppress(FileNotFoundError):  # removed by somebody in the meantime
                        state = (self.root / name).stat()
                        found[name] = (state.st_size, state.st_mtime_ns)
        return found

    def _put(self, record: _Record, name: str, file: _File) -> None:
        try:
            self.store.put(self.root / name, name)
        except FileNotFoundError:
            return  # removed by somebody in the meantime
        found = self.store.find(name)
        if found is None:
            raise StoreUnreachableError(
                f"{self.store.address}/{name}: was removed by another process"
            )
        # The file's state before: what has been written to it since is published next time.
        record.files[name] = (file, _as_file(found))

    def _get(self, record: _Record, name: str, stored: _File) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.store.fetch(name, path)
        except FileNotFoundError as error:
            raise StoreUnreachableError(
                f"{self.store.address}/{name}: was removed while it was fetched"
            ) from error
        state = path.stat()
        if state.st_size != stored[0]:
            raise StoreUnreachableError(
                f"{self.store.address}/{name}: has changed while it was fetched"
            )
        record.files[name] = ((state.st_size, state.st_mtime_ns), stored)

    def _remove_object(self, record: _Record, name: str) -> None:
        self.store.remove(name)
        del record.files[name]

    @staticmethod
    def _each(names: Iterable[str], work: Callable[[str], None]) -> None:
        """Do work(name) for all names, some at once; raises the first error, after all."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for done in [pool.submit(work, name) for name in names]:
                done.result()

    @contextmanager
    def _alone(self) -> Iterator[_Record]:
        """Give the record to one process, and thread, at a time; it is kept, whatever happens."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            file = (self.root / _ALONE).open("w")
        except OSError as error:
            raise UserError(
                f"working copy {self.root}: cannot be written ({error.strerror}); set "
                "SBF_DIST_CACHE to another folder"
            ) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            path = self.root / _RECORD
            record = _Record.load(path)
            before = (record.id, record.session, dict(record.files))
            try:
                yield record
            except StoreUnreachableError:
                raise
            except OSError as error:
                raise UserError(f"working copy {self.root}: {error.strerror or error}") from error
            finally:
                if not path.exists() or before != (record.id, record.session, record.files):
                    record.save(path)


def is_plain(name: str) -> bool:
    """Whether the name of an object is safe as that of a file: neither hidden nor leading out."""
    return all(part and not part.startswith(".") for part in name.split("/"))


def _is_copied(name: str) -> bool:
    return is_plain(name) and not _is_within(name, (CHECKPOINTS,))


def _is_within(name: str, parts: tuple[str, ...]) -> bool:
    """Whether a name is one of `parts`, or in a folder that is; of no parts: always."""
    return not parts or any(name == part or name.startswith(f"{part}/") for part in parts)


def _order(name: str) -> int:
    """Return when a name is published: the place of the pattern, * only if no other fits."""
    fitting = [place for place, pattern in enumerate(_ORDER) if fnmatchcase(name, pattern)]
    others = [place for place in fitting if _ORDER[place] != "*"]
    return others[0] if others else fitting[0]


def _as_file(found: StoredObject) -> _File:
    return (found.size, int(found.modified))  # to the second, as stores tell it in some answers
