import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pictures import write_plain

from pipelines.sources.folder import check_folder, index_folder
from sbf_dist.errors import UserError


def fill(folder: Path, count: int, suffix: str = ".png", first: int = 0) -> None:
    for k in range(count):
        write_plain(folder / f"{k}{suffix}", (first + k) % 25)


def indexed(root: Path, **arguments):
    settings = {"labelled_per_class": None, "validation": 2, "seed": 0} | arguments
    return index_folder(root, **settings)


def classes_of(index, part: str) -> Counter:
    return Counter(index.classes[label] for label in index.labels[index.parts[part]])


def test_files_are_sorted_and_every_sample_plays_one_part(plain_index):
    assert plain_index.files == sorted(plain_index.files)
    assert len(plain_index.files) == 23
    assert plain_index.classes == ["ant", "bee", "cow"]
    together = np.concatenate(list(plain_index.parts.values()))
    assert sorted(together) == list(range(23))
    for name, label in zip(plain_index.files, plain_index.labels, strict=True):
        assert plain_index.classes[label] == name.split("/")[0]


def test_few_labels_hide_the_others_but_not_from_the_index(plain_index):
    assert classes_of(plain_index, "labelled") == {"ant": 2, "bee": 2, "cow": 2}
    assert len(plain_index.parts["unlabelled"]) == 23 - 4 - 6
    assert (plain_index.labels[plain_index.parts["unlabelled"]] >= 0).all()


def test_fewer_labels_are_a_subset_of_more_and_another_seed_picks_others(plain_root):
    fewer, more = (indexed(plain_root, labelled_per_class=n).parts["labelled"] for n in (1, 3))
    assert set(fewer) < set(more)
    other = indexed(plain_root, labelled_per_class=3, seed=1).parts["labelled"]
    assert set(other) != set(more)


def test_validation_is_in_proportion_and_may_be_a_share(tmp_path):
    fill(tmp_path / "a", 30)
    fill(tmp_path / "b", 10)
    by_number = indexed(tmp_path, validation=8)
    assert classes_of(by_number, "validation") == {"a": 6, "b": 2}
    by_share = indexed(tmp_path, validation=0.2)
    assert np.array_equal(by_share.parts["validation"], by_number.parts["validation"])


def test_validation_never_takes_the_last_training_image_of_a_class(tmp_path):
    fill(tmp_path / "a", 20)
    fill(tmp_path / "b", 1)
    index = indexed(tmp_path, validation=15)
    assert classes_of(index, "validation") == {"a": 15}
    assert classes_of(index, "labelled") == {"a": 5, "b": 1}


def test_train_val_and_unlabelled_folders_are_used_as_they_are(tmp_path):
    fill(tmp_path / "train" / "a", 5)
    fill(tmp_path / "train" / "b" / "deep" / "down", 4)
    fill(tmp_path / "val" / "b", 3)
    fill(tmp_path / "unlabelled", 2, first=10)
    fill(tmp_path / "unlabelled" / "x" / "y", 2, first=10)
    index = indexed(tmp_path, labelled_per_class=3, validation=None)
    assert classes_of(index, "validation") == {"b": 3}
    assert classes_of(index, "labelled") == {"a": 3, "b": 3}
    assert sorted(index.labels[index.parts["unlabelled"]]) == [-1, -1, -1, -1, 0, 0, 1]


@pytest.mark.parametrize(
    ("train", "val"), [("Train", "Val"), ("train", "valid"), ("training", "Validation")]
)
def test_folders_that_say_train_and_val_otherwise_are_understood(tmp_path, train, val):
    fill(tmp_path / train / "a", 5)
    fill(tmp_path / train / "b", 4)
    fill(tmp_path / val / "b", 3)
    index = indexed(tmp_path, validation=None)
    assert index.classes == ["a", "b"]
    assert classes_of(index, "validation") == {"b": 3}
    assert classes_of(index, "labelled") == {"a": 5, "b": 4}


