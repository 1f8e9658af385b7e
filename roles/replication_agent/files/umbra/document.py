"""A small JSON file that must outlive the agent, whole or as it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class DocumentError(Exception):
    """The file cannot be used; one sentence for people."""


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return what ``write`` wrote, {} if there is no file. DocumentError if it is damaged."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DocumentError(f"{path} cannot be used: {error}") from None
    if not isinstance(raw, dict) or not all(isinstance(row, dict) for row in raw.values()):
        raise DocumentError(f"{path} cannot be used: it is not what the agent writes")
    return raw


def write(path: Path, rows: dict[str, Any]) -> None:
    """Replace the file; on disk when it returns. OSError if it is not."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_suffix(".new")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(rows, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
