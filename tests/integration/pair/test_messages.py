"""Messages: on two nodes when they are acknowledged, each exactly once, byte for byte."""

from __future__ import annotations

import re
import time

import pytest
from tests.integration import lab

pytestmark = pytest.mark.usefixtures("protected")
USER = "user03@example.org"


def delivered(primary: str, user: str, mail: lab.Mail) -> list[str]:
    """The copies in the primary's mailbox, as soon as Dovecot has told Postfix that it is done."""
    lab.wait("Postfix's queue is empty", lambda: not lab.run(primary, "postqueue -j").strip())
    return lab.copies(primary, user, mail.id)


def test_delivered_message_is_on_the_shadow_at_once(primary: str, shadow: str) -> None:
    mail = lab.mail()
    code, answer = lab.send(primary, [USER], mail.content)
    assert code == 250, answer
    here = delivered(primary, USER, mail)
    assert len(here) == 1
    # No waiting: the delivery was mirrored before Dovecot told Postfix that it was done.
    assert lab.copies(shadow, USER, mail.id) == here


def test_acknowledged_message_is_on_the_shadow_before_it_is_delivered(
    primary: str, shadow: str
) -> None:
    """With delivery held back, the shadow has it all the same, and lets it go afterwards."""
    lab.wait("the shadow holds nothing", lambda: held(shadow) == 0)
    mail = lab.mail(body="".join(f"line {number}\n" for number in range(500)))
    lab.run(primary, "postconf -e defer_transports=lmtp && postfix reload && sleep 1")
    try:
        code, answer = lab.send(primary, [USER], mail.content)
        assert code == 250, answer
        files = lab.host(shadow).run("grep -rlF -- %s /var/lib/umbra/shadow", mail.id)
        assert files.stdout.strip(), "the shadow's store has no file with the message's id"
        lab.wait("the shadow's report has the message", lambda: held(shadow) == 1, 5)
        assert lab.copies(primary, USER, mail.id) == lab.copies(shadow, USER, mail.id) == []
    finally:
        lab.run(primary, "postconf -X defer_transports && postfix reload")
    # Asked again: the first time the queue manager may not have read its settings yet.
    lab.wait("it is delivered", lambda: lab.run(primary, "postqueue -f; postqueue -j") == "")
    assert len(delivered(primary, USER, mail)) == 1
    lab.wait("the shadow has let the message go", lambda: held(shadow) == 0)
    assert len(lab.copies(shadow, USER, mail.id)) == 1


def held(node: str) -> float:
    """How many messages in transit a node holds for its peers, by its own word."""
    (own,) = [item for item in lab.status(node)["nodes"] if item["node"] == node]
    return float(own["shadow_messages"])


def test_several_recipients_get_one_copy_each(primary: str, shadow: str) -> None:
    mail = lab.mail()
    code, answer = lab.send(primary, ["team@example.org", "user04@example.org"], mail.content)
    assert code == 250, answer
    for user in ("user01@example.org", "user02@example.org", USER, "user04@example.org"):
        here = delivered(primary, user, mail)
        assert len(here) == 1
        assert lab.copies(shadow, user, mail.id) == here


def test_what_sieve_redirects_is_on_the_shadow_before_the_delivery_is_over(
    primary: str, shadow: str
) -> None:
    """Through the milter, not through ``maildrop``, which no other node knows."""
    lab.wait("the shadow holds nothing", lambda: held(shadow) == 0)
    mail, elsewhere = lab.mail(), "redirected@deferred.example.net"
    with lab.redirected(primary, USER, elsewhere):
        assert lab.send(primary, [USER], mail.content)[0] == 250
        lab.wait("it goes on", lambda: elsewhere in lab.queue(primary))
    lab.wait("only that is left", lambda: list(lab.queue(primary)) == [elsewhere])
    lab.wait("the shadow has a copy of it", lambda: held(shadow) == 1, 5)
    assert not lab.copies(primary, USER, mail.id)
    queue_id = lab.queue(primary)[elsewhere][0]
    assert lab.host(primary).run("postcat -qh %s | grep -F '[127.0.0.1]'", queue_id).rc == 0
    lab.run(primary, "postsuper -d %s", queue_id)
    lab.wait("the shadow has let the message go", lambda: held(shadow) == 0)


def test_a_message_that_is_sent_twice_arrives_twice(primary: str, shadow: str) -> None:
    """Two acknowledgements are two messages, even of the same content."""
    mail = lab.mail()
    for _ in range(2):
        code, answer = lab.send(primary, [USER], mail.content)
        assert code == 250, answer
    here = delivered(primary, USER, mail)
    assert len(here) == 2
    assert sorted(lab.copies(shadow, USER, mail.id)) == sorted(here)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b".\r\n..\r\n. dots at line starts\r\n",
        b"long " * 180 + b"\r\n",
        "8 bit: \u00e4\u00f6\u00fc\r\n".encode("latin-1"),
        b"".join(b"%d\r\n" % number for number in range(100_000)),
    ],
    ids=["empty", "dots", "long line", "8 bit", "larger than memory's share"],
)
def test_content_is_what_was_sent(primary: str, shadow: str, body: bytes) -> None:
    mail = lab.mail()
    head = mail.content.partition(b"\r\n\r\n")[0]
    code, answer = lab.send(primary, [USER], head + b"\r\n\r\n" + body)
    assert code == 250, answer
    delivered(primary, USER, mail)
    for node in (primary, shadow):
        command = "doveadm fetch -u %s body mailbox INBOX HEADER Message-ID %s"
        raw = lab.host(node).run(command, USER, mail.id)
        fetched = raw.stdout_bytes.removeprefix(b"body:\n").removesuffix(b"\x0c\n")
        assert fetched.replace(b"\r\n", b"\n") == body.replace(b"\r\n", b"\n")


def test_each_message_carries_one_id_of_its_own(primary: str) -> None:
    mails = [lab.mail(), lab.mail()]
    ids = []
    for mail in mails:
        assert lab.send(primary, [USER], mail.content)[0] == 250
        delivered(primary, USER, mail)
        header = lab.run(
            primary, "doveadm fetch -u %s hdr.x-umbra-id HEADER Message-ID %s", USER, mail.id
        )
        ids += re.findall(r"^hdr\.x-umbra-id: *(\S+)$", header, re.MULTILINE)
    assert len(ids) == len(set(ids)) == 2


def test_queue_runs_empty_and_so_does_the_shadows(primary: str, shadow: str) -> None:
    lab.wait("Postfix's queue is empty", lambda: not lab.run(primary, "postqueue -j").strip())
    lab.wait("the shadow holds nothing", lambda: held(shadow) == 0)


def test_time_of_an_acknowledgement(primary: str) -> None:
    """The shadow copy costs milliseconds, not seconds: no time-out hides in the path."""
    mail = lab.mail()
    with lab.smtp(primary) as session:
        session.ehlo()
        session.mail("sender@example.com")
        session.rcpt(USER)
        started = time.monotonic()
        assert session.data(mail.content)[0] == 250
        assert time.monotonic() - started < 2
