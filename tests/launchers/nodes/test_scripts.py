"""The shell of clusters: what shellcheck says of it, and what it does, with doubles of programs."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
NODES = ROOT / "launchers" / "nodes"
SCRIPTS = sorted([*ROOT.glob("launchers/**/*.sh"), *ROOT.glob("launchers/*.sbatch")])
SECTIONS = re.compile(r"(.*_commands)")


def commands() -> list[tuple[str, str]]:
    """All commands of the files for `ray up`, each with where it stands."""
    found = []
    for file in [ROOT / "cluster.yaml", *ROOT.glob("launchers/cluster-*.yaml")]:
        config = yaml.safe_load(file.read_text())
        for section in filter(SECTIONS.fullmatch, config):
            found += [(f"{file.name}:{section}", command) for command in config[section]]
    return found


def shellcheck(*arguments: object, text: str = "") -> str:
    program = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [program, *map(str, arguments)], input=text, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


@pytest.fixture
def machine(tmp_path):
    """A checkout and a home on a machine whose programs write down how they are called."""
    return Machine(tmp_path)


class Machine:
    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.checkout = folder / "checkout"
        self.called = folder / "called"
        self.programs = folder / "bin"
        for new in (self.home, self.checkout / "sbf_dist", self.checkout / "launchers"):
            new.mkdir(parents=True)
        self.programs.mkdir()
        self.called.touch()
        (self.checkout / "launchers" / "nodes").symlink_to(NODES)

    def program(self, name: str, body: str = "") -> None:
        file = self.programs / name
        file.write_text(f'#!/bin/bash\necho "{name} $*" >> {self.called}\n{body}\n')
        file.chmod(0o755)

    def run(self, command: str) -> str:
        environment = {
            "HOME": str(self.home),
            "PATH": f"{self.programs}:/usr/bin:/bin",
            "USER": "somebody",
        }
        done = subprocess.run(
            ["bash", "-c", command], env=environment, cwd=self.home, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def calls(self) -> list[str]:
        return self.called.read_text().splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing_in_the_scripts(script):
    assert shellcheck("-x", "-P", ROOT, script) == ""


@pytest.mark.parametrize(("place", "command"), commands())
def test_shellcheck_finds_nothing_in_the_commands_of_cluster_files(place, command):
    # SC1090: files on the machine; SC2154: what Ray sets before the command.
    assert shellcheck("-s", "bash", "-e", "SC1090,SC1091,SC2154", "-", text=command) == ""


def test_the_environment_names_the_built_extension_and_asks_for_the_token(machine):
    built = machine.checkout / "sbf_dist" / "_C.cpython-311-x86_64-linux-gnu.so"
    built.touch()
    shown = machine.run(f"set -eu; . {machine.checkout}/launchers/nodes/environment.sh; env")
    values = dict(line.partition("=")[::2] for line in shown.splitlines())
    assert values["RAY_AUTH_MODE"] == "token"
    assert values["SBF_DIST_EXTENSION"] == str(built)
    assert values["PATH"].startswith(f"{machine.checkout}/.venv/bin:")
    assert int(values["OMP_NUM_THREADS"]) == len(os.sched_getaffinity(0))
    assert "checkout" not in values


@pytest.mark.parametrize(
    ("offered", "package", "compiler"),
    [
        (True, "gcc14-c++", "gcc14-g++"),  # Amazon Linux
        (False, "gcc-toolset-14-gcc-c++", ""),  # Rocky Linux
    ],
)
def test_the_set_up_builds_with_a_newer_compiler_and_guards_the_token(
    machine, offered, package, compiler
):
    machine.program("sudo", '"$@"')
    machine.program("dnf", f'if [ "$2" = list ]; then {str(offered).lower()}; fi')
    machine.program("make", f'echo "with ${{CXX:-}} by $PATH" >> {machine.called}')
    (machine.home / ".ray").mkdir()
    token = machine.home / ".ray" / "auth_token"
    token.write_text("0" * 64)
    token.chmod(0o644)
    for _ in range(2):
        machine.run(f"bash {machine.checkout}/launchers/nodes/setup.sh")
    made, how = machine.calls()[-2:]
    assert made == "make setup PYTHON=python3.11"
    assert how.startswith(f"with {compiler} by ")
    assert ("/opt/rh/gcc-toolset-14/root/usr/bin" in how) is not offered
    (install, _) = (call for call in machine.calls() if call.startswith("dnf install -y"))
    assert package in install.split()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    shells = (machine.home / ".bashrc").read_text().splitlines()
    assert shells == [f". {machine.checkout}/launchers/nodes/environment.sh"]


def test_the_buckets_name_comes_from_the_instance_by_its_token(machine):
    document = '{"accountId": "123456789012", "region": "eu-west-1"}'
    machine.program(
        "curl",
        f"""case "$*" in
        *"-X PUT"*"/latest/api/token"*"-ttl-seconds: "*) echo secret ;;
        *"X-aws-ec2-metadata-token: secret"*"instance-identity/document"*) echo '{document}' ;;
        *) exit 22 ;;
        esac""",
    )
    assert machine.run(f"bash {NODES}/aws_bucket.sh sbf") == "sbf-123456789012-eu-west-1\n"


def test_a_spot_instances_notice_is_told_to_ray(machine):
    machine.program("sleep")
    machine.program("ray", f'echo "RAY_ADDRESS=$RAY_ADDRESS $RAY_AUTH_MODE" >> {machine.called}')
    machine.program(
        "curl",
        f"""case "$*" in
        *"-X PUT"*) echo secret ;;
        *"X-aws-ec2-metadata-token: secret"*"/spot/instance-action")
            [ "$(grep -c instance-action {machine.called})" = 3 ] || exit 22  # there is none yet
            echo '{{"action": "terminate"}}' ;;
        *) exit 1 ;;
        esac""",
    )
    machine.run(f"bash {machine.checkout}/launchers/nodes/spot_notice.sh 192.0.2.7:6379")
    calls = machine.calls()
    assert calls.count("sleep 5") == 2
    assert calls[-1] == "RAY_ADDRESS=192.0.2.7:6379 token"
    drained = calls[-2]
    assert drained.startswith("ray drain-node --address=192.0.2.7:6379 ")
    assert "--reason=DRAIN_NODE_REASON_PREEMPTION" in drained
    assert '{"action": "terminate"}' in drained


def test_mlflow_is_a_service_of_systemd_on_the_loopback_address(machine):
    units = machine.home / "units"
    units.mkdir()
    machine.program(
        "sudo",
        f"""case "$1 $2" in
        "tee /etc/systemd/system/"*) cat > {units}/"${{2##*/}}" ;;
        "systemctl "*) : ;;
        *) exit 1 ;;
        esac""",
    )
    machine.program("curl")
    script = machine.checkout / "launchers" / "nodes" / "mlflow_server.sh"
    machine.run(f"bash {script} s3://bucket/mlflow")
    server = (units / "mlflow.service").read_text()
    assert "mlflow server --host 127.0.0.1 --port 5000" in server
    assert f"--backend-store-uri sqlite:///{machine.home}/mlflow/mlflow.db" in server
    assert "--artifacts-destination s3://bucket/mlflow\n" in server
    assert "\nRestart=always\n" in server
    # Before the server, the copy; it is saved again when the server stops, and by a timer.
    copy = f"{machine.home}/mlflow/mlflow.db s3://bucket/mlflow/mlflow.db\n"
    assert re.search(rf"\nExecStartPre=.*mlflow_database restore {re.escape(copy)}", server)
    assert re.search(rf"\nExecStopPost=.*mlflow_database save {re.escape(copy)}", server)
    assert (units / "mlflow-copy.service").read_text().endswith(f"mlflow_database save {copy}")
    assert "OnUnitActiveSec=5min" in (units / "mlflow-copy.timer").read_text()
    started = [call for call in machine.calls() if "systemctl" in call]
    assert started == [
        "sudo systemctl daemon-reload",
        "sudo systemctl enable mlflow.service",
        "sudo systemctl restart mlflow.service",
        "sudo systemctl enable --now mlflow-copy.timer",
    ]
