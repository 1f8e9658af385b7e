"""Mailbox changes: on the shadow when the client is told OK, without any waiting."""

from __future__ import annotations

import imaplib
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from tests.integration import lab

pytestmark = pytest.mark.usefixtures("protected")
USER = "user05@example.org"


@pytest.fixture
def session(primary: str) -> Iterator[imaplib.IMAP4]:
    with lab.imap(primary, USER) as session:
        session.select("INBOX")
        yield session


def ok(answer: tuple[str, list[bytes]]) -> bytes:
    """The text of an answer that must be OK."""
    assert answer[0] == "OK", answer
    return answer[1][0] or b""


def append(session: imaplib.IMAP4, mailbox: str = "INBOX") -> tuple[lab.Mail, str]:
    """Append a message; it and its UID."""
    mail = lab.mail()
    ok(session.append(mailbox, "", imaplib.Time2Internaldate(time.time()), mail.content))
    code, values = session.response("APPENDUID")
    assert code == "APPENDUID"
    return mail, values[0].split()[1].decode()


def on(node: str, mail: lab.Mail) -> str:
    """Where a node has a message and with which flags; empty if it has not."""
    command = "doveadm -f tab fetch -u %s 'mailbox flags' mailbox '*' HEADER Message-ID %s"
    lines = lab.run(node, command, USER, mail.id).splitlines()[1:]
    # \Recent belongs to a session, not to the message.
    return " ".join(word for line in lines for word in line.split() if word != r"\Recent")


def test_append(session: imaplib.IMAP4, shadow: str) -> None:
    mail, _ = append(session)
    assert on(shadow, mail).startswith("INBOX")


def test_flags_and_keywords(session: imaplib.IMAP4, shadow: str) -> None:
    mail, uid = append(session)
    ok(session.uid("STORE", uid, "+FLAGS", r"(\Flagged $Label1)"))
    assert r"\Flagged" in on(shadow, mail)
    assert "$Label1" in on(shadow, mail)
    ok(session.uid("STORE", uid, "-FLAGS", r"(\Flagged)"))
    assert r"\Flagged" not in on(shadow, mail)


def test_reading_marks_as_seen(session: imaplib.IMAP4, shadow: str) -> None:
    mail, uid = append(session)
    assert r"\Seen" not in on(shadow, mail)
    assert session.uid("FETCH", uid, "(BODY[])")[0] == "OK"
    # The mark is a side effect, not a change that the client was told of: soon is enough.
    lab.wait("the shadow has the mark", lambda: r"\Seen" in on(shadow, mail), 5)


def test_copy_and_expunge(session: imaplib.IMAP4, shadow: str) -> None:
    mail, uid = append(session)
    ok(session.uid("COPY", uid, "Drafts"))
    assert sorted(on(shadow, mail).split()) == ["Drafts", "INBOX"]
    ok(session.uid("STORE", uid, "+FLAGS", r"(\Deleted)"))
    ok(session.expunge())
    assert on(shadow, mail) == "Drafts"


def test_move(session: imaplib.IMAP4, shadow: str) -> None:
    mail, uid = append(session)
    ok(session.uid("MOVE", uid, "Trash"))
    assert on(shadow, mail) == "Trash"


def test_mailboxes(session: imaplib.IMAP4, shadow: str) -> None:
    first, second = (f"box-{uuid.uuid4().hex[:8]}" for _ in range(2))
    ok(session.create(first))
    assert first in lab.folders(shadow, USER)[0]
    mail, _ = append(session, first)
    assert on(shadow, mail) == first
    ok(session.subscribe(first))
    lab.wait("the shadow is subscribed", lambda: first in lab.folders(shadow, USER)[1], 5)
    ok(session.rename(first, second))
    every = lab.folders(shadow, USER)[0]
    assert second in every
    assert first not in every
    assert on(shadow, mail) == second
    ok(session.delete(second))
    assert second not in lab.folders(shadow, USER)[0]
    assert on(shadow, mail) == ""


