"""What a run has written and did not live to apply is applied by the next one."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.unit.roles.stage import Stage

NOW = "date -u '+%a %F %T.%6N UTC'"
SYSTEMCTL = f"""\
case "$*" in
  *ReloadResult*) test -e failed && echo exit-code || echo success ;;
  show*) cat "${{5%.service}}" ;;
  re*) {NOW} > "${{2%.service}}" ;;
  try-*) test ! -e "${{2%.service}}" || {NOW} > "${{2%.service}}" ;;
  is-active*) test -e "${{3%.service}}" ;;
esac
"""


def started(stage: Stage, *units: str) -> None:
    stage.program("bin/systemctl", SYSTEMCTL)
    for unit in units:
        stage.write(unit, subprocess.check_output(NOW, shell=True, text=True))


class Role:
    """A role's part that starts its services, which run already."""

    def __init__(self, stage: Stage, tasks: str, variables: dict[str, Any]) -> None:
        self.stage, self.tasks, self.variables = stage, tasks, variables

    def run(self, *hosts: str) -> list[str]:
        """Run it; return what was restarted, reloaded or asked, in order."""
        code, text = self.stage.play([*(hosts or ["a"])], [self.tasks], self.variables)
        assert code == 0, text
        calls = self.stage.calls("restart", "reloaded", "try-reload-or-restart", "ping", "sievec")
        assert ("changed=0" in text) is (calls == []), text
        return calls


def test_the_fence(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "replication_agent")
    stage.write(
        "roles/replication_agent/tasks/end.yml",
        (tmp_path / "roles/replication_agent/tasks/fence_load.yml")
        .read_text()
        .partition("- name: Close the service ports")[2]
        .join(["- name: Close the service ports", ""]),
    )
    started(stage, "umbra-fence")
    role = Role(stage, "end", {"__replication_agent_fence_unit": {"changed": False}})
    stage.write("etc/umbra/fence.nft", "new")
    assert role.run() == ["systemctl reloaded umbra-fence.service"]
    assert role.run() == []


VPN = {
    "__vpn_hosts": ["a", "b"],
    "vpn_timeout": 1,
    "__vpn_plan": {"a": {"address": "10.86.0.1"}, "b": {"address": "10.86.0.2"}},
}
FIREWALL, TUNNEL = "systemctl reloaded umbra-vpn-firewall.service", "wg-quick@umbra0.service"


@pytest.fixture
def vpn(tmp_path: Path) -> Role:
    stage = Stage(tmp_path, "vpn")
    stage.program("bin/ping", "sleep 0.2")
    for name in ("umbra0.conf", "umbra0.key", "umbra0.peers", "umbra0.nft"):
        stage.write(f"etc/wireguard/{name}", "old")
    stage.write("usr/lib/umbra/vpn-sync", "old")
    started(stage, "umbra-vpn-firewall", "wg-quick@umbra0")
    return Role(stage, "service", VPN)


def test_the_tunnel_and_its_firewall(vpn: Role) -> None:
    stage = vpn.stage
    stage.write("etc/wireguard/umbra0.peers", "new")
    stage.write("etc/wireguard/umbra0.nft", "new")
    assert vpn.run() == [FIREWALL, f"systemctl reloaded {TUNNEL}"]
    assert vpn.run() == []
    stage.write("failed", "")
    assert vpn.run() == [FIREWALL, f"systemctl reloaded {TUNNEL}"]


def test_one_tunnel_is_restarted_after_the_other(vpn: Role) -> None:
    vpn.stage.write("etc/wireguard/umbra0.conf", "new")
    a, b = ([f"ping -q -c 1 -w 1 10.86.0.{number}"] for number in (2, 1))
    restart = [f"systemctl restart {TUNNEL}"]
    calls = vpn.run("a", "b")
    assert calls[:6] in ([*a, *restart, *a, *b, *restart, *b], [*b, *restart, *b, *a, *restart, *a])


def test_the_mail_servers(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "mail_server")
    for name in ("bin/postfix", "bin/doveconf"):
        stage.program(name, "")
    stage.program("bin/sievec", "touch etc/dovecot/umbra-once.svbin")
    postfix = ("main.cf", "master.cf", "virtual_mailboxes", "virtual_aliases", "sender_logins")
    files = ("dovecot.conf", "umbra-notify.lua", "umbra-once.sieve")
    names = [f"dovecot/{name}" for name in files] + [f"postfix/{name}" for name in postfix]
    for name in (*names, "ssl/umbra/mail.crt", "ssl/umbra/mail.key"):
        stage.write(f"etc/{name}", "old")
    # A shadow, whose Postfix does not run.
    started(stage, "dovecot")
    role = Role(stage, "service", {"umbra_group": "mail"})
    stage.write("etc/ssl/umbra/mail.crt", "new")
    assert role.run() == ["systemctl try-reload-or-restart dovecot.service"]
    assert role.run() == []


def test_the_script_against_second_deliveries(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "mail_server")
    stage.program("bin/sievec", 'test ! -e broken && touch "${1%.sieve}.svbin"')
    stage.program("bin/doveconf", "")
    stage.write("broken", "")
    (tmp_path / "etc/dovecot").mkdir(parents=True)
    (tmp_path / "var/lib").mkdir(parents=True)
    variables = {"umbra_group": "mail"}
    code, _ = stage.play(["a"], ["notify"], variables)
    assert code != 0
    (tmp_path / "broken").unlink()
    stage.calls("sievec")
    role = Role(stage, "notify", variables)
    assert role.run() == [f"sievec {tmp_path}/etc/dovecot/umbra-once.sieve"]
    assert role.run() == []
