"""The scale of losses at ZeRO stages 1 to 3. With fp16 arithmetic: test_training_on_gpu.py."""

from pathlib import Path
from typing import Any

import pytest
import ranks
import scaled_losses
import torch

Answers = list[dict[int, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scaled")


@pytest.fixture(scope="module")
def trained(folder: Path) -> Answers:
    return ranks.run(scaled_losses.trained, folder, 2)


@pytest.mark.parametrize("stage", scaled_losses.STAGES)
def test_a_scale_changes_no_training_with_clipped_gradients(trained: Answers, stage: int) -> None:
    for answer in (each[stage] for each in trained):
        assert answer["scale"] == 2**16
        assert answer["scaled"] == pytest.approx(answer["unscaled"], rel=1e-5)
        assert answer["scaled"][-1] < answer["scaled"][0]


@pytest.mark.parametrize("stage", scaled_losses.STAGES)
def test_a_step_that_overflows_is_left_out_on_all_ranks_and_lowers_the_scale(
    trained: Answers, stage: int
) -> None:
    first, second = (each[stage] for each in trained)
    for answer in (first, second):
        assert answer["kept"] and answer["moved"] and answer["skipped"] == 1
        assert answer["after overflow"] == 2**15
        assert answer["weights"].isfinite().all()
    assert first["saved"] == second["saved"]
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)


def test_the_scale_is_in_checkpoints_also_for_another_number_of_ranks(
    trained: Answers, folder: Path
) -> None:
    expected = {stage: trained[0][stage]["saved"] for stage in scaled_losses.STAGES}
    for number in (1, 2):
        for answer in ranks.run(scaled_losses.restored, folder, number):
            assert answer == expected


def test_a_gradient_that_no_scale_makes_finite_ends_the_training(folder: Path) -> None:
    (answer,) = ranks.run(scaled_losses.without_end, folder, 1)
    for stage in scaled_losses.STAGES:
        assert answer[stage].startswith("gradient: is not a finite number at a step from 16 to 16")


def test_an_fp32_training_after_one_at_fp16_has_no_scale(folder: Path) -> None:
    (answer,) = ranks.run(scaled_losses.after_an_fp16_training, folder, 1)
    assert answer == dict.fromkeys(scaled_losses.STAGES, True)
