from pathlib import Path

import pytest

from launchers.run.building import build_network
from launchers.run.folder import RunFolder
from launchers.run.network import Network
from launchers.run.networks import Networks
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
            "weight": 2.0,
        },
        {"name": "three", "model": "cifar_resnet20", "training": {"steps": 30}},
    ],
    "compress": {"teacher": "three", "macs": 0.5},
    "distill": {"training": {"steps": 40}, "label_weight": 0.3, "labelled_share": 0.2},
    "baselines": {"steps": 50},
}
FOLDER = RunFolder(Path("/runs"), "tiny")


def networks_of(**changes) -> Networks:
    return Networks.of(Recipe.model_validate(CONTENT | changes), FOLDER)


def by_name(networks: Networks) -> dict[str, Network]:
    return {network.name: network for network in networks}


def test_a_teacher_with_weights_is_not_trained_and_the_dense_baseline_is():
    trained = networks_of().trained_in("teachers")
    assert [(n.name, n.model, n.job.training.steps) for n in trained] == [
        ("one", "cifar_resnet8", 10),
        ("three", "cifar_resnet20", 30),
        ("dense-labels", "cifar_resnet20", 50),
    ]
    assert {n.job.distill for n in trained} == {None}
    assert not any(n.plan or n.job.start for n in trained)


def test_every_training_has_a_seed_of_its_own_that_follows_the_recipes():
    assert [n.job.seed for n in networks_of().trained_in("teachers")] == [7, 9, 10]
    assert [n.job.seed for n in networks_of(seed=0).trained_in("teachers")] == [0, 2, 3]


def test_students_start_from_the_one_shot_network_and_differ_in_their_targets():
    networks = networks_of()
    distilled, labels = networks.trained_in("distill")
    assert (distilled.name, labels.name) == ("sbf-distilled", "sbf-labels")
    assert (distilled, labels) == (networks.student, networks.sbf_labels)
    for network in (distilled, labels):
        assert network.plan == FOLDER.plan
        assert network.job.start == networks.one_shot.weights
        assert network.job.seed == 7
        assert network.model == "cifar_resnet20"
        assert network.view == View(image_size=16, mean=(0.1, 0.2, 0.3), std=(0.229, 0.224, 0.225))
    assert (distilled.job.distill, labels.job.distill) == (networks.recipe.distill, None)
    assert (distilled.job.training.steps, labels.job.training.steps) == (40, 50)


def test_without_baselines_only_the_method_itself_is_trained():
    bare = networks_of(baselines=None)
    assert [network.name for network in bare.trained_in("teachers")] == ["one", "three"]
    assert [network.name for network in bare.trained_in("distill")] == ["sbf-distilled"]
    assert [row.name for row in bare.rows()] == [
        "one", "two", "three", "ensemble", "zeroed", "sbf-one-shot", "sbf-distilled",
    ]  # fmt: skip


def test_a_teacher_sees_images_as_it_says_or_as_the_student_does():
    networks = networks_of()
    one, two, _ = networks.teachers
    assert one.view == networks.recipe.data.view
    assert two.view == View(image_size=32, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    assert two.input_shape == (3, 32, 32)
    assert [teacher.asked.weight for teacher in networks.teachers] == [1.0, 2.0, 1.0]


def test_every_network_of_the_table_comes_from_some_stage_and_has_a_file():
    networks = networks_of()
    trained = [n.name for stage in ("teachers", "distill") for n in networks.trained_in(stage)]
    rows = networks.rows()
    files = {member.name: member.weights for row in rows for member in row.members}
    assert len(set(files.values())) == len(files)
    assert set(trained) | {"two", "zeroed", "sbf-one-shot"} == set(files)
    assert files["two"] == Path("/given/two.safetensors")
    assert files["sbf-labels"] == Path("/runs/tiny/weights/sbf-labels.safetensors")
    ensemble = next(row for row in rows if row.name == "ensemble")
    assert [member.name for member in ensemble.members] == ["one", "two", "three"]


def test_an_ensemble_of_one_has_no_row():
    alone = networks_of(teachers=CONTENT["teachers"][2:])
    assert "ensemble" not in [row.name for row in alone.rows()]


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
    found = by_name(networks_of())[network]
    assert found.model == model
    assert (found.plan is not None) is planned


def test_a_network_of_ones_own_is_built_with_its_arguments_and_the_classes(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def make(num_classes, width):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3), nn.Linear(width, num_classes))\n"
    )
    own = {"model": f"{tmp_path}/mine.py:make", "arguments": {"width": 6}}
    teachers = [*CONTENT["teachers"][:2], CONTENT["teachers"][2] | own]
    found = by_name(networks_of(teachers=teachers))
    for name in ("three", "dense-labels", "zeroed"):
        built = build_network(found[name], 10, None)
        assert (built[0].out_channels, built[1].out_features) == (6, 10)
    student = found["sbf-distilled"]
    assert student.architecture(10).arguments == {"width": 6, "num_classes": 10}
    for name in ("three", "dense-labels"):
        assert "teachers.2.arguments" in found[name].reads


def test_each_network_is_there_once():
    networks = networks_of(compress=CONTENT["compress"] | {"rounds": 3})
    assert len(by_name(networks)) == len(list(networks))
    assert {"sbf-round-1", "sbf-round-2", "sbf-round-3-fitted"} <= by_name(networks).keys()
    assert "sbf-round-3" not in by_name(networks)


def test_the_shipped_recipe_compresses_one_of_its_teachers():
    loaded = recipe.load(Path(__file__).parents[3] / "recipes" / "digits.yaml")
    networks = Networks.of(loaded, FOLDER)
    assert networks.compressed in networks.teachers


def test_nothing_of_a_run_lies_outside_of_its_folder():
    paths = [
        FOLDER.recipe, FOLDER.tracking, FOLDER.index, FOLDER.pseudo_labels, FOLDER.plan,
        FOLDER.checkpoints, FOLDER.student, FOLDER.summary, FOLDER.weights("one"),
        FOLDER.result("prepare"),
    ]  # fmt: skip
    assert len(set(paths)) == len(paths)
    assert all(path.is_relative_to(FOLDER.root) for path in paths)
