import io

import numpy as np
import pytest
from archive_makers import (
    CIFAR10,
    FEW_OF_CIFAR100,
    cifar10_binary,
    cifar10_python,
    cifar100_binary,
    cifar100_python,
    python2_pickle,
    tar,
)
from PIL import Image

from pipelines.sources import cifar
from sbf_dist.errors import UserError


def decoded(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def test_every_pixel_and_label_of_cifar10_is_kept(tmp_path):
    samples = cifar10_python(tmp_path)
    found = cifar.catalogue(tmp_path / "cifar-10-python.tar.gz")
    assert list(found.classes) == CIFAR10
    assert len(found) == 60
    for row, (image, label) in enumerate(samples):
        part, number = ("train", row) if row < 50 else ("val", row - 50)
        assert found.files[row] == f"{part}/{CIFAR10[label]}/{number:05}.png"
        assert found.labels[row] == label
        assert np.array_equal(decoded(found.read(row)), image)


def test_the_binary_archives_give_what_the_python_archives_give(tmp_path):
    cifar10_python(tmp_path)
    cifar10_binary(tmp_path)
    cifar100_python(tmp_path)
    cifar100_binary(tmp_path)
    for number in (10, 100):
        one, other = (
            cifar.catalogue(tmp_path / f"cifar-{number}-{kind}.tar.gz")
            for kind in ("python", "binary")
        )
        assert one.files == other.files
        assert one.classes == other.classes
        assert np.array_equal(one.labels, other.labels)
        assert all(one.read(row) == other.read(row) for row in range(len(one)))


def test_the_classes_of_cifar100_are_the_fine_ones(tmp_path):
    cifar100_python(tmp_path)
    found = cifar.catalogue(tmp_path / "cifar-100-python.tar.gz")
    assert list(found.classes) == FEW_OF_CIFAR100
    assert found.classes["aquarium_fish"] == "aquarium fish"
    assert found.labels[:16].tolist() == [k % 4 for k in range(16)]


def batch(**changes) -> bytes:
    content = {
        b"data": np.zeros((2, 3072), np.uint8),
        b"fine_labels": [0, 1],
        b"coarse_labels": [0, 0],
    }
    return python2_pickle(content | {key.encode(): value for key, value in changes.items()})


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (batch(fine_labels=[0, 2]), "train has a label beyond its 2 names"),
        (batch(fine_labels=[0, -1]), "train has labels that are not numbers"),
        (batch(fine_labels=[0]), "as many rows of 3072 bytes"),
        (batch(data=np.zeros((2, 3071), np.uint8)), "as many rows of 3072 bytes"),
        (batch(data=[1, 2]), "has no images in b'data'"),
        (b"\x80\x02cos\nsystem\nU\x04true\x85R.", "asks for os.system"),
        (None, "has no cifar-100-python/train"),
    ],
)
def test_archives_of_another_content_are_refused(tmp_path, train, message):
    names = {b"fine_label_names": [b"apple", b"bear"], b"coarse_label_names": [b"x"]}
    members = {
        "cifar-100-python/meta": python2_pickle(names),
        "cifar-100-python/test": batch(),
        "cifar-100-python/train": train,
    }
    path = tar(
        tmp_path / "cifar-100-python.tar.gz",
        {name: data for name, data in members.items() if data is not None},
        "w:gz",
    )
    with pytest.raises(UserError, match=message):
        cifar.catalogue(path)


def test_class_names_cannot_lead_out_of_the_folder(tmp_path):
    names = {b"fine_label_names": [b"../../x", b"bear"]}
    members = {"meta": python2_pickle(names), "train": batch(), "test": batch()}
    path = tar(
        tmp_path / "cifar-100-python.tar.gz",
        {f"cifar-100-python/{name}": data for name, data in members.items()},
        "w:gz",
    )
    with pytest.raises(UserError, match="meta does not name the classes"):
        cifar.catalogue(path)


def test_a_binary_batch_of_odd_length_is_refused(tmp_path):
    cifar100_binary(tmp_path)
    members = {
        "fine_label_names.txt": b"apple\nbear\n",
        "train.bin": b"\0" * 3074,
        "test.bin": b"\0" * 3073,
    }
    path = tar(
        tmp_path / "cifar-100-binary.tar.gz",
        {f"cifar-100-binary/{name}": data for name, data in members.items()},
        "w:gz",
    )
    with pytest.raises(UserError, match=r"test\.bin has 3073 bytes, not a multiple of 3074"):
        cifar.catalogue(path)
