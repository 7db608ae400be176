"""Shrinking in rounds: what each round makes, and that none is done twice."""

from pathlib import Path

import numpy as np
import pytest
import torch

from launchers import networks, rounds
from launchers.display import Display
from launchers.layout import RunFolder
from launchers.student import make
from launchers.worker import build_network
from pipelines.index import PARTS, DataIndex
from sbf_dist import models, recipe
from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.cost import count
from sbf_dist.compression.plan import Plan
from sbf_dist.compression.progressive import shrink
from sbf_dist.settings import Compression

SHAPE = (3, 16, 16)
RECIPE = recipe.validate(
    {
        "name": "rounds",
        "data": {"source": "digits", "image_size": 16},
        "teachers": [{"name": "one", "model": "cifar_resnet8", "training": {"steps": 10}}],
        "compress": {"teacher": "one", "macs": 0.5, "sources": 2, "rounds": 3},
        "distill": {"training": {"steps": 50, "warmup": 20}},
    },
    [],
    "recipe",
)


class Run:
    """A run whose training changes every weight a little, and remembers what it trained."""

    def __init__(self, root: Path) -> None:
        torch.manual_seed(0)
        self.folder = RunFolder(root, "rounds")
        self.dense = models.build("cifar_resnet8", 10).eval()
        self.images = Calibration.of(torch.randn(48, *SHAPE))
        self.trained: list[str] = []
        none = np.zeros(0, dtype=np.int64)
        DataIndex(  # of which only the classes are asked
            root=root,
            classes=[str(digit) for digit in range(10)],
            files=[],
            labels=none,
            sizes=none.reshape(0, 2),
            file_bytes=none,
            parts=dict.fromkeys(PARTS, none),
            skipped=[],
        ).save(self.folder.index)
        _, plan = make(RECIPE, self.dense, "cifar_resnet8", self.images, Display())
        plan.save(self.folder.plan)

    def train(self, stage: str) -> None:
        (job,) = networks.jobs_of(RECIPE, stage)
        network = self.network(job.name, job.start_from)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.01)
        models.save_weights(network, self.folder.weights(job.name))
        self.trained.append(job.name)

    def network(self, name: str, weights: str | None = None) -> torch.nn.Module:
        return build_network(RECIPE, self.folder, name, start_from=weights or name)

    def shrink(self) -> Path:
        return rounds.shrink_in_rounds(
            RECIPE, self.folder, self.dense, self.images, Display(), train=self.train
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    done = Run(tmp_path_factory.mktemp("runs"))
    done.shrink()
    return done


def test_each_round_is_smaller_and_the_last_meets_the_budget(run: Run) -> None:
    dense = count(run.dense, SHAPE).macs
    costs = [
        count(run.network(networks.fitted(number)), SHAPE).macs / dense for number in (1, 2, 3)
    ]
    assert costs[0] > costs[1] > costs[2]
    assert 0.45 < costs[2] <= 0.5
    assert costs[0] <= 1 - 0.5 * (1 - (2 / 3) ** 3)  # Zhu and Gupta's cubic


def test_training_stands_between_the_rounds_and_a_round_starts_from_what_was_trained(
    run: Run,
) -> None:
    assert run.trained[:2] == ["sbf-round-1", "sbf-round-2"]
    kept = Plan.load(run.folder.round_plan(2)).layers["stages.0.0.conv1"]
    before = run.network("sbf-round-1").state_dict()
    assert torch.equal(
        before["conv.weight"], 1.01 * run.network("sbf-round-1-fitted").state_dict()["conv.weight"]
    )
    assert kept.kind in ("sbf", "dense")


def test_the_student_has_the_last_plan_and_starts_from_its_fit(run: Run) -> None:
    (job,) = (j for j in networks.distill_jobs(RECIPE) if j.name == networks.STUDENT)
    assert job.start_from == "sbf-round-3-fitted"
    assert networks.plan_of(RECIPE, run.folder, networks.STUDENT) == run.folder.round_plan(3)
    assert networks.plan_of(RECIPE, run.folder, networks.ONE_SHOT) == run.folder.plan


def test_trainings_between_are_a_fifth_as_long_and_warm_up_in_time(run: Run) -> None:
    assert [job.training.steps for job in networks.round_jobs(RECIPE)] == [10, 10]
    assert [job.training.warmup for job in networks.round_jobs(RECIPE)] == [2, 2]


def test_what_is_done_is_not_done_again_and_a_cut_round_is(run: Run) -> None:
    run.trained.clear()
    run.shrink()
    assert run.trained == []
    run.folder.weights("sbf-round-2").unlink()
    run.folder.weights("sbf-round-3-fitted").unlink()
    run.shrink()
    assert run.trained == ["sbf-round-2"]
    assert run.folder.weights("sbf-round-3-fitted").exists()


def test_what_rounds_leave_is_found(run: Run) -> None:
    left = rounds.files(RECIPE, run.folder)
    assert all(path.exists() for path in left if path.suffix)
    assert {p.name for p in run.folder.plan.parent.glob("weights/*")} <= {p.name for p in left}


def test_later_rounds_shrink_by_the_settings_of_the_recipe(tmp_path, monkeypatch):
    given: list[Compression] = []

    def shrunk(student, plan, images, settings, **call):
        given.append(settings)
        return shrink(student, plan, images, settings, **call)

    monkeypatch.setattr(rounds, "shrink", shrunk)
    Run(tmp_path).shrink()
    assert len(given) == RECIPE.compress.rounds - 1
    for settings in given:
        assert settings == RECIPE.compress.with_budget(settings.budget)
    assert given[-1].budget == RECIPE.compress.budget
