"""The stages of a run in order: which are finished, and which must be repeated."""

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launchers.run import locks
from launchers.run.folder import RunFolder
from launchers.run.stages import STAGES, Stage
from sbf_dist.errors import UserError
from sbf_dist.files import write_json
from sbf_dist.provenance import origin
from sbf_dist.tracking import begin_anew

if TYPE_CHECKING:
    from launchers.run.networks import Networks
    from launchers.run.session import Session

NAMES = [stage.name for stage in STAGES]


def perform(session: "Session", until: str) -> None:
    """Run the stages up to `until` that are not finished."""
    wanted = STAGES[: NAMES.index(until) + 1]
    values = locks.values_of(session.recipe.identity())
    for number, stage in enumerate(wanted, 1):
        result_file = session.folder.result(stage.name)
        if result_file.exists():
            session.display.say(f"[{number}/{len(wanted)}] {stage.name}: done before", style="bold")
            continue
        with (
            session.display.stage(number, len(wanted), stage.name),
            session.tracker.stage(stage.name) as log,
        ):
            start = time.monotonic()
            result = stage.work(session, log)
            seconds = round(time.monotonic() - start, 2)
            log.log_metrics({"seconds": seconds}, 0)
        reads = [key for product in stage.products(session.networks) for key in product.reads]
        read = locks.read_by(values, reads)
        write_json(result_file, {**result, "read": read, "seconds": seconds, **origin()})


def open_folder(networks: "Networks", again: str | None) -> None:
    """Make a run's folder fit its recipe: the results that must be repeated are removed.

    That is what a change of the recipe concerns, from the stage `again` on, and what depends on
    it. Where no change concerns that stage, it and all after it are done anew. UserError where a
    change concerns an earlier stage, or any at all without `again`; it names the first change.
    """
    folder = networks.folder
    identity = networks.recipe.identity()
    products = [(stage, product) for stage in STAGES for product in stage.products(networks)]
    stale: set[str] = set()
    if folder.recipe.exists():
        now = locks.values_of(identity)
        changes = {}
        for stage, product in products:
            found = locks.change(_recorded(folder, stage), now, product)
            if found is not None:
                changes[product.name] = found
        stale = locks.with_dependants(changes, [product for _, product in products])
        begun = {s.name for s, p in products if p.name in stale and _is_begun(folder, s, networks)}
        if begun:
            _check_permission(folder, [s for s in NAMES if s in begun], changes, again)
    if again is not None:
        allowed = NAMES.index(again)
        if not any(product.name in stale for stage, product in products if stage.name == again):
            stale |= {p.name for s, p in products if NAMES.index(s.name) >= allowed}
        anew = {s.name: [p for t, p in products if t is s and p.name in stale] for s in STAGES}
        begin_anew(folder.tracking, [name for name, own in anew.items() if own])
        # From the last stage back: what is cut in the middle has no stage whose basis is gone.
        for stage in reversed(STAGES):
            if anew[stage.name]:
                _remove_results(folder, stage, anew[stage.name])
    if not folder.recipe.exists() or json.loads(folder.recipe.read_text()) != identity:
        write_json(folder.recipe, identity)


def _check_permission(
    folder: RunFolder, begun: list[str], changes: dict[str, locks.Change], again: str | None
) -> None:
    """UserError unless all stages that are begun and no longer fit the recipe may be done anew."""
    if again is not None and NAMES.index(again) <= NAMES.index(begun[0]):
        return
    first = next(iter(changes.values()))
    following = f" (which repeats {', '.join(begun)})" if len(begun) > 1 else ""
    raise UserError(
        f"run folder {folder.root}: {begun[0]} was done {first}; give --again {begun[0]}"
        f"{following} or another name (name=…)"
    )


def _recorded(folder: RunFolder, stage: Stage) -> locks.Values:
    """Return the recipe's values that a stage was done with.

    A stage that is not done has those of the folder's recipe, as has one that was done by a
    version that did not note what it read.
    """
    values = locks.values_of(json.loads(folder.recipe.read_text()))
    result = folder.result(stage.name)
    if result.exists():
        values |= json.loads(result.read_text()).get("read", {})
    return values


def _is_begun(folder: RunFolder, stage: Stage, networks: "Networks") -> bool:
    files = [path for product in stage.products(networks) for path in product.files]
    places = (folder.result(stage.name), folder.checkpoints / stage.name, *files)
    return any(path.exists() for path in places)


def _remove_results(folder: RunFolder, stage: Stage, products: list[locks.Product]) -> None:
    # The result first: without it the stage is not done, whatever else is left of it.
    _remove(folder.result(stage.name))
    _remove(folder.checkpoints / stage.name)
    for product in products:
        for path in product.files:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
