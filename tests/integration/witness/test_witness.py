"""A group with a witness: the primary's power goes, and nobody moves a hand."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from tests.integration import lab

USER = "user08@example.org"
FLAGGED = "user07@example.org"
HELD = "held@deferred.example.net"
VOTERS = (*lab.NODES, "witness")
# Of the LAN in which mail hosts and client are; tests/lab/README.md.
ADDRESSES = ("203.0.113.80", "2001:db8:e::80")
# Profile `default`: D is 2.5 s. The bound has room for a busy machine.
TAKEOVER = 15


def own_row(node: str, report: Mapping[str, Any]) -> Mapping[str, Any]:
    (own,) = [row for row in report["nodes"] if row["node"] == node]
    return dict(own)


def serves(node: str) -> bool:
    report = lab.status(node)
    return bool(report["primary"] == node and own_row(node, report)["state"] == "primary")


def ready(node: str) -> bool:
    """Whether a node knows that it could take over, which it hears with the next heartbeat."""
    own = own_row(node, lab.status(node))
    return bool((own["role"], own["state"]) == ("shadow", "ready"))


def paused(node: str) -> bool:
    return bool(lab.status(node)["paused"])


def has(node: str) -> list[str]:
    """Which service addresses a host has, by its kernel's word."""
    rows = json.loads(lab.run(node, "ip -j addr show"))
    found = {item.get("local") for row in rows for item in row["addr_info"]}
    return [address for address in ADDRESSES if address in found]


def mac(node: str) -> str:
    return str(json.loads(lab.run(node, "ip -j link show eth1"))[0]["address"])


def neighbours() -> set[str]:
    """At which MACs the client believes the service addresses to be."""
    rows = json.loads(lab.run("client", "ip -j neigh show dev eth1"))
    return {row.get("lladdr", "") for row in rows if row["dst"] in ADDRESSES}


def arrival(node: str) -> float:
    """When the service addresses came to a node last, as seconds since the epoch."""
    command = "journalctl -u umbra-helper -o short-unix --no-pager -g 'service address .* now'"
    return float(lab.run(node, command).splitlines()[-1].split()[0])


def known_clients(node: str) -> float:
    return lab.metrics(node).get("umbra_service_address_clients", 0.0)


def address_checks(node: str) -> list[tuple[bool, list[str]]]:
    checks = lab.status(node)["checks"]
    return [(c["passed"], c["value"]) for c in checks if c["name"].startswith("service address")]


def voters(signal: str) -> None:
    for name in VOTERS:
        lab.run(name, "systemctl kill -s %s umbra-coordinator.service", signal)


@pytest.fixture(scope="module")
def group() -> str:
    """Wait for a protected group, and return its primary."""

    def primary() -> str | None:
        reports = [lab.status(node) for node in lab.NODES]
        names = {report["primary"] for report in reports}
        return names.pop() if all(r["protected"] for r in reports) and len(names) == 1 else None

    return str(lab.wait("the group is protected", primary, 90))


@pytest.fixture(scope="module")
def other(group: str) -> str:
    (name,) = set(lab.NODES) - {group}
    return name


def test_every_node_says_who_decides_and_who_could_take_over(group: str, other: str) -> None:
    expected = {group: "primary", other: "ready"}
    for node in lab.NODES:

        def states(node: str = node) -> dict[str, str]:
            return {row["node"]: row["state"] for row in lab.status(node)["nodes"]}

        # The other's state comes with the next heartbeat.
        lab.wait(f"{node} knows who could take over", lambda: states() == expected, 5)
        report = lab.status(node)
        assert report["coordinator"] == "etcd"
        assert report["protected_set"] == [other]
        assert report["paused"] is False
        assert f"protected {other}; automatic failover on" in lab.run(node, "umbractl status")


def test_the_agent_reads_no_key_but_its_own(group: str) -> None:
    for path in ("/etc/umbra-coordinator/member.key", "/etc/umbra-coordinator/members.crt"):
        result = lab.host(group).run(f"runuser -u umbra -- cat {path}")
        assert result.rc != 0


def test_the_kernel_closes_the_ports_when_the_right_ends(group: str) -> None:
    ruleset = json.loads(lab.run(group, "nft -j list set inet umbra_fence open_ports"))
    (found,) = [item["set"] for item in ruleset["nftables"] if "set" in item]
    left = {item["elem"]["val"]: item["elem"]["expires"] for item in found["elem"]}
    assert set(left) == set(lab.SERVICE_PORTS)
    assert max(left.values()) <= 2  # nft tells whole seconds; the right runs 1.9 s


