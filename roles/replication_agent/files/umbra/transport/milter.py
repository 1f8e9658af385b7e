"""The milter protocol, version 6, as Postfix speaks it to a filter: codec and conversation, no I/O.

A packet is a 4-byte big-endian length, one command byte and data. There is no RFC; the sources are
Postfix's MILTER_README, Sendmail's ``mfdef.h`` and what Postfix 3.10 was seen to send. What is
asked of Postfix here: answers are awaited only at MAIL (a drain refuses there) and at the end of
the message, header values keep their leading space, and only the macros that are used are sent,
which also spares Postfix a look-up for each recipient.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, Protocol

VERSION = 6
# Body chunks are at most 65,535 bytes; a header is bounded by Postfix's header_size_limit
# (102,400).
MAX_PACKET = 512 * 1024
MAX_RECIPIENTS = 50_000
MAX_ENVELOPE = 32 * 1024 * 1024
"""Bytes of the recipients and their arguments: an envelope is kept whole, in memory."""

ADD_HEADERS, QUARANTINE, SET_MACROS = 1 << 0, 1 << 5, 1 << 8
ACTIONS = ADD_HEADERS | QUARANTINE | SET_MACROS

_NO_UNKNOWN, _NO_DATA = 1 << 8, 1 << 9
_NO_REPLY = {
    "header": 7,
    "connect": 12,
    "helo": 13,
    "rcpt": 15,
    "data": 16,
    "unknown": 17,
    "eoh": 18,
    "body": 19,
}
_LEADING_SPACE = 1 << 20
PROTOCOL = _NO_UNKNOWN | _NO_DATA | _LEADING_SPACE | sum(1 << bit for bit in _NO_REPLY.values())

# Stages of SMFIR_SETSYMLIST and the macros wanted there. The queue id is known from DATA on; macros
# come even where the event does not.
_MACROS = {0: b"{daemon_name}", 2: b"{auth_authen}", 4: b"i"}
_WANTED = frozenset(name.strip(b"{}") for name in _MACROS.values())

_HEADER = struct.Struct(">IB")
_NEGOTIATION = struct.Struct(">III")

CONTINUE: Final = _HEADER.pack(1, ord("c"))
ACCEPT: Final = _HEADER.pack(1, ord("a"))
TEMPFAIL: Final = _HEADER.pack(1, ord("t"))
HOLD: Final = _HEADER.pack(2, ord("q")) + b"\0"
"""Put the message on hold if it is accepted. Postfix does not look at the reason."""


class ProtocolError(Exception):
    """The other side does not speak the milter protocol as it should.

    Its connection is of no more use.
    """


class Decoder:
    """Cuts a stream of bytes into packets."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._wanted = 0

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Return the packets (command, data) that ``data`` completes.

        ProtocolError for an impossible length.
        """
        buffer = self._buffer
        if buffer:
            buffer += data
            if len(buffer) < self._wanted:  # or a packet in small pieces were copied at each
                return []
            data = bytes(buffer)
            buffer.clear()
        packets: list[tuple[int, bytes]] = []
        at, size, end = 0, len(data), _HEADER.size
        while at + _HEADER.size <= size:
            length, command = _HEADER.unpack_from(data, at)
            if not 0 < length <= MAX_PACKET:
                raise ProtocolError(f"a packet of {length} bytes")
            end = at + 4 + length
            if end > size:
                break
            packets.append((command, data[at + 5 : end]))
            at = end
        buffer += data[at:]
        self._wanted = max(end - at, _HEADER.size)
        return packets


def packet(command: bytes, data: bytes = b"") -> bytes:
    """Return one packet."""
    return _HEADER.pack(len(data) + 1, command[0]) + data


def negotiate(data: bytes) -> bytes:
    """Answer the MTA's offer. ProtocolError if it cannot do what is needed here."""
    if len(data) < _NEGOTIATION.size:
        raise ProtocolError("a short option negotiation")
    version, actions, protocol = _NEGOTIATION.unpack_from(data)
    if version < VERSION or ACTIONS & ~actions or PROTOCOL & ~protocol:
        raise ProtocolError(
            f"the MTA offers too little (version {version},"
            f" actions {actions:#x}, protocol {protocol:#x})"
        )
    macros = b"".join(struct.pack(">I", stage) + names + b"\0" for stage, names in _MACROS.items())
    return packet(b"O", _NEGOTIATION.pack(VERSION, ACTIONS, PROTOCOL) + macros)


