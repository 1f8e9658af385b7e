"""A changed fence closes nothing on a node that serves before its agent opens it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.unit.roles.stage import Stage

PORTS = [25, 110, 143, 465, 587, 993, 995, 4190]
START = "--start-at-task=Ask the kernel which ports are closed, and which of them are open now"
LOAD = "systemctl reloaded umbra-fence.service"
RESTART = "systemctl restarted umbra-agent.service"


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    stage = Stage(tmp_path, "replication_agent")
    for name in ("etc/umbra", "etc/systemd/system"):
        (tmp_path / name).mkdir(parents=True)
    stage.program("usr/sbin/nft", 'case "$*" in -j*) cat table.json || exit 1 ;; esac')
    stage.program("usr/lib/umbra/umbra-agent", "")
    now = "date -u '+%a %F %T.%6N UTC'"
    stage.program(
        "bin/systemctl",
        f'case "$*" in *ReloadResult*) echo success ;; show*) cat since ;;'
        f" reloaded*) {now} > since ;; started*) test -e since || {now} > since ;; esac",
    )
    role = tmp_path / "roles/replication_agent/tasks"
    tasks = yaml.safe_load((role / "agent.yml").read_text())
    end = [task for task in tasks if "__replication_agent_fence_" in str(task.get("when"))]
    assert [task["tags"] for task in end] == [["always"], ["always"]]
    (role / "end.yml").write_text(yaml.safe_dump(end))
    return stage


def loaded(stage: Stage, *, serves: bool) -> None:
    """The table as nft prints it."""
    sets: list[dict[str, Any]] = [
        {"family": "inet", "name": "service_ports", "table": "umbra_fence", "elem": PORTS},
        {"family": "inet", "name": "open_ports", "table": "umbra_fence", "flags": ["timeout"]},
    ]
    if serves:
        elements = [{"elem": {"val": port, "timeout": 10, "expires": 9}} for port in PORTS]
        sets[1]["elem"] = elements
    rows = [{"metainfo": {"json_schema_version": 1}}, *({"set": item} for item in sets)]
    stage.write("table.json", json.dumps({"nftables": rows}))


def run(stage: Stage, *rooms: str, ports: list[int] = PORTS) -> list[str]:
    variables = {
        "replication_agent_fence_ports": ports,
        "__replication_agent_config": {"fence": {"ports": ports}},
    }
    code, text = stage.play(["a"], list(rooms), variables, START)
    assert code == 0, text
    return stage.calls("reloaded", "umbra-agent.service")


def fence(stage: Stage) -> str:
    return (stage.root / "etc/umbra/fence.nft").read_text()


def test_a_host_without_a_fence_gets_one(stage: Stage) -> None:
    run(stage, "fence")
    assert "465, 587, 993" in fence(stage)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("serves", [False, True])
def test_a_port_more(stage: Stage, serves: bool) -> None:
    run(stage, "fence")
    loaded(stage, serves=serves)
    changed = [*PORTS, 443]
    calls = run(stage, "fence", ports=changed)
    assert (calls, "443" in fence(stage)) == (([], False) if serves else ([LOAD], True))
    calls = run(stage, "fence", "end", ports=changed)
    assert calls == ([RESTART, LOAD] if serves else [RESTART])
    assert "443" in fence(stage)
    assert "443" in (stage.root / "etc/umbra/agent.yml").read_text()
    assert run(stage, "fence", "end", ports=changed) == []


def test_a_port_less_is_open_at_once(stage: Stage) -> None:
    run(stage, "fence")
    loaded(stage, serves=True)
    assert run(stage, "fence", ports=PORTS[:-1]) == [LOAD]
