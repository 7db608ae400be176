"""Where a finished student is: its folder, the folder of its run, or its ONNX file.

Found without PyTorch, so that `sbf predict` needs none.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sbf_dist.errors import UserError
from sbf_dist.export.student_files import CARD, ONNX

if TYPE_CHECKING:
    from sbf_dist.export.sbf_student import Student

_RECIPE = "recipe.json"
_STUDENT = "student"  # folder in that of a run


@dataclass(frozen=True)
class Exported:
    """A student that is there.

    given   as the user calls it
    folder  its own folder; None of an ONNX file
    run     the folder of the run that made it, where it lies there
    onnx    its ONNX file; None of a student that was saved without
    """

    given: str
    folder: Path | None
    run: Path | None
    onnx: Path | None


def find_exported(place: Path) -> Exported:
    """Find the student at `place`: an ONNX file, a student's folder or a run's folder.

    Raises UserError, naming the place, if there is none.
    """
    if place.is_file():
        return Exported(str(place), None, None, place)
    if not place.exists():
        raise UserError(
            f"model {place} does not exist; give an ONNX file, a student's or a run's folder"
        )
    for folder in (place, place / _STUDENT):
        if (folder / CARD).is_file():
            run = folder.absolute().parent
            of_run = folder.name == _STUDENT and (run / _RECIPE).is_file()
            onnx = folder / ONNX
            return Exported(
                str(place), folder, run if of_run else None, onnx if onnx.is_file() else None
            )
    if (place / _RECIPE).is_file():
        raise UserError(f"run {place} has no student yet: finish the run with sbf run")
    raise UserError(f"folder {place} is not a student: it has no {CARD}")


def open_onnx(exported: Exported, threads: int) -> "Student":
    """Open a student's ONNX file in ONNX Runtime; UserError, naming it, if that is impossible."""
    from sbf_dist.export.sbf_student import Student

    if exported.onnx is None:
        raise UserError(
            f"folder {exported.given} has no {ONNX}: write one with "
            f"sbf export {exported.given} --format onnx --out FOLDER"
        )
    try:
        return Student(exported.onnx, threads=threads)
    except ValueError as error:  # in one line, which names the file
        raise UserError(str(error)) from error
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"ONNX file {exported.onnx} cannot be read: {reason}") from error
