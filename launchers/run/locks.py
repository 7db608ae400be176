"""What of a run depends on which keys of its recipe, and what a change of the recipe concerns."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Values = dict[str, Any]  # of keys with dots; a key that is null is not in it

DIGEST = ".sha256"  # ends the keys of digests of the files that a recipe names, see read_files
# Last parts of keys that say when something is written, what is done about a loss that is not
# finite, or by which code the same is computed: they change freely.
WITHOUT_EFFECT = ("log_every", "checkpoint_every", "profile_steps", "skip_bad_steps", "compile")
LENGTHS = ("steps", "epochs", "round_steps")
# Last parts of keys that say in how many passes the images of a step are taken. As with another
# number of workers, a training goes on with others.
PASSES = ("images_at_once", "accumulation")


@dataclass(frozen=True)
class Product:
    """Something that a stage leaves behind.

    reads      keys of the recipe that it depends on: sections by their prefix, * for any part
    needs      the products that it depends on
    files      and folders that hold it
    resumable  a training that can go on from its last checkpoint, to be longer
    decided    files that hold what was decided before its first step, which it then goes on with
    """

    name: str
    reads: tuple[str, ...]
    needs: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    resumable: bool = False
    decided: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Change:
    """A key of the recipe whose value is another one than when a product was written."""

    key: str
    before: Any
    now: Any

    @property
    def is_longer(self) -> bool:
        """Whether it is a training that is to go on longer than it did."""
        numbers = isinstance(self.before, int | float) and isinstance(self.now, int | float)
        return self.key.rpartition(".")[2] in LENGTHS and numbers and self.now > self.before

    @property
    def is_of_passes(self) -> bool:
        """Whether a step takes its images in other passes."""
        return self.key.rpartition(".")[2] in PASSES

    def going_on(self) -> str:
        """Return a line on how a training goes on with it."""
        before = "not set" if self.before is None else self.before
        with_what = (
            "other passes over the images of a step"
            if self.is_of_passes
            else f"the learning rates of a training of {self.now}"
        )
        return (
            f"{self.key} is {'not set' if self.now is None else self.now} instead of {before}: the "
            f"training resumes from its last checkpoint, with {with_what}"
        )

    def __str__(self) -> str:
        if self.key.endswith(DIGEST):
            return f"with another content of {file_of(self.key)}"
        before = (
            f"without {self.key}" if self.before is None else f"with {self.key} = {self.before!r}"
        )
        now = "does not set it" if self.now is None else f"says {self.now!r}"
        return f"{before}, the recipe {now}"


def file_of(key: str) -> str:
    """Return what messages call the file of a digest's key.

    Keys of code have the file's path after the key of the network: teachers.0.model.mine.py.
    """
    name = key.removesuffix(DIGEST)
    section, is_code, path = name.partition(".model.")
    return f"{path} (code of {section}.model)" if is_code else name


def values_of(identity: Any, key: str = "") -> Values:
    """Return the values of a recipe's identity by their keys with dots."""
    if isinstance(identity, Mapping):
        entries = list(identity.items())
    elif isinstance(identity, list) and identity and isinstance(identity[0], Mapping):
        entries = [(str(index), entry) for index, entry in enumerate(identity)]
    else:
        return {} if identity is None else {key: identity}
    found: Values = {}
    for name, value in entries:
        found |= values_of(value, f"{key}.{name}" if key else name)
    return found


def read_by(values: Mapping[str, Any], reads: Collection[str], *, all_keys: bool = False) -> Values:
    """Return the values of the keys that are read, without `all_keys` those that have an effect."""
    left_out = () if all_keys else WITHOUT_EFFECT
    return {
        key: value
        for key, value in values.items()
        if any(_reads(key, r) for r in reads) and key.rpartition(".")[2] not in left_out
    }


def digest(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of some values, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def changes(before: Mapping[str, Any], now: Mapping[str, Any], product: Product) -> list[Change]:
    """Return the changes of a recipe that concern `product` itself.

    A digest that was not noted, by an earlier version, is taken to be what it is now.
    """
    old, new = read_by(before, product.reads), read_by(now, product.reads)
    return [
        Change(key, old.get(key), new.get(key))
        for key in dict.fromkeys((*new, *old))
        if old.get(key) != new.get(key) and (key in old or not key.endswith(DIGEST))
    ]


def with_dependants(names: Iterable[str], products: Iterable[Product]) -> set[str]:
    """Return `names` and all products that depend on them; `products` in their order."""
    found = set(names)
    for product in products:
        if found & set(product.needs):
            found.add(product.name)
    return found


def _reads(key: str, pattern: str) -> bool:
    parts, wanted = key.split("."), pattern.split(".")
    return len(parts) >= len(wanted) and all(
        want in ("*", part) for part, want in zip(parts, wanted, strict=False)
    )
