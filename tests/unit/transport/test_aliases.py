"""Aliases as virtual(5) has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from umbra.transport.aliases import Aliases

MAP = {
    "staff@example.org": "Ann@example.org, bob@example.org",
    "all@example.org": "staff@example.org\ncarl@example.net",
    "loop@example.org": "pool@example.org",
    "pool@example.org": "loop@example.org, bob@example.org",
    "bob@example.org": "bob@example.org archive@example.org",
    "@old.example": "ann@example.org",
}


class Maps:
    def __init__(self) -> None:
        self.asked: list[Sequence[str]] = []

    async def __call__(self, keys: Sequence[str]) -> Mapping[str, str]:
        self.asked.append(keys)
        return {key: MAP[key] for key in keys if key in MAP}


@pytest.mark.parametrize(
    ("address", "ends"),
    [
        ("ann@example.org", ["ann@example.org"]),
        ("Staff@Example.org", ["ann@example.org", "archive@example.org", "bob@example.org"]),
        ("staff+x@example.org", ["ann@example.org", "archive@example.org", "bob@example.org"]),
        (
            "all@example.org",
            ["ann@example.org", "archive@example.org", "bob@example.org", "carl@example.net"],
        ),
        ("bob@example.org", ["archive@example.org", "bob@example.org"]),
        ("loop@example.org", ["archive@example.org", "bob@example.org"]),
        ("anybody@old.example", ["ann@example.org"]),
        ("root", ["root"]),
    ],
)
async def test_where_mail_ends(address: str, ends: list[str]) -> None:
    assert await Aliases(Maps()).targets(address) == ends


async def test_which_addresses_lead_to_a_mailbox() -> None:
    given = ["Staff@example.org", "ann+x@example.org", "carl@example.net", "x@old.example"]
    assert await Aliases(Maps()).leading_to("Ann@example.org", given) == [
        "ann+x@example.org",
        "staff@example.org",
        "x@old.example",
    ]


async def test_each_address_is_looked_up_once_until_it_is_forgotten() -> None:
    maps = Maps()
    aliases = Aliases(maps)
    await aliases.targets("ann@example.org")
    await aliases.targets("ann@example.org")
    assert len(maps.asked) == 1
    aliases.forget()
    await aliases.targets("ann@example.org")
    assert len(maps.asked) == 2


async def test_an_alias_that_never_ends_is_left_alone() -> None:
    async def deeper(keys: Sequence[str]) -> Mapping[str, str]:
        return {key: f"x{key}" for key in keys if not key.startswith("@")}

    [end] = await Aliases(deeper).targets("a@example.org")
    assert end.endswith("xa@example.org")
