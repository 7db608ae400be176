from pathlib import Path

import pytest
import torch

from sbf_dist.distill.class_mapping import class_mapping, read_classes
from sbf_dist.errors import UserError

IMAGES = ["cat", "dog"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "classes.txt"


def test_classes_are_matched_by_name_or_by_the_second_column(file: Path) -> None:
    file.write_text("tabby\tcat\ngoldfish, Carassius auratus\ndog\nPersian cat\tcat\n")
    mapping = class_mapping(file, IMAGES)
    assert (mapping.size, mapping.classes) == (4, 2)
    assert mapping.kept.tolist() == [0, 2, 3]
    assert mapping.targets.tolist() == [0, 1, 0]


def test_probabilities_are_summed_and_divided_by_what_the_images_have(file: Path) -> None:
    file.write_text("tabby\tcat\ngoldfish\ndog\nPersian cat\tcat\n")
    answers = torch.tensor([[0.1, 0.6, 0.2, 0.1]]).log()
    found = class_mapping(file, IMAGES).probabilities(answers)
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.5]]))


def test_lines_may_end_as_on_windows(file: Path) -> None:
    file.write_bytes(b"cat\r\nhound\tdog\r\n")
    assert read_classes(file) == [("cat", "cat"), ("hound", "dog")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat\nhund\n", "no line is for 'dog' of the images' classes; add the images' name"),
        ("Cat\ndog\n", "no line is for 'cat' of the images' classes ('Cat' is the most similar)"),
        (
            "cat\nhound\tdogs\n",
            "'dogs' in the second column is not a class of the images ('dog' is",
        ),
        ("cat\n\ndog\n", "line 2 is empty; there must be a line for each"),
        ("", "is empty; it must have a line for each class"),
    ],
)
def test_a_file_that_leaves_something_open_is_refused(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(UserError) as error:
        class_mapping(file, IMAGES)
    assert f"classes {file}: {message}" in str(error.value)


@pytest.mark.parametrize("place", ["missing", "folder", "bytes", "/dev/zero"])
def test_what_is_no_text_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"cannot be read as text|is larger than"):
        read_classes(tmp_path / place)
