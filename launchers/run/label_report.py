"""The report on a run's pseudo-labels: figures and a picture beside the store."""

from pathlib import Path
from typing import Any

import numpy as np

from launchers.kept_recipe import kept_recipe
from launchers.run.folder import RunFolder
from pipelines.index import DataIndex
from sbf_dist.distill import stored_labels
from sbf_dist.distill.pseudo_labels import MANIFEST
from sbf_dist.distill.selection import choose
from sbf_dist.distill.stored_labels import StoredLabels
from sbf_dist.errors import UserError
from sbf_dist.files import replacing, write_json
from sbf_dist.report.labels import describe
from sbf_dist.report.labels_chart import draw_labels

Report = dict[str, Any]


def files(folder: RunFolder) -> tuple[Path, Path]:
    """Return the files of a run's report: the picture, and the figures as JSON."""
    return folder.pseudo_labels / "report.png", folder.pseudo_labels / "report.json"


def write(folder: RunFolder, stored: StoredLabels, index: DataIndex, chosen: np.ndarray) -> Report:
    """Write and return the report; `chosen` are the images without labels that are used."""
    manifest = stored_labels.read_manifest(folder.pseudo_labels)
    report = describe(
        stored,
        index.parts,
        index.classes,
        _teachers(manifest),
        labels=index.labels,
        used=chosen,
    )
    picture, figures = files(folder)
    draw(report, picture)
    write_json(figures, report)
    return report


def draw(report: Report, path: Path) -> None:
    """Write the picture of a report."""
    with replacing(path) as partial:
        draw_labels(report).savefig(partial, dpi=110, format="png")


def of_place(place: Path) -> Report:
    """Return the report on the pseudo-labels of a run's folder, or of a store's, as they are now.

    Of a store without a run, all images count alike and none is known to be right. UserError where
    there is no complete store.
    """
    store = place if (place / MANIFEST).exists() else place / "pseudo-labels"
    if not store.is_dir():
        raise UserError(f"folder {place} has no pseudo-labels: give a run's folder, or a store's")
    stored = stored_labels.read(store)
    manifest = stored_labels.read_manifest(store)
    run = RunFolder(store.absolute().parent.parent, store.absolute().parent.name)
    if not (run.index / "index.json").exists():
        if "classes" not in manifest:
            raise UserError(
                f"pseudo-labels {store}: were written by an older version, without the classes; "
                "give the folder of their run"
            )
        everything = {"all": stored.ids}
        return describe(stored, everything, manifest["classes"], _teachers(manifest))
    index = DataIndex.load(run.index)
    if index.digest != manifest["origin"].get("data"):
        raise UserError(
            f"pseudo-labels {store}: belong to other images than the index in {run.index}; write "
            "them again (--again pseudo-labels)"
        )
    # A store of format 1 has no validation images.
    parts = {part: np.intersect1d(ids, stored.ids) for part, ids in index.parts.items()}
    return describe(
        stored,
        parts,
        index.classes,
        _teachers(manifest),
        labels=index.labels,
        used=_chosen(run, stored, parts["unlabelled"]),
    )


def _teachers(manifest: dict[str, Any]) -> list[str]:
    return list(manifest.get("teachers", []))


def _chosen(run: RunFolder, stored: StoredLabels, ids: np.ndarray) -> np.ndarray | None:
    """Return the images that the run's recipe uses; None where it has none yet."""
    if not run.recipe.exists():
        return None
    return choose(stored, ids, kept_recipe(run.recipe).pseudo_labels)
