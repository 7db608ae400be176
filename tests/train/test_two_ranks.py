"""Training, checkpoints and evaluation over processes: each fixture starts them once."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

from sbf_dist.errors import UserError
from sbf_dist.files import sha256
from sbf_dist.train import checkpoint
from sbf_dist.train.manifest import FileEntry

Answers = list[dict[str, Any]]
RANK_1_SHARD = "deepspeed/state/zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def trained(folder: Path) -> Answers:
    return ranks.run(ranks.train_save_and_go_on, folder, 2)


@pytest.fixture(scope="module")
def evaluated(folder: Path) -> Answers:
    return ranks.run(_evaluate, folder, 2)


def _evaluate(folder: Path) -> dict[str, Any]:
    return {
        **ranks.batchnorm_and_accuracy(folder),
        "empty": ranks.nothing_to_evaluate_on_rank_1(folder),
        "accumulated": ranks.accumulated_equals_whole(folder),
        "resized": ranks.save_for_other_ranks(folder),
        "sbf": ranks.an_sbf_layer_at_stage_3(folder),
        "others": ranks.other_stages_and_precisions(folder),
        "seconds": ranks.where_the_time_goes(folder),
    }


@pytest.fixture(scope="module")
def alone(evaluated: Answers, folder: Path) -> dict[str, Any]:
    """One rank that goes on from what two ranks saved."""
    return ranks.run(ranks.load_on_one_rank, folder, 1)[0]


@pytest.fixture
def saved(trained: Answers, folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    return shutil.copytree(folder / "saved", tmp_path / "saved")


# --- training ------------------------------------------------------------------------------------


def test_the_loss_falls_and_is_the_same_on_all_ranks(trained: Answers) -> None:
    assert trained[0]["losses"][-1] < 0.8 * trained[0]["losses"][0]
    assert trained[0]["losses"] == trained[1]["losses"]


def test_ranks_that_begin_with_other_weights_have_the_same_ones_afterwards(
    trained: Answers,
) -> None:
    assert torch.equal(trained[0]["weights"], trained[1]["weights"])


def test_two_half_batches_make_the_step_of_a_whole_one(evaluated: Answers) -> None:
    # Same samples in another division over the ranks: the sums differ by rounding alone.
    both = evaluated[0]["accumulated"]
    torch.testing.assert_close(both["whole"], both["halves"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["zero 0 fp32", "zero 2 bf16", "zero 3 fp32"])
def test_other_zero_stages_and_precisions_train_save_and_load(
    evaluated: Answers, name: str
) -> None:
    losses = evaluated[0]["others"][name]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_ranks_exchange_is_timed_as_a_part_of_the_step(evaluated: Answers, stage: int) -> None:
    seconds = evaluated[0]["seconds"][stage]
    assert seconds["communication"] > 0
    assert seconds["communication"] < sum(seconds[k] for k in ("forward", "backward", "optimizer"))


def test_a_layer_that_is_rebuilt_trains_at_stage_3_as_at_stage_0(evaluated: Answers) -> None:
    for answer in evaluated:
        undivided, divided = answer["sbf"][0], answer["sbf"][3]
        assert divided["losses"] == pytest.approx(undivided["losses"], abs=1e-6)
        for kind in ("state", "averaged"):
            assert divided[kind].keys() == undivided[kind].keys()
            for name, value in undivided[kind].items():
                if torch.is_tensor(value):
                    torch.testing.assert_close(divided[kind][name], value, rtol=0, atol=1e-6)


def test_a_worker_does_not_import_mlflow(trained: Answers) -> None:
    assert not trained[0]["mlflow"]


# --- checkpoints ---------------------------------------------------------------------------------


def test_a_checkpoint_has_the_shards_of_both_ranks_and_no_code(
    trained: Answers, folder: Path
) -> None:
    manifest = checkpoint.verify(folder / "saved")
    on_disk = {
        path.relative_to(folder / "saved").as_posix()
        for path in (folder / "saved").rglob("*")
        if path.is_file()
    }
    assert set(manifest.files) == on_disk - {"manifest.json"}
    assert {RANK_1_SHARD, "ranks/00000.json", "ranks/00001.json"} < set(manifest.files)
    assert not [name for name in on_disk if name.endswith(".py")]
    assert (manifest.step, manifest.world_size, manifest.digests) == (12, 2, ranks.DIGESTS)


def test_going_on_from_a_checkpoint_is_as_if_it_had_never_stopped(trained: Answers) -> None:
    for answer in trained:
        assert answer["restored"] == 12
        assert answer["more_losses_again"] == answer["more_losses"]
        assert torch.equal(answer["weights_again"], answer["weights"])
        assert torch.equal(answer["buffers_again"], answer["buffers"])
        assert answer["averages_again"].keys() == answer["averages"].keys()
        for name, average in answer["averages"].items():
            assert torch.equal(answer["averages_again"][name], average)


def test_saving_changes_nothing_in_a_training(trained: Answers) -> None:
    for answer in trained:
        assert torch.equal(answer["weights_unsaved"], answer["weights"])
        assert torch.equal(answer["buffers_unsaved"], answer["buffers"])
        for name, average in answer["averages"].items():
            assert torch.equal(answer["averages_unsaved"][name], average)


def test_random_numbers_go_on_where_they_were(trained: Answers) -> None:
    assert all(answer["same_draws"] for answer in trained)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_rank_goes_on_with_the_weights_and_moments_of_two(
    evaluated: Answers, alone: dict[str, Any], optimizer: str
) -> None:
    two = evaluated[0]["resized"][optimizer]
    torch.testing.assert_close(alone["weights"][optimizer], two, rtol=1e-3, atol=1e-5)


def test_a_file_that_would_run_code_is_refused_and_does_not_run_it(
    alone: dict[str, Any], folder: Path
) -> None:
    assert "mp_rank_00_model_states.pt: holds more than tensors" in alone["refusal"]
    assert not (folder / "sgd/code-ran").exists()


def test_a_missing_shard_is_refused_by_its_name(saved: Path) -> None:
    (saved / RANK_1_SHARD).unlink()
    with pytest.raises(UserError, match=f"{RANK_1_SHARD} is missing"):
        checkpoint.verify(saved)


def test_a_shard_with_one_other_byte_is_refused_by_its_name(saved: Path) -> None:
    raw = bytearray((saved / RANK_1_SHARD).read_bytes())
    raw[len(raw) // 2] ^= 1
    (saved / RANK_1_SHARD).write_bytes(raw)
    with pytest.raises(UserError, match=f"{RANK_1_SHARD} is damaged: its SHA-256"):
        checkpoint.verify(saved)


def test_a_shard_cut_short_is_refused_with_both_sizes(saved: Path) -> None:
    raw = (saved / RANK_1_SHARD).read_bytes()
    (saved / RANK_1_SHARD).write_bytes(raw[:-1])
    with pytest.raises(UserError, match=f"{len(raw) - 1} bytes instead of {len(raw)}"):
        checkpoint.verify(saved)


@pytest.mark.parametrize(
    "name", [RANK_1_SHARD, "ranks/00001.json", "deepspeed/state/mp_rank_00_model_states.pt"]
)
def test_a_manifest_that_lists_too_little_is_refused(saved: Path, name: str) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    del manifest["files"][name]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"does not list {name}, which a checkpoint of 2 workers"):
        checkpoint.verify(saved)
    (saved / name).unlink()
    with pytest.raises(UserError, match=f"does not list {name}"):
        checkpoint.verify(saved)


def test_a_checkpoint_of_a_version_before_is_read_and_checked_as_well(saved: Path) -> None:
    assert checkpoint.written(saved) is not None
    rank_0 = saved / "ranks/00000.json"
    state = json.loads(rank_0.read_text())
    del state["written"]
    rank_0.write_text(json.dumps(state))
    manifest = json.loads((saved / "manifest.json").read_text())
    entry = FileEntry(size=rank_0.stat().st_size, sha256=sha256(rank_0))
    manifest["files"]["ranks/00000.json"] = entry.model_dump()
    (saved / "manifest.json").write_text(json.dumps(manifest))
    checkpoint.verify(saved)
    assert checkpoint.written(saved) is None
    del manifest["files"][RANK_1_SHARD]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"does not list {RANK_1_SHARD}"):
        checkpoint.verify(saved)


def test_a_checkpoint_without_any_shard_of_the_optimizer_is_refused(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    for name in [name for name in manifest["files"] if "optim" in name]:
        del manifest["files"][name]
        (saved / name).unlink()
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"does not list .*rank_0_mp_rank_00_optim_states\.pt"):
        checkpoint.verify(saved)


def test_a_file_that_is_not_in_the_manifest_is_named(saved: Path) -> None:
    (saved / "ranks/.nfs0001").write_text("left by the storage")
    checkpoint.verify(saved)
    (saved / "ranks/00002.json").write_text("{}")
    with pytest.raises(UserError, match=r"ranks/00002\.json is not listed in manifest\.json"):
        checkpoint.verify(saved)


def test_a_folder_without_a_manifest_is_no_checkpoint(saved: Path) -> None:
    (saved / "manifest.json").unlink()
    with pytest.raises(UserError, match="has no manifest"):
        checkpoint.verify(saved)


def test_a_damaged_manifest_is_refused(saved: Path) -> None:
    text = (saved / "manifest.json").read_text()
    (saved / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match="is damaged: JSON"):
        checkpoint.verify(saved)


def test_a_checkpoint_of_a_later_format_is_refused(saved: Path) -> None:
    text = (saved / "manifest.json").read_text()
    (saved / "manifest.json").write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="format 2, this version reads 1"):
        checkpoint.verify(saved)


def test_a_checkpoint_of_another_recipe_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match="was written with recipe r1, this run has r2"):
        checkpoint.load(None, saved, digests={"recipe": "r2"})


def test_a_checkpoint_of_other_training_is_refused_with_the_difference(
    alone: dict[str, Any],
) -> None:
    refusals = alone["others"]
    assert "written with the optimizer SGD, this training with AdamW" in refusals["optimizer"]
    assert "written at ZeRO stage 1, this training at 2" in refusals["stage"]
    assert (
        "with student.5.weight of shape (7, 32), this training with student.5.weight of shape "
        "(9, 32)"
    ) in refusals["network"]
    assert "written with lr = 0.1, this run has 0.2 (and 1 more); give" in refusals["recipe"]


# --- evaluation ----------------------------------------------------------------------------------


def test_batchnorm_statistics_become_those_of_all_ranks_together(evaluated: Answers) -> None:
    (mean_0, var_0), (mean_1, var_1) = (answer["before"] for answer in evaluated)
    mean = (mean_0 + mean_1) / 2
    var = (var_0 + var_1) / 2 + ((mean_0 - mean) ** 2 + (mean_1 - mean) ** 2) / 2
    for answer in evaluated:
        torch.testing.assert_close(answer["after"], (mean, var))
        torch.testing.assert_close(answer["averages"], (mean, var))


def test_accuracy_counts_each_labelled_image_of_all_ranks_once(evaluated: Answers) -> None:
    probabilities, labels = evaluated[0]["probabilities"], evaluated[0]["labels"]
    ranking = probabilities.argsort(dim=1, descending=True)
    hits = ranking == labels[:, None]
    chosen = probabilities.gather(1, labels[:, None])
    for answer in evaluated:
        assert answer["scores"]["count"] == len(labels) == 39
        assert answer["scores"]["top1"] == pytest.approx(hits[:, 0].float().mean().item())
        assert answer["scores"]["top5"] == pytest.approx(hits[:, :5].any(1).float().mean().item())
        assert answer["scores"]["loss"] == pytest.approx(-chosen.log().mean().item(), rel=1e-5)
        assert answer["training_mode_kept"]


def test_a_rank_may_have_nothing_to_evaluate(evaluated: Answers) -> None:
    assert [answer["empty"]["count"] for answer in evaluated] == [10, 10]
    assert evaluated[0]["empty"] == evaluated[1]["empty"]
