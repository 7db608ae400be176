"""One worker of a run: where it stands, and what it reads images and teachers with.

Ray is imported where it is used: the driver imports this module before it has set the environment
that Ray reads.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launchers.images import shard_cache, with_embedded_images
from launchers.run.building import build_member
from launchers.run.folder import PRETRAINED, RunFolder
from launchers.run.network import Network
from launchers.run.networks import Networks
from launchers.storage.journals import JournalMirror
from pipelines.index import DataIndex
from pipelines.loader import EvalLoader
from pipelines.reader import Reader
from sbf_dist.distill.teachers import TeacherEnsemble
from sbf_dist.distill.temperature import read_temperatures
from sbf_dist.recipe import Recipe
from sbf_dist.settings import View

EVALUATION_BATCH = 128
LOGS = "logs"
# What workers read of a run, or look at.
_READ = ("data", "weights", PRETRAINED, "trainings", "plan.json", "plans")
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Context:
    """The run that this worker works on, and where it stands among all workers."""

    networks: Networks
    index: DataIndex
    rank: int
    world_size: int
    device: torch.device
    driver: str = ""  # the session of the run's folder on the driver's machine

    @property
    def recipe(self) -> Recipe:
        return self.networks.recipe

    @property
    def folder(self) -> RunFolder:
        return self.networks.folder

    @property
    def num_classes(self) -> int:
        """The outputs of all networks, one for each class of the images."""
        return len(self.index.classes)

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Context":
        from launchers.on_ray import ray_train

        folder = RunFolder.at(config["runs"], config["recipe"]["name"])
        recipe = Recipe.model_validate(config["recipe"])
        networks = Networks.of(recipe, folder).in_group(config["group"])
        labels = {folder.labels, networks.folder.labels}
        folder.fetch(*_READ, *sorted(labels), config["journals"], driver=config["driver"])
        index = DataIndex.load(folder.index)
        if folder.copy is not None:
            index = with_embedded_images(recipe.data, folder.runs, index)
        place = ray_train.place()
        return cls(
            networks=networks,
            index=index,
            rank=place.rank,
            world_size=place.world_size,
            device=place.device,
            driver=config["driver"],
        )

    def fetch(self, *parts: str) -> None:
        """Let this node have what workers on others have published."""
        self.folder.fetch(*parts, driver=self.driver)

    @contextmanager
    def mirrored(self, journals: Path) -> Iterator[None]:
        """On a machine that is not the driver's, bring what is logged there to the store."""
        copy = self.folder.copy
        if copy is None or copy.session == self.driver:
            yield
            return
        with JournalMirror(copy, (f"tracking/{journals.name}", LOGS), fetches=False):
            yield


def ensemble_of(
    here: Context, teachers: Sequence[Network] | None = None, *, fitted: bool = True
) -> TeacherEnsemble:
    """Build the teachers of the run, or some of them, on this worker's device.

    `fitted`: with their temperatures, where the recipe has them fitted; False: before that.
    """
    temperature = here.recipe.pseudo_labels.temperature
    reads = fitted and temperature == "fit"
    temperatures = read_temperatures(here.folder.temperatures) if reads else {}
    members = []
    for teacher in here.networks.teachers if teachers is None else teachers:
        member = build_member(teacher, here.index.classes)
        member.network.to(here.device)
        if temperature != "fit":
            member.temperature = temperature
        elif fitted:
            member.temperature = temperatures[member.name].temperature
        members.append(member)
    return TeacherEnsemble(
        members,
        num_classes=here.num_classes,
        dtype=torch.float16 if here.device.type == "cuda" else None,
    )


def reader(here: Context) -> Reader:
    data = here.recipe.data
    return Reader(
        here.rank,
        here.world_size,
        data.threads,
        here.device,
        cache=data.cache,
        shard_cache=shard_cache(data),
    )


def validation(here: Context, view: View) -> EvalLoader:
    return evaluation_loader(here, view, "validation")


def evaluation_loader(here: Context, view: View, part: str) -> EvalLoader:
    return EvalLoader(
        here.index,
        part,
        reader(here),
        batch_size=EVALUATION_BATCH,
        view=view,
        crop=here.recipe.data.crop,
    )
