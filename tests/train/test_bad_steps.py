"""Losses, weights and states that are not finite, on two ranks at each ZeRO stage."""

import re
from pathlib import Path
from typing import Any

import bad_steps
import pytest
import ranks

Answers = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad-steps")


@pytest.fixture(scope="module")
def answers(folder: Path) -> Answers:
    return ranks.run(bad_steps.all_of_it, folder, 2)


def test_a_nan_on_one_rank_stops_all_ranks_before_the_next_checkpoint(answers: Answers) -> None:
    errors = [answer["nan"]["error"] for answer in answers]
    assert errors[0] == errors[1]
    assert re.match(
        r"loss: is not a finite number at step 3 \(learning rate 0\.05, images 112, 113, 114, 115, "
        r"116, 117, 118, 119, … \(16 in all\)\); the last good checkpoint is that of step 2; lower",
        errors[0],
    )
    assert [answer["nan"]["saved"] for answer in answers] == [[2], [2]]


@pytest.mark.parametrize("name", bad_steps.LEFT_OUT)
def test_a_bad_step_changes_nothing_on_any_rank_and_training_goes_on(
    answers: Answers, name: str
) -> None:
    for answer in answers:
        found = answer["left_out"][name]
        assert found["bad"] == [3]
        assert found["unchanged"] == [3]
        assert found["left_out"] == 1
        assert found["finite"]
        assert found["weights"].equal(answers[0]["left_out"][name]["weights"])


def test_a_bad_step_more_than_is_allowed_stops_the_training(answers: Answers) -> None:
    for answer in answers:
        assert "not a finite number at step 5" in answer["left_out"]["error"]
        assert "skip_bad_steps = 1 allows no more" in answer["left_out"]["error"]


def test_a_bad_gradient_is_reported_also_where_a_bad_loss_was_skipped_after_it(
    answers: Answers,
) -> None:
    for answer in answers:
        assert answer["gradient"].startswith(
            "gradient: is not a finite number at a step from 0 to 3; there is no checkpoint yet"
        )


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("parameter", "student.5.weight"),
        ("buffer", "student.1.running_var"),
        ("state", "momentum_buffer of student.0.weight … student.5.weight"),
    ],
)
def test_what_is_not_finite_on_one_rank_is_saved_on_none(
    answers: Answers, folder: Path, what: str, name: str
) -> None:
    for answer in answers:
        assert (
            f"checkpoint at step 2: {name} is not finite, so nothing is saved"
            in (answer["refused"][what])
        )
    assert not list((folder / f"refused-{what}").rglob("*"))


def test_the_device_is_read_once_a_record(answers: Answers) -> None:
    assert answers[0]["reads"] == {"zero 0": 3, "zero 1": 3, "zero 2": 3}
