"""launchers/cluster-onprem.yaml on hosts of this machine: a run outlives a worker and the head.

What the test changes in the file: addresses, user and key; packages and extension are those of this
checkout; nodes are small and find out sooner that another is gone.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hosts
import pytest
import yaml
from hosts import Host
from waiting import eventually

import sbf_dist

ROOT = Path(sbf_dist.__file__).parents[1]
FILE = ROOT / "launchers" / "cluster-onprem.yaml"
RAY = str(Path(sys.executable).with_name("ray"))
MINUTES = 60.0
STEPS = 150
EVERY = 10  # steps between checkpoints
PACE = (
    f"{2 * EVERY + 5} 0.5"  # after so many steps they take longer: what is done to hosts takes time
)
NO_HOSTS = hosts.missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(NO_HOSTS is not None, reason=str(NO_HOSTS))]

# There is no systemd in a host: this does what the lines of a unit say.
SYSTEMCTL = """#!/bin/bash
unit=${!#}
line() { sed -n "s|^$1=||p" "$unit" | sed "s|%h|$HOME|g"; }
$(line ExecStartPre)
setsid bash -c "while true; do $(line ExecStart); sleep $(line RestartSec); done" \
    > ~/service.log 2>&1 < /dev/null &
"""


def cluster_file(network: dict[str, Host], folder: Path) -> Path:
    """Write the cluster file as a user with these hosts edits it."""
    content = yaml.safe_load(FILE.read_text())
    content["provider"]["head_ip"] = network["head"].address
    content["provider"]["worker_ips"] = [network[name].address for name in ("one", "two")]
    content["auth"] = {"ssh_user": hosts.USER, "ssh_private_key": str(folder / "key")}
    build = content["setup_commands"].index("make --directory ~/sbf-dist setup")
    extension = next((ROOT / "sbf_dist").glob("_C.*.so"))
    content["setup_commands"][build] = (
        f"ln -sfn {shlex.quote(sys.prefix)} ~/sbf-dist/.venv && "
        f"cp {shlex.quote(str(extension))} ~/sbf-dist/sbf_dist/"
    )
    small = "--object-store-memory=100000000 --disable-usage-stats"
    sooner = (
        "RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=2000 "
        "RAY_gcs_rpc_server_reconnect_timeout_s=15"
    )
    for key, cpus in (("head_start_ray_commands", 0), ("worker_start_ray_commands", 1)):
        commands = content[key]
        assert "ray start" in commands[-1]
        commands[-1] = f"export {sooner}; " + commands[-1] + f" --num-cpus={cpus} {small}"
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@dataclass
class Story:
    """What happened; `seen` is what was found on the way."""

    network: dict[str, Host]
    file: Path
    runs: Path
    log: Path
    seen: dict[str, Any] = field(default_factory=dict)

    def laptop(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start a command on the user's machine; both its outputs go to one pipe."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return subprocess.Popen(
            self.network["laptop"].command(*arguments),
            cwd=ROOT,
            env=environment | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def answer(self, process: "subprocess.Popen[str]") -> tuple[int, str]:
        """Return exit code and output of a command once it ends."""
        output, _ = process.communicate(timeout=10 * MINUTES)
        with self.log.open("a") as log:
            print(time.strftime("%T"), process.args, output, file=log)
        return process.returncode, output

    def ray(self, *arguments: str) -> str:
        code, output = self.answer(self.laptop(RAY, *arguments))
        assert code == 0, output
        return output

    def start(
        self, *arguments: str, home: str = hosts.HOME, token: str = ""
    ) -> "subprocess.Popen[str]":
        """Start `sbf` on the user's machine."""
        program = "from launchers.cli import main; main()"
        given = [f"HOME={home}", *([f"RAY_AUTH_TOKEN={token}"] if token else [])]
        command = [sys.executable, "-c", program, *arguments, "--cluster", str(self.file)]
        return self.laptop("env", *given, *command)

    def sbf(self, *arguments: str) -> tuple[int, str]:
        return self.answer(self.start(*arguments))

    def submission(self, *options: str) -> list[str]:
        """Return the arguments that send the run: 2 workers, or the one that has a place."""
        training = f"{{batch_size: 64, warmup: 2, steps: {STEPS}, checkpoint_every: {EVERY}}}"
        teacher = (
            "{name: teacher-1, model: benchmarks/faults_network.py:make, "
            f"arguments: {{diary: {self.runs.parent}, pace: {self.pace}}}, training: {training}}}"
        )
        recipe = [f"teachers=[{teacher}]", "baselines=null", "workers.count=[1, 2]"]
        return ["submit", "recipes/digits.yaml", *recipe, "--runs", str(self.runs), *options]

    @property
    def pace(self) -> Path:
        """The file that slows the training down while it is there."""
        return self.runs.parent / "pace"

    def checkpoint(self) -> int:
        """Return the step of the newest checkpoint."""
        found = (self.runs / "digits" / "checkpoints" / "teachers").glob("teacher-1-*")
        steps = [int(path.name.rpartition("-")[2]) for path in found if path.name[-1].isdigit()]
        return max(steps, default=0)

    def failures(self) -> int:
        return len(list((self.runs / "digits" / "logs").glob("teachers-*.log")))


def wait_for(what: str, condition: Callable[[], object], job: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 5 * MINUTES
    while not condition():
        if job.poll() is not None or time.monotonic() > deadline:
            job.kill()
            pytest.fail(f"not seen: {what}; the job said: {job.communicate()[0]}")
        time.sleep(0.1)


def status(host: Host, url: str) -> int:
    """Return the HTTP status that `host` gets from a URL without a token."""
    program = (
        "import sys, urllib.request, urllib.error\n"
        "try: print(urllib.request.urlopen(sys.argv[1], timeout=120).status)\n"
        "except urllib.error.HTTPError as error: print(error.code)\n"
    )
    return int(host.run(sys.executable, "-c", program, url))


def logged_steps(head: Host, metric: str) -> list[int]:
    """Return the steps for which the head's MLflow server knows a metric."""
    program = (
        "import json, sys, urllib.request\n"
        "def ask(path, **values):\n"
        "    data = json.dumps(values).encode() if values else None\n"
        "    request = urllib.request.Request(\n"
        "        'http://127.0.0.1:5000/api/2.0/mlflow/' + path, data,\n"
        "        {'Content-Type': 'application/json'})\n"
        "    return json.load(urllib.request.urlopen(request, timeout=240))\n"
        "found = ask('experiments/search', max_results=10)['experiments']\n"
        "ids = [one['experiment_id'] for one in found]\n"
        "steps = set()\n"
        "for run in ask('runs/search', experiment_ids=ids).get('runs', []):\n"
        "    history = ask('metrics/get-history?run_id=' + run['info']['run_id'] +\n"
        "        '&metric_key=' + sys.argv[1])\n"
        "    steps |= {int(one.get('step', 0)) for one in history.get('metrics', [])}\n"
        "print(json.dumps(sorted(steps)))\n"
    )
    return json.loads(head.run(sys.executable, "-c", program, metric))


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("cluster")
    seen = [ROOT, Path(sys.prefix)]
    with hosts.network(["head", "one", "two"], folder, seen) as network:
        head = network["head"]
        for name, program in (("systemctl", SYSTEMCTL), ("loginctl", "#!/bin/sh\n")):
            file = folder / "bin" / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(program)
            file.chmod(0o755)
        head.run("bash", "-c", f"echo 'PATH={folder}/bin:$PATH' > {hosts.HOME}/.bashrc")
        story = Story(network, cluster_file(network, folder), folder / "runs", folder / "log")
        tell(story)
        yield story


def tell(story: Story) -> None:
    head, one, two = (story.network[name] for name in ("head", "one", "two"))
    story.pace.write_text(PACE)
    story.ray("get-auth-token", "--generate")
    story.ray("up", "-y", str(story.file))
    # Workers come after the head; a training that began before would have one of them.
    eventually(lambda: "/2.0 CPU" in story.ray("exec", str(story.file), "ray status"))

    job = story.start(*story.submission("--until", "teachers"))
    wait_for("training on two hosts", lambda: story.checkpoint() >= 2 * EVERY, job)
    two.cut_off()
    story.seen["listeners"] = {host.name: host.listeners() for host in (head, one, two)}
    cut = time.monotonic()
    wait_for("the loss of a host", lambda: story.failures() == 1, job)
    story.seen["noticed"] = time.monotonic() - cut
    two.connect()
    reached = story.checkpoint()
    wait_for("training on one host", lambda: story.checkpoint() > reached + EVERY, job)
    story.seen["unauthorized"] = [
        status(head, f"http://127.0.0.1:8265/{path}") for path in ("api/jobs/", "nodes")
    ]
    head.crash()
    story.seen["followed"] = story.answer(job)
    story.seen["without head"] = story.sbf("jobs")

    head.run(
        "bash",
        "-lc",
        f"PATH={story.file.parent}/bin:$PATH systemctl {hosts.HOME}"
        "/sbf-dist/launchers/nodes/mlflow.service",
    )  # as systemd does when a machine starts
    story.ray("up", "-y", str(story.file))
    story.pace.unlink()
    story.seen["resumed at"] = story.checkpoint()
    story.seen["resumed"] = story.sbf(*story.submission("--until", "teachers"))
    story.seen["again"] = story.sbf(*story.submission("--until", "pseudo-labels"))
    story.seen["last step"] = story.checkpoint()
    story.seen["stages"] = {file.stem for file in (story.runs / "digits" / "stages").iterdir()}
    story.pace.write_text("0 1")  # it must not end by itself
    story.seen["started"] = story.sbf(*story.submission("--again", "teachers", "--no-wait"))
    last = re.search(r"job (\S+): submitted", story.seen["started"][1])
    assert last is not None, story.seen["started"]
    story.seen["stopped"] = story.sbf("stop", last[1])
    eventually(lambda: "RUNNING" not in story.sbf("jobs")[1])  # it is asked to stop, and then does
    story.seen["jobs"] = story.sbf("jobs")
    story.seen["no token"] = story.answer(story.start("jobs", home="/tmp"))
    story.seen["wrong token"] = story.answer(story.start("jobs", token="another"))
    story.seen["steps"] = logged_steps(head, "teacher-1/loss")
    story.seen["no job"] = story.sbf("logs", "nobody")
    story.seen["down"] = story.ray("down", "-y", str(story.file))


def test_a_run_goes_on_without_a_host_that_is_cut_off(story: Story) -> None:
    _, output = story.seen["followed"]
    two = story.network["two"].address
    assert re.search(rf"teachers: worker [01] died with machine {re.escape(two)}, once", output)
    assert "restarting the workers" in output
    assert "StackTrace" not in output
    assert story.seen["noticed"] < 120


def test_a_head_that_dies_ends_the_watching_in_one_line(story: Story) -> None:
    code, output = story.seen["followed"]
    assert code == 2
    last = output.splitlines()[-1]
    assert last.startswith(f"sbf: cluster {story.file}: the connection to job digits-")
    assert "submit the run again" in last
    code, output = story.seen["without head"]
    assert code == 2
    assert output.startswith(f"sbf: cluster {story.file}: cannot be reached (")
    assert output.endswith(f"; is Ray running on the head? Start it with ray up {story.file}\n")
    assert output.count("\n") == 1


def test_the_same_run_goes_on_once_the_cluster_is_up_again(story: Story) -> None:
    code, output = story.seen["resumed"]
    assert code == 0, output
    assert story.seen["resumed at"] >= 3 * EVERY
    assert f"resumed at step {story.seen['resumed at']}" in output
    assert "SUCCEEDED" in output.splitlines()[-1]
    code, output = story.seen["again"]
    assert code == 0, output
    assert "[2/3] teachers: already done" in output


def test_what_the_run_leaves_is_whole(story: Story) -> None:
    assert story.seen["stages"] == {"prepare", "teachers", "pseudo-labels"}
    assert story.seen["last step"] == STEPS
    assert story.seen["steps"] == list(range(EVERY, STEPS + 1, EVERY))


def test_submitting_says_how_to_open_mlflow(story: Story) -> None:
    _, output = story.seen["started"]
    (line,) = [line for line in output.splitlines() if line.startswith("MLflow")]
    assert line.startswith("MLflow http://127.0.0.1:5000 on the head; bring it here: ")
    assert line.endswith(f"ray dashboard {story.file} --port 5000 --remote-port 5000")


def test_jobs_are_listed_and_stopped(story: Story) -> None:
    _, listed = story.seen["jobs"]
    states = [line.split("\u2502")[3].strip() for line in listed.splitlines() if "\u2502" in line]
    assert states == ["STOPPED", "SUCCEEDED", "SUCCEEDED"]
    assert story.seen["stopped"][0] == 0
    assert "was asked to stop" in story.seen["stopped"][1]


def test_a_stranger_is_refused(story: Story) -> None:
    assert story.seen["unauthorized"] == [401, 401]
    cluster = f"sbf: cluster {story.file}: "
    for asked, begins in (
        ("no token", f"{cluster}requires a token; "),
        ("wrong token", f"{cluster}refuses the token; "),
        ("no job", f"sbf: job nobody: does not exist at {story.file}; there are: digits-"),
    ):
        code, output = story.seen[asked]
        assert code == 2, output
        assert output.startswith(begins), output
        assert output.count("\n") == 1, output
        assert "another" not in output


def test_dashboard_and_mlflow_listen_on_loopback_alone(story: Story) -> None:
    for port in (8265, 5000):
        found = [a for a, p, _ in story.seen["listeners"]["head"] if p == port]
        assert found == ["127.0.0.1"], port


def test_the_workers_own_sockets_listen_at_the_nodes_address(story: Story) -> None:
    for name in ("one", "two"):
        found = [a for a, _, who in story.seen["listeners"][name] if "RayTrainWo" in who]
        # Ray's own listens everywhere, and asks for the token.
        assert sorted(set(found)) == ["*", story.network[name].address], found
        assert found.count("*") == 1


def test_a_cluster_that_is_down_leaves_no_process_of_ray(story: Story) -> None:
    deadline = time.monotonic() + 4 * MINUTES
    for name in ("head", "one", "two"):
        while "raylet" in (running := story.network[name].run("ps", "axo", "args")):
            assert name != "head", running
            assert time.monotonic() < deadline, running  # they have lost their head
            time.sleep(1)
