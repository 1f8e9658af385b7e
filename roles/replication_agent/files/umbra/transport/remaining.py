"""What a handover tells of the former primary's queue: rows of JSON, and what they mean; pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from umbra.transport.envelope import recipient


@dataclass(frozen=True, slots=True)
class Left:
    """What is left of a message.

    :param recipients: who still has to get it; None if nobody knows, so all may have to.
    :param held: it is on hold, which it has to be with its new primary, too.
    """

    recipients: tuple[str, ...] | None
    held: bool = False


Remaining = Mapping[str, Left]
"""By queue id. What is not named is finished."""

FINISHED = Left(())

PORTION = 32 * 1024
"""Bytes of recipients in one row."""


def rows_of(remaining: Remaining) -> Iterator[dict[str, Any]]:
    """Give the rows of a handover: one a message, and others for ``more`` recipients.

    ``whole``: to all. A row is a line on the link, whose length has a bound.
    """
    for queue_id, left in remaining.items():
        first, *rest = list(_portions(left.recipients or ())) or [[]]
        yield {
            "queue_id": queue_id,
            "recipients": first,
            "whole": left.recipients is None,
            "held": left.held,
        }
        yield from ({"queue_id": queue_id, "more": names} for names in rest)


def _portions(names: Iterable[str]) -> Iterator[list[str]]:
    portion: list[str] = []
    size = 0
    for name in names:
        size += len(json.dumps(name)) + 1
        if portion and size > PORTION:
            yield portion
            portion, size = [], len(json.dumps(name)) + 1
        portion.append(name)
    if portion:
        yield portion


def take(found: dict[str, Left], row: Mapping[str, Any]) -> None:
    """Add what such a row says. KeyError, TypeError or EnvelopeError if it is none.

    An agent that knows no ``more`` misses ``recipients`` there, and refuses the handover.
    """
    queue_id = str(row["queue_id"])
    if "more" in row:
        before = found[queue_id]
        names = (*(before.recipients or ()), *map(recipient, row["more"]))
        found[queue_id] = replace(before, recipients=names)
        return
    names = tuple(map(recipient, row["recipients"]))
    found[queue_id] = Left(None if row.get("whole") is True else names, row.get("held") is True)
