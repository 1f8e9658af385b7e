"""Messages that a power cut has taken away in part."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from roles.mail_server.files.umbra_boot.mail_files import RECENT, decoded, main, mend, place, recent


class Doveadm:
    """Dovecot with one mailbox; what was asked of it."""

    def __init__(self, *uids: int) -> None:
        self.uids = list(uids)
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, *command: str) -> str:
        self.asked.append(command)
        if "fetch" in command:
            return "mailbox\tuid\n" + "".join(f"INBOX\t{uid}\n" for uid in self.uids)
        return ""

    @property
    def rebuilt(self) -> list[tuple[str, ...]]:
        return [command[1:] for command in self.asked if command[0] == "force-resync"]


def mailbox(root: Path, *uids: int, name: str = "INBOX", user: str = "ann") -> Path:
    messages = root / "example.org" / user / "mail" / "mailboxes" / name / "dbox-Mails"
    messages.mkdir(parents=True)
    for uid in uids:
        (messages / f"u.{uid}").touch()
    return messages


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("INBOX", "INBOX"),
        ("Entw&APw-rfe &- x", "Entwürfe & x"),
        ("&U,BTFw-", "台北"),
        ("&2D3eAA-", "😀"),
    ],
)
def test_a_name_as_it_is_on_the_disk(name: str, meant: str) -> None:
    assert decoded(name) == meant


def test_whose_mailbox_it_is(tmp_path: Path) -> None:
    messages = mailbox(tmp_path, name="Archive/Entw&APw-rfe")
    assert place(tmp_path, messages) == ("ann@example.org", "Archive/Entwürfe")
    with pytest.raises(ValueError, match="not where mailboxes are"):
        place(tmp_path, tmp_path / "example.org" / "ann" / "other" / "dbox-Mails")


def test_what_only_root_may_look_into_is_passed_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``lost+found``, where the mailboxes have a file system of their own."""
    (tmp_path / "lost+found").mkdir()
    there = mailbox(tmp_path)
    scandir = os.scandir

    def scan(path: Path) -> object:
        if path.name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert recent(tmp_path) == [there]
    assert "lost+found: Permission denied" in capsys.readouterr().err


def test_only_what_was_changed_last_is_looked_at(tmp_path: Path) -> None:
    now, old = mailbox(tmp_path), mailbox(tmp_path, name="INBOX/below")
    below = mailbox(tmp_path, user="bob")
    for path, age in ((now, 0), (old, RECENT + 10), (below, RECENT - 10)):
        os.utime(path, (1e9 - age, 1e9 - age))
    assert sorted(recent(tmp_path)) == sorted([now, below])
    assert recent(tmp_path / "example.org" / "bob" / "mail" / "mailboxes" / "INBOX") == [below]


def test_a_mailbox_with_all_its_files_is_left_alone(tmp_path: Path) -> None:
    dovecot = Doveadm(1, 3)
    assert mend("ann@example.org", {"INBOX": mailbox(tmp_path, 1, 2, 3)}, dovecot) == {}
    assert not dovecot.rebuilt


def test_a_message_without_a_file_has_the_index_rebuilt(tmp_path: Path) -> None:
    dovecot = Doveadm(1, 2, 3)
    mailboxes = {"INBOX": mailbox(tmp_path, 1, 3), "Sent": mailbox(tmp_path, 7, name="Sent")}
    assert mend("ann@example.org", mailboxes, dovecot) == {"INBOX": {2}}
    assert dovecot.rebuilt == [("-u", "ann@example.org", "--", "INBOX")]
    first = dovecot.asked[0]
    assert first[-5:] == ("mailbox", "INBOX", "OR", "mailbox", "Sent")


def test_a_name_is_never_an_option(tmp_path: Path) -> None:
    class Named(Doveadm):
        def __call__(self, *command: str) -> str:
            return super().__call__(*command).replace("INBOX", "-F/etc/shadow")

    dovecot = Named(1)
    assert mend("ann@example.org", {"-F/etc/shadow": mailbox(tmp_path)}, dovecot)
    assert [command.index("--") < command.index("-F/etc/shadow") for command in dovecot.asked] == [
        True
    ] * 3


def test_a_message_that_is_expunged_meanwhile_is_not_lost(tmp_path: Path) -> None:
    class Expunging(Doveadm):
        def __call__(self, *command: str) -> str:
            answer = super().__call__(*command)
            self.uids = [1]
            return answer

    dovecot = Expunging(1, 2)
    assert mend("ann@example.org", {"INBOX": mailbox(tmp_path, 1)}, dovecot) == {}
    assert not dovecot.rebuilt


def test_an_index_that_is_mended_by_the_first_question_is_asked_for_again(tmp_path: Path) -> None:
    class Damaged(Doveadm):
        def __call__(self, *command: str) -> str:
            answer = super().__call__(*command)
            if len(self.asked) == 1:
                raise subprocess.CalledProcessError(75, command)
            return answer

    dovecot = Damaged(1, 2)
    assert mend("ann@example.org", {"INBOX": mailbox(tmp_path, 1)}, dovecot) == {"INBOX": {2}}


def test_one_that_cannot_be_looked_at_does_not_keep_the_node_from_starting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = tmp_path / "example.org" / "ann" / "elsewhere" / "dbox-Mails"
    messages.mkdir(parents=True)
    assert main(str(tmp_path)) == 0
    assert "not where mailboxes are" in capsys.readouterr().err


def test_a_host_without_mail(tmp_path: Path) -> None:
    assert main(str(tmp_path)) == 0
