"""What a node says of itself with each heartbeat: looked at once, where it comes in.

The state machine, the report and the metrics read it again and again, and believe what it is made
of. What an older agent does not say is missing; what nobody here reads is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from umbra.epoch import MAX_WHOLE, epoch_of
from umbra.peer.exchange import PeerError

Reader = Callable[[Any], Any]


def checked(peer: str, status: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``peer`` says, each value of its kind. PeerError ``protocol`` for another one."""
    found = {}
    for name, read in _KINDS.items():
        if name not in status:
            continue
        try:
            found[name] = read(status[name])
        except ValueError:
            raise _senseless(peer, name) from None
    for name in _ALWAYS:
        if name not in found:
            raise _senseless(peer, name)
    return found


def _senseless(peer: str, name: str) -> PeerError:
    # Without the value: the same fault is told once.
    return PeerError("protocol", f"{peer} sent a status that makes no sense: {name}")


def _text(value: Any) -> str:
    """Take a text; what a terminal or systemd would take for more than a text is replaced."""
    if not isinstance(value, str):
        raise ValueError("no text")
    if value.isprintable():
        return value
    return "".join(char if char.isprintable() else "?" for char in value)


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list | tuple):
        raise ValueError("no list")
    return [_text(item) for item in value]


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("neither true nor false")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > MAX_WHOLE:
        raise ValueError("no whole number")
    return value


def _seconds(value: Any) -> float:
    if isinstance(value, int):
        return _whole(value)
    if not isinstance(value, float) or not math.isfinite(value):
        raise ValueError("no number of seconds")
    return value


def _or_null(read: Reader) -> Reader:
    return lambda value: None if value is None else read(value)


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError("no object")
    return value


def _lag(value: Any) -> dict[str, tuple[int, float]]:
    found = {}
    for name, item in _object(value).items():
        if not isinstance(item, list | tuple) or len(item) != 2:
            raise ValueError("no lag")
        found[name] = (_whole(item[0]), _seconds(item[1]))
    return found


def _change(value: Any) -> dict[str, Any]:
    change = _object(value)
    return {
        **{name: _text(change.get(name)) for name in ("from", "to", "at")},
        "planned": _truth(change.get("planned")),
        "outage_s": _or_null(_seconds)(change.get("outage_s")),
    }


_ALWAYS = ("epoch", "role", "state", "storage_id")

_KINDS: dict[str, Reader] = {
    "ailments": _texts,
    "alone_messages": _whole,
    "boot_id": _text,
    "cause": _text,
    "coordinator": _text,
    "entitled_s": _or_null(_seconds),
    "epoch": epoch_of,
    "handing_to": _or_null(_text),
    "lag": _lag,
    "last_change": _or_null(_change),
    "load": _text,
    "merged": _truth,
    "merged_under": epoch_of,
    "mode": _text,
    "policy": _text,
    "preference": _whole,
    "reasons": _texts,
    "role": _text,
    "service_addresses": _texts,
    "service_clients": _whole,
    "shadow_bytes": _whole,
    "shadow_messages": _whole,
    "shut": _truth,
    "since": _text,
    "site": _text,
    "state": _text,
    "storage_id": _text,
    "unshared": _truth,
}
