"""Files that a run reads are part of it by their content: weights, and code of networks."""

from pathlib import Path

import pytest
from tiny_run import ALL, checkpoint, do, done, networks_of

from launchers.run.sequence import open_folder
from sbf_dist.errors import UserError


def test_weights_that_were_overwritten_are_another_teacher(tmp_path: Path) -> None:
    given = tmp_path / "given.safetensors"
    given.write_text("first")
    networks = networks_of(tmp_path, "teachers.1.training=null", f"teachers.1.weights={given}")
    do(networks, *ALL)
    open_folder(networks, None)
    given.write_text("second")
    with pytest.raises(UserError) as caught:
        open_folder(networks, None)
    assert (
        "teachers was done with another content of teachers.1.weights; give --again teachers"
    ) in str(caught.value)
    open_folder(networks, "teachers")
    assert done(networks) == ["prepare", "compress"]
    given.unlink()
    with pytest.raises(UserError, match=r"teachers\.1\.weights = '.*' does not exist"):
        open_folder(networks, None)


def test_weights_of_a_run_of_an_earlier_version_are_taken_to_be_the_same(tmp_path: Path) -> None:
    given = tmp_path / "given.safetensors"
    given.write_text("first")
    networks = networks_of(tmp_path, "teachers.1.training=null", f"teachers.1.weights={given}")
    do(networks, *ALL, digests=False)
    open_folder(networks, None)
    assert done(networks) == ALL


def own_network(folder: Path) -> tuple[str, Path]:
    """A network of the user's own in a file that imports another one: its name, and that file."""
    (folder / "nets").mkdir()
    (folder / "nets" / "mine.py").write_text("import blocks\ndef net(num_classes): ...\n")
    (folder / "nets" / "blocks.py").write_text("WIDTH = 8\n")
    return f"teachers.1.model={folder}/nets/mine.py:net", folder / "nets" / "blocks.py"


def test_edited_code_of_a_network_is_another_teacher(tmp_path: Path) -> None:
    model, blocks = own_network(tmp_path)
    networks = networks_of(tmp_path, model)
    do(networks, *ALL)
    open_folder(networks, None)
    blocks.write_text("WIDTH = 12\n")
    with pytest.raises(UserError) as caught:
        open_folder(networks, None)
    assert str(caught.value) == (
        f"run folder {networks.folder.root}: teachers was done with another content of blocks.py "
        "(code of teachers.1.model); give --again teachers (which repeats teachers, "
        "pseudo-labels, distill, evaluate, export) or another name (name=…)"
    )
    open_folder(networks, "teachers")
    assert done(networks) == ["prepare", "compress"]


def test_code_of_a_run_of_an_earlier_version_is_taken_to_be_the_same(tmp_path: Path) -> None:
    networks = networks_of(tmp_path, own_network(tmp_path)[0])
    do(networks, *ALL, digests=False)
    networks.folder.read_files.unlink()
    open_folder(networks, None)
    assert done(networks) == ALL


@pytest.mark.parametrize("kind", ["code", "weights"])
def test_a_file_that_changes_while_a_stage_is_cut_is_noticed(tmp_path: Path, kind: str) -> None:
    if kind == "code":
        change, file = own_network(tmp_path)
    else:
        file = tmp_path / "start.safetensors"
        file.touch()
        change = f"teachers.1.start_from={file}"
    networks = networks_of(tmp_path, change)
    do(networks, "prepare")
    open_folder(networks, None)
    checkpoint(networks, "teachers")
    file.write_text("WIDTH = 12\n")
    with pytest.raises(UserError, match=r"teachers was begun with another content of .*teachers.1"):
        open_folder(networks, None)
    open_folder(networks, "teachers")
    assert open_folder(networks, None) == []
