#!/usr/bin/env python3
"""A primary and a shadow as two processes on loopback, without a lab or Postfix.

The transport's real parts: milter, shadowing, safety net, peer link with TLS, peer server, durable
store. The cluster is played. Whoever starts them speaks the milter protocol as Postfix does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
FILES = HERE.parents[3] / "roles" / "replication_agent" / "files"
EPOCH = 1
HOLD = 2 * 86400.0


class Part:
    """One of the two processes."""

    def __init__(self, name: str, directory: Path, files: Path, profile: Path | None) -> None:
        command = [sys.executable, str(HERE), name, str(directory)]
        if profile:
            command += ["--profile", str(profile)]
        self._log = directory / f"{name}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": str(files)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout
        if self.process.stdout.readline() != "ready\n":
            raise SystemExit(self._log.read_text())

    def cpu(self) -> float:
        """Return the CPU seconds until now."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def resident(self, what: str = "VmRSS") -> int:
        """Return resident memory in KiB; ``VmHWM`` is the most since :meth:`forget_peak`."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.partition(f"{what}:")[2].split()[0])

    def forget_peak(self) -> None:
        """Let the peak begin at what is resident now."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def stop(self) -> None:
        """End it in order."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


class Pair:
    """Both processes; ``socket`` is the primary's milter."""

    def __init__(self, directory: Path, files: Path = FILES, profile: Path | None = None) -> None:
        for node in ("a", "b"):
            (directory / node / "peers").mkdir(parents=True)
            subprocess.run(
                ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                 "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", f"/CN={node}",
                 "-keyout", directory / node / "node.key", "-out", directory / node / "node.crt"],
                check=True, capture_output=True,
            )  # fmt: skip
        for node, peer in (("a", "b"), ("b", "a")):
            text = (directory / peer / "node.crt").read_text()
            (directory / node / "peers" / f"{peer}.crt").write_text(text)
        self.socket = directory / "milter.sock"
        self.shadow = Part("shadow", directory, files, profile)
        try:
            self.primary = Part("primary", directory, files, profile)
        except BaseException:
            self.shadow.stop()
            raise

    def stop(self) -> None:
        """End both."""
        self.primary.stop()
        self.shadow.stop()

    def drive(self, messages: int, connections: int, size: int) -> list[float]:
        """Send ``messages`` over ``connections``; see :func:`drive`."""
        return asyncio.run(drive(self.socket, messages, connections, size))


@contextmanager
def running(directory: Path, files: Path = FILES, profile: Path | None = None) -> Iterator[Pair]:
    """Have a pair in the ``with`` block."""
    pair = Pair(directory, files, profile)
    try:
        yield pair
    finally:
        pair.stop()


