"""Which networks a recipe makes: how each is built, trained and named in the tables."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launchers.layout import RunFolder
from sbf_dist.recipe import Recipe, Teacher, Training
from sbf_dist.settings import View

ENSEMBLE = "ensemble"
DENSE = "dense-labels"
ZEROED = "zeroed"
ONE_SHOT = "sbf-one-shot"
SBF_LABELS = "sbf-labels"
STUDENT = "sbf-distilled"

TITLES = {
    ENSEMBLE: "ensemble",
    DENSE: "dense student, labels only",
    ZEROED: "channels zeroed, no training",
    ONE_SHOT: "SBF one-shot, no training",
    SBF_LABELS: "SBF student, labels only",
    STUDENT: "SBF student, distilled",
}


@dataclass(frozen=True)
class Job:
    """One training: which network, from which weights, towards what."""

    name: str
    model: str
    training: Training
    targets: Literal["labels", "stored", "live"]
    view: View
    start_from: str | None = None  # a network whose weights it starts from
    planned: bool = False  # the network is SBF
    label_weight: float = 1.0
    labelled_share: float = 1.0
    seed: int = 0


def student_view(recipe: Recipe) -> View:
    """Return how the student sees an image."""
    return recipe.data.view


def teacher_view(recipe: Recipe, teacher: Teacher) -> View:
    """Return how a teacher sees an image."""
    return View(
        image_size=teacher.image_size or recipe.data.image_size,
        mean=teacher.mean or recipe.data.mean,
        std=teacher.std or recipe.data.std,
    )


def compressed_teacher(recipe: Recipe) -> Teacher:
    """Return the teacher that becomes the student."""
    return next(t for t in recipe.teachers if t.name == recipe.compress.teacher)


def teacher_jobs(recipe: Recipe) -> list[Job]:
    """Return the trainings of the stage teachers: all that need nothing but labels."""
    jobs = [
        Job(
            name=teacher.name,
            model=teacher.model,
            training=teacher.training,
            targets="labels",
            view=teacher_view(recipe, teacher),
            seed=recipe.seed + index,
        )
        for index, teacher in enumerate(recipe.teachers)
        if teacher.training is not None
    ]
    if recipe.baselines is not None:
        jobs.append(
            Job(
                name=DENSE,
                model=compressed_teacher(recipe).model,
                training=recipe.baselines,
                targets="labels",
                view=student_view(recipe),
                seed=recipe.seed + len(recipe.teachers),
            )
        )
    return jobs


def distill_jobs(recipe: Recipe) -> list[Job]:
    """Return the trainings of the stage distill: those of the student as it will be."""
    model = compressed_teacher(recipe).model
    start = ONE_SHOT if recipe.compress.rounds == 1 else fitted(recipe.compress.rounds)
    jobs = [_distillation(recipe, STUDENT, recipe.distill.training, start)]
    if recipe.baselines is not None:
        jobs.append(
            Job(
                name=SBF_LABELS,
                model=model,
                training=recipe.baselines,
                targets="labels",
                view=student_view(recipe),
                start_from=ONE_SHOT,
                planned=True,
                seed=recipe.seed,
            )
        )
    return jobs


def round_jobs(recipe: Recipe) -> list[Job]:
    """Return the trainings between the rounds in which the student is shrunk."""
    training = recipe.distill.training
    steps = recipe.distill.round_steps or max(1, training.steps // 5)
    shorter = training.model_copy(
        update={"steps": steps, "warmup": min(training.warmup, steps // 5)}
    )
    return [
        _distillation(recipe, trained(number), shorter, fitted(number))
        for number in range(1, recipe.compress.rounds)
    ]


def jobs_of(recipe: Recipe, stage: str) -> list[Job]:
    """Return the trainings of a stage, or of the round that `round_stage` names."""
    if stage == "teachers":
        return teacher_jobs(recipe)
    if stage == "distill":
        return distill_jobs(recipe)
    return [job for job in round_jobs(recipe) if round_stage(job) == stage]


def round_stage(job: Job) -> str:
    """Return the name under which the training of a round keeps its checkpoints."""
    return f"distill-{job.name}"


def fitted(number: int) -> str:
    """Return the name of the student that a round has fitted."""
    return f"sbf-round-{number}-fitted"


def trained(number: int) -> str:
    """Return the name of the student that is trained after a round."""
    return f"sbf-round-{number}"


def _distillation(recipe: Recipe, name: str, training: Training, start_from: str) -> Job:
    return Job(
        name=name,
        model=compressed_teacher(recipe).model,
        training=training,
        targets=recipe.distill.targets,
        view=student_view(recipe),
        start_from=start_from,
        planned=True,
        label_weight=recipe.distill.label_weight,
        labelled_share=recipe.distill.labelled_share,
        seed=recipe.seed,
    )


@dataclass(frozen=True)
class Row:
    """One line of the table of results."""

    network: str
    title: str
    members: tuple[str, ...]  # the networks that answer together; one, but for the ensemble


def rows(recipe: Recipe) -> list[Row]:
    """Return the table's lines in its order."""
    teachers = [t.name for t in recipe.teachers]
    found = [Row(name, name, (name,)) for name in teachers]
    if len(teachers) > 1:
        found.append(Row(ENSEMBLE, TITLES[ENSEMBLE], tuple(teachers)))
    names = [ZEROED, ONE_SHOT, STUDENT]
    if recipe.baselines is not None:
        names = [DENSE, ZEROED, ONE_SHOT, SBF_LABELS, STUDENT]
    return found + [Row(name, TITLES[name], (name,)) for name in names]


def plan_of(recipe: Recipe, run: RunFolder, network: str) -> Path | None:
    """Return the file of the plan that makes a network, None for dense ones."""
    rounds = recipe.compress.rounds
    for number in range(1, rounds + 1):
        if network in (fitted(number), trained(number)):
            return run.round_plan(number)
    if network == STUDENT and rounds > 1:
        return run.round_plan(rounds)
    return run.plan if network in (ONE_SHOT, SBF_LABELS, STUDENT) else None


def weights_of(recipe: Recipe, run: RunFolder, network: str) -> Path:
    """Return the file that holds a network's weights."""
    for teacher in recipe.teachers:
        if teacher.name == network and teacher.weights is not None:
            return teacher.weights
    return run.weights(network)


def model_of(recipe: Recipe, network: str) -> str:
    """Return the name of the architecture that a network is built from."""
    for teacher in recipe.teachers:
        if teacher.name == network:
            return teacher.model
    return compressed_teacher(recipe).model
