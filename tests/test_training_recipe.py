"""How long a training is, and how its batches are shared out."""

import pytest

from sbf_dist.errors import UserError
from sbf_dist.training_recipe import Training


def test_a_length_in_epochs_becomes_steps_once_the_images_are_known():
    training = Training(epochs=90, warmup_epochs=5)
    assert training.lengths(1251.1) == (112599, 6256)
    assert training.length == "90 epochs"
    assert Training(epochs=0.01).lengths(3.0) == (1, 0)
    assert Training(steps=50, warmup=7).lengths(1000.0) == (50, 7)
    with pytest.raises(UserError, match="warm-up of 7 steps must be shorter than the 6 steps"):
        Training(epochs=2, warmup=7).lengths(3.0)


def test_a_shortened_training_has_a_share_of_the_length_and_of_the_warm_up():
    steps = Training(steps=52, warmup=4).shortened(1 / 5, None)
    assert (steps.steps, steps.warmup) == (10, 2)
    epochs = Training(epochs=10, warmup_epochs=1).shortened(1 / 5, None)
    assert (epochs.steps, epochs.epochs, epochs.warmup_epochs) == (None, 2.0, 0.2)
    given = Training(epochs=10, warmup_epochs=1).shortened(1 / 5, 30)
    assert (given.steps, given.epochs, given.warmup_epochs) == (30, None, None)

    mixed = Training(epochs=10, warmup=50).shortened(1 / 5, None)
    assert (mixed.epochs, mixed.warmup) == (2.0, 10)
    assert Training(epochs=10, warmup=50).lengths(6.0) == (60, 50)
    assert mixed.lengths(6.0) == (12, 10)


def test_fewer_workers_take_more_passes_where_the_images_at_once_are_limited():
    training = Training(steps=1, batch_size=96, images_at_once=16)
    assert {n: training.passes(n) for n in (1, 2, 3, 6, 12, 96)} == {
        1: 6, 2: 3, 3: 2, 6: 1, 12: 1, 96: 1,
    }  # fmt: skip
    assert Training(steps=1, batch_size=60, images_at_once=16).passes(2, pairs=True) == 3
    with pytest.raises(UserError, match="multiple of workers x accumulation = 5: 95 or 100, or 1"):
        training.passes(5)
    with pytest.raises(UserError, match="at once; mixup and cutmix need an even number: 64, or 2,"):
        Training(steps=1, batch_size=32).passes(32, pairs=True)


@pytest.mark.parametrize("steps", [[5, 5], [-1, 2], [9, 3]])
def test_steps_to_profile_must_be_a_range(steps):
    with pytest.raises(ValueError, match=r"must be \[from, to\] with 0 <= from < to"):
        Training(steps=10, profile_steps=steps)