def reply(code: int, enhanced: str, text: str) -> bytes:
    """Answer the current SMTP command with ``code``.

    The MTA takes ``%`` for a format, so it is doubled.
    """
    line = f"{code} {enhanced} {text}".encode("ascii", "replace").replace(b"%", b"%%")
    return packet(b"y", line[:500] + b"\0")


def insert_header(name: str, value: str) -> bytes:
    """Make a header the first; the space after the colon is ours to write.

    (``SMFIP_HDR_LEADSPC``.) Only the Received header that Postfix itself wrote stands before it.
    """
    place = (1).to_bytes(4)
    return packet(b"i", place + name.encode("ascii") + b"\0 " + value.encode("ascii") + b"\0")


def strings(data: bytes) -> list[bytes]:
    """Split NUL-terminated strings. ProtocolError if the last one is not terminated."""
    if not data:
        return []
    if data[-1]:
        raise ProtocolError("a string without its end")
    return data[:-1].split(b"\0")


@dataclass(slots=True)
class Client:
    """The SMTP client; ``name`` is its address in brackets if it has none.

    Local submissions come as ``localhost``.
    """

    name: bytes = b""
    address: bytes = b""
    helo: bytes = b""


@dataclass(slots=True)
class Transaction:
    """One mail transaction as far as it has come: MAIL, RCPT and their ESMTP arguments.

    Macro names are without braces.
    """

    client: Client
    sender: bytes
    sender_args: list[bytes]
    macros: dict[bytes, bytes]
    recipients: list[list[bytes]] = field(default_factory=list)

    def macro(self, name: bytes) -> bytes:
        """Return a macro's value, empty if it was not sent."""
        return self.macros.get(name, b"")


class Message(Protocol):
    """Takes one message's content as it comes and decides about it."""

    def header(self, name: bytes, lines: bytes) -> None:
        """Take a header; ``lines`` is all of it, with CRLF line ends."""
        ...

    def body(self, data: bytes) -> None:
        """Take what follows the headers, beginning with the empty line."""
        ...

    async def finish(self) -> bytes:
        """Return the answer to the end of the message, as packets. Bounded in time."""
        ...

    def abort(self) -> None:
        """The message will not be finished; drop it.

        May come at any time, also after :meth:`finish`.
        """
        ...


class Flow(Protocol):
    """The brake of the connection that a message comes on."""

    def pause(self) -> None:
        """Take no more content for now."""
        ...

    def resume(self) -> None:
        """Go on."""
        ...


class Application(Protocol):
    """What is asked about transactions."""

    def mail(self, transaction: Transaction) -> bytes | None:
        """Return None to go on after MAIL, or the packet that refuses."""
        ...

    def message(self, transaction: Transaction, flow: Flow) -> Message:
        """Return the taker of a message whose envelope is complete."""
        ...


class Step(Enum):
    """What the owner of a :class:`Conversation` has to do, when it is not to send bytes."""

    NOTHING = auto()
    FINISH = auto()
    """Await the message's ``finish()``, send what it returns, then call ``finished()``."""
    CLOSE = auto()


