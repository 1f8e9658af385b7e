"""The envelope of a message: what SMTP said of it, beside its content.

Texts that came as bytes keep every byte: what is not UTF-8 is carried as lone surrogates
(``surrogateescape``), which JSON writes as escapes. What a peer or the disk gives is checked before
it is believed, because it ends up in SMTP commands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

MAX_RECIPIENTS = 50_000
MAX_ARGUMENTS = 32
MAX_TEXT = 2048  # Postfix reads no longer command line

_to_json = json.JSONEncoder(separators=(",", ":")).encode

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# What a terminal may take for a command, too, and what no bytes stand for.
_UNSHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udc7f\udd00-\udfff]")
_UNSAFE_ARGUMENT = re.compile(r"[\x00-\x20\x7f]")


class EnvelopeError(ValueError):
    """The data is no envelope; the text says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Recipient:
    """A recipient as it was in RCPT TO, without angle brackets.

    With its ESMTP arguments (``NOTIFY=...``, ``ORCPT=...``).
    """

    address: str
    args: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Envelope:
    """An envelope.

    ``sender`` is empty for the null sender; ``received`` is in seconds since 1970. ``held`` is not
    from SMTP: where the message is carried on, it is to be put on hold.
    """

    sender: str
    recipients: tuple[Recipient, ...]
    sender_args: tuple[str, ...] = ()
    client_name: str = ""
    client_address: str = ""
    helo: str = ""
    auth_user: str = ""
    message_id: str = ""
    received: float = field(default=0.0)
    held: bool = False

    def only(self, recipients: Iterable[Recipient]) -> Envelope:
        """Return the same envelope with other recipients."""
        return replace(self, recipients=tuple(recipients))

    def to_object(self) -> dict[str, Any]:
        """Return what :meth:`from_object` reads; JSON can carry it."""
        return {
            "sender": self.sender,
            "sender_args": self.sender_args,
            "recipients": [(item.address, *item.args) for item in self.recipients],
            "client_name": self.client_name,
            "client_address": self.client_address,
            "helo": self.helo,
            "auth_user": self.auth_user,
            "message_id": self.message_id,
            "received": self.received,
            **({"held": True} if self.held else {}),
        }

    def to_json(self) -> str:
        """Return the envelope as ASCII JSON."""
        return _to_json(self.to_object())

    @classmethod
    def from_json(cls, text: str | bytes) -> Envelope:
        """Read what :meth:`to_json` wrote. EnvelopeError if it is anything else."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise EnvelopeError("the envelope is not JSON") from None
        return cls.from_object(value)

    @classmethod
    def from_object(cls, value: object) -> Envelope:
        """Check and take what a peer sent. EnvelopeError says what is wrong."""
        if not isinstance(value, Mapping):
            raise EnvelopeError("the envelope is not an object")
        recipients = value.get("recipients")
        if not isinstance(recipients, list | tuple) or not 0 < len(recipients) <= MAX_RECIPIENTS:
            raise EnvelopeError(f"recipients must be a list of 1 to {MAX_RECIPIENTS}")
        received = value.get("received")
        # NaN fails both comparisons; a bool is an int, but no time.
        if (
            isinstance(received, bool)
            or not isinstance(received, int | float)
            or not 0 <= received < 1e11
        ):
            raise EnvelopeError("received is not a time")
        return cls(
            sender=_text("sender", value.get("sender")),
            sender_args=_arguments("sender_args", value.get("sender_args")),
            recipients=tuple(map(_recipient, recipients)),
            client_name=_shown("client_name", value.get("client_name")),
            client_address=_shown("client_address", value.get("client_address")),
            helo=_shown("helo", value.get("helo")),
            auth_user=_shown("auth_user", value.get("auth_user")),
            message_id=_shown("message_id", value.get("message_id")),
            received=received,
            held=value.get("held") is True,
        )


def clean(data: bytes) -> str:
    """Return an informational text (a host name, a message id) fit for an envelope.

    Printable and not too long.
    """
    return _UNSHOWN.sub("?", data.decode("utf-8", "replace"))[:MAX_TEXT]


def address(data: bytes) -> str:
    """Return an address of MAIL or RCPT without its angle brackets, every byte kept."""
    if data.startswith(b"<") and data.endswith(b">"):
        data = data[1:-1]
    return data.decode("utf-8", "surrogateescape")


def recipient(value: object) -> str:
    """Return the address of a recipient as it came from elsewhere. EnvelopeError if it is none."""
    text = _text("a recipient", value)
    if not text:
        raise EnvelopeError("a recipient is empty")
    return text


def _line(name: str, value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise EnvelopeError(f"{name} must be a text of at most {MAX_TEXT} characters")
    if _CONTROL.search(value):
        raise EnvelopeError(f"{name} holds control characters")
    return value


def _text(name: str, value: object) -> str:
    text = _line(name, value)
    _check_bytes(name, text)
    return text


def _shown(name: str, value: object) -> str:
    """Take an informational text: what is odd in it is no reason to refuse mail."""
    return _UNSHOWN.sub("?", _line(name, value))


def _check_bytes(name: str, value: str) -> None:
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise EnvelopeError(f"{name} holds what no bytes stand for") from None


def _arguments(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or len(value) > MAX_ARGUMENTS:
        raise EnvelopeError(f"{name} must be a list of at most {MAX_ARGUMENTS}")
    for item in value:
        if (
            not isinstance(item, str)
            or len(item) > MAX_TEXT
            or not item
            or _UNSAFE_ARGUMENT.search(item)
        ):
            raise EnvelopeError(f"{name} holds something that is no ESMTP argument")
        _check_bytes(name, item)
    return tuple(value)


def _recipient(value: object) -> Recipient:
    if not isinstance(value, list | tuple) or not value:
        raise EnvelopeError("a recipient must be a list of its address and arguments")
    return Recipient(recipient(value[0]), _arguments("a recipient's arguments", value[1:]))
