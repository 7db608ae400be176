"""The stages of a run: what each one does."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from launchers import networks, ray_train, rounds
from launchers.display import Display
from launchers.images import calibration_images, evaluation_images, index_images
from launchers.layout import RunFolder, write_json
from launchers.local_ray import local_ray
from launchers.student import VERIFIED_IMAGES
from launchers.student import export as export_student
from launchers.student import make as make_student
from launchers.worker import build_network, evaluate_networks, train_networks, write_pseudo_labels
from pipelines.index import DataIndex
from sbf_dist import models, tracking
from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.cost import count
from sbf_dist.compression.plan import DenseLayer, Plan
from sbf_dist.compression.planning.latency import latency
from sbf_dist.compression.removal.zeroed import zero_channels
from sbf_dist.distill import pseudo_labels
from sbf_dist.distill.selection import select
from sbf_dist.export.optimize import optimize
from sbf_dist.export.saved import ONNX
from sbf_dist.recipe import Recipe
from sbf_dist.report.chart import accuracy_and_cost

Result = dict[str, Any]


@dataclass
class Run:
    """A run at work: its recipe, its folder, and what its stages need from outside."""

    recipe: Recipe
    folder: RunFolder
    display: Display
    parent: tracking.Run
    resources: ExitStack
    _ray_runs: bool = field(default=False, init=False)

    def launch(
        self, worker: Callable[[Result], Result], stage: str, log_to: tracking.Run
    ) -> Result:
        """Run `worker` on all ranks, with Ray started when the first stage needs it."""
        workers = self.recipe.workers
        if not self._ray_runs:
            self.resources.enter_context(local_ray(workers.count, workers.cpus, workers.gpus))
            self._ray_runs = True
        config = {
            "recipe": self.recipe.model_dump(mode="json"),
            "runs": str(self.folder.runs),
            "stage": stage,
            "tracking": list(log_to.address),
        }
        return ray_train.run_workers(
            worker,
            config,
            name=stage,
            storage=self.folder.checkpoints,
            workers=workers.count,
            cpus_per_worker=workers.cpus,
            gpus_per_worker=workers.gpus,
            max_failures=workers.max_failures,
            on_progress=self.display.show,
        )


# --- the stages ----------------------------------------------------------------------------------


def prepare(run: Run, log: tracking.Run) -> Result:
    """Find and check the images, and divide them into parts."""
    index = index_images(run.recipe.data, run.folder.runs, run.recipe.seed, run.display)
    index.save(run.folder.index)
    counts = {part: len(ids) for part, ids in index.parts.items()}
    run.display.say(
        f"  {index.root}: {len(index.classes)} classes, "
        + ", ".join(f"{number} {part}" for part, number in counts.items())
        + (f", {len(index.skipped)} files skipped: {index.skipped[0]}" if index.skipped else "")
    )
    log.log_params({"data": {"root": str(index.root), "digest": index.digest, **counts}})
    if index.skipped:
        log.log_text("\n".join(index.skipped) + "\n", "skipped.txt")
    return {"digest": index.digest, "classes": len(index.classes), **counts}


def teachers(run: Run, log: tracking.Run) -> Result:
    """Train the teachers on the labels, and check the weights of those that are given."""
    classes = len(DataIndex.load(run.folder.index).classes)
    for teacher in run.recipe.teachers:
        if teacher.weights is not None:
            models.load_weights(models.build(teacher.model, classes), teacher.weights)
    jobs = networks.teacher_jobs(run.recipe)
    return _train(run, "teachers", log) if jobs else {}


def write_labels(run: Run, log: tracking.Run) -> Result:
    """Let the ensemble write its word on every training image."""
    result = run.launch(write_pseudo_labels, "pseudo-labels", log)
    index = DataIndex.load(run.folder.index)
    stored = pseudo_labels.load(
        run.folder.pseudo_labels, pseudo_labels.origin(run.recipe, index.digest)
    )
    confidence = stored.probabilities[:, 0]
    used = select(stored.classes[:, 0], confidence, run.recipe.pseudo_labels)
    result |= {"used": int(used.sum()), "mean_confidence": round(float(confidence.mean()), 4)}
    run.display.say(
        f"  {result['images']} images, {result['used']} used, "
        f"mean confidence {result['mean_confidence']:.3f}"
    )
    log.log_metrics(result, 0)
    return result


def compress_teacher(run: Run, log: tracking.Run) -> Result:
    """Plan and fit the SBF student; zero channels to the same budget for comparison."""
    teacher = networks.compressed_teacher(run.recipe)
    index = DataIndex.load(run.folder.index)
    dense = build_network(run.recipe, run.folder, teacher.name, start_from=teacher.name)
    images = _calibration(run, index)
    student, plan = make_student(
        run.recipe, dense, teacher.model, len(index.classes), images, run.display
    )
    reached = plan.macs_after / plan.macs_before
    convertible = [
        name
        for name, layer in plan.layers.items()
        if not isinstance(layer, DenseLayer) or layer.convertible
    ]
    zeroed, zeroed_macs, zeroed_params = zero_channels(
        dense, convertible, images.first(images.count), reached
    )
    models.save_weights(student, run.folder.weights(networks.ONE_SHOT))
    models.save_weights(zeroed, run.folder.weights(networks.ZEROED))
    plan.save(run.folder.plan)
    log.log_artifact(run.folder.plan)
    figures: dict[str, float] = {"macs": plan.macs_after, "params": plan.params_after}
    if plan.latency is not None:
        figures |= {
            "latency_ms": plan.latency.ms_after,
            "latency_ms_dense": plan.latency.ms_before,
        }
    log.log_metrics(figures, 0)
    return {
        "macs": plan.macs_after,
        "share": reached,
        "zeroed": {"macs": zeroed_macs, "params": zeroed_params},
    }


def distill(run: Run, log: tracking.Run) -> Result:
    """Train the student on labels and the teachers' word, after it has been shrunk in rounds."""
    recipe = run.recipe
    if recipe.compress.rounds > 1:
        teacher = networks.compressed_teacher(recipe)
        plan = rounds.shrink_in_rounds(
            recipe,
            run.folder,
            build_network(recipe, run.folder, teacher.name, start_from=teacher.name),
            _calibration(run, DataIndex.load(run.folder.index)),
            run.display,
            train=lambda stage: _train(run, stage, log),
        )
        log.log_artifact(plan)
    return _train(run, "distill", log)


