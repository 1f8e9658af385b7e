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


def append(session: imaplib.IMAP4, mail: lab.Mail | None = None) -> float:
    """Append a message; how long the client waited for its OK, in seconds."""
    started = time.monotonic()
    content = (mail or lab.mail()).content
    answer = session.append("INBOX", "", imaplib.Time2Internaldate(time.time()), content)
    assert answer[0] == "OK", answer
    return time.monotonic() - started


@pytest.fixture(scope="module")
def session(protected: None, primary: str) -> Iterator[imaplib.IMAP4]:
    """A user who is at work when it happens."""
    assert primary != GONE
    with lab.imap(primary, USER) as session:
        session.select("INBOX")
        append(session)
        append(session, lab.mail(lab.DELETED))
    with lab.imap(primary, lab.HALF_LOST) as session:
        append(session)
        append(session)
    with lab.imap(primary, USER) as session:
        session.select("INBOX")
        yield session


def test_mailboxes_go_on_at_once(session: imaplib.IMAP4, primary: str) -> None:
    # What a power cut may leave of a message that is being expunged: its entry in the index.
    removed = (
        f"rm $(ls -t $(doveadm mailbox path -u {lab.HALF_LOST} INBOX)/u.* | head -1) && sync;"
        f" doveadm search -u {lab.HALF_LOST} mailbox INBOX ALL | wc -l"
    )
    assert int(lab.run(GONE, removed)) == int(
        lab.run(primary, f"doveadm search -u {lab.HALF_LOST} mailbox INBOX ALL | wc -l")
    )
    lab.power(GONE, on=False)
    # The first change finds it out, within the mirror's time-out; from then on nobody waits.
    assert append(session) < 8
    assert max(append(session) for _ in range(5)) < 1
    assert session.noop()[0] == "OK"


def test_what_is_deleted_no_log_tells_later(session: imaplib.IMAP4, primary: str) -> None:
    """As after a day of a busy mailbox: Dovecot keeps two files of a mailbox's history."""
    (uids,) = session.uid("SEARCH", "SUBJECT", f'"{lab.DELETED}"')[1]
    assert session.uid("STORE", uids.decode(), "+FLAGS", r"(\Deleted)")[0] == "OK"
    assert session.expunge()[0] == "OK"
    sizes = ("log_rotate_min_size=64", "log_rotate_max_size=128", "log_rotate_min_age=0s",
             "log2_max_age=1s", "rewrite_min_log_bytes=1", "rewrite_max_log_bytes=1")  # fmt: skip
    options = " ".join(f"-o mail_index_{size}" for size in sizes)
    for number in range(6):
        change = f"flags add -u {USER} meanwhile-{number} mailbox INBOX all"
        lab.run(primary, f"doveadm {options} {change} && doveadm {options} index -u {USER} INBOX")
        time.sleep(1)
    path = lab.run(primary, f"doveadm mailbox path -u {USER} INBOX").strip()
    history = lab.run(primary, "cat %s/dovecot.index.log* | wc -c", path)
    assert int(history) < 1000


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
