"""Model cards: Hugging Face's tools read them, and what is not known is said to be so."""

from typing import Any

import pytest
from huggingface_hub import ModelCard

from sbf_dist.compression.plan import Plan
from sbf_dist.export.model_card import History, model_card, teachers_licence
from sbf_dist.export.saved import Card
from sbf_dist.recipe import Recipe, Teacher

RECIPE = {
    "name": "tiny",
    "data": {"source": "digits"},
    "teachers": [
        {"name": "one", "model": "cifar_resnet8", "training": {"steps": 10}},
        {"name": "two", "model": "timm:resnet18", "weights": "some/weights.safetensors"},
    ],
    "compress": {"teacher": "one", "macs": 0.5},
    "distill": {"training": {"steps": 77}},
}
ROWS: list[dict[str, Any]] = [
    {"name": "one", "network": "one", "top1": 0.912, "macs": 2_000_000},
    {"name": "SBF student, distilled", "network": "sbf-distilled", "top1": 0.5, "macs": 1_000_000},
]


@pytest.fixture(scope="module")
def text(card: Card, plan: Plan) -> str:
    recipe = Recipe.model_validate(RECIPE)
    return model_card(card, plan, History(recipe, {"labelled": 12, "validation": 34}, ROWS))


def test_its_front_matter_is_read_by_hugging_face(text: str, card: Card) -> None:
    data = ModelCard(text).data
    assert data.pipeline_tag == "image-classification"
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", card.top1)
    assert result.dataset_name == "digits"
    assert "sbf-dist" in data.tags


def test_it_says_data_budget_accuracy_use_and_licences(text: str) -> None:
    assert "12 labelled, 34 validation images" in text
    assert "| multiply-adds (M) |" in text
    assert "| SBF student, distilled | 50.0 | 1.00 |" in text
    assert "On 34 validation images" in text
    assert "77 steps of distillation" in text
    assert "It knows its 10 classes and no others" in text
    assert "| one | cifar_resnet8 | trained in this run, from random weights |" in text
    assert "| two | timm:resnet18 | not known (weights from the file weights.safetensors) |" in text
    assert "some/" not in text, "places of the user's files are nobody's business"


def test_without_a_run_it_says_what_is_not_known(card: Card, plan: Plan) -> None:
    text = model_card(card.model_copy(update={"top1": None}), plan, None)
    assert "Training images and labels: not known." in text
    assert "Not measured." in text
    assert "Teachers: not known." in text
    assert ModelCard(text).data.eval_results is None


@pytest.mark.parametrize(
    ("model", "licence"),
    [("timm:resnet50", "apache-2.0"), ("torchvision:resnet50", "not known")],
)
def test_the_licence_of_published_weights_is_what_their_package_says(
    model: str, licence: str
) -> None:
    teacher = Teacher(name="one", model=model, weights=None, training={"steps": 10})
    published = teacher.model_copy(update={"pretrained": True})
    assert teachers_licence(published).startswith(licence)
    assert teachers_licence(teacher) == "trained in this run, from random weights"
