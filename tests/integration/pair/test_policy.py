"""No open relay and no password in clear text, on whichever node is primary."""

from __future__ import annotations

import imaplib
import smtplib

import pytest
from tests.integration import lab


@pytest.mark.parametrize("sender", ["someone@example.com", "user01@example.org", ""])
@pytest.mark.parametrize(
    "recipient",
    [
        "victim@example.com",
        "victim%example.com@example.org",
        "@example.org:victim@example.com",
        '"victim@example.com"@example.org',
    ],
)
def test_no_open_relay(primary: str, sender: str, recipient: str) -> None:
    with lab.smtp(primary) as session:
        session.ehlo()
        assert session.mail(sender)[0] == 250
        code, answer = session.rcpt(recipient)
    assert 500 <= code < 600, answer


@pytest.mark.parametrize("port", [25, 587])
def test_submission_without_login_is_refused(primary: str, port: int) -> None:
    with lab.smtp(primary, port) as session:
        session.starttls(context=lab.tls())
        session.ehlo()
        session.mail("user01@example.org")
        code, answer = session.rcpt("someone@example.com")
    assert 500 <= code < 600, answer


@pytest.mark.parametrize("port", [25, 587])
def test_no_password_in_clear_text_over_smtp(primary: str, port: int) -> None:
    with lab.smtp(primary, port) as session:
        session.ehlo()
        assert not session.has_extn("auth")
        assert session.has_extn("starttls")
        code, answer = session.docmd("AUTH", "PLAIN AHVzZXIwMUBleGFtcGxlLm9yZwB1bWJyYS1sYWI=")
    assert 500 <= code < 600, answer


def test_no_login_on_port_25_at_all(primary: str) -> None:
    with lab.smtp(primary) as session:
        session.starttls(context=lab.tls())
        session.ehlo()
        assert not session.has_extn("auth")


def test_submission_with_login(primary: str) -> None:
    with lab.smtp(primary, 587) as session:
        session.starttls(context=lab.tls())
        session.login("user01@example.org", lab.PASSWORD)
        assert session.mail("user01@example.org")[0] == 250
        assert session.rcpt("user02@example.org")[0] == 250
        # Nobody else's address.
        session.rset()
        session.mail("user02@example.org")
        code, answer = session.rcpt("user03@example.org")
    assert 500 <= code < 600, answer


def test_wrong_password_is_refused(primary: str) -> None:
    with lab.smtp(primary, 587) as session:
        session.starttls(context=lab.tls())
        with pytest.raises(smtplib.SMTPAuthenticationError):
            session.login("user01@example.org", "wrong")


def test_no_password_in_clear_text_over_imap(primary: str) -> None:
    with lab.route(lab.ADDRESSES[primary], 143) as connection:
        session = lab.Imap(connection)
        assert "LOGINDISABLED" in session.capabilities
        assert "STARTTLS" in session.capabilities
        with pytest.raises(imaplib.IMAP4.error):
            session.login("user01@example.org", lab.PASSWORD)
        session.shutdown()


def test_unknown_mailbox_is_refused(primary: str) -> None:
    """At once, or the server would send bounces to forged senders."""
    with lab.smtp(primary) as session:
        session.ehlo()
        session.mail("someone@example.com")
        code, answer = session.rcpt("nobody-of-this-name@example.org")
    assert code == 550, answer
