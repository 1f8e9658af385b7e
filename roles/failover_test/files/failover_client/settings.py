"""The settings of a run, from the JSON file that the playbook writes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Target:
    """A node and the address at which clients reach it."""

    node: str
    address: str


@dataclass(frozen=True)
class User:
    """A mailbox of the test."""

    address: str
    password: str


@dataclass(frozen=True)
class Settings:
    """Rates are per second over all workers, times are seconds."""

    run: str
    directory: Path
    targets: tuple[Target, ...]
    users: tuple[User, ...]
    sender: str
    smtp_port: int
    imap_port: int
    ca_file: str | None
    verify_tls: bool
    server_name: str | None
    smtp_workers: int
    imap_workers: int
    messages_per_s: float
    changes_per_s: float
    samples: Path | None
    big_message_bytes: int
    min_messages: int
    min_changes: int
    max_s: float
    connect_timeout_s: float
    reply_timeout_s: float

    @property
    def folder_prefix(self) -> str:
        """Start of the name of every mailbox that the run makes."""
        return f"failover-test-{self.run}-"


def load(path: Path) -> Settings:
    """Read the settings; raises KeyError or ValueError with the name of what is wrong."""
    raw: dict[str, Any] = json.loads(path.read_text())
    return Settings(
        run=raw["run"],
        directory=path.parent,
        targets=tuple(Target(**item) for item in raw["targets"]),
        users=tuple(User(**item) for item in raw["users"]),
        sender=raw["sender"],
        smtp_port=raw["smtp_port"],
        imap_port=raw["imap_port"],
        ca_file=raw["ca_file"] or None,
        verify_tls=raw["verify_tls"],
        server_name=raw["server_name"] or None,
        smtp_workers=raw["smtp_workers"],
        imap_workers=min(raw["imap_workers"], len(raw["users"])),
        messages_per_s=raw["messages_per_s"],
        changes_per_s=raw["changes_per_s"],
        samples=Path(raw["samples"]) if raw["samples"] else None,
        big_message_bytes=raw["big_message_bytes"],
        min_messages=raw["min_messages"],
        min_changes=raw["min_changes"],
        max_s=raw["max_s"],
        connect_timeout_s=raw["connect_timeout_s"],
        reply_timeout_s=raw["reply_timeout_s"],
    )