def test_frozen_voters_change_nothing(group: str) -> None:
    epoch = lab.status(group)["epoch"]
    voters("STOP")
    try:
        until = time.monotonic() + 8
        while time.monotonic() < until:
            assert lab.send(group, [USER], lab.mail().content)[0] == 250
        assert serves(group)
        failed = {c["name"] for c in lab.status(group)["checks"] if not c["passed"]}
        assert {"coordinator", "voters"} <= failed
    finally:
        voters("CONT")
    lab.wait(
        "the voters are back",
        lambda: all(c["passed"] for c in lab.status(group)["checks"] if c["name"] == "voters"),
    )
    assert lab.status(group)["epoch"] == epoch


def test_a_pause_is_seen_everywhere_and_ends(group: str, other: str) -> None:
    lab.run(other, "umbractl pause")
    try:
        for node in lab.NODES:
            lab.wait(f"{node} shows it", functools.partial(paused, node), 5)
        assert lab.metrics(group)["umbra_automatic_failover_paused"] == 1
    finally:
        lab.run(group, "umbractl unpause")
    lab.wait("it has ended", lambda: not paused(other), 5)


def test_the_service_addresses_are_at_the_primary_alone(group: str, other: str) -> None:
    assert has(group) == list(ADDRESSES)
    assert has(other) == []
    for node in lab.NODES:
        lab.wait("it is seen", functools.partial(seen, node, group), 5)
        for address in ADDRESSES:
            assert f"service address {address}: {group}\n" in lab.run(node, "umbractl status")
            place = f'umbra_service_address{{address="{address}",node="%s"}}'
            metrics = lab.metrics(node)
            assert (metrics[place % group], metrics[place % other]) == (1, 0)
    # With the ports' lease they end by themselves.
    rows = json.loads(lab.run(group, "ip -j addr show dev eth1"))[0]["addr_info"]
    left = {row["local"]: row["valid_life_time"] for row in rows}
    assert all(left[address] <= 2 for address in ADDRESSES)


def seen(node: str, primary: str) -> bool:
    return address_checks(node) == [(True, [primary])] * len(ADDRESSES)


@contextmanager
def idle_clients(shadow: str) -> Iterator[list[lab.Idler]]:
    """An idle IMAP client on each service address, that the shadow has heard of."""
    with lab.idling(ADDRESSES, USER) as clients:
        lab.wait("the shadow knows them", lambda: known_clients(shadow) == len(clients), 5)
        yield clients


def noticed(clients: list[lab.Idler], new: str) -> None:
    """Clients saw the end of their connections within a second, and where the address is now."""
    ended = [client.ended(TAKEOVER) for client in clients]
    assert neighbours() == {mac(new)}
    assert has(new) == list(ADDRESSES)
    since = [round(at - arrival(new), 3) for at in ended]
    print(f"clients saw the end {since} s after the address had come")
    assert all(seconds < 1 for seconds in since)


@dataclass(frozen=True)
class Lost:
    """What there was when the primary's power went."""

    message: str
    flagged: str
    clients: list[lab.Idler]


def test_a_change_waits_for_an_agent_that_was_killed(group: str, other: str) -> None:
    """The new one does not know its right yet; the ports are open for the one before it."""
    mark = lab.run(group, "journalctl -u dovecot -n 0 --show-cursor").split("cursor: ")[1].strip()
    lab.run(group, "systemctl kill --kill-whom=main --signal=KILL umbra-agent")
    mail = lab.mail()
    with lab.imap(group, FLAGGED) as session:
        assert session.append("INBOX", "", "", mail.content)[0] == "OK"
    protected = lab.status(group)["protected"]
    assert lab.copies(other, FLAGGED, mail.id) or not protected
    log = lab.run(group, "journalctl -u dovecot --after-cursor %s", mark)
    assert "did not confirm" not in log
    lab.wait("the group is protected", lambda: lab.status(group)["protected"], 30)
    assert lab.copies(other, FLAGGED, mail.id)


@pytest.fixture(scope="module")
def lost(group: str, other: str) -> Iterator[Lost]:
    """The primary's power is cut; it had acknowledged messages, and has idle clients."""
    flagged = lab.mail()
    assert lab.send(group, [FLAGGED], flagged.content)[0] == 250
    lab.wait("it is stored", lambda: lab.copies(other, FLAGGED, flagged.id))
    store(group, flagged.id, "+FLAGS", "Later")
    put_on_hold(group, other)
    # So that what nobody was told of can be made on the host before it comes back.
    lab.run(group, "systemctl disable umbra-agent.service")
    with idle_clients(other) as clients:
        mail = lab.mail()
        assert lab.send(group, [USER], mail.content)[0] == 250
        lab.power(group, on=False)
        yield Lost(mail.id, flagged.id, clients)
    if not lab.answers(group):
        lab.power(group, on=True)
    lab.run(group, "systemctl enable --now umbra-agent.service")


