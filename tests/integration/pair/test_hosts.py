"""Units, users, sockets and secrets on the mail hosts."""

from __future__ import annotations

import pytest
from tests.integration import lab

everywhere = pytest.mark.parametrize("node", lab.NODES)


@everywhere
@pytest.mark.parametrize(
    "unit",
    [
        "umbra-agent.service",
        "umbra-helper.service",
        "umbra-fence.service",
        "dovecot.service",
        "wg-quick@umbra0.service",
    ],
)
def test_runs_now_and_after_a_boot(node: str, unit: str) -> None:
    service = lab.host(node).service(unit)
    assert service.is_running
    assert service.is_enabled


@everywhere
def test_nothing_has_failed(node: str) -> None:
    assert lab.run(node, "systemctl --failed --no-legend --plain") == ""


def test_postfix_runs_on_the_primary_only(primary: str, shadow: str) -> None:
    assert lab.host(primary).service("postfix.service").is_running
    assert not lab.host(shadow).service("postfix.service").is_running
    for node in lab.NODES:
        assert not lab.host(node).service("postfix.service").is_enabled


@everywhere
def test_mail_services_need_the_fence(node: str) -> None:
    """A boot cannot start a mail service with the service ports open."""
    for unit in ("dovecot.service", "postfix.service", "umbra-agent.service"):
        wanted = lab.run(node, "systemctl show -p Requires -p After %s", unit)
        requires, after = sorted(wanted.splitlines(), reverse=True)
        assert "umbra-fence.service" in requires
        assert "umbra-fence.service" in after


@everywhere
def test_agent_has_no_privilege(node: str) -> None:
    pid = lab.run(node, "systemctl show -p MainPID --value umbra-agent.service").strip()
    lines = lab.run(node, "cat /proc/%s/status", pid).splitlines()
    fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    umbra = lab.host(node).user("umbra")
    assert fields["Uid"].split() == [str(umbra.uid)] * 4
    assert umbra.groups == ["umbra"]
    assert umbra.shell == "/usr/sbin/nologin"
    for kind in ("CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(fields[kind], 16) == 0, kind
    assert fields["NoNewPrivs"] == "1"
    assert fields["Seccomp"] == "2"


@everywhere
def test_systemd_calls_the_units_safe(node: str) -> None:
    """Exposure by systemd's own measure, 0 (safe) to 10."""
    for unit, most in (("umbra-agent.service", 1.5), ("umbra-helper.service", 4.5)):
        verdict = lab.run(node, "systemd-analyze security --no-pager %s", unit).splitlines()[-1]
        exposure = float(verdict.split("Overall exposure level for")[1].split(":")[1].split()[0])
        assert exposure <= most, verdict


@everywhere
def test_agent_is_watched_and_restarted(node: str) -> None:
    asked = "-p Type -p WatchdogUSec -p Restart"
    shown = lab.run(node, f"systemctl show {asked} umbra-agent.service").split()
    assert set(shown) == {"Type=notify", "WatchdogUSec=10s", "Restart=always"}


@everywhere
def test_no_secret_is_readable_for_others(node: str) -> None:
    places = "/etc/umbra /etc/ssl /etc/wireguard /etc/dovecot"
    holders = lab.run(node, f"grep -rlsE 'PRIVATE KEY|^ *PrivateKey *=' {places}")
    secrets = [path for path in holders.split() if "/etc/ssl/certs/" not in path]
    assert "/etc/umbra/tls/node.key" in secrets
    secrets += ["/etc/umbra/notify.token", "/etc/umbra/agent.yml", "/var/lib/umbra"]
    for path in secrets:
        assert lab.host(node).file(path).mode & 0o007 == 0, f"{path} on {node}"


@everywhere
@pytest.mark.parametrize(
    ("path", "user", "group", "mode"),
    [
        ("/etc/umbra/agent.yml", "root", "umbra", 0o640),
        ("/etc/umbra/notify.token", "root", "vmail", 0o640),
        ("/etc/umbra/tls/node.key", "root", "umbra", 0o640),
        ("/var/lib/umbra", "umbra", "umbra", 0o700),
        ("/var/spool/postfix/umbra", "umbra", "postfix", 0o2750),
        ("/run/umbra-dsync", "umbra", "vmail", 0o710),
        ("/run/umbra-delivery", "umbra", "vmail", 0o710),
        ("/run/umbra", "umbra", "umbra", 0o755),
        ("/run/umbra/api.sock", "umbra", "umbra", 0o660),
        ("/run/umbra-helper/helper.sock", "root", "umbra", 0o660),
    ],
)
def test_modes(node: str, path: str, user: str, group: str, mode: int) -> None:
    file = lab.host(node).file(path)
    assert (file.user, file.group, file.mode) == (user, group, mode)


def connects(node: str, user: str, path: str) -> bool:
    """Whether a user's process can connect to a unix socket."""
    code = "import socket,sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    return bool(lab.host(node).run("runuser -u %s -- python3 -c %s %s", user, code, path).rc == 0)


@everywhere
@pytest.mark.parametrize(
    ("path", "user", "stranger"),
    [
        ("/var/spool/postfix/umbra/milter.sock", "postfix", "vmail"),
        ("/run/umbra-dsync/{peer}.sock", "vmail", "postfix"),
        ("/run/dovecot/umbra-doveadm", "umbra", "vmail"),
        ("/run/umbra-helper/helper.sock", "umbra", "vmail"),
        ("/run/umbra/api.sock", "umbra", "vmail"),
    ],
)
def test_sockets_are_for_those_who_need_them(
    node: str, path: str, user: str, stranger: str
) -> None:
    (peer,) = set(lab.NODES) - {node}
    path = path.format(peer=peer)
    assert connects(node, user, path)
    assert not connects(node, stranger, path)
    assert not connects(node, "nobody", path)


def test_each_node_has_a_key_of_its_own_and_pins_its_peer() -> None:
    certificates = {node: lab.run(node, "cat /etc/umbra/tls/node.crt") for node in lab.NODES}
    keys = {lab.run(node, "sha256sum < /etc/umbra/tls/node.key") for node in lab.NODES}
    assert len(keys) == len(lab.NODES)
    for node in lab.NODES:
        for name, certificate in certificates.items():
            assert lab.run(node, "cat /etc/umbra/tls/peers/%s.crt", name) == certificate
        subject = lab.run(
            node, "openssl x509 -in /etc/umbra/tls/node.crt -noout -subject -ext subjectAltName"
        )
        assert f"CN={node}" in subject.replace(" ", "")
        assert f"DNS:{node}" in subject


@everywhere
def test_agent_is_the_one_of_the_repository(node: str) -> None:
    source = lab.ROOT / "roles" / "replication_agent" / "files" / "umbra"
    wanted = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    listed = lab.run(node, "cd /usr/lib/umbra/umbra/ && find * -type f -name '*.py'")
    assert set(listed.split()) == wanted