def counted(primary: str, name: str, label: str = "") -> float:
    """What a counter of the mirror stands at, of all peers."""
    return sum(
        value
        for key, value in lab.metrics(primary).items()
        if key.startswith(f"umbra_mirror_{name}_total") and label in key
    )


def alone(primary: str) -> float:
    """How often a mailbox was synced without the user's others."""
    return counted(primary, "foretold", 'how="mailbox"')


@pytest.mark.parametrize(
    "name", ["INBOX", "Sent", "Gr&APw-n/a b", "Gr&APw-n", "R&-D", 'say \\"no\\"', "-m", "a.b/c/d"]
)
def test_flags_and_expunges_are_of_their_mailbox_alone(
    session: imaplib.IMAP4, primary: str, shadow: str, name: str
) -> None:
    mailbox = f'"{name}"'
    session.create(mailbox)
    mail, uid = append(session, mailbox)
    other, other_uid = append(session, mailbox)
    assert session.select(mailbox)[0] == "OK"
    before = alone(primary)
    ok(session.uid("STORE", uid, "+FLAGS", r"(\Flagged $Label2)"))
    assert r"\Flagged" in on(shadow, mail)
    assert "$Label2" in on(shadow, mail)
    ok(session.uid("STORE", uid, "-FLAGS", r"($Label2)"))
    assert "$Label2" not in on(shadow, mail)
    ok(session.uid("STORE", other_uid, "+FLAGS", r"(\Deleted)"))
    ok(session.uid("EXPUNGE", other_uid))
    assert on(shadow, other) == ""
    assert alone(primary) == before + 4
    assert lab.contents(shadow)[USER] == lab.contents(primary)[USER]


@pytest.fixture
def script(primary: str) -> Iterator[None]:
    """The user has a Sieve script, of which INBOX's log tells."""
    name = f"script-{uuid.uuid4().hex[:8]}"
    lab.run(primary, "echo keep\\; | doveadm sieve put -u %s %s", USER, name)
    yield
    lab.run(primary, "doveadm sieve delete -u %s %s", USER, name)


def test_inbox_is_renamed(primary: str, shadow: str, script: None) -> None:
    """RFC 9051, 6.3.6: its messages get another mailbox, and it is there again, empty."""
    name = f"box-{uuid.uuid4().hex[:8]}"
    with lab.imap(primary, USER) as session:
        mail, _ = append(session)
        ok(session.rename("INBOX", name))
        # dsync has to empty the shadow's INBOX for that: before, nobody may rely on it any more.
        assert not lab.status(primary)["protected"] or on(shadow, mail) == name
        lab.wait("the group is protected", lambda: lab.status(primary)["protected"], 60)
        assert on(shadow, mail) == name
        assert lab.contents(shadow)[USER] == lab.contents(primary)[USER]
        later, uid = append(session)
        assert session.select("INBOX")[0] == "OK"
        ok(session.uid("STORE", uid, "+FLAGS", r"(\Flagged)"))
        assert on(shadow, later) == r"INBOX \Flagged"
        ok(session.delete(name))
        assert on(shadow, mail) == ""


def test_flags_of_a_mailbox_that_is_renamed_meanwhile(primary: str, shadow: str) -> None:
    """The agent hears of both at once; the name of the first is another mailbox's by then."""
    first, second = (f"box-{uuid.uuid4().hex[:8]}" for _ in range(2))
    with (
        lab.imap(primary, USER) as one,
        lab.imap(primary, USER) as two,
        ThreadPoolExecutor(2) as pool,
    ):
        ok(one.create(first))
        mail, uid = append(one, first)
        assert one.select(first)[0] == "OK"
        lab.run(primary, "systemctl kill --kill-whom=main --signal=STOP umbra-agent")
        try:
            flagged = pool.submit(one.uid, "STORE", uid, "+FLAGS", r"(\Flagged)")
            time.sleep(0.3)
            renamed = pool.submit(two.rename, first, second)
            time.sleep(0.3)
            assert [flagged.done(), renamed.done()] == [False, False]
        finally:
            lab.run(primary, "systemctl kill --kill-whom=main --signal=CONT umbra-agent")
        ok(renamed.result(20))
        assert on(shadow, mail) == rf"{second} \Flagged"
        ok(two.create(first))
        assert lab.contents(shadow)[USER] == lab.contents(primary)[USER]
        with suppress(imaplib.IMAP4.abort):  # Dovecot ends a session whose mailbox has gone
            flagged.result(20)


