"""The log of a run: one JSON object a line, written as it happens; a killed run tells its tale."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

OK = "ok"  # acknowledged: it must be there
REFUSED = "refused"  # answered 4xx, 5xx, NO or BAD: it must not be there
UNREACHED = "unreached"  # no node took the request: nothing was attempted
UNKNOWN = "unknown"  # the request went out and no answer came: it may be there or not


class Journal:
    """Appends records; safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()
        self.messages = 0  # acknowledged so far
        self.changes = 0

    def write(self, record: dict[str, Any]) -> None:
        """Append one record and hand it to the kernel."""
        line = json.dumps(record, separators=(",", ":")) + "\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
            if record.get("outcome") == OK:
                self.messages += record["kind"] == "send"
                self.changes += record["kind"] not in ("send", "select")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def stamp() -> dict[str, float]:
    """Return both clocks: monotonic nanoseconds, which order the log, and seconds for people."""
    return {"at": time.monotonic_ns(), "wall": round(time.time(), 6)}


def text(answer: object) -> str:
    """Return a server's answer as short printable text."""
    decoded = answer.decode("utf-8", "replace") if isinstance(answer, bytes) else str(answer)
    return " ".join(decoded.split())[:300]
