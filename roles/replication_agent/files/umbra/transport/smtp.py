"""A small SMTP client for resubmission to this node's own Postfix.

RFC 5321, DSN (RFC 3461) and Postfix's XFORWARD.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator

from umbra.transport.envelope import Envelope

CONNECT_TIMEOUT = 10.0
COMMAND_TIMEOUT = 60.0
END_TIMEOUT = 300.0
"""Seconds for the answer to the end of the message: the milter may wait for a shadow."""

MAX_REPLY_LINES = 100

# Which EHLO keyword stands for an ESMTP argument. SIZE is left out on purpose: it is a hint, and
# the message has grown.
_KEYWORDS = {
    "BODY": "8BITMIME",
    "SMTPUTF8": "SMTPUTF8",
    "RET": "DSN",
    "ENVID": "DSN",
    "NOTIFY": "DSN",
    "ORCPT": "DSN",
    "AUTH": "AUTH",
    "REQUIRETLS": "REQUIRETLS",
    "MT-PRIORITY": "MT-PRIORITY",
}


class SmtpError(Exception):
    """The message was not accepted; it may be tried again.

    ``usable``: the connection is still in step. ``permanent``: it would be refused again (5xx).
    """

    def __init__(self, text: str, *, usable: bool = False, permanent: bool = False) -> None:
        super().__init__(text)
        self.usable = usable
        self.permanent = permanent


class SmtpUnreachable(SmtpError):
    """No server answers."""


class Stuffer:
    """Dot-stuffing over pieces, byte for byte.

    A dot after any line end is doubled, also where it begins a piece.
    """

    def __init__(self) -> None:
        self._last = b"\r\n"

    def feed(self, data: bytes) -> bytes:
        """Return ``data`` stuffed."""
        if not data:
            return data
        stuffed = data.replace(b"\n.", b"\n..")
        if self._last.endswith(b"\n") and data.startswith(b"."):
            stuffed = b"." + stuffed
        self._last = (self._last + data)[-2:]
        return stuffed

    def end(self) -> bytes:
        """Return what ends the message; a last line without its end gets one."""
        return b".\r\n" if self._last == b"\r\n" else b"\r\n.\r\n"


class SmtpClient:
    """One connection; carries one message after another."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._keywords: dict[str, str] = {}

    @classmethod
    async def connect(cls, host: str, port: int, name: str) -> SmtpClient:
        """Connect and greet as ``name``. SmtpUnreachable if that does not work."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                reader, writer = await asyncio.open_connection(host, port, limit=16 * 1024)
        except OSError as error:  # TimeoutError is one
            raise SmtpUnreachable(
                f"no SMTP server at {host}:{port}: {error or 'time-out'}"
            ) from None
        client = cls(reader, writer)
        try:
            client._expect(await client._reply(COMMAND_TIMEOUT), 220)
            lines = client._expect(await client._command(f"EHLO {name}".encode()), 250)
        except SmtpError as error:
            client.close()
            raise SmtpUnreachable(f"the SMTP server at {host}:{port} refuses: {error}") from None
        except BaseException:
            client.close()
            raise
        for line in lines[1:]:
            keyword, _, rest = line.partition(" ")
            client._keywords[keyword.upper()] = rest
        return client

    async def send(self, envelope: Envelope, content: AsyncIterator[bytes]) -> str:
        """Send one message to all its recipients; return the server's answer.

        All or nothing: a recipient that is refused refuses the message. SmtpError otherwise.
        """
        await self._forward(envelope)
        commands = [_line("MAIL FROM", envelope.sender, self._offered(envelope.sender_args))]
        commands += [
            _line("RCPT TO", item.address, self._offered(item.args)) for item in envelope.recipients
        ]
        refusals: list[SmtpError] = []
        for reply in await self._pipeline(commands):
            try:
                self._expect(reply, 250, 251)
            except SmtpError as error:
                refusals.append(error)
        if refusals:
            await self._command(b"RSET")
            permanent = all(error.permanent for error in refusals)
            raise SmtpError(str(refusals[0]), usable=True, permanent=permanent)
        self._expect(await self._command(b"DATA"), 354)
        stuffer = Stuffer()
        async with asyncio.timeout(END_TIMEOUT):
            async for piece in content:
                await self._write(stuffer.feed(piece))
            await self._write(stuffer.end())
        return self._expect(await self._reply(END_TIMEOUT), 250)[0]

    def close(self) -> None:
        """Close without a QUIT.

        Nothing is outstanding, and a message half sent must not be taken for a whole one.
        """
        self._writer.close()

    async def _forward(self, envelope: Envelope) -> None:
        # For the log of the new primary only; a refusal changes nothing.
        known = self._keywords.get("XFORWARD", "").split()
        named = not envelope.client_name.startswith("[")
        values = {
            "NAME": envelope.client_name if named else "",
            "ADDR": _forward_address(envelope.client_address),
            "HELO": envelope.helo,
        }
        pairs = [
            f"{key}={_xtext(value) or '[UNAVAILABLE]'}"
            for key, value in values.items()
            if key in known
        ]
        if pairs:
            await self._command(" ".join(["XFORWARD", *pairs]).encode("ascii"))

    def _offered(self, args: tuple[str, ...]) -> list[str]:
        return [
            arg for arg in args if _KEYWORDS.get(arg.partition("=")[0].upper()) in self._keywords
        ]

    async def _pipeline(self, commands: list[bytes]) -> list[tuple[int, list[str]]]:
        if "PIPELINING" not in self._keywords:
            return [await self._command(command) for command in commands]
        replies = []
        # In portions: a server whose replies nobody reads stops reading commands.
        for start in range(0, len(commands), 100):
            portion = commands[start : start + 100]
            await self._write(b"\r\n".join(portion) + b"\r\n")
            replies += [await self._reply(COMMAND_TIMEOUT) for _ in portion]
        return replies

    async def _command(self, command: bytes) -> tuple[int, list[str]]:
        await self._write(command + b"\r\n")
        return await self._reply(COMMAND_TIMEOUT)

    async def _write(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT):
                self._writer.write(data)
                await self._writer.drain()
        except OSError as error:
            raise SmtpError(f"the connection ended: {error or 'time-out'}") from None

    async def _reply(self, limit: float) -> tuple[int, list[str]]:
        lines: list[str] = []
        try:
            async with asyncio.timeout(limit):
                while len(lines) < MAX_REPLY_LINES:
                    raw = await self._reader.readline()
                    line = raw.decode("utf-8", "replace").rstrip("\r\n")
                    if len(line) < 3 or not line[:3].isdigit():
                        raise SmtpError(
                            "the connection ended" if not raw else f"no SMTP reply: {line[:80]}"
                        )
                    lines.append(line[4:])
                    if line[3:4] != "-":
                        return int(line[:3]), lines
        except (OSError, ValueError) as error:  # ValueError: a line over the limit
            raise SmtpError(f"no reply: {error or 'time-out'}") from None
        raise SmtpError("an endless reply")

    def _expect(self, reply: tuple[int, list[str]], *codes: int) -> list[str]:
        code, lines = reply
        if code not in codes:
            text = f"{code} {' '.join(lines)}"
            raise SmtpError(text, usable=code != 421, permanent=code >= 500)
        return lines


def _line(command: str, address: str, args: list[str]) -> bytes:
    return " ".join([f"{command}:<{address}>", *args]).encode("utf-8", "surrogateescape")


def _forward_address(text: str) -> str:
    try:
        version = ipaddress.ip_address(text).version
    except ValueError:
        return ""
    return f"IPV6:{text}" if version == 6 else text


def _xtext(text: str) -> str:
    """Encode as RFC 1891 xtext: what is not printable ASCII, and ``+`` and ``=``, as ``+XX``."""
    return "".join(
        chr(byte) if 33 <= byte <= 126 and byte not in b"+=" else f"+{byte:02X}"
        for byte in text.encode("utf-8", "surrogateescape")
    )
