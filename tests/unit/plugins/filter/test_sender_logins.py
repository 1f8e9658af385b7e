"""Who may send as which address."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.umbra.mail.plugins.filter.sender_logins import FilterModule

sender_logins = FilterModule().filters()["sender_logins"]
ANN, BOB = "ann@example.org", "bob@example.org"


def logins(*aliases: tuple[str, list[str]], postmaster: str = "") -> Any:
    """What is added by aliases to the two mailboxes."""
    boxes = [{"address": "Ann@Example.org"}, {"address": BOB}]
    rows = [{"address": address, "destinations": goals} for address, goals in aliases]
    found = sender_logins(boxes, rows, ["Example.org"], postmaster)
    assert (found.pop(ANN), found.pop(BOB)) == ([ANN], [BOB])
    return found


@pytest.mark.parametrize(
    ("goals", "owners"),
    [
        ([ANN], [ANN]),
        (["ann+lists@example.org"], [ANN]),
        (["BOB@Example.ORG", "ann@example.com", ANN], [BOB, ANN]),
        (["all@example.org"], [ANN, BOB]),  # an alias
        (["all+x@example.org", ANN], [ANN, BOB]),
        (["ann+x@example.org", "ann+y@example.org"], [ANN]),
        (["sales@example.org", ANN], [ANN]),  # itself
    ],
)
def test_an_alias_belongs_to_those_it_leads_to(goals: list[str], owners: list[str]) -> None:
    found = logins(("Sales@example.org", goals), ("all@example.org", [ANN, BOB]))
    assert found["sales@example.org"] == owners


def test_an_alias_that_leads_elsewhere_is_nobodys() -> None:
    assert logins(("out@example.org", ["x@example.com"])) == {}


def test_an_alias_with_an_extension_of_its_own() -> None:
    found = logins(("ann+x@example.org", [BOB]), ("sales@example.org", ["ann+x@example.org"]))
    assert found["sales@example.org"] == [BOB]


def test_addresses_that_nobody_has_written_down() -> None:
    found = logins(("abuse@example.org", [BOB]), postmaster="help@example.org")
    assert found == {"abuse@example.org": [BOB]}
    found = logins(("help@example.org", [ANN]), postmaster="Help@example.org")
    names = ("help", "postmaster", "abuse", "root")
    assert found == {f"{name}@example.org": [ANN] for name in names}
