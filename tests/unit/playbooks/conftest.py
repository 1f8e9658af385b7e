"""Runs playbooks without a lab: against this machine, or as far as the first connection."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[3]
INVENTORY = """\
all:
  vars:
    vpn_overlay_subnet: 10.86.0.0/24
    # Nobody listens on this port, so a host that is connected to counts as down, at once.
    ansible_host: 127.0.0.1
    ansible_port: 1
umbra_nodes: {hosts: {mail-a: {umbra_role: primary}, mail-b: {umbra_role: shadow}}}
umbra_witness: {hosts: {witness: {}}}
umbra_outside: {hosts: {client: {}}}
"""


class Run(NamedTuple):
    """What a playbook came to."""

    code: int
    output: str

    @property
    def words(self) -> str:
        """The output with its line breaks and indents taken out."""
        return " ".join(self.output.split())

    @property
    def changed(self) -> bool:
        return "\nchanged: " in self.output


Play = Callable[..., Run]


@pytest.fixture(scope="session")
def collections(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection path on which the work tree is umbra.mail."""
    path = tmp_path_factory.mktemp("collections")
    (path / "ansible_collections" / "umbra").mkdir(parents=True)
    (path / "ansible_collections" / "umbra" / "mail").symlink_to(ROOT)
    return path


@pytest.fixture
def play(collections: Path, tmp_path: Path) -> Play:
    """Runs a playbook of the collection by name, or a text of one."""

    def run(playbook: str, *arguments: str, inventory: str = INVENTORY) -> Run:
        (tmp_path / "hosts.yml").write_text(inventory)
        if "\n" in playbook:
            (tmp_path / "play.yml").write_text(playbook)
            playbook = str(tmp_path / "play.yml")
        done = subprocess.run(
            [
                str(Path(sys.executable).with_name("ansible-playbook")),
                *("-i", str(tmp_path / "hosts.yml"), playbook, *arguments),
            ],
            cwd=tmp_path,
            env={
                **os.environ,
                "ANSIBLE_COLLECTIONS_PATH": str(collections),
                "ANSIBLE_LOCALHOST_WARNING": "false",
                "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
                "ANSIBLE_NOCOLOR": "1",
                "ANSIBLE_PIPELINING": "1",
            },
            capture_output=True,
            text=True,
            timeout=100,
        )
        return Run(done.returncode, done.stdout + done.stderr)

    return run
