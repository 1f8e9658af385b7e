"""`replication_agent_mirror_mode: async`: no change waits, all are copied soon after."""

from __future__ import annotations

import imaplib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.integration import lab

USER = "user04@example.org"
PERMIT = "/run/umbra/unasked"


def set_mode(mode: str) -> None:
    """Have both agents mirror in this mode."""
    for node in lab.NODES:
        lab.run(node, "sed -i %s /etc/umbra/agent.yml", rf"s/\(mirror_mode\W* \)\w*/\1{mode}/")
        lab.run(node, "systemctl restart umbra-agent")


def asked(node: str) -> float:
    """How often Dovecot has asked the agent."""
    return sum(
        value
        for key, value in lab.metrics(node).items()
        if key.startswith("umbra_mirror_notifications_total")
    )


def permitted(node: str) -> bool:
    """Whether changes go unasked, as Dovecot's processes see it."""
    read = lab.host(node).run("runuser -u vmail -- cat %s /proc/uptime", PERMIT)
    if read.rc:
        return False
    till, now, *_ = map(float, read.stdout.split())
    return now < till


def append(session: imaplib.IMAP4, number: int) -> None:
    content = f"Subject: number {number}\r\n\r\nx\r\n".encode()
    assert session.append("unasked", "", imaplib.Time2Internaldate(0), content)[0] == "OK"


def numbers(node: str) -> list[str]:
    """The subjects of the messages that a node has."""
    fetched = lab.run(
        node, "doveadm -f tab fetch -u %s hdr.subject mailbox unasked ALL", USER
    ).splitlines()[1:]
    return sorted(fetched)


@pytest.fixture(scope="module")
def asynchronous(protected: None, primary: str) -> Iterator[None]:
    with lab.imap(primary, USER) as session:
        session.delete("unasked")
    set_mode("async")
    lab.wait("changes go unasked", lambda: permitted(primary))
    yield
    set_mode("sync")
    lab.wait("the group is protected", lambda: lab.status(primary)["protected"], 60)


def test_changes_go_unasked_and_are_copied(asynchronous: None, primary: str, shadow: str) -> None:
    with lab.imap(primary, USER) as session:
        session.create("unasked")  # the agent hears of each change of the tree
        before = asked(primary)
        for number in range(20):
            append(session, number)
        session.select("unasked")
        assert session.store("1:*", "+FLAGS", "\\Flagged")[0] == "OK"
    assert asked(primary) == before
    lab.wait("the shadow has them", lambda: numbers(shadow) == numbers(primary), 5)
    assert len(numbers(shadow)) == 20
    flagged = "doveadm -f tab fetch -u %s uid mailbox unasked FLAGGED"
    lab.wait(
        "the flags, too", lambda: lab.run(shadow, flagged, USER) == lab.run(primary, flagged, USER)
    )
    assert len(lab.run(shadow, flagged, USER).splitlines()) == 21


def test_a_change_waits_for_an_agent_that_has_stopped(asynchronous: None, primary: str) -> None:
    """The permit ends a second after the agent; what it does not allow is asked for.

    Also in a session that has seen the permit.
    """
    with lab.imap(primary, USER) as session, ThreadPoolExecutor(1) as pool:
        append(session, 20)
        lab.run(primary, "systemctl kill --kill-whom=main --signal=STOP umbra-agent")
        try:
            lab.wait("the permit ends", lambda: not permitted(primary), 5)
            change = pool.submit(append, session, 21)
            time.sleep(0.5)
            assert not change.done()
        finally:
            lab.run(primary, "systemctl kill --kill-whom=main --signal=CONT umbra-agent")
        change.result(timeout=10)
    lab.wait("changes go unasked again", lambda: permitted(primary))


def test_a_switchover_takes_along_what_went_unasked(
    asynchronous: None, primary: str, shadow: str
) -> None:
    with lab.imap(primary, USER) as session:
        for number in range(22, 60):
            append(session, number)
        lab.run(primary, "umbractl switchover %s", shadow)
    assert len(numbers(shadow)) == 60
    assert not permitted(primary)
    lab.wait("the new primary lets changes go", lambda: permitted(shadow))
    with lab.imap(shadow, USER) as session:
        append(session, 60)
    lab.run(shadow, "umbractl switchover %s", primary)
    assert len(numbers(primary)) == 61
    lab.wait("the shadow has all", lambda: numbers(shadow) == numbers(primary), 10)
