"""The work of `sbf compress`: compress a network once, without training, and export it."""

from itertools import tee
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launchers.display import Display, results_table
from launchers.images import (
    calibration_images,
    evaluation_images,
    evaluation_loader,
    images_read,
    index_images,
)
from launchers.machine import available_cpus
from launchers.student import NUM_VERIFIED_IMAGES, export_student, make_student
from pipelines.index import DataIndex
from pipelines.sources.folder import index_plain
from sbf_dist.compress_recipe import OneShot
from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.cost import count
from sbf_dist.compression.fitting.fidelity import Wanted
from sbf_dist.compression.inputs import check_takes_images_alone
from sbf_dist.compression.outputs import Yardstick
from sbf_dist.compression.plan import MeasuredFidelity, Plan, SBFLayer
from sbf_dist.compression.planning.latency import latencies_if_quiet
from sbf_dist.compression.prepared_images import calibration_for
from sbf_dist.export.optimize import optimize
from sbf_dist.export.saved import check_folder
from sbf_dist.export.student_files import ONNX, PLAN, WEIGHTS
from sbf_dist.models import Architecture
from sbf_dist.surgery import in_eval_mode
from sbf_dist.train.evaluate import accuracy, outputs_of
from sbf_dist.weights import load_weights


def compress_once(
    settings: OneShot,
    out: Path,
    classes: int | None,
    *,
    weights_key: str | None = None,
    weights_prefix: str | None = None,
) -> None:
    """Compress a network, write the student to `out` and show the results.

    `classes`: of the network, None for those of the images; `weights_key`,
    `weights_prefix`: see load_weights. UserError for weights, images and folders that do not fit.
    """
    check_folder(out)
    torch.set_num_threads(available_cpus())
    with Display() as display:
        # Embedded sets are written beside the student.
        index = _index(settings, out.parent, display)
        display.say(f"  {index.root}: {len(index)} images of {len(index.classes)} classes")
        known = classes if classes is not None else len(index.classes) or None
        architecture = Architecture.of(settings.model, known, settings.arguments)
        dense = architecture.build()
        check_takes_images_alone(dense, f"model {settings.model}")
        found = load_weights(dense, settings.weights, key=weights_key, prefix=weights_prefix)
        if found is not None:
            display.say(f"  {found}")
        images = calibration_images(settings.data, index, settings.compress.images, settings.seed)
        student, plan = make_student(
            dense, images, settings.compress, architecture, settings.seed, display
        )
        top1 = _accuracies(settings, index, [dense, student], display)
        fidelity = _fidelity(settings, index, plan, images, (dense, student))
        if fidelity is None:
            display.say(f"  agreement and KL not measured: {_why_not_compared(plan)}")
        ids = index.parts["validation" if index.classes else "unlabelled"][:NUM_VERIFIED_IMAGES]
        export_student(
            out,
            student,
            plan,
            settings.data,
            classes=index.classes if top1 else [str(i) for i in range(plan.classes)],
            top1=top1[1] if top1 else None,
            fidelity=fidelity,
            images=evaluation_images(settings.data, index, ids),
        )
        rows = _rows(settings, plan, [dense, student], top1)
        if fidelity is not None:
            rows[1] |= fidelity.model_dump(include={"agreement", "kl", "error"})
        display.console.print(results_table(rows))
        display.say(f"student   {out}/ ({ONNX}, {WEIGHTS}, {PLAN})")
        display.say(f"plan      sbf plan show {out}")


def _index(settings: OneShot, runs: Path, display: Display) -> DataIndex:
    """The images, which may lie in one folder without classes."""
    root = settings.data.root
    if settings.data.source == "folder" and isinstance(root, Path) and root.is_dir():
        within = list(root.iterdir())
        if within and not any(path.is_dir() for path in within):
            return index_plain(root, progress=images_read(display))
    return index_images(settings.data, runs, settings.seed, display)


def _accuracies(
    settings: OneShot, index: DataIndex, networks: list[nn.Module], display: Display
) -> list[float]:
    """Top-1 of each network on the validation part; empty where labels do not fit the outputs."""
    ids = index.parts["validation"]
    probe = torch.zeros(1, 3, settings.data.image_size, settings.data.image_size)
    with torch.no_grad():
        outputs = in_eval_mode(networks[0])(probe)
    if not index.classes:
        display.say("  accuracy not measured: the images have no labels")
        return []
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        display.say("  accuracy not measured: the network is not a classifier")
        return []
    if outputs.shape[1] != len(index.classes):
        display.say(
            f"  accuracy not measured: the network has {outputs.shape[1]} outputs, the images have "
            f"{len(index.classes)} classes"
        )
        return []
    found = []
    for number, network in enumerate(networks, 1):
        display.show({"title": "accuracy", "step": number, "steps": len(networks)})
        found.append(accuracy(network, evaluation_loader(settings.data, index, ids), "cpu").top1)
    return found


def _fidelity(
    settings: OneShot,
    index: DataIndex,
    plan: Plan,
    images: Calibration,
    networks: tuple[nn.Module, nn.Module],
) -> MeasuredFidelity | None:
    """How near the student is to the dense network: on the validation part, else as the plan says.

    networks: the dense one and the student; images: of the calibration, in whose variance an error
    is told, as in the plan.
    """
    ids = index.parts["validation"]
    if not len(ids):
        return plan.fidelity
    dense, student = map(in_eval_mode, networks)
    yardstick = Yardstick.of(dense, calibration_for(dense, images), settings.compress)
    # Batches are decoded once: both networks see the one at hand.
    first, second = tee(evaluation_loader(settings.data, index, ids))
    wanted = (outputs for _, outputs in outputs_of(dense, first, "cpu"))
    found = (outputs for _, outputs in outputs_of(student, second, "cpu"))
    return Wanted(wanted, yardstick).compare(found).record()


def _why_not_compared(plan: Plan) -> str:
    """Say why a student is not compared with the dense network, without a validation part."""
    if plan.removed or any(isinstance(layer, SBFLayer) for layer in plan.layers.values()):
        return "no image could be held out of the calibration"
    return "the student is the dense network, nothing was changed"


def _rows(
    settings: OneShot, plan: Plan, networks: list[nn.Module], top1: list[float]
) -> list[dict[str, Any]]:
    """The dense network and the student as rows of the table of results."""
    times = latencies_if_quiet(
        [optimize(network) for network in networks],
        plan.input_shape,
        batch=settings.compress.latency_batch,
    )
    return [
        {
            "name": name,
            "top1": top1[number] if top1 else None,
            "macs": cost.macs,
            "params": cost.params,
            "latency_ms": times and times[number],
        }
        for number, (name, cost) in enumerate(
            zip(
                ("dense", "SBF, no training"),
                (count(network, plan.input_shape) for network in networks),
                strict=True,
            )
        )
    ]
