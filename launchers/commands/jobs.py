"""`sbf submit`, `jobs`, `logs` and `stop`: runs as jobs of a Ray cluster."""

import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launchers import packing
from launchers.commands.run import LAST_STAGE, StageName
from launchers.on_ray.cluster_file import how_to_open, mlflow_of
from launchers.run.stages import check_order
from sbf_dist import recipe as recipes
from sbf_dist.errors import UserError
from sbf_dist.object_storage import is_address

if TYPE_CHECKING:
    from launchers.on_ray.jobs import Cluster

ADDRESS = "RAY_API_SERVER_ADDRESS"  # as Ray's own `ray job` reads it
FAILED = 1  # exit code where the job has not succeeded, and has none of its own

ClusterFile = Annotated[
    Path | None,
    typer.Option("--cluster", metavar="FILE", help="The cluster file given to `ray up`."),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help=f"The cluster's dashboard, e.g. http://127.0.0.1:8265; without it {ADDRESS}.",
    ),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="The job, as `sbf jobs` lists it.")]


def submit(
    recipe_file: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Overrides of recipe keys, as for `sbf run`."),
    ] = None,
    cluster: ClusterFile = None,
    address: Address = None,
    runs: Annotated[
        str | None,
        typer.Option(
            help="Folder that holds all runs, an absolute path that all machines share, or "
            "s3://BUCKET/runs.  [required]"
        ),
    ] = None,
    until: Annotated[StageName, typer.Option(help="Stop after this stage.")] = LAST_STAGE,
    again: Annotated[
        StageName | None, typer.Option(help="Repeat this stage and those after it.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the job's log until it ends.")
    ] = True,
) -> None:
    """Run a recipe on a cluster: upload this folder, start `sbf run` there, and follow its log.

    The current folder is uploaded, which must contain the recipe: files that Git tracks or would
    add, without data/ and runs/, 100 MiB at most. Images and runs must be on storage that all
    machines of the cluster share. Submit the same run again to resume it. Ctrl-C stops following
    the log; the job continues.
    """
    recipe = recipes.load(recipe_file, overrides or ())
    root = Path.cwd()
    if not recipe_file.resolve().is_relative_to(root.resolve()):
        raise UserError(
            f"recipe {recipe_file}: is outside the uploaded folder, {root}; start from the "
            "folder that holds it"
        )
    files = packing.files_of(root)
    inside = recipe_file.resolve().relative_to(root.resolve())
    if inside not in files:
        raise UserError(
            f"recipe {inside}: is not uploaded, as it is in {inside.parts[0]}/ or Git ignores "
            "it; move it"
        )
    if runs is None or not (is_address(runs) or Path(runs).is_absolute()):
        raise UserError(
            f"--runs {runs or ''}: must be the absolute path of a folder that all machines of the "
            "cluster share, or s3://BUCKET/runs"
        )
    check_order(until.value, again.value if again else None)
    tracking = recipe.tracking.uri or (mlflow_of(cluster) if cluster else None)
    ray = os.path.relpath(Path(sys.executable).with_name("ray"))
    job_id = f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    command = ["sbf", "run", str(inside), *(overrides or ()), "--runs", runs]
    command += ["--until", until.value] if until is not LAST_STAGE else []
    command += ["--again", again.value] if again else []
    with _cluster(cluster, address) as found, tempfile.TemporaryDirectory() as folder:
        packing.pack(root, files, Path(folder))
        found.submit(
            shlex.join(command),
            folder=Path(folder),
            job_id=job_id,
            run=recipe.name,
            env={"PYTHONUNBUFFERED": "1"},
        )
        print(f"job {job_id}: submitted to {found.address}, {len(files)} files sent")
        if tracking is not None and tracking.startswith("http"):
            print(how_to_open(tracking, cluster, ray))
        if wait:
            _follow(found, job_id)


def jobs(cluster: ClusterFile = None, address: Address = None) -> None:
    """List the jobs of a cluster, newest first."""
    from rich.console import Console
    from rich.table import Table

    table = Table("job", "run", "status", "begun", "minutes")
    with _cluster(cluster, address) as found:
        for job in found.jobs():
            begun = "" if job.begun is None else time.strftime("%F %T", time.localtime(job.begun))
            last = job.ended or time.time()
            minutes = "" if job.begun is None else f"{(last - job.begun) / 60:.1f}"
            table.add_row(job.id, job.run, job.status, begun, minutes)
    if table.row_count:
        Console().print(table)
    else:
        print("no job has been submitted")


def logs(
    job_id: JobId,
    cluster: ClusterFile = None,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow the log until the job ends.")
    ] = False,
) -> None:
    """Print the log of a job."""
    with _cluster(cluster, address) as found:
        if follow:
            _follow(found, job_id)
        else:
            print(found.logs(job_id), end="")


def stop(job_id: JobId, cluster: ClusterFile = None, address: Address = None) -> None:
    """Stop a job. Submit its run again to resume from the last checkpoint."""
    with _cluster(cluster, address) as found:
        if found.stop(job_id):
            print(f"job {job_id}: was asked to stop")
        else:
            print(f"job {job_id}: has ended already ({found.job(job_id).status})")


def _follow(cluster: "Cluster", job_id: str) -> None:
    """Print a job's log until it ends; the exit code of `sbf run`, or FAILED."""
    try:
        for text in cluster.follow(job_id):
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        print(
            f"\njob {job_id} is still running; sbf logs {job_id} --follow follows it, sbf stop "
            f"{job_id} stops it"
        )
        raise
    job = cluster.job(job_id)
    print(f"job {job_id}: {job.status}")
    if job.status != "SUCCEEDED":
        raise typer.Exit(job.code if job.code and job.code > 0 else FAILED)


@contextmanager
def _cluster(file: Path | None, address: str | None) -> Iterator["Cluster"]:
    """Reach the cluster that the options name, or the environment."""
    # They import Ray, which takes seconds: not before the command line is known to be right.
    from launchers.on_ray.jobs import Cluster
    from launchers.on_ray.tunnel import forwarded_dashboard

    if file is not None and address is not None:
        raise UserError("--cluster and --address both name a cluster; give one of them")
    if file is not None:
        with forwarded_dashboard(file) as forwarded:
            yield Cluster(forwarded, file)
        return
    address = address or os.environ.get(ADDRESS)
    if not address:
        raise UserError(
            f"no cluster given: set --cluster FILE, --address URL or the variable {ADDRESS}; on "
            "this machine alone, sbf run needs none"
        )
    yield Cluster(address)
