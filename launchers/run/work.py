"""What the stages of a run do."""

from functools import partial
from typing import Any

import torch
from torch import nn

from launchers.display import labels_table
from launchers.images import calibration_images, evaluation_images, index_images
from launchers.run import label_report, labelling, outcome, rounds, scoring, training
from launchers.run.building import build_member, build_network, plan_that_is_kept
from launchers.run.lengths import check_lengths
from launchers.run.network import Network
from launchers.run.networks import labels_of
from launchers.run.read_files import weights_digests
from launchers.run.session import Result, Session
from launchers.run.shares import numbers_of_workers
from launchers.student import NUM_VERIFIED_IMAGES, export_student, make_student
from pipelines.index import DataIndex
from sbf_dist import tracking
from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.cost import count
from sbf_dist.compression.named_outputs import run_on
from sbf_dist.compression.plan import DenseLayer, MeasuredFidelity, Plan
from sbf_dist.compression.planning.latency import latencies_if_quiet
from sbf_dist.compression.removal.zeroed import zero_channels
from sbf_dist.distill import pseudo_labels, stored_labels
from sbf_dist.distill.selection import check_choice, choose, unused_classes
from sbf_dist.distill.teacher_costs import TeacherCost
from sbf_dist.distill.teachers import TeacherEnsemble
from sbf_dist.distill.temperature import read_temperatures
from sbf_dist.errors import UserError
from sbf_dist.export.model_card import History, write_model_card
from sbf_dist.export.optimize import optimize
from sbf_dist.export.saved import load_card
from sbf_dist.export.student_files import MODEL_CARD, ONNX
from sbf_dist.files import write_json
from sbf_dist.heads import head_of
from sbf_dist.report.chart import accuracy_and_cost
from sbf_dist.surgery import in_eval_mode
from sbf_dist.train.freezing import frozen_names
from sbf_dist.weights import save_weights


def prepare(session: Session, log: tracking.Run) -> Result:
    """Find and check the images, and divide them into parts."""
    recipe, folder, display = session.recipe, session.folder, session.display
    index = index_images(recipe.data, folder.runs, recipe.seed, display)
    index.save(folder.index)
    counts = {part: len(ids) for part, ids in index.parts.items()}
    display.say(
        f"  {index.root}: {len(index.classes)} classes, "
        + ", ".join(f"{number} {part}" for part, number in counts.items())
        + (f", {len(index.skipped)} files skipped: {index.skipped[0]}" if index.skipped else "")
    )
    log.log_params({"data": {"root": str(index.root), "digest": index.digest, **counts}})
    if index.skipped:
        log.log_text("\n".join(index.skipped) + "\n", "skipped.txt")
    # The workers would refuse these, after other stages.
    numbers_of_workers(recipe, unlabelled=counts["unlabelled"] > 0)
    check_lengths(session.networks, counts)
    return {"digest": index.digest, "classes": len(index.classes), **counts}


def train_teachers(session: Session, log: tracking.Run) -> Result:
    """Train the teachers on the labels, and check what was given for them."""
    for teacher in session.networks.teachers:
        _check_teacher(session, teacher)
    return _train(session, "teachers", log) if session.networks.trained_in("teachers") else {}