class Conversation:
    """The filter's side of one connection; no I/O.

    A connection carries any number of messages, one after another.
    """

    def __init__(self, application: Application, flow: Flow) -> None:
        self._application = application
        self._flow = flow
        self._negotiated = False
        self._client = Client()
        self._client_macros: dict[bytes, bytes] = {}
        self._macros: dict[bytes, bytes] = {}
        self._transaction: Transaction | None = None
        self._envelope = 0
        self.message: Message | None = None

    def receive(self, command: int, data: bytes) -> bytes | Step:
        """Take a packet and return what to send, or the step to do.

        ProtocolError if it has no place here.
        """
        if not self._negotiated and command not in b"OQ":
            raise ProtocolError(f"command {command:#x} before the option negotiation")
        match command:
            case 0x42:  # B, body chunk
                self._content().body(data)
            case 0x4C:  # L, header
                self._header(data)
            case 0x44:  # D, macros
                self._define(data)
            case 0x52:  # R, RCPT
                self._rcpt(data)
            case 0x4D:  # M, MAIL
                return self._mail(data)
            case 0x4E:  # N, end of headers
                self._content().body(b"\r\n")
            case 0x45:  # E, end of message; it may carry a last chunk
                message = self._content()
                if data:
                    message.body(data)
                return Step.FINISH
            case 0x48:  # H, HELO
                self._client.helo = strings(data)[0] if data else b""
            case 0x43:  # C, connect
                self._connect(data)
            case 0x41:  # A, abort the message, keep the connection
                self.abort()
            case 0x4F:  # O, option negotiation
                self._negotiated = True
                return negotiate(data)
            case 0x4B:  # K, the client has gone; the connection is used for another
                self.abort()
                self._client, self._client_macros = Client(), {}
            case 0x51:  # Q, the end
                self.abort()
                return Step.CLOSE
            case 0x54 | 0x55:  # T (DATA), U (unknown command): not asked for, and nothing to answer
                pass
            case _:
                raise ProtocolError(f"unknown command {command:#x}")
        return Step.NOTHING

    def finished(self) -> None:
        """The message was answered; the connection is ready for the next."""
        self._transaction = self.message = None
        self._macros = {}
        self._envelope = 0

    def abort(self) -> None:
        """Drop the message that is under way, if any.

        Also to be called when the connection is lost.
        """
        if self.message is not None:
            self.message.abort()
        self.finished()

    def _connect(self, data: bytes) -> None:
        name, _, rest = data.partition(b"\0")
        if not rest:
            raise ProtocolError("a connect packet without an address family")
        # Family (4, 6, L or U), two bytes of port and the address follow; U has neither.
        address = strings(rest[3:])[0] if len(rest) > 3 else b""
        self._client = Client(name, address.removeprefix(b"IPv6:"))

    def _define(self, data: bytes) -> None:
        if len(data) == 1:
            return  # Postfix announces each header's macros, also when there are none
        pairs = strings(data[1:])
        if not data or len(pairs) % 2:
            raise ProtocolError("a macro without a value")
        target = self._client_macros if data[0] in b"CH" else self._macros
        for name, value in zip(pairs[::2], pairs[1::2], strict=True):
            if (plain := name.strip(b"{}")) in _WANTED:  # the rest would only fill the memory
                target[plain] = value

    def _hold(self, data: bytes) -> None:
        self._envelope += len(data)
        if self._envelope > MAX_ENVELOPE:
            raise ProtocolError(f"an envelope of over {MAX_ENVELOPE} bytes")

    def _mail(self, data: bytes) -> bytes:
        if self.message is not None:
            raise ProtocolError("MAIL inside a message")
        arguments = strings(data)
        if not arguments:
            raise ProtocolError("MAIL without a sender")
        macros = self._client_macros | self._macros
        transaction = Transaction(self._client, arguments[0], arguments[1:], macros)
        refusal = self._application.mail(transaction)
        self._transaction = None if refusal else transaction
        return refusal or CONTINUE

    def _rcpt(self, data: bytes) -> None:
        if self._transaction is None or self.message is not None:
            raise ProtocolError("RCPT outside a transaction")
        self._hold(data)
        arguments = strings(data)
        if not arguments or len(self._transaction.recipients) >= MAX_RECIPIENTS:
            raise ProtocolError("RCPT without a recipient, or too many recipients")
        self._transaction.recipients.append(arguments)

    def _content(self) -> Message:
        if self.message is None:
            if self._transaction is None or not self._transaction.recipients:
                raise ProtocolError("content without an envelope")
            self._transaction.macros |= self._macros
            self.message = self._application.message(self._transaction, self._flow)
        return self.message

    def _header(self, data: bytes) -> None:
        name, end, value = data[:-1].partition(b"\0")
        if not end or data[-1] or b"\0" in value:
            raise ProtocolError("a header is a name and a value")
        if b"\n" in value:  # the lines of a folded header come separated by LF
            value = value.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        self._content().header(name, b"%b:%b\r\n" % (name, value))
