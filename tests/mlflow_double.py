"""A tracking server that can be taken away: MLflow's REST API as far as it is used, in memory.

Unlike MLflow's own, it keeps a metric that is sent twice twice.
"""

import base64
import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Answer = dict[str, Any]


class Server:
    """Its address, what it was sent, and how it behaves.

    credentials  user:password that it asks for
    cut_after    requests of log-batch after which one is taken, but not answered
    silent       every request is answered after so many seconds
    mute         metrics are taken, and never answered
    artifacts    by their place; None: they are refused
    """

    def __init__(self) -> None:
        self.runs: dict[str, Answer] = {}
        self.metrics: list[Answer] = []
        self.experiments: dict[str, Answer] = {}
        self.credentials: str | None = None
        self.cut_after: int | None = None
        self.artifacts: dict[str, bytes] | None = {}
        self.silent = 0.0
        self.mute = False
        self.requests = 0
        self.batches = 0
        self.over = threading.Event()
        self._server: ThreadingHTTPServer | None = None
        self._port = 0
        self.start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen, on the port of before."""

        class Handler(_Handler):
            double = self

        self.over = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Nobody listens any more, and what waits for an answer does not get it."""
        self.over.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        self._server = None

    def history(self, name: str) -> list[tuple[int, float]]:
        """All points of a metric, of all runs, as they came."""
        return [(int(m["step"]), float(m["value"])) for m in self.metrics if m["key"] == name]

    def tags(self, run_name: str) -> dict[str, str]:
        """The tags of the run of a name."""
        (run,) = [r for r in self.runs.values() if r["info"]["run_name"] == run_name]
        return {tag["key"]: tag["value"] for tag in run["data"]["tags"]}

    def status(self, run_name: str) -> str:
        (run,) = [r for r in self.runs.values() if r["info"]["run_name"] == run_name]
        return run["info"]["status"]

    def answer(self, path: str, asked: Answer) -> Answer:
        name = path.rpartition("/mlflow/")[2].replace("/", "_").replace("-", "_")
        return getattr(self, f"_{name}")(asked)

    def _experiments_search(self, asked: Answer) -> Answer:
        return {"experiments": list(self.experiments.values())}

    def _experiments_get_by_name(self, asked: Answer) -> Answer:
        for found in self.experiments.values():
            if found["name"] == asked["experiment_name"]:
                return {"experiment": found}
        raise LookupError

    def _experiments_get(self, asked: Answer) -> Answer:
        return {"experiment": self.experiments[asked["experiment_id"]]}

    def _experiments_create(self, asked: Answer) -> Answer:
        number = str(len(self.experiments) + 1)
        self.experiments[number] = {
            "experiment_id": number,
            "name": asked["name"],
            "artifact_location": f"mlflow-artifacts:/{number}",
            "lifecycle_stage": "active",
        }
        return {"experiment_id": number}

    def _runs_create(self, asked: Answer) -> Answer:
        run_id = uuid.uuid4().hex
        info = {
            "run_id": run_id,
            "run_uuid": run_id,
            "run_name": asked["run_name"],
            "experiment_id": asked["experiment_id"],
            "status": "RUNNING",
            "start_time": asked["start_time"],
            "artifact_uri": f"mlflow-artifacts:/{run_id}",
            "lifecycle_stage": "active",
        }
        data = {"metrics": [], "params": [], "tags": list(asked.get("tags", []))}
        self.runs[run_id] = {"info": info, "data": data}
        return {"run": self.runs[run_id]}

    def _runs_get(self, asked: Answer) -> Answer:
        return {"run": self.runs[asked["run_id"]]}

    def _runs_update(self, asked: Answer) -> Answer:
        info = self.runs[asked["run_id"]]["info"]
        info |= {k: v for k, v in asked.items() if k in ("status", "end_time")}
        return {"run_info": info}

    def _runs_search(self, asked: Answer) -> Answer:
        wanted = []
        for part in asked["filter"].split(" and "):
            name, _, value = part.partition(" = ")
            wanted.append((name.removeprefix("tags.").strip("`"), value.strip("'")))
        found = [
            run
            for run in self.runs.values()
            if all({"key": k, "value": v} in run["data"]["tags"] for k, v in wanted)
        ]
        return {"runs": found[: int(asked["max_results"])]}

    def _runs_log_batch(self, asked: Answer) -> Answer:
        data = self.runs[asked["run_id"]]["data"]
        self.metrics += asked.get("metrics", [])
        data["metrics"] += [{**m, "run_id": asked["run_id"]} for m in asked.get("metrics", [])]
        data["params"] += asked.get("params", [])
        for tag in asked.get("tags", []):
            data["tags"] = [t for t in data["tags"] if t["key"] != tag["key"]] + [tag]
        if asked.get("metrics"):
            self.batches += 1
            if self.mute:
                self.over.wait()
                raise BrokenPipeError
            if self.cut_after is not None and self.batches > self.cut_after:
                self.cut_after = None
                raise BrokenPipeError
        return {}

    def _metrics_get_history(self, asked: Answer) -> Answer:
        points = self.runs[asked["run_id"]]["data"]["metrics"]
        return {"metrics": [m for m in points if m["key"] == asked["metric_key"]]}


class _Handler(BaseHTTPRequestHandler):
    double: Server

    def do_GET(self) -> None:
        asked = {k: v[0] for k, v in parse_qs(urlsplit(self.path).query).items()}
        self._answer(asked)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}"))

    do_PATCH = do_POST  # noqa: N815  as http.server calls it

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.double.artifacts is None:
            self._send(500, b"the bucket is not there")
            return
        self.double.artifacts[self.path.rpartition("/artifacts/")[2]] = content
        self._send(200, b"{}")

    def _answer(self, asked: Answer) -> None:
        self.double.requests += 1
        wanted = self.double.credentials
        if wanted is not None:
            expected = "Basic " + base64.b64encode(wanted.encode()).decode()
            if self.headers.get("Authorization") != expected:
                self._send(401, b"You are not authenticated.")
                return
        try:
            found = self.double.answer(urlsplit(self.path).path, asked)
        except LookupError:
            self._send(404, json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST"}).encode())
            return
        except BrokenPipeError:
            self.connection.close()
            return
        if self.double.over.wait(self.double.silent):
            self.connection.close()
            return
        self._send(200, json.dumps(found).encode())

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def server() -> Iterator[Server]:
    """A server that listens until it is stopped."""
    double = Server()
    try:
        yield double
    finally:
        double.stop()
