"""The stages of a run one after another: what is done already, and what is to be done anew."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from launchers import networks, rounds
from launchers.layout import RunFolder, write_json
from launchers.stages import STAGES, Run
from sbf_dist import tracking
from sbf_dist.errors import UserError
from sbf_dist.recipe import Recipe


def perform(run: Run, until: str) -> None:
    """Do the stages up to `until` that are not done yet."""
    wanted = list(STAGES)[: list(STAGES).index(until) + 1]
    for number, name in enumerate(wanted, 1):
        if run.folder.result(name).exists():
            run.display.say(f"[{number}/{len(wanted)}] {name}: done before", style="bold")
            continue
        with run.display.stage(number, len(wanted), name), run.parent.stage(name) as log:
            start = time.monotonic()
            result = STAGES[name](run, log)
            seconds = round(time.monotonic() - start, 2)
            log.log_metrics({"seconds": seconds}, 0)
        write_json(run.folder.result(name), {**result, "seconds": seconds, **tracking.origin()})


def forget(recipe: Recipe, folder: RunFolder, first: str) -> None:
    """Remove the results of the stage `first` and of those after it, so that they are done anew."""
    made: dict[str, list[Path]] = {
        "prepare": [folder.index],
        "teachers": [folder.weights(job.name) for job in networks.teacher_jobs(recipe)],
        "pseudo-labels": [folder.pseudo_labels],
        "compress": [
            folder.plan,
            *(folder.weights(n) for n in (networks.ONE_SHOT, networks.ZEROED)),
        ],
        "distill": [
            *(folder.weights(job.name) for job in networks.distill_jobs(recipe)),
            *rounds.files(recipe, folder),
        ],
        "evaluate": [],
        "export": [folder.student, folder.summary],
    }
    names = list(STAGES)
    for name in names[names.index(first) :]:
        # The result first: without it the stage is not done, whatever else is left of it.
        for path in (folder.result(name), folder.checkpoints / name, *made[name]):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def check_identity(recipe: Recipe, folder: RunFolder) -> None:
    """Refuse a folder that was made from another recipe; UserError names the first difference."""
    if not folder.recipe.exists():
        write_json(folder.recipe, recipe.identity())
        return
    before, now = json.loads(folder.recipe.read_text()), recipe.identity()
    difference = _first_difference(before, now)
    if difference is not None:
        key, old, new = difference
        raise UserError(
            f"run folder {folder.root} was made with {key} = {old!r}, the recipe says {new!r}; "
            f"give another name (name=…) or remove the folder"
        )


def _first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(name, old.get(name), new.get(name)) for name in sorted(old.keys() | new.keys())]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return None if old == new else (key, old, new)
    for name, a, b in pairs:
        found = _first_difference(a, b, f"{key}.{name}" if key else name)
        if found is not None:
            return found
    return None
