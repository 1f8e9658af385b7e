"""Message tracking: one line in the journal for each step in the life of a shadow message."""

from __future__ import annotations

import logging

_log = logging.getLogger("umbra.tracking")

SHADOW_CREATED = "shadow-created"
SHADOW_FAILED = "shadow-failed"
DISCARDED = "discarded"
RESUBMITTED = "resubmitted"
DUPLICATE_DROPPED = "duplicate-dropped"
BACK_FILLED = "back-filled"
REPLAYED = "replayed"


def track(event: str, queue_id: str, message_id: str, shadow_id: str, note: str = "") -> None:
    """Write ``event`` of a message; ``message_id`` is that of its header, empty if it has none."""
    _log.info(
        "%s queue-id=%s message-id=%s shadow-id=%s%s",
        event,
        queue_id,
        message_id or "-",
        shadow_id,
        note and f" {note}",
    )
