"""The lab's hosts for the benchmark of mailboxes: what is set up, run and asked on them.

* **alone**: a second Dovecot beside the primary's own, from the same configuration less what this
  collection adds to it, with a store of its own on the same disk.
* **old**: Debian 12's Dovecot 2.3 with its replicator on ``old-a`` and ``old-b``, as its
  documentation sets it up.

All clients speak to their Dovecot over the loopback address: no TLS, no fence, no network.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.bench.mailbox.figures import Many
from tests.bench.place import Place, SceneError

HERE = Path(__file__).resolve().parent
OLD = ("old-a", "old-b")
MAIL = ("mail-a", "mail-b")
PASSWORD = "umbra-bench"
ALONE_PORT, ALONE_STORE = 11143, "/var/vmail-alone"
ALONE_DOVEADM = 11145
FILL = "/etc/dovecot/fill.conf"
STORE = "/var/vmail/bench.example.org"
COPIED_SIZE = 50_000
# Dovecot looks at most once a second whether its file of users has changed.
READ_ANEW = 1.5
SMALL_SIZE = 400
IDLE = 61.0  # seconds; the agent looks for what was missed once a minute
SLOWEST = 10.0  # users a second; an agent that compares fewer is not waited for
CHANGED = 1_000  # users who change while the shadow is away, at most
LMTP = "/var/spool/postfix/private/dovecot-lmtp"
ALONE_LMTP = "/run/dovecot-alone/lmtp"
OLD_LMTP = "/run/dovecot/lmtp"
# What the role adds for the replication, and what would stand in the way of the other Dovecot.
ADDED = ("sieve_script once", "mail_plugins", "service auth", "service lmtp", "protocols")
_NAMED = r"^(?:service|metric|event_exporter|push_notification) umbra\S* \{\n.*?^\}\n"
_SETTINGS = (
    r"^(?:sieve_(?:plugins|global_extensions|execute_\w+)|sendmail_path|submission_\w+) = .*\n"
)
_PROOF = r"^service imap-login \{\n  inet_listener umbra \{\n.*?^\}\n"
PACKAGES = {
    "mail-a": ("dovecot-core", "dovecot-sieve", "python3", "python3-uvloop", "python3-aiohttp",
               "wireguard-go"),
    "old-a": ("dovecot-core",),
}  # fmt: skip

_ALONE = f"""
instance_name = dovecot-alone
base_dir = /run/dovecot-alone
state_dir = /var/lib/dovecot-alone
log_path = /var/log/dovecot-alone.log
mail_home = {ALONE_STORE}/%{{user | domain}}/%{{user | username}}
doveadm_password = {PASSWORD}
protocols {{
  imap = yes
  lmtp = yes
}}
service imap-login {{
  inet_listener imap {{
    port = {ALONE_PORT}
  }}
  inet_listener imaps {{
    port = 0
  }}
}}
service lmtp {{
  unix_listener lmtp {{
    mode = 0600
  }}
}}
service doveadm {{
  process_min_avail = 4
  restart_request_count = 1000
  inet_listener doveadm {{
    port = {ALONE_DOVEADM}
  }}
}}
"""

# The primary's own store without what the role adds, for filling and for copying it by hand.
_FILL = """
mail_home = /var/vmail/%{user | domain}/%{user | username}
mail_fsync = never
"""

_OLD = """
protocols = imap lmtp
ssl = no
disable_plaintext_auth = no
mail_uid = vmail
mail_gid = vmail
first_valid_uid = 5000
mail_home = /var/vmail/%d/%n
mail_location = sdbox:~/mail
mail_fsync = optimized
mail_plugins = notify replication
passdb {{
  driver = passwd-file
  args = /etc/dovecot/users
}}
userdb {{
  driver = passwd-file
  args = /etc/dovecot/users
}}
namespace inbox {{
  inbox = yes
  separator = /
  mailbox Drafts {{
    special_use = \\Drafts
    auto = subscribe
  }}
  mailbox Sent {{
    special_use = \\Sent
    auto = subscribe
  }}
  mailbox Junk {{
    special_use = \\Junk
    auto = subscribe
  }}
  mailbox Trash {{
    special_use = \\Trash
    auto = subscribe
  }}
}}
mail_max_userip_connections = 50
postmaster_address = postmaster@example.org
service lmtp {{
  unix_listener lmtp {{
    mode = 0600
  }}
}}
service replicator {{
  process_min_avail = 1
  unix_listener replicator-doveadm {{
    mode = 0600
  }}
}}
service aggregator {{
  fifo_listener replication-notify-fifo {{
    user = vmail
  }}
  unix_listener replication-notify {{
    user = vmail
  }}
}}
service doveadm {{
  inet_listener {{
    port = 12345
  }}
}}
doveadm_port = 12345
doveadm_password = {password}
plugin {{
  mail_replica = tcp:{other}:12345
}}
"""


_AGENT = "$(systemctl show -P MainPID umbra-agent)"
_RESIDENT = f"ps -o rss= -p {_AGENT}"
_CPU_SECONDS = (
    "set -- $(sed 's/.*) //' /proc/" + _AGENT + "/stat);"
    ' echo "(${12} + ${13}) / $(getconf CLK_TCK)" | python3 -c "print(eval(input()))"'
)


def without(config: str, blocks: Iterable[str]) -> str:
    """The configuration less what the role adds to it. SceneError if a block is not there once."""
    for name in blocks:
        config, count = re.subn(rf"^{name} \{{\n.*?^\}}\n", "", config, flags=re.M | re.S)
        if count != 1:
            raise SceneError(f"dovecot.conf has {count} blocks {name!r}")
    for block in (_NAMED, _PROOF):
        config = re.sub(block, "", config, flags=re.M | re.S)
    return re.sub(_SETTINGS, "", config, flags=re.M)


class Scene(Place):
    """The hosts of one lab."""

    def __init__(self, lab: str) -> None:
        super().__init__(lab)
        self.own, self.overlay = "", ""  # addresses in the tunnel
        self.mode = ""

    # -- setting up

    def prepare(self) -> None:
        """Set everything up. May be repeated, also after a run that was cut off."""
        self.own, self.overlay = (
            json.loads(self.run(host, "ip", "-j", "-4", "address", "show", "umbra0"))[0][
                "addr_info"
            ][0]["local"]
            for host in MAIL
        )
        self.undo()
        for host in MAIL:
            self.run(host, "cp", "-p", "/etc/dovecot/users", "/etc/dovecot/users.bench")
            config = without(self.run(host, "cat", "/etc/dovecot/dovecot.conf"), ADDED)
            self.write(host, "/etc/dovecot/alone.conf", config + _ALONE)
            self.write(host, FILL, config + _ALONE + _FILL)
            self._programs(host)
            self.run(host, "sh", "-ec",
                     f"rm -rf {ALONE_STORE}; install -d -o vmail -g vmail {ALONE_STORE};"
                     " install -d /var/lib/dovecot-alone;"
                     " systemd-run --quiet --unit=dovecot-alone dovecot -F -c"
                     " /etc/dovecot/alone.conf")  # fmt: skip
        self._wait("mail-a", ALONE_PORT)
        self.settle()

    def prepare_old(self) -> None:
        """Set up the two hosts with Debian 12."""
        for host, other in (OLD, OLD[::-1]):
            self.run(
                host, "sh", "-ec",
                "command -v dovecot >/dev/null || DEBIAN_FRONTEND=noninteractive apt-get -qq -y"
                " install dovecot-core dovecot-imapd dovecot-lmtpd >/dev/null;"
                " id vmail >/dev/null 2>&1 || useradd --uid 5000 --user-group vmail;"
                " systemctl stop dovecot; rm -rf /var/vmail /var/lib/dovecot/replicator.db;"
                " install -d -o vmail -g vmail /var/vmail; : > /etc/dovecot/users",
            )  # fmt: skip
            self.write(
                host, "/etc/dovecot/dovecot.conf", _OLD.format(other=other, password=PASSWORD)
            )
            self._programs(host)

    def start_old(self) -> None:
        """Start Dovecot 2.3, whose replicator reads once who there is."""
        for host in OLD:
            self.run(host, "systemctl", "restart", "dovecot")
            self._wait(host, 143)

    def _programs(self, host: str) -> None:
        self.run(host, "mkdir", "-p", "/run/bench")
        for name in ("load.py", "watch.py", "fill.py", "settle.py"):
            self.write(host, f"/run/bench/{name}", (HERE / name).read_text())

    def _wait(self, host: str, port: int) -> None:
        until = time.monotonic() + 20
        while True:
            try:
                self.run(host, "python3", "-c",
                         f"import socket; assert socket.create_connection(('127.0.0.1', {port}), 2)"
                         ".recv(4) == b'* OK'")  # fmt: skip
                return
            except SceneError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)

    def users(self, hosts: Sequence[str], names: Iterable[str], extra: str = "") -> None:
        """Let there be these users on the hosts, too."""
        lines = "".join(f"{name}:{{PLAIN}}{PASSWORD}::::::{extra}\n" for name in names)
        for host in hosts:
            self.run(host, "sh", "-c", "cat >> /etc/dovecot/users", input=lines)
        time.sleep(READ_ANEW)

    def forget_users(self) -> None:
        """Only the users that the roles have made, and nothing of the others anywhere."""
        self.run("mail-a", "systemctl", "stop", "umbra-agent")
        for host in MAIL:
            self.run(host, "sh", "-ec",
                     "[ ! -e /etc/dovecot/users.bench ] ||"
                     " cp -p /etc/dovecot/users.bench /etc/dovecot/users;"
                     f" rm -rf {STORE} {ALONE_STORE}/bench.example.org")  # fmt: skip
        # Where the syncs of users ended who will be others when they come again.
        self.run("mail-a", "sh", "-ec",
                 "rm -f /var/lib/umbra/mirror/ledger.sqlite*;"
                 " systemctl start umbra-agent")  # fmt: skip

    def undo(self) -> None:
        """Leave the mail hosts as the roles made them."""
        for host in MAIL:
            self.run(host, "sh", "-ec",
                     "systemctl stop dovecot-alone 2>/dev/null || :;"
                     f" rm -rf {ALONE_STORE} /etc/dovecot/alone.conf {FILL}")  # fmt: skip
        self._write_mode("sync")
        self.forget_users()
        for host in MAIL:
            self.run(host, "rm", "-f", "/etc/dovecot/users.bench")

    # -- the agent

    def set_mode(self, mode: str) -> None:
        """Mirror in this mode from now on; returns when all users are compared."""
        if mode != self.mode:
            self._write_mode(mode)
            self.restart_agent()

    def _write_mode(self, mode: str) -> None:
        self.run("mail-a", "sed", "-i", f"s/\\(mirror_mode\\W* \\)\\w*/\\1{mode}/",
                 "/etc/umbra/agent.yml")  # fmt: skip
        self.mode = mode

    def settle(self, limit: float = 300) -> float:
        """Wait until all changes are mirrored; return the seconds that it took."""
        started = time.monotonic()
        self.run("mail-a", "python3", "/run/bench/settle.py", self.own, self.mode, str(limit),
                 limit=limit + 30)  # fmt: skip
        return time.monotonic() - started

    def restart_agent(self, limit: float = 300) -> float:
        """Restart the primary's agent, which compares all users; return the seconds."""
        self.run("mail-a", "systemctl", "restart", "umbra-agent")
        return self.settle(limit)

    # -- measuring

    def load(self, host: str, **plan: Any) -> dict[str, Any]:
        """Run ``load.py`` on a host."""
        text = json.dumps({"password": PASSWORD, "size": 4096, "seconds": 0.0, **plan})
        answer: dict[str, Any] = json.loads(
            self.run(host, "python3", "/run/bench/load.py", input=text)
        )
        return answer

    def lag(
        self, primary: str, replica: str, user: str, prefix: str, operation: str, count: int,
        pace: float,
    ) -> list[tuple[float, float, float | None]]:  # fmt: skip
        """Change a new mailbox at a pace; return when each began, was answered, was seen."""
        seconds = count * pace + 10
        plan = {"imap": 143, "users": [user], "clients": 1}
        self.load(primary, operations=[], prefix=prefix, keep=True, **plan)
        mailbox = f"{prefix}-0"
        watcher = subprocess.Popen(
            self.command(replica, "python3", "/run/bench/watch.py", "143", user, PASSWORD, mailbox,
                         operation, str(count), str(seconds)),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert watcher.stdout
        try:
            if watcher.stdout.readline() != "ready\n":
                raise SceneError(f"nobody watches on {replica}")
            done = self.load(
                primary, operations=[operation], mailbox=mailbox, count=count, pace=pace, **plan
            )
            seen = json.loads(watcher.communicate(timeout=seconds + 30)[0])
        finally:
            watcher.kill()
        return [
            (begun, answered, at)
            for (begun, answered), at in zip(done[operation]["changes"], seen, strict=True)
        ]

    # -- how it grows

    def fill(self, user: str, messages: int) -> float:
        """Give ``user`` as many messages, the same on both nodes; return the seconds."""
        started = time.monotonic()
        self._fill([user], messages, SMALL_SIZE)
        source = self.command("mail-a", "tar", "-C", STORE, "-c", user.partition("@")[0])
        target = self.command("mail-b", "sh", "-ec",
                              f"install -d -o vmail -g vmail {STORE};"
                              f" tar -C {STORE} -x")  # fmt: skip
        with subprocess.Popen(source, stdout=subprocess.PIPE) as tar:
            subprocess.run(target, stdin=tar.stdout, check=True)
        return time.monotonic() - started

    def fill_many(self, users: Sequence[str], messages: int) -> float:
        """Give each user as many large messages on the primary alone; return the megabytes."""
        self._fill(users, messages, COPIED_SIZE)
        return len(users) * messages * COPIED_SIZE / 1e6

    def _fill(self, users: Sequence[str], messages: int, size: int) -> None:
        # As Dovecot's user, whose files they shall be.
        self.run("mail-a", "install", "-d", "-o", "vmail", "-g", "vmail", STORE)
        self.run("mail-a", "python3", "/run/bench/fill.py", FILL, str(messages), str(size), *users)

    def seed(self, users: Sequence[str]) -> float:
        """Take everything from the shadow and have the agent build it; return the seconds."""
        self.run("mail-b", "sh", "-ec", f"rm -rf {STORE}; sync")
        started = time.monotonic()
        self.run("mail-a", "umbractl", "seed", "mail-b")
        took = time.monotonic() - started
        self.settle()
        return took

    def backup(self, users: Sequence[str]) -> float:
        """Copy the same by hand to a Dovecot without an agent; return the seconds."""
        self.run("mail-b", "sh", "-ec", f"rm -rf {ALONE_STORE}/bench.example.org; sync")
        command = (
            f"xargs -P {2 * int(self.run('mail-a', 'nproc'))} -I USER doveadm -c {FILL} backup"
            f" -u USER tcp:{self.overlay}:{ALONE_DOVEADM}"
        )
        started = time.monotonic()
        self.run("mail-a", "sh", "-ec", command, input="\n".join(users))
        return time.monotonic() - started

    def many(self, users: Sequence[str]) -> Many:
        """What these users cost both agents, and how soon the shadow has what it missed."""
        self.run("mail-b", "systemctl", "restart", "umbra-agent")
        limit = 300 + len(users) / SLOWEST
        compared = self.restart_agent(limit)
        before = {host: self._agent_seconds(host) for host in MAIL}
        time.sleep(IDLE)
        idle = {host: (self._agent_seconds(host) - before[host]) / IDLE * 100 for host in MAIL}
        resident = {host: int(self.run(host, "sh", "-c", _RESIDENT)) / 1024 for host in MAIL}
        self.run("mail-b", "systemctl", "stop", "umbra-agent")
        changed = list(users[:CHANGED])
        self.load("mail-a", lmtp=LMTP, users=changed, clients=16, operations=["lmtp"], tour=True,
                  seconds=200.0)  # fmt: skip
        self.run("mail-b", "systemctl", "start", "umbra-agent")
        self.settle(limit)
        journal = self.run("mail-a", "journalctl", "-q", "-u", "umbra-agent", "-n", "50")
        told = re.findall(r"has all changes; (\d+) users in ([\d.]+) s", journal)[-1]
        return Many(len(users), resident, idle, compared, int(told[0]), float(told[1]))

    def _agent_seconds(self, host: str) -> float:
        return float(self.run(host, "sh", "-c", _CPU_SECONDS))
