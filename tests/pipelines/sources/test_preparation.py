import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from archive_makers import cifar10_binary, cifar10_python, cifar100_python, imagenet, tiny_imagenet

from pipelines.sources import units
from pipelines.sources.manifest import WORK, is_prepared, read_manifest, read_samples
from pipelines.sources.preparation import prepare
from pipelines.sources.verification import check
from sbf_dist.errors import UserError

COUNTS = {
    "cifar10": ({"train": 50, "val": 10}, 10),
    "cifar100": ({"train": 16, "val": 8}, 4),
    "tiny-imagenet": ({"train": 12, "val": 4}, 2),
    "imagenet": ({"train": 18, "val": 9}, 3),
}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    for make in (cifar10_python, cifar100_python, tiny_imagenet, imagenet):
        make(folder)
    return folder


def content(root: Path) -> dict[str, str]:
    """Every file below `root`, with its digest."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("name", COUNTS)
def test_a_set_is_the_same_in_both_layouts_and_checks(archives, tmp_path, name):
    counts, classes = COUNTS[name]
    manifests = {}
    for layout in ("folder", "webdataset"):
        out = tmp_path / layout
        manifests[layout] = prepare(name, archives, out, layout=layout, checksum=False)
        assert manifests[layout] == read_manifest(out)
        assert manifests[layout].counts == counts
        assert len(manifests[layout].classes) == classes
        assert check(out).whole
        assert not (out / WORK).exists()
    assert manifests["folder"].content == manifests["webdataset"].content
    table = read_samples(tmp_path / "folder", manifests["folder"])
    assert table["file"].to_pylist() == sorted(table["file"].to_pylist())
    assert set(table["file"].to_pylist()) | {"manifest.json", "samples.parquet"} == set(
        content(tmp_path / "folder")
    )
    assert table["fault"].null_count == len(table)


def test_members_of_shards_are_the_files_of_the_folder(archives, tmp_path):
    prepare("imagenet", archives, tmp_path / "folder", checksum=False)
    manifest = prepare(
        "imagenet", archives, tmp_path / "shards", layout="webdataset", checksum=False
    )
    for sample in read_samples(tmp_path / "shards", manifest).to_pylist():
        shard = tmp_path / "shards" / manifest.shards[sample["shard"]]["file"]
        with shard.open("rb") as file:
            file.seek(sample["offset"])
            data = file.read(sample["bytes"])
        assert data == (tmp_path / "folder" / sample["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == sample["sha256"]


def test_the_manifest_has_what_the_set_comes_from(archives, tmp_path):
    manifest = prepare("imagenet", archives, tmp_path / "out", checksum=False)
    names = [archive["file"] for archive in manifest.archives]
    assert names == [
        "ILSVRC2012_img_train.tar",
        "ILSVRC2012_img_val.tar",
        "ILSVRC2012_devkit_t12.tar.gz",
    ]
    for archive in manifest.archives:
        data = (archives / archive["file"]).read_bytes()
        assert archive["md5"] == hashlib.md5(data).hexdigest()
        assert archive["bytes"] == len(data)
        assert not archive["published"]
    assert manifest.classes[0] == {
        "folder": "n02096294",
        "name": "Australian terrier",
        "train": 6,
        "val": 3,
    }


def test_archives_that_are_not_the_published_ones_are_refused(archives, tmp_path):
    for name in COUNTS:
        with pytest.raises(UserError, match=r"MD5 \w{32} is not the published \w{32}"):
            prepare(name, archives, tmp_path / name)
        assert not is_prepared(tmp_path / name)


def test_either_archive_of_cifar_will_do(archives, tmp_path):
    cifar10_binary(tmp_path / "binary")
    one = prepare("cifar10", archives, tmp_path / "one", checksum=False)
    other = prepare("cifar10", tmp_path / "binary", tmp_path / "other", checksum=False)
    assert one.content == other.content
    assert one.archives != other.archives


def test_a_set_that_is_prepared_is_left_as_it_is(archives, tmp_path):
    out = tmp_path / "out"
    first = prepare("cifar100", archives, out, checksum=False)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert prepare("cifar100", tmp_path / "no archives needed", out) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == stamps


def test_a_folder_that_holds_anything_else_is_refused_and_left_alone(archives, tmp_path):
    out = tmp_path / "out"
    prepare("cifar100", archives, out, checksum=False)
    with pytest.raises(UserError, match=r"holds cifar100 as folder .* already; choose a new"):
        prepare("cifar10", archives, out, checksum=False)
    with pytest.raises(UserError, match="holds cifar100 as folder"):
        prepare("cifar100", archives, out, layout="webdataset", checksum=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(notes\.txt\); choose a new folder"):
        prepare("cifar10", archives, tmp_path / "mine", checksum=False)
    with pytest.raises(UserError, match="is a file; choose a new folder"):
        prepare("cifar10", archives, tmp_path / "mine" / "notes.txt", checksum=False)
    assert content(tmp_path / "mine").keys() == {"notes.txt"}


def interrupted(monkeypatch: pytest.MonkeyPatch, archives: Path, out: Path, **arguments) -> None:
    """Prepare, and break off after some images of the second unit or so."""
    monkeypatch.setattr(units, "IMAGES_PER_UNIT", 7)
    monkeypatch.setattr(units, "IMAGES_PER_REPORT", 1)
    # One unit after the other: of several at a time, none may be noted before all images are done.
    monkeypatch.setattr(units, "_threads", lambda: 1)

    def progress(title: str, done: int, of: int, unit: str) -> None:
        if title == "images" and done > of // 2 and any((out / WORK / "notes").iterdir()):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare("cifar10", archives, out, checksum=False, progress=progress, **arguments)
    assert list((out / WORK / "notes").iterdir())
    assert not is_prepared(out)


def test_what_was_begun_with_other_settings_is_not_mixed_with_these(
    archives, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    interrupted(monkeypatch, archives, out)
    with pytest.raises(UserError, match="begun with other layout folder, not webdataset; choose"):
        prepare("cifar10", archives, out, layout="webdataset", checksum=False)
    cifar10_python(tmp_path / "others", per_batch=5)
    with pytest.raises(UserError, match="begun with other archives; choose"):
        prepare("cifar10", tmp_path / "others", out, checksum=False)
    prepare("cifar10", archives, out, checksum=False)
    assert check(out).whole


def test_files_that_vanished_after_they_were_noted_are_made_again(archives, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(monkeypatch, archives, out)
    noted = [
        path
        for path in sorted((out / WORK / "made").rglob("*.png"))
        if path.stat().st_size  # of whole units or not
    ]
    noted[0].write_bytes(b"")
    noted[1].unlink()
    prepare("cifar10", archives, out, checksum=False)
    assert check(out).whole


def test_notes_that_are_damaged_are_made_again(archives, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(monkeypatch, archives, out)
    noted = [*sorted((out / WORK / "notes").iterdir())[:2], *(out / WORK).glob("cifar*.json")]
    assert len(noted) > 2
    for path in noted:
        path.write_bytes(b"")
    prepare("cifar10", archives, out, checksum=False)
    assert check(out).whole


def test_damaged_settings_of_what_was_begun_say_what_to_remove(archives, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(monkeypatch, archives, out)
    (out / WORK / "settings.json").write_bytes(b"")
    with pytest.raises(UserError, match=rf"settings\.json is damaged: .*; remove {out / WORK} to"):
        prepare("cifar10", archives, out, checksum=False)


def test_what_a_killed_process_left_half_written_is_removed(archives, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(monkeypatch, archives, out, layout="webdataset")
    for folder in (out, out / WORK / "made"):
        (folder / ".train-000000.tar.123.partial").write_bytes(b"half")
    prepare("cifar10", archives, out, layout="webdataset", checksum=False)
    assert check(out).whole
    assert not list(out.glob(".*"))


def test_two_processes_do_not_prepare_one_folder(archives, tmp_path):
    import fcntl

    out = tmp_path / "out"
    (out / WORK).mkdir(parents=True)
    with (out / WORK / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being prepared by another process"):
            prepare("cifar10", archives, out, checksum=False)
    prepare("cifar10", archives, out, checksum=False)


def command(archives: Path, out: Path, layout: str) -> list[str]:
    arguments = ["--archives", str(archives), "--out", str(out), "--format", layout]
    program = "from launchers.cli import main; main()"
    return [
        sys.executable, "-c", program, "data", "prepare", "cifar10", "--no-checksum", *arguments
    ]  # fmt: skip


# In the middle of a unit: some files, or a part of a tar file, are there.
KILLED = """
import os, signal, threading, time
from pathlib import Path

