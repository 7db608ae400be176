from pathlib import Path

import pytest
from tiny_run import BATCHES_OF_40

from launchers.run.folder import RunFolder
from launchers.run.network import Job
from launchers.run.shares import (
    divided,
    epoch_steps,
    expected_numbers_of_workers,
    has_unlabelled,
    numbers_of_workers,
    step_shares,
)
from sbf_dist.distill_recipe import Distill
from sbf_dist.errors import UserError
from sbf_dist.recipe import Recipe, validate
from sbf_dist.training_recipe import Training

IMAGES = {"labelled": 1000, "unlabelled": 9000}


TRAINING = Training(steps=1, batch_size=64)


def _job(share: float = 0.25) -> Job:
    distill = Distill(training=TRAINING, labelled_share=share)
    return Job("distill", TRAINING, 0, Path("start"), distill)


def test_the_images_of_a_step_are_shared_out_before_the_workers_are_counted() -> None:
    assert step_shares(_job(), IMAGES, pairs=False) == {"labelled": 16, "unlabelled": 48}
    assert step_shares(_job(share=1), IMAGES, pairs=False) == {"labelled": 64}
    assert step_shares(Job("distill", TRAINING, 0), IMAGES, pairs=False) == {"labelled": 64}
    assert step_shares(_job(), {"labelled": 1000, "unlabelled": 0}, pairs=False) == {"labelled": 64}


@pytest.mark.parametrize("workers", [1, 2, 4, 8, 16])
def test_shares_that_the_workers_divide_are_the_same_for_all_numbers_of_them(workers: int) -> None:
    shares = {"labelled": 16, "unlabelled": 48}
    assert divided(shares, workers, pairs=False) == shares


@pytest.mark.parametrize(("workers", "pairs"), [(32, False), (64, False), (16, True)])
def test_shares_that_the_workers_do_not_divide_are_refused_with_numbers_that_do(
    workers: int, pairs: bool
) -> None:
    with pytest.raises(UserError) as refused:
        divided({"labelled": 16, "unlabelled": 48}, workers, pairs=pairs)
    message = str(refused.value)
    assert f"batch of 16 labelled and 48 unlabelled images: {workers} workers" in message
    assert f"these numbers do: 1, 2, 4, 8{'' if pairs else ', 16'}, or change batch" in message


def test_an_epoch_lasts_until_the_longest_stream_was_seen() -> None:
    for job, expected in (
        (_job(), 9000 / 48),
        (_job(share=0.75), 9000 / 16),
        (Job("distill", TRAINING, 0), 1000 / 64),
    ):
        assert epoch_steps(job, IMAGES, pairs=False) == pytest.approx(expected)


def _recipe(*overrides: str) -> Recipe:
    return validate(BATCHES_OF_40, overrides, "recipe")


def test_numbers_of_workers_divide_both_parts_of_a_step_of_the_students() -> None:
    recipe = _recipe("workers.count=[2, 8]")  # 10 images with labels, 30 without
    assert numbers_of_workers(recipe, unlabelled=False) == [2, 4, 5, 8]
    assert numbers_of_workers(recipe, unlabelled=True) == [2, 5]
    twice = _recipe("workers.count=[1, 8]", "distill.training.accumulation=2")
    assert numbers_of_workers(twice, unlabelled=True) == [1, 5]
    alone = _recipe("workers.count=[2, 8]", "distill.labelled_share=0")
    assert numbers_of_workers(alone, unlabelled=True) == [2, 4, 5, 8]
    mixed = _recipe("workers.count=[2, 8]", "data.augmentation={mixup: 0.2}")
    assert numbers_of_workers(mixed, unlabelled=True) == [5]


def test_workers_of_whom_no_number_divides_the_parts_are_refused_with_numbers_that_do() -> None:
    with pytest.raises(UserError) as refused:
        numbers_of_workers(_recipe("workers.count=8"), unlabelled=True)
    assert str(refused.value) == (
        "workers.count = 8 must divide the 10 labelled and 30 unlabelled images of a step of "
        "distill.training: 1, 2, 5 or 10 does; or change distill.training.batch_size or "
        "distill.labelled_share"
    )
    four = _recipe("workers.count=1", "distill.training.accumulation=4")
    with pytest.raises(UserError, match=r"of a step of distill.training in 4 passes: no number do"):
        numbers_of_workers(four, unlabelled=True)


def test_whether_there_are_images_without_labels_is_known_before_they_are_counted(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path, "tiny")
    assert has_unlabelled(_recipe("data.labelled_per_class=null"), folder) is False
    assert has_unlabelled(_recipe("data.unlabelled=more"), folder) is True
    assert has_unlabelled(_recipe(), folder) is None
    folder.result("prepare").parent.mkdir(parents=True)
    folder.result("prepare").write_text('{"labelled": 100, "unlabelled": 0}')
    assert has_unlabelled(_recipe(), folder) is False


def test_before_the_images_are_counted_workers_suit_steps_with_and_without_a_second_part(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path, "tiny")
    assert expected_numbers_of_workers(_recipe("workers.count=[2, 8]"), folder) == [2, 5]
    assert expected_numbers_of_workers(_recipe("workers.count=8"), folder) == [8]
    with pytest.raises(UserError, match=r"workers.count = 8 must divide"):
        expected_numbers_of_workers(_recipe("workers.count=8", "data.unlabelled=more"), folder)
