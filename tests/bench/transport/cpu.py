#!/usr/bin/env python3
"""CPU time of both agents' transport for each message, without a lab or Postfix.

Three processes on loopback: a driver that speaks the milter protocol as Postfix does, a primary
(milter, shadowing, peer link with TLS) and a shadow (peer server, durable store). What is reported
is user and system time of primary and shadow, and the rate at which the driver was answered.

With ``--against DIR`` the package in DIR (a ``files`` folder of the role, of another commit) is
measured too, turn by turn, so that drift of the machine hits both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
FILES = HERE.parents[3] / "roles" / "replication_agent" / "files"
WARM_UP = 200
EPOCH = 1


def main() -> None:
    """Measure turn by turn and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--messages", type=int, default=3000)
    parser.add_argument("--connections", type=int, default=10)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, metavar="DIR")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="write cProfile data there")
    parser.add_argument("--part", choices=["primary", "shadow"], help=argparse.SUPPRESS)
    parser.add_argument("--at", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        _run_part(options)
        return
    packages = {"this tree": FILES}
    if options.against:
        packages["against"] = options.against.resolve()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in packages}
    for turn in range(options.rounds):
        for name, files in packages.items():
            result = _measure(files, options)
            results[name].append(result)
            text = "  ".join(f"{key} {value:.3f}" for key, value in result.items())
            print(f"{turn + 1}/{options.rounds} {name:10} {text}", flush=True)
    print()
    for name, rows in results.items():
        medians = "  ".join(
            f"{key} {statistics.median(row[key] for row in rows):.3f}" for key in rows[0]
        )
        print(f"median {name:10} {medians}")


def _measure(files: Path, options: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=options.at) as name:
        directory = Path(name)
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
        parts = []
        try:
            for part in ("shadow", "primary"):
                command = [sys.executable, str(HERE), "--part", part, "--at", name]
                if options.profile:
                    command += ["--profile", str(options.profile)]
                with (directory / f"{part}.log").open("wb") as log:
                    process = subprocess.Popen(
                        command,
                        env={**os.environ, "PYTHONPATH": str(files)},
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                    )
                parts.append(process)
                assert process.stdout
                if process.stdout.readline() != "ready\n":
                    raise SystemExit((directory / f"{part}.log").read_text())
            asyncio.run(_drive(directory / "milter.sock", WARM_UP, options))
            before = [_ask(part) for part in parts]
            started = time.perf_counter()
            waits = asyncio.run(_drive(directory / "milter.sock", options.messages, options))
            seconds = time.perf_counter() - started
            shadow, primary = (
                (_ask(part) - was) / options.messages * 1000
                for part, was in zip(parts, before, strict=True)
            )
        finally:
            for process in reversed(parts):
                assert process.stdin
                process.stdin.close()
                process.wait(30)
        return {
            "cpu_ms": primary + shadow,
            "primary_ms": primary,
            "shadow_ms": shadow,
            "messages_s": options.messages / seconds,
            "p50_ms": statistics.median(waits) * 1000,
        }


def _ask(process: subprocess.Popen[str]) -> float:
    """CPU seconds of a part until now."""
    assert process.stdin
    assert process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


async def _drive(path: Path, messages: int, options: argparse.Namespace) -> list[float]:
    """Send as Postfix does; return how long each end of message waited for its answer, in s."""
    waits: list[float] = []
    left = iter(range(messages))

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_unix_connection(path)

        def packet(kind: bytes, data: bytes = b"") -> bytes:
            return struct.pack(">I", len(data) + 1) + kind + data

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
        body = (b"x" * 70 + b"\r\n") * (options.size // 72)
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
            pieces = [packet(b"B", body[at : at + 65535]) for at in range(0, len(body), 65535)]
            writer.write(
                packet(b"D", b"Ti\x004abcDEF%d\0" % item) + headers + packet(b"N") + pieces[0]
            )
            for piece in pieces[1:]:
                writer.write(piece)
                await writer.drain()
            started = time.perf_counter()
            writer.write(packet(b"D", b"Ei\x004abcDEF%d\0" % item) + packet(b"E"))
            if await answer() != b"h" or await answer() != b"a":
                raise SystemExit("a message was not accepted")
            waits.append(time.perf_counter() - started)
        writer.close()

    async with asyncio.timeout(600), asyncio.TaskGroup() as group:
        for number in range(options.connections):
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
        profile.runcall(uvloop.run, part(options.at))
        profile.dump_stats(options.profile / f"{options.part}.prof")
    else:
        uvloop.run(part(options.at))


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
    store = ShadowStore(directory / "held")
    await store.open()
    handlers = ShadowService(store, lambda: EPOCH).handlers()
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

    async def queue() -> set[str]:
        return set()  # every message has left the queue by the next look

    store = ShadowStore(directory / "own")
    await store.open()
    discarder = Discarder([LocalHolder(store, "a"), PeerHolder(link)], queue)
    group: Any = Group()
    shadowing = Shadowing(
        "a", group, store, discarder, {}, policy=ShadowPolicy.ACCEPT, timeout=10.0
    )
    server = MilterServer(directory / "milter.sock", shadowing)
    await server.start()
    discarding = asyncio.create_task(discarder.run())
    await _report()
    discarding.cancel()
    await asyncio.gather(discarding, return_exceptions=True)
    await server.stop()
    link.reset()
    await store.close()


if __name__ == "__main__":
    main()
