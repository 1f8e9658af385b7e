"""What the role mail_server refuses is named, without a password hash."""

from __future__ import annotations

import pytest

from .conftest import Play

PREFLIGHT = """\
- name: Preflight
  hosts: mail-a
  connection: local
  gather_facts: false
  tasks:
    - ansible.builtin.import_role: {name: umbra.mail.mail_server, tasks_from: preflight}
"""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            '"mail_server_mailboxes": [{"address": "ann@example.com", "password_hash": "secret"}]',
            "Mailbox ann@example.com is in none of mail_server_domains, has a password_hash that",
        ),
        ('"mail_server_postfix_conf": {"a": "x", "b": 1, "c": true, "d": ""}', ""),
        *(
            (
                f'"mail_server_postfix_conf": {{"bad": {value}}}',
                "mail_server_postfix_conf: bad cannot",
            )
            for value in ("null", '["x"]', '{"x": 1}', '"x\\ny = z"')
        ),
        ('"mail_server_postfix_conf": {"a b": 1}', "mail_server_postfix_conf: a b cannot be"),
        ('"umbra_group": "mail", "mail_server_notify_timeout": 29', "make it 30 or more"),
        ('"mail_server_notify_timeout": 29', ""),
        ('"umbra_group": "mail", "mail_server_notify_timeout": "30"', ""),
    ],
)
def test_a_setting(play: Play, settings: str, words: str) -> None:
    run = play(
        *(PREFLIGHT, "--start-at-task", "Check Postfix's parameters", "-vv"),
        *("-e", f'{{"mail_server_domains": ["example.org"], {settings}}}'),
    )
    assert (run.code != 0) is bool(words), run.output
    assert words in run.words
    assert "secret" not in run.output