def test_unlabelled_images_that_are_validation_images_are_counted_and_named(tmp_path):
    for folder, first in (("train/a", 0), ("train/b", 5), ("val/b", 10), ("unlabelled/x", 12)):
        fill(tmp_path / folder, 5, first=first)
    with pytest.raises(UserError) as raised:
        indexed(tmp_path, validation=None)
    assert str(raised.value) == (
        f"data {tmp_path}: 3 of 5 unlabelled images are validation images, too, by their content: "
        "unlabelled/x/0.png is val/b/2.png, unlabelled/x/1.png is val/b/3.png, "
        "unlabelled/x/2.png is val/b/4.png; remove them from the unlabelled ones"
    )


def test_images_that_hide_their_class_and_are_in_validation_are_counted_in_the_log(
    tmp_path, caplog
):
    for folder, first in (("train/a", 0), ("train/b", 5), ("val/b", 8)):
        fill(tmp_path / folder, 5, first=first)
    with caplog.at_level(logging.WARNING):
        index = indexed(tmp_path, validation=None, labelled_per_class=1)
    shared = {f"train/b/{number}.png" for number in (3, 4)} & set(
        index.take_files(index.parts["unlabelled"])
    )
    assert f"{len(shared)} of 8 unlabelled images are validation images" in caplog.text


def test_an_unlabelled_folder_without_an_image_is_refused(tmp_path):
    fill(tmp_path / "train" / "a", 5)
    (tmp_path / "unlabelled").mkdir()
    with pytest.raises(UserError, match=r"data .*/unlabelled: has no image .*remove the folder"):
        check_folder(tmp_path, labelled_per_class=None, validation=2, seed=0)


def test_what_stands_beside_train_and_is_not_used_is_named(tmp_path, caplog):
    fill(tmp_path / "train" / "a", 5)
    fill(tmp_path / "test" / "a", 2)
    fill(tmp_path / "extra", 2)
    with caplog.at_level(logging.WARNING):
        index = indexed(tmp_path)
    assert len(index) == 5
    assert "not used, as it is neither train, val nor unlabelled: extra, test" in caplog.text


def test_two_folders_for_one_part_are_refused(tmp_path):
    for name in ("train", "val", "valid"):
        fill(tmp_path / name / "a", 3)
    with pytest.raises(UserError, match="has folders val and valid, which both say val"):
        indexed(tmp_path)


def test_classes_may_have_such_names(tmp_path):
    for name in ("Train", "Car", "Valid"):
        fill(tmp_path / name, 5)
    assert indexed(tmp_path).classes == ["Car", "Train", "Valid"]


def test_classes_named_train_and_val_are_classes_where_they_hold_images(tmp_path):
    for name in ("Train", "Val"):
        fill(tmp_path / name, 5)
    assert indexed(tmp_path).classes == ["Train", "Val"]


def test_other_suffixes_of_jpeg_are_known_and_other_images_are_counted(tmp_path, caplog):
    fill(tmp_path / "a", 2, ".jpg")
    for number, suffix in enumerate([".jfif", ".jpe"]):
        (tmp_path / "a" / f"{number}.jpg").rename(tmp_path / "a" / f"{number}{suffix}")
    fill(tmp_path / "a", 3)
    for name in ("x.gif", "y.GIF", "z.heic"):
        (tmp_path / "a" / name).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        index = indexed(tmp_path)
    assert len(index) == 5
    assert "skipped 2 .gif, 1 .heic, which cannot be read" in caplog.text


def test_suffixes_count_in_any_case_and_other_files_do_not(tmp_path):
    fill(tmp_path / "a", 3, ".JPG")
    fill(tmp_path / "a", 2, ".Tiff")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "._0.jpg").write_text("no image")
    (tmp_path / ".cache").mkdir()
    index = indexed(tmp_path)
    assert len(index) == 5
    assert index.classes == ["a"]
    assert index.skipped == []


