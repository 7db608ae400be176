"""An exported student as a model of an MLflow run."""

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from sbf_dist.tracking.store import quiet_mlflow

if TYPE_CHECKING:
    from mlflow import MlflowClient

_NAME = "student"


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
    `mlflow.pyfunc.load_model(uri).predict(images)` then takes uint8 RGB images (N, height,
    width, 3) of the input size and returns "class", "probability" and "probabilities" (see
    sbf_dist.export.sbf_student, which the model carries). It needs mlflow, numpy and onnxruntime,
    neither torch nor sbf_dist. registered_name also enters it into the model registry.
    """
    import numpy as np

    mlflow = quiet_mlflow()
    from mlflow import pyfunc
    from mlflow.models import infer_signature

    from sbf_dist.export import sbf_student

    run = client.get_run(run_id)
    known = client.search_logged_models(
        [run.info.experiment_id], filter_string=f"source_run_id = '{run_id}'"
    )
    if any(model.name == _NAME and model.creation_timestamp >= since for model in known):
        return
    student = sbf_student.Student(onnx_file)
    channels, height, width = student.input_shape
    example = np.random.default_rng(0).integers(0, 256, (2, height, width, channels), np.uint8)
    requirements = [
        f"{name}=={metadata.version(name)}" for name in ("mlflow", "numpy", "onnxruntime")
    ]
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        with mlflow.start_run(run_id=run_id, nested=True):
            pyfunc.log_model(
                name=_NAME,
                loader_module=sbf_student.__name__.rpartition(".")[2],
                data_path=str(onnx_file),
                code_paths=[sbf_student.__file__],
                signature=infer_signature(example, student.predict(example)),
                input_example=example,
                pip_requirements=requirements,
                registered_model_name=registered_name,
            )
    finally:
        mlflow.set_tracking_uri(before)
        client.update_run(run_id, run.info.status)  # start_run ends the run, which may go on
