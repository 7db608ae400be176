"""Weights of all kinds: of torch.save and safetensors, nested, prefixed, old and damaged."""

import argparse
import copy
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sbf_dist import models
from sbf_dist.errors import UserError
from sbf_dist.weights import load_weights, save_weights


def network(classes: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    made = models.build("cifar_resnet8_w4", classes)
    with torch.no_grad():
        made.norm.running_mean.add_(1 + seed)
    return made


def is_loaded(found: nn.Module, wanted: nn.Module) -> bool:
    theirs = wanted.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in found.state_dict().items())


def loaded(content, folder: Path, wanted: nn.Module, *, legacy: bool = False, **choice):
    """Write, load into another network, check, and return the line on what was found."""
    path = folder / "weights.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    other = network(seed=9)
    told = load_weights(other, path, **choice)
    assert is_loaded(other, wanted)
    return told


def refused(content, folder: Path, **choice) -> str:
    """Write, fail to load, check that nothing was changed, and return the message."""
    path = folder / "weights.pth"
    torch.save(content, path)
    model = network(seed=9)
    before = copy.deepcopy(model)
    with pytest.raises(UserError) as error:
        load_weights(model, path, **choice)
    assert is_loaded(model, before)
    assert str(error.value).startswith(f"weights {path}")
    assert "\n" not in str(error.value)
    return str(error.value)


def prefixed(model: nn.Module, prefix: str) -> dict:
    return {f"{prefix}{name}": value for name, value in model.state_dict().items()}


# ---------------------------------------------------------------- where they lie


@pytest.mark.parametrize("legacy", [False, True])
def test_a_state_dict_of_either_format_of_torch_save_is_loaded(tmp_path, legacy):
    one = network()
    assert loaded(one.state_dict(), tmp_path, one, legacy=legacy) is None


KEYS = ["state_dict", "model", "model_ema", "state_dict_ema", "ema", "net", "module"]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("key", KEYS)
def test_a_state_dict_is_found_in_a_checkpoint_and_named(tmp_path, key, legacy):
    one = network()
    checkpoint = {
        "epoch": 7,
        "args": argparse.Namespace(lr=0.1),
        "optimizer": torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9).state_dict(),
        key: one.state_dict(),
    }
    told = loaded(checkpoint, tmp_path, one, legacy=legacy)
    assert told == f"weights {tmp_path / 'weights.pth'}: taken from {key!r}"


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "net.", "backbone.", "module._orig_mod.", "a.b."]
)
def test_what_stands_before_the_names_is_found_and_named(tmp_path, prefix):
    one = network()
    told = loaded(prefixed(one, prefix), tmp_path, one)
    if prefix == "_orig_mod.":
        assert told is None  # of torch.compile: nobody asks for it
    else:
        wanted = prefix.replace("_orig_mod.", "")
        assert told.endswith(f": names without {wanted!r}")


def test_the_files_of_wrappers_are_loaded(tmp_path):
    one = network()
    assert "'module.'" in loaded(nn.DataParallel(one).state_dict(), tmp_path, one)
    assert loaded(torch.compile(one).state_dict(), tmp_path, one) is None
    partly = network()
    partly.head = torch.compile(partly.head)
    assert loaded(partly.state_dict(), tmp_path, one) is None


def test_averaged_weights_are_loaded_and_their_number_is_left_out(tmp_path):
    one = network()
    averaged = torch.optim.swa_utils.AveragedModel(one)
    averaged.update_parameters(one)
    told = loaded(averaged.state_dict(), tmp_path, one)
    assert told.endswith(": names without 'module.', left out: n_averaged")


@pytest.mark.parametrize("version", ["ModelEmaV2", "ModelEmaV3"])
def test_averages_of_timm_are_loaded(tmp_path, version):
    import timm.utils

    one = network()
    ema = getattr(timm.utils, version)(one)
    assert "names without 'module.'" in loaded(ema.state_dict(), tmp_path, one)
    checkpoint = {"epoch": 3, "arch": "resnet8", "state_dict_ema": ema.state_dict()}
    assert "taken from 'state_dict_ema'" in loaded(checkpoint, tmp_path, one)


def test_a_checkpoint_of_lightning_is_loaded(tmp_path):
    one = network()
    checkpoint = {
        "epoch": 3,
        "global_step": 900,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": OrderedDict(prefixed(one, "model.") | {"loss.weight": torch.ones(3)}),
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"EarlyStopping": {"patience": 3}},
        "optimizer_states": [{"state": {}, "param_groups": []}],
        "hyper_parameters": {"lr": 0.1},
    }
    told = loaded(checkpoint, tmp_path, one)
    assert told.endswith("taken from 'state_dict', names without 'model.', left out: loss.weight")


