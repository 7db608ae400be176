"""Hosts for tests: namespaces of this machine, each with its own address, processes, /tmp.

Everything lies in namespaces that have no name: when their first processes end, which they do with
the test, however that ends, the kernel takes addresses, links, mounts and processes away.
"""

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

NETWORK = "10.77.0"
LAPTOP = f"{NETWORK}.254"  # of the machine whose user starts a cluster; the others' way out
USER = "root"
HOME = "/tmp/home"
START_SECONDS = 120.0
PROGRAMS = ("ip", "nsenter", "rsync", "setpriv", "ssh", "ssh-keygen", "unshare")
SSHD = "/usr/sbin/sshd"


def missing() -> str | None:
    """Return why there can be no hosts here, or None."""
    if os.geteuid() != 0:
        return "needs root: hosts are namespaces"
    programs = [name for name in PROGRAMS if shutil.which(name) is None]
    programs += [] if Path(SSHD).exists() else [SSHD]
    if programs:
        return f"needs {', '.join(programs)} (Debian: openssh-server, iproute2, rsync)"
    command = ["unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--mount-proc"]
    command += [
        "sh",
        "-c",
        "ip link add name v0 type veth peer name v1 && mount -t tmpfs none /mnt",
    ]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


@dataclass(frozen=True)
class Host:
    """A machine: `inner` is its first process, `outer` that one's parent, `log` what it says."""

    name: str
    address: str
    outer: int
    inner: int
    log: Path

    def command(self, *arguments: str) -> list[str]:
        """Return the command line that runs `arguments` in this host, in the same folder."""
        spaces = ["--net", "--pid", "--mount", "--uts", "--ipc"]
        folder = ["env", f"--chdir={Path.cwd()}", f"HOME={HOME}"]
        return ["nsenter", "--target", str(self.inner), *spaces, "--", *folder, *arguments]

    def run(self, *arguments: str) -> str:
        """Return what a command prints here, which must succeed."""
        done = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, timeout=240, check=True
        )
        return done.stdout

    def cut_off(self) -> None:
        """Take the cable out."""
        self.run("ip", "link", "set", "eth0", "down")

    def connect(self) -> None:
        """Put the cable back."""
        self.run("ip", "link", "set", "eth0", "up")
        self.run("ip", "route", "replace", "default", "via", LAPTOP)

    def crash(self) -> None:
        """End all processes at once, but for sshd."""
        self.run("bash", "-c", "kill -KILL -1")

    def listeners(self) -> list[tuple[str, int, str]]:
        """Return address, port and program of all TCP sockets that listen here."""
        found = []
        for line in self.run("ss", "-Hltnp").splitlines():
            _, _, _, local, _, *program = line.split()
            address, _, port = local.rpartition(":")
            found.append((address.strip("[]"), int(port), " ".join(program)))
        return found


@contextmanager
def network(names: Sequence[str], folder: Path, seen: Sequence[Path]) -> Iterator[dict[str, Host]]:
    """Start hosts of these names on one wire, and a `laptop`; an sshd listens on each.

    `folder`/key opens SSH for USER. The hosts see this machine's files, but for /tmp, /run,
    /dev/shm and the home folder, which are empty; of /tmp they see `folder` and the folders `seen`.
    """
    _keys(folder)
    with ExitStack() as started:
        laptop = _start("laptop", LAPTOP, folder, seen, started)
        _ip(laptop, "link add name wire type bridge")
        _ip(laptop, f"addr add {LAPTOP}/24 dev wire")
        _ip(laptop, "link set wire up")
        hosts = {"laptop": laptop}
        for number, name in enumerate(names, start=1):
            host = _start(name, f"{NETWORK}.{number}", folder, seen, started)
            _ip(laptop, f"link add name {name} type veth peer name eth0 netns {host.outer}")
            _ip(laptop, f"link set {name} master wire up")
            _ip(host, f"addr add {host.address}/24 dev eth0")
            host.connect()
            hosts[name] = host
        for name in names:
            _wait_for_sshd(hosts[name])
        yield hosts


def _start(name: str, address: str, folder: Path, seen: Sequence[Path], started: ExitStack) -> Host:
    """Start a host whose network has no link yet."""
    script = folder / f"{name}.sh"
    script.write_text(_set_up(name, folder, [folder, *seen]))
    log = folder / f"{name}.log"
    # The parent dies with this process, and its child with it.
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--pid", "--mount", "--uts"]
    command += ["--ipc", "--fork", "--kill-child", "--mount-proc", "bash", str(script)]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    started.callback(_end, process)
    deadline = time.monotonic() + START_SECONDS
    while not (folder / f"{name}.ready").exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, f"{name} has not started: {log.read_text()}"
        time.sleep(0.05)
    (inner,) = psutil.Process(process.pid).children()
    return Host(name, address, process.pid, inner.pid, log)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


def _set_up(name: str, folder: Path, seen: Sequence[Path]) -> str:
    """Return the script that is a host's first process, which becomes its sshd."""
    hidden = [path.resolve() for path in seen if path.resolve().is_relative_to("/tmp")]
    q = {path: shlex.quote(str(path)) for path in hidden}
    lines = ["set -e", f"hostname {name}", "ip link set lo up", "mount -t tmpfs none /mnt"]
    for number, path in enumerate(hidden):
        lines += [f"mkdir /mnt/{number}", f"mount --rbind {q[path]} /mnt/{number}"]
    lines += ["mount -t tmpfs -o mode=1777 none /tmp"]
    for number, path in enumerate(hidden):
        lines += [f"mkdir -p {q[path]}", f"mount --rbind /mnt/{number} {q[path]}"]
    lines += [
        "umount -R -l /mnt",
        "mount -t tmpfs none /run",
        "mkdir -p /run/sshd",
        "mount -t tmpfs -o mode=1777 none /dev/shm",
        f"mkdir -m 700 {HOME}",
        # Only here does ~ of sshd, and of programs that ask for it, lie in HOME.
        f"sed 's|^\\({USER}:[^:]*:[^:]*:[^:]*:[^:]*\\):[^:]*:.*|\\1:{HOME}:/bin/bash|' /etc/passwd "
        "> /tmp/passwd",
        "mount --bind /tmp/passwd /etc/passwd",
        # As Debian writes it: the name of a machine is an address that no other machine reaches.
        f"printf '127.0.0.1 localhost\\n127.0.1.1 {name}\\n' > /tmp/hosts-file",
        "mount --bind /tmp/hosts-file /etc/hosts",
        f"touch {shlex.quote(str(folder))}/{name}.ready",
        f"exec {SSHD} -D -e -f {shlex.quote(str(folder))}/sshd_config",
    ]
    return "\n".join(lines) + "\n"


def _keys(folder: Path) -> None:
    """Write the user's key, the hosts' key and the settings of their sshd."""
    for key in ("key", "host_key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True
        )
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/key.pub\n"
        "PasswordAuthentication no\nStrictModes no\nUsePAM no\nPidFile none\nMaxStartups 100\n"
    )


def _ip(host: Host, arguments: str) -> None:
    host_network = ["nsenter", "--target", str(host.outer), "--net"]
    subprocess.run([*host_network, "ip", *arguments.split()], check=True, timeout=120)


def _wait_for_sshd(host: Host) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not any(port == 22 for _, port, _ in host.listeners()):
        assert time.monotonic() < deadline, f"{host.name}: no sshd: {host.log.read_text()}"
        time.sleep(0.1)