def put_on_hold(node: str, shadow: str) -> None:
    lab.run(node, "printf 'Subject: x\\n\\nx\\n' | sendmail -f %s %s", FLAGGED, HELD)
    lab.wait("it is deferred", lambda: lab.queue(node).get(HELD, ("", ""))[1] == "deferred")
    lab.run(node, "postsuper -h %s", lab.queue(node)[HELD][0])
    query = "SELECT count(*) FROM message WHERE state = 'held' AND envelope ->> '$.held'"
    script = "import sqlite3, sys; print(*sqlite3.connect(sys.argv[1]).execute(sys.argv[2]))"
    look = "runuser -u umbra -- python3 -c %s /var/lib/umbra/shadow/shadow.db %s"
    lab.wait("the shadow knows it", lambda: "(1,)" in lab.run(shadow, look, script, query), 10)


def store(node: str, message: str, item: str, flag: str) -> None:
    with lab.imap(node, FLAGGED) as session:
        session.select()
        uid = session.uid("SEARCH", "HEADER", "Message-ID", message)[1][0].decode()
        assert session.uid("STORE", uid, item, flag)[0] == "OK"


def flags(node: str, message: str) -> set[str]:
    query = "doveadm -f tab fetch -u %s flags HEADER Message-ID %s"
    rows = lab.run(node, query, FLAGGED, message).splitlines()[1:]
    assert len(rows) == 1
    return set(rows[0].split()) - {"\\Recent"}


def uid(node: str, message: str) -> int:
    query = "doveadm -f tab fetch -u %s uid HEADER Message-ID %s"
    return int(lab.run(node, query, FLAGGED, message).splitlines()[1])


@dataclass(frozen=True)
class Untold:
    """A message that nobody was told of, and one that came to the new primary, with its UID."""

    message: str
    new: str
    uid: int


@pytest.fixture(scope="module")
def untold(lost: Lost, group: str, other: str) -> Untold:
    """The former primary is back, with changes that nobody was told of."""
    new = lab.mail()
    assert lab.send(other, [FLAGGED], new.content)[0] == 250
    lab.wait("it is stored", lambda: lab.copies(other, FLAGGED, new.id))
    found = uid(other, new.id)
    store(other, lost.flagged, "-FLAGS", "Later")
    store(other, lost.flagged, "+FLAGS", "\\Flagged")
    lab.power(group, on=True)
    lab.wait(f"{group} is up", lambda: lab.answers(group), 60)
    doveadm = f"{lab.DOVEADM_ALONE} %s -u {FLAGGED}"
    mark = f"{doveadm.replace('%s', 'flags %s')} %s HEADER Message-ID %s"
    # Many, so that its MODSEQ is the higher one.
    for _ in range(5):
        lab.run(group, mark, "remove", "Later", lost.flagged)
        lab.run(group, mark, "add", "Later Untold", lost.flagged)
    mail = lab.mail()
    lab.run(group, f"printf %s | {doveadm}", mail.content.decode(), "save")
    lab.run(group, "systemctl enable --now umbra-agent.service")
    return Untold(mail.id, new.id, found)


def test_idle_clients_notice_within_a_second(lost: Lost, other: str) -> None:
    noticed(lost.clients, other)


def test_the_shadow_takes_over_by_itself(lost: Lost, other: str) -> None:
    lab.wait(f"{other} serves", lambda: serves(other), TAKEOVER)
    code, answer = lab.send(other, [USER], lab.mail().content)
    assert code == 250, answer
    lab.wait("what was acknowledged is there", lambda: lab.copies(other, USER, lost.message))
    change = lab.status(other)["last_switchover"]
    assert (change["to"], change["planned"]) == (other, False)


def test_what_was_on_hold_at_the_lost_primary_is_on_hold(lost: Lost, other: str) -> None:
    lab.wait("it has been carried on", lambda: HELD in lab.queue(other))
    assert lab.queue(other)[HELD][1] == "hold"


def test_the_former_primary_comes_back_harmless(
    lost: Lost, untold: Untold, group: str, other: str
) -> None:
    lab.wait("the group is protected", lambda: lab.status(other)["protected"], 90)
    assert serves(other)
    lab.wait(f"{group} is ready", lambda: ready(group), 5)
    assert lab.host(group).run("systemctl is-active postfix").rc != 0
    assert [len(lab.copies(node, USER, lost.message)) for node in lab.NODES] == [1, 1]
    assert (has(group), has(other)) == ([], list(ADDRESSES))


