"""The load, and what the mailboxes hold of it: failover_test's client, on the lab's hosts."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.faults.field import (
    CLIENT,
    MAILBOXES,
    PASSWORD,
    ROOT,
    Field,
    FieldError,
    wait,
)

DIRECTORY = "/var/lib/umbra-faults"
FILES = ROOT / "roles" / "failover_test" / "files"
USERS = MAILBOXES[:6]
RATE = 10.0
"""Messages a second, and as many changes; twice as many leave two cores that carry all no rest."""
WORKERS = 6
LONGEST_S = 120.0
CLEAN_S = 300.0
REPLY_TIMEOUT_S = 8.0
"""Longer than the milter's own decision takes in the worst case, so that few outcomes are unknown;
shorter than a dead host would keep a worker."""
ENOUGH = 40
"""Acknowledged messages without which the load does not end: it goes on until mail flows again."""


def settings(
    run: str,
    targets: Mapping[str, str],
    rate: float,
    max_s: float,
    *,
    changes: bool = True,
) -> dict[str, Any]:
    """Settings of the client for one trial, as `failover_client.settings` reads them."""
    return {
        "run": run,
        "targets": [{"node": node, "address": address} for node, address in targets.items()],
        "users": [{"address": user, "password": PASSWORD} for user in USERS],
        "sender": "faults@example.com",
        "smtp_port": 25,
        "imap_port": 993,
        "ca_file": f"{DIRECTORY}/ca.crt",
        "verify_tls": True,
        "server_name": "mail.example.org",
        "smtp_workers": WORKERS,
        "imap_workers": WORKERS if changes else 0,
        "messages_per_s": rate,
        "changes_per_s": rate,
        "samples": "",
        "big_message_bytes": 0,
        "min_messages": ENOUGH,
        "min_changes": 0,
        "max_s": max_s,
        "connect_timeout_s": 0.5,
        "reply_timeout_s": REPLY_TIMEOUT_S,
    }


def install(field: Field) -> None:
    """Bring the client to the outside host, and to the nodes as their reader."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path in sorted((FILES / "failover_client").glob("*.py")):
            tar.add(path, f"failover_client/{path.name}")
    authority = field.run(field.nodes[0], "cat /etc/ssl/umbra/ca.crt")
    for host in (CLIENT, *field.nodes):
        command = field.enter(host, "sh", "-c", f"mkdir -p {DIRECTORY} && tar -C {DIRECTORY} -xf -")
        subprocess.run(command, input=archive.getvalue(), check=True, timeout=60)
    field.run(CLIENT, f"cat > {DIRECTORY}/ca.crt", text=authority)


