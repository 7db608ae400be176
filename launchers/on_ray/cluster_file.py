"""What a file for `ray up` says to this program."""

import re
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from sbf_dist.errors import UserError, without_credentials
from sbf_dist.files import read_bytes

# As a command of the file hands it to Ray's processes on the head, and so to the jobs.
_TRACKING = re.compile(r"\bMLFLOW_TRACKING_URI=[\"']?([^\s\"';&]+)")


def mlflow_of(file: Path) -> str | None:
    """Return the address of the MLflow server that the jobs of this cluster use, if it has one.

    UserError: the file cannot be read, or is not a mapping in YAML.
    """
    try:
        content = yaml.safe_load(read_bytes(file).decode())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cluster file {file}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        first = " ".join(str(error).split())
        raise UserError(f"cluster file {file}: is not YAML: {first}") from error
    if not isinstance(content, dict):
        raise UserError(f"cluster file {file}: must be a mapping, as `ray up` takes it")
    for command in content.get("head_start_ray_commands") or ():
        found = _TRACKING.search(str(command))
        if found:
            return found[1]
    return None


def how_to_open(uri: str, cluster_file: Path | None, ray: str) -> str:
    """Return a line that names an MLflow server, and how it is reached from here.

    `ray` is the program of that name, as it is called here.
    """
    parts = urlsplit(uri)
    shown = f"MLflow {without_credentials(uri)}"
    if parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        return shown
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if cluster_file is None:
        return f"{shown} on the head; bring it here: ssh -N -L {port}:127.0.0.1:{port} HEAD"
    return (
        f"{shown} on the head; bring it here: {ray} dashboard {cluster_file} --port {port} "
        f"--remote-port {port}"
    )
