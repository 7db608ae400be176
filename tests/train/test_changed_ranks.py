"""Another number of ranks: the table of docs/checkpoints.md, each cell by what follows a change."""

from pathlib import Path

import changed_ranks as table
import pytest
import ranks
import torch

from sbf_dist.train import checkpoint, shards

CELLS = [table.cell(*names) for names in table.CELLS]
Losses = dict[str, dict[str, list[float]]]  # of a change, of a cell


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("table")


@pytest.fixture(scope="module")
def losses(folder: Path) -> Losses:
    found = {
        "none": ranks.run(table.without_a_change, folder, 2)[0],
        "two-one": ranks.run(table.on_one, folder, 1)[0],
        "two-three": ranks.run(table.on_three, folder, 3)[0],
    }
    return found | ranks.run(table.on_two_again, folder, 2)[0]


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("change", ["two-one", "two-one-two", "two-three", "two-three-two"])
def test_the_losses_after_a_change_are_those_without_one(
    losses: Losses, name: str, change: str
) -> None:
    first = table.STEPS * change.count("-")
    expected = losses["none"][name][first : first + table.STEPS]
    assert losses[change][name] == pytest.approx(expected, abs=1e-6)
    assert losses["none"][name][0] - losses["none"][name][-1] > 1e-3  # there is something to lose


@pytest.mark.parametrize("name", CELLS)
def test_the_same_number_of_ranks_goes_on_bit_for_bit(
    losses: Losses, folder: Path, name: str
) -> None:
    assert losses["two-two"][name] == losses["none"][name][table.STEPS : 2 * table.STEPS]
    _assert_equal(_whole(folder / "uninterrupted" / name), _whole(folder / "two-two" / name))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(
    ("source", "ranks_then"), [("two", 1), ("two-one", 2), ("two", 3), ("two-three", 2)]
)
def test_weights_and_optimizer_are_the_same_numbers_after_a_change(
    losses: Losses, folder: Path, source: str, ranks_then: int, name: str
) -> None:
    before = _whole(folder / source / name)
    _assert_equal(before, _whole(folder / f"{source}-again-{ranks_then}" / name))
    key = "momentum_buffer" if name.endswith("sgd") else "exp_avg_sq"
    for state in before.optimizer.values():
        assert {key, "ema"} <= state.keys()
        assert torch.as_tensor(state[key]).abs().max() > 0


@pytest.mark.parametrize("name", CELLS)
def test_the_average_of_the_weights_goes_along(losses: Losses, folder: Path, name: str) -> None:
    whole = _whole(folder / "two-three-two" / name)
    averaged = whole.ema
    assert averaged.keys() == whole.weights.keys()
    assert not averaged["student.5.weight"].equal(whole.weights["student.5.weight"])
    assert averaged["student.1.running_mean"].equal(whole.ema_buffers["student.1.running_mean"])


def _whole(folder: Path) -> shards.Whole:
    ranks_then = checkpoint.verify(folder).world_size
    return shards.read(folder / "deepspeed/state", ranks_then)


def _assert_equal(one: shards.Whole, other: shards.Whole) -> None:
    assert one.weights.keys() == other.weights.keys()
    assert all(torch.equal(one.weights[key], other.weights[key]) for key in one.weights)
    assert one.optimizer.keys() == other.optimizer.keys()
    for parameter, state in one.optimizer.items():
        assert state.keys() == other.optimizer[parameter].keys()
        for entry, value in state.items():
            found = torch.as_tensor(other.optimizer[parameter][entry])
            assert torch.equal(torch.as_tensor(value), found)
