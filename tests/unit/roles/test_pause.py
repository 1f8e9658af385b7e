"""Automatic failover is paused while a run restarts an agent, and not for longer."""

from __future__ import annotations

import json
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from tests.unit.roles.stage import Stage

UNIT = "etc/systemd/system/umbra-agent.service"
NOW = "date -u '+%a %F %T.%6N UTC'"
HELPER = "etc/systemd/system/umbra-helper.service"
WHOLE = ["umbractl pause", "systemctl restarted umbra-agent.service", "umbractl unpause"]


class Api(socketserver.ThreadingUnixStreamServer):
    """The agent, as far as the role asks it."""

    daemon_threads = True
    status: dict[str, object]
    root: Path


class Answer(BaseHTTPRequestHandler):
    server: Api

    def do_GET(self) -> None:
        paused = (self.server.root / "paused").exists()
        text = json.dumps({**self.server.status, "paused": paused}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def address_string(self) -> str:
        return "local"


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage(tmp_path, "replication_agent")
    stage.program(
        "bin/umbractl",
        "if test -e no-majority; then echo 'umbractl: no majority' >&2; exit 1; fi\n"
        'case "$1" in pause) touch paused ;; unpause) rm -f paused ;; esac',
    )
    stage.program(
        "bin/systemctl",
        f'case "$*" in restarted*agent*) test ! -e broken && {NOW} > since ;;'
        f" restarted*helper*) {NOW} > helper ;; show*helper*) cat helper ;;"
        " show*) cat since ;; esac",
    )
    stage.program("usr/lib/umbra/umbra-agent", "test ! -e refused")
    written = ("sbin/umbractl", "lib/umbra/umbra-helper", "lib/umbra/.umbra-1/daemon.py")
    settings = ("etc/umbra/agent.yml", "etc/umbra/notify.token", UNIT, HELPER)
    for name in (*(f"usr/{name}" for name in written), *settings):
        stage.write(name, "")
    stage.write("etc/umbra/tls/peers/b.crt", "")
    (tmp_path / "usr/lib/umbra/umbra").symlink_to(".umbra-1")
    (tmp_path / "var/lib").mkdir(parents=True)
    for name in ("since", "helper"):
        stage.write(name, subprocess.check_output(NOW, shell=True, text=True))
    stage.write(
        "roles/replication_agent/tasks/change.yml",
        "[{ansible.builtin.debug: {}, changed_when: true, notify: Restart the agent}]",
    )
    # A socket's whole path is 107 characters at most.
    monkeypatch.chdir(tmp_path)
    return stage


@pytest.fixture
def api(stage: Stage) -> Iterator[Api]:
    (stage.root / "run/umbra").mkdir(parents=True)
    with Api("run/umbra/api.sock", Answer) as api:
        api.root = stage.root
        api.status = {"coordinator": "etcd", "primary": "a"}
        thread = threading.Thread(target=api.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield api
        api.shutdown()
        thread.join()


def run(stage: Stage, *, change: bool = False) -> tuple[int, list[str]]:
    """Run the role's end; return its status and what it had done to the agent, in order."""
    variables = {"replication_agent_coordinator": "etcd", "replication_agent_start_timeout": 1}
    code, text = stage.play(["a"], ["change"] * change + ["service"], variables)
    assert "unreachable=0" in text, text
    calls = stage.calls("umbractl", "restarted")
    assert ("changed=0" in text) is (calls == [] and code == 0), text
    return code, [call for call in calls if "helper" not in call]


def is_paused(stage: Stage) -> bool:
    return (stage.root / "paused").exists()


def test_a_restart_is_within_a_pause(stage: Stage, api: Api) -> None:
    assert run(stage, change=True) == (0, WHOLE)
    assert not is_paused(stage)
    assert run(stage) == (0, [])


def test_what_an_operator_has_paused_stays_paused(stage: Stage, api: Api) -> None:
    stage.write("paused", "")
    assert run(stage, change=True) == (0, WHOLE[1:2])
    assert is_paused(stage)
    assert run(stage) == (0, [])


def test_a_pause_ends_with_the_run_that_follows_one_that_broke_off(stage: Stage, api: Api) -> None:
    stage.write("broken", "")
    assert run(stage, change=True) == (2, WHOLE[:2])
    assert is_paused(stage)
    (stage.root / "broken").unlink()
    assert run(stage) == (0, WHOLE[1:])
    assert not is_paused(stage)
    assert run(stage) == (0, [])


def test_an_agent_that_would_find_no_voters_is_not_restarted(stage: Stage, api: Api) -> None:
    stage.write("no-majority", "")
    assert run(stage, change=True) == (2, WHOLE[:1])
    assert run(stage) == (2, WHOLE[:1])
    (stage.root / "no-majority").unlink()
    assert run(stage) == (0, WHOLE)
    assert run(stage) == (0, [])


@pytest.mark.parametrize("status", [{"coordinator": "static", "primary": "a"}, {"primary": None}])
def test_where_there_is_nothing_to_pause(stage: Stage, api: Api, status: dict[str, object]) -> None:
    api.status |= status
    stage.write("no-majority", "")
    assert run(stage, change=True) == (0, WHOLE[1:2])


def test_what_a_run_has_written_and_did_not_live_to_apply_is_due(stage: Stage, api: Api) -> None:
    stage.write("usr/lib/umbra/umbra/daemon.py", "new")
    stage.write("refused", "")
    assert run(stage) == (2, [])
    (stage.root / "refused").unlink()
    assert run(stage) == (0, WHOLE)
    stage.write("usr/lib/umbra/umbra/__pycache__/daemon.pyc", "the agent's own")
    assert run(stage) == (0, [])
    for name in (
        "etc/umbra/agent.yml",
        "etc/umbra/notify.token",
        "etc/umbra/tls/peers/b.crt",
        UNIT,
    ):
        stage.write(name, "new")
    assert run(stage) == (0, WHOLE)


@pytest.mark.parametrize("name", [HELPER, "usr/lib/umbra/umbra/daemon.py"])
def test_a_helper_that_runs_on_with_the_old_is_restarted(stage: Stage, api: Api, name: str) -> None:
    stage.write(name, "new")
    # The agent was restarted since, the helper was not.
    stage.write("since", subprocess.check_output(NOW, shell=True, text=True))
    variables = {"replication_agent_coordinator": "static"}
    stage.play(["a"], ["service"], variables)
    units = ["systemctl restarted umbra-helper.service", "systemctl restarted umbra-agent.service"]
    assert stage.calls("daemon-reload", "restarted") == ["systemctl daemon-reload ", *units]
    assert run(stage) == (0, [])
