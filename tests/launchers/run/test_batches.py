import pytest

from launchers.run.batches import with_progress


def test_progress_goes_from_0_in_the_first_step_to_1_in_the_last_and_stays_there() -> None:
    given = with_progress([{} for _ in range(10)], start=0, steps=4, passes=2)
    shares = [float(batch["progress"]) for batch in given]
    assert shares == pytest.approx([0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1, 1, 1])


def test_a_training_that_is_resumed_has_the_progress_of_its_step() -> None:
    (batch,) = with_progress([{}], start=2, steps=5, passes=1)
    assert float(batch["progress"]) == 0.5
