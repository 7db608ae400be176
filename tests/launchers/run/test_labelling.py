"""Pseudo-labels by real workers, of which one is killed; and what they read and share."""

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace

import label_worker
import numpy as np
import one_worker
import pytest
import torch
from archive_makers import cifar10_python

from launchers.machine import available_cpus
from launchers.run import labelling, worker
from launchers.run.read_files import weights_digests
from pipelines.sources.preparation import prepare
from sbf_dist import models
from sbf_dist.distill import pseudo_labels, stored_labels
from sbf_dist.errors import UserError
from sbf_dist.recipe import Recipe, Workers
from sbf_dist.weights import save_weights

TRAINING = {"steps": 2, "batch_size": 8, "optimizer": {"lr": 0.01}}
VIEWS = [{}, {"image_size": 24}, {}]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> worker.Context:
    """A run on 60 images of CIFAR-10 whose three teachers, of two views, have random weights."""
    folder = tmp_path_factory.mktemp("labelling")
    cifar10_python(folder)
    prepare("cifar10", folder, folder / "set", checksum=False)
    recipe = Recipe.model_validate(
        {
            "name": "tiny",
            "data": {
                "source": "cifar10",
                "root": folder / "set",
                "image_size": 16,
                "labelled_per_class": 2,
            },
            "workers": {"count": 2, "max_lost": 1},
            "teachers": [
                {"name": f"teacher-{n}", "model": "cifar_resnet8_w4", "training": TRAINING} | view
                for n, view in enumerate(VIEWS)
            ],
            "pseudo_labels": {"top_k": 3},
            "compress": {"teacher": "teacher-0", "macs": 0.5},
            "distill": {"training": TRAINING},
        }
    )
    here = one_worker.begin(recipe, folder / "runs")
    torch.manual_seed(0)
    for teacher in here.networks.teachers:
        save_weights(models.build(teacher.model, here.num_classes), teacher.weights)
    return here


def origin(here: worker.Context) -> dict[str, object]:
    weights = weights_digests(here.networks.teachers)
    return pseudo_labels.origin(here.recipe, here.index.digest, weights)


def of_each_alone(here: worker.Context) -> tuple[torch.Tensor, torch.Tensor]:
    """What each teacher says of all images, seen in its own way: (3, 60, 10), and their mean."""
    ensemble = worker.ensemble_of(here)
    ids = labelling.labelled_ids(here.index)
    each = []
    for teacher, view in enumerate(ensemble.views):
        batches = labelling.loader_of(here, view, ids)
        each.append(
            torch.cat([ensemble.probabilities(teacher, batch["image"]) for batch in batches])
        )
    return torch.stack(each), ensemble.average(each)


@pytest.fixture
def alone(here: worker.Context, tmp_path: Path) -> worker.Context:
    """The same run with a folder of its own."""
    folder = dataclasses.replace(here.folder, runs=tmp_path)
    networks = dataclasses.replace(here.networks, folder=folder)
    return dataclasses.replace(here, networks=networks)


# --- one worker ----------------------------------------------------------------------------------


def test_all_images_get_the_ensembles_word_each_teacher_seeing_its_own_view(alone) -> None:
    one_worker.write_pseudo_labels(alone)
    stored = stored_labels.load(alone.folder.pseudo_labels, origin(alone))
    each, mean = of_each_alone(alone)
    assert stored.ids.tolist() == list(range(60))
    np.testing.assert_array_equal(stored.predicted, mean.argmax(1))
    np.testing.assert_allclose(stored.confidence, mean.max(1).values, rtol=1e-3)
    agreeing = (each.argmax(2) == mean.argmax(1)).float().mean(0)
    np.testing.assert_allclose(stored.agreement, agreeing, rtol=1e-6)


def test_images_are_decoded_once_for_all_teachers_of_a_view(alone, monkeypatch) -> None:
    loaders = []
    whole = labelling.evaluation_loader
    monkeypatch.setattr(
        labelling,
        "evaluation_loader",
        lambda here, view, part: loaders.append(view.image_size) or whole(here, view, part),
    )
    one_worker.write_pseudo_labels(alone)
    assert loaders == [16, 24]


