"""The stages of a run in their order: what each does, what it leaves behind, what it reads.

The command line, the order of the work and the files to remove follow from this list.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launchers.run.locks import Product
from sbf_dist.errors import UserError

if TYPE_CHECKING:  # they take seconds to import, and the command line reads this list
    from launchers.run.network import Network
    from launchers.run.networks import Networks
    from launchers.run.session import Result, Session
    from sbf_dist.tracking import Run as TrackedRun

_STUDENT_VIEW = ("data.image_size", "data.crop", "data.mean", "data.std")
# Names of products beside those of networks, which have no spaces.
_IMAGES = "the images"
_PSEUDO_LABELS = "the pseudo-labels"
_ROUNDS = "the rounds"
_SELF_TRAINING = "the self-training"
_TABLE = "the table of results"
_EXPORTED = "the exported student"


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    summary     what it does, on one line
    work        does it; what it returns is kept as the stage's result
    products    what it leaves behind in the folder of a run with these networks
    on_workers  whether its work is done by workers
    is_short    whether it is over in seconds where it is not
    """

    name: str
    summary: str
    work: "Callable[[Session, TrackedRun], Result]"
    products: "Callable[[Networks], list[Product]]"
    on_workers: "Callable[[Networks], bool]"
    is_short: bool = False


def _prepare(session: "Session", log: "TrackedRun") -> "Result":
    from launchers.run import work

    return work.prepare(session, log)


def _images(networks: "Networks") -> list[Product]:
    # Not root: where the same images are may change, see images.find_again.
    fields = ("source", "unlabelled", "labelled_per_class", "split", "validation")
    reads = ("seed", *(f"data.{field}" for field in fields))
    return [Product(_IMAGES, reads, files=(networks.folder.index,))]


def _train_teachers(session: "Session", log: "TrackedRun") -> "Result":
    from launchers.run import work

    return work.train_teachers(session, log)


def _teachers(networks: "Networks") -> list[Product]:
    dense = networks.dense_labels
    return [
        _trained(network, _IMAGES)
        for network in (*networks.teachers, *([] if dense is None else [dense]))
    ]


def _write_pseudo_labels(session: "Session", log: "TrackedRun") -> "Result":
    from launchers.run import work

    return work.write_pseudo_labels(session, log)


def _pseudo_labels(networks: "Networks") -> list[Product]:
    return [
        Product(
            _PSEUDO_LABELS,
            ("seed", "teachers", "data.crop", "pseudo_labels.temperature", "pseudo_labels.top_k"),
            needs=(_IMAGES, *(teacher.name for teacher in networks.teachers)),
            files=(networks.folder.pseudo_labels,),
        )
    ]


def _compress(session: "Session", log: "TrackedRun") -> "Result":
    from launchers.run import work

    return work.compress_teacher(session, log)


def _one_shot(networks: "Networks") -> list[Product]:
    return [
        Product(
            networks.one_shot.name,
            (*_compression(networks), *_STUDENT_VIEW, "seed"),
            needs=(_IMAGES, networks.compressed.name),
            files=(
                networks.folder.plan,
                networks.one_shot.weights,
                networks.zeroed.weights,
            ),
        )
    ]


def _distill(session: "Session", log: "TrackedRun") -> "Result":
    from launchers.run import work

    return work.distill(session, log)


def _students(networks: "Networks") -> list[Product]:
    before = _ROUNDS if networks.rounds else networks.one_shot.name
    products = [_trained(networks.student, _IMAGES, _PSEUDO_LABELS, before)]
    if networks.sbf_labels is not None:
        products.append(_trained(networks.sbf_labels, _IMAGES, networks.one_shot.name))
    products += _self_trained(networks)
    if not networks.rounds:
        return products
    trained = [one.trained for one in networks.rounds if one.trained is not None]
    plans_and_weights = [path for one in networks.rounds for path in (one.plan, one.fitted.weights)]
    checkpoints = [
        networks.folder.checkpoints / network.job.group for network in trained if network.job
    ]
    rounds = Product(
        _ROUNDS,
        (
            *_compression(networks),
            "compress.rounds",
            *_STUDENT_VIEW,
            *dict.fromkeys(key for network in trained for key in network.reads),
        ),
        needs=(_IMAGES, networks.compressed.name, _PSEUDO_LABELS),
        files=(*plans_and_weights, *(network.weights for network in trained), *checkpoints),
        decided=tuple(network.targets for network in trained),
    )
    return [rounds, *products]


