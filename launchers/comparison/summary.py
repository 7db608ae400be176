"""SBF and its peers side by side: the same dense network, the same cost, the same training."""

from pathlib import Path

from launchers.comparison.statistics import summarise
from launchers.comparison.trials import Result, SeedContext, Trial, trials
from launchers.display import Display
from launchers.images import index_images
from launchers.places import locked
from sbf_dist import models
from sbf_dist.compare_recipe import Comparison
from sbf_dist.compression.inputs import check_takes_images_alone
from sbf_dist.errors import UserError
from sbf_dist.files import read_json, write_json
from sbf_dist.provenance import origin
from sbf_dist.report.chart import accuracy_over_macs


def compare(recipe: Comparison, runs: Path, display: Display) -> Result:
    """Run the missing trials of a comparison, and write its table and its chart.

    RUNS/NAME keeps every network's result as soon as it is there: a comparison that was cut goes
    on, and one to which methods, shares or seeds are added does the new ones alone. It runs in
    this process, on a CUDA device if there is one. Returns what it writes as comparison.json.
    UserError for a folder that was done with other settings, and for images that are not there.
    """
    folder = runs / recipe.name
    # What cannot be compared is refused before anything is written.
    model = models.build(recipe.model, 2, recipe.arguments)
    check_takes_images_alone(model, f"model = {recipe.model!r}")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "compare"):
        return _compare(recipe, runs, folder, display)


def _compare(recipe: Comparison, runs: Path, folder: Path, display: Display) -> Result:
    _check_identity(recipe, folder)
    todo = trials(recipe)
    missing = [trial for trial in todo if _kept(folder, trial, display) is None]
    if missing:
        # The seeds of a comparison share their images.
        index = index_images(recipe.data, runs, 0, display)
        if len(index.classes) < 2:
            raise UserError(f"data {index.root}: has one class only; a classifier needs two")
        for seed in recipe.seeds:
            mine = [trial for trial in missing if trial.seed == seed]
            if mine:
                context = SeedContext.of(recipe, index, folder, seed, display)
                for trial in mine:
                    write_json(_path(folder, trial), context.result(trial))
                    done = sum(_path(folder, other).exists() for other in todo)
                    display.say(f"  {done} of {len(todo)}: {_outcome(folder, trial)}")
    results = [read_json(_path(folder, trial)) for trial in todo]
    rows = summarise(results)
    report = {"model": recipe.model, "seeds": recipe.seeds, "rows": rows, **origin()}
    write_json(folder / "comparison.json", report)
    accuracy_over_macs(rows).savefig(folder / "comparison.png", dpi=120)
    return report


def _path(folder: Path, trial: Trial) -> Path:
    return folder / "results" / f"seed-{trial.seed}" / f"{trial.name}.json"


def _kept(folder: Path, trial: Trial, display: Display) -> Result | None:
    """Return the result of a trial that is done; one that is damaged counts as not there."""
    path = _path(folder, trial)
    if not path.exists():
        return None
    try:
        return read_json(path)
    except UserError as error:
        display.say(f"warning: {error}; the trial is done anew")
        return None


def _outcome(folder: Path, trial: Trial) -> str:
    result = read_json(_path(folder, trial))
    name = f"{trial.name}, seed {trial.seed}: "
    if result["refused"]:
        return name + result["refused"]
    figures = ", ".join(f"{100 * v:.1f} % after {k} steps" for k, v in result["top1"].items())
    return f"{name}{result['reached']:.3f} of the MACs, {figures}"


def _check_identity(recipe: Comparison, folder: Path) -> None:
    """Refuse a folder that was done with settings on which the results there depend."""
    growing = dict.fromkeys(("seeds", "methods", "macs"), True)  # entries may be added and left out
    elsewhere = {"data": {"cache_dir", "cache_gb"}}
    now = recipe.model_dump(mode="json", exclude={**growing, **elsewhere})
    path = folder / "recipe.json"
    if not path.exists():
        write_json(path, now)
        return
    before = read_json(path, "give another name (name=…) or remove the folder")
    if "distill" in before:
        raise UserError(
            f"comparison folder {folder}: holds a run (sbf run); give another name (name=…)"
        )
    for key, value in now.items():
        if before.get(key) != value:
            raise UserError(
                f"comparison folder {folder} was written with {key} = {before.get(key)!r}, the "
                f"recipe says {value!r}; give another name (name=…) or remove the folder"
            )