def test_dicts_in_dicts_are_looked_into(tmp_path):
    one = network()
    assert "taken from 'model.net'" in loaded({"model": {"net": one.state_dict()}}, tmp_path, one)


# ---------------------------------------------------------------- what to choose


def test_two_state_dicts_that_fit_are_refused_and_a_key_chooses(tmp_path):
    one, other = network(), network(seed=1)
    checkpoint = {"state_dict": one.state_dict(), "state_dict_ema": prefixed(other, "module.")}
    assert "hold 2 state dicts that fit, state_dict, state_dict_ema: choose" in refused(
        checkpoint, tmp_path
    )
    loaded(checkpoint, tmp_path, one, key="state_dict")
    loaded(checkpoint, tmp_path, other, key="state_dict_ema")
    assert "have no state dict in 'ema'; there are state_dict, state_dict_ema" in refused(
        checkpoint, tmp_path, key="ema"
    )
    assert "the state dict is the file itself" in refused(one.state_dict(), tmp_path, key="ema")


def test_two_networks_in_one_state_dict_are_refused_and_a_prefix_chooses(tmp_path):
    one, other = network(), network(seed=1)
    both = prefixed(one, "student.") | prefixed(other, "teacher.")
    assert "fit with 2 prefixes, 'student.', 'teacher.': choose" in refused(both, tmp_path)
    loaded(both, tmp_path, one, prefix="student.")
    loaded(both, tmp_path, other, prefix="teacher")
    error = refused(both, tmp_path, prefix="net")
    assert "no name that begins with 'net'; their names begin with 'student.', 'teacher.'" in error
    nested = {"net": both, "ema": one.state_dict()}
    assert "'student.', 'teacher.', 'conv.'" in refused(nested, tmp_path, prefix="net")


def test_a_state_dict_that_does_not_fit_is_no_candidate(tmp_path):
    one = network()
    checkpoint = {"generator": one.state_dict(), "discriminator": nn.Linear(3, 1).state_dict()}
    assert "taken from 'generator'" in loaded(checkpoint, tmp_path, one)


# ---------------------------------------------------------------- what is in them


def test_a_head_of_another_size_is_named(tmp_path):
    message = refused({"model": network(classes=1000).state_dict()}, tmp_path)
    assert "in 'model' do not fit: head.weight is (1000, " in message
    assert message.endswith("only this layer differs: a head of 1000 outputs for 3")


def test_what_does_not_fit_behind_a_prefix_is_said_with_its_place(tmp_path):
    state = prefixed(network(), "net.")
    state["net.extra"] = torch.ones(1)
    assert "behind 'net.', have extra, which the model does not know" in refused(state, tmp_path)