async def drive(path: Path, messages: int, connections: int, size: int) -> list[float]:
    """Send as Postfix does; return how long each end of message waited for its answer, in s."""
    waits: list[float] = []
    left = iter(range(messages))

    def packet(kind: bytes, data: bytes = b"") -> bytes:
        return struct.pack(">I", len(data) + 1) + kind + data

    body = (b"x" * 70 + b"\r\n") * (size // 72)
    pieces = [packet(b"B", body[at : at + 65535]) for at in range(0, len(body), 65535)]

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_unix_connection(path)

        async def answer() -> bytes:
            head = await reader.readexactly(5)
            await reader.readexactly(struct.unpack_from(">I", head)[0] - 1)
            return head[4:]

        writer.write(packet(b"O", struct.pack(">III", 6, 0x1FF, 0x1FFFFF)))
        await answer()
        writer.write(
            packet(b"D", b"C{daemon_name}\0mail.example.com\0")
            + packet(b"C", b"client.example.org\x004\x04\xd2192.0.2.7\0")
            + packet(b"D", b"H")
            + packet(b"H", b"client.example.org\0")
        )
        for item in left:
            writer.write(packet(b"D", b"M") + packet(b"M", b"<ann@example.org>\0SIZE=4096\0"))
            assert await answer() == b"c"
            writer.write(
                packet(b"D", b"R{rcpt_mailer}\0local\0") + packet(b"R", b"<bob@example.com>\0")
            )
            headers = b"".join(
                packet(b"D", b"L") + packet(b"L", name + b"\0 " + value + b"\0")
                for name, value in (
                    (b"From", b"<ann@example.org>"),
                    (b"To", b"<bob@example.com>"),
                    (b"Date", b"Fri, 1 Jan 2027 10:00:00 +0000"),
                    (b"Message-Id", b"<%d.%d@example.org>" % (number, item)),
                )
            )
            writer.write(
                packet(b"D", b"Ti\x004abcDEF%d\0" % item) + headers + packet(b"N") + pieces[0]
            )
            for piece in pieces[1:]:
                writer.write(piece)
                await writer.drain()
            started = time.perf_counter()
            writer.write(packet(b"D", b"Ei\x004abcDEF%d\0" % item) + packet(b"E"))
            if await answer() not in (b"h", b"i") or await answer() != b"a":
                raise SystemExit("a message was not accepted")
            waits.append(time.perf_counter() - started)
        writer.close()

    async with asyncio.timeout(600), asyncio.TaskGroup() as group:
        for number in range(connections):
            group.create_task(client(number))
    return waits


def _run_part(options: argparse.Namespace) -> None:
    import logging

    import uvloop

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # As the agent's own start does it.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    part = {"shadow": _shadow, "primary": _primary}[options.part]
    if options.profile:
        import cProfile

        profile = cProfile.Profile()
        profile.runcall(uvloop.run, part(options.directory))
        profile.dump_stats(options.profile / f"{options.part}.prof")
    else:
        uvloop.run(part(options.directory))


async def _report() -> None:
    """Answer each line of input with the CPU seconds; return at its end."""
    print("ready", flush=True)
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(used.ru_utime + used.ru_stime, flush=True)


def _hello(node: str) -> dict[str, Any]:
    from umbra.peer import frames

    return {"version": frames.VERSION, "group": "mail", "storage_id": node, "node": node}


async def _shadow(directory: Path) -> None:
    import socket

    from umbra.peer.identity import Identity
    from umbra.peer.server import PeerServer
    from umbra.transport.service import ShadowService
    from umbra.transport.store import ShadowStore

    async def any_epoch(peer: str, op: str, epoch: int) -> None:
        pass

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = ShadowStore(directory / "held", keep=True)
    await store.open()
    handlers = ShadowService(store, lambda: EPOCH, lambda node: True).handlers()
    identity = Identity(directory / "b", {"a": None})
    server = PeerServer("127.0.0.1", port, identity, _hello("b"), any_epoch, handlers)
    await server.start()
    (directory / "port").write_text(json.dumps(port))
    await _report()
    await server.stop()
    await store.close()


async def _primary(directory: Path) -> None:
    from contextlib import contextmanager

    from umbra.config import ShadowPolicy
    from umbra.peer.identity import Identity
    from umbra.peer.link import PeerLink
    from umbra.transport.discard import Discarder, LocalHolder, PeerHolder
    from umbra.transport.milter_server import MilterServer
    from umbra.transport.safety_net import SafetyNet
    from umbra.transport.shadowing import Shadowing
    from umbra.transport.store import ShadowStore

    port = json.loads((directory / "port").read_text())
    identity = Identity(directory / "a", {"b": None})
    link = PeerLink("b", "127.0.0.1", port, identity, _hello("a"), lambda: EPOCH)

    class Group:
        epoch = EPOCH

        def accepting(self) -> None:
            return None

        def shadows(self) -> list[PeerLink]:
            return [link]

        async def shadow_failed(self, peer: str, reason: str) -> None:
            raise SystemExit(f"{peer} failed: {reason}")

        def may_acknowledge(self, epoch: int, holders: object) -> bool:
            return epoch == EPOCH

        @contextmanager
        def begin_work(self) -> Any:
            yield

    async def queue() -> dict[str, str]:
        return {}  # every message has left the queue by the next look

    store = ShadowStore(directory / "own", keep=True)
    await store.open()
    discarder = Discarder([LocalHolder(store, "a"), PeerHolder(link)], queue)
    group: Any = Group()
    net = SafetyNet(store, hold=HOLD, max_size=10 << 30)
    shadowing = Shadowing(
        "a", group, store, discarder, {}, policy=ShadowPolicy.DEFER, timeout=10.0, net=net
    )
    server = MilterServer(directory / "milter.sock", shadowing)
    await server.start()
    tasks = [asyncio.create_task(work) for work in (discarder.run(), net.run())]
    await _report()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await server.stop()
    await net.close()
    link.reset()
    await store.close()


def main() -> None:
    """Be one of the two."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("part", choices=["primary", "shadow"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--profile", type=Path)
    _run_part(parser.parse_args())


if __name__ == "__main__":
    main()
