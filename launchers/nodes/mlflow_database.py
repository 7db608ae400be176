"""The copy of an MLflow server's SQLite database in object storage, for machines that come and go.

python -m launchers.nodes.mlflow_database save|restore FILE URI
"""

import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from pyarrow import fs


def save(database: Path, uri: str) -> bool:
    """Write a consistent copy of `database`, which may be in use, to `uri`; False: there is none.

    uri  of any file system that pyarrow knows
    """
    if not database.exists():
        return False
    filesystem, path = fs.FileSystem.from_uri(uri)
    with tempfile.TemporaryDirectory(dir=database.parent) as folder:
        copy = Path(folder) / database.name
        with (
            closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as source,
            closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
        fs.copy_files(str(copy), path, fs.LocalFileSystem(), filesystem)
    return True


def restore(database: Path, uri: str) -> bool:
    """Bring the copy at `uri` back, unless `database` is there; False: nothing was brought.

    OSError: the object store does not answer. A server must not start then: its new database would
    be written over the copy.
    """
    if database.exists():
        return False
    filesystem, path = fs.FileSystem.from_uri(uri)
    if filesystem.get_file_info(path).type == fs.FileType.NotFound:
        return False
    database.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=database.parent) as folder:
        copy = Path(folder) / database.name
        fs.copy_files(path, str(copy), filesystem, fs.LocalFileSystem())
        copy.replace(database)
    return True


if __name__ == "__main__":
    action, file, uri = sys.argv[1:]
    done = {"save": save, "restore": restore}[action](Path(file), uri)
    print(f"{action} {file} {uri}: {'done' if done else 'nothing to do'}")
