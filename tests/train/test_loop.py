"""The loop with an engine that only keeps a diary."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sbf_dist.distill.live import live_targets
from sbf_dist.distill.teachers import Member, TeacherEnsemble
from sbf_dist.errors import UserError
from sbf_dist.settings import View
from sbf_dist.train.loop import Annotation, Batch, Every, LogRecord, fit

nan = float("nan")


class DiaryEngine:
    """Its loss is the mean of the images; it notes the learning rate of each backward pass."""

    device = torch.device("cpu")
    module = nn.Module()
    skip_bad_steps = 0

    def __init__(self, accumulation: int = 1) -> None:
        self.optimizer: Any = self
        self.param_groups = [{"lr": -1.0}, {"lr": -1.0}]
        self.accumulation = accumulation
        self.rates: list[tuple[float, float]] = []
        self.seen: list[float] = []
        self.steps = self.skipped_steps = 0

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        self.seen.append(batch["image"].mean().item())
        return {"extra": batch["image"].mean() * 10, "loss": batch["image"].mean()}

    def backward(self, loss: Tensor) -> None:
        self.rates.append((self.param_groups[0]["lr"], self.param_groups[1]["lr"]))

    def step(self) -> None:
        self.steps += 1

    def gradient_accumulation_steps(self) -> int:
        return self.accumulation

    def timed_communication(self, part: Any) -> AbstractContextManager[None]:
        return nullcontext()


def numbered(values: Any = range(1000)) -> Iterator[Batch]:
    for value in values:
        yield {"image": torch.full((4, 1), float(value))}


def run(engine: DiaryEngine, batches: Any = None, **options: Any) -> list[LogRecord]:
    records: list[LogRecord] = []
    log = Every(options.pop("log_every", 4), records.append)
    options = {"steps": 10, "lr_at": lambda step: 0.5} | options
    fit(engine, batches or numbered(), log=log, **options)
    return records


def test_each_step_runs_with_its_own_rate_in_all_groups() -> None:
    engine = DiaryEngine()
    run(engine, steps=3, lr_at=lambda step: step / 10)
    assert engine.rates == [(0.0, 0.0), (0.1, 0.1), (0.2, 0.2)]


def test_a_group_with_a_scale_keeps_its_ratio_to_the_others() -> None:
    engine = DiaryEngine()
    engine.param_groups[1]["lr_scale"] = 0.1
    run(engine, steps=3, lr_at=float)
    assert engine.rates == [(0.0, 0.0), (1.0, 0.1), (2.0, 0.2)]


def test_records_come_at_every_interval_and_at_the_end() -> None:
    assert [record.step for record in run(DiaryEngine())] == [4, 8, 10]


def test_a_record_has_the_means_since_the_one_before_with_the_loss_first() -> None:
    first, second, last = run(DiaryEngine())
    assert list(first.parts) == ["loss", "extra"]
    assert [r.parts["loss"] for r in (first, second, last)] == [1.5, 5.5, 8.5]
    assert last.parts["extra"] == 85.0


def test_a_record_knows_the_speed_and_the_time_that_is_left() -> None:
    first, _, last = run(DiaryEngine())
    # 4 steps of 4 images were done, 6 steps are left.
    assert first.seconds_left == pytest.approx(6 * 4 / first.images_per_s)
    assert last.seconds_left == 0
    assert last.lr == 0.5


def test_a_resumed_run_does_the_remaining_steps_only() -> None:
    engine = DiaryEngine()
    assert [record.step for record in run(engine, start_step=7)] == [8, 10]
    assert engine.steps == 3


def test_a_finished_run_does_nothing() -> None:
    engine = DiaryEngine()
    log = Every(10, print)
    assert fit(engine, numbered(), steps=5, start_step=5, lr_at=lambda _: 1, log=log) is None
    assert engine.steps == 0


def test_checkpoints_come_at_their_interval_and_at_the_end_after_the_record() -> None:
    order: list[str] = []
    fit(
        DiaryEngine(),
        numbered(),
        steps=5,
        lr_at=lambda step: 0.1,
        log=Every(100, lambda record: order.append(f"log {record.step}")),
        checkpoint=Every(2, lambda step: order.append(f"save {step}")),
    )
    assert order == ["log 2", "save 2", "log 4", "save 4", "log 5", "save 5"]


def test_without_an_interval_records_and_checkpoints_come_at_the_end_alone() -> None:
    done: list[int] = []
    records = run(DiaryEngine(), steps=5, log_every=None, checkpoint=Every(None, done.append))
    assert [record.step for record in records] == done == [5]


def test_a_step_takes_as_many_batches_as_the_engine_accumulates() -> None:
    engine = DiaryEngine(accumulation=3)
    records = run(engine, steps=2, log_every=2)
    assert engine.seen == [0, 1, 2, 3, 4, 5]
    assert records[0].parts["loss"] == 2.5


def test_annotate_may_add_to_a_batch() -> None:
    engine = DiaryEngine()
    run(engine, steps=2, annotate=Annotation(lambda batch: {"image": batch["image"] + 100}))
    assert engine.seen == [100, 101]


class FaultyTeachers:
    """The second of two has an answer of NaN in batch 1."""

    def __init__(self) -> None:
        self.batches = 0

    def add(self, batch: Batch) -> Batch:
        self.batches += 1
        return batch

    def faults(self) -> Tensor:
        return torch.tensor([False, self.batches > 1])

    def refuse(self, faults: Sequence[bool]) -> None:
        raise UserError(f"{list(faults)} in batch {self.batches}")


@pytest.mark.parametrize("loss", [1.0, nan])
def test_a_fault_of_a_teacher_stops_the_run_at_the_next_record_and_is_named_as_the_reason(
    loss: float,
) -> None:
    teachers = FaultyTeachers()
    annotate = Annotation(teachers.add, teachers)
    with pytest.raises(UserError, match=r"\[False, True\] in batch 4"):
        run(DiaryEngine(), numbered([loss] * 10), annotate=annotate)
    assert run(DiaryEngine(), steps=1, log_every=1, annotate=Annotation(dict, FaultyTeachers()))


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count from now on how often numbers leave tensors."""
    reads = [0]
    for name in ("tolist", "item", "__bool__", "__float__", "__int__"):
        original = getattr(Tensor, name)

        def counted(self: Tensor, *rest: Any, original: Any = original) -> Any:
            reads[0] += 1
            return original(self, *rest)

        monkeypatch.setattr(Tensor, name, counted)
    return reads


