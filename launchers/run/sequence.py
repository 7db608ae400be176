"""The stages of a run in order: which are finished, and which must be repeated."""

import time
from typing import TYPE_CHECKING

from launchers.run import locks
from launchers.run.folder import RunFolder
from launchers.run.read_files import file_digests
from launchers.run.stages import STAGES, Stage
from sbf_dist.errors import UserError
from sbf_dist.files import read_json, write_json
from sbf_dist.provenance import origin
from sbf_dist.tracking import begin_anew

if TYPE_CHECKING:
    from launchers.run.networks import Networks
    from launchers.run.session import Session

NAMES = [stage.name for stage in STAGES]


def perform(session: "Session", until: str) -> None:
    """Run the stages up to `until` that are not finished.

    UserError where a file that the recipe names is another one than when the run was opened.
    """
    wanted = STAGES[: NAMES.index(until) + 1]
    files = file_digests(session.recipe)
    values = locks.values_of(session.recipe.identity()) | files
    for number, stage in enumerate(wanted, 1):
        result_file = session.folder.result(stage.name)
        if result_file.exists():
            session.display.say(
                f"[{number}/{len(wanted)}] {stage.name}: already done", style="bold"
            )
            continue
        with (
            session.display.stage(number, len(wanted), stage.name),
            session.tracker.stage(stage.name) as log,
        ):
            start = time.monotonic()
            result = stage.work(session, log)
            seconds = round(time.monotonic() - start, 2)
            log.log_metrics({"seconds": seconds}, 0)
        for key, digest in file_digests(session.recipe).items():
            if digest != files.get(key):
                raise UserError(
                    f"{locks.file_of(key)}: the file changed during the run; run the same "
                    "command again to see what must be repeated"
                )
        reads = [key for product in stage.products(session.networks) for key in product.reads]
        read = locks.read_by(values, reads)
        write_json(result_file, {**result, "read": read, "seconds": seconds, **origin()})
        if bind(session.networks):
            session.tracker.log_artifact(session.folder.recipe)
        session.folder.publish()


def begins_on_workers(networks: "Networks", until: str) -> bool:
    """Whether, once the images are prepared, workers are the first to be needed."""
    for stage in STAGES[1 : NAMES.index(until) + 1]:
        if networks.folder.result(stage.name).exists():
            continue
        if stage.on_workers(networks):
            return True
        if not stage.is_short:
            return False
    return False


def bind(networks: "Networks") -> bool:
    """Let the folder be that of this recipe from now on, once its images are known to be right.

    Whether that was new.
    """
    folder, identity = networks.folder, networks.recipe.identity()
    if not folder.result(NAMES[0]).exists():
        return False
    files = file_digests(networks.recipe)
    if files != folder.read_digests():
        write_json(folder.read_files, files)
    if folder.recipe.exists() and folder.read_recipe() == identity:
        return False
    write_json(folder.recipe, identity)
    return True


def open_folder(networks: "Networks", again: str | None) -> list[str]:
    """Make a run's folder fit its recipe: the results that must be repeated are removed.

    That is what a change of the recipe concerns, from the stage `again` on, and what depends on
    it. Where no change concerns that stage, it and all after it are done anew. A training that
    shall only be longer goes on from its last checkpoint; without `again`, if it was not finished.
    One that was not finished does so, too, where its steps shall take other passes.
    UserError where a change concerns an earlier stage, or a finished one without `again`; it names
    the first change. Returns lines on what goes on, and on results that are damaged.
    """
    folder = networks.folder
    _check_kind(folder)
    damaged = _set_damaged_aside(folder)
    products = [(stage, product) for stage in STAGES for product in stage.products(networks)]
    changes = _changes(networks, products)
    changed = [p for _, p in products if p.resumable and p.name in changes]
    # What is in the middle of its training has nothing yet that depends on its end.
    unfinished = {
        product.name
        for product in changed
        if all(change.is_longer or change.is_of_passes for change in changes[product.name])
        and not any(path.exists() for path in product.files)
    }
    longer = unfinished | {
        product.name
        for product in changed
        if all(change.is_longer for change in changes[product.name])
    }
    stale = locks.with_dependants(changes.keys() - unfinished, [product for _, product in products])
    # What it starts from is another one then.
    longer -= {product.name for _, product in products if stale & set(product.needs)}
    stages_begun = {s.name for s, p in products if p.name in stale and _is_begun(folder, s, p)}
    begun = [name for name in NAMES if name in stages_begun]
    going_on = [p.name for s, p in products if p.name in longer and _is_begun(folder, s, p)]
    if begun:
        first = next(name for name in changes if name not in unfinished)
        _check_permission(folder, begun, changes[first], again)
    if again is not None:
        allowed = NAMES.index(again)
        if not any(product.name in stale for stage, product in products if stage.name == again):
            stale |= {p.name for s, p in products if NAMES.index(s.name) >= allowed}
            longer, going_on = longer - stale, []
        anew = {s.name: [p for t, p in products if t is s and p.name in stale] for s in STAGES}
        begin_anew(folder.tracking, [name for name, own in anew.items() if own])
        folder.publish()
        # From the last stage back: what is cut in the middle has no stage whose basis is gone.
        for stage in reversed(STAGES):
            if anew[stage.name]:
                trainings = {p.name for s, p in products if s is stage and p.resumable}
                kept = trainings - (stale - longer)
                _remove_results(folder, stage, anew[stage.name], kept)
    bind(networks)
    folder.publish()
    return damaged + [change.going_on() for name in going_on for change in changes[name]]