class Load:
    """Messages sent, and changes made by IMAP, from outside, from ``start`` to ``stop``.

    :param targets: whom clients try, by name; default: all nodes.
    :param rate: messages a second in all, and changes.
    :param changes: whether there are changes.
    :param max_s: it ends by itself after so many seconds.
    """

    def __init__(
        self,
        field: Field,
        run: str,
        *,
        targets: Mapping[str, str] | None = None,
        rate: float = RATE,
        changes: bool = True,
        max_s: float = LONGEST_S,
    ) -> None:
        self._field = field
        self._run = run
        self._settings = settings(run, targets or field.addresses, rate, max_s, changes=changes)
        self._directory = f"{DIRECTORY}/{run}"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Begin, and return when the first message was answered."""
        self._field.run(
            CLIENT,
            "mkdir -p $1 && cat > $1/settings.json",
            self._directory,
            text=json.dumps(self._settings),
        )
        command = "cd $1 && echo $$ > pid && PYTHONPATH=.. exec python3 -m failover_client $2 $3"
        self._process = self._field.start(
            CLIENT, "sh", "-c", command, "sh", self._directory, "run", "settings.json"
        )
        self.wait_for_more(0)

    def taken(self) -> int:
        """How many messages were acknowledged so far."""
        script = 'grep \'"kind":"send"\' $1/log.jsonl | grep -c \'"outcome":"ok"\'; true'
        return int(self._field.run(CLIENT, script, self._directory) or 0)

    def wait_for_more(self, count: int) -> None:
        """Wait until more than so many were acknowledged: mail flows."""
        wait(lambda: self.taken() > count, 20, lambda: f"no mail is taken: {self._field.why()}")

    def stop(self) -> list[dict[str, Any]]:
        """End it and return its log."""
        process, self._process = self._process, None
        assert process is not None
        self._field.run(CLIENT, "touch $1/stop", self._directory)
        try:
            said, _ = process.communicate(timeout=LONGEST_S + 30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise FieldError("the load did not end") from None
        if process.returncode:
            raise FieldError(f"the load broke off: {said[-300:]}")
        text = self._field.run(CLIENT, "cat $1/log.jsonl; rm -r $1", self._directory)
        return [json.loads(line) for line in text.splitlines()]

    def abandon(self) -> None:
        """End it whatever it does; for a trial that has failed already."""
        process, self._process = self._process, None
        if process is not None:
            self._field.run(CLIENT, "kill $(cat $1/pid)", self._directory, check=False)
            process.kill()
            process.communicate()


def read(field: Field, run: str) -> dict[str, dict[str, Any]]:
    """What each node's mailboxes hold of a run, read on its own disk."""
    script = (
        f"cd {DIRECTORY} && run=$1 && shift && python3 -m failover_client read-local --run $run"
        " --prefix failover-test-$run- --output view-$run.json $@"
        " && cat view-$run.json && rm view-$run.json"
    )

    def view(node: str) -> dict[str, Any]:
        try:
            said = field.run(node, script, run, *USERS)
        except FieldError as error:
            # What is lost is missing the second time, too.
            print(f"  a reading on {node} failed and is tried again: {error}", flush=True)
            time.sleep(1)
            said = field.run(node, script, run, *USERS)
        found: dict[str, Any] = json.loads(said)
        return found

    with ThreadPoolExecutor() as pool:
        return dict(zip(field.nodes, pool.map(view, field.nodes), strict=True))


def clean(field: Field, run: str) -> None:
    """Remove a run's messages and mailboxes, so that the users' stay small."""
    # All users at once: each deletion waits for the shadow, and the line may be long.
    script = (
        "for user; do { doveadm expunge -u $user mailbox INBOX HEADER X-Failover-Test-Id $run;"
        ' doveadm mailbox list -u $user "failover-test-$run-*" | sort -r | while read -r box; do'
        ' doveadm mailbox delete -u $user -s "$box"; done; } & done; wait'
    )
    field.run(field.primary, f"run=$1; shift; {script}", run, *USERS, timeout=CLEAN_S)


def settle(field: Field, seconds: float) -> list[str]:
    """Wait until nothing is in transit any more; return what still is, one sentence each.

    What was deferred while Dovecot was away Postfix would try again in five minutes: that is asked
    for here, by `postqueue -f`. A file in incoming that is not executable was never acknowledged: a
    cleanup that was killed leaves it, and Postfix removes it some day.
    """
    queue = (
        "cd /var/spool/postfix;"
        " find maildrop incoming active deferred -type f"
        " ! '(' -path 'incoming/*' ! -perm -u+x ')' | wc -l;"
        " find hold -type f | wc -l; postqueue -f || true"
    )

    def left() -> list[str]:
        found = []
        waiting, held = field.run(field.primary, queue).split()
        if waiting != "0":
            found.append(f"{waiting} messages stay in the primary's queue")
        if held != "0":
            found.append(f"{held} messages are on hold on the primary")
        status = field.status(field.primary)
        for node in status["nodes"] if status else []:
            if node["lag_changes"]:
                found.append(f"{node['lag_changes']} changes never come to {node['node']}")
            if node["shadow_messages"]:
                copies = node["shadow_messages"]
                found.append(f"{copies} shadow messages are never discarded on {node['node']}")
        return found if status else ["the primary's agent does not answer"]

    deadline = time.monotonic() + seconds
    while (found := left()) and time.monotonic() < deadline:
        time.sleep(0.3)
    return found
