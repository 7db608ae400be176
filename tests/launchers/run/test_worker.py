"""What of a recipe reaches the batches that a worker trains on."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import one_worker
import pytest
import torch
from archive_makers import cifar10_python

from launchers.run import locks, training, worker
from launchers.run.batches import targets, training_batches, training_images
from launchers.run.network import Network
from launchers.run.networks import Networks
from launchers.run.predictions import stored_predictions
from launchers.run.teaching import choice_for
from pipelines.loader import TrainLoader
from pipelines.reader import Reader
from pipelines.sources.preparation import prepare
from sbf_dist import models
from sbf_dist.distill.task import full_distributions
from sbf_dist.errors import UserError
from sbf_dist.recipe import Recipe
from sbf_dist.settings import Augmentation
from sbf_dist.train.checkpoint import Written
from sbf_dist.train.manifest import FORMAT, Manifest
from sbf_dist.weights import save_weights

TRAINING = {"steps": 2, "batch_size": 8, "optimizer": {"lr": 0.01}}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 with 50 training images, five of each class."""
    folder = tmp_path_factory.mktemp("cifar10")
    cifar10_python(folder)
    prepare("cifar10", folder, folder / "set", checksum=False)
    return folder / "set"


@pytest.fixture
def begin(images, tmp_path):
    """A worker of a recipe with two teachers, whose weights are random."""

    def of(targets: str = "stored", *, share: float = 0.5, root: Path = images, **data):
        augmentation = {"crop": "padded", "padding": 4} | data.pop("augmentation", {})
        recipe = Recipe.model_validate(
            {
                "name": "tiny",
                "data": {
                    "source": "cifar10",
                    "root": root,
                    "image_size": 32,
                    "labelled_per_class": 2,
                    "augmentation": augmentation,
                }
                | data,
                "teachers": [
                    {"name": name, "model": "cifar_resnet8_w4", "training": TRAINING}
                    for name in ("one", "two")
                ],
                "compress": {"teacher": "one", "macs": 0.5},
                "distill": {"targets": targets, "labelled_share": share, "training": TRAINING},
            }
        )
        here = one_worker.begin(recipe, tmp_path)
        torch.manual_seed(0)
        for teacher in here.networks.teachers:
            save_weights(models.build(teacher.model, here.num_classes), teacher.weights)
        one_worker.write_pseudo_labels(here)
        return here

    return of


def student(here: worker.Context) -> Network:
    return here.networks.student


def batches(here: worker.Context, network: Network, count: int = 2) -> list[worker.Batch]:
    """The first batches as the loader gives them."""
    loader = training_batches(here, network, here.index, 2)
    found = [{key: value.clone() for key, value in next(loader).items()} for _ in range(count)]
    loader.close()
    return found


def annotate_of(here: worker.Context, network: Network):
    return targets(here, network, choice_for(here, network), None)


# --- mixed images --------------------------------------------------------------------------------

