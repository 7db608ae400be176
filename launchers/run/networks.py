"""The networks of a run: one record each, built once from the recipe and the run's folder."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from launchers.run.folder import RunFolder
from launchers.run.network import Asked, Job, Network
from sbf_dist.recipe import Recipe
from sbf_dist.settings import View
from sbf_dist.teacher_recipe import Teacher
from sbf_dist.training_recipe import Training

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

_ROUND = "sbf-round-"
_SELF_TRAINED = "sbf-self-trained-"

# Keys of a recipe on which the training images of a network depend, but for its view of them.
_TRAINING_IMAGES = ("seed", "data.augmentation")
_STUDENT_VIEW = ("data.image_size", "data.mean", "data.std")
_DISTILLATION = (
    "distill.targets",
    "distill.label_weight",
    "distill.labelled_share",
    "distill.teacher_weight",
    "distill.consistency",
    "distill.features",
    "distill.labels_last",
    "pseudo_labels.threshold",
    "pseudo_labels.adaptive",
    "pseudo_labels.per_class",
    "pseudo_labels.min_agreement",
    "pseudo_labels.sharpening",
)

# Keys of a teacher that nothing reads but the ensemble.
_ENSEMBLE_ALONE = frozenset(("weight", "views", "classes"))
# Keys of a teacher that say what its training starts with.
_BUILT = (
    "model",
    "arguments",
    "start_from",
    "pretrained",
    "weights_key",
    "weights_prefix",
)


@dataclass(frozen=True)
class Round:
    """One round of a student that is shrunk in rounds; the last is fitted, but not trained."""

    plan: Path
    fitted: Network
    trained: Network | None


@dataclass(frozen=True)
class Row:
    """One line of the table of results; `members` answer together, one but for the ensemble."""

    name: str
    title: str
    members: tuple[Network, ...]


@dataclass(frozen=True)
class Networks:
    """All networks of a run.

    compressed    the teacher that is compressed to become the student
    dense_labels  the dense student of the baselines, trained on labels alone
    sbf_labels    the SBF student of the baselines, trained on labels alone
    rounds        empty where the student is compressed in one step
    self_trained  students after the first, each with the one before for a teacher
    """

    recipe: Recipe
    folder: RunFolder
    teachers: tuple[Network, ...]
    compressed: Network
    dense_labels: Network | None
    zeroed: Network
    one_shot: Network
    rounds: tuple[Round, ...]
    sbf_labels: Network | None
    student: Network
    self_trained: tuple[Network, ...] = ()

    @classmethod
    def of(cls, recipe: Recipe, folder: RunFolder) -> "Networks":
        """Make the records of all networks that a recipe asks for."""
        teachers = tuple(_teacher(recipe, folder, index) for index in range(len(recipe.teachers)))
        compressed = next(t for t in teachers if t.name == recipe.compress.teacher)
        family = _Students(recipe, folder, compressed)
        rounds = family.rounds() if recipe.compress.rounds > 1 else ()
        return cls(
            recipe=recipe,
            folder=folder,
            teachers=teachers,
            compressed=compressed,
            dense_labels=family.dense_labels(),
            zeroed=family.network(ZEROED),
            one_shot=family.network(ONE_SHOT, folder.plan),
            rounds=rounds,
            sbf_labels=family.sbf_labels(),
            student=family.student(rounds),
            self_trained=family.self_trained(rounds),
        )

    def __iter__(self) -> Iterator[Network]:
        yield from self.teachers
        yield from (n for n in (self.dense_labels, self.zeroed, self.one_shot) if n is not None)
        for one in self.rounds:
            yield from (n for n in (one.fitted, one.trained) if n is not None)
        yield self.student
        yield from self.self_trained
        if self.sbf_labels is not None:
            yield self.sbf_labels

    @property
    def exported(self) -> Network:
        """The student that leaves the run: the last one."""
        return self.self_trained[-1] if self.self_trained else self.student

    def in_group(self, group: str) -> "Networks":
        """Return the run as those see it who work on a stage, or on a round, of that name.

        A round of self-training has teachers and a folder of pseudo-labels of its own.
        """
        settings = self.recipe.self_training
        for number, network in enumerate(self.self_trained, 1):
            assert network.job is not None and settings is not None
            if group not in (network.job.group, labels_of(network)):
                continue
            before = self.self_trained[number - 2] if number > 1 else self.student
            teacher = replace(before, asked=Asked(weight=settings.weight))
            others = self.teachers if settings.with_teachers else ()
            folder = replace(self.folder, labels=labels_of(network))
            return replace(self, teachers=(*others, teacher), folder=folder)
        return self

    def trained_in(self, group: str) -> list[Network]:
        """Return the networks that are trained in a stage or a round, in their order."""
        return [n for n in self if n.job is not None and n.job.group == group]

    def rows(self) -> list[Row]:
        """Return the lines of the table of results in their order."""
        members = [(teacher,) for teacher in self.teachers]
        rows = [Row(t.name, t.title, (t,)) for (t,) in members]
        if len(self.teachers) > 1:
            rows.append(Row(ENSEMBLE, TITLES[ENSEMBLE], self.teachers))
        students = (
            self.dense_labels,
            self.zeroed,
            self.one_shot,
            self.sbf_labels,
            self.student,
            *self.self_trained,
        )
        return rows + [Row(n.name, n.title, (n,)) for n in students if n is not None]


def is_name_of_round(name: str) -> bool:
    """Whether a network of a round could have this name."""
    return name.startswith((_ROUND, _SELF_TRAINED))


def labels_of(network: Network) -> str:
    """Return the name of the pseudo-labels of a round of self-training, and of their making."""
    return f"pseudo-labels-{network.name}"


def _teacher(recipe: Recipe, folder: RunFolder, index: int) -> Network:
    teacher = recipe.teachers[index]
    job = None
    published = teacher.weights or teacher.start_from
    if teacher.pretrained:
        published = folder.pretrained(teacher.model, teacher.arguments)
    if teacher.training is not None:
        job = Job("teachers", teacher.training, recipe.seed + index, published)
    own = folder.weights(teacher.name)
    return Network(
        name=teacher.name,
        title=teacher.name,
        model=teacher.model,
        view=_teacher_view(recipe, teacher),
        weights=own if job is not None or published is None else published,
        result=folder.training(teacher.name),
        job=job,
        reads=_teacher_reads(teacher, index),
        arguments=teacher.arguments,
        published=published,
        weights_choice=(teacher.weights_key, teacher.weights_prefix),
        asked=Asked(teacher.weight, teacher.views, teacher.classes),
    )


def _teacher_view(recipe: Recipe, teacher: Teacher) -> View:
    return View(
        image_size=teacher.image_size or recipe.data.image_size,
        mean=teacher.mean or recipe.data.mean,
        std=teacher.std or recipe.data.std,
    )


def _teacher_reads(teacher: Teacher, index: int) -> tuple[str, ...]:
    fields = type(teacher).model_fields.keys() - _ENSEMBLE_ALONE
    own = tuple(f"teachers.{index}.{name}" for name in sorted(fields))
    view = ("image_size", "mean", "std")
    students = tuple(f"data.{name}" for name in view if getattr(teacher, name) is None)
    return own + students + (_TRAINING_IMAGES if teacher.training is not None else ())


@dataclass(frozen=True)
class _Students:
    """Makes the records of all networks that have the architecture of the compressed teacher."""

    recipe: Recipe
    folder: RunFolder
    teacher: Network

    def network(
        self,
        name: str,
        plan: Path | None = None,
        job: Job | None = None,
        reads: tuple[str, ...] = (),
    ) -> Network:
        return Network(
            name=name,
            title=TITLES.get(name, name),
            model=self.teacher.model,
            view=self.recipe.data.view,
            weights=self.folder.weights(name),
            result=self.folder.training(name),
            plan=plan,
            job=job,
            reads=(*_TRAINING_IMAGES, *_STUDENT_VIEW, *reads) if job is not None else (),
            arguments=self.teacher.arguments,
        )

    def dense_labels(self) -> Network | None:
        if self.recipe.baselines is None:
            return None
        teachers = len(self.recipe.teachers)
        # It starts where the teacher that it is compared with does.
        start = self.teacher.job.start if self.teacher.job is not None else None
        job = Job("teachers", self.recipe.baselines, self.recipe.seed + teachers, start)
        index = [teacher.name for teacher in self.recipe.teachers].index(self.teacher.name)
        # Its seed is the number of teachers.
        built = tuple(f"teachers.{index}.{name}" for name in _BUILT)
        reads = ("baselines", "teachers.*.name", *built, "compress.teacher")
        dense = self.network(DENSE, None, job, reads)
        if start is None:
            return dense
        return replace(dense, published=start, weights_choice=self.teacher.weights_choice)

    def sbf_labels(self) -> Network | None:
        if self.recipe.baselines is None:
            return None
        job = Job(
            "distill",
            self.recipe.baselines,
            self.recipe.seed,
            start=self.folder.weights(ONE_SHOT),
        )
        return self.network(SBF_LABELS, self.folder.plan, job, ("baselines",))

    def student(self, rounds: tuple[Round, ...]) -> Network:
        plan = rounds[-1].plan if rounds else self.folder.plan
        start = rounds[-1].fitted.weights if rounds else self.folder.weights(ONE_SHOT)
        job = self._distillation("distill", self.recipe.distill.training, start)
        reads = (*_DISTILLATION, "distill.training", "compress.rounds")
        return self.network(STUDENT, plan, job, reads)

    def self_trained(self, rounds: tuple[Round, ...]) -> tuple[Network, ...]:
        if self.recipe.self_training is None:
            return ()
        first = self.student(rounds)
        assert first.job is not None
        reads = (*first.reads, "self_training.with_teachers", "self_training.weight")
        found = []
        for number in range(1, self.recipe.self_training.rounds + 1):
            name = f"{_SELF_TRAINED}{number}"
            job = replace(first.job, group=f"distill-{name}", seed=self.recipe.seed + number)
            network = self.network(name, first.plan, job)
            title = f"SBF student, self-trained, round {number}"
            found.append(replace(network, title=title, reads=reads))
        return tuple(found)

    def rounds(self) -> tuple[Round, ...]:
        number_of_rounds = self.recipe.compress.rounds
        return tuple(
            self._round(number, trained=number < number_of_rounds)
            for number in range(1, number_of_rounds + 1)
        )

    def _round(self, number: int, *, trained: bool) -> Round:
        """Return a round; its training is shorter than the student's."""
        name = f"{_ROUND}{number}"
        plan = self.folder.round_plan(number)
        fitted = self.network(f"{name}-fitted", plan)
        if not trained:
            return Round(plan, fitted, None)
        shorter = self.recipe.distill.round_training()
        job = self._distillation(f"distill-{name}", shorter, fitted.weights)
        reads = (*_DISTILLATION, "distill.training", "distill.round_steps")
        return Round(plan, fitted, self.network(name, plan, job, reads))

    def _distillation(self, group: str, training: Training, start: Path) -> Job:
        return Job(group, training, self.recipe.seed, start, self.recipe.distill)
