"""A run with --limit does what it may or says why not; it never passes with nothing done."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import INVENTORY, ROOT, Play


@pytest.mark.parametrize(
    ("playbook", "arguments", "words"),
    [
        ("health", ["--limit", "mail-b"], "mail-b FAILED host reachable"),
        ("health", ["--limit", "witness"], "No mail host was checked; leave out --limit."),
        ("seed", ["--limit", "mail-a"], "Which node shall be seeded?"),
        (
            "seed",
            ["--limit", "mail-b", "-e", "seed_node=mail-b"],
            "This run is for mail-b only, and the primary seeds the node; leave out --limit.",
        ),
        ("switchover", ["--limit", "mail-a"], "Which node shall be primary?"),
        (
            "switchover",
            ["--limit", "mail-a", "-e", "switchover_to=mail-b"],
            "This run is for mail-a only, and mail-b asks for the change; leave out --limit.",
        ),
        ("switchover", ["--limit", "mail-b", "-e", "switchover_to=mail-b"], "UNREACHABLE"),
        (
            "failover_test",
            ["--limit", "mail-a"],
            "This run is for mail-a only, and client tests; leave out --limit.",
        ),
        ("failover_test", ["--limit", "client"], "failover_test_users is empty"),
    ],
)
def test_a_limited_run(play: Play, playbook: str, arguments: list[str], words: str) -> None:
    run = play(f"umbra.mail.{playbook}", *arguments)
    assert run.code != 0
    assert words in run.words


def test_seeding_leaves_other_groups_alone(play: Play) -> None:
    groups = {"mail-a": "mail", "mail-b": "mail", "post-a": "post", "post-b": "post"}
    hosts = ", ".join(f"{host}: {{umbra_group: {group}}}" for host, group in groups.items())
    inventory = INVENTORY.replace(
        "{mail-a: {umbra_role: primary}, mail-b: {umbra_role: shadow}}", f"{{{hosts}}}"
    )
    run = play("umbra.mail.seed", "-e", "seed_node=mail-b", inventory=inventory)
    asked = re.findall(r"(?m)^fatal: \[(\S+)\]: UNREACHABLE", run.output)
    assert asked == ["mail-a"], run.output
    run = play(
        "umbra.mail.seed", "-e", "seed_node=mail-b", "--limit", "!mail-a", inventory=inventory
    )
    assert "the primary seeds the node; leave out --limit." in run.words


def test_a_snapshot_is_looked_for_where_the_command_is_given(play: Play, tmp_path: Path) -> None:
    said = ("-e", "coordinator_restore_primary=mail-a", "-e", "coordinator_restore_file=x.db")
    assert "Name a snapshot on this machine" in play("umbra.mail.coordinator_restore", *said).words
    (tmp_path / "x.db").touch()
    run = play("umbra.mail.coordinator_restore", *said)
    assert "Name a snapshot on this machine" not in run.words
    assert "UNREACHABLE" in run.words


def test_health_without_limit_shows_every_node(play: Play) -> None:
    run = play("umbra.mail.health")
    assert run.code != 0
    assert "mail-a FAILED host reachable" in run.words
    assert "mail-b FAILED host reachable" in run.words


def test_health_follows_ports_that_the_inventory_moves() -> None:
    plays: Any = yaml.safe_load((ROOT / "playbooks" / "health.yml").read_text())
    options = plays[0]["tasks"][0]["umbra.mail.group_health_info"]
    assert "replication_agent_api_port" in options["api_port"]
    assert "replication_agent_fence_ports" in options["service_ports"]
    # A fence that does not close one of them is found, too.
    assert "143, 993, 110, 995, 4190" in options["service_ports"]