def test_old_files_without_counts_of_batches_are_loaded(tmp_path):
    one = network()
    state = {n: x for n, x in one.state_dict().items() if not n.endswith("num_batches_tracked")}
    assert len(state) < len(one.state_dict())
    assert loaded(state, tmp_path, one) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_are_converted(tmp_path, dtype):
    one = network()
    state = {n: x.to(dtype) if x.is_floating_point() else x for n, x in one.state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    other = network(seed=9)
    load_weights(other, tmp_path / "weights.pth")
    assert {x.dtype for x in other.parameters()} == {torch.float32}
    assert torch.equal(other.head.weight, one.head.weight.to(dtype).float())


def test_integers_for_weights_are_refused(tmp_path):
    state = dict(network().state_dict())
    state["head.weight"] = state["head.weight"].to(torch.int8)
    assert "head.weight is int8, the model wants float32 (quantized" in refused(state, tmp_path)


@pytest.mark.filterwarnings("ignore:Validating sparse:UserWarning")
def test_sparse_weights_are_loaded(tmp_path):
    one = network()
    state = dict(one.state_dict())
    state["head.weight"] = state["head.weight"].to_sparse()
    assert loaded(state, tmp_path, one) is None


class Versioned(nn.Module):
    """Keeps something that is no tensor, and converts the names of its older versions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 3)
        self.seen: object = {"version": 1, "names": ["a", "b"]}

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        for name in ("weight", "bias"):
            if f"{prefix}old.{name}" in state_dict:
                state_dict[f"{prefix}fc.{name}"] = state_dict.pop(f"{prefix}old.{name}")
        super()._load_from_state_dict(state_dict, prefix, *rest)


def test_extra_state_comes_back_from_either_format(tmp_path):
    one = Versioned()
    one.seen = {"version": 2, "names": ["c"]}
    torch.save(one.state_dict(), tmp_path / "weights.pth")
    save_weights(one, tmp_path / "weights.safetensors")
    for name in ("weights.pth", "weights.safetensors"):
        other = Versioned()
        load_weights(other, tmp_path / name)
        assert other.seen == one.seen
        assert torch.equal(other.fc.weight, one.fc.weight)
    one.seen = object()
    with pytest.raises(UserError, match="extra state _extra_state is a object: only tensors"):
        save_weights(one, tmp_path / "weights.safetensors")


def test_names_that_the_network_s_own_code_converts_are_loaded(tmp_path):
    one, other = Versioned(), Versioned()
    state = {k.replace("fc.", "old."): v for k, v in one.state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    load_weights(other, tmp_path / "weights.pth")
    assert torch.equal(other.fc.weight, one.fc.weight)


def test_a_damaged_legacy_file_and_a_script_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(network().state_dict(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="or are damaged"):
        load_weights(network(), path)
    torch.jit.script(nn.Linear(2, 3)).save(path)
    with pytest.raises(UserError, match="are a TorchScript archive"):
        load_weights(nn.Linear(2, 3), path)


# ---------------------------------------------------------------- what is written, what is refused


def test_saved_weights_are_loaded_again(tmp_path: Path):
    one, other = (models.build("cifar_resnet8_w4", 3) for _ in range(2))
    one.to(memory_format=torch.channels_last)
    with torch.no_grad():
        one.norm.running_mean.add_(3)
    path = tmp_path / "new" / "weights.safetensors"
    save_weights(one, path)
    load_weights(other, path)
    theirs = other.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def changed(change):
    """The state dict of a network, with one entry removed, added or of another shape."""
    state = models.build("cifar_resnet8_w4", 3).state_dict()
    change(state)
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("head.bias"), "lack head.bias, which the model has"),
        (lambda s: s.update(extra=torch.zeros(1)), "have extra, which the model does not know"),
        (
            lambda s: s.update({"head.bias": torch.zeros(4)}),
            "head.bias is (4,), the model wants (3,)",
        ),
    ],
)
def test_weights_of_another_network_are_refused_and_nothing_is_loaded(tmp_path, change, message):
    path = tmp_path / "weights.safetensors"
    save_file(changed(change), path)
    network = models.build("cifar_resnet8_w4", 3)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(UserError) as told:
        load_weights(network, path)
    assert str(told.value).startswith(f"weights {path}")
    assert message in str(told.value)
    assert all(torch.equal(v, before[name]) for name, v in network.state_dict().items())


@pytest.mark.parametrize("inside", [False, True])
def test_a_state_dict_of_torch_save_is_read_also_out_of_a_checkpoint(tmp_path, inside):
    one, other = nn.Linear(2, 3), nn.Linear(2, 3)
    state = one.state_dict()
    torch.save({"epoch": 7, "state_dict": state} if inside else state, tmp_path / "weights.pth")
    load_weights(other, tmp_path / "weights.pth")
    assert torch.equal(one.weight, other.weight)


class _RunsCode:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return (Path.touch, (self.proof,))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda folder: {"weight": _RunsCode(folder / "ran")}, "hold more than tensors"),
        (lambda _: nn.Linear(2, 3), "hold more than tensors"),
        (lambda _: [torch.zeros(1)], "are not a state dict"),
        (lambda _: {"epoch": 7}, "are not a state dict"),
    ],
)
def test_a_pickle_of_anything_but_tensors_is_refused_and_runs_nothing(tmp_path, content, message):
    torch.save(content(tmp_path), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message) as told:
        load_weights(nn.Linear(2, 3), tmp_path / "weights.pth")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "ran").exists()


def test_published_weights_of_auxiliary_heads_are_left_out(tmp_path):
    network = models.build("torchvision:googlenet", 3)
    state = network.state_dict() | {"aux1.conv.conv.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "weights.pth")
    load_weights(network, tmp_path / "weights.pth")


def test_a_network_that_wants_its_version_is_loaded(tmp_path):
    one, other = (models.build("torchvision:mnasnet0_5", 3).eval() for _ in range(2))
    save_weights(one, tmp_path / "weights.safetensors")
    load_weights(other, tmp_path / "weights.safetensors")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x08" + 15 * b"\0"])
def test_a_file_that_holds_no_weights_is_refused(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="are neither a safetensors file") as told:
        load_weights(nn.Linear(1, 1), path)
    assert "\n" not in str(told.value)


def test_weights_that_are_missing_or_a_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="do not exist"):
        load_weights(nn.Linear(1, 1), tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="are neither a safetensors file"):
        load_weights(nn.Linear(1, 1), tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(nn.Linear(9, 9), path)
    assert set(load_file(path)) == {"weight", "bias"}
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="are neither a safetensors file"):
        load_weights(nn.Linear(9, 9), path)