def write_pseudo_labels(session: Session, log: tracking.Run) -> Result:
    """Write what the ensemble predicts on every image, and say what comes of it."""
    recipe, folder, display = session.recipe, session.folder, session.display
    top_k = recipe.pseudo_labels.top_k
    if top_k > session.num_classes:
        display.say(
            f"  pseudo_labels.top_k = {top_k} is above the number of classes: all "
            f"{session.num_classes} are stored"
        )
    reached = partial(labelling.written_chunks, folder)
    answer = session.launch(labelling.write_pseudo_labels, "pseudo-labels", log, reached=reached)
    index = DataIndex.load(folder.index)
    weights = weights_digests(session.networks.teachers)
    origin = pseudo_labels.origin(recipe, index.digest, weights)
    stored = stored_labels.load(folder.pseudo_labels, origin)
    unlabelled = index.parts["unlabelled"]
    chosen = choose(stored, unlabelled, recipe.pseudo_labels)
    report = label_report.write(folder, stored, index, chosen)
    display.console.print(labels_table(report))
    for path in label_report.files(folder):
        log.log_artifact(path)
    check_choice(stored, unlabelled, chosen, recipe.pseudo_labels)
    unused = unused_classes(stored, unlabelled, chosen, recipe.pseudo_labels, index.classes)
    if unused is not None:
        display.say(f"  warning: {unused}")
    rows = {row["part"]: row for row in report["parts"]}
    log.log_metrics(
        {
            f"{part}/{key}": row[key]
            for part, row in rows.items()
            for key in ("images", "confidence", "agreement", "accuracy", "ece")
            if row[key] is not None
        },
        0,
    )
    trained_on = rows.get("unlabelled", rows["labelled"])
    result = {
        "images": len(index.parts["labelled"]) + len(unlabelled),
        "used": len(chosen),
        "mean_confidence": round(trained_on["confidence"], 4),
        "teachers": answer["teachers"],
    }
    display.say(
        f"  {len(stored)} images, {len(chosen)} of {len(unlabelled)} without labels used, "
        f"mean confidence {result['mean_confidence']:.3f}"
    )
    fitted = read_temperatures(folder.temperatures)
    for name, one in fitted.items():
        session.display.say(f"  {name}: {one}")
    if fitted:
        result["temperatures"] = {name: one.temperature for name, one in fitted.items()}
    for name, cost in result["teachers"].items():
        session.display.say(f"  {name}: {TeacherCost(**cost)}")
    log.log_metrics({k: v for k, v in result.items() if k not in ("teachers", "temperatures")}, 0)
    log.log_metrics(
        {
            f"{name}/{key}": value
            for name, cost in result["teachers"].items()
            for key, value in cost.items()
            if value is not None
        },
        0,
    )
    return result


