"""A role's own tasks and handlers, run on this machine against programs that only play a part."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[3]
PATHS = re.compile(r"(?<![\w}.])/(etc|run|usr/lib|usr/sbin|var/lib)/")
SYSTEMD = "ansible.builtin.systemd_service"


class Stage:
    """A copy of a role in which all paths lead to ``root`` and systemd is a program of ours."""

    def __init__(self, root: Path, role: str) -> None:
        self.root, self.role = root, role
        collection = root / "collections" / "ansible_collections" / "umbra" / "mail"
        collection.parent.mkdir(parents=True)
        collection.symlink_to(ROOT)  # for its filters
        for source in (ROOT / "roles" / role).rglob("*"):
            place = source.relative_to(ROOT / "roles")
            if source.is_file() and place.parts[1] in ("defaults", "vars", "templates"):
                self.write(f"roles/{place}", PATHS.sub(rf"{root}/\1/", source.read_text()))
            elif source.is_file() and place.parts[1] in ("tasks", "handlers"):
                tasks = yaml.safe_load(PATHS.sub(rf"{root}/\1/", source.read_text()))
                text = yaml.safe_dump([_without_root(task) for task in tasks], sort_keys=False)
                self.write(f"roles/{place}", text)

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def program(self, name: str, script: str) -> None:
        """Have a program note its arguments in ``calls``, then do what ``script`` says."""
        head = f'#!/bin/sh\ncd {self.root}\necho "${{0##*/}} $*" >> calls\n'
        self.write(name, head + script).chmod(0o755)

    def calls(self, *words: str) -> list[str]:
        """Return what was called since the last time, of the lines that have one of ``words``."""
        path = self.root / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line for line in lines if set(words) & set(line.split())]

    def play(
        self, hosts: list[str], tasks: list[str], variables: dict[str, Any], *options: str
    ) -> tuple[int, str]:
        """Run files of tasks on all ``hosts``; return the exit status and what was printed."""
        rows = {
            host: {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
            for host in hosts
        }
        inventory = self.write("hosts.json", json.dumps({"all": {"hosts": rows}}))
        steps = [
            {"ansible.builtin.import_role": {"name": self.role, "tasks_from": name}}
            for name in tasks
        ]
        play = [{"hosts": "all", "gather_facts": False, "tasks": steps}]
        playbook = self.write("play.yml", yaml.safe_dump(play))
        program = str(Path(sys.executable).parent / "ansible-playbook")
        done = subprocess.run(
            [program, "-i", inventory, playbook, "-e", json.dumps(variables), *options],
            cwd=self.root,
            env={
                **os.environ,
                "PATH": f"{self.root}/bin:{self.root}/usr/sbin:{os.environ['PATH']}",
                "ANSIBLE_HOME": f"{self.root}/ansible",
                "ANSIBLE_COLLECTIONS_PATH": f"{self.root}/collections",
                "ANSIBLE_ROLES_PATH": f"{self.root}/roles",
                "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",  # which folds no lines
                "ANSIBLE_PIPELINING": "1",
                "ANSIBLE_NOCOLOR": "1",
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
        return done.returncode, done.stdout + done.stderr


def _without_root(task: dict[str, Any]) -> dict[str, Any]:
    """Return a task that needs neither root nor systemd."""
    task = {
        key: {k: v for k, v in value.items() if k not in ("owner", "group")}
        if key.startswith("ansible.builtin.") and isinstance(value, dict)
        else value
        for key, value in task.items()
    }
    if unit := task.pop(SYSTEMD, None):
        argv = ["systemctl", unit.get("state", "daemon-reload"), unit.get("name", "")]
        task["ansible.builtin.command"] = {"argv": argv}
        task |= {"changed_when": False, "check_mode": False}
    return task
