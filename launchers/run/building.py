"""A network of a run as a module: its architecture, its plan applied, weights loaded."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from launchers.display import Display
from launchers.run.network import Network
from launchers.run.networks import (
    ONE_SHOT,
    SBF_LABELS,
    STUDENT,
    ZEROED,
    Networks,
    is_name_of_round,
)
from sbf_dist import models
from sbf_dist.compression.convert import convert
from sbf_dist.compression.plan import Plan
from sbf_dist.distill.class_mapping import class_mapping, read_classes
from sbf_dist.distill.teachers import Member
from sbf_dist.errors import UserError
from sbf_dist.pretrained import build_pretrained, normalisation
from sbf_dist.weights import is_whole, load_weights, save_weights


def build_network(
    network: Network,
    num_classes: int,
    weights: Path | None,
    say: Callable[[str], None] | None = None,
) -> nn.Module:
    """Build a network with `weights`, or with random ones. UserError for weights that do not fit.

    `weights` is network.weights for the network as it came out of its training, and what its
    training starts from for the network before. `say` is called with the line on what was found
    in a file that holds more than the network's weights, or other names.
    """
    if network.asked.classes is not None:
        num_classes = len(read_classes(network.asked.classes))
    model = models.build(network.model, num_classes, network.arguments)
    if network.plan is not None:
        model = convert(model, Plan.load(network.plan))
    if weights is not None:
        found = _load(network, model, weights)
        if found is not None and say is not None:
            say(found)
    return model


def _load(network: Network, model: nn.Module, weights: Path) -> str | None:
    if weights != network.published:
        if not is_whole(weights):
            raise UserError(_lost(weights))
        return load_weights(model, weights)
    key, prefix = network.weights_choice
    return load_weights(model, weights, key=key, prefix=prefix, new_head=network.job is not None)


def _lost(weights: Path) -> str:
    fault = "are damaged" if weights.exists() else "do not exist"
    if weights.stem in (ONE_SHOT, ZEROED):
        return f"weights {weights} {fault}; make them anew (--again compress)"
    of_student = weights.stem in (STUDENT, SBF_LABELS) or is_name_of_round(weights.stem)
    stage = "distill" if of_student else "teachers"
    return (
        f"weights {weights} {fault}; remove stages/{stage}.json of the run and run the same "
        "command again, which makes them anew of the last checkpoint; or train again "
        f"(--again {stage})"
    )


def plan_that_is_kept(networks: Networks, display: Display) -> Plan | None:
    """Return the plan of a stage compress of which nothing but its result, damaged, is missing.

    Another plan, with times measured anew, would not fit the students that were trained since.
    """
    file, made = networks.folder.plan, (networks.one_shot.weights, networks.zeroed.weights)
    if not (file.exists() and all(is_whole(weights) for weights in made)):
        return None
    try:
        plan = Plan.load(file)
    except UserError as error:
        display.say(f"  warning: {error}: compressing anew")
        return None
    display.say(f"  {file.name} and its networks are there: they are kept")
    return plan


def build_member(network: Network, classes: Sequence[str]) -> Member:
    """Build a teacher with its weights, as a member of an ensemble for images of `classes`."""
    asked = network.asked
    return Member(
        name=network.name,
        network=build_network(network, len(classes), network.weights),
        view=network.view,
        weight=asked.weight,
        views=asked.views,
        mapping=class_mapping(asked.classes, classes) if asked.classes is not None else None,
    )


def fetch_published(networks: Networks, display: Display) -> None:
    """Ask timm and torchvision for the published weights that a run begins with, once.

    They are kept in the run's folder. UserError where they cannot be had.
    """
    for index, (teacher, network) in enumerate(
        zip(networks.recipe.teachers, networks.teachers, strict=True)
    ):
        file = network.published
        if not teacher.pretrained or file is None or is_whole(file):
            continue
        display.say(f"{teacher.name}: fetching the published weights of {teacher.model}")
        save_weights(build_pretrained(teacher.model, teacher.arguments), file)
        expected = normalisation(teacher.model)
        if expected is not None and expected != (network.view.mean, network.view.std):
            display.say(
                f"warning: {teacher.name}: its published weights expect mean {list(expected[0])} "
                f"and std {list(expected[1])}, the recipe gives others; see teachers.{index}.mean"
            )
    networks.folder.publish()
