"""What is sent to a cluster: what Git would keep, and no more than Ray takes."""

import subprocess
from pathlib import Path

import pytest

from launchers import packing
from sbf_dist.errors import UserError

KEPT = ["mine.py", "recipes/a.yaml", "sbf_dist/ops.py"]
NOT_SENT = [
    "runs/a/weights.safetensors",
    "data/photo.jpg",
    "sbf_dist/_C.cpython-311.so",
    "sbf_dist/__pycache__/ops.pyc",
    ".env",
]


def checkout(root: Path, *, git: bool) -> Path:
    for name in [*KEPT, *NOT_SENT, "recipes/secret.yaml"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "link.yaml").symlink_to(root / "data" / "photo.jpg")
    if git:
        (root / ".gitignore").write_text("secret.yaml\n.env\n*.so\n__pycache__/\n")
        subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
        subprocess.run(["git", "add", "mine.py"], cwd=root, check=True)
    return root


def test_of_a_git_checkout_goes_what_is_tracked_or_could_be(tmp_path: Path) -> None:
    files = packing.files_of(checkout(tmp_path, git=True))
    assert [str(path) for path in files] == [".gitignore", *KEPT]


def test_of_another_folder_goes_what_is_not_hidden(tmp_path: Path) -> None:
    files = packing.files_of(checkout(tmp_path, git=False))
    assert sorted(map(str, files)) == sorted([*KEPT, "recipes/secret.yaml"])


def test_a_tracked_file_that_was_deleted_is_not_missed(tmp_path: Path) -> None:
    root = checkout(tmp_path, git=True)
    (root / "mine.py").unlink()
    assert Path("mine.py") not in packing.files_of(root)


def test_a_pack_has_the_files_at_their_places(tmp_path: Path) -> None:
    root, into = tmp_path / "from", tmp_path / "to"
    files = packing.files_of(checkout(root, git=False))
    packing.pack(root, files, into)
    assert (into / "recipes" / "a.yaml").read_text() == "recipes/a.yaml"
    assert sorted(p.relative_to(into) for p in into.rglob("*") if p.is_file()) == sorted(files)


def test_too_much_is_refused_with_the_largest_files(tmp_path: Path) -> None:
    for name, size in (("small.bin", 1), ("large.bin", packing.MOST_BYTES)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)  # sparse
    with pytest.raises(UserError) as caught:
        packing.files_of(tmp_path)
    assert str(caught.value) == (
        f"folder {tmp_path}: 100 MiB would be uploaded, Ray's limit is 100; the largest files "
        "are large.bin (100.0 MiB), small.bin (0.0 MiB); move them to data/ or runs/, or list "
        "them in .gitignore"
    )


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no file to upload"):
        packing.files_of(tmp_path)
