"""After a switchover: the other node is primary, by all words, and nothing was lost on the way."""

from __future__ import annotations

import imaplib
import smtplib
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from tests.integration import lab


def test_the_primary_has_moved(primary: str) -> None:
    """mail-a is primary by the inventory; the switchover made mail-b it."""
    assert primary == "mail-b"
    for node in lab.NODES:
        report = lab.status(node)
        assert report["primary"] == "mail-b"
        assert report["epoch"] >= 2
        change = report["last_switchover"]
        assert (change["from"], change["to"], change["planned"]) == ("mail-a", "mail-b", True)


def test_protected_again_without_a_person(protected: None) -> None:
    for node in lab.NODES:
        assert lab.run(node, "umbractl health") == "protected\n"


def test_nothing_is_missing_on_either_node(protected: None, primary: str, shadow: str) -> None:
    there = lab.contents(primary)
    assert sum(map(len, there.values())) > 0, "the mail of the tests before is not there"
    assert lab.contents(shadow) == there


def test_the_agent_stays_primary_over_a_restart(protected: None, primary: str) -> None:
    """Within the fence's hold: a client that is connected keeps its session."""
    with lab.imap(primary, "user06@example.org") as session:
        session.select("INBOX")
        lab.run(primary, "systemctl restart umbra-agent.service")
        lab.wait("the agent is back", lambda: lab.host(primary).run("umbractl health").rc == 0, 30)
        assert session.noop()[0] == "OK"
    assert lab.status(primary)["primary"] == primary


def test_a_flag_that_was_removed_in_the_other_nodes_term_stays_removed(
    protected: None, primary: str, shadow: str
) -> None:
    user = "user07@example.org"

    def flags(node: str) -> str:
        return lab.run(node, "doveadm fetch -u %s 'uid flags' mailbox terms ALL", user)

    with lab.imap(primary, user) as session:
        session.create("terms")
        session.append("terms", "", imaplib.Time2Internaldate(0), b"Subject: one\r\n\r\nx\r\n")
        session.select("terms")
        assert session.store("1", "+FLAGS", "($Important \\Flagged)")[0] == "OK"
    lab.run(primary, "umbractl switchover %s", shadow)
    with lab.imap(shadow, user) as session:
        session.select("terms")
        assert session.store("1", "-FLAGS", "($Important \\Flagged)")[0] == "OK"
    lab.run(shadow, "umbractl switchover %s", primary)
    with lab.imap(primary, user) as session:
        session.append("terms", "", imaplib.Time2Internaldate(0), b"Subject: two\r\n\r\nx\r\n")
    for node in (primary, shadow):
        assert "$Important" not in flags(node)
        assert "Flagged" not in flags(node)


def test_what_sieve_redirects_meanwhile_is_not_left_behind(
    protected: None, primary: str, shadow: str
) -> None:
    """It waited in the former primary's ``maildrop``, though what it came from was delivered."""
    first, second = "user08@example.org", "user09@example.org"
    sent: list[lab.Mail] = []

    def send() -> None:
        for node in (primary, shadow):
            mail = lab.mail()
            try:
                if lab.send(node, [first], mail.content)[0] == 250:
                    sent.append(mail)
            except (OSError, smtplib.SMTPException):
                continue

    over = threading.Event()

    def load() -> None:
        while not over.is_set():
            send()

    with lab.redirected(primary, first, second), ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load) for _ in range(4)]
        try:
            lab.wait("mail flows", lambda: len(sent) > 20)
            lab.run(primary, "umbractl switchover %s", shadow)
            enough = len(sent) + 20
            lab.wait("mail flows again", lambda: len(sent) > enough)
            over.set()
            for running in loads:
                running.result()
            left = "postqueue -f; postqueue -j"
            lab.wait("all is delivered", lambda: not lab.run(shadow, left), 60)
            assert not lab.run(primary, "ls /var/spool/postfix/maildrop")
            for mail in sent:
                assert len(lab.copies(shadow, second, mail.id)) == 1
        finally:
            over.set()
            lab.run(shadow, "umbractl switchover %s", primary)


def test_what_somebody_held_stays_held_and_what_was_requeued_is_taken_along(
    protected: None, primary: str, shadow: str
) -> None:
    held, requeued = names = ("held@deferred.example.net", "requeued@deferred.example.net")
    for name in names:
        command = "printf 'Subject: x\\n\\nx\\n' | sendmail -f user05@example.org %s"
        lab.run(primary, command, name)

    def deferred() -> bool:
        return all(lab.queue(primary).get(name, ("", ""))[1] == "deferred" for name in names)

    lab.wait("both are deferred", deferred)
    before = lab.queue(primary)
    lab.run(primary, "postsuper -h %s", before[held][0])
    # Told nothing, Postfix looks for it once a minute.
    lab.run(primary, "postsuper -r %s && postkick public pickup W", before[requeued][0])

    def followed() -> bool:
        renamed = lab.queue(primary).get(requeued, before[requeued])[0] != before[requeued][0]
        said = lab.run(primary, "umbractl switchover %s --dry-run", shadow)
        return renamed and "no copy" not in said

    def both(node: str) -> bool:
        return lab.queue(node).keys() >= set(names)

    def neither(node: str) -> bool:
        return lab.queue(node).keys().isdisjoint(names)

    lab.wait("the copy is the new file's", followed)
    for former, new in ((primary, shadow), (shadow, primary)):
        lab.run(former, "umbractl switchover %s", new)
        lab.wait("both have been carried on", partial(both, new))
        assert lab.queue(new)[held][1] == "hold"
        assert lab.queue(new)[requeued][1] != "hold"
        lab.wait("nothing is left behind", partial(neither, former))
    for name in names:
        lab.run(primary, "postsuper -d %s", lab.queue(primary)[name][0])