def kill():
    written = Path(os.environ["WRITTEN"])
    while not any(path.is_file() for path in written.rglob("*")):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=kill, daemon=True).start()
"""


@pytest.mark.parametrize("layout", ["folder", "webdataset"])
def test_a_kill_in_the_middle_changes_nothing_of_the_result(tmp_path, layout):
    cifar10_python(tmp_path / "archives", per_batch=300)
    out = tmp_path / "out"
    written = out / WORK / "made"
    program, *arguments = command(tmp_path / "archives", out, layout)[2:]
    killed = [sys.executable, "-c", KILLED + program, *arguments]
    environment = os.environ | {"WRITTEN": str(written)}
    assert subprocess.run(killed, env=environment, check=False, timeout=240).returncode == -9
    assert not is_prepared(out)
    left = len(list(written.rglob("*")))
    assert left
    subprocess.run(command(tmp_path / "archives", out, layout), check=True, timeout=240)
    uncut = tmp_path / "uncut"
    prepare("cifar10", tmp_path / "archives", uncut, layout=layout, checksum=False)
    assert content(out) == content(uncut)


def test_after_a_kill_units_that_were_done_are_not_done_again(archives, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(monkeypatch, archives, out)
    noted = len(list((out / WORK / "notes").iterdir()))
    seen: list[int] = []
    prepare(
        "cifar10",
        archives,
        out,
        checksum=False,
        progress=lambda title, done, of, unit: seen.append(done) if title == "images" else None,
    )
    assert min(seen) == 7 * noted + 1
    assert max(seen) == 60


@pytest.mark.parametrize("cut", ["train", "val", "samples.parquet", "manifest.json"])
def test_a_kill_between_the_last_steps_changes_nothing(archives, tmp_path, monkeypatch, cut):
    out, uncut = tmp_path / "out", tmp_path / "uncut"
    prepare("cifar10", archives, uncut, checksum=False)
    replace = Path.replace

    def stops(self: Path, target: Path) -> Path:
        result = replace(self, target)
        if target == out / cut:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Path, "replace", stops)
    with pytest.raises(KeyboardInterrupt):
        prepare("cifar10", archives, out, checksum=False)
    monkeypatch.undo()
    assert (out / cut).exists()
    assert is_prepared(out) == (cut == "manifest.json")
    assert (out / WORK).exists()
    prepare("cifar10", archives, out, checksum=False)
    assert content(out) == content(uncut)
    assert check(out).whole


def test_sums_of_archives_are_kept_for_the_next_try(archives, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(monkeypatch, archives, out)
    titles: set[str] = set()
    prepare(
        "cifar10",
        archives,
        out,
        checksum=False,
        progress=lambda title, *_: titles.add(title),
    )
    assert titles == {"images"}


def test_a_disk_that_is_too_small_is_reported_before_the_work(archives, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs 0\.0 GB more, the disk has 0\.0 GB free; choose"):
        prepare("cifar10", archives, tmp_path / "out", checksum=False)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full; free some space and run the same command again"),
        (errno.EROFS, "is on a read-only disk; choose another folder"),
        (errno.EACCES, "is not writable; choose another folder"),
        (errno.EIO, "cannot be written"),
    ],
)
def test_what_keeps_files_from_being_written_is_one_line(
    archives, tmp_path, monkeypatch, number, message
):
    write_bytes = Path.write_bytes

    def refuses(self: Path, data: bytes) -> int:
        if self.name == "00031.png":
            raise OSError(number, os.strerror(number))
        return write_bytes(self, data)

    monkeypatch.setattr(Path, "write_bytes", refuses)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=message) as raised:
        prepare("cifar10", archives, out, checksum=False)
    assert "\n" not in str(raised.value)
    monkeypatch.undo()
    prepare("cifar10", archives, out, checksum=False)
    assert check(out).whole


def test_a_real_limit_on_files_stops_the_command_with_one_line(archives, tmp_path):
    # As a full disk would, and without one: files may not grow beyond 20 kB.
    out = tmp_path / "out"
    process = subprocess.run(
        command(archives, out, "webdataset"),
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)),
    )
    assert process.returncode == 2
    assert process.stderr == (
        f"sbf: data {out}: the limit on file sizes is reached (ulimit -f); raise it and run the "
        "same command again\n"
    )
    subprocess.run(command(archives, out, "webdataset"), check=True, timeout=240)
    assert check(out).whole


def test_a_place_where_no_folder_can_be_made_is_reported(archives):
    with pytest.raises(UserError, match="/proc/nowhere/out: "):
        prepare("cifar10", archives, Path("/proc/nowhere/out"), checksum=False)


def test_notes_are_plain_json(archives, tmp_path, monkeypatch):
    interrupted(monkeypatch, archives, tmp_path / "out")
    for note in (tmp_path / "out" / WORK / "notes").iterdir():
        assert {len(image) for image in json.loads(note.read_text())["images"]} == {5}
