"""The page on runs: what their folders hold, whatever is missing, and writing it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from launchers.images import evaluation_images, with_embedded_images
from launchers.kept_recipe import kept_recipe
from launchers.run import label_report
from launchers.run.building import build_network
from launchers.run.folder import RunFolder
from launchers.run.network import Network
from launchers.run.networks import ONE_SHOT, STUDENT, Networks
from launchers.run.stages import STAGES
from pipelines.index import UNKNOWN, DataIndex
from sbf_dist.compression.plan import Plan, SBFLayer
from sbf_dist.distill.pseudo_labels import MANIFEST
from sbf_dist.errors import UserError
from sbf_dist.files import read_json, write_text
from sbf_dist.models import is_user_code
from sbf_dist.object_storage import is_address
from sbf_dist.report import confusion
from sbf_dist.report.contents import (
    Example,
    Layers,
    Missing,
    Predictions,
    RunContents,
    Stage,
)
from sbf_dist.report.curve_charts import read_curves
from sbf_dist.report.layer_views import chosen_layers, view_layers
from sbf_dist.report.page import MOST_RUNS, render
from sbf_dist.surgery import in_eval_mode

IMAGES = 1000  # of the validation part that are classified for the page
_EXAMPLES = 24
_BATCH = 64
_VERSION = "version."
_COMMIT, _DIRTY = "mlflow.source.git.commit", "git.dirty"


@dataclass(frozen=True)
class Request:
    """What is wanted of each run.

    layers    converted layers to look into; none: some are chosen
    images    validation images that are classified, at most
    own_code  whether networks that are the user's own code may be built
    """

    layers: Sequence[str] = ()
    images: int = IMAGES
    own_code: bool = False


def write_page(folders: Mapping[str, RunFolder], out: Path, request: Request) -> None:
    """Write the page on runs, by what each is called.

    UserError for a folder that is no run, and for more runs than a page has letters for.
    """
    if len(folders) > MOST_RUNS:
        raise UserError(f"{len(folders)} runs: at most {MOST_RUNS} fit on one page")
    write_text(out, render([contents_of(place, run, request) for place, run in folders.items()]))


def contents_of(place: str, folder: RunFolder, request: Request) -> RunContents:
    """Return what there is of a run, and why the rest is missing."""
    if not (folder.root / "stages").is_dir() and not folder.recipe.exists():
        raise UserError(
            f"run {place}: has neither recipe.json nor stages/; give the folder of a run, RUNS/NAME"
        )
    return _Reader(place, folder, request).contents()


class _Reader:
    """Reads one run; each part raises UserError where it is not there."""

    def __init__(self, place: str, folder: RunFolder, request: Request) -> None:
        self.place, self.folder, self.request = place, folder, request

    def contents(self) -> RunContents:
        identity = self._part(lambda: read_json(self._recipe_file()))
        compressed = None
        if not isinstance(identity, Missing):
            compressed = identity.get("compress", {}).get("teacher")
        return RunContents(
            name=self._name,
            place=self.place,
            rows=self._part(self._rows),
            compressed=compressed,
            students=(ONE_SHOT, STUDENT, *self._self_trained()),
            plan=self._part(lambda: self._plan),
            layers=self._part(self._layers),
            curves=self._part(self._curves),
            labels=self._part(self._labels),
            predictions=self._part(self._predictions),
            recipe=identity,
            stages=[self._stage(stage.name) for stage in STAGES],
        )

    @property
    def _name(self) -> str:
        if is_address(self.place):
            return self.place.rstrip("/").rpartition("/")[2]
        return self.folder.name

    def _recipe_file(self) -> Path:
        """Return the file of the run's recipe; UserError before there is one."""
        if not self.folder.recipe.exists():
            raise UserError("The run has no recipe.json yet: it is written after the first stage.")
        return self.folder.recipe

    @cached_property
    def _networks(self) -> Networks:
        return Networks.of(kept_recipe(self._recipe_file()), self.folder)

    def _self_trained(self) -> list[str]:
        networks = self._part(lambda: self._networks)
        if isinstance(networks, Missing):
            return []
        return [network.name for network in networks.self_trained]

    @cached_property
    def _index(self) -> DataIndex:
        if not (self.folder.index / "index.json").exists():
            raise UserError("The images are not known yet: the stage prepare is not done.")
        index = DataIndex.load(self.folder.index)
        if isinstance(index.root, Path) and not index.root.is_dir():
            index = with_embedded_images(self._networks.recipe.data, self.folder.runs, index)
        if isinstance(index.root, Path) and not index.root.is_dir():
            raise UserError(f"The images are no longer in {index.root}.")
        return index

    @cached_property
    def _plan(self) -> Plan:
        """The plan of the student: of the last round that has one."""
        rounds = sorted(self.folder.root.glob("plans/round-*.json"), key=_number)
        path = rounds[-1] if rounds else self.folder.plan
        if not path.exists():
            raise UserError("There is no plan yet: the stage compress is not done.")
        return Plan.load(path)

    def _rows(self) -> list[dict[str, Any]]:
        for path in (self.folder.summary, self.folder.result("evaluate")):
            if path.exists():
                return read_json(path)["rows"]
        raise UserError("No network has been measured yet: the stage evaluate is not done.")

    def _curves(self) -> Any:
        curves = read_curves(self.folder.root / self.folder.tracking.stem)
        if not curves:
            raise UserError(
                "No training has logged metrics, or the run was made by an older version without "
                "journals."
            )
        return curves

    def _labels(self) -> dict[str, Any]:
        if not (self.folder.pseudo_labels / MANIFEST).exists():
            raise UserError("They are not written yet: the stage pseudo-labels is not done.")
        _, figures = label_report.files(self.folder)
        if figures.exists():
            return read_json(figures)
        self._recipe_file()  # which is read there, too
        return label_report.of_place(self.folder.root)  # of an earlier version

    def _layers(self) -> Layers:
        networks = self._networks
        rounds = [one for one in networks.rounds if one.plan.exists()]
        fitted = rounds[-1].fitted if rounds else networks.one_shot
        plan = self._plan
        names = self._chosen(plan)
        if not names:
            raise UserError("The plan converts no layer.")
        dense, converted = (self._build(n) for n in (networks.compressed, fitted))
        image = self._part(self._first_image)
        seen = None if isinstance(image, Missing) else image
        return Layers(
            network=fitted.title,
            views=view_layers(dense, converted, plan, names, seen),
            picture=image if isinstance(image, Missing) else self._photos(image)[0],
        )

    def _chosen(self, plan: Plan) -> list[str]:
        converted = [n for n, layer in plan.layers.items() if isinstance(layer, SBFLayer)]
        for name in self.request.layers:
            if name not in converted:
                raise WrongLayerError(
                    f"--layer {name}: is not a converted layer of {self.place}; converted are: "
                    f"{', '.join(converted) or 'none'}"
                )
        return list(self.request.layers) or chosen_layers(plan)

    def _predictions(self) -> Predictions:
        networks, index = self._networks, self._index
        candidates = (*reversed(networks.self_trained), networks.student, networks.one_shot)
        network = next((n for n in candidates if n.weights.exists()), None)
        if network is None:
            raise UserError("There is no student yet: the stage compress is not done.")
        validation = index.parts["validation"]
        validation = validation[index.labels[validation] != UNKNOWN]
        if not len(validation):
            raise UserError("The run has no validation images.")
        draw = np.random.default_rng(0)
        ids = np.sort(
            draw.choice(validation, min(self.request.images, len(validation)), replace=False)
        )
        labels, classes = index.labels[ids], len(index.classes)
        predicted, confidence = self._classify(self._build(network), ids)
        counts = confusion.count(labels, predicted, classes)
        wrong = confusion.worst_images(labels, predicted, confidence, counts, _EXAMPLES)
        shown = self._photos(self._images(ids[wrong])) if wrong else []
        return Predictions(
            network=network.title,
            classes=index.classes,
            counts=counts,
            images=len(ids),
            available=len(validation),
            examples=[
                Example(int(labels[i]), int(predicted[i]), float(confidence[i]), photo)
                for i, photo in zip(wrong, shown, strict=True)
            ],
        )

    @torch.inference_mode()
    def _classify(
        self, model: nn.Module, ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the class that a network names for each image, and its probability."""
        answers = [
            model(self._images(ids[start : start + _BATCH])).softmax(1).max(1)
            for start in range(0, len(ids), _BATCH)
        ]
        return (
            torch.cat([answer.indices for answer in answers]).numpy(),
            torch.cat([answer.values for answer in answers]).numpy(),
        )

    def _build(self, network: Network) -> nn.Module:
        if is_user_code(network.model) and not self.request.own_code:
            raise UserError(
                f"The network {network.model} is your own code, which this command does not run. "
                "The report that a run writes at its end has this part."
            )
        if not network.weights.exists():
            raise UserError(f"There are no weights of {network.name} yet.")
        return in_eval_mode(build_network(network, len(self._index.classes), network.weights))

    def _first_image(self) -> Tensor:
        return self._images(self._index.parts["validation"][:1])

    def _images(self, ids: NDArray[np.int64]) -> Tensor:
        return evaluation_images(self._networks.recipe.data, self._index, ids)

    def _photos(self, images: Tensor) -> list[NDArray[np.uint8]]:
        """Return images as a person sees them: (H, W, 3) each."""
        view = self._networks.recipe.data.view
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (view.mean, view.std))
        pixels = (255 * (images * std + mean)).round().clamp(0, 255).to(torch.uint8)
        return list(pixels.permute(0, 2, 3, 1).numpy())

    def _stage(self, name: str) -> Stage:
        path = self.folder.result(name)
        if not path.exists():
            return Stage(name, False, None, {})
        result = self.folder.read_result(name)
        versions = {
            key.removeprefix(_VERSION): value
            for key, value in result.items()
            if key.startswith(_VERSION)
        }
        if _COMMIT in result:
            changed = " with changes" if result.get(_DIRTY) == "true" else ""
            versions["commit of SBF-Dist"] = f"{result[_COMMIT]}{changed}"
        return Stage(name, True, result.get("seconds"), versions)

    def _part(self, read: Callable[[], Any]) -> Any:
        """Return a part of the run, or Missing with the reason."""
        try:
            return read()
        except WrongLayerError:
            raise
        except UserError as error:
            # Of a run in an object store, the folder is a copy that is gone soon.
            return Missing(str(error).replace(str(self.folder.root), self.place))


class WrongLayerError(UserError):
    """A layer that was asked for by name is not there: a mistake, and nothing that is missing."""


def _number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])