def compress_teacher(session: Session, log: tracking.Run) -> Result:
    """Plan and fit the SBF student; zero channels to the same budget for comparison."""
    recipe, networks = session.recipe, session.networks
    dense = build_network(networks.compressed, session.num_classes, networks.compressed.weights)
    images = _calibration(session)
    plan = plan_that_is_kept(networks, session.display)
    student = None
    if plan is None:
        student, plan = make_student(
            dense,
            images,
            recipe.compress,
            networks.compressed.architecture(session.num_classes),
            recipe.seed,
            session.display,
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
    if student is not None:
        outcome.check_finite(networks.one_shot.name, student)
        save_weights(student, networks.one_shot.weights)
        save_weights(zeroed, networks.zeroed.weights)
        plan.save(session.folder.plan)  # last: what says that both networks are there
    log.log_artifact(session.folder.plan)
    figures: dict[str, float] = {"macs": plan.macs_after, "params": plan.params_after}
    if plan.latency is not None:
        figures |= {
            "latency_ms": plan.latency.ms_after,
            "latency_ms_dense": plan.latency.ms_before,
        }
    if plan.fidelity is not None:
        found = {"agreement": plan.fidelity.agreement, "kl": plan.fidelity.kl}
        figures |= {key: value for key, value in found.items() if value is not None}
    log.log_metrics(figures, 0)
    return {
        "macs": plan.macs_after,
        "share": reached,
        "zeroed": {"macs": zeroed_macs, "params": zeroed_params},
    }


def distill(session: Session, log: tracking.Run) -> Result:
    """Train the student on labels and the ensemble's predictions.

    Before, it is shrunk in rounds; after, it becomes a teacher in rounds. If the recipe says so.
    """
    networks = session.networks
    if networks.rounds:
        rounds.shrink_in_rounds(
            networks,
            session.num_classes,
            _calibration(session),
            session.display,
            train=lambda network: _train_round(session, network, log),
        )
        log.log_artifact(networks.rounds[-1].plan)
    result = _train(session, "distill", log)
    for number, network in enumerate(networks.self_trained, 1):
        if not outcome.is_trained(network):
            session.display.say(f"  self-training, round {number} of {len(networks.self_trained)}")
            name = labels_of(network)
            reached = partial(labelling.written_chunks, networks.in_group(name).folder)
            session.launch(labelling.write_pseudo_labels, name, log, reached=reached)
            _train_round(session, network, log)
        result["trainings"][network.name] = outcome.read(network)
    return result


def evaluate(session: Session, log: tracking.Run) -> Result:
    """Measure every network of the table: accuracy over the workers, cost and latency here."""
    scores = session.launch(scoring.evaluate_networks, "evaluate", log)
    compressed = session.folder.read_result("compress")
    table: list[dict[str, Any]] = []
    rows = session.networks.rows()
    for row in rows:
        session.display.show({"title": "latency", "step": len(table), "steps": len(rows)})
        outcome.check_scores(row.name, scores[row.name])
        members = [build_network(n, session.num_classes, n.weights) for n in row.members]
        shapes = [network.input_shape for network in row.members]
        costs = [count(member, own) for member, own in zip(members, shapes, strict=True)]
        views = [network.asked.views for network in row.members]
        macs = sum(n * c.macs for n, c in zip(views, costs, strict=True))
        params = sum(c.params for c in costs)
        if row.members == (session.networks.zeroed,):
            macs, params = compressed["zeroed"]["macs"], compressed["zeroed"]["params"]
        times = [
            latencies_if_quiet([optimize(member)], own)
            for member, own in zip(members, shapes, strict=True)
        ]
        table.append(
            {
                "name": row.title,
                "network": row.name,
                **scores[row.name],
                "macs": macs,
                "params": params,
                "latency_ms": None
                if None in times
                else round(sum(n * t[0] for n, t in zip(views, times, strict=True) if t), 4),
            }
        )
        figures = {
            f"{row.name}/{key}": table[-1][key]
            for key in ("top1", "agreement", "kl", "macs", "params", "latency_ms")
            # Of a machine that was too busy, or a network that is compared with none.
            if table[-1][key] is not None
        }
        log.log_metrics(figures, 0)
        # So that runs can be compared in one list.
        session.tracker.log_metrics(figures, session.tracker.attempt("evaluate"))
    return {"rows": table, "threads": torch.get_num_threads()}


def export(session: Session, log: tracking.Run) -> Result:
    """Write the student as ONNX and as safetensors + plan, and store it in MLflow."""
    folder, student = session.folder, session.networks.exported
    index = DataIndex.load(folder.index)
    assert student.plan is not None
    rows: list[dict[str, Any]] = folder.read_result("evaluate")["rows"]
    images = evaluation_images(
        session.recipe.data, index, index.parts["validation"][:NUM_VERIFIED_IMAGES]
    )
    scores = next(row for row in rows if row["network"] == student.name)
    session.display.wait("ONNX")
    difference = export_student(
        folder.student,
        in_eval_mode(build_network(student, session.num_classes, student.weights)),
        Plan.load(student.plan),
        session.recipe.data,
        classes=index.classes,
        top1=scores["top1"],
        fidelity=_fidelity(scores),
        images=images,
    )
    write_model_card(
        folder.student,
        load_card(folder.student),
        Plan.load(student.plan),
        History(session.recipe, {part: len(ids) for part, ids in index.parts.items()}, rows),
    )
    registered = session.recipe.tracking.registered_model
    session.tracker.log_student(folder.student / ONNX, registered_name=registered)
    log.log_artifact(folder.student, "student")
    log.log_metrics({"onnx_difference": difference}, 0)
    session.display.say(f"  ONNX Runtime agrees within {difference:.1e} on {len(images)} images")
    write_json(folder.summary, {"rows": rows})
    chart = accuracy_and_cost(rows)
    chart.savefig(folder.root / "summary.png", dpi=120)
    session.tracker.log_artifact(folder.root / "summary.png")
    session.tracker.log_artifact(folder.summary)
    session.tracker.log_artifact(folder.student / MODEL_CARD)  # with the table, which MLflow shows
    session.display.wait("report")
    from launchers.run import reporting  # takes a second

    reporting.write_page({folder.place: folder}, folder.page, reporting.Request(own_code=True))
    session.tracker.log_artifact(folder.page)
    return {"onnx_difference": difference}


def _check_teacher(session: Session, teacher: Network) -> None:
    """Say what a teacher begins with. UserError for weights or classes that do not fit."""
    say = partial(_say_of, session, teacher)
    settings = None if teacher.job is None else teacher.job.training
    if teacher.published is not None:
        model = build_network(teacher, session.num_classes, teacher.published, say)
        outcome.check_finite(teacher.name, model, teacher.published)
    else:
        model = build_network(teacher, session.num_classes, None)
    if settings is None:
        _check_answers(session, teacher)
        return
    _check_outputs(session, teacher, model)
    share = settings.optimizer.body_lr_share
    if share < 1:
        rate = settings.optimizer.lr
        random = "; it starts from random weights: body_lr_share = 1 would suit it better"
        say(
            f"learning rate {rate:g} for the head, {', '.join(head_of(model))}, and "
            f"{rate * share:g} for all else{'' if teacher.published is not None else random}"
        )
    if settings.freeze:
        frozen = frozen_names(model, settings.freeze)
        say(f"{len(frozen)} of {len(list(model.parameters()))} parameters are frozen")


def _check_answers(session: Session, teacher: Network) -> None:
    """Ask a teacher that is taken as it is about an image. UserError for other classes, or NaN."""
    classes = DataIndex.load(session.folder.index).classes
    ensemble = TeacherEnsemble([build_member(teacher, classes)], num_classes=len(classes))
    ensemble(torch.zeros(1, *teacher.input_shape), teacher.view)
    ensemble.check()


@torch.no_grad()
def _check_outputs(session: Session, teacher: Network, model: nn.Module) -> None:
    """UserError for other outputs than classes before a training, which would not miss them."""
    answers = run_on(in_eval_mode(model), torch.zeros(1, *teacher.input_shape))
    found = answers.shape[1:] if isinstance(answers, torch.Tensor) else None
    if found == (session.num_classes,):
        return
    given = type(answers).__name__ if found is None else " x ".join(map(str, found)) + " outputs"
    raise UserError(
        f"teacher {teacher.name}: its model gives {given} for an image; must be "
        f"{session.num_classes} outputs, the classes of the images"
    )


def _say_of(session: Session, network: Network, line: str) -> None:
    session.display.say(f"  {network.name}: {line}")


def _fidelity(scores: dict[str, Any]) -> MeasuredFidelity | None:
    """Return a row's agreement with the dense network, which an older version did not measure."""
    if scores.get("agreement") is None:
        return None
    return MeasuredFidelity(
        images=scores["count"],
        agreement=round(scores["agreement"], 6),
        kl=round(scores["kl"], 6),
    )


def _train(session: Session, group: str, log: tracking.Run) -> Result:
    trained = session.launch(training.train_networks, group, log)
    for name, result in trained.items():
        resumed = f", resumed at step {result['from_step']}" if result["from_step"] else ""
        taught = (
            f", {result['targets']} teachers: {result['because']}" if "targets" in result else ""
        )
        session.display.say(f"  {name}: top-1 {100 * result['top1']:.1f} %{resumed}{taught}")
    networks = session.networks.trained_in(group)
    return {"trainings": {network.name: outcome.read(network) for network in networks}}


def _train_round(session: Session, network: Network, log: tracking.Run) -> None:
    assert network.job is not None
    _train(session, network.job.group, log)


def _calibration(session: Session) -> Calibration:
    recipe = session.recipe
    index = DataIndex.load(session.folder.index)
    return calibration_images(recipe.data, index, recipe.compress.images, recipe.seed)
