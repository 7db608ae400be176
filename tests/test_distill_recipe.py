"""Of what the loss of a student is made, and how long its trainings are."""

from pathlib import Path

import pytest
from minimal_recipe import MINIMAL, refusal

from sbf_dist import recipe
from sbf_dist.distill_recipe import Distill


@pytest.mark.parametrize(
    "setting",
    [
        {"labelled_share": 0},
        {"label_weight": 0},
        {"teacher_weight": 0},
        {"labelled_share": 0, "teacher_weight": [0, 1]},
        {"labelled_share": 0, "teacher_weight": 0, "consistency": {}},
        {"label_weight": 0, "teacher_weight": 0, "features": {}},
    ],
)
def test_one_part_of_the_loss_is_enough(setting) -> None:
    Distill.model_validate({"training": {"steps": 9}} | setting)


def test_the_warm_up_between_rounds_is_over_before_the_steps_on_labels_alone() -> None:
    settings = {"training": {"steps": 200, "warmup": 20}, "labels_last": {"share": 0.85}}
    between = Distill.model_validate(settings | {"round_steps": 20}).round_training()
    assert (between.steps, between.warmup) == (20, 0)
    half = Distill.model_validate(settings | {"labels_last": {"share": 0.5}}).round_training()
    assert (half.steps, half.warmup) == (40, 8)


def test_rounds_that_labels_alone_take_whole_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(MINIMAL)
    distill = "distill={round_steps: 1, training: {steps: 50}, labels_last: {share: 0.6}}"
    assert refusal(path, distill, "compress.rounds=2") == (
        f"recipe {path}: distill: between rounds, labels_last leaves 0 of 1 steps before, which "
        "must be more than training.warmup = 0"
    )
    assert recipe.load(path, [distill]).distill.round_steps == 1  # of no rounds
