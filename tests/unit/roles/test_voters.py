"""What the role coordinator does to voters that run already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.unit.roles.stage import ROOT, Stage

HOSTS = ["a", "b", "w"]
ADDRESSES = {"a": "10.86.0.1", "b": "10.86.0.2", "w": "10.86.0.3"}
A, B, W = (
    {"ID": number, "name": name, "peerURLs": [f"https://{address}:2380"]}
    for number, (name, address) in enumerate(ADDRESSES.items(), 1)
)
D = {"ID": 0xC1A551F1ED, "name": "d", "peerURLs": ["https://10.86.0.4:2380"]}
E = {"ID": 0xBADC0DE, "name": "e", "peerURLs": ["https://10.86.0.5:2380"]}
VARIABLES: dict[str, Any] = {
    "__coordinator_hosts": HOSTS,
    "coordinator_timeout": 1,
    "__coordinator_plan": {host: {"address": address} for host, address in ADDRESSES.items()},
    "__coordinator_data": "{{ playbook_dir }}/data/{{ inventory_hostname }}",
}


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    stage = Stage(tmp_path, "coordinator")
    stage.program(
        "bin/etcdctl",
        'case "$*" in *list*) cat members.json || exit 1 ;; *) test ! -e unhealthy ;; esac',
    )
    return stage


def members(stage: Stage, *rows: dict[str, Any], data: str = "abw") -> None:
    stage.write("usr/sbin/umbra-etcdctl", '#!/bin/sh\nexec etcdctl "$@"\n').chmod(0o755)
    stage.write("members.json", json.dumps({"members": rows}))
    for name in data:
        (stage.root / "data" / name / "member" / "wal").mkdir(parents=True)


def judged(stage: Stage, **variables: Any) -> tuple[int, str]:
    """Have w look at the members, as a dry run does it; it writes nothing anyway."""
    variables = {**VARIABLES, **variables}
    return stage.play(HOSTS, ["membership"], variables, "--check", "--limit=w")


def test_a_new_cluster_has_nobody_to_ask(stage: Stage) -> None:
    code, text = judged(stage)
    assert code == 0, text


@pytest.mark.parametrize(
    ("rows", "data", "replace"),
    [
        ([A, B, W], "abw", ""),
        ([A, B, D], "ab", "w"),  # w takes the place of d
        ([A, B, W], "ab", "w"),  # w has lost its disk
        ([A, B, {**W, "name": ""}], "ab", ""),  # w has been added and not started
    ],
)
def test_a_list_that_is_the_inventorys(
    stage: Stage, rows: list[dict[str, Any]], data: str, replace: str
) -> None:
    members(stage, *rows, data=data)
    code, text = judged(stage, coordinator_replace=replace)
    assert code == 0, text


@pytest.mark.parametrize("replace", ["", "w"])
def test_voters_are_taken_off_the_list_before_they_are_forgotten(
    stage: Stage, replace: str
) -> None:
    members(stage, A, B, W, D, E)
    code, text = judged(stage, coordinator_replace=replace)
    assert code != 0
    assert "counts in d and e, and the inventory does not" in text
    assert (
        "`umbra-etcdctl member remove c1a551f1ed`, `umbra-etcdctl member remove badc0de`;" in text
    )
    assert "disable --now umbra-coordinator` on d and e" in text


def test_the_site_compares_before_the_tunnel_changes() -> None:
    plays = yaml.safe_load((ROOT / "playbooks" / "site.yml").read_text())
    names = [task["name"] for play in plays for task in play["tasks"]]
    compare, join = "Compare the voters with the inventory", "Join the hosts by the tunnel"
    assert names.index(compare) < names.index(join)


def test_a_voter_that_was_taken_off_the_list_does_not_start(stage: Stage) -> None:
    members(stage, A, B)
    code, text = judged(stage)
    assert code != 0
    assert "w has the data of a voter that was taken off the list, and the cluster of" in text
    assert "/data/w/member away and run this again with -e coordinator_replace=w" in text


def test_a_voter_without_data_is_not_guessed_about(stage: Stage) -> None:
    members(stage, A, B, W, data="ab")
    code, text = judged(stage)
    assert code != 0
    assert "w has no data of a voter, and the cluster of a runs without it" in text


@pytest.mark.timeout(300)
def test_a_restart_that_was_refused_stays_due(stage: Stage) -> None:
    now = "date -u '+%a %F %T.%6N UTC'"
    stage.program(
        "bin/systemctl",
        f'case "$1" in show) cat since ;; restart) {now} > since ;;'
        f" started) test -e since || {now} > since ;; esac",
    )
    for name in ("member", "members", "clients"):
        stage.write(f"etc/umbra-coordinator/{name}.crt", "")
    (stage.root / "etc/systemd/system").mkdir(parents=True)
    (stage.root / "usr/sbin").mkdir(parents=True)

    def run(quota: int, *options: str) -> tuple[int, bool, list[str]]:
        variables = {**VARIABLES, "coordinator_quota_mib": quota}
        code, text = stage.play(["a"], ["configure", "service"], variables, *options)
        assert "Traceback" not in text
        return code, "changed=0" not in text, stage.calls("restart")

    restarted = ["systemctl restart umbra-coordinator.service"]
    assert run(256) == (0, True, restarted)
    stage.write("unhealthy", "")
    assert run(512) == (2, True, [])
    (stage.root / "unhealthy").unlink()
    assert run(512, "--check") == (0, True, [])
    assert run(512) == (0, True, restarted)
    assert run(512) == (0, False, [])


def test_all_voters_have_one_token(stage: Stage) -> None:
    stage.write(
        "roles/coordinator/tasks/say.yml",
        '[{ansible.builtin.debug: {msg: "{{ inventory_hostname }}={{ coordinator_token }};"}}]',
    )
    for host, group in (("a", "mail"), ("b", "post")):
        stage.write(f"host_vars/{host}.yml", f"umbra_group: {group}\n")
    _, text = stage.play(HOSTS, ["say"], {"__coordinator_hosts": HOSTS})
    assert [f"{host}=mail;" in text for host in HOSTS] == [True] * 3, text
    _, text = stage.play(HOSTS, ["say"], {"__coordinator_hosts": ["w", "a", "b"]})
    assert [f"{host}=umbra;" in text for host in HOSTS] == [True] * 3, text
    _, text = stage.play(HOSTS, ["say"], {"__coordinator_hosts": []})
    assert "a=umbra;" in text