def test_many_changes_at_once_end_equal(primary: str, shadow: str) -> None:
    """Two sessions change one mailbox in turn; each OK is kept, and the nodes end equal."""
    with lab.imap(primary, USER) as one, lab.imap(primary, USER) as two:
        one.select("INBOX")
        two.select("INBOX")
        mails = []
        for _ in range(10):
            mail, uid = append(one)
            mails.append(mail)
            two.noop()
            ok(two.uid("STORE", uid, "+FLAGS", r"(\Answered)"))
    for mail in mails:
        assert on(shadow, mail) == r"INBOX \Answered"


def test_a_burst_to_one_user_shares_syncs(primary: str, shadow: str) -> None:
    """Deliveries that come together wait for one sync, not each for its own."""
    syncs, shared = counted(primary, "syncs"), counted(primary, "coalesced")
    mails = [lab.mail() for _ in range(40)]
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda mail: lab.send(primary, [USER], mail.content), mails))
    assert {code for code, _ in answers} == {250}
    lab.wait("the shadow has them all", lambda: all(on(shadow, mail) for mail in mails), 60)
    assert counted(primary, "coalesced") > shared
    assert counted(primary, "syncs") - syncs < len(mails)


def test_a_change_waits_for_an_agent_that_was_killed(primary: str, shadow: str) -> None:
    """It is acknowledged by the agent that was started next, not without one."""
    mark = lab.run(primary, "journalctl -u dovecot -n 0 --show-cursor").split("cursor: ")[1].strip()
    with lab.imap(primary, USER) as session:
        lab.run(primary, "systemctl kill --kill-whom=main --signal=KILL umbra-agent")
        mail, _ = append(session)
    protected = lab.status(primary)["protected"]
    assert on(shadow, mail) or not protected
    log = lab.run(primary, "journalctl -u dovecot --after-cursor %s", mark)
    assert "did not confirm" not in log
    lab.wait("the shadow has it", lambda: on(shadow, mail), 60)
    lab.wait("the group is protected", lambda: lab.status(primary)["protected"], 60)


def test_everything_is_equal_on_both_nodes(primary: str, shadow: str) -> None:
    assert lab.contents(shadow) == lab.contents(primary)
    for user in lab.MAILBOXES:
        assert lab.folders(shadow, user)[0] == lab.folders(primary, user)[0]


def test_a_repair_changes_the_copy_and_never_the_primary(
    session: imaplib.IMAP4, primary: str, shadow: str
) -> None:
    expunged, flagged, kept = (append(session)[0] for _ in range(3))
    before = lab.contents(primary)[USER]
    doveadm = f"{lab.DOVEADM_ALONE} %s -u {USER}"
    query = "mailbox INBOX HEADER Message-ID %s"
    lab.run(shadow, doveadm.replace("%s", "expunge") + f" {query}", expunged.id)
    for _ in range(5):  # so that its MODSEQ is over the primary's
        for verb in ("remove", "add"):
            lab.run(shadow, doveadm.replace("%s", f"flags {verb}") + f" Wrong {query}", flagged.id)
    stray = lab.mail()
    lab.run(shadow, f"printf %s | {doveadm.replace('%s', 'save')}", stray.content.decode())
    found = lab.host(primary).run("umbractl verify %s", USER)
    assert (found.rc, "1 different" in found.stdout) == (1, True)
    assert "1 repaired" in lab.run(primary, "umbractl verify --repair %s", USER)
    assert lab.contents(primary)[USER] == lab.contents(shadow)[USER] == before
    assert on(shadow, stray) == ""
    assert on(shadow, kept)
