"""`sbf doctor`: whether this machine has what a run needs."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

BROKEN = 1  # exit code
_MARKS = {"ok": "ok", "note": "note", "broken": "BROKEN"}


def command(
    runs: Annotated[Path, typer.Option(help="Folder that holds all runs.")] = Path("runs"),
    uri: Annotated[
        str | None,
        typer.Option(
            "--tracking-uri",
            help="MLflow tracking URI, as tracking.uri in a recipe. Default: "
            "MLFLOW_TRACKING_URI, or the database in RUNS.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check packages, kernels, GPUs, Ray, MLflow and disk, and print a remedy for each problem.

    Exit code 1 if something that every run needs is broken.
    """
    from launchers.doctor import examine
    from sbf_dist.tracking import tracking_address

    address = tracking_address(runs, uri)

    findings = []
    for finding in examine(runs, address):
        findings.append(finding)
        if not as_json:
            print(f"{_MARKS[finding.state]:<6}  {finding.name:<20}  {finding.found}")
            if finding.remedy is not None:
                print(f"{'':<6}  {'':<20}  -> {finding.remedy}")
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(BROKEN)
