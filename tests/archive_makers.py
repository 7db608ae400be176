"""Small archives in the exact layout of the published ones, with real images in them."""

import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from scipy.io import savemat

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FEW_OF_CIFAR100 = ["apple", "aquarium_fish", "baby", "bear"]
COARSE = ["aquatic_mammals", "fish"]
# Not sorted by WordNet id, as in the devkit: ILSVRC2012_ID 1, 2, 3 are these.
SYNSETS = [
    ("n02119789", "kit fox, Vulpes macrotis"),
    ("n02100735", "English setter"),
    ("n02096294", "Australian terrier"),
]
TINY = [("n03444034", "go-kart"), ("n01443537", "goldfish, Carassius auratus")]


def synsets(count: int) -> list[tuple[str, str]]:
    """WordNet ids, not sorted, and words."""
    return [(f"n{10_000_000 + 7919 * k % 10_007:08}", f"thing {k}") for k in range(count)]


def pixels(count: int, seed: int) -> np.ndarray:
    """Smooth random images, uint8 (count, 32, 32, 3)."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(image).resize((32, 32), Image.BILINEAR)) for image in coarse]
    )


def jpeg(seed: int, size: tuple[int, int] = (64, 64), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(1, seed)[0]).resize(size).convert(mode).save(file, "JPEG", quality=90)
    return file.getvalue()


def planes(images: np.ndarray) -> np.ndarray:
    """CIFAR's rows: 1,024 bytes of red, then green, then blue."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


class _Python2Pickler(pickle._Pickler):  # type: ignore[name-defined, misc]
    """Writes what Python 2's cPickle wrote: strings of bytes, numpy's old module names."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, value: Any) -> None:
        data = value if isinstance(value, bytes) else value.encode("latin1")
        if len(data) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(data)]) + data)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[bytes] = save_string
    dispatch[str] = save_string

    def save_global(self, value: Any, name: str | None = None) -> None:
        module = {"_reconstruct": "numpy.core.multiarray"}.get(value.__name__, "numpy")
        self.write(pickle.GLOBAL + f"{module}\n{value.__name__}\n".encode())
        self.memoize(value)

    dispatch[type] = save_global
    dispatch[type(pixels)] = save_global

    def reducer_override(self, value: Any) -> Any:
        # numpy's extension function is no function of Python's.
        return (
            "_reconstruct" if getattr(value, "__name__", "") == "_reconstruct" else NotImplemented
        )


def python2_pickle(value: Any) -> bytes:
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue()


def tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    """A tar file of `members` in their order; mode "w:gz" compresses it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as file:
        folders = sorted({name.rpartition("/")[0] for name in members} - {""})
        for folder in folders if mode == "w:gz" else []:
            info = tarfile.TarInfo(folder)
            info.type = tarfile.DIRTYPE
            file.addfile(info)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def cifar10_python(folder: Path, per_batch: int = 10) -> list[tuple[np.ndarray, int]]:
    """cifar-10-python.tar.gz; returns the images and labels of train, then of test."""
    samples, members = [], {}
    names = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    for number, name in enumerate(names):
        images = pixels(per_batch, seed=number)
        labels = [(3 * number + k) % 10 for k in range(per_batch)]
        samples += list(zip(images, labels, strict=True))
        members[f"cifar-10-batches-py/{name}"] = python2_pickle(
            {
                b"batch_label": f"{name} of 5".encode(),
                b"labels": labels,
                b"data": planes(images),
                b"filenames": [
                    f"{CIFAR10[label]}_s_{k:06}.png".encode() for k, label in enumerate(labels)
                ],
            }
        )
    members["cifar-10-batches-py/batches.meta"] = python2_pickle(
        {
            b"num_cases_per_batch": per_batch,
            b"label_names": [name.encode() for name in CIFAR10],
            b"num_vis": 3072,
        }
    )
    members["cifar-10-batches-py/readme.html"] = b"<html></html>"
    tar(folder / "cifar-10-python.tar.gz", members, "w:gz")
    return samples


def cifar10_binary(folder: Path, per_batch: int = 10) -> None:
    """cifar-10-binary.tar.gz with the images of cifar10_python."""
    members = {"cifar-10-batches-bin/batches.meta.txt": "\n".join([*CIFAR10, "", ""]).encode()}
    names = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    for number, name in enumerate(names):
        rows = planes(pixels(per_batch, seed=number))
        labels = np.array([[(3 * number + k) % 10] for k in range(per_batch)], dtype=np.uint8)
        members[f"cifar-10-batches-bin/{name}.bin"] = np.hstack([labels, rows]).tobytes()
    members["cifar-10-batches-bin/readme.html"] = b"<html></html>"
    tar(folder / "cifar-10-binary.tar.gz", members, "w:gz")


def cifar100_python(
    folder: Path, names: Sequence[str] = FEW_OF_CIFAR100, train: int = 16, test: int = 8
) -> None:
    """cifar-100-python.tar.gz with `train` and `test` images of the fine classes `names`."""
    members = {"cifar-100-python/file.txt~": b""}
    for seed, (name, count) in enumerate({"train": train, "test": test}.items()):
        members[f"cifar-100-python/{name}"] = python2_pickle(
            {
                b"filenames": [f"bear_s_{k:06}.png".encode() for k in range(count)],
                b"batch_label": b"training batch 1 of 1",
                b"fine_labels": [k % len(names) for k in range(count)],
                b"coarse_labels": [k % 2 for k in range(count)],
                b"data": planes(pixels(count, seed=20 + seed)),
            }
        )
    members["cifar-100-python/meta"] = python2_pickle(
        {
            b"fine_label_names": [name.encode() for name in names],
            b"coarse_label_names": [name.encode() for name in COARSE],
        }
    )
    tar(folder / "cifar-100-python.tar.gz", members, "w:gz")