@pytest.mark.parametrize("chunk", [1, 7, 60, 100])
def test_chunks_of_any_size_hold_the_same_and_only_those_asked_for_are_written(
    alone, monkeypatch, chunk
) -> None:
    monkeypatch.setattr(pseudo_labels, "CHUNK_IMAGES", chunk)
    monkeypatch.setattr(worker, "EVALUATION_BATCH", 8)
    chunks = dict(enumerate(pseudo_labels.chunks(labelling.labelled_ids(alone.index))))
    folder = alone.folder.pseudo_labels
    pseudo_labels.begin(folder, origin(alone))
    wanted = {number: ids for number, ids in chunks.items() if number % 3 == 0}
    written: list[int] = []
    labelling.write_chunks(alone, worker.ensemble_of(alone), wanted, written.append)
    assert written == list(wanted)
    left = pseudo_labels.missing(folder, len(chunks))
    assert left == [number for number in chunks if number % 3]
    labelling.write_chunks(alone, worker.ensemble_of(alone), {n: chunks[n] for n in left})
    labelling.finish(alone)
    stored = stored_labels.load(folder, origin(alone))
    _, mean = of_each_alone(alone)
    np.testing.assert_array_equal(stored.predicted, mean.argmax(1))
    assert len(labelling.written_chunks(alone.folder)) == len(chunks)


def test_a_teacher_whose_file_was_exchanged_makes_the_store_stale_and_is_named(alone) -> None:
    one_worker.write_pseudo_labels(alone)
    before = origin(alone)
    changed = alone.networks.teachers[1]
    other = dataclasses.replace(changed, weights=alone.folder.weights("other"))
    save_weights(models.build(changed.model, alone.num_classes), other.weights)
    weights = weights_digests([alone.networks.teachers[0], other, alone.networks.teachers[2]])
    now = pseudo_labels.origin(alone.recipe, alone.index.digest, weights)
    assert {key for key in now if now[key] != before[key]} == {"weights"}
    with pytest.raises(UserError, match="stale: they were written with weights of teacher-1 = "):
        stored_labels.load(alone.folder.pseudo_labels, now)


# --- two workers, of which one is killed ---------------------------------------------------------


@pytest.fixture(scope="module")
def killed(here: worker.Context, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The store that two workers write, one of which is killed while it writes its second chunk.

    Gives the numbers of the chunks that each process has begun, by its rank and process id; those
    of processes that ended later come later.
    """
    from launchers.on_ray.attempts import Progress, run_workers
    from launchers.on_ray.local_ray import local_ray
    from launchers.on_ray.worker_group import KeptWorkers

    diary = tmp_path_factory.mktemp("diary")
    folder = here.folder
    config = {
        "recipe": here.recipe.model_dump(mode="json", exclude={"tracking"}),
        "runs": str(folder.runs),
        "driver": "",
        "group": "pseudo-labels",
        "journals": "tracking",
        "diary": str(diary),
    }
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[3])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        with local_ray(workers=2), KeptWorkers(Workers(count=2, max_lost=1)) as kept:
            run_workers(
                label_worker.write_and_die,
                config,
                name="pseudo-labels",
                storage=folder.checkpoints,
                logs=folder.logs,
                kept=kept,
                progress=Progress(reached=lambda: labelling.written_chunks(folder)),
            )
    victim = (diary / "victim").read_text()
    in_order = sorted(diary.glob("?-*"), key=lambda path: path.stat().st_mtime_ns)
    begun = {path.name: [int(n) for n in path.read_text().split()] for path in in_order}
    return SimpleNamespace(begun=begun, victim=f"1-{victim}")


needs_two_cpus = pytest.mark.skipif(available_cpus() < 2, reason="two workers need two CPUs")


@pytest.mark.slow
@needs_two_cpus
def test_a_killed_worker_costs_the_chunks_that_were_being_written_alone(killed) -> None:
    numbers = [number for begun in killed.begun.values() for number in begun]
    done, lost = killed.begun[killed.victim]
    assert numbers.count(done) == 1
    assert numbers.count(lost) == 2
    repeated = {number for number in numbers if numbers.count(number) > 1}
    assert len(repeated) <= 2  # the other's, too: all workers are started again
    assert set(numbers) == set(range(15))


@pytest.mark.slow
@needs_two_cpus
def test_what_it_has_left_is_shared_out_over_all_workers(killed) -> None:
    assert sorted(name[0] for name in killed.begun) == ["0", "0", "1", "1"]  # two workers, twice
    # Of each rank, the process that began later: how far the first ones came is chance.
    second = [[n for n in killed.begun if n[0] == rank][-1] for rank in "01"]
    sizes = sorted(len(killed.begun[name]) for name in second)
    assert sizes[0] >= 1
    assert sizes[1] - sizes[0] <= 1


@pytest.mark.slow
@needs_two_cpus
def test_the_store_of_two_workers_is_that_of_one(killed, here, alone) -> None:
    one_worker.write_pseudo_labels(alone)
    mine = stored_labels.load(alone.folder.pseudo_labels, origin(alone))
    theirs = stored_labels.load(here.folder.pseudo_labels, origin(here))
    for name, column in mine.columns().items():
        if column.dtype.kind == "i":
            np.testing.assert_array_equal(theirs.columns()[name], column)
        else:
            np.testing.assert_allclose(theirs.columns()[name], column, atol=1e-3)
