"""A run's folder where it is kept in a store: on the driver's machine, and on others."""

from pathlib import Path

import pytest

from launchers.display import Display
from launchers.images import index_images, with_embedded_images
from launchers.run import sequence
from launchers.run.folder import RunFolder
from launchers.run.networks import Networks
from launchers.storage import driver, lock
from pipelines.index import DataIndex
from sbf_dist.errors import UserError
from sbf_dist.files import write_json
from sbf_dist.object_storage import ObjectFolder
from sbf_dist.recipe import Recipe

CONTENT = {
    "name": "tiny",
    "data": {"source": "digits", "validation": 100, "labelled_per_class": 5, "image_size": 16},
    "teachers": [{"name": "one", "model": "cifar_resnet8_w4", "training": {"steps": 10}}],
    "compress": {"teacher": "one", "macs": 0.5},
    "distill": {"training": {"steps": 10}},
}
RECIPE = Recipe.model_validate(CONTENT)
MADE = ("weights", "trainings")


@pytest.fixture
def at(s3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The folder of the run on a machine, by its name."""
    monkeypatch.setattr(lock, "SETTLING_SECONDS", 0)

    def on(machine: str) -> RunFolder:
        monkeypatch.setenv("SBF_DIST_CACHE", str(tmp_path / machine))
        return RunFolder.at(f"{s3.bucket}/runs", "tiny")

    return on


def do(folder: RunFolder, *stages: str, recipe: Recipe = RECIPE) -> None:
    """Leave behind what some stages leave, as the driver does."""
    networks = Networks.of(recipe, folder)
    for stage in sequence.STAGES:
        if stage.name in stages:
            for product in stage.products(networks):
                for path in product.files:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    if path.suffix:
                        path.write_text("{}")
                    else:
                        path.mkdir(exist_ok=True)
                        (path / "part").write_text("{}")
            write_json(folder.result(stage.name), {"classes": 10})
    sequence.bind(networks)
    folder.publish()


def test_a_folder_of_this_machine_is_what_it_was(tmp_path: Path) -> None:
    folder = RunFolder.at(str(tmp_path / "runs"), "tiny")
    assert folder == RunFolder(tmp_path / "runs", "tiny")
    assert (folder.place, folder.place_of_runs) == (str(folder.root), str(folder.runs))
    folder.publish()
    folder.fetch("data", driver="other")
    assert not folder.root.exists()


def test_an_address_has_a_folder_in_the_cache_of_each_machine(at, tmp_path: Path) -> None:
    one, two = at("one"), at("two")
    assert one.place == two.place == "s3://test-bucket/runs/tiny"
    assert RunFolder.at(one.place_of_runs, "tiny").place == one.place
    assert one.root.is_relative_to(tmp_path / "one")
    assert two.root.is_relative_to(tmp_path / "two")


def test_what_a_worker_has_of_its_own_goes_but_on_the_drivers_machine_stays(at) -> None:
    one, two = at("driver"), at("worker")
    assert one.copy is not None
    with driver.taken_over(one.copy):
        for folder in (one, two):
            write_json(folder.weights("old").with_suffix(".json"), {"of": "an attempt"})
        of_driver = one.session
        one.fetch(*MADE, driver=of_driver)
        two.fetch(*MADE, driver=of_driver)
        assert one.weights("old").with_suffix(".json").exists()
        assert not two.weights("old").with_suffix(".json").exists()


def test_embedded_images_are_made_on_each_machine_where_its_cache_is(at) -> None:
    one, two = at("driver"), at("worker")
    index = index_images(RECIPE.data, one.runs, 0, Display())
    index.save(one.index)
    one.publish()
    two.fetch("data", driver="")
    moved = with_embedded_images(RECIPE.data, two.runs, DataIndex.load(two.index))
    assert moved.root == two.runs / "data" / "digits"
    assert moved.digest == index.digest
    assert (moved.root / moved.files[0]).is_file()


def test_a_removal_that_is_cut_leaves_the_store_no_stage_without_its_basis(at, faulty_s3) -> None:
    folder = at("one")
    names = [stage.name for stage in sequence.STAGES]
    for allowed in range(100):
        do(folder, *names)
        faulty_s3.add("DELETE|POST.*delete", "pass", allowed)
        faulty_s3.add("DELETE|POST.*delete", "refuse")
        try:
            sequence.open_folder(Networks.of(RECIPE, folder), "teachers")
        except UserError:
            faulty_s3.clear()
            keys = ObjectFolder.at(folder.place).objects("stages")
            left = [name for name in names if f"stages/{name}.json" in keys]
            assert left == names[: len(left)]
        else:
            faulty_s3.clear()
            break
    assert allowed > 10
    keys = ObjectFolder.at(folder.place).objects()
    assert {key for key in keys if key[0] != "."} == {
        "data/part",
        "recipe.json",
        "stages/prepare.json",
        "tracking.json",
    }


def test_checkpoints_in_the_store_make_a_training_begun(at) -> None:
    folder = at("one")
    do(folder, "prepare")
    store = ObjectFolder.at(str(folder.place_of_checkpoints))
    store.write("teachers/one-00000010.ab/manifest.json", b"{}")
    changed = CONTENT | {"teachers": [CONTENT["teachers"][0] | {"model": "cifar_resnet8_w8"}]}
    networks = Networks.of(Recipe.model_validate(changed), folder)
    with pytest.raises(UserError, match=r"teachers was begun with .*give --again teachers"):
        sequence.open_folder(networks, None)
    sequence.open_folder(networks, "teachers")
    assert store.objects() == {}


@pytest.mark.parametrize("where", ["here", "in the store"])
def test_trainings_that_are_not_concerned_keep_their_checkpoints(
    where: str, at, tmp_path: Path
) -> None:
    folder = at("one") if where == "in the store" else RunFolder.at(str(tmp_path), "tiny")
    one = CONTENT["teachers"][0]
    content = CONTENT | {"teachers": [one, one | {"name": "two"}, one | {"name": "one-2"}]}
    do(folder, "prepare", recipe=Recipe.model_validate(content))
    suffix = ".ab" if where == "in the store" else ""
    names = [f"{name}-00000005{suffix}" for name in ("one", "two", "one-2")]
    for name in names:
        place = f"teachers/{name}/manifest.json"
        if where == "here":
            write_json(folder.checkpoints / place, {})
        else:
            ObjectFolder.at(str(folder.place_of_checkpoints)).write(place, b"{}")
    longer = one | {"name": "two", "training": {"steps": 20}}
    other = one | {"model": "cifar_resnet8_w8"}
    changed = content | {"teachers": [other, longer, content["teachers"][2]]}
    sequence.open_folder(Networks.of(Recipe.model_validate(changed), folder), "teachers")
    if where == "here":
        left = {path.name for path in (folder.checkpoints / "teachers").iterdir()}
    else:
        store = ObjectFolder.at(str(folder.place_of_checkpoints))
        left = {key.split("/")[1] for key in store.objects("teachers")}
    assert left == set(names[1:])


def test_the_folder_of_a_comparison_is_refused(tmp_path: Path) -> None:
    folder = RunFolder.at(str(tmp_path), "tiny")
    write_json(folder.recipe, {"recovery": {}})
    with pytest.raises(UserError, match=r"tiny: holds a comparison .*give another name"):
        sequence.open_folder(Networks.of(RECIPE, folder), None)
    assert folder.recipe.read_text().count("recovery") == 1