Products = list[tuple[Stage, locks.Product]]


def _check_kind(folder: RunFolder) -> None:
    """UserError where the folder is that of a comparison, whose recipe has another form."""
    if folder.recipe.exists() and "recovery" in folder.read_recipe():
        raise UserError(
            f"run folder {folder.root}: holds a comparison (sbf compare); give another name "
            "(name=…)"
        )


def _set_damaged_aside(folder: RunFolder) -> list[str]:
    """Let results of stages that cannot be read count as not there; return a line on each.

    Their stages make them anew of what they have left: networks are not trained again.
    """
    lines = []
    for name in NAMES:
        path = folder.result(name)
        if not path.exists():
            continue
        try:
            read_json(path)
        except UserError as error:
            aside = path.with_name(f"{path.name}.damaged")
            aside.write_bytes(path.read_bytes())
            folder.remove(path)
            lines.append(f"warning: {error}; renamed to {aside.name}, {name} makes it anew")
    return lines


def _changes(networks: "Networks", products: Products) -> dict[str, list[locks.Change]]:
    """Return the changes since products were made, by their names."""
    folder = networks.folder
    now = locks.values_of(networks.recipe.identity()) | file_digests(networks.recipe)
    found = {
        product.name: locks.changes(_recorded(folder, stage), now, product)
        for stage, product in products
        if folder.recipe.exists() or folder.result(stage.name).exists()
    }
    return {name: changes for name, changes in found.items() if changes}


def _check_permission(
    folder: RunFolder, begun: list[str], changes: list[locks.Change], again: str | None
) -> None:
    """UserError unless all stages that are begun and no longer fit the recipe may be done anew."""
    if again is not None and NAMES.index(again) <= NAMES.index(begun[0]):
        return
    following = f" (which repeats {', '.join(begun)})" if len(begun) > 1 else ""
    word = "done" if folder.result(begun[0]).exists() else "begun"
    longer = ", which resumes from its end," if all(c.is_longer for c in changes) else ""
    raise UserError(
        f"run folder {folder.root}: {begun[0]} was {word} {changes[0]}; give --again {begun[0]}"
        f"{following}{longer} or another name (name=…)"
    )


def _recorded(folder: RunFolder, stage: Stage) -> locks.Values:
    """Return the recipe's values that a stage was done with.

    A stage that is not done has those of the folder's recipe, as has one that was done by a
    version that did not note what it read.
    """
    values = folder.read_digests()
    if folder.recipe.exists():
        values |= locks.values_of(folder.read_recipe())
    result = folder.result(stage.name)
    if result.exists():
        values |= folder.read_result(stage.name).get("read", {})
    return values


def _is_begun(folder: RunFolder, stage: Stage, product: locks.Product) -> bool:
    """Whether there is something of a product that another recipe must not go on with."""
    if folder.result(stage.name).exists() or any(path.exists() for path in product.files):
        return True
    return folder.has_checkpoints(stage.name)


def _remove_results(
    folder: RunFolder, stage: Stage, products: list[locks.Product], kept: set[str]
) -> None:
    """Remove what there is of products of a stage.

    Checkpoints of trainings of the stage that are `kept` stay: what is not concerned, or only
    longer, goes on from them.
    """
    # The result first: without it the stage is not done, whatever else is left of it.
    folder.remove(folder.result(stage.name))
    if not kept:
        folder.remove(folder.checkpoints / stage.name)
    for product in products:
        if kept and product.name not in kept:
            folder.remove_checkpoints(stage.name, product.name)
        decided = () if product.name in kept else product.decided
        for path in (*product.files, *decided):
            folder.remove(path)
