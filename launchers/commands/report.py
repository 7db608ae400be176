"""`sbf report`: a page on a run, or on several side by side."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from launchers.storage.looking import looked_at
from sbf_dist.errors import UserError
from sbf_dist.object_storage import is_address

_PAGE = "report.html"


def command(
    places: Annotated[
        list[str],
        typer.Argument(metavar="RUN…", help="The folder of a run, RUNS/NAME, or its address."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Output file. Default: report.html in the run's folder; for several runs, or a "
            "run in an object store, in the working directory."
        ),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option("--layer", help="A layer to show in detail; may be given several times."),
    ] = None,
    images: Annotated[
        int,
        typer.Option(
            min=1, help="Maximum number of validation images to classify, drawn at random."
        ),
    ] = 1000,
) -> None:
    """Write an HTML report on a run: results, costs, layers, training, pseudo-labels, errors.

    It works offline. Parts for which a run has no data yet are listed as missing.
    Several runs are shown side by side.
    """
    one_here = len(places) == 1 and not is_address(places[0])
    for place in places:
        if not is_address(place) and not Path(place).is_dir():
            wrong = "is a file" if Path(place).exists() else "does not exist"
            raise UserError(f"run {place}: {wrong}; give the folder of a run, RUNS/NAME")
    page = out or (Path(places[0]) / _PAGE if one_here else Path(_PAGE))
    if page.is_dir() or not page.absolute().parent.is_dir():
        raise UserError(f"--out {page}: must be a file in a folder that exists")
    with ExitStack() as resources:
        looked = {
            place: resources.enter_context(
                looked_at(place, lambda key: "checkpoints/" not in f"{key}/")
            ).path.absolute()
            for place in dict.fromkeys(places)
        }
        # These take seconds to import: not before the command line is known to be right.
        import torch

        from launchers.machine import available_cpus
        from launchers.run.folder import RunFolder
        from launchers.run.reporting import Request, write_page

        torch.set_num_threads(available_cpus())
        folders = {place: RunFolder(path.parent, path.name) for place, path in looked.items()}
        write_page(folders, page, Request(layers=layers or (), images=images))
    print(f"report  {page}")