def test_what_a_lost_primary_told_nobody_undoes_nothing(
    lost: Lost, untold: Untold, group: str, other: str
) -> None:
    for node in lab.NODES:
        assert flags(node, lost.flagged) == {"\\Flagged"}
        assert len(lab.copies(node, FLAGGED, untold.message)) == 1
    assert "1 equal" in lab.run(other, "umbractl verify %s", FLAGGED)
    assert "flags of message" in lab.run(other, "umbractl merged")


def test_a_uid_that_was_given_stays_and_no_mailbox_is_copied_anew(
    untold: Untold, group: str, other: str
) -> None:
    assert [uid(node, untold.new) for node in lab.NODES] == [untold.uid] * 2
    assert len({uid(node, untold.message) for node in lab.NODES}) == 1
    assert "is missing locally" not in lab.run(group, "journalctl -b -u dovecot")


def test_a_switchover_takes_it_back(group: str, other: str) -> None:
    with idle_clients(group) as clients:
        result = lab.run(group, "umbractl switchover %s", group)
        assert f"The primary moved from {other} to {group}" in result
        noticed(clients, group)
    assert has(other) == []
    lab.wait("it serves", lambda: serves(group), 10)
    lab.wait("the group is protected", lambda: lab.status(group)["protected"], 30)


def queued(node: str) -> int:
    """How many messages Postfix goes on with."""
    places = " ".join(f"/var/spool/postfix/{name}" for name in ("incoming", "active", "deferred"))
    return int(lab.run(node, f"find {places} -type f -perm -u+x | wc -l"))


def test_what_was_handed_over_is_not_lost_with_the_new_primary(group: str, other: str) -> None:
    """The new primary dies before it has carried on what it took over.

    It had lost its shadow store before, and got all copies again.
    """
    lab.run(
        group,
        "for n in $(seq 200); do echo | sendmail -f root@example.org user$n@outside.example & "
        "[ $((n % 10)) = 0 ] && wait; done; wait",
    )
    lab.wait("all are queued", lambda: queued(group) == 200, 60)
    # What has no copy would not be handed over, but held for the administrator: so the shadow has
    # got all of them again before the group calls itself protected.
    lab.run(other, "systemctl stop umbra-agent && rm -r /var/lib/umbra/shadow")
    lab.wait("the group is degraded", lambda: not lab.status(group)["protected"])
    lab.run(other, "systemctl start umbra-agent")
    lab.wait("the group is protected", lambda: lab.status(group)["protected"], 60)
    lab.run(group, "umbractl switchover %s > /dev/null 2>&1 &", other)
    lab.wait(f"{other} serves", lambda: serves(other), 20)
    lab.power(other, on=False)
    try:
        lab.wait(f"{group} serves", lambda: serves(group), TAKEOVER)
        lab.wait("it goes on with all of them", lambda: queued(group) == 200, 60)
    finally:
        lab.power(other, on=True)
    lab.wait("the group is protected", lambda: lab.status(group)["protected"], 90)
    for node in lab.NODES:
        lab.run(node, "postsuper -d ALL")


def test_a_person_promotes_only_after_the_hook_has_switched_the_primary_off(
    group: str, other: str
) -> None:
    lab.run(group, "umbractl pause")
    lab.run(other, "touch /run/board-is-dead")
    lab.power(group, on=False)
    try:
        promote = "echo lose nothing | umbractl failover --accept-loss 2>&1"

        def refused() -> str:
            done = lab.host(other).run(promote)
            assert done.rc
            return done.stdout if "board" in done.stdout else ""  # else it has not noticed yet

        assert f"the board of {group} does not answer" in lab.wait("the hook is run", refused, 15)
        assert not serves(other)
        lab.run(other, "rm /run/board-is-dead")
        assert f"{group} is off, says" in lab.run(other, promote)
        lab.wait(f"{other} serves", lambda: serves(other), TAKEOVER)
        words = lab.run(other, "journalctl -o cat -u 'umbra-stonith@*'")
        assert f"{group} is off" in words
        assert "says root" not in words
        assert "board-password" not in lab.run(other, "journalctl -o cat -u 'umbra-*'")
    finally:
        lab.run(other, "rm -f /run/board-is-dead")
        lab.power(group, on=True)
    lab.wait("the group is protected", lambda: lab.status(other)["protected"], 90)
    lab.run(other, "umbractl unpause")
