"""The MLflow run of a run whose tracking.json is gone: its checkpoints name it."""

from collections.abc import Iterator
from functools import partial

from launchers.run.folder import RunFolder
from sbf_dist import tracking
from sbf_dist.errors import UserError
from sbf_dist.object_storage import ObjectFolder, is_address
from sbf_dist.patience import patiently
from sbf_dist.train.manifest import MANIFEST, parsed_manifest


def find_again(folder: RunFolder) -> None:
    """Let a run whose tracking.json is gone or damaged go on with its MLflow run, if it is known.

    It is taken from the newest checkpoint that names one.
    """
    tracking.recover(folder.tracking, lambda: _latest(folder))


def _latest(folder: RunFolder) -> str | None:
    for content in _manifests(folder):
        try:
            run_id = parsed_manifest(content, MANIFEST).mlflow_run
        except UserError:  # a damaged one; who goes on from it says so
            continue
        if run_id is not None:
            return run_id
    return None


def _manifests(folder: RunFolder) -> Iterator[bytes]:
    """Yield the manifests of all checkpoints of a run, the newest first."""
    place = folder.place_of_checkpoints
    if not is_address(str(place)):
        found = folder.checkpoints.glob(f"*/*/{MANIFEST}")
        for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
            yield path.read_bytes()
        return
    store = ObjectFolder.at(str(place))
    objects = patiently(store.objects)
    keys = [key for key in objects if key.endswith(f"/{MANIFEST}")]
    for key in sorted(keys, key=lambda key: objects[key].modified, reverse=True):
        yield patiently(partial(store.read, key))