MIXTURES = [{"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 1.0}]


def blended(values: torch.Tensor, batch: worker.Batch) -> torch.Tensor:
    share = batch["mixup_share"][:, None]
    return share * values + (1 - share) * values[batch["mixup_partner"]]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_stored_targets_are_mixed_as_the_images_are(begin, mixture):
    plain = batches(begin(), student(begin()))
    here = begin(augmentation=mixture)
    stored = stored_predictions(here)
    predicted = torch.tensor(stored.classes).long(), torch.tensor(stored.probabilities).float()
    distributions = full_distributions(*predicted, 10)
    annotate = annotate_of(here, student(here))
    for unmixed, batch in zip(plain, batches(here, student(here)), strict=True):
        assert torch.equal(batch["image"], unmixed["image"])  # until it is annotated
        known = batch["label"] >= 0
        assert known.tolist() == [True] * 4 + [False] * 4
        assert torch.equal(known, known[batch["mixup_partner"]])  # pairs of one stream
        mixed = annotate(batch)
        rows = np.searchsorted(stored.ids, batch["id"].numpy())
        assert torch.allclose(mixed["teacher"], blended(distributions[rows], batch), atol=1e-6)
        assert torch.equal(mixed["partner_label"], batch["label"][batch["mixup_partner"]])
        assert torch.equal(mixed["share"], batch["mixup_share"])
        assert not torch.equal(mixed["image"], batch["image"])
        assert mixed["image"].is_contiguous(memory_format=torch.channels_last)
        if "mixup_box" not in batch:
            flat = blended(batch["image"].flatten(1), batch)
            assert torch.allclose(mixed["image"].flatten(1), flat, atol=1e-5)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_live_teachers_see_the_mixed_images(begin, mixture):
    here = begin("live", augmentation=mixture)
    network = student(here)
    annotate = annotate_of(here, network)
    mixed = annotate(batches(here, network)[0])
    ensemble = worker.ensemble_of(here)
    assert torch.allclose(mixed["teacher"], ensemble(mixed["image"], network.view), atol=1e-6)
    assert {"share", "partner_label"} <= mixed.keys()


def test_trainings_on_labels_alone_mix_as_well(begin):
    here = begin(augmentation={"mixup": 1.0})
    teacher = here.networks.teachers[0]
    annotate = annotate_of(here, teacher)
    mixed = annotate(batches(here, teacher)[0])
    assert training_images(here, teacher) is here.index
    assert {"share", "partner_label"} <= mixed.keys()
    assert "teacher" not in mixed
    assert bool((mixed["label"] >= 0).all())  # no unlabelled image among them


@pytest.mark.parametrize("targets", ["stored", "live"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_mixed_images_are_trained_on(begin, targets, mixture):
    here = begin(targets, augmentation=mixture | {"rand_augment": 1})
    network = student(here)
    job = dataclasses.replace(network.job, start=None)
    dense = dataclasses.replace(network, job=job, plan=None)
    records = one_worker.train(here, dense)
    assert [record.step for record in records] == [1, 2]
    for record in records:
        assert set(record.parts) == {"loss", "cross_entropy", "divergence"}
        assert all(np.isfinite(value) for value in record.parts.values())
        assert record.parts["cross_entropy"] > 0


# --- the other settings --------------------------------------------------------------------------


def test_random_operations_are_those_that_the_recipe_asks_for(begin):
    strong = {"rand_augment": 2, "magnitude": 15}
    here = begin(augmentation=strong)
    teacher = here.networks.teachers[0]
    (batch,) = batches(here, teacher, 1)
    loader = TrainLoader(
        here.index,
        ["labelled"],
        Reader(),
        batch_size=8,
        view=here.recipe.data.view,
        augmentation=Augmentation(crop="padded", padding=4, **strong),
        seed=teacher.job.seed,
    )
    assert torch.equal(batch["image"], next(loader)["image"])
    loader.close()
    (plain,) = batches(begin(), teacher, 1)
    assert torch.equal(batch["id"], plain["id"])
    assert not torch.equal(batch["image"], plain["image"])


@pytest.mark.parametrize(
    ("share", "mixture", "labelled"),
    [(0.5, {}, 4), (0.125, {}, 1), (0.01, {}, 1), (0.0, {}, 0), (1.0, {}, 8), (0.99, {}, 7),
     (0.125, {"mixup": 1.0}, 2), (0.99, {"cutmix": 1.0}, 6), (0.5, {"mixup": 1.0}, 4)],
)  # fmt: skip
def test_a_batch_has_its_share_of_labelled_images(begin, share, mixture, labelled):
    here = begin(share=share, augmentation=mixture)
    for batch in batches(here, student(here)):
        assert (batch["label"] >= 0).tolist() == [True] * labelled + [False] * (8 - labelled)


def test_where_no_image_is_without_a_label_all_of_a_batch_has_one(begin):
    here = begin(share=0.25, labelled_per_class=None)
    (batch,) = batches(here, student(here), 1)
    assert len(batch["label"]) == 8
    assert bool((batch["label"] >= 0).all())


def test_two_workers_share_the_batch_of_one(begin):
    here = begin(augmentation={"mixup": 1.0})
    network = student(here)
    (alone,) = batches(here, network, 1)
    halves = [
        batches(dataclasses.replace(here, rank=rank, world_size=2), network, 1)[0]
        for rank in (0, 1)
    ]
    for half in halves:
        assert (half["label"] >= 0).tolist() == [True] * 2 + [False] * 2
    for key in ("id", "mixup_share"):
        together = torch.cat(
            [half[key][part] for part in (slice(2), slice(2, 4)) for half in halves]
        )
        assert torch.equal(together, alone[key])


def test_images_that_are_held_in_memory_are_read_once(begin, images, tmp_path):
    for cache in ("none", "memory"):
        root = shutil.copytree(images, tmp_path / cache)
        here = begin(root=root, cache=cache)
        loader = training_batches(here, student(here), here.index, 2)
        next(loader)
        shutil.rmtree(root)
        if cache == "memory":
            assert all(next(loader)["image"].isfinite().all() for _ in range(10))
        else:
            with pytest.raises(UserError, match="was removed after it was indexed"):
                for _ in range(10):
                    next(loader)
        loader.close()


def test_images_of_which_the_teachers_are_unsure_are_left_out(begin):
    here = begin("live")
    settings = here.recipe.pseudo_labels.model_copy(update={"per_class": 1})
    recipe = here.recipe.model_copy(update={"pseudo_labels": settings})
    chooser = dataclasses.replace(here, networks=Networks.of(recipe, here.folder))
    index = training_images(chooser, student(here))
    assert 0 < len(index.parts["unlabelled"]) < len(here.index.parts["unlabelled"])
    assert np.array_equal(index.parts["labelled"], here.index.parts["labelled"])


def test_classes_without_an_image_are_named_and_an_empty_choice_is_an_error(begin, caplog):
    here = begin("live")
    highest = stored_predictions(here).take(here.index.parts["unlabelled"]).confidence.max()

    def chooser(threshold: float) -> worker.Context:
        settings = here.recipe.pseudo_labels.model_copy(update={"threshold": threshold})
        recipe = here.recipe.model_copy(update={"pseudo_labels": settings})
        return dataclasses.replace(here, networks=Networks.of(recipe, here.folder))

    training_images(chooser(float(highest) - 1e-4), student(here))
    predicted = stored_predictions(here).take(here.index.parts["unlabelled"]).classes[:, 0]
    never = sorted(set(range(10)) - set(predicted.tolist()))
    names = ", ".join(repr(here.index.classes[number]) for number in never)
    assert f"the teachers predict {names} for no image without a label" in caplog.text
    with pytest.raises(
        UserError, match=f"leaves none of 30 .* highest confidence is {highest:.3g}"
    ):
        training_images(chooser(float(highest) + 1e-4), student(here))


@pytest.mark.parametrize("kind", ["stored", "live"])
def test_targets_are_sharpened(begin, kind):
    here = begin(kind)
    plain = annotate_of(here, student(here))(batches(here, student(here), 1)[0])["teacher"]
    settings = here.recipe.pseudo_labels.model_copy(update={"sharpening": 0.5})
    recipe = here.recipe.model_copy(update={"pseudo_labels": settings})
    sharp = dataclasses.replace(here, networks=Networks.of(recipe, here.folder))
    found = annotate_of(sharp, student(here))(batches(here, student(here), 1)[0])["teacher"]
    torch.testing.assert_close(found, plain**2 / (plain**2).sum(1, keepdim=True))


# --- checkpoints ---------------------------------------------------------------------------------


def checkpoint_of(folder: Path, digests: dict[str, str], **reads: object) -> Path:
    manifest = Manifest(format=FORMAT, step=1, world_size=1, digests=digests, files={})
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    by = Written(zero_stage=1, optimizer="SGD", shapes={}, reads=reads)
    (folder / "ranks").mkdir(exist_ok=True)
    state = {"loader": {}, "written": by.model_dump()} if reads else {"loader": {}}
    (folder / "ranks" / "00000.json").write_text(json.dumps(state))
    return folder


def test_a_checkpoint_depends_on_what_its_training_reads_alone(begin, tmp_path, monkeypatch):
    here = begin()
    plan = SimpleNamespace(digest=lambda: "p1")
    monkeypatch.setattr(training.Plan, "load", lambda path: plan)
    teacher, student = here.networks.teachers[0], here.networks.student
    settings = here.recipe.compress.model_copy(update={"macs": 0.25})
    recipe = here.recipe.model_copy(update={"compress": settings})
    smaller = dataclasses.replace(here, networks=Networks.of(recipe, here.folder))
    assert training.digests(smaller, teacher) == training.digests(here, teacher)
    assert training.digests(here, student) != training.digests(here, teacher)
    folder = checkpoint_of(tmp_path, training.digests(here, teacher))
    assert training.saved_digests(smaller, teacher, folder) == training.digests(here, teacher)
    assert training.digests(here, student)["plan"] == "p1"
    before = dict(training.digests(here, student))
    folder = checkpoint_of(tmp_path, before)
    assert training.saved_digests(here, student, folder) == before
    del before["plan"]
    folder = checkpoint_of(tmp_path, before)
    assert training.saved_digests(here, student, folder) == before


def test_a_checkpoint_of_the_version_before_depends_on_the_whole_recipe(begin, tmp_path):
    here = begin()
    teacher = here.networks.teachers[0]
    whole = training.digests(here, teacher) | {"recipe": here.recipe.digest()}
    folder = checkpoint_of(tmp_path, whole)
    assert training.saved_digests(here, teacher, folder) == whole
    recipe = here.recipe.model_copy(update={"seed": 9})
    other = dataclasses.replace(here, networks=Networks.of(recipe, here.folder))
    assert training.saved_digests(other, teacher, folder) != whole


def test_a_checkpoint_fits_where_all_that_has_changed_since_is_free_to_change(begin, tmp_path):
    here = begin()
    teacher = here.networks.teachers[0]

    def with_training(**changes: object) -> worker.Context:
        one, two = here.recipe.teachers
        settings = one.training.model_copy(update=changes)
        changed = [one.model_copy(update={"training": settings}), two]
        recipe = here.recipe.model_copy(update={"teachers": changed})
        return dataclasses.replace(here, networks=Networks.of(recipe, here.folder))

    free = with_training(skip_bad_steps=3, compile=True, images_at_once=4, steps=9)
    now = training.digests(here, teacher)
    assert training.digests(free, free.networks.teachers[0]) == now
    # A version before had all keys but those that say when something is written.
    reads = locks.read_by(locks.values_of(free.recipe.identity()), teacher.reads)
    assert "teachers.0.training.batch_size" in reads
    reads |= {"teachers.0.training.skip_bad_steps": 1, "teachers.0.training.accumulation": 2}
    before = now | {"recipe": locks.digest(reads)}
    folder = checkpoint_of(tmp_path, before, **reads)
    assert training.saved_digests(here, teacher, folder) == before
    assert training.saved_digests(free, free.networks.teachers[0], folder) == before
    other = with_training(batch_size=16)
    assert training.saved_digests(other, other.networks.teachers[0], folder) != before
