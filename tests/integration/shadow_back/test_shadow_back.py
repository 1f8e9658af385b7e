"""The shadow's power returns: protected again without a person, and nothing is missing there."""

from __future__ import annotations

import pytest
from tests.integration import lab

BACK = "mail-b"


@pytest.fixture(scope="module", autouse=True)
def powered() -> None:
    lab.power(BACK, on=True)


def test_it_starts_fenced(primary: str) -> None:
    """From its first moment on, no client reaches a mail service of the node that returns."""
    lab.wait("the host answers", lambda: lab.answers(BACK), 60)
    assert lab.run(BACK, "systemctl is-active umbra-fence.service").strip() == "active"
    elements = lab.run(BACK, "nft list set inet umbra_fence open_ports")
    assert "elements" not in elements
    assert primary != BACK


def test_protected_again_without_a_person(primary: str) -> None:
    lab.wait("the group is protected again", lambda: lab.status(primary)["protected"], 100)
    assert lab.status(primary)["primary"] == primary
    lab.wait("the shadow has heard of it", lambda: lab.status(BACK)["protected"], 5)


def test_nothing_is_missing(primary: str) -> None:
    there = lab.contents(primary)
    assert len(there["user07@example.org"]) > 5, "what changed while the shadow was off"
    assert len(there["user08@example.org"]) >= 5, "what was accepted while the shadow was off"
    assert lab.contents(BACK) == there
    for user in lab.MAILBOXES:
        assert lab.folders(BACK, user) == lab.folders(primary, user)


def test_a_message_that_lost_its_file_is_whole_again(primary: str) -> None:
    """Not only its entry in the index, which is all that dsync looks at."""
    said = lab.run(BACK, "journalctl -b -o cat -u umbra-mail-files")
    assert "1 messages had no file" in said
    fetch = f"doveadm -f tab fetch -u {lab.HALF_LOST} 'uid text' mailbox INBOX ALL"
    assert lab.run(BACK, fetch) == lab.run(primary, fetch)


def test_what_was_deleted_meanwhile_stays_deleted(primary: str) -> None:
    query = "doveadm search -u user07@example.org mailbox INBOX SUBJECT %s"
    for node in (primary, BACK):
        assert lab.run(node, query, lab.DELETED) == ""


def test_a_new_message_is_on_both(primary: str) -> None:
    mail = lab.mail()
    assert lab.send(primary, ["user08@example.org"], mail.content)[0] == 250
    lab.wait("Postfix's queue is empty", lambda: not lab.run(primary, "postqueue -j").strip())
    here = lab.copies(primary, "user08@example.org", mail.id)
    assert len(here) == 1
    assert lab.copies(BACK, "user08@example.org", mail.id) == here