def _self_trained(networks: "Networks") -> list[Product]:
    """Return how many students had a student for a teacher, and these students."""
    products = [Product(_SELF_TRAINING, ("self_training.rounds",))]
    before = networks.student
    for network in networks.self_trained:
        assert network.job is not None
        files = (
            network.weights,
            network.result,
            network.targets,
            networks.in_group(network.job.group).folder.pseudo_labels,
            networks.folder.checkpoints / network.job.group,
        )
        needs = (_IMAGES, _PSEUDO_LABELS, before.name)
        products.append(Product(network.name, network.reads, needs, files))
        before = network
    return products


def _evaluate(session: "Session", log: "TrackedRun") -> "Result":
    from launchers.run import work

    return work.evaluate(session, log)


def _table_of_results(networks: "Networks") -> list[Product]:
    reads = ("teachers", "baselines", "data.crop", "pseudo_labels.temperature")
    dense = (*networks.teachers, networks.dense_labels)
    students = (networks.one_shot, networks.sbf_labels, networks.student, *networks.self_trained)
    names = [n.name for n in (*dense, *students) if n is not None]
    return [Product(_TABLE, reads, needs=(_IMAGES, *names, _SELF_TRAINING))]


def _export(session: "Session", log: "TrackedRun") -> "Result":
    from launchers.run import work

    return work.export(session, log)


def _exported(networks: "Networks") -> list[Product]:
    folder = networks.folder
    files = (folder.student, folder.summary, folder.page)
    return [Product(_EXPORTED, _STUDENT_VIEW, (_IMAGES, networks.exported.name, _TABLE), files)]


def _always(networks: "Networks") -> bool:
    return True


def _never(networks: "Networks") -> bool:
    return False


def _are_trained(networks: "Networks") -> bool:
    return bool(networks.trained_in("teachers"))


STAGES = (
    Stage("prepare", "find, check and split the images", _prepare, _images, _never),
    Stage(
        "teachers",
        "train the teachers on the labels",
        _train_teachers,
        _teachers,
        _are_trained,
        is_short=True,
    ),
    Stage(
        "pseudo-labels",
        "write the ensemble's predictions",
        _write_pseudo_labels,
        _pseudo_labels,
        _always,
    ),
    Stage("compress", "plan and fit the SBF student", _compress, _one_shot, _never),
    Stage("distill", "train the student", _distill, _students, _always),
    Stage("evaluate", "measure all networks", _evaluate, _table_of_results, _always),
    Stage("export", "write the student as ONNX and safetensors", _export, _exported, _never),
)


def check_order(until: str, again: str | None) -> None:
    """UserError where the stage to repeat comes after the last one that is wanted."""
    names = [stage.name for stage in STAGES]
    if again is not None and names.index(again) > names.index(until):
        raise UserError(
            f"--again {again}: the command ends at stage {until}, before it; its results would be "
            "removed and not made again"
        )


def _trained(network: "Network", *needs: str) -> Product:
    """Return a network as a product of its stage; the file of weights that are given stays."""
    if network.job is None:
        return Product(network.name, network.reads, needs)
    files = (network.weights, network.result)
    decided = (network.targets,)
    return Product(network.name, network.reads, needs, files, resumable=True, decided=decided)


def _compression(networks: "Networks") -> tuple[str, ...]:
    """Return the keys of the settings of the compression, all but the number of rounds."""
    fields = type(networks.recipe.compress).model_fields
    return tuple(f"compress.{field}" for field in fields if field != "rounds")
