from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.splits import Selection, parts, pick_labelled, read_split, share_out, write_split
from sbf_dist.errors import UserError

CLASSES = ["ant", "bee", "cow"]
ROOT = Path("/images")
FILES = [
    *(f"train/{name}/{k:02}.png" for name in CLASSES for k in range(10)),
    *(f"unlabelled/{k}.png" for k in range(4)),
    *(f"val/{name}/v.png" for name in CLASSES),
]
LABELS = np.array([*np.repeat([0, 1, 2], 10), *[-1] * 4, 0, 1, 2])
ROLES = np.array(["train"] * 30 + ["unlabelled"] * 4 + ["val"] * 3)


def divided(skipped: tuple[str, ...] = (), **selection) -> dict[str, np.ndarray]:
    return parts(ROOT, CLASSES, FILES, LABELS, ROLES, Selection(**selection), skipped=skipped)


def test_a_split_that_was_written_is_read_and_gives_the_labelled_images(tmp_path):
    chosen = [FILES[3], FILES[14], FILES[15], FILES[29]]
    write_split(tmp_path / "deep" / "split.txt", chosen, "labelled images")
    assert read_split(tmp_path / "deep" / "split.txt") == chosen
    found = divided(split=tmp_path / "deep" / "split.txt")
    assert found["labelled"].tolist() == [3, 14, 15, 29]
    assert found["validation"].tolist() == [34, 35, 36]
    assert sorted([*found["labelled"], *found["unlabelled"]]) == list(range(34))


def test_a_split_may_name_files_without_their_folders(tmp_path):
    files = [f"train/{name}/{name}_{k}.JPEG" for name in CLASSES for k in range(2)] + FILES[30:]
    labels = np.array([0, 0, 1, 1, 2, 2, *LABELS[30:]])
    roles = np.array(["train"] * 6 + list(ROLES[30:]))
    path = tmp_path / "1percent.txt"  # as SimCLR's lists are
    path.write_text("ant_1.JPEG\nbee_0.JPEG\ncow_1.JPEG\n")
    found = parts(ROOT, CLASSES, files, labels, roles, Selection(split=path))
    assert found["labelled"].tolist() == [1, 2, 5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train/ant/00.png\ntrain/ant/77.png\n", r"1 of its names do not match .*ant/77\.png"),
        ("val/ant/v.png\n", r"1 of its names do not match exactly one training image of /images"),
        ("00.png\n", r"exactly one training image of \S+: 00\.png"),
        ("train/ant/00.png\ntrain/bee/01.png\n", "leaves the class 'cow' without a labelled"),
        ("# only this\n\n", "lists no image"),
        (None, r"split\.txt: cannot be read \(No such file or directory\)"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(tmp_path, text, message):
    path = tmp_path / "split.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        divided(split=path)


def test_a_split_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "split.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="it is not UTF-8 text"):
        divided(split=tmp_path / "split.txt")


def test_a_split_may_name_images_that_were_left_out(tmp_path):
    path = tmp_path / "split.txt"
    path.write_text("train/ant/00.png\ntrain/bee/00.png\ntrain/cow/00.png\ntrain/ant/bad.png\n")
    found = divided(split=path, skipped=("train/ant/bad.png",))
    assert found["labelled"].tolist() == [0, 10, 20]


def test_a_split_and_a_number_at_once_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"give one of the two"):
        Selection(labelled=3, split=tmp_path)


def test_a_share_takes_its_part_of_each_class_and_one_at_least():
    assert len(divided(labelled=0.3)["labelled"]) == 9
    assert len(divided(labelled=0.01)["labelled"]) == 3
    for share in (0.0, 1.0, 1.5, float("nan")):
        with pytest.raises(UserError, match="a share must be between 0 and 1"):
            divided(labelled=share)


@given(st.integers(1, 10), st.floats(0.01, 0.99), st.integers(0, 5))
def test_numbers_and_shares_are_nested(number, share, seed):
    train = [np.arange(10), np.arange(10, 20), np.arange(20, 30)]
    by_number = pick_labelled(ROOT, CLASSES, train, number, seed)
    by_share = pick_labelled(ROOT, CLASSES, train, share, seed)
    for ids, some, others in zip(train, by_number, by_share, strict=True):
        assert len(some) == number
        assert len(others) == max(1, round(10 * share))
        small, large = sorted((set(some), set(others)), key=len)
        assert small <= large <= set(ids)


def test_a_list_cannot_be_written_where_a_file_is_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_split(tmp_path / "file" / "split.txt", ["a"], "x")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.floats(0, 1))
def test_shares_add_up_stay_below_their_caps_and_near_the_proportion(counts, part):
    counts = np.array(counts)
    caps = counts - 1
    take = int(part * caps.sum())
    shares = share_out(counts, take, caps)
    assert shares.sum() == take
    assert (shares <= caps).all()
    if (np.ceil(take * counts / counts.sum()) <= caps).all():
        assert (np.abs(shares - take * counts / counts.sum()) < 1).all()
