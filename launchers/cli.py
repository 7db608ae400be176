"""The `sbf` command."""

import logging
import sys
from typing import Annotated

import typer
from typer.exceptions import TyperException

from launchers.commands import (
    checkpoint,
    compare,
    compress,
    data,
    doctor,
    evaluate,
    export,
    jobs,
    label,
    plan,
    predict,
    report,
    run,
)
from launchers.interruption import Ended
from sbf_dist.errors import RunError, UserError, without_credentials

app = typer.Typer(
    help="SBF-Dist: CNNs at half the cost, compressed by spatial basis filters and distilled "
    "from a teacher ensemble. Start with: sbf run recipes/digits.yaml",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def root(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also show the log messages of libraries.")
    ] = False,
) -> None:
    """Set up logging."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(message)s"
    )
    # torch.utils.benchmark loads this module, which warns of a CUDA toolkit without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


app.command("compress", short_help="Compress a network in one shot, without training.")(
    compress.command
)
app.command("compare", short_help="Compare SBF with other methods at equal cost.")(compare.command)
app.command("run", help=run.HELP, short_help="Run a recipe: from images to an exported student.")(
    run.command
)
app.add_typer(
    label.app, name="label", short_help="Write pseudo-labels, and report on their quality."
)
app.command("evaluate", short_help="Measure a student's accuracy on labelled images.")(
    evaluate.command
)
app.command("doctor", short_help="Check the installation.")(doctor.command)
app.command("export", short_help="Export a student: ONNX, torch.export, safetensors, MLflow.")(
    export.command
)
app.command("predict", short_help="Classify images with a student.")(predict.command)
app.command("submit", short_help="Run a recipe on a cluster.")(jobs.submit)
app.command("jobs", short_help="List the jobs of a cluster.")(jobs.jobs)
app.command("logs", short_help="Print the log of a job.")(jobs.logs)
app.command("stop", short_help="Stop a job.")(jobs.stop)
app.command("report", short_help="Write an HTML report on one or several runs.")(report.command)
app.add_typer(plan.app, name="plan", short_help="Show compression plans.")
app.add_typer(
    checkpoint.app, name="checkpoint", short_help="Show, verify and consolidate checkpoints."
)
app.add_typer(data.app, name="data", short_help="Prepare, check and split data sets.")


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="sbf", standalone_mode=False)
    except (UserError, TyperException) as error:
        message = error.format_message() if isinstance(error, TyperException) else str(error)
        message = without_credentials(message.replace("Value error, ", ""))
        print(f"sbf: {message}", file=sys.stderr)
        sys.exit(2)
    except Ended as ended:
        ended.leave()
    except RunError as error:
        for line in (error, *getattr(error, "__notes__", ())):
            print(f"sbf: {line}", file=sys.stderr)
        sys.exit(1)
    sys.exit(code)
