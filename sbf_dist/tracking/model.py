"""An exported student as a model of MLflow: of a run, with a place in the registry, or in a folder.

It takes encoded pictures and answers with classes (see sbf_dist.export.sbf_student, which it
carries), and needs mlflow, numpy, onnxruntime and pillow, neither torch nor sbf_dist.
"""

import io
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbf_dist.tracking.store import quiet_mlflow

if TYPE_CHECKING:
    from mlflow import MlflowClient

_NAME = "student"
_NEEDS = ("mlflow", "numpy", "onnxruntime", "pillow")


def log_student(
    client: "MlflowClient",
    uri: str,
    run_id: str,
    onnx_file: Path,
    *,
    registered_name: str | None,
    since: int,
) -> None:
    """Store an exported student as a model of a run, unless it has one of `since` (milliseconds).

    onnx_file: what `sbf_dist.export.onnx.export_onnx` wrote, with a free batch size.
    registered_name also enters it into the model registry.
    """
    mlflow = quiet_mlflow()
    from mlflow import pyfunc

    run = client.get_run(run_id)
    known = client.search_logged_models(
        [run.info.experiment_id], filter_string=f"source_run_id = '{run_id}'"
    )
    if any(model.name == _NAME and model.creation_timestamp >= since for model in known):
        return
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        with mlflow.start_run(run_id=run_id, nested=True):
            pyfunc.log_model(
                name=_NAME, registered_model_name=registered_name, **_described(onnx_file)
            )
    finally:
        mlflow.set_tracking_uri(before)
        client.update_run(run_id, run.info.status)  # start_run ends the run, which may go on


def save_student(onnx_file: Path, folder: Path) -> None:
    """Write an exported student into a new folder, as `mlflow models serve` takes it."""
    quiet_mlflow()
    from mlflow import pyfunc

    pyfunc.save_model(path=str(folder), **_described(onnx_file))


def answers(folder: Path, pictures: list[bytes]) -> list[list[float]]:
    """Return the probabilities that a saved student gives for encoded pictures."""
    quiet_mlflow()
    import pandas as pd
    from mlflow import pyfunc

    found = pyfunc.load_model(str(folder)).predict(pd.DataFrame({"image": pictures}))
    return [list(map(float, row)) for row in found["probabilities"]]


def _described(onnx_file: Path) -> dict[str, Any]:
    """Return what MLflow is to know of a student: its code, signature, example and packages."""
    import numpy as np
    import pandas as pd
    from mlflow.models import infer_signature
    from PIL import Image

    from sbf_dist.export import sbf_student

    student = sbf_student.Student(onnx_file)
    channels, height, width = student.input_shape
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    example = pd.DataFrame({"image": [file.getvalue()]})
    return {
        "loader_module": sbf_student.__name__.rpartition(".")[2],
        "data_path": str(onnx_file),
        "code_paths": [sbf_student.__file__],
        "signature": infer_signature(example, sbf_student.Service(student).predict(example)),
        "input_example": example,
        "pip_requirements": [f"{name}=={metadata.version(name)}" for name in _NEEDS],
    }
