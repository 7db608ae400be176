import io
import tarfile
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from archive_makers import SYNSETS, imagenet, jpeg, meta_mat, tar, truth_of
from scipy.io import savemat

from pipelines.sources import imagenet as ilsvrc
from pipelines.sources.catalogue import Catalogue
from sbf_dist.errors import UserError

DEVKIT = "ILSVRC2012_devkit_t12/data"


def catalogue(folder: Path) -> AbstractContextManager[Catalogue]:
    return ilsvrc.catalogue(
        folder / "ILSVRC2012_img_train.tar",
        folder / "ILSVRC2012_img_val.tar",
        folder / "ILSVRC2012_devkit_t12.tar.gz",
    )


def test_images_keep_their_bytes_and_the_ground_truth_gives_their_classes(tmp_path):
    images = imagenet(tmp_path)
    with catalogue(tmp_path) as found:
        assert list(found.classes) == sorted(wnid for wnid, _ in SYNSETS)  # no hypernym
        assert found.classes["n02119789"] == "kit fox, Vulpes macrotis"
        assert len(found) == len(images) == 18 + 9
        for row, file in enumerate(found.files):
            part, wnid, name = file.split("/")
            assert found.read(row) == images[name]
            assert list(found.classes)[found.labels[row]] == wnid
            if part == "train":
                assert name.startswith(f"{wnid}_")
            else:
                number = int(name[-13:-5])
                assert wnid == SYNSETS[truth_of(number) - 1][0]


def test_the_order_of_the_ids_is_not_that_of_the_class_folders(tmp_path):
    imagenet(tmp_path)
    with catalogue(tmp_path) as found:
        of_id_1 = [f for f in found.files if f.startswith("val/") and truth_of(int(f[-13:-5])) == 1]
        assert of_id_1
        assert all(file.startswith("val/n02119789/") for file in of_id_1)
        assert next(iter(found.classes)) != "n02119789"


def test_listing_the_archives_reports_its_progress(tmp_path):
    imagenet(tmp_path)
    calls: list[tuple] = []
    with ilsvrc.catalogue(
        *(
            tmp_path / name
            for name in (
                "ILSVRC2012_img_train.tar",
                "ILSVRC2012_img_val.tar",
                "ILSVRC2012_devkit_t12.tar.gz",
            )
        ),
        progress=lambda *call: calls.append(call),
    ):
        pass
    assert calls[-1] == ("headers of ILSVRC2012_img_train.tar", 3, 3, "classes")


def tar_bytes(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


WNIDS = [wnid for wnid, _ in SYNSETS]
GOOD = {f"{wnid}.tar": tar_bytes({f"{wnid}_1.JPEG": jpeg(1)}) for wnid in WNIDS}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (GOOD | {"n00000001.tar": GOOD["n02119789.tar"]}, "not a tar file of a class"),
        (GOOD | {"readme": b"x"}, "readme is not a tar file of a class"),
        ({k: v for k, v in GOOD.items() if k != "n02100735.tar"}, r"n02100735\.tar is missing"),
        (GOOD | {"n02100735.tar": tar_bytes({"n02119789_1.JPEG": b"x"})}, "does not belong to"),
        (GOOD | {"n02100735.tar": tar_bytes({"../../n02100735_1.JPEG": b"x"})}, "leads out"),
        (
            GOOD | {"n02100735.tar": tar_bytes({"n02100735_1.exe": b"x"})},
            "is not an image of ILSVRC",
        ),
        (GOOD | {"n02100735.tar": GOOD["n02100735.tar"][:700]}, "ends within|cannot be read"),
    ],
)
def test_training_archives_of_another_content_are_refused(tmp_path, members, message):
    imagenet(tmp_path)
    tar(tmp_path / "ILSVRC2012_img_train.tar", members)
    with pytest.raises(UserError, match=message), catalogue(tmp_path):
        pass


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (range(1, 9), "has 8 images, the devkit's ground truth has 9"),
        (range(1, 11), "ILSVRC2012_val_00000010.JPEG is there twice, or beyond 9"),
        ([1, 1], "is there twice"),
    ],
)
def test_validation_images_must_be_those_of_the_ground_truth(tmp_path, numbers, message):
    imagenet(tmp_path)
    names = [f"ILSVRC2012_val_{k:08}.JPEG" for k in numbers]
    path = tmp_path / "ILSVRC2012_img_val.tar"
    path.write_bytes(b"")
    with tarfile.open(path, "w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(UserError, match=message), catalogue(tmp_path):
        pass


def devkit(folder: Path, truth: bytes, meta: bytes) -> None:
    tar(
        folder / "ILSVRC2012_devkit_t12.tar.gz",
        {
            f"{DEVKIT}/ILSVRC2012_validation_ground_truth.txt": truth,
            f"{DEVKIT}/meta.mat": meta,
        },
        "w:gz",
    )


def other_mat() -> bytes:
    file = io.BytesIO()
    savemat(file, {"synsets": np.zeros((3, 1))})
    return file.getvalue()


@pytest.mark.parametrize(
    ("truth", "meta", "message"),
    [
        (b"1\n77\n", meta_mat(), "no class 77 of the ground truth"),
        (b"1\n4\n", meta_mat(), "no class 4 of the ground truth"),  # the hypernym
        (b"1\nx\n", meta_mat(), "must have a number in each line"),
        (b"1\n", other_mat(), r"meta\.mat has no synsets"),
        (b"1\n", b"no mat", r"meta\.mat has no synsets"),
        (b"1\n", b"\x80\x04cos\nsystem\n.", r"meta\.mat has no synsets"),
        (b"1\n", b"\0" * (4 * 2**20 + 1), r"meta\.mat has 4,194,305 bytes, far more"),
    ],
)
def test_devkits_of_another_content_are_refused(tmp_path, truth, meta, message):
    imagenet(tmp_path)
    devkit(tmp_path, truth, meta)
    with pytest.raises(UserError, match=message) as raised, catalogue(tmp_path):
        pass
    assert "\n" not in str(raised.value)