def evaluate(run: Run, log: tracking.Run) -> Result:
    """Measure every network of the table: accuracy over the workers, cost and latency here."""
    scores = run.launch(evaluate_networks, "evaluate", log)
    compressed = json.loads(run.folder.result("compress").read_text())
    shape = (3, run.recipe.data.image_size, run.recipe.data.image_size)
    table = []
    for row in networks.rows(run.recipe):
        members = [
            build_network(run.recipe, run.folder, name, start_from=name) for name in row.members
        ]
        shapes = [_input_shape(run, name, shape) for name in row.members]
        costs = [count(member, own) for member, own in zip(members, shapes, strict=True)]
        macs, params = sum(c.macs for c in costs), sum(c.params for c in costs)
        if row.network == networks.ZEROED:
            macs, params = compressed["zeroed"]["macs"], compressed["zeroed"]["params"]
        times = [
            latency(optimize(member), own) for member, own in zip(members, shapes, strict=True)
        ]
        table.append(
            {
                "name": row.title,
                "network": row.network,
                **scores[row.network],
                "macs": macs,
                "params": params,
                "latency_ms": round(sum(times), 4),
            }
        )
        figures = {
            f"{row.network}/{key}": table[-1][key]
            for key in ("top1", "macs", "params", "latency_ms")
        }
        log.log_metrics(figures, 0)
        run.parent.log_metrics(figures, 0)  # so that runs can be compared in one list
    return {"rows": table, "threads": torch.get_num_threads()}


def export(run: Run, log: tracking.Run) -> Result:
    """Write the student as ONNX and as safetensors + plan, and store it in MLflow."""
    index = DataIndex.load(run.folder.index)
    path = networks.plan_of(run.recipe, run.folder, networks.STUDENT)
    assert path is not None
    plan = Plan.load(path)
    student = build_network(
        run.recipe, run.folder, networks.STUDENT, start_from=networks.STUDENT
    ).eval()
    rows = json.loads(run.folder.result("evaluate").read_text())["rows"]
    top1 = next(row["top1"] for row in rows if row["network"] == networks.STUDENT)
    images = evaluation_images(run.recipe.data, index, index.parts["validation"][:VERIFIED_IMAGES])
    difference = export_student(
        run.folder.student,
        student,
        plan,
        run.recipe,
        classes=index.classes,
        top1=top1,
        images=images,
    )
    uri = tracking.log_student(run.parent, run.folder.student / ONNX)
    log.log_artifact(run.folder.student, "student")
    log.log_metrics({"onnx_difference": difference}, 0)
    run.display.say(f"  ONNX Runtime agrees within {difference:.1e} on {len(images)} images")
    write_json(run.folder.summary, {"rows": rows})
    chart = accuracy_and_cost(rows)
    chart.savefig(run.folder.root / "summary.png", dpi=120)
    run.parent.log_figure(chart, "summary.png")
    run.parent.log_artifact(run.folder.summary)
    return {"model_uri": uri, "onnx_difference": difference}


STAGES: dict[str, Callable[[Run, tracking.Run], Result]] = {
    "prepare": prepare,
    "teachers": teachers,
    "pseudo-labels": write_labels,
    "compress": compress_teacher,
    "distill": distill,
    "evaluate": evaluate,
    "export": export,
}


def _train(run: Run, stage: str, log: tracking.Run) -> Result:
    trained = run.launch(train_networks, stage, log)
    for name, result in trained.items():
        resumed = f", resumed at step {result['from_step']}" if result["from_step"] else ""
        run.display.say(f"  {name}: top-1 {100 * result['top1']:.1f} %{resumed}")
    return {"trainings": trained}


def _input_shape(run: Run, network: str, student: tuple[int, int, int]) -> tuple[int, int, int]:
    for teacher in run.recipe.teachers:
        if teacher.name == network:
            size = networks.teacher_view(run.recipe, teacher).image_size
            return (3, size, size)
    return student


def _calibration(run: Run, index: DataIndex) -> Calibration:
    recipe = run.recipe
    return calibration_images(recipe.data, index, recipe.compress.images, recipe.seed)
