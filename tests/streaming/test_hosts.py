"""Two hosts for real: two network namespaces with addresses of their own, over ssh and without it.

The commands are those of docs/streaming.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import training_tools as tools
from cache_tools import conversation_rows

from deepspec.checkpoints import steps_of
from deepspec.data.conversations import write_conversations

pytestmark = pytest.mark.slow
ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "deepspec0"  # of the same name on both hosts, as gloo wants it
SSH_PORT, SERVER_PORT, MASTER_PORT = 2277, 8100, 29511
SECRET = "of-a-test"
BIN = Path(sys.executable).parent


def system(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")


@dataclass(frozen=True)
class Hosts:
    """Two namespaces that see each other and nothing else."""

    folder: Path
    names: tuple[str, str]

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join((str(self.folder / "bin"), str(BIN), os.environ["PATH"]))
        own = {"PATH": path, "DEEPSPEC_SERVER_TOKEN": SECRET, "GLOO_SOCKET_IFNAME": INTERFACE}
        return tools.own_environment() | own | {"DS_ENV_FILE": str(self.folder / "deepspeed_env")}

    def start(self, host: int, *words: str, log: str) -> subprocess.Popen[bytes]:
        with open(self.folder / log, "wb") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *words], cwd=tools.ROOT, env=self.environment(), stdout=file,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    def log(self, name: str) -> str:
        return (self.folder / name).read_text()


def make_hosts(folder: Path, stack: ExitStack) -> Hosts:
    """Two namespaces, a cable between them, an ssh server in each with keys of this test.

    Raises:
        OSError: this machine does not let the process make them.
    """
    names = (f"deepspec-{os.getpid()}-1", f"deepspec-{os.getpid()}-2")
    for name in names:
        system("ip", "netns", "add", name)
        stack.callback(system, "ip", "netns", "del", name)
    system("ip", "-n", names[0], "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", names[1])
    for name, address in zip(names, ADDRESSES, strict=True):
        system("ip", "-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
        for link in (INTERFACE, "lo"):
            system("ip", "-n", name, "link", "set", link, "up")
    for key in ("host", "user"):
        system("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    (folder / "bin").mkdir()
    program, options = folder / "bin" / "ssh", f"-i {folder / 'user'} -o IdentitiesOnly=yes -o LogLevel=ERROR"
    options += " -F none -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
    program.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {options} "$@"\n')
    program.chmod(0o755)
    (folder / "hosts").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    (folder / "deepspeed_env").write_text(f"DEEPSPEC_SERVER_TOKEN={SECRET}\nGLOO_SOCKET_IFNAME={INTERFACE}\n")
    hosts = Hosts(folder, names)
    Path("/run/sshd").mkdir(exist_ok=True)
    for host, address in enumerate(ADDRESSES):
        settings = {
            "Port": SSH_PORT, "ListenAddress": address, "HostKey": folder / "host", "PidFile": "none",
            "AuthorizedKeysFile": folder / "user.pub", "StrictModes": "no", "UsePAM": "no",
            "PasswordAuthentication": "no", "PermitRootLogin": "yes",
        }  # fmt: skip
        path = folder / f"sshd{host}"
        path.write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
        process = hosts.start(host, str(shutil.which("sshd")), "-D", "-e", "-f", str(path), log=f"sshd{host}.log")
        stack.callback(process.wait)
        stack.callback(process.kill)
    return hosts


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    missing = [name for name in ("ip", "sshd", "pdsh", "ssh-keygen") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (iproute2, openssh-server, pdsh)")
    with ExitStack() as stack:
        try:
            made = make_hosts(tmp_path_factory.mktemp("hosts"), stack)
        except OSError as problem:
            pytest.skip(f"no network namespaces here: {problem}")
        yield made


def wait_for(what: Callable[[], bool], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def recipes(hosts: Hosts) -> Iterator[Callable[[str], Path]]:
    """Recipes that train from a feature server on the second host."""
    folder = hosts.folder
    target = tools.make_talking_target(folder / "target")
    write_conversations(folder / "data.jsonl", conversation_rows(24), {"made by": "a test"})

    def make(name: str) -> Path:
        data = {
            "max_length": 96, "min_supervised": 4, "conversations": str(folder / "data.jsonl"), "source": "served",
            "servers": [f"http://{ADDRESSES[1]}:{SERVER_PORT}"],
        }  # fmt: skip
        return tools.write_recipe(folder / name, target, data=data, max_steps=6, save_every=3)

    words = ("serve-features", "--recipe", str(make("server")), "--host", ADDRESSES[1], "--port", str(SERVER_PORT))
    server = hosts.start(1, sys.executable, "-m", "deepspec", *words, log="server.log")
    try:
        wait_for(lambda: server.poll() is not None or "serves hidden states" in hosts.log("server.log"))
        assert server.poll() is None, hosts.log("server.log")
        yield make
    finally:
        server.kill()
        server.wait()


def losses(recipe: Path) -> list[float]:
    rows = tools.log_of(recipe.parent / "run")
    assert [row["step"] for row in rows] == list(range(1, 7))
    return [row["loss"] for row in rows]


def alone(hosts: Hosts, recipe: Path) -> list[float]:
    """One process on the first host."""
    process = hosts.start(0, sys.executable, "launch/train.py", "--recipe", str(recipe), log="alone.log")
    assert process.wait(600) == 0, hosts.log("alone.log")[-3000:]
    return losses(recipe)


@pytest.fixture(scope="module")
def wanted(hosts: Hosts, recipes: Callable[[str], Path]) -> list[float]:
    return alone(hosts, recipes("alone"))


def test_two_hosts_over_ssh_train_as_one_process_which_continues_from_their_checkpoint(
    hosts: Hosts, recipes: Callable[[str], Path], wanted: list[float]
) -> None:
    recipe, hostfile = recipes("ssh"), str(hosts.folder / "hosts")
    words = ["--hostfile", hostfile, "--ssh_port", str(SSH_PORT), "launch/train.py", "--recipe", str(recipe)]
    process = hosts.start(0, "deepspeed", *words, log="ssh.log")
    assert process.wait(600) == 0, hosts.log("ssh.log")[-3000:]
    assert all(f"{address}: " in hosts.log("ssh.log") for address in ADDRESSES)
    assert "dist_world_size=2" in hosts.log("ssh.log")
    assert losses(recipe) == pytest.approx(wanted, abs=1e-5)
    shutil.rmtree(steps_of(recipe.parent / "run")[6])
    assert alone(hosts, recipe) == pytest.approx(wanted, abs=1e-5)
    assert "resuming" in hosts.log("alone.log")


def test_two_hosts_without_ssh_continue_from_the_checkpoint_of_one_process_as_it_would(
    hosts: Hosts, recipes: Callable[[str], Path], wanted: list[float]
) -> None:
    recipe = recipes("no_ssh")
    shutil.copytree(recipe.parent.parent / "alone" / "run", recipe.parent / "run")
    shutil.rmtree(steps_of(recipe.parent / "run")[6])
    words = ["--hostfile", str(hosts.folder / "hosts"), "--no_ssh", "--master_addr", ADDRESSES[0]]
    words += ["--master_port", str(MASTER_PORT)]
    script = ["launch/train.py", "--recipe", str(recipe)]
    processes = [
        hosts.start(host, "deepspeed", *words, "--node_rank", str(host), *script, log=f"host{host}.log")
        for host in (0, 1)
    ]
    ends = [process.wait(600) for process in processes]
    assert ends == [0, 0], hosts.log("host0.log")[-2000:] + hosts.log("host1.log")[-2000:]
    assert "resuming" in hosts.log("host0.log")
    assert losses(recipe) == pytest.approx(wanted, abs=1e-5)
