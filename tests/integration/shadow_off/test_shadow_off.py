"""The shadow's power goes: mail is deferred, mailboxes go on, and everybody can see why."""

from __future__ import annotations

import imaplib
import json
import time
from collections.abc import Iterator

import pytest
from tests.integration import lab

USER = "user07@example.org"
GONE = "mail-b"


def append(session: imaplib.IMAP4) -> float:
    """Append a message; how long the client waited for its OK, in seconds."""
    started = time.monotonic()
    answer = session.append("INBOX", "", imaplib.Time2Internaldate(time.time()), lab.mail().content)
    assert answer[0] == "OK", answer
    return time.monotonic() - started


@pytest.fixture(scope="module")
def session(protected: None, primary: str) -> Iterator[imaplib.IMAP4]:
    """A user who is at work when it happens."""
    assert primary != GONE
    with lab.imap(primary, USER) as session:
        session.select("INBOX")
        append(session)
        yield session


def test_mailboxes_go_on_at_once(session: imaplib.IMAP4, primary: str) -> None:
    lab.power(GONE, on=False)
    # The first change finds it out, within the mirror's time-out; from then on nobody waits.
    assert append(session) < 8
    assert max(append(session) for _ in range(5)) < 1
    assert session.noop()[0] == "OK"


def test_mail_is_deferred(primary: str) -> None:
    started = time.monotonic()
    mail = lab.mail()
    code, answer = lab.send(primary, [USER], mail.content)
    assert code == 451, answer
    assert time.monotonic() - started < 8
    assert lab.copies(primary, USER, mail.id) == []
    assert lab.run(primary, "postqueue -j").strip() == ""


def test_degraded_and_why_in_the_same_words(primary: str) -> None:
    report = lab.status(primary)
    assert report["protected"] is False
    assert report["mode"] == "alone"
    assert report["primary"] == primary
    assert [reason for reason in report["reasons"] if GONE in reason], report["reasons"]

    code, body = lab.ask(primary, "/health")
    assert code == 503
    assert json.loads(body) == {"status": "degraded", "reasons": report["reasons"]}

    values = lab.metrics(primary)
    assert values["umbra_protected"] == 0
    assert values[f'umbra_node_reachable{{node="{GONE}",site="beta"}}'] == 0
    shown = [key for key, value in values.items() if key.startswith("umbra_degraded_reason{")]
    assert len(shown) == len(report["reasons"])

    table = lab.host(primary).run("COLUMNS=160 umbractl status")
    assert table.rc == 1
    assert "group mail: degraded" in table.stdout
    for reason in report["reasons"]:
        assert reason in table.stdout
    (line,) = [line for line in table.stdout.splitlines() if line.startswith(GONE)]
    assert "unreachable" in line


def test_a_switchover_is_refused_with_the_reason(primary: str) -> None:
    refused = lab.host(primary).run("umbractl switchover %s", GONE)
    assert refused.rc == 1
    assert GONE in refused.stderr
    assert lab.status(primary)["primary"] == primary


def test_all_kinds_of_changes_go_on(session: imaplib.IMAP4, primary: str) -> None:
    """What the shadow will have to catch up with."""
    session.select("INBOX")
    for step in (
        session.create("while-alone"),
        session.copy("1:3", "while-alone"),
        session.store("2", "+FLAGS", r"(\Deleted)"),
        session.expunge(),
        session.store("1", "+FLAGS", r"(\Flagged $Seen2)"),
        session.subscribe("while-alone"),
    ):
        assert step[0] == "OK", step
