"""The model: what a user must have after what was acknowledged. Pure.

It knows IMAP's laws, so it foretells UIDs, flags and order. What no client can foretell (a new
mailbox's UIDVALIDITY, what Dovecot adds to a delivered message, its date) it learns from the
primary, once; from then on it must stay as it is, and it must be the same on the shadow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

SEPARATOR = "/"
Effect = Callable[["Account"], object]


def digest(content: bytes) -> str:
    """The same as ``on_node`` makes it."""
    return hashlib.sha256(content).hexdigest()[:16]


@dataclass
class Message:
    """One message; None is what is still to be learned."""

    mark: str
    flags: set[str] = field(default_factory=set)
    date: str | None = None
    size: int | None = None
    digest: str | None = None


@dataclass
class Box:
    """One mailbox; ``coming`` holds deliveries whose UIDs are still to be learned."""

    uidvalidity: int = 0
    uidnext: int = 1
    messages: dict[int, Message] = field(default_factory=dict)
    coming: list[Message] = field(default_factory=list)
    rights: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def add(self, message: Message) -> int:
        """Add a message as the next one; its UID."""
        uid = self.uidnext
        self.messages[uid] = message
        self.uidnext += 1
        return uid


@dataclass
class Script:
    """A Sieve script: its text's digest, and what it does to a delivery."""

    digest: str
    does: str
    target: str = ""


@dataclass
class Account:
    """One user's mail."""

    boxes: dict[str, Box] = field(default_factory=dict)
    subscriptions: set[str] = field(default_factory=set)
    scripts: dict[str, Script] = field(default_factory=dict)
    active: str = ""

    def after(self, effect: Effect) -> Account:
        """What it is after a change."""
        new = deepcopy(self)
        effect(new)
        return new

    # -- changes

    def create(self, name: str) -> None:
        """Make an empty mailbox."""
        self.boxes[name] = Box()

    def append(self, name: str, messages: Iterable[Message]) -> None:
        """Append messages."""
        for message in messages:
            self.boxes[name].add(message)

    def flag(self, name: str, uids: Iterable[int], sign: str, flags: set[str]) -> None:
        """What STORE does: ``sign`` is "+", "-" or "" for exactly these."""
        for uid in uids:
            message = self.boxes[name].messages[uid]
            if sign == "+":
                message.flags = message.flags | flags
            elif sign == "-":
                message.flags = message.flags - flags
            else:
                message.flags = set(flags)

    def copy(self, source: str, uids: Iterable[int], target: str) -> list[int]:
        """Copy messages in the order of their UIDs; the new UIDs."""
        found = [deepcopy(self.boxes[source].messages[uid]) for uid in sorted(uids)]
        return [self.boxes[target].add(message) for message in found]

    def remove(self, name: str, uids: Iterable[int]) -> None:
        """Expunge messages."""
        for uid in list(uids):
            del self.boxes[name].messages[uid]

    def rename(self, old: str, new: str) -> None:
        """Rename a mailbox and what is below it."""
        below = old + SEPARATOR
        for name in list(self.boxes):
            if name == old or name.startswith(below):
                self.boxes[new + name[len(old) :]] = self.boxes.pop(name)

    def take_scripts(self, view: dict[str, Any], earlier: Iterable[Account]) -> None:
        """Have the scripts of the first of ``earlier`` that fits what a node shows.

        If none does, or its own do, they stay.
        """
        for one in (self, *earlier):
            if (one._digests(), one.active) == (view["scripts"], view["active"]):
                self.scripts, self.active = one.scripts, one.active
                return

    def _digests(self) -> dict[str, str]:
        return {name: script.digest for name, script in self.scripts.items()}

    def deliver(self, message: Message) -> None:
        """Deliver a message as the active script wants it."""
        script = self.scripts.get(self.active, Script("", "keep"))
        target = "INBOX"
        match script.does:
            case "discard":
                return
            case "flag":
                message.flags.add("\\Flagged")
            case "file" if script.target in self.boxes:
                target = script.target
            case "create":
                target = script.target
                self.boxes.setdefault(target, Box())
        self.boxes[target].coming.append(message)

    # -- what a node has

    def learn(self, view: dict[str, Any]) -> None:
        """Take what could not be foretold from the primary's view."""
        for name, box in self.boxes.items():
            seen = view["mailboxes"].get(name)
            if seen is None:
                continue
            box.uidvalidity = box.uidvalidity or seen["uidvalidity"]
            rows = {row[0]: row for row in seen["messages"]}
            for message in list(box.coming):
                for uid, row in rows.items():
                    if uid >= box.uidnext and uid not in box.messages and row[5] == message.mark:
                        box.messages[uid] = message
                        box.coming.remove(message)
                        break
            box.uidnext = max([box.uidnext, *(uid + 1 for uid in box.messages)])
            for uid, message in box.messages.items():
                if uid in rows:
                    _, _, _, date, size, _, found = rows[uid]
                    message.date = message.date or date
                    message.size = message.size or size
                    message.digest = message.digest or found

    def differences(self, view: dict[str, Any]) -> list[str]:
        """What a node's view has otherwise, one sentence each."""
        found = []
        seen = view["mailboxes"]
        for name in sorted(self.boxes.keys() | seen.keys()):
            if name not in seen:
                found.append(f"mailbox {name} is missing")
            elif name not in self.boxes:
                found.append(f"mailbox {name} is there")
            else:
                found += [f"{name}: {text}" for text in _box(self.boxes[name], seen[name])]
                rights = view["rights"].get(name, {})
                mine = {who: "".join(sorted(what)) for who, what in self.boxes[name].rights.items()}
                theirs = {who: what for who, what in rights.items() if who.startswith("anyone")}
                if mine != theirs:
                    found.append(f"{name}: rights {theirs} for {mine}")
                notes = view["notes"].get(name, {})
                if notes != self.boxes[name].notes:
                    found.append(f"{name}: metadata {notes} for {self.boxes[name].notes}")
        subscribed = set(view["subscriptions"])
        found += [f"subscription of {name} is missing" for name in self.subscriptions - subscribed]
        found += [f"subscription of {name} is there" for name in subscribed - self.subscriptions]
        mine = self._digests()
        for name in sorted(mine.keys() | view["scripts"].keys()):
            if mine.get(name) != view["scripts"].get(name):
                found.append(f"script {name}: {view['scripts'].get(name)} for {mine.get(name)}")
        if self.active != view["active"]:
            found.append(f"active script {view['active']!r} for {self.active!r}")
        return found


