"""What a handover tells of the former primary's queue: rows of JSON, and what they mean; pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


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


def rows_of(remaining: Remaining) -> Iterator[dict[str, Any]]:
    """Give the rows of a handover, one a message; ``whole``: to all."""
    for queue_id, left in remaining.items():
        yield {
            "queue_id": queue_id,
            "recipients": list(left.recipients or ()),
            "whole": left.recipients is None,
            "held": left.held,
        }


def take(found: dict[str, Left], row: Mapping[str, Any]) -> None:
    """Add what such a row says. KeyError or TypeError if it is none."""
    names = tuple(str(name) for name in row["recipients"])
    left = Left(None if row.get("whole") is True else names, row.get("held") is True)
    found[str(row["queue_id"])] = left
