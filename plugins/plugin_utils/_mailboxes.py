# Copyright: umbra.mail contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Judges mailboxes and aliases, and says who may send as which address.

From lists of both to sentences, which hold no password hash, and to a table of senders.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# In characters that need no quoting in Postfix's tables, Dovecot's passwd-file or a file name.
ADDRESS = re.compile(r"[A-Za-z0-9._=+-]+@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+")
POSTMASTER = ("postmaster", "abuse", "root")
# After the scheme its encoding, {SSHA512.b64}; Dovecot takes both in any case.
HASH = re.compile(r"(\{[A-Za-z0-9.-]+\}|\$)[^:\s]+")


def _address(item: Mapping[str, Any]) -> str:
    return str(item.get("address"))


def _mailbox_faults(
    mailbox: Mapping[str, Any], domains: Iterable[str], taken: Mapping[str, int], aliases: set[str]
) -> Iterator[str]:
    address = _address(mailbox)
    if not ADDRESS.fullmatch(address):
        yield "is no plain address"
    elif address.lower().rpartition("@")[2] not in domains:
        yield "is in none of mail_server_domains"
    if "+" in address:
        yield "has a +, after which users put words of their own"
    if address.startswith("-"):
        yield "begins with -, as an option does"
    if taken[address.lower()] > 1:
        yield "is there twice"
    if address.lower() in aliases:
        yield "is an alias as well"
    if not HASH.fullmatch(str(mailbox.get("password_hash"))):
        yield "has a password_hash that does not start with its {SCHEME} or $, or has a : or space"
    if ":" in str(mailbox.get("name") or ""):
        yield "has a name with :"


def _goes_nowhere(address: str, domains: Iterable[str], known: set[str]) -> bool:
    """Say whether an address is in one of our domains, and nobody's."""
    name, _at, domain = address.lower().rpartition("@")
    return domain in domains and f"{name.partition('+')[0]}@{domain}" not in known


def _alias_faults(
    alias: Mapping[str, Any], domains: Iterable[str], taken: Mapping[str, int], known: set[str]
) -> Iterator[str]:
    address = _address(alias)
    if not ADDRESS.fullmatch(address):
        yield "is no plain address"
    elif address.lower().rpartition("@")[2] not in domains:
        yield "is in none of mail_server_domains"
    if taken[address.lower()] > 1:
        yield "is there twice"
    destinations = [str(item) for item in alias.get("destinations") or []]
    if not destinations:
        yield "has no destination"
    yield from (
        f"has the destination {item}, which is no plain address"
        for item in destinations
        if not ADDRESS.fullmatch(item)
    )
    yield from (
        f"has the destination {item}, which is no mailbox or alias here"
        for item in destinations
        if ADDRESS.fullmatch(item) and _goes_nowhere(item, domains, known)
    )


def mailbox_findings(
    mailboxes: Iterable[Mapping[str, Any]],
    aliases: Iterable[Mapping[str, Any]],
    domains: Iterable[str],
    postmaster: str = "",
) -> list[str]:
    """Return one sentence for each mailbox and alias that cannot be set up as it is written."""
    mailboxes, aliases = list(mailboxes), list(aliases)
    names = {str(domain).lower() for domain in domains}
    boxes = Counter(_address(item).lower() for item in mailboxes)
    others = Counter(_address(item).lower() for item in aliases)
    known = {*boxes, *others}
    if postmaster:
        known.update(f"{name}@{domain}" for name in POSTMASTER for domain in names)
    found = [
        ("Mailbox", item, list(_mailbox_faults(item, names, boxes, set(others))))
        for item in mailboxes
    ] + [("Alias", item, list(_alias_faults(item, names, others, known))) for item in aliases]
    sentences = [
        f"{kind} {_address(item)} {', '.join(faults)}." for kind, item, faults in found if faults
    ]
    if postmaster and not ADDRESS.fullmatch(postmaster):
        sentences.append(f"mail_server_postmaster {postmaster} is no plain address.")
    elif postmaster and _goes_nowhere(postmaster, names, {*boxes, *others}):
        sentences.append(f"mail_server_postmaster {postmaster} is no mailbox or alias here.")
    return list(dict.fromkeys(sentences))


def sender_logins(
    mailboxes: Iterable[Mapping[str, Any]],
    aliases: Iterable[Mapping[str, Any]],
    domains: Iterable[str],
    postmaster: str = "",
) -> dict[str, list[str]]:
    """Return for each address the mailboxes that it leads to, as Postfix delivers: who may send so.

    What leads to nobody here is left out.
    """
    boxes = {_address(item).lower() for item in mailboxes}
    leads = {
        _address(item).lower(): [str(goal).lower() for goal in item.get("destinations") or []]
        for item in aliases
    }
    if postmaster:
        for domain in domains:
            for name in POSTMASTER:
                address = f"{name}@{domain}".lower()
                if address not in boxes:
                    leads.setdefault(address, [postmaster.lower()])

    def owners(address: str, passed: frozenset[str]) -> Iterator[str]:
        name, _at, domain = address.partition("@")
        plain = f"{name.partition('+')[0]}@{domain}"
        alias = address if address in leads else plain
        if alias in leads:
            if alias not in passed:
                for goal in leads[alias]:
                    yield from owners(goal, passed | {alias})
        elif plain in boxes:
            yield plain

    found = {box: [box] for box in sorted(boxes)}
    found |= {alias: list(dict.fromkeys(owners(alias, frozenset()))) for alias in leads}
    return {address: logins for address, logins in found.items() if logins}
