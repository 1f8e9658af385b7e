"""Starting the relay and changing its settings while it runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import cgroups, links
from .paths import Lab, locked, write_atomically
from .shell import LabError


def _cgroup(lab: Lab) -> str:
    return f"{lab.cgroup}/wan"


def is_running(lab: Lab) -> bool:
    """Whether the relay's process lives."""
    return cgroups.is_populated(_cgroup(lab))


def start(lab: Lab) -> None:
    """Start the relay if it is not there, and return when it carries packets."""
    if is_running(lab):
        return
    if not lab.wan_settings.exists():
        write_atomically(lab.wan_settings, json.dumps(links.dump(links.uniform(links.Settings()))))
    procs = cgroups.make(_cgroup(lab)) / "cgroup.procs"
    # A network is not slowed by the hosts' work: the relay goes before it.
    script = f'echo $$ >{procs}; exec nice -n -10 "$@"'
    with (lab.dir / "wan.log").open("ab") as log:
        process = subprocess.Popen(
            ["sh", "-c", script, "sh", sys.executable, "-m", "umbra_lab.relay", lab.name],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
            start_new_session=True,
        )
    deadline = time.monotonic() + 10
    while True:
        try:
            apply(lab)
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise LabError(f"The WAN's relay did not start; see {lab.dir}/wan.log.") from error
            time.sleep(0.02)


def stop(lab: Lab) -> None:
    """Kill the relay."""
    cgroups.kill(_cgroup(lab))


def settings(lab: Lab) -> links.Table:
    """The settings in force."""
    try:
        return links.load(json.loads(lab.wan_settings.read_text()))
    except FileNotFoundError as error:
        raise LabError(f"There is no lab {lab.name!r}: run `lab --name {lab.name} up`.") from error


def apply(lab: Lab) -> dict[str, Any]:
    """Have the relay read its settings, and return its counters; OSError if it is not there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(5)
        connection.connect(str(lab.wan_socket))
        answer: dict[str, Any] = json.loads(connection.recv(65536))
    if "error" in answer:
        raise LabError(f"The WAN's relay refused its settings: {answer['error']}")
    return answer


def change(lab: Lab, pairs: list[tuple[str, str]], **changes: Any) -> None:
    """Change settings of some pairs; in force when this returns."""
    with locked(lab.dir / "wan.lock", "Waiting for another change of the WAN."):
        table = settings(lab)
        try:
            table |= {pair: replace(table[pair], **changes) for pair in pairs}
        except ValueError as error:
            raise LabError(str(error)) from error
        write_atomically(lab.wan_settings, json.dumps(links.dump(table)))
        try:
            apply(lab)
        except OSError as error:
            raise LabError("The WAN's relay does not answer: run `lab up`.") from error
