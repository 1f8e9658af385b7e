"""What a user of a mail host gets: the agent's own is not root, and none gets what is another's."""

from __future__ import annotations

import pytest
from tests.integration import lab

everywhere = pytest.mark.parametrize("node", lab.NODES)

# Runs as the agent's user: a dsync whose destination is a program.
DSYNC = r"""
import socket, sys
with socket.socket(socket.AF_UNIX) as doveadm:
    doveadm.connect("/run/dovecot/umbra-doveadm")
    user, *program = sys.argv[1:]
    line = "\t".join(["", user, "sync", "-u", user, *program])
    doveadm.sendall(f"VERSION\tdoveadm-server\t1\t0\n{line}\n".encode())
    doveadm.settimeout(20)
    while doveadm.recv(4096):
        pass
"""

# Connects to a port of this host, or takes one.
CONNECT = "import socket,sys; socket.create_connection(('127.0.0.1', int(sys.argv[1])), 3)"
TAKE = """
import socket, sys
taken = socket.socket()
for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
    taken.setsockopt(socket.SOL_SOCKET, option, 1)
taken.bind((sys.argv[2], int(sys.argv[1])))
taken.listen()
"""


def python(node: str, user: str, code: str, *words: str) -> bool:
    """Whether a user's Python program succeeds."""
    command = f"runuser -u %s -- python3 -c %s{' %s' * len(words)}"
    return bool(lab.host(node).run(command, user, code, *words).rc == 0)


@everywhere
def test_a_program_that_dsync_is_given_does_not_run_as_root(node: str) -> None:
    made = "/var/vmail/made-by-dsync"
    lab.run(node, "rm -f %s", made)
    python(node, "umbra", DSYNC, lab.MAILBOXES[0], "/usr/bin/touch", made)
    lab.wait("the program", lambda: lab.host(node).file(made).exists, 10)
    assert lab.host(node).file(made).user == "vmail"
    lab.run(node, "rm %s", made)


@everywhere
def test_dovecot_has_nothing_to_complain_of(node: str) -> None:
    """The agent's doveadm-server runs with fewer rights than others."""
    said = lab.run(
        node, "journalctl -q -o cat -u dovecot.service --grep 'Permission denied' || true"
    )
    assert [line for line in said.splitlines() if "touch:" not in line] == []  # of the test above


def test_ports_between_the_servers_are_for_them_alone(primary: str) -> None:
    for user, port, reaches in (
        ("vmail", "8688", True),
        ("vmail", "24", False),
        ("umbra", "24", True),
        ("nobody", "24", False),
        ("vmail", "26", True),
        ("nobody", "26", False),
        ("umbra", "27", True),
        ("nobody", "27", False),
        ("nobody", "8688", False),
        ("nobody", "25", True),
    ):
        assert python(primary, user, CONNECT, port) is reaches, f"{user}, {port}"


def test_nobody_takes_a_port_of_an_agent_that_is_away(shadow: str) -> None:
    address = lab.overlay_address(shadow)
    places = (("8688", "127.0.0.1"), ("8687", address), ("8686", address))
    lab.run(shadow, "systemctl stop umbra-agent.service")
    try:
        for place in places:
            assert not python(shadow, "nobody", TAKE, *place), place
            assert python(shadow, "umbra", TAKE, *place), place
        assert not python(shadow, "nobody", TAKE, "24", "127.0.0.1")
    finally:
        lab.run(shadow, "systemctl start umbra-agent.service")
    lab.wait("protection", lambda: lab.status(shadow)["protected"])


def test_nobody_is_answered_by_who_has_taken_a_port(shadow: str) -> None:
    """Of a port that is free, as between a boot and the agent's first start."""
    answered = f"{TAKE}\ntaken.settimeout(2)\ntaken.accept()"
    port = "8688"
    lab.run(
        shadow,
        "systemctl stop umbra-agent.service && systemctl clean --what=fdstore umbra-agent.service",
    )
    try:
        squatter = lab.host(shadow).run(
            "runuser -u nobody -- python3 -c %s %s 127.0.0.1 & sleep 0.5;"
            " runuser -u vmail -- python3 -c %s %s; code=$?; wait; exit $code",
            answered, port, CONNECT, port,
        )  # fmt: skip
        assert squatter.rc != 0
        assert "timed out" in squatter.stderr
    finally:
        lab.run(shadow, "systemctl start umbra-agent.service")
    lab.wait("protection", lambda: lab.status(shadow)["protected"])


@everywhere
def test_rules_that_are_loaded_by_hand_leave_the_fence(node: str) -> None:
    lab.run(node, "nft -f /etc/nftables.conf")
    try:
        lab.wait(
            "the fence",
            lambda: lab.host(node).run("nft list set inet umbra_fence open_ports").rc == 0,
            15,
        )
        if node == lab.status(node)["primary"]:
            listed = "nft -j list set inet umbra_fence open_ports"
            lab.wait("an open port", lambda: '"val": 25' in lab.run(node, listed), 15)
    finally:
        lab.run(node, "systemctl restart umbra-vpn-firewall.service")
    checks = {check["name"]: check["passed"] for check in lab.status(node)["checks"]}
    assert checks["ports and Postfix"]