def test_numbers_are_read_once_a_record_with_live_teachers_too(monkeypatch) -> None:
    class Quiet(DiaryEngine):
        def __call__(self, batch: Batch) -> dict[str, Tensor]:
            return {"loss": batch["image"].mean()}

    view = View(image_size=1, mean=(0.5,) * 3, std=(0.5,) * 3)
    ensemble = TeacherEnsemble([Member("one", nn.Flatten(), view)])
    annotate = Annotation(live_targets(ensemble, view), ensemble)
    images = [{"image": torch.full((2, 3, 1, 1), float(n))} for n in range(8)]
    reads = count_reads(monkeypatch)
    run(Quiet(), iter(images), steps=8, log_every=4, annotate=annotate)
    assert reads == [2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_with_its_step_and_rate(bad: float) -> None:
    values = [1.0, 1.0, bad, 1.0, bad, 1.0]
    with pytest.raises(UserError, match=r"not a finite number at step 2 \(learning rate 0.2\)"):
        run(DiaryEngine(), numbered(values), steps=6, lr_at=lambda step: step / 10)


def test_the_error_names_the_images_and_the_last_checkpoint() -> None:
    batches = [batch | {"id": torch.tensor([i])} for i, batch in enumerate(numbered([1, 1, nan]))]
    wanted = r"step 2 \(learning rate 0.5, images 2\); the last good checkpoint is that of step 2;"
    with pytest.raises(UserError, match=wanted):
        run(DiaryEngine(), batches, steps=3, checkpoint=Every(2, lambda step: None))
    with pytest.raises(UserError, match="there is no checkpoint yet"):
        run(DiaryEngine(), batches, steps=3)


def test_a_step_that_the_engine_leaves_out_by_itself_stops_the_run() -> None:
    engine = DiaryEngine()
    engine.skipped_steps = 5  # before the resume
    run(engine)
    engine.step = lambda: setattr(engine, "skipped_steps", 6)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="gradient: is not a finite number at a step from 0 to 3;"):
        run(engine)


def test_data_that_ends_too_early_is_reported() -> None:
    with pytest.raises(UserError, match="training data: ended at step 3"):
        run(DiaryEngine(), numbered(range(3)))


def test_a_record_says_where_the_time_of_a_step_went() -> None:
    def slow() -> Iterator[Batch]:
        for batch in numbered():
            time.sleep(0.01)
            yield batch

    first, second = run(DiaryEngine(accumulation=2), slow(), steps=4, log_every=2)
    assert list(first.seconds) == ["data", "forward", "backward", "optimizer"]
    assert first.seconds["data"] >= 0.02
    assert second.seconds["data"] >= 0.02
    assert sum(first.seconds.values()) < 4 * 2 / first.images_per_s * 1.01


def test_targets_and_checkpoints_have_times_of_their_own() -> None:
    checkpoint = Every(2, lambda step: time.sleep(0.02))
    records = run(
        DiaryEngine(), steps=4, log_every=2, checkpoint=checkpoint, annotate=Annotation(dict)
    )
    assert "checkpoint" not in records[0].seconds
    assert records[1].seconds["checkpoint"] >= 0.01  # of the one before, for each of two steps
    assert "targets" in records[0].seconds


def test_a_part_that_only_some_batches_have_is_the_mean_over_these() -> None:
    class Changing(DiaryEngine):
        def __call__(self, batch: Batch) -> dict[str, Tensor]:
            value = batch["image"].mean()
            return {"loss": value} | ({"early": value * 10} if value < 2 else {"late": value})

    (record,) = run(Changing(), steps=4)
    assert record.parts == {"loss": 1.5, "early": 5.0, "late": 2.5}
