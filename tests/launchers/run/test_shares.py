from pathlib import Path

import pytest

from launchers.run.networks import Job
from launchers.run.shares import divided, epoch_steps, step_shares
from sbf_dist.distill_recipe import Distill
from sbf_dist.errors import UserError
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
