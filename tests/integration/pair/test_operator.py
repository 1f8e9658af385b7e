"""What the operator sees: the same words in the command, the API and the metrics."""

from __future__ import annotations

import json

import pytest
from tests.integration import lab

pytestmark = pytest.mark.usefixtures("protected")
everywhere = pytest.mark.parametrize("node", lab.NODES)


@everywhere
def test_protected_in_the_same_words(node: str, primary: str, shadow: str) -> None:
    code, body = lab.ask(node, "/health")
    assert (code, json.loads(body)) == (200, {"status": "protected", "reasons": []})

    code, body = lab.ask(node, "/status")
    report = json.loads(body)
    assert code == 200
    assert report["protected"] is True
    assert report["reasons"] == []
    assert report["primary"] == primary
    roles = {item["node"]: item["role"] for item in report["nodes"]}
    assert roles == {primary: "primary", shadow: "shadow"}

    values = lab.metrics(node)
    assert values["umbra_protected"] == 1
    assert values["umbra_epoch"] == report["epoch"]
    for item in report["nodes"]:
        label = f'{{node="{item["node"]}",site="{item["site"]}"}}'
        assert values[f"umbra_node_primary{label}"] == (item["role"] == "primary")
        assert values[f"umbra_node_reachable{label}"] == 1

    assert lab.run(node, "umbractl health") == "protected\n"


@everywhere
def test_status_table(node: str, primary: str, shadow: str) -> None:
    table = lab.run(node, "COLUMNS=160 umbractl status")
    lines = table.splitlines()
    for word in ("node", "site", "role", "state", "lag", "shadow queue", "since"):
        assert word in lines[0]
    for name, role in ((primary, "primary"), (shadow, "shadow")):
        (line,) = [line for line in lines if line.startswith(name)]
        assert role in line
    assert "group mail: protected, epoch" in table


@everywhere
def test_the_tunnel_reads_and_changes_nothing(node: str) -> None:
    (peer,) = set(lab.NODES) - {node}
    where = f"{lab.overlay_address(node)} 8687"
    for path in ("/health", "/status", "/metrics"):
        assert lab.ask(peer, path, where=where)[0] == 200
    for path in ("/queue", "/merged"):  # they name users and messages
        assert lab.ask(peer, path, where=where)[0] == 404
    for path in ("/switchover", "/failover", "/open"):
        assert lab.ask(peer, path, "POST", where)[0] in (404, 405)


@pytest.mark.timeout(20)
def test_switchover_to_the_primary_changes_nothing(primary: str) -> None:
    before = lab.status(primary)
    said = lab.run(primary, "umbractl switchover %s", primary)
    assert said == f"{primary} is the primary already.\n"
    after = lab.status(primary)
    assert (after["epoch"], after["primary"]) == (before["epoch"], before["primary"])


@pytest.mark.timeout(20)
def test_switchover_to_a_stranger_is_refused(primary: str) -> None:
    refused = lab.host(primary).run("umbractl switchover mail-z")
    assert refused.rc == 1
    assert "mail-z" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert lab.status(primary)["primary"] == primary


@everywhere
def test_command_is_for_operators_only(node: str) -> None:
    stranger = lab.host(node).run("runuser -u nobody -- umbractl status")
    assert stranger.rc != 0
    assert "Traceback" not in stranger.stderr


def test_bad_configuration_is_refused_in_sentences(primary: str) -> None:
    lab.run(
        primary,
        "sed 's/^role: .*/role: king/; s/shadow_policy: .*/shadow_policy: hope/'"
        " /etc/umbra/agent.yml > /tmp/agent.yml",
    )
    refused = lab.host(primary).run("/usr/lib/umbra/umbra-agent --check-config /tmp/agent.yml")
    lab.run(primary, "rm /tmp/agent.yml")
    assert refused.rc == 1
    said = refused.stdout + refused.stderr
    assert "king" in said
    assert "hope" in said
    assert "Traceback" not in said
    lab.run(primary, "/usr/lib/umbra/umbra-agent --check-config /etc/umbra/agent.yml")
