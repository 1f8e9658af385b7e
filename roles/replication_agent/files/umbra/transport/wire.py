"""What ``shadow-store`` carries: arguments and data, the same for a new message and a back-fill."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from umbra.transport.envelope import MAX_RECIPIENTS, Envelope, EnvelopeError
from umbra.transport.ids import valid
from umbra.transport.store import Copy

INLINE_LIMIT = 32 * 1024
"""An envelope over this many bytes does not fit a REQUEST frame; it then comes first in the
data."""

MAX_ENVELOPE = MAX_RECIPIENTS * 1024

_QUEUE_ID = re.compile(r"[0-9A-Za-z]{1,64}")


def arguments(shadow_id: str, queue_id: str, envelope: Envelope) -> tuple[dict[str, Any], bytes]:
    """Return the arguments of ``shadow-store`` and what goes before the content in its data."""
    args: dict[str, Any] = {"shadow_id": shadow_id, "queue_id": queue_id}
    # Measured, not counted: the arguments of a few recipients may be long.
    if len(text := envelope.to_json()) > INLINE_LIMIT:
        args["envelope_size"] = len(text)
        return args, text.encode("ascii")
    args["envelope"] = envelope.to_object()
    return args, b""


def names(args: Mapping[str, Any]) -> tuple[str, str]:
    """Return the checked shadow id and queue id. EnvelopeError if they are none."""
    shadow_id, queue_id = args.get("shadow_id"), args.get("queue_id")
    if not isinstance(shadow_id, str) or not valid(shadow_id):
        raise EnvelopeError("shadow_id has not the form of one")
    # Postfix's queue ids are letters and digits, long ones of mixed case.
    if not isinstance(queue_id, str) or _QUEUE_ID.fullmatch(queue_id) is None:
        raise EnvelopeError("queue_id has not the form of one")
    return shadow_id, queue_id


def envelope_size(args: Mapping[str, Any]) -> int:
    """Return how many bytes of envelope come before the content. EnvelopeError if too many."""
    size = args.get("envelope_size", 0)
    if not isinstance(size, int) or not 0 <= size <= MAX_ENVELOPE:
        raise EnvelopeError("envelope_size is out of bounds")
    return size


def listing(copies: Iterable[Copy]) -> bytes:
    """Return JSON lines of the names of copies, as ``shadow-list`` sends them."""
    return b"".join(
        json.dumps(
            {
                "shadow_id": copy.shadow_id,
                "queue_id": copy.queue_id,
                **({"held": True} if copy.held else {}),
            },
            separators=(",", ":"),
        ).encode()
        + b"\n"
        for copy in copies
    )
