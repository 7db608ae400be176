"""`sbf checkpoint`: what checkpoints of trainings hold, whether they are whole, their weights."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launchers.storage.looking import Looked, looked_at
from sbf_dist.errors import UserError

if TYPE_CHECKING:
    from sbf_dist.train.checkpoint import Written
    from sbf_dist.train.manifest import Manifest

app = typer.Typer(
    help="Show, verify and consolidate checkpoints.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_MANIFEST = "manifest.json"
_SHARDS = "deepspeed"
_BESIDE = ("ranks", _SHARDS)  # pseudo-labels and prepared sets have a manifest.json, too
_NAMED = 4  # checkpoints in an error
_NETWORK = "student."  # what the task of a training calls its network

Place = Annotated[
    str,
    typer.Argument(
        metavar="PATH", help="A checkpoint, or a folder of checkpoints: a path or an address."
    ),
]


class Weights(StrEnum):
    """Which weights of a checkpoint."""

    AVERAGE = "average"
    LAST = "last"


@app.command(short_help="Print the contents of checkpoints.")
def show(place: Place) -> None:
    """Print step, workers, ZeRO stage, digests, MLflow run and size of each checkpoint."""
    from sbf_dist.train import checkpoint
    from sbf_dist.train.manifest import read_manifest

    with looked_at(place, lambda key: f"/{_SHARDS}/" not in f"/{key}") as looked:
        for folder in _found(looked.path):
            manifest = read_manifest(folder)
            rows = _rows(manifest, checkpoint.written(folder)) | {
                "position": ", ".join(_position(checkpoint.loader_state(folder))) or "none",
            }
            print(looked.named(folder))
            for name, value in rows.items():
                print(f"  {name:<10} {value}")


@app.command(short_help="Verify checkpoints against their manifests.")
def verify(place: Place) -> None:
    """Compare size and SHA-256 of all files with the manifest.

    Exit code 2 if a file is missing, damaged, or not listed in the manifest.
    """
    from sbf_dist.train import checkpoint

    damaged = []
    with looked_at(place) as looked:
        for folder in _found(looked.path):
            try:
                manifest = checkpoint.verify(folder)
            except UserError as error:
                damaged.append(folder)
                print(looked.named(error))
            else:
                print(f"checkpoint {looked.named(folder)}: whole, step {manifest.step}")
    if damaged:
        raise UserError(f"{len(damaged)} of the checkpoints in {place} cannot be resumed from")


@app.command(short_help="Write the weights of a checkpoint as one safetensors file.")
def consolidate(
    place: Annotated[
        str, typer.Argument(metavar="PATH", help="A checkpoint: a path or an address.")
    ],
    out: Annotated[Path, typer.Option(help="The safetensors file to write; it must not exist.")],
    weights: Annotated[
        Weights | None,
        typer.Option(
            help="The moving average of the weights, or the last ones; by default the average, "
            "if there is one."
        ),
    ] = None,
) -> None:
    """Merge the shards of a checkpoint of any ZeRO stage and number of workers.

    The file has the network's own parameter names. Use it as `weights` of a teacher, or with
    `sbf compress --weights`.
    """
    with looked_at(place) as looked:
        _consolidate(looked, out, weights)


def _consolidate(looked: Looked, out: Path, weights: Weights | None) -> None:
    folders = _found(looked.path)
    if len(folders) > 1:
        raise UserError(
            f"folder {looked.given} has {len(folders)} checkpoints, give one of them: "
            + ", ".join(str(folder.relative_to(looked.path)) for folder in folders[-_NAMED:])
            + (", …" if len(folders) > _NAMED else "")
        )
    if out.exists():
        raise UserError(f"file {out} exists; give another --out, or remove it")
    from safetensors import SafetensorError

    from sbf_dist.train import checkpoint
    from sbf_dist.train.manifest import read_manifest
    from sbf_dist.weights import save_state

    whole = checkpoint.read_whole(folders[0])
    average = whole.ema
    if weights is Weights.AVERAGE and not average:
        raise UserError(
            f"checkpoint {folders[0]}: has no average of the weights (training.ema); "
            "give --weights last"
        )
    averaged = bool(average) and weights is not Weights.LAST
    state = average if averaged else whole.weights
    try:
        # What the loss alone needs (projections of features) has other names.
        own = {n.removeprefix(_NETWORK): v for n, v in state.items() if n.startswith(_NETWORK)}
        save_state(own or state, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"file {out} cannot be written: {error}") from None
    kind = "moving average of the weights" if averaged else "weights"
    print(f"{out}: the {kind} of step {read_manifest(folders[0]).step}")


def _found(place: Path) -> list[Path]:
    """The checkpoint in `place`, or those below, in the order of their paths."""
    if not place.exists():
        raise UserError(f"folder {place} does not exist")
    if not place.is_dir():
        raise UserError(f"{place} is a file: give a checkpoint's folder")
    if (place / _MANIFEST).is_file():
        return [place]
    # Hidden are those that a kill has left unfinished: nothing resumes from them.
    manifests = sorted(
        path
        for path in place.rglob(_MANIFEST)
        if not any(part.startswith(".") for part in path.relative_to(place).parts)
    )
    found = [m.parent for m in manifests if any((m.parent / name).is_dir() for name in _BESIDE)]
    if not found:
        raise UserError(
            f"folder {place} is not a checkpoint and contains none: there is no {_MANIFEST}"
        )
    return found


def _rows(manifest: "Manifest", written: "Written | None") -> dict[str, str]:
    size = sum(entry.size for entry in manifest.files.values())
    engine = "" if written is None else f", {written.optimizer} at ZeRO stage {written.zero_stage}"
    return {
        "step": str(manifest.step),
        "workers": f"{manifest.world_size}{engine}",
        **manifest.digests,
        **({} if manifest.top1 is None else {"top-1": f"{100 * manifest.top1:.2f} %"}),
        **({} if manifest.mlflow_run is None else {"MLflow run": manifest.mlflow_run}),
        "files": f"{len(manifest.files)}, {size / 1e6:,.1f} MB",
    }


def _position(state: object, before: str = "") -> list[str]:
    """The numbers of a loader's state, of several loaders one after the other."""
    if isinstance(state, dict):
        return [part for key, value in state.items() for part in _position(value, str(key))]
    if isinstance(state, list) and state and isinstance(state[0], dict):
        return [part for value in state for part in _position(value)]
    return [f"{before} {state}"] if isinstance(state, int) else []
