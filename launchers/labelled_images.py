"""The images that a finished student is judged on, or calibrated with: of a recipe or a folder."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from launchers.display import Display
from launchers.exported import Exported
from launchers.images import find_again, images_read, index_images
from launchers.kept_recipe import kept_recipe
from launchers.machine import available_cpus
from pipelines.index import DataIndex
from pipelines.sources.folder import index_evaluated, index_folder, index_plain
from sbf_dist import recipe as recipes
from sbf_dist.errors import UserError
from sbf_dist.export.model_card import History
from sbf_dist.files import read_json
from sbf_dist.recipe import Data

_HELD_OUT = 0.1  # share of a folder's images
_INDEX = "data"  # folder in that of a run


@dataclass(frozen=True)
class View:
    """How a student sees an image: as its card, or its ONNX file, says."""

    input_shape: tuple[int, int, int]
    mean: Sequence[float]
    std: Sequence[float]
    crop: float | None


@dataclass(frozen=True)
class Images:
    """Indexed images, and how they are prepared."""

    data: Data
    index: DataIndex

    @property
    def validation(self) -> NDArray[np.int64]:
        return self.index.parts["validation"]

    @property
    def training(self) -> NDArray[np.int64]:
        """Those without the validation part; where there are no others, that part itself."""
        parts = [self.index.parts[part] for part in ("labelled", "unlabelled")]
        ids = np.sort(np.concatenate(parts))
        return ids if len(ids) else self.validation

    def seen_as(self, view: View) -> "Images":
        """Return the same images as a student sees them. UserError if it takes no RGB squares."""
        channels, height, width = view.input_shape
        if channels != 3 or height != width:
            raise UserError(
                f"the student takes images of {channels} x {height} x {width}; only RGB squares "
                "can be evaluated"
            )
        changes = {
            "image_size": height,
            "mean": tuple(view.mean),
            "std": tuple(view.std),
            "threads": available_cpus(),
        }
        if view.crop is not None:
            changes["crop"] = view.crop
        return Images(self.data.model_copy(update=changes), self.index)


def images_of_run(exported: Exported) -> Images:
    """Return the images of the run that made a student, as it has divided them."""
    assert exported.run is not None
    recipe = kept_recipe(exported.run / "recipe.json")
    folder = exported.run / _INDEX
    find_again(recipe.data, exported.run.parent, folder, recipe.seed)
    return Images(recipe.data, DataIndex.load(folder))


def history_of_run(exported: Exported) -> History:
    """Return how the run that made a student made it, for its model card."""
    assert exported.run is not None
    recipe = kept_recipe(exported.run / "recipe.json")
    index = DataIndex.load(exported.run / _INDEX)
    summary = exported.run / "summary.json"
    rows = read_json(summary).get("rows", []) if summary.is_file() else []
    return History(recipe, {part: len(ids) for part, ids in index.parts.items()}, rows)


def images_to_calibrate(place: Path, runs: Path, display: Display) -> Images:
    """Index the images of a recipe or of a folder, of which a tenth is held out for validation.

    A folder may have no classes; its val/ is the validation part if there is one. `runs`: where the
    images of embedded sets are written.
    """
    if not place.is_dir():
        return images_at(place, (), runs, display)
    progress = images_read(display)
    if any(path.is_dir() for path in place.iterdir()):
        index = index_folder(
            place, labelled_per_class=None, validation=_HELD_OUT, seed=0, progress=progress
        )
        return Images(Data(root=place), index)
    index = index_plain(place, progress=progress)
    ids = np.random.default_rng(0).permutation(index.parts["unlabelled"])
    few = max(1, round(_HELD_OUT * len(ids)))
    parts = index.parts | {
        "validation": np.sort(ids[:few]),
        "unlabelled": np.sort(ids[few:] if len(ids) > few else ids),
    }
    return Images(Data(root=place), dataclasses.replace(index, parts=parts))


def images_at(place: Path, overrides: Sequence[str], runs: Path, display: Display) -> Images:
    """Index the images of a recipe, changed by `overrides`, or of a labelled folder.

    Of a folder those of val/ are the validation part; without val/ all are. `runs`: where the
    images of embedded sets are written. Raises UserError for both as `sbf run` does.
    """
    if place.is_dir():
        if overrides:
            raise UserError(f"{overrides[0]!r}: changes a recipe, and {place} is a folder")
        return Images(Data(root=place), index_evaluated(place, progress=images_read(display)))
    recipe = recipes.load(place, overrides)
    return Images(recipe.data, index_images(recipe.data, runs, recipe.seed, display))
