import pytest
import torch

from sbf_dist.errors import UserError
from sbf_dist.train.schedule import constant, cosine, followed_by, schedule, step_decay


def test_the_warmup_rises_by_equal_steps_to_the_peak() -> None:
    rates = [constant(step, lr=0.4, warmup=4) for step in range(6)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_cosine_begins_at_the_peak_is_half_way_in_the_middle_and_ends_at_the_final_rate() -> None:
    def at(step: int) -> float:
        return cosine(step, lr=2.0, steps=21, final=0.1)

    assert [at(0), at(10), at(20)] == pytest.approx([2.0, 1.1, 0.2])
    assert at(500) == pytest.approx(0.2)


def test_cosine_after_a_warmup_falls_from_its_end_on() -> None:
    rates = [cosine(step, lr=1.0, steps=12, warmup=3) for step in range(12)]
    assert rates[2] == rates[3] == 1.0
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[11] == pytest.approx(0)


def test_step_decay_takes_the_factor_once_per_milestone() -> None:
    rates = [step_decay(step, lr=1.0, milestones=[2, 4], factor=0.1) for step in range(6)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_milestones_of_a_schedule_are_fractions_of_the_run() -> None:
    lr_at = schedule("step", lr=1.0, steps=100, milestones=[0.5], factor=0.5)
    assert [lr_at(49), lr_at(50)] == [1.0, 0.5]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", ["constant", "cosine", "step"])
def test_very_short_runs_begin_at_the_peak(name: str, steps: int) -> None:
    lr_at = schedule(name, lr=0.1, steps=steps)  # type: ignore[arg-type]
    assert lr_at(0) == pytest.approx(0.1)


def test_a_warmup_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(UserError, match="warmup 10: must be at least 0 and less than the 10 steps"):
        schedule("cosine", lr=0.1, steps=10, warmup=10)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(UserError, match="'linear': must be constant, cosine, step or one_cycle"):
        schedule("linear", lr=0.1, steps=10)  # type: ignore[arg-type]


@pytest.mark.parametrize(("steps", "warmup"), [(100, 0), (100, 10), (37, 12)])
def test_one_cycle_is_pytorchs(steps: int, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=0.8,
        total_steps=steps,
        pct_start=warmup / steps or 0.3,
        cycle_momentum=False,
    )
    lr_at = schedule("one_cycle", lr=0.8, steps=steps, warmup=warmup)
    for step in range(steps):
        assert lr_at(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        if step < steps - 1:
            theirs.step()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_very_short_one_cycles_have_rates(steps: int) -> None:
    lr_at = schedule("one_cycle", lr=0.8, steps=steps)
    assert all(0 < lr_at(step) <= 0.8 for step in range(steps))


def test_a_schedule_may_be_followed_by_another_that_begins_at_its_first_step() -> None:
    rates = followed_by(lambda step: 100.0 + step, float, at=3)
    assert [rates(step) for step in range(6)] == [100, 101, 102, 0, 1, 2]
