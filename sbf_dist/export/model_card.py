"""A student's model card, in Hugging Face's form: what it is, is made of, and is good for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sbf_dist.compression.plan import Plan
from sbf_dist.export.saved import Card
from sbf_dist.export.student_files import MODEL_CARD, ONNX
from sbf_dist.files import write_text
from sbf_dist.provenance import origin
from sbf_dist.recipe import Data, Recipe, Teacher

NOT_KNOWN = "not known"
_LIMITS = """\
- It knows its {classes} classes and no others: of anything else it names one of them all the same.
- Its probabilities are not calibrated unless somebody has done so.
- Nothing is known of images unlike those it was trained on, nor of its fairness to people.
- It must not decide on its own about people's health, rights or safety.
"""


@dataclass(frozen=True)
class History:
    """How a student was made by a run.

    images  numbers of images by part: labelled, unlabelled, validation
    rows    the run's table of results, as summary.json has it
    """

    recipe: Recipe
    images: Mapping[str, int]
    rows: Sequence[Mapping[str, Any]] = field(default_factory=list)


def write_model_card(folder: Path, card: Card, plan: Plan, history: History | None) -> None:
    """Write README.md into `folder`; what is not known without a `history` is said to be so."""
    write_text(folder / MODEL_CARD, model_card(card, plan, history))


def model_card(card: Card, plan: Plan, history: History | None) -> str:
    """Return the text: YAML between dashes, then Markdown."""
    sections = [
        f"# {_title(card, plan)}",
        _summary(card, plan),
        "## Use\n\n" + _use(card),
        "## Intended use and limits\n\n" + _intended(card),
        "## Data\n\n" + _data(history),
        "## Budget\n\n" + _budget(plan),
        "## Accuracy\n\n" + _accuracy(card, history),
        "## Teachers and licences\n\n" + _teachers(history),
        "## Made with\n\n" + _versions(history),
    ]
    return f"---\n{_front_matter(card, plan, history)}\n---\n\n" + "\n\n".join(sections) + "\n"


def teachers_licence(teacher: Teacher) -> str:
    """Say which licence the weights that a teacher starts from have, where that is known.

    Known are those that timm publishes, by its own metadata; torchvision's state none.
    """
    if teacher.weights is not None:
        return f"{NOT_KNOWN} (weights from the file {teacher.weights.name})"
    if getattr(teacher, "start_from", None) is not None:
        return f"{NOT_KNOWN} (it starts from weights of the user's)"
    if getattr(teacher, "pretrained", False):
        found = _published_licence(teacher.model)
        return NOT_KNOWN if found is None else f"{found} (of the published weights it starts from)"
    return "trained in this run, from random weights"


def _published_licence(model: str) -> str | None:
    package, _, name = model.partition(":")
    if package != "timm":
        return None
    import timm

    published = timm.models.get_pretrained_cfg(name)
    return None if published is None else published.license


def _front_matter(card: Card, plan: Plan, history: History | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    tags = ["image-classification"] if card.classes else []
    results = None
    if card.top1 is not None:
        source = "own images" if history is None else history.recipe.data.source
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=source.replace(" ", "-"),
                dataset_name=source,
                metric_type="accuracy",
                metric_value=round(card.top1, 4),
            )
        ]
    data = ModelCardData(
        model_name=_title(card, plan),
        library_name="onnx",
        pipeline_tag="image-classification" if card.classes else None,
        tags=[*tags, "sbf-dist", "model-compression", "distillation"],
        metrics=["accuracy"] if results else None,
        eval_results=results,
    )
    return data.to_yaml().strip()


def _title(card: Card, plan: Plan) -> str:
    return f"{card.model} at {100 * plan.macs_after / plan.macs_before:.0f} % of the multiply-adds"


def _summary(card: Card, plan: Plan) -> str:
    rebuilt = sum(hasattr(layer, "kept") for layer in plan.layers.values())
    return (
        f"A convolutional network, {card.model}, in {rebuilt} of whose {len(plan.layers)} "
        "convolutions some channels are rebuilt from the others by cheap spatial transformations "
        "([arXiv 2110.12844](https://arxiv.org/abs/2110.12844)). Made by SBF-Dist."
    )


def _use(card: Card) -> str:
    channels, height, width = card.input_shape
    lines = [f"Input: images of {channels} x {height} x {width} (channels, height, width)."]
    if card.mean is not None and card.std is not None:
        lines.append(
            f"Pixels in [0, 1] are normalised with mean {_numbers(card.mean)} and standard "
            f"deviation {_numbers(card.std)}."
        )
    if card.crop is not None:
        lines.append(f"Images are shown by a centre crop of {card.crop:g} of their short side.")
    code = f"    sbf predict FOLDER/{ONNX} photo.jpg\n\nThe ONNX file holds all of this itself."
    return " ".join(lines) + f"\n\n{code}"


def _intended(card: Card) -> str:
    if not card.classes:
        return "It gives features of an image; what they are good for is not known here."
    return (
        "Classifying images like those of its training set. What it is not for:\n\n"
        + _LIMITS.format(classes=len(card.classes)).rstrip()
    )


def _data(history: History | None) -> str:
    if history is None:
        return f"Training images and labels: {NOT_KNOWN}."
    counts = ", ".join(f"{number} {part}" for part, number in history.images.items())
    return f"{_source(history.recipe.data)}: {counts} images. Licence of the images: {NOT_KNOWN}."


def _source(data: Data) -> str:
    return {
        "folder": "A folder of the user's own",
        "digits": "Handwritten digits of scikit-learn (UCI's optical recognition of digits)",
        "photos": "Patches of the photographs of scikit-image",
    }.get(data.source, data.source)


def _budget(plan: Plan) -> str:
    asked = ", ".join(f"{key} = {value:g}" for key, value in plan.budget.items())
    rows = [
        "| | dense | this |",
        "|---|---:|---:|",
        f"| multiply-adds (M) | {plan.macs_before / 1e6:.2f} | {plan.macs_after / 1e6:.2f} |",
        f"| parameters (k) | {plan.params_before / 1e3:.1f} | {plan.params_after / 1e3:.1f} |",
    ]
    return f"Asked for: {asked}.\n\n" + "\n".join(rows)


def _accuracy(card: Card, history: History | None) -> str:
    if history is not None and history.rows:
        images = history.images.get("validation", 0)
        lines = ["| network | top-1 % | multiply-adds (M) |", "|---|---:|---:|"]
        for row in history.rows:
            top1 = "-" if row["top1"] is None else f"{100 * row['top1']:.1f}"
            lines.append(f"| {row['name']} | {top1} | {row['macs'] / 1e6:.2f} |")
        return (
            f"On {images} validation images, which nothing was trained on. The last row is this "
            "model.\n\n" + "\n".join(lines)
        )
    if card.top1 is not None:
        return f"Top-1 {100 * card.top1:.1f} % on validation images."
    return "Not measured."


def _teachers(history: History | None) -> str:
    ours = "A licence of this model is not stated: it follows from those of images and teachers."
    if history is None:
        return f"Teachers: {NOT_KNOWN}. {ours}"
    lines = ["| teacher | network | licence of its weights |", "|---|---|---|"]
    lines += [
        f"| {teacher.name} | {teacher.model} | {teachers_licence(teacher)} |"
        for teacher in history.recipe.teachers
    ]
    return "\n".join(lines) + f"\n\n{ours}"


def _versions(history: History | None) -> str:
    found = origin()
    lines = [
        f"- {key.removeprefix('version.')} {value}"
        for key, value in found.items()
        if key.startswith("version.")
    ]
    if "mlflow.source.git.commit" in found:
        lines.append(f"- commit {found['mlflow.source.git.commit']}")
    if history is not None:
        recipe = history.recipe
        lines.append(
            f"- recipe {recipe.name}, seed {recipe.seed}, "
            f"{recipe.distill.training.steps} steps of distillation"
        )
    return "\n".join(lines)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
