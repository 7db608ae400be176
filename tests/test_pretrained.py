"""Published weights, from caches as the hubs' clients fill them, and from hubs that are away."""

import urllib.error
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from sbf_dist.errors import UserError
from sbf_dist.pretrained import build_pretrained, normalisation


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, and no network."""

    def away(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", away)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("model", ["timm:test_resnet", "torchvision:squeezenet1_1"])
def test_a_hub_that_cannot_be_reached_is_said_in_one_line_with_the_remedy(
    caches: Path, model: str
) -> None:
    with pytest.raises(UserError) as error:
        build_pretrained(model, {})
    message = str(error.value)
    assert message.startswith(f"model {model!r}: its published weights cannot be fetched (")
    assert message.endswith(
        "; give start_from: FILE with weights from elsewhere, or pretrained: false"
    )
    assert "\n" not in message


def test_a_model_without_published_weights_is_never_left_random(caches: Path) -> None:
    assert timm.is_model("coatnet_0_224")
    with pytest.raises(UserError, match="timm publishes no weights for it; give start_from"):
        build_pretrained("timm:coatnet_0_224", {})


def test_weights_of_torchvision_come_from_its_cache(caches: Path) -> None:
    published = torchvision.models.squeezenet1_1()
    file = caches / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    file.parent.mkdir(parents=True)
    torch.save(published.state_dict(), file)
    found = build_pretrained("torchvision:squeezenet1_1", {}).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in published.state_dict().items())


def test_weights_of_timm_come_from_the_hubs_cache_with_its_arguments(caches: Path) -> None:
    published = timm.create_model("test_resnet")
    repository = caches / "models--timm--test_resnet.r160_in1k"
    for file in (repository / "refs" / "main", repository / "snapshots" / "abc" / "x"):
        file.parent.mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    save_file(published.state_dict(), repository / "snapshots" / "abc" / "model.safetensors")
    found = build_pretrained("timm:test_resnet", {}).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in published.state_dict().items())
    grey = build_pretrained("timm:test_resnet", {"in_chans": 1})
    assert grey.conv1[0].in_channels == 1


def test_the_normalisation_that_published_weights_expect_is_known() -> None:
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert normalisation("timm:test_resnet") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert normalisation("timm:resnet18") == imagenet
    assert normalisation("torchvision:resnet18") == imagenet
