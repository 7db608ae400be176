"""Shrinking in rounds: what each round leaves, and that no round is done twice."""

from pathlib import Path

import pytest
import torch

from launchers.display import Display
from launchers.run import outcome, rounds
from launchers.run.building import build_network
from launchers.run.folder import RunFolder
from launchers.run.network import Network
from launchers.run.networks import Networks
from launchers.run.stages import STAGES
from launchers.student import make_student
from sbf_dist import models, recipe
from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.cost import count
from sbf_dist.compression.plan import Plan
from sbf_dist.compression.progressive import shrink
from sbf_dist.settings import Compression
from sbf_dist.weights import save_weights

SHAPE = (3, 16, 16)
NUM_CLASSES = 10
RECIPE = recipe.validate(
    {
        "name": "rounds",
        "data": {"source": "digits", "image_size": 16},
        "teachers": [{"name": "one", "model": "cifar_resnet8_w4", "training": {"steps": 10}}],
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
        self.networks = Networks.of(RECIPE, RunFolder(root, "rounds"))
        self.folder = self.networks.folder
        self.dense = models.build("cifar_resnet8_w4", NUM_CLASSES).eval()
        save_weights(self.dense, self.networks.compressed.weights)
        self.images = Calibration.of(torch.randn(48, *SHAPE))
        self.trained: list[str] = []
        self.settings: list[Compression] = []  # of each time it was shrunk again
        _, plan = make_student(
            self.dense, self.images, RECIPE.compress, "cifar_resnet8_w4", RECIPE.seed, Display()
        )
        plan.save(self.folder.plan)

    def train(self, network: Network) -> None:
        assert network.job is not None
        module = build_network(network, NUM_CLASSES, network.job.start)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.01)
        save_weights(module, network.weights)
        outcome.keep(network, {"top1": 0.5})
        self.trained.append(network.name)

    def network(self, name: str) -> torch.nn.Module:
        network = next(network for network in self.networks if network.name == name)
        return build_network(network, NUM_CLASSES, network.weights)

    def shrink(self) -> None:
        def noted(student, plan, images, settings, **others):
            self.settings.append(settings)
            return shrink(student, plan, images, settings, **others)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rounds, "shrink", noted)
            rounds.shrink_in_rounds(
                self.networks, NUM_CLASSES, self.images, Display(), train=self.train
            )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    done = Run(tmp_path_factory.mktemp("runs"))
    done.shrink()
    return done


def test_each_round_is_smaller_and_the_last_meets_the_budget(run: Run) -> None:
    dense = count(run.dense, SHAPE).macs
    costs = [
        count(run.network(f"sbf-round-{number}-fitted"), SHAPE).macs / dense for number in (1, 2, 3)
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
    student = run.networks.student
    assert student.job is not None
    assert student.job.start == run.folder.weights("sbf-round-3-fitted")
    assert student.plan == run.folder.round_plan(3)
    assert run.networks.one_shot.plan == run.folder.plan


def test_trainings_between_are_a_fifth_as_long_and_warm_up_in_time(run: Run) -> None:
    trainings = [one.trained.job.training for one in run.networks.rounds if one.trained]
    assert [training.steps for training in trainings] == [10, 10]
    assert [training.warmup for training in trainings] == [2, 2]


def test_what_is_done_is_not_done_again_and_a_cut_round_is(run: Run) -> None:
    run.trained.clear()
    run.shrink()
    assert run.trained == []
    run.folder.weights("sbf-round-2").unlink()
    run.folder.weights("sbf-round-3-fitted").unlink()
    run.shrink()
    assert run.trained == ["sbf-round-2"]
    assert run.folder.weights("sbf-round-3-fitted").exists()


def test_a_fit_that_is_damaged_is_made_again_where_it_is_still_needed(run: Run) -> None:
    run.trained.clear()
    first, last = (run.folder.weights(f"sbf-round-{number}-fitted") for number in (1, 3))
    whole = first.read_bytes()
    first.write_bytes(b"")  # what was trained of it is there
    last.write_bytes(b"")
    run.shrink()
    assert run.trained == []
    assert first.read_bytes() == b""
    assert last.read_bytes()
    first.write_bytes(whole)
    run.folder.weights("sbf-round-1").write_bytes(b"")
    run.shrink()
    assert run.trained == ["sbf-round-1"]


def test_what_rounds_leave_is_found(run: Run) -> None:
    (distill,) = (stage for stage in STAGES if stage.name == "distill")
    (product,) = (p for p in distill.products(run.networks) if p.name == "the rounds")
    left = product.files
    assert all(path.exists() for path in left if path.suffix)
    rounds_weights = {path.name for path in run.folder.root.glob("weights/sbf-round*")}
    assert rounds_weights <= {path.name for path in left}


def test_later_rounds_are_given_the_whole_of_the_settings(run: Run) -> None:
    given = run.settings[: RECIPE.compress.rounds - 1]
    assert len(given) == RECIPE.compress.rounds - 1
    assert all(s.with_budget(RECIPE.compress.budget) == RECIPE.compress for s in given)
    assert given[-1].budget == RECIPE.compress.budget