def cifar100_binary(folder: Path) -> None:
    """cifar-100-binary.tar.gz with the images of cifar100_python."""
    members = {
        "cifar-100-binary/fine_label_names.txt": "\n".join([*FEW_OF_CIFAR100, ""]).encode(),
        "cifar-100-binary/coarse_label_names.txt": "\n".join([*COARSE, ""]).encode(),
    }
    for seed, (name, count) in enumerate({"train": 16, "test": 8}.items()):
        labels = np.array([[k % 2, k % 4] for k in range(count)], dtype=np.uint8)
        rows = planes(pixels(count, seed=20 + seed))
        members[f"cifar-100-binary/{name}.bin"] = np.hstack([labels, rows]).tobytes()
    tar(folder / "cifar-100-binary.tar.gz", members, "w:gz")


def tiny_imagenet(
    folder: Path, per_class: int = 6, classes: Sequence[tuple[str, str]] = TINY, validation: int = 4
) -> dict[str, bytes]:
    """tiny-imagenet-200.zip; returns its members."""
    root = "tiny-imagenet-200"
    members = {
        f"{root}/wnids.txt": "".join(f"{wnid}\n" for wnid, _ in classes).encode(),
        f"{root}/words.txt": "".join(
            f"{wnid}\t{words}\n" for wnid, words in [("n00001740", "entity"), *classes]
        ).encode(),
    }
    for number, (wnid, _) in enumerate(classes):
        boxes = ""
        for k in range(per_class):
            mode = "L" if k == 2 else "RGB"  # some are grey
            members[f"{root}/train/{wnid}/images/{wnid}_{k}.JPEG"] = jpeg(
                10 * number + k, mode=mode
            )
            boxes += f"{wnid}_{k}.JPEG\t0\t10\t63\t58\n"
        members[f"{root}/train/{wnid}/{wnid}_boxes.txt"] = boxes.encode()
    rows = ""
    for k in range(validation):
        members[f"{root}/val/images/val_{k}.JPEG"] = jpeg(100 + k)
        rows += f"val_{k}.JPEG\t{classes[k % len(classes)][0]}\t0\t32\t44\t62\n"
    members[f"{root}/val/val_annotations.txt"] = rows.encode()
    members[f"{root}/test/images/test_0.JPEG"] = jpeg(200)
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "tiny-imagenet-200.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"{root}/", b"")
        for name, data in members.items():
            file.writestr(name, data)
    return members


def meta_mat(classes: Sequence[tuple[str, str]] = SYNSETS) -> bytes:
    """data/meta.mat: the struct array `synsets` with the devkit's fields, a hypernym among them."""
    fields = [
        "ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children",
        "wordnet_height", "num_train_images",
    ]  # fmt: skip
    rows = np.zeros((len(classes) + 1, 1), dtype=[(field, object) for field in fields])
    for row, (wnid, words) in enumerate(classes):
        rows[row, 0] = (
            float(row + 1), wnid, words, f"about {words}", 0.0, np.zeros((1, 0)), 0.0, 6.0,
        )  # fmt: skip
    rows[-1, 0] = (
        float(len(classes) + 1), "n02083346", "canine, canid", "any of various mammals", 3.0,
        np.array([[1.0, 2.0, 3.0]]), 1.0, 0.0,
    )  # fmt: skip
    file = io.BytesIO()
    savemat(file, {"synsets": rows}, do_compression=True)
    return file.getvalue()


def imagenet(
    folder: Path,
    per_class: int = 6,
    validation: int = 9,
    classes: Sequence[tuple[str, str]] = SYNSETS,
) -> dict[str, bytes]:
    """The three archives of ILSVRC-2012; returns the images by name."""
    images = {}
    outer = {}
    for number, (wnid, _) in enumerate(classes):
        inner = {
            f"{wnid}_{7 * k + 3}.JPEG": jpeg(
                10 * number + k, size=(60 + k, 50), mode="CMYK" if k == 1 else "RGB"
            )
            for k in range(per_class)
        }
        images |= inner
        path = tar(folder / f"{wnid}.tar", inner)
        outer[f"{wnid}.tar"] = path.read_bytes()
        path.unlink()
    tar(folder / "ILSVRC2012_img_train.tar", outer)
    held_out = {f"ILSVRC2012_val_{k:08}.JPEG": jpeg(100 + k) for k in range(1, validation + 1)}
    images |= held_out
    tar(folder / "ILSVRC2012_img_val.tar", held_out)
    root = "ILSVRC2012_devkit_t12"
    truth = "".join(f"{truth_of(k, len(classes))}\n" for k in range(1, validation + 1))
    tar(
        folder / "ILSVRC2012_devkit_t12.tar.gz",
        {
            f"{root}/COPYING": b"",
            f"{root}/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
            f"{root}/data/meta.mat": meta_mat(classes),
            f"{root}/evaluation/get_class2node.m": b"",
            f"{root}/readme.txt": b"",
        },
        "w:gz",
    )
    return images


def truth_of(number: int, classes: int = len(SYNSETS)) -> int:
    """The ILSVRC2012_ID of a validation image."""
    return (2 * number) % classes + 1
