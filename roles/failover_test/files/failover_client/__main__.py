"""Commands of the failover test: ``python3 -m failover_client COMMAND ...``."""

from __future__ import annotations

import argparse
import imaplib
import json
import random
import sys
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from . import reader
from .connect import Imap, Nodes, TlsContext, tls_context
from .imap import Changer
from .journal import OK, Journal, stamp
from .messages import big, load_samples, stream
from .pace import Pace, Stop
from .settings import Settings, User, load
from .smtp import Sender

SEVERAL = 5  # every fifth message goes to two recipients


def run(settings: Settings) -> None:
    """Put the group under load until told to stop, and log everything."""
    with closing(Journal(settings.directory / "log.jsonl")) as journal:
        _load(settings, journal)


def _load(settings: Settings, journal: Journal) -> None:
    context = tls_context(settings)
    samples = load_samples(settings.samples)

    def enough() -> bool:
        return journal.messages >= settings.min_messages and journal.changes >= settings.min_changes

    stop = Stop(settings.directory / "stop", settings.max_s, enough)
    journal.write({"type": "begin", **stamp(), "run": settings.run, "samples": len(samples)})
    common = settings, journal, context, stop
    jobs = [
        partial(send_steadily, *common, worker, samples) for worker in range(settings.smtp_workers)
    ]
    jobs += [partial(change_steadily, *common, worker) for worker in range(settings.imap_workers)]
    if settings.big_message_bytes:
        jobs.append(partial(send_big, *common))
    with ThreadPoolExecutor(len(jobs)) as pool:
        running = [pool.submit(job) for job in jobs]
        # A worker that dies ends the run: the others alone would prove less than it says.
        wait(running, return_when=FIRST_EXCEPTION)
        stop.abort()
    for worker in running:
        worker.result()
    # Without it the account says that the load did not last: its time was up.
    if stop.told():
        journal.write({"type": "end", **stamp()})


def send_steadily(
    settings: Settings,
    journal: Journal,
    context: TlsContext,
    stop: Stop,
    worker: int,
    samples: list[tuple[str, bytes]],
) -> None:
    """Be one SMTP worker."""
    sender = Sender(settings, journal, context, worker)
    pace = Pace(
        settings.messages_per_s / settings.smtp_workers, stop, worker / settings.smtp_workers
    )
    chance = random.Random(f"{settings.run}-recipients-{worker}")
    users = [user.address for user in settings.users]
    for number, message in enumerate(stream(settings.run, worker, samples)):
        if not pace.wait():
            break
        several = number % SEVERAL == 0 and len(users) > 1
        sender.send(message, chance.sample(users, 2 if several else 1), pace)
    sender.close()


def send_big(settings: Settings, journal: Journal, context: TlsContext, stop: Stop) -> None:
    """Send the one large message of the run."""
    sender = Sender(settings, journal, context, settings.smtp_workers)
    message = big(f"{settings.run}-big", settings.big_message_bytes)
    sender.send(message, [settings.users[-1].address], Pace(1.0, stop))
    sender.close()


def change_steadily(
    settings: Settings, journal: Journal, context: TlsContext, stop: Stop, worker: int
) -> None:
    """Be one IMAP worker."""
    changer = Changer(settings, journal, context, worker, settings.users[worker])
    pace = Pace(
        settings.changes_per_s / settings.imap_workers, stop, worker / settings.imap_workers
    )
    while pace.wait():
        changer.step(pace)
    changer.close()


def mark(settings: Settings, name: str) -> None:
    """Note the moment under a name, on the clock of the log."""
    with (settings.directory / "marks.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"type": "mark", "name": name, **stamp()}) + "\n")


def read(settings: Settings, settle_s: float) -> dict[str, Any]:
    """Read the mailboxes from outside, once all that was acknowledged is there or time is up."""
    acknowledged: dict[str, set[str]] = {user.address: set() for user in settings.users}
    with (settings.directory / "log.jsonl").open(encoding="utf-8") as file:
        for record in map(json.loads, file):
            if record.get("kind") == "send" and record["outcome"] == OK:
                for recipient in record["recipients"]:
                    acknowledged[recipient].add(record["id"])
    deadline = time.monotonic() + settle_s
    users = {}
    for user in settings.users:
        session = _login(settings, user)
        reader.await_ids(session, settings.run, acknowledged[user.address], deadline)
        users[user.address] = reader.read_user(session, settings.run, settings.folder_prefix)
        session.logout()
    return users


def read_local(addresses: list[str], run_id: str, prefix: str) -> dict[str, Any]:
    """Read the mailboxes on a mail host."""
    users = {}
    for address in addresses:
        session = reader.local(address)
        users[address] = reader.read_user(session, run_id, prefix)
        session.logout()
    return users


def clean(settings: Settings) -> int:
    """Remove from the mailboxes what the run made."""
    gone = 0
    for user in settings.users:
        session = _login(settings, user)
        gone += reader.clean_user(session, settings.run, settings.folder_prefix)
        session.logout()
    return gone


def _login(settings: Settings, user: User) -> Imap:
    context = tls_context(settings)
    session, reason = Nodes(settings.targets).connect(
        lambda target: Imap(target, settings, context, user.address, user.password)
    )
    if session is None:
        raise reader.ReadError(f"no node lets {user.address} in: {reason}")
    session.sock.settimeout(60)  # reading may take longer than a change
    return session


def main() -> int:
    """Parse the command line and do what it says; 1 with one sentence when that is not possible."""
    parser = argparse.ArgumentParser(prog="failover_client", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "mark", "read", "clean"):
        command = commands.add_parser(name)
        command.add_argument("settings", type=Path)
        if name == "mark":
            command.add_argument("name")
        if name == "read":
            command.add_argument("--settle", type=float, default=60.0)
            command.add_argument("--output", type=Path, required=True)
    command = commands.add_parser("read-local")
    command.add_argument("--run", required=True)
    command.add_argument("--prefix", required=True)
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("users", nargs="+")
    arguments = parser.parse_args()
    try:
        if arguments.command == "read-local":
            users = read_local(arguments.users, arguments.run, arguments.prefix)
            arguments.output.write_text(json.dumps(users))
            return 0
        settings = load(arguments.settings)
        if arguments.command == "run":
            run(settings)
        elif arguments.command == "mark":
            mark(settings, arguments.name)
        elif arguments.command == "read":
            arguments.output.write_text(json.dumps(read(settings, arguments.settle)))
        else:
            print(json.dumps({"removed": clean(settings)}))
    except (OSError, ValueError, KeyError, reader.ReadError, imaplib.IMAP4.error) as error:
        print(f"failover_client {arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
