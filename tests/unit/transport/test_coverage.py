"""What has no copy is known as such, by the queue and by the ids that its files bear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from umbra.transport import coverage
from umbra.transport.coverage import Names, uncovered


def test_what_is_acknowledged_and_not_covered() -> None:
    places = ("maildrop", "arriving", "incoming", "active", "deferred", "hold", "corrupt")
    queue = {f"q-{place}": place for place in places} | {"q1": "deferred"}
    assert uncovered(queue, {"q1"}) == {f"q-{place}": place for place in places[2:]}


async def test_a_file_is_looked_into_once_and_the_newest_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(coverage, "PORTION", 2)
    asked: list[Sequence[str]] = []

    async def read(ids: Sequence[str]) -> Mapping[str, str]:
        asked.append(ids)
        return {key: "s2" if key == "q2" else "" for key in ids if key != unreadable}

    unreadable = "q3"
    names = Names(read)
    assert await names.of({"q1", "q2", "q3"}) == {"q2": "s2"}
    unreadable = ""
    assert await names.of({"q1", "q2", "q3"}) == {"q1": "", "q2": "s2", "q3": ""}
    assert await names.of({"q1", "q2"}) == {"q1": "", "q2": "s2"}
    assert asked == [["q3", "q2"], ["q3", "q1"]]
    monkeypatch.setattr(coverage, "MAX_KNOWN", 1)
    await names.of({"q4"})
    assert await names.of({"q4"}) == {"q4": ""}


async def test_the_names_of_all_are_read_however_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2,000 messages that ``postsuper -r`` had requeued only 200 had a copy made."""
    monkeypatch.setattr(coverage, "PORTION", 3)
    unreadable = {"q4", "q9"}

    async def read(ids: Sequence[str]) -> dict[str, str]:
        return {key: f"s{key}" for key in ids if key not in unreadable}

    wanted = {f"q{number}" for number in range(10)}
    assert (await Names(read).of_all(wanted)).keys() == wanted - unreadable
    unreadable.clear()
    assert (await Names(read).of_all(wanted)).keys() == wanted