def test_damaged_files_are_skipped_listed_and_logged(tmp_path, caplog):
    fill(tmp_path / "a", 110)
    (tmp_path / "a" / "7.png").write_text("no image")
    with caplog.at_level(logging.WARNING):
        index = indexed(tmp_path)
    assert len(index) == 109
    assert "a/7.png" not in index.files
    assert len(index.skipped) == 1
    assert index.skipped[0].startswith("a/7.png: not a readable image")
    assert "skipped a/7.png" in caplog.text


def test_more_than_one_percent_damaged_is_an_error_that_names_the_first(tmp_path):
    fill(tmp_path / "a", 110)
    for k in (3, 50):
        (tmp_path / "a" / f"{k}.png").write_text("no image")
    with pytest.raises(UserError, match=r"2 of 110 images cannot be used.*a/3\.png: not a read"):
        indexed(tmp_path)


def test_a_name_that_is_not_utf8_is_skipped(tmp_path):
    fill(tmp_path / "a", 110)
    (tmp_path / "a" / "7.png").rename(
        tmp_path / "a" / b"7\xff.png".decode(errors="surrogateescape")
    )
    index = indexed(tmp_path)
    assert index.skipped == ["a/7\\udcff.png: its name holds unprintable characters"]


def test_names_beyond_ascii_are_fine(tmp_path):
    fill(tmp_path / "Gänse blümchen", 3)
    assert indexed(tmp_path).classes == ["Gänse blümchen"]


def layout(root: Path, **counts: int) -> Path:
    for folder, count in counts.items():
        (root / folder.replace("__", "/")).mkdir(parents=True)
        fill(root / folder.replace("__", "/"), count)
    return root


@pytest.mark.parametrize(
    ("counts", "arguments", "message"),
    [
        ({"a": 4, "b": 0}, {}, "the class 'b' has no image"),
        ({"a": 4, "b": 3}, {"labelled_per_class": 3}, "the class 'b' of .* has only 2 training"),
        ({"a": 4}, {"labelled_per_class": 0}, "the class 'a' without a labelled image"),
        ({"a": 4}, {"validation": None}, "has no val folder"),
        ({"a": 4}, {"validation": 4}, "validation 4: .* has only 4 images"),
        (
            {"a": 4, "b": 4},
            {"validation": 7},
            "would leave a class without .* at most 6 of .* can be held out",
        ),
        ({"a": 4}, {"validation": 0}, "validation 0: must be at least 1"),
        ({"a": 4}, {"validation": 1.5}, "validation 1.5: a share must be between 0 and 1"),
        ({"train__a": 4, "val__b": 1}, {}, "val has the class 'b', which train does not have"),
        ({"train__a": 4, "val": 1}, {}, "val: has no image"),
        ({"train": 4}, {}, "train: has no class folders"),
        ({"a": 4, "val__a": 4}, {}, "has a folder val but no folder train"),
        ({"a": 4, "unlabelled": 4}, {}, "has a folder unlabelled but no folder train"),
        ({}, {}, "is empty"),
    ],
)
def test_mistakes_are_reported_with_their_numbers(tmp_path, counts, arguments, message):
    root = layout(tmp_path, **counts)
    with pytest.raises(UserError, match=message) as raised:
        indexed(root, **arguments)
    # They are found without reading an image as well.
    settings = {"labelled_per_class": None, "validation": 2, "seed": 0} | arguments
    with pytest.raises(UserError) as early:
        check_folder(root, **settings)
    assert str(early.value) == str(raised.value)


def test_a_check_reads_no_image(tmp_path):
    fill(tmp_path / "a", 3)
    fill(tmp_path / "b", 3)
    for path in (tmp_path / "a").iterdir():
        path.write_text("no image")
    check_folder(tmp_path, labelled_per_class=1, validation=1, seed=0)
    with pytest.raises(UserError, match="3 of 6 images cannot be used"):
        indexed(tmp_path)


def test_a_root_that_is_not_there_is_reported(tmp_path):
    with pytest.raises(UserError, match="nowhere: is not a folder"):
        indexed(tmp_path / "nowhere")