def _box(box: Box, seen: dict[str, Any]) -> list[str]:
    found = [f"delivery {message.mark} is missing" for message in box.coming]
    for what in ("uidvalidity", "uidnext"):
        if getattr(box, what) != seen[what]:
            found.append(f"{what} {seen[what]} for {getattr(box, what)}")
    rows = {row[0]: row for row in seen["messages"]}
    if list(rows) != sorted(rows):
        found.append("messages are not in the order of their UIDs")
    for uid in sorted(box.messages.keys() | rows.keys()):
        message = box.messages.get(uid)
        if uid not in rows:
            found.append(f"message {uid} is missing")
        elif message is None:
            found.append(f"message {uid} is there")
        else:
            _, _, flags, date, size, mark, body = rows[uid]
            mine = [sorted(message.flags), message.date, message.size, message.mark, message.digest]
            theirs = [flags, date, size, mark, body]
            found += [
                f"message {uid} has {b!r} for {a!r}"
                for a, b in zip(mine, theirs, strict=True)
                if a is not None and a != b
            ]
    return found


def between(primary: dict[str, Any], shadow: dict[str, Any]) -> list[str]:
    """What the nodes' views differ in, GUIDs included."""
    found = []
    for what in primary:
        if primary[what] == shadow[what]:
            continue
        if what != "mailboxes":
            found.append(f"{what}: primary {primary[what]}, shadow {shadow[what]}")
            continue
        for name in sorted(primary[what].keys() | shadow[what].keys()):
            pair = primary[what].get(name), shadow[what].get(name)
            if pair[0] != pair[1]:
                found.append(f"mailbox {name}: primary {pair[0]}, shadow {pair[1]}"[:400])
    return found
