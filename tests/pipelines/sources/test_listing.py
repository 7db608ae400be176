import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from archive_makers import cifar10_python, cifar100_python, imagenet
from pictures import write_plain

from pipelines.index import DataIndex
from pipelines.loader import EvalLoader, TrainLoader
from pipelines.reader import Reader
from pipelines.sources.folder import check_folder, index_folder
from pipelines.sources.listing import list_images
from pipelines.sources.preparation import prepare
from sbf_dist.errors import UserError
from sbf_dist.settings import Augmentation, View


def view(image_size: int) -> View:
    return View(image_size=image_size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cifar10, cifar100 and imagenet, each as "-folder" and "-webdataset"."""
    root = tmp_path_factory.mktemp("sets")
    for make in (cifar10_python, cifar100_python, imagenet):
        make(root / "archives")
    for name in ("cifar10", "cifar100", "imagenet"):
        for layout in ("folder", "webdataset"):
            prepare(
                name, root / "archives", root / f"{name}-{layout}", layout=layout, checksum=False
            )
    return root


def indexed(root: Path, **arguments) -> DataIndex:
    settings = {"labelled_per_class": None, "validation": None, "seed": 0} | arguments
    check_folder(root, **settings)
    return index_folder(root, **settings)


def read(index: DataIndex) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Two training batches, and the whole validation part."""
    training = TrainLoader(
        index,
        ["labelled"],
        Reader(),
        batch_size=8,
        view=view(24),
        augmentation=Augmentation(),
        seed=1,
    )
    first = [next(training) for _ in range(2)]
    training.close()
    held_out = list(EvalLoader(index, "validation", Reader(), batch_size=4, view=view(24)))
    batches = [*first, *held_out]
    return [b["image"].clone() for b in batches], [b["label"].clone() for b in batches]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagenet"])
def test_files_and_shards_give_the_same_index_and_the_same_batches(sets, name):
    files = indexed(sets / f"{name}-folder", expected="cifar10" if name == "cifar10" else None)
    shards = indexed(sets / f"{name}-webdataset")
    assert list(files.files) == list(shards.files)
    assert files.classes == shards.classes
    for field in ("labels", "sizes", "file_bytes"):
        assert np.array_equal(getattr(files, field), getattr(shards, field)), field
    for part, ids in files.parts.items():
        assert np.array_equal(ids, shards.parts[part]), part
    assert not files.shards
    assert shards.shards == ["train-000000.tar", "val-000000.tar"]
    for one, other in zip(read(files), read(shards), strict=True):
        assert len(one) == len(other) > 2
        assert all(map(torch.equal, one, other))


def test_a_prepared_folder_is_indexed_as_if_every_image_were_read(sets, tmp_path):
    unread = indexed(sets / "imagenet-folder")
    copy = tmp_path / "copy"
    shutil.copytree(sets / "imagenet-folder", copy)
    (copy / "manifest.json").unlink()
    assert indexed(copy).digest == unread.digest


def test_a_file_that_changed_since_it_was_prepared_is_named(sets, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(sets / "imagenet-folder", copy)
    name = list_images(copy).files[5]
    (copy / name).write_bytes(b"longer than" * 1000)
    with pytest.raises(UserError, match=f"{name} has changed since it was prepared; sbf data ch"):
        indexed(copy)
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing; sbf data check"):
        indexed(copy)


def test_a_shard_that_is_missing_is_named(sets, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(sets / "cifar100-webdataset", copy)
    (copy / "val-000000.tar").unlink()
    with pytest.raises(UserError, match=r"val-000000\.tar is missing; sbf data check"):
        indexed(copy)


def test_a_set_must_be_the_expected_one_with_all_its_classes(sets, tmp_path):
    assert len(indexed(sets / "cifar10-folder", expected="cifar10").classes) == 10
    with pytest.raises(UserError, match="holds cifar10, not cifar100"):
        indexed(sets / "cifar10-folder", expected="cifar100")
    with pytest.raises(UserError, match="has 3 classes, imagenet has 1000; use source: folder"):
        indexed(sets / "imagenet-webdataset", expected="imagenet")
    for k in range(10):  # prepared by hand
        write_plain(tmp_path / "train" / f"c{k}" / "0.png", k)
        write_plain(tmp_path / "val" / f"c{k}" / "0.png", k)
    assert len(indexed(tmp_path, expected="cifar10")) == 20
    with pytest.raises(UserError, match="has 10 classes, cifar100 has 100"):
        indexed(tmp_path, expected="cifar100")


def test_class_folders_may_have_a_manifest_of_their_own(tmp_path):
    (tmp_path / "manifest.json").write_text('{"name": "somebody else\'s"}')
    for k in range(4):
        write_plain(tmp_path / f"c{k % 2}" / f"{k}.png", k)
    assert len(indexed(tmp_path, validation=1)) == 4


def test_unlabelled_images_may_lie_elsewhere_in_any_depth(sets, tmp_path):
    others = tmp_path / "others"
    write_plain(others / "0.png", 3)
    write_plain(others / "deep" / "down" / "1.png", 4)
    (others / "notes.txt").write_text("no image")
    root = sets / "cifar100-folder"
    index = indexed(root, unlabelled=others)
    hidden = index.parts["unlabelled"]
    assert [Path(index.files[i]).name for i in hidden] == ["0.png", "1.png"]
    assert index.labels[hidden].tolist() == [-1, -1]
    assert len(index.parts["labelled"]) == 16
    batch = next(
        TrainLoader(
            index,
            ["unlabelled"],
            Reader(),
            batch_size=2,
            view=view(8),
            augmentation=Augmentation(min_scale=1.0, flip=False),
            seed=0,
        )
    )
    for image, row in zip(batch["image"], batch["id"].tolist(), strict=True):
        number = {"0.png": 3, "1.png": 4}[Path(index.files[row]).name]
        middle = (image[:, 4, 4] * 0.5 + 0.5) * 255
        assert middle.round().tolist() == [10 * number, 0, 255 - 10 * number]
    some = indexed(root, unlabelled=others, labelled_per_class=1)
    assert len(some.parts["unlabelled"]) == 2 + 12


def test_unlabelled_images_are_found_through_a_linked_root(sets, tmp_path):
    write_plain(tmp_path / "far" / "away" / "0.png", 1)
    link = tmp_path / "link"
    link.symlink_to(sets / "cifar100-folder")
    index = indexed(link, unlabelled=tmp_path / "far")
    assert all((index.root / name).is_file() for name in index.files)


def test_another_set_gives_its_training_images_unlabelled(sets):
    for layout in ("folder", "webdataset"):
        index = indexed(
            sets / f"cifar10-{layout}", unlabelled=sets / f"cifar100-{layout}", labelled_per_class=1
        )
        hidden = index.parts["unlabelled"]
        strangers = [i for i in hidden if index.labels[i] < 0]
        assert len(strangers) == 16
        assert all("cifar100" in index.files[i] and "/train/" in index.files[i] for i in strangers)
        assert len(index.classes) == 10
        images, _ = read(index)
        assert images


def test_unlabelled_images_must_be_there_and_be_others(sets, tmp_path):
    root = sets / "cifar10-folder"
    with pytest.raises(UserError, match=r"data\.unlabelled .*/nowhere: is not a folder"):
        indexed(root, unlabelled=tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"data\.unlabelled .*: has no image"):
        indexed(root, unlabelled=tmp_path)
    with pytest.raises(UserError, match="are among the labelled ones"):
        indexed(root, unlabelled=root)


def test_unlabelled_images_that_are_validation_images_are_found_in_files_and_shards(sets, tmp_path):
    held_out = next((sets / "cifar10-folder" / "val").rglob("*.png"))
    shutil.copy(held_out, tmp_path / "copy.png")
    for layout in ("folder", "webdataset"):
        with pytest.raises(UserError, match=r"1 of 1 unlabelled images are validation images, too"):
            index_folder(
                sets / f"cifar10-{layout}",
                unlabelled=tmp_path,
                labelled_per_class=None,
                validation=None,
                seed=0,
            )


def test_files_and_shards_may_be_mixed(sets, tmp_path):
    write_plain(tmp_path / "0.png", 3)
    for unlabelled in (tmp_path, sets / "cifar100-folder"):
        index = indexed(sets / "cifar10-webdataset", unlabelled=unlabelled)
        hidden = index.parts["unlabelled"]
        assert (index.shard[hidden] == -1).all()
        assert (index.shard[index.parts["labelled"]] == 0).all()
        assert sum(image.shape[0] for image in read(index)[0]) == 8 + 8 + 10
        batch = next(
            TrainLoader(
                index,
                ["labelled", "unlabelled"],
                Reader(),
                batch_size=len(hidden) + 50,
                view=view(8),
                augmentation=Augmentation(),
                seed=0,
            )
        )
        assert (batch["label"] == -1).sum() == len(hidden)
    index = indexed(sets / "cifar100-folder", unlabelled=sets / "cifar10-webdataset")
    assert len(index.shards) == 2
    assert (index.shard[index.parts["unlabelled"]] == 0).all()
    assert (index.shard[index.parts["validation"]] == -1).all()


def test_a_list_of_labelled_images_holds_for_files_and_shards(sets, tmp_path):
    split = tmp_path / "split.txt"
    files = list_images(sets / "imagenet-folder").files
    split.write_text("\n".join(name for name in files if name.endswith("_10.JPEG")))
    for layout in ("folder", "webdataset"):
        index = indexed(sets / f"imagenet-{layout}", split=split)
        assert len(index.parts["labelled"]) == 3
        assert len(index.parts["unlabelled"]) == 15
