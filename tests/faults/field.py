"""The group under test, as an operator reaches it: commands in hosts, roles, waiting."""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import yaml
from tests.lab.umbra_lab import hosts, plan
from tests.lab.umbra_lab.paths import Lab
from tests.lab.umbra_lab.shell import LabError

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "tests" / "lab" / "lab"
INVENTORY = ROOT / "inventories" / "lab"
INVENTORY_THREE = ROOT / "tests" / "integration" / "three" / "inventory"
"""The inventory of three mail hosts, without a witness."""


def _hosts(inventory: Path, group: str) -> dict[str, str]:
    """Return the addresses of a group's hosts by name."""
    groups = yaml.safe_load((inventory / "hosts.yml").read_text())
    hosts = groups.get(group, {}).get("hosts", {})
    return {name: host["ansible_host"] for name, host in hosts.items()}


_mail = yaml.safe_load((INVENTORY / "group_vars" / "all" / "mailboxes.yml").read_text())
ADDRESSES = _hosts(INVENTORY, "umbra_nodes")
NODES = tuple(ADDRESSES)
(WITNESS,) = _hosts(INVENTORY, "umbra_witness")
(CLIENT,) = _hosts(INVENTORY, "umbra_outside")
PASSWORD: str = _mail["lab_password"]
MAILBOXES: tuple[str, ...] = tuple(item["address"] for item in _mail["mail_server_mailboxes"])

Value = TypeVar("Value")

# Runs on a host: what its agent reports. umbractl does the same, but takes long to start.
_STATUS = """
import socket
agent = socket.socket(socket.AF_UNIX)
agent.settimeout(3)
agent.connect("/run/umbra/api.sock")
agent.sendall(b"GET /status HTTP/1.0\\r\\n\\r\\n")
print(agent.makefile("rb").read().partition(b"\\r\\n\\r\\n")[2].decode())
"""


class FieldError(Exception):
    """The hosts are not as the trial needs them; one sentence."""


class Field:
    """A lab and who is primary in it now.

    :param inventory: what its group was set up with.
    """

    def __init__(self, lab: str, inventory: Path = INVENTORY) -> None:
        self.name = lab
        self._lab = Lab(lab)
        self.addresses = _hosts(inventory, "umbra_nodes")
        self.nodes = tuple(self.addresses)
        self.voters = (*self.nodes, *_hosts(inventory, "umbra_witness"))
        self.primary, self.shadow = self.nodes[:2]
        self.since = ""
        """When the trial began, as the agents write times."""

    def lab(self, *words: str, timeout: float = 240) -> None:
        """Run the lab's own command."""
        _run([str(LAB), "--name", self.name, *words], "lab", words, timeout=timeout)

    def enter(self, host: str, *command: str) -> list[str]:
        """Return the command that runs a command in a host, as `lab exec` does, but at once."""
        try:
            return hosts.enter_command(self._lab, plan.host(host), list(command))
        except (LabError, OSError, KeyError) as error:
            raise FieldError(f"{host} cannot be entered: {error}") from None

    def call(
        self,
        host: str,
        *command: str,
        text: str | None = None,
        timeout: float = 60,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a host."""
        entered = self.enter(host, *command)
        return _run(entered, host, command, text=text, timeout=timeout, check=check)

    def run(
        self,
        host: str,
        script: str,
        *values: object,
        text: str | None = None,
        timeout: float = 60,
        check: bool = True,
    ) -> str:
        """Run a shell script in a host and return what it prints; values are its $1, $2, ..."""
        words = ["sh", "-c", script, "sh", *map(str, values)]
        return self.call(host, *words, text=text, timeout=timeout, check=check).stdout

    def start(self, host: str, *command: str) -> subprocess.Popen[str]:
        """Start a command in a host and go on."""
        return subprocess.Popen(
            self.enter(host, *command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def status(self, node: str) -> dict[str, Any] | None:
        """The group as a node's agent sees it; None if that node does not answer."""
        try:
            done = self.call(node, "python3", "-IS", "-c", _STATUS, timeout=10, check=False)
            return dict(json.loads(done.stdout)) if done.returncode == 0 else None
        except (FieldError, ValueError):
            return None

    def protected(self) -> bool:
        """Whether every node says that the group is protected, and agrees on who is primary."""
        with ThreadPoolExecutor() as pool:
            seen = list(pool.map(self.status, self.nodes))
        known = [status for status in seen if status and status["protected"]]
        if len(known) < len(seen) or len({status["primary"] for status in known}) != 1:
            return False
        primary = known[0]["primary"]
        (leading,) = (status for status in known if status["node"] == primary)
        others = [node["node"] for node in leading["nodes"] if node["node"] != primary]
        shadows = leading["protected_set"] or others
        if not all(node["reachable"] for node in leading["nodes"]):
            return False
        self.primary, self.shadow = primary, shadows[0]
        return True

    @property
    def follower(self) -> str:
        """The shadow of a group of three that changes do not wait for."""
        (name,) = set(self.nodes) - {self.primary, self.shadow}
        return name

    def why(self) -> str:
        """What the nodes say instead, for a report."""
        seen = {node: self.status(node) for node in self.nodes}
        return "; ".join(
            f"{node}: {', '.join(status['reasons']) or 'protected' if status else 'no answer'}"
            for node, status in seen.items()
        )

    def wait_protected(self, seconds: float) -> float:
        """Wait for that and return how long it took."""
        began = time.monotonic()
        wait(self.protected, seconds, lambda: f"the group is not protected: {self.why()}")
        return time.monotonic() - began


def _run(
    command: Sequence[str],
    where: str,
    words: Sequence[str],
    *,
    text: str | None = None,
    timeout: float,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    shown = f"`{where} {shlex.join(words)[:200]}`"
    try:
        done = subprocess.run(
            command, input=text or "", capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise FieldError(f"{shown} took over {timeout:g} s") from None
    if check and done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-400:]
        raise FieldError(f"{shown} gave {done.returncode}: {said}")
    return done


def wait(condition: Callable[[], Value], seconds: float, sentence: Callable[[], str]) -> Value:
    """Wait until a condition holds; FieldError with a sentence if it does not in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise FieldError(f"After {seconds:g} s {sentence()}.")
        time.sleep(0.2)
    return value
