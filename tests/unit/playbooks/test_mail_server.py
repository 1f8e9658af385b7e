"""What the role mail_server refuses is named, without a password hash."""

from __future__ import annotations

import subprocess
from pathlib import Path

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
        (
            '"mail_server_tls_valid_days": "60"',
            "mail_server_tls_valid_days is 60 and has to be more",
        ),
        ('"mail_server_tls_valid_days": 60, "mail_server_tls_renew_days": "59"', ""),
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


def openssl(path: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=path, check=True, capture_output=True)


def make(path: Path, name: str, days: str) -> None:
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc")
    openssl(path, "req", *key, "-subj", "/CN=x", "-keyout", f"{name}.key", "-out", f"{name}.csr")
    signed = ("-signkey", f"{name}.key", "-days", days, "-out", f"{name}.crt")
    openssl(path, "x509", "-req", "-in", f"{name}.csr", *signed)


@pytest.mark.parametrize(
    ("certificate", "key", "on_host", "words"),
    [
        ("none.crt", "good.key", False, "none.crt is no file on the controller; write the full"),
        ("good.crt", "none.key", False, "none.key is no file on the controller; write the full"),
        ("good.crt", "good.key", True, ""),
        ("good.crt", "good.key", False, ""),
        ("good.crt", "other.key", False, "other.key (mail_server_tls_key) is not the key of"),
        ("other.crt", "other.key", True, "other.crt (mail_server_tls_certificate) has expired."),
        ("good.key", "good.key", True, "(mail_server_tls_certificate) cannot be read as a cert"),
        ("good.crt", "locked.key", False, "cannot be read as a key without a passphrase."),
    ],
)
def test_a_provided_certificate(
    play: Play, tmp_path: Path, certificate: str, key: str, on_host: bool, words: str
) -> None:
    make(tmp_path, "good", "1")
    make(tmp_path, "other", "-1")
    locked = ("-out", "locked.key", "-aes256", "-passout", "pass:x")
    openssl(tmp_path, "ec", "-in", "good.key", *locked)
    run = play(
        *(PREFLIGHT, "--start-at-task", "Check that a certificate is named", "-vv", "--check"),
        *("-e", f"mail_server_tls_mode=provided mail_server_tls_on_host={on_host}"),
        *("-e", f"mail_server_tls_certificate={tmp_path}/{certificate}"),
        *("-e", f"mail_server_tls_key={tmp_path}/{key} mail_server_domains=example.org"),
    )
    assert (run.code != 0) is bool(words), run.output
    assert words in run.words
    assert "PRIVATE KEY" not in run.output
