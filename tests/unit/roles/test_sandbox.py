"""What the templates give to whom: no way from an agent's user to root."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from ansible.plugins.filter.core import FilterModule
from roles.mail_server.files.umbra_boot import sieve_send

ROLES = Path(__file__).parents[3] / "roles"


def rendered(role: str, name: str, **changes: Any) -> str:
    values: dict[str, Any] = {"ansible_managed": "managed"}
    for place in ("vars", "defaults"):
        values |= yaml.safe_load((ROLES / role / place / "main.yml").read_text())
    values |= {
        "mail_server_hostname": "mail.example.org",
        "mail_server_domains": ["example.org"],
        "replication_agent_peers": [{"name": "mail-b.example.org"}, {"name": "mail-c.example.org"}],
    }
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True)
    environment.filters.update(FilterModule().filters())
    template = (ROLES / role / "templates" / name).read_text()
    return environment.from_string(template).render(values | changes)


def settings(unit: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in re.sub(r"\\\n", "", unit).splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def test_the_agents_way_to_dsync_is_not_roots() -> None:
    """It runs any program that stands where its destination should."""
    config = rendered("mail_server", "dovecot.conf.j2", mail_server_replicated=True)
    service = config[config.index("service umbra-doveadm {") :]
    assert "\n  user = vmail\n" in service[: service.index("\n}")]
    assert "unix_listener auth-userdb {\n    mode = 0600\n    user = vmail\n" in config
    assert "unix_listener config {\n    mode = 0600\n    user = vmail\n" in config
    assert "auth-userdb" not in rendered("mail_server", "dovecot.conf.j2")


def test_what_root_does_in_a_unit_is_in_no_directory_of_the_agents() -> None:
    unit = settings(rendered("replication_agent", "umbra-agent.service.j2"))
    (prepared,) = [command for command in unit["ExecStartPre"] if command.startswith("+")]
    directories = [word for word in prepared.split() if word.startswith("/run/")]
    assert directories
    assert {str(Path(directory).parent) for directory in directories} == {"/run"}
    # With a hyphen: systemd looks before they are made.
    assert {f"-{directory}" for directory in directories} <= set(unit["ReadWritePaths"][0].split())


def test_the_helper_knows_whom_it_may_switch_off_and_whether_others_take_over() -> None:
    def command(**changes: Any) -> str:
        unit = rendered("replication_agent", "umbra-helper.service.j2", **changes)
        (found,) = settings(unit)["ExecStart"]
        return found

    assert command() == "/usr/lib/umbra/umbra-helper"
    assert command(
        replication_agent_coordinator="etcd",
        replication_agent_service_addresses=["192.0.2.20"],
        replication_agent_stonith_command=["/usr/local/sbin/power-off"],
    ) == (
        "/usr/lib/umbra/umbra-helper --lease --address=192.0.2.20"
        " --node=mail-b.example.org --node=mail-c.example.org"
    )


@pytest.mark.parametrize(
    ("role", "unit"),
    [
        ("replication_agent", "umbra-agent"),
        ("replication_agent", "umbra-helper"),
        ("coordinator", "umbra-coordinator"),
        ("mail_server", "umbra-mail-files"),
        ("mail_server", "umbra-index-logs"),
    ],
)
def test_no_unit_leaves_a_core_or_is_unbounded(role: str, unit: str) -> None:
    found = settings(rendered(role, f"{unit}.service.j2"))
    assert found["LimitCORE"] == ["0"]
    assert found["ProtectSystem"] == ["strict"]
    assert found["NoNewPrivileges"] == ["yes"]
    assert found["SystemCallFilter"][0] == "@system-service"
    assert "CapabilityBoundingSet" in found
    if found["Type"] == ["oneshot"]:
        assert found["TimeoutStartSec"] == ["300"]
        assert found["User"] == ["vmail"]


def test_ports_on_the_host_are_for_those_who_need_them() -> None:
    fence = rendered("replication_agent", "fence.nft.j2")
    output = fence[fence.rindex("chain output") :]
    assert output.index('oifname "lo" accept') > output.index("drop")
    assert (
        'oifname "lo" ip daddr 127.0.0.1 tcp dport { 26, 8688 } meta skuid != { root, 5000 } reject'
        in output
    )
    assert (
        'oifname "lo" ip daddr 127.0.0.1 tcp dport { 24, 27 } meta skuid != { root, umbra } reject'
        in output
    )
    assert "tcp sport { 8686, 8687, 8688 } meta skuid != { root, umbra } drop" in output


def test_the_fences_ports_and_user_are_those_of_the_others() -> None:
    agent = yaml.safe_load((ROLES / "replication_agent/vars/main.yml").read_text())
    mail = yaml.safe_load((ROLES / "mail_server/vars/main.yml").read_text())
    assert agent["__replication_agent_mail_uid"] == mail["__mail_server_vmail_id"]
    code = ROLES / "replication_agent/files/umbra"
    ports = {
        "__replication_agent_notify_port": (code / "mailbox/part.py", r"NOTIFY_PORT = .*, (\d+)"),
        "__replication_agent_resubmission_port": (
            code / "transport/resubmit.py", r"HOST, PORT = .*, (\d+)",
        ),
        "__replication_agent_proof_port": (code / "cluster/work.py", r"DOVECOT = \(\((\d+),"),
    }  # fmt: skip
    for name, (path, pattern) in ports.items():
        found = re.search(pattern, path.read_text())
        assert found
        assert int(found[1]) == agent[name]
    master = rendered("mail_server", "master.cf.j2", mail_server_replicated=True)
    assert f"\n127.0.0.1:{agent['__replication_agent_resubmission_port']} inet " in master
    sieve = f"127.0.0.1:{agent['__replication_agent_sieve_port']}"
    assert f"\n{sieve} inet " in master
    assert agent["__replication_agent_sieve_port"] == sieve_send.PORT
    dovecot = rendered("mail_server", "dovecot.conf.j2", mail_server_replicated=True)
    assert "\nsendmail_path = /usr/bin/python3 -IS /usr/lib/umbra/sieve_send.py\n" in dovecot
    assert f"listen = 127.0.0.1\n    port = {agent['__replication_agent_proof_port']}\n" in dovecot
    lua = (ROLES / "mail_server/templates/umbra-notify.lua.j2").read_text()
    assert f"127.0.0.1:{agent['__replication_agent_notify_port']}/" in lua
