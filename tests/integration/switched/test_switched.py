"""After a switchover: the other node is primary, by all words, and nothing was lost on the way."""

from __future__ import annotations

import imaplib

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
