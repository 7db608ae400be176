from pathlib import Path

import pytest

from launchers import networks
from launchers.layout import RunFolder
from sbf_dist import recipe
from sbf_dist.recipe import Recipe
from sbf_dist.settings import View

CONTENT = {
    "name": "tiny",
    "seed": 7,
    "data": {"source": "digits", "image_size": 16, "mean": [0.1, 0.2, 0.3]},
    "teachers": [
        {"name": "one", "model": "cifar_resnet8", "training": {"steps": 10}},
        {
            "name": "two",
            "model": "cifar_resnet14",
            "weights": "/given/two.safetensors",
            "image_size": 32,
            "std": [0.5, 0.6, 0.7],
        },
        {"name": "three", "model": "cifar_resnet20", "training": {"steps": 30}},
    ],
    "compress": {"teacher": "three", "macs": 0.5},
    "distill": {"training": {"steps": 40}, "label_weight": 0.3, "labelled_share": 0.2},
    "baselines": {"steps": 50},
}
RUN = RunFolder(Path("/runs"), "tiny")


def made(**changes) -> Recipe:
    return Recipe.model_validate(CONTENT | changes)


def test_a_teacher_with_weights_is_not_trained_and_the_dense_baseline_is():
    jobs = networks.teacher_jobs(made())
    assert [(job.name, job.model, job.training.steps) for job in jobs] == [
        ("one", "cifar_resnet8", 10),
        ("three", "cifar_resnet20", 30),
        ("dense-labels", "cifar_resnet20", 50),
    ]
    assert {job.targets for job in jobs} == {"labels"}
    assert not any(job.planned or job.start_from for job in jobs)


def test_every_training_has_a_seed_of_its_own_that_follows_the_recipes():
    seeds = [job.seed for job in networks.teacher_jobs(made())]
    assert seeds == [7, 9, 10]
    assert [job.seed for job in networks.teacher_jobs(made(seed=0))] == [0, 2, 3]


def test_students_start_from_the_one_shot_network_and_differ_in_their_targets():
    distilled, labels = networks.distill_jobs(made())
    assert (distilled.name, labels.name) == ("sbf-distilled", "sbf-labels")
    for job in (distilled, labels):
        assert job.planned
        assert job.start_from == "sbf-one-shot"
        assert job.model == "cifar_resnet20"
        assert job.view == View(image_size=16, mean=(0.1, 0.2, 0.3), std=(0.229, 0.224, 0.225))
    assert (distilled.targets, labels.targets) == ("stored", "labels")
    assert (distilled.label_weight, distilled.labelled_share) == (0.3, 0.2)
    assert (distilled.training.steps, labels.training.steps) == (40, 50)


def test_live_targets_are_passed_on():
    distill = CONTENT["distill"] | {"targets": "live"}
    assert networks.distill_jobs(made(distill=distill))[0].targets == "live"


def test_without_baselines_only_the_method_itself_is_trained():
    bare = made(baselines=None)
    assert [job.name for job in networks.teacher_jobs(bare)] == ["one", "three"]
    assert [job.name for job in networks.distill_jobs(bare)] == ["sbf-distilled"]
    assert [row.network for row in networks.rows(bare)] == [
        "one", "two", "three", "ensemble", "zeroed", "sbf-one-shot", "sbf-distilled",
    ]  # fmt: skip


def test_a_teacher_sees_images_as_it_says_or_as_the_student_does():
    loaded = made()
    one, two, _ = loaded.teachers
    assert networks.teacher_view(loaded, one) == networks.student_view(loaded)
    assert networks.teacher_view(loaded, two) == View(
        image_size=32, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)
    )


def test_every_network_of_the_table_is_made_by_some_stage_and_has_a_file():
    loaded = made()
    trained = [job.name for job in (*networks.teacher_jobs(loaded), *networks.distill_jobs(loaded))]
    table = networks.rows(loaded)
    files = {
        member: networks.weights_of(loaded, RUN, member) for row in table for member in row.members
    }
    assert len(set(files.values())) == len(files)
    assert set(trained) | {"two", "zeroed", "sbf-one-shot"} == set(files)
    assert files["two"] == Path("/given/two.safetensors")
    assert files["sbf-labels"] == Path("/runs/tiny/weights/sbf-labels.safetensors")
    assert next(row for row in table if row.network == "ensemble").members == (
        "one",
        "two",
        "three",
    )


def test_an_ensemble_of_one_has_no_row():
    alone = made(teachers=CONTENT["teachers"][2:])
    assert "ensemble" not in [row.network for row in networks.rows(alone)]


@pytest.mark.parametrize(
    ("network", "model", "planned"),
    [
        ("one", "cifar_resnet8", False),
        ("two", "cifar_resnet14", False),
        ("dense-labels", "cifar_resnet20", False),
        ("zeroed", "cifar_resnet20", False),
        ("sbf-one-shot", "cifar_resnet20", True),
        ("sbf-labels", "cifar_resnet20", True),
        ("sbf-distilled", "cifar_resnet20", True),
    ],
)
def test_networks_are_built_from_their_teachers_architecture(network, model, planned):
    assert networks.model_of(made(), network) == model
    assert (networks.plan_of(made(), RUN, network) is not None) is planned


def test_the_shipped_recipe_compresses_one_of_its_teachers():
    loaded = recipe.load(Path(__file__).parents[2] / "recipes" / "digits.yaml")
    assert networks.compressed_teacher(loaded) in loaded.teachers


def test_nothing_of_a_run_lies_outside_of_its_folder():
    paths = [
        RUN.recipe, RUN.tracking, RUN.index, RUN.pseudo_labels, RUN.plan, RUN.checkpoints,
        RUN.student, RUN.summary, RUN.weights("one"), RUN.result("prepare"),
    ]  # fmt: skip
    assert len(set(paths)) == len(paths)
    assert all(path.is_relative_to(RUN.root) for path in paths)
