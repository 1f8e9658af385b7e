"""What dsync's states say, so far as the agent has to read them.

A state tells for each mailbox what both copies had after the last sync. One of a sync of a single
mailbox tells of that one alone. The format is Dovecot's (``dsync-mailbox-state.c``, 2.4.1), in
base64: the version 1.0 and two zero bytes; 44 bytes for each mailbox, its GUID first; the CRC-32 of
all that, little-endian.
"""

from __future__ import annotations

import binascii
import zlib
from base64 import b64decode, b64encode

VERSION = b"\x01\x00\x00\x00"
GUID = 16
RECORD = GUID + 4 + 4 + 8 + 8 + 4
CHECKSUM = 4


def records(state: str) -> dict[bytes, bytes]:
    """Return what a state tells, by the mailbox's GUID; ValueError if it is none."""
    try:
        data = b64decode(state, validate=True)
    except binascii.Error as error:
        raise ValueError(f"not a state of dsync: {error}") from None
    told, checksum = data[:-CHECKSUM], data[-CHECKSUM:]
    if told[: len(VERSION)] != VERSION or (len(told) - len(VERSION)) % RECORD:
        raise ValueError(f"not a state of dsync of version 1.0: {len(data)} bytes")
    if zlib.crc32(told) != int.from_bytes(checksum, "little"):
        raise ValueError("a state of dsync with another checksum")
    places = range(len(VERSION), len(told), RECORD)
    return {told[at : at + GUID]: told[at : at + RECORD] for at in places}


def joined(state: str, newer: str) -> str:
    """Return ``state`` with what ``newer`` tells of its mailboxes; ValueError if one is none."""
    told = VERSION + b"".join((records(state) | records(newer)).values())
    return b64encode(told + zlib.crc32(told).to_bytes(CHECKSUM, "little")).decode()
