from pathlib import Path

import pytest
import torch
from torch import nn

from sbf_dist.distill.class_mapping import ClassMapping
from sbf_dist.distill.teachers import Member
from sbf_dist.distill.temperature import (
    LEAST,
    fit_temperature,
    read_temperatures,
    write_temperatures,
)
from sbf_dist.settings import View

VIEW = View(image_size=8, mean=(0, 0, 0), std=(1, 1, 1))
MEMBER = Member("one", nn.Identity(), VIEW)


def drawn(temperature: float, classes: int = 5, images: int = 4000) -> tuple[torch.Tensor, ...]:
    """Logits (1, N, classes), and labels that are drawn from their softmax at a temperature."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(images, classes, generator=generator)
    labels = torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)[:, 0]
    return logits[None], labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_labels_were_drawn_with_is_found(temperature: float) -> None:
    fitted = fit_temperature(MEMBER, *drawn(temperature))
    assert fitted.temperature == pytest.approx(temperature, rel=0.08)
    assert fitted.after <= fitted.before
    assert fitted.images == 4000


def test_the_losses_are_those_of_cross_entropy() -> None:
    logits, labels = drawn(2.0)
    fitted = fit_temperature(MEMBER, logits, labels)
    for temperature, found in ((1.0, fitted.before), (fitted.temperature, fitted.after)):
        expected = nn.functional.cross_entropy(logits[0] / temperature, labels)
        assert found == pytest.approx(float(expected), abs=1e-3)


def test_no_other_temperature_is_better() -> None:
    logits, labels = drawn(2.0)
    fitted = fit_temperature(MEMBER, logits, labels)
    for factor in (0.9, 1.1):
        other = nn.functional.cross_entropy(logits[0] / (fitted.temperature * factor), labels)
        assert float(other) > fitted.after


def test_views_and_other_classes_are_counted_as_the_ensemble_counts_them() -> None:
    logits, labels = drawn(2.0, classes=2)
    far = torch.full((*logits.shape[:2], 1), 50.0)  # a class that the images do not have
    mapping = ClassMapping(3, torch.tensor([1, 2]), torch.tensor([0, 1]), classes=2)
    member = Member("one", nn.Identity(), VIEW, views=2, mapping=mapping)
    both = torch.cat([far, logits], 2).expand(2, -1, -1)
    assert fit_temperature(member, both, labels).temperature == pytest.approx(
        fit_temperature(MEMBER, logits, labels).temperature, rel=1e-3
    )


def test_answers_that_are_all_right_end_at_the_limit_which_is_said() -> None:
    logits = 5 * torch.eye(4).repeat(3, 1)[None]
    fitted = fit_temperature(MEMBER, logits, torch.arange(4).repeat(3))
    assert fitted.temperature == pytest.approx(LEAST, rel=0.01)
    assert str(fitted).startswith("temperature 0.05, the limit (cross-entropy on 12 validation")


def test_what_was_fitted_is_kept(tmp_path: Path) -> None:
    fitted = {"one": fit_temperature(MEMBER, *drawn(2.0))}
    assert read_temperatures(tmp_path / "file.json") == {}
    write_temperatures(tmp_path / "file.json", fitted)
    assert read_temperatures(tmp_path / "file.json") == fitted
