"""Sends messages at a fixed pace and tells how long each took. Run on the client by the benchmark.

Usage: ``prober.py ADDRESS PORT CONNECTIONS MESSAGES PER_SECOND SIZE``. Prints a JSON list: seconds
from MAIL to the answer after the final dot, one for each message. Standard library only.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

LIMIT = 120.0


async def command(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: bytes, code: bytes
) -> None:
    """Send ``line`` unless it is empty and read the reply."""
    if line:
        writer.write(line)
    while True:
        reply = await reader.readline()
        if not reply.startswith(code):
            raise SystemExit(f"{line[:40]!r} was answered {reply!r}")
        if reply[3:4] == b" ":
            return


async def main(
    address: str, port: int, connections: int, messages: int, per_second: float, size: int
) -> list[float]:
    """Each connection sends its share, staggered, so that the whole keeps the pace."""
    took: list[float] = []
    text = b"Subject: bench\r\nFrom: <bench@example.net>\r\n\r\n"
    content = text + (b"x" * 70 + b"\r\n") * ((size - len(text)) // 72) + b".\r\n"
    start = time.monotonic() + 0.5

    async def sender(number: int) -> None:
        reader, writer = await asyncio.open_connection(address, port)
        await command(reader, writer, b"", b"220")
        await command(reader, writer, b"EHLO client.example.net\r\n", b"250")
        for place in range(number, messages, connections):
            await asyncio.sleep(start + place / per_second - time.monotonic())
            begun = time.monotonic()
            await command(reader, writer, b"MAIL FROM:<bench@example.net>\r\n", b"250")
            await command(reader, writer, b"RCPT TO:<bench@example.org>\r\n", b"250")
            await command(reader, writer, b"DATA\r\n", b"354")
            await command(reader, writer, content, b"250")
            took.append(time.monotonic() - begun)
        writer.write(b"QUIT\r\n")
        writer.close()

    async with asyncio.timeout(LIMIT), asyncio.TaskGroup() as group:
        for number in range(connections):
            group.create_task(sender(number))
    return took


if __name__ == "__main__":
    _, address, port, connections, messages, per_second, size = sys.argv
    values = asyncio.run(
        main(address, int(port), int(connections), int(messages), float(per_second), int(size))
    )
    print(json.dumps([round(value, 6) for value in values]))
