import zipfile
from pathlib import Path

import pytest
from archive_makers import TINY, tiny_imagenet

from pipelines.sources import tiny_imagenet as tiny
from sbf_dist.errors import UserError

ROOT = "tiny-imagenet-200"


def changed(folder: Path, **changes: bytes | None) -> Path:
    """The archive with some members (keys have __ for / and _dot_ for .) replaced or left out."""
    members = tiny_imagenet(folder)
    for key, data in changes.items():
        name = f"{ROOT}/{key.replace('__', '/').replace('_dot_', '.')}"
        if data is None:
            del members[name]
        else:
            members[name] = data
    path = folder / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def test_images_keep_their_bytes_and_validation_images_find_their_classes(tmp_path):
    members = tiny_imagenet(tmp_path)
    with tiny.catalogue(tmp_path / "tiny-imagenet-200.zip") as found:
        assert list(found.classes.items()) == sorted(TINY)
        assert len(found) == 12 + 4  # the test image has no label
        for row, file in enumerate(found.files):
            part, wnid, name = file.split("/")
            place = f"train/{wnid}/images" if part == "train" else "val/images"
            assert found.read(row) == members[f"{ROOT}/{place}/{name}"]
            assert found.sizes[row] == len(found.read(row))
            assert list(found.classes)[found.labels[row]] == wnid
        held_out = {file for file in found.files if file.startswith("val/")}
    assert held_out == {f"val/{TINY[k % 2][0]}/val_{k}.JPEG" for k in range(4)}


ROWS = b"val_0.JPEG\tn03444034\t0\t32\t44\t62\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wnids_dot_txt": None}, r"has no tiny-imagenet-200/wnids\.txt"),
        ({"wnids_dot_txt": b"../x\n"}, r"wnids\.txt does not name the classes"),
        ({"wnids_dot_txt": b"n01443537\n"}, r"line 1 of val_annotations\.txt must have 6 columns"),
        ({"val__val_annotations_dot_txt": ROWS[:20]}, "line 1 of val_annotations"),
        ({"val__val_annotations_dot_txt": ROWS}, r"val/images/val_1\.JPEG is not in val_annot"),
        ({"val__images__val_2_dot_JPEG": None}, r"lacks val/images/val_2\.JPEG"),
        ({"train__n09999999__images__n09999999_0_dot_JPEG": b"x"}, "of a class not in wnids"),
    ],
)
def test_archives_of_another_content_are_refused(tmp_path, changes, message):
    path = changed(tmp_path, **changes)
    with pytest.raises(UserError, match=message), tiny.catalogue(path):
        pass
