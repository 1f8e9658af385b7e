"""Which mailboxes and aliases mail_server refuses, and what it says of them."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.umbra.mail.plugins.filter.mailbox_findings import FilterModule

findings = FilterModule().filters()["mailbox_findings"]

HASH = "{SHA512-CRYPT}$6$salt$secret"


def mailbox(address: str, **more: Any) -> dict[str, Any]:
    return {"address": address, "password_hash": HASH, **more}


def alias(address: str, *destinations: str) -> dict[str, Any]:
    return {"address": address, "destinations": list(destinations)}


@pytest.mark.parametrize("scheme", ["{SSHA512.b64}", "{plain-md5.hex}", "$2y$05$"])
def test_hashes_as_dovecot_writes_them(scheme: str) -> None:
    box = mailbox("ann@example.org", password_hash=f"{scheme}secret")
    assert findings([box], [], ["example.org"]) == []


def test_sound_ones() -> None:
    boxes = [mailbox("Ann@Example.org"), mailbox("bob@example.net", name="Bob B.")]
    boxes[1]["password_hash"] = "$6$salt$secret"
    others = [alias("sales@example.org", "ann@example.org", "sales+all@example.com")]
    assert findings(boxes, others, ["example.org", "EXAMPLE.net"]) == []


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (mailbox("carl"), "Mailbox carl is no plain address."),
        (mailbox("carl@example.com"), "Mailbox carl@example.com is in none of mail_server_domains"),
        (mailbox("carl+x@example.org"), "Mailbox carl+x@example.org has a +"),
        (mailbox("ANN@example.org"), "Mailbox ANN@example.org is there twice."),
        (mailbox("sales@example.org"), "Mailbox sales@example.org is an alias as well."),
        (
            mailbox("-carl@example.org"),
            "Mailbox -carl@example.org begins with -, as an option does.",
        ),
        (mailbox("carl@example.org\n"), "is no plain address"),
        (mailbox("carl@example.org", name="a:b"), "Mailbox carl@example.org has a name with :."),
        (
            mailbox("carl@example.org", password_hash="secret"),
            "Mailbox carl@example.org has a password_hash that does not start with its {SCHEME}",
        ),
        (
            mailbox("carl@example.org", password_hash="$6$secret:x"),
            "Mailbox carl@example.org has a password_hash",
        ),
        (alias("info", "ann@example.org"), "Alias info is no plain address."),
        (alias("info@example.org"), "Alias info@example.org has no destination."),
        (alias("sales@example.org", "ann@example.org"), "Alias sales@example.org is there twice."),
        (alias("info@example.com", "ann@example.org"), "Alias info@example.com is in none of mail"),
        (
            alias("info@example.org", "anne@Example.org", "anne@example.com"),
            "Alias info@example.org has the destination anne@Example.org, which is no mailbox or"
            " alias here.",
        ),
        (
            alias("info@example.org", "root@example.org"),
            "has the destination root@example.org, which is no mailbox or alias here.",
        ),
        (alias("info@example.org", "ann"), "Alias info@example.org has the destination ann, which"),
    ],
)
def test_a_bad_one_is_named_without_its_hash(bad: dict[str, Any], words: str) -> None:
    boxes, others = [mailbox("ann@example.org")], [alias("sales@example.org", "ann@example.org")]
    (others if "destinations" in bad else boxes).append(bad)
    said = " ".join(findings(boxes, others, ["example.org"]))
    assert words in said
    assert "secret" not in said
    assert "Ann" not in said


@pytest.mark.parametrize(
    ("postmaster", "said"),
    [
        ("", []),
        ("Ann+root@example.org", []),
        ("sales@example.org", []),
        ("anybody@example.com", []),
        (
            "carl@example.org",
            ["mail_server_postmaster carl@example.org is no mailbox or alias here."],
        ),
        ("ann", ["mail_server_postmaster ann is no plain address."]),
        (
            "root@example.org",
            ["mail_server_postmaster root@example.org is no mailbox or alias here."],
        ),
    ],
)
def test_the_postmaster_is_somebody(postmaster: str, said: list[str]) -> None:
    boxes, others = [mailbox("ann@example.org")], [alias("sales@example.org", "ann@example.org")]
    assert findings(boxes, others, ["example.org"], postmaster) == said


def test_an_alias_may_lead_to_the_postmaster() -> None:
    boxes, others = [mailbox("ann@example.org")], [alias("it@example.org", "Root+it@example.org")]
    assert findings(boxes, others, ["example.org"], "ann@example.org") == []
