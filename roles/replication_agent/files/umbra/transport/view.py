"""What the operator sees of messages in transit; a pure function of what the parts know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from umbra.transport.store import Holding, Meta, State

NEXT = {
    State.HELD: "held: discarded when {origin} has delivered them",
    State.RESUBMITTING: "resubmitting: carried on here, because {origin} is gone",
    State.UNSHADOWED: "unshadowed: copied to a shadow as soon as there is one",
    State.PARKED: "parked: cannot be carried on; umbractl queue --retry, or --drop ID",
    State.DELIVERED: "delivered: kept for umbractl resubmit",
}


def parked(metas: Sequence[Meta], reasons: Mapping[str, str]) -> list[dict[str, str]]:
    """Return what was set aside, as ``GET /queue`` tells it."""
    return [
        {
            "shadow_id": meta.shadow_id,
            "message_id": meta.message_id,
            "origin": meta.origin,
            "queue_id": meta.queue_id,
            "reason": reasons.get(meta.shadow_id, "it has failed before the agent started"),
        }
        for meta in metas
    ]


def queue(
    node: str,
    rows: Sequence[Holding],
    copies: Mapping[str, int],
    now: float,
    parked: Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
    """Return the body of ``GET /queue``.

    :param rows: what the store of ``node`` has.
    :param copies: by holder, how many messages in the own queue it keeps a copy of.
    :param now: in seconds since 1970.
    :param parked: the first of the messages that were set aside.
    """
    return {
        "node": node,
        "messages": [
            {
                "origin": row.origin,
                "state": str(row.state),
                "messages": row.count,
                "bytes": row.bytes,
                "oldest_s": round(max(0.0, now - row.oldest), 1),
                "next": NEXT[row.state].format(origin=row.origin),
            }
            for row in sorted(rows, key=lambda row: (row.origin, row.state))
        ],
        "copies": [
            {"holder": holder, "messages": count} for holder, count in sorted(copies.items())
        ],
        "parked": list(parked),
    }
