"""The lab's hosts for the transport's benchmark: what is set up, run and asked on them.

The primary's own Postfix gets one more smtpd for each variant, on ports from 2601; they differ only
in what looks at a message before it is accepted. Accepted messages go to Postfix's ``discard``: the
queue is part of what is measured, delivery to mailboxes is not. The shadow's Postfix does not run
while it is a shadow, so the proxy's target is an instance of its own.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from tests.bench.place import Place, SceneError

HERE = Path(__file__).resolve().parent
ADDRESS = "192.0.2.10"
PACKAGES = ("postfix", "python3", "python3-uvloop", "wireguard-go", "dovecot-core")
PLAIN, UMBRA, NOTHING, PROXY, TARGET = 2601, 2602, 2603, 2604, 2605
HOSTS = ("mail-a", "mail-b")
LIMIT = 180  # seconds that one burst may take
STATS = 1.5  # seconds after which the agent's counts are new

_SMTPD = """
{port} inet n - {chroot} - 200 smtpd
  -o syslog_name=postfix/bench
  -o mynetworks=0.0.0.0/0
  -o smtpd_client_restrictions=
  -o smtpd_helo_restrictions=
  -o smtpd_sender_restrictions=
  -o smtpd_relay_restrictions=permit_mynetworks,reject
  -o smtpd_recipient_restrictions=permit_mynetworks,reject
  -o smtpd_reject_unlisted_recipient=no
  -o smtpd_client_connection_count_limit=0
  -o smtpd_tls_security_level=none
  -o smtpd_authorized_xforward_hosts=0.0.0.0/0
  -o content_filter=discard:bench
"""
_DISCARD = "\ndiscard unix - - {chroot} - - discard\n"

# Acceptance is measured, not how Postfix slows it down when delivery lags.
_MAIN = """
in_flow_delay = 0
bench_nothing = { unix:umbra-bench/milter.sock, default_action=tempfail, protocol=6 }
"""

_TARGET_MAIN = """
compatibility_level = 3.10
queue_directory = /var/spool/postfix-bench
data_directory = /var/lib/postfix-bench
myhostname = bench.example.org
mydestination =
alias_maps =
alias_database =
local_recipient_maps =
inet_interfaces = all
inet_protocols = ipv4
in_flow_delay = 0
enable_long_queue_ids = yes
"""

_TARGET_MASTER = """
cleanup   unix  n       -       n       -       0       cleanup
qmgr      unix  n       -       n       300     1       qmgr
tlsmgr    unix  -       -       n       1000?   1       tlsmgr
rewrite   unix  -       -       n       -       -       trivial-rewrite
bounce    unix  -       -       n       -       0       bounce
defer     unix  -       -       n       -       0       bounce
trace     unix  -       -       n       -       0       bounce
flush     unix  n       -       n       1000?   0       flush
proxymap  unix  -       -       n       -       -       proxymap
proxywrite unix -       -       n       -       1       proxymap
error     unix  -       -       n       -       -       error
retry     unix  -       -       n       -       -       error
anvil     unix  -       -       n       -       1       anvil
postlog   unix-dgram n  -       n       -       1       postlogd
"""

_WAIT = """
import socket, sys, time
address, ports = sys.argv[1], sys.argv[2:]
until = time.monotonic() + 20
for port in ports:
    while True:
        try:
            with socket.create_connection((address, int(port)), 2) as peer:
                if peer.recv(3) == b"220":
                    break
        except OSError:
            pass
        if time.monotonic() > until:
            sys.exit(f"nobody greets at {address}:{port}")
        time.sleep(0.1)
"""

_ROUND_TRIP = """
import socket, statistics, sys, time
took = []
for _ in range(21):
    begun = time.perf_counter()
    socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).close()
    took.append(time.perf_counter() - begun)
print(statistics.median(took) * 1000)
"""

_ACCEPTED = """
import sys, urllib.request
text = urllib.request.urlopen(f"http://{sys.argv[1]}:8687/metrics", timeout=10).read().decode()
rows = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
print(float(rows.get('umbra_messages_accepted_total{copy="shadow"}', 0)))
"""

_PROCESS = "/proc/$(systemctl show -P MainPID umbra-agent)"
_RESIDENT = f"awk '$1 == \"{{what}}:\" {{{{ print $2 }}}}' {_PROCESS}/status"
_FORGET_PEAK = f"echo 5 > {_PROCESS}/clear_refs"


class Scene(Place):
    """The hosts of one lab."""

    def __init__(self, lab: str) -> None:
        super().__init__(lab)
        self._overlay: dict[str, str] = {}

    # -- setting up

    def prepare(self) -> None:
        """Set everything up. May be repeated, also after a run that was cut off."""
        for host in HOSTS:
            links = json.loads(self.run(host, "ip", "-j", "-4", "address", "show", "umbra0"))
            self._overlay[host] = links[0]["addr_info"][0]["local"]
        status = json.loads(self.run("mail-a", "umbractl", "status", "--json"))
        if not status.get("protected"):
            raise SceneError(f"the group is not protected: {status.get('reasons')}")
        self._prepare_client()
        self._prepare_target()
        self._prepare_primary()
        for host, address, ports in (
            ("client", ADDRESS, (PLAIN, UMBRA, NOTHING, PROXY)),
            ("mail-a", self._overlay["mail-b"], (TARGET,)),
        ):
            self.run(host, "python3", "-c", _WAIT, address, *map(str, ports))

    def _prepare_client(self) -> None:
        self.run(
            "client",
            "sh",
            "-ec",
            "command -v smtp-source >/dev/null || DEBIAN_FRONTEND=noninteractive apt-get -qq -y"
            " install postfix >/dev/null; systemctl disable --quiet --now postfix",
        )
        self.write("client", "/root/prober.py", (HERE / "prober.py").read_text())

    def _prepare_target(self) -> None:
        self.run(
            "mail-b",
            "sh",
            "-ec",
            "mkdir -p /etc/postfix-bench /var/spool/postfix-bench /var/lib/postfix-bench;"
            " chown postfix: /var/lib/postfix-bench; touch /etc/postfix-bench/dynamicmaps.cf",
        )
        service = _SMTPD.format(port=TARGET, chroot="n")
        master = service + _TARGET_MASTER + _DISCARD.format(chroot="n")
        self.write("mail-b", "/etc/postfix-bench/main.cf", _TARGET_MAIN)
        self.write("mail-b", "/etc/postfix-bench/master.cf", master)
        self.run(
            "mail-b",
            "sh",
            "-ec",
            "postfix -c /etc/postfix-bench stop 2>/dev/null || :;"
            " postfix -c /etc/postfix-bench start",
        )

    def _prepare_primary(self) -> None:
        self._undo_primary()
        services = _DISCARD.format(chroot="y")
        for port, option in (
            (PLAIN, "smtpd_milters="),
            (UMBRA, "smtpd_milters=$smtpd_milters"),
            (NOTHING, "smtpd_milters=$bench_nothing"),
            (PROXY, f"smtpd_proxy_filter={self._overlay['mail-b']}:{TARGET}"),
        ):
            services += _SMTPD.format(port=port, chroot="y")
            if port == PROXY:
                services += "  -o smtpd_milters=\n"
            if port != UMBRA:
                services += f"  -o {option}\n"
        self.run(
            "mail-a",
            "sh",
            "-ec",
            "cd /etc/postfix; cp -p main.cf main.cf.bench; cp -p master.cf master.cf.bench;"
            " install -d -o umbra -g postfix -m 2750 /var/spool/postfix/umbra-bench",
        )
        self.run("mail-a", "sh", "-c", "cat >> /etc/postfix/main.cf", input=_MAIN)
        self.run("mail-a", "sh", "-c", "cat >> /etc/postfix/master.cf", input=services)
        self.write("mail-a", "/run/umbra-hold.py", (HERE / "hold.py").read_text())
        self.write("mail-a", "/run/umbra-bench.py", (HERE / "nothing.py").read_text())
        self.run(
            "mail-a",
            *("systemd-run", "--quiet", "--unit=umbra-bench", "--uid=umbra", "--gid=postfix"),
            *("--setenv=PYTHONPATH=/usr/lib/umbra", "python3", "/run/umbra-bench.py"),
            "/var/spool/postfix/umbra-bench/milter.sock",
        )
        self.run("mail-a", "postfix", "reload")

    def _undo_primary(self) -> None:
        self.run(
            "mail-a",
            "sh",
            "-ec",
            "systemctl stop umbra-bench 2>/dev/null || :; cd /etc/postfix;"
            " [ ! -e main.cf.bench ] || mv main.cf.bench main.cf;"
            " [ ! -e master.cf.bench ] || mv master.cf.bench master.cf; postfix reload 2>&1",
        )

    def undo(self) -> None:
        """Leave the mail hosts as the roles made them, without a delay between them."""
        self._delay(0)
        self._undo_primary()
        self.run(
            "mail-b", "sh", "-c", "postfix -c /etc/postfix-bench stop; rm -r /etc/postfix-bench"
        )

    # -- measuring

    def round_trip(self, ms: float) -> float:
        """Set the round trip between the mail hosts; return what a TCP connection takes, in ms."""
        self._delay(ms)
        return float(
            self.run("mail-a", "python3", "-c", _ROUND_TRIP, self._overlay["mail-b"], str(TARGET))
        )

    def _delay(self, ms: float) -> None:
        self.lab("wan", "set", "--delay", str(ms / 2), "--between", "alpha", "beta", quiet=True)

    def burst(self, port: int, connections: int, size: int, messages: int) -> float:
        """Return the seconds in which ``messages`` were accepted; one that is not is an error."""
        source = (
            f"timeout {LIMIT} smtp-source -4 -s {connections} -l {size} -m {messages}"
            f" -f bench@example.net -t bench@example.org inet:{ADDRESS}:{port}"
        )
        before = self.shadowed() if port == UMBRA else 0
        took = self.run(
            "client",
            "sh",
            "-ec",
            f"a=$(date +%s%N); {source} >&2; b=$(date +%s%N); echo $((b - a))",
        )
        if port == UMBRA and (grown := self.shadowed() - before) < messages:
            raise SceneError(f"only {grown:g} of {messages} messages have a shadow")
        return int(took) / 1e9

    def latencies(
        self, port: int, connections: int, size: int, messages: int, per_second: float
    ) -> list[float]:
        """Return how long each message took at this pace, in seconds."""
        numbers = map(str, (port, connections, messages, per_second, size))
        values: list[float] = json.loads(
            self.run("client", "python3", "/root/prober.py", ADDRESS, *numbers)
        )
        return values

    def shadowed(self) -> float:
        """How many messages the primary has accepted with a shadow's copy since it started."""
        return float(self.run("mail-a", "python3", "-c", _ACCEPTED, self._overlay["mail-a"]))

    def resident(self, what: str = "VmRSS") -> dict[str, int]:
        """Resident memory of each agent in KiB; ``VmHWM`` is the most since `forget_peak`."""
        command = _RESIDENT.format(what=what)
        return {host: int(self.run(host, "sh", "-c", command)) for host in HOSTS}

    def forget_peak(self) -> None:
        """Let the peaks begin at what is resident now."""
        for host in HOSTS:
            self.run(host, "sh", "-c", _FORGET_PEAK)

    def hold(self, what: str, begin: int, end: int) -> None:
        """Have the shadow ``store`` or ``discard`` the made up messages of these numbers."""
        epoch = json.loads(self.run("mail-a", "umbractl", "status", "--json"))["epoch"]
        self.run(
            "mail-a",
            *("systemd-run", "--quiet", "--wait", "--pipe", "--uid=umbra", "--gid=umbra"),
            *("--setenv=PYTHONPATH=/usr/lib/umbra", "python3", "/run/umbra-hold.py"),
            *map(str, (what, begin, end, epoch)),
        )

    def held(self) -> int:
        """How many messages the shadow holds for the primary, by its own count."""
        time.sleep(STATS)
        queue = json.loads(self.run("mail-b", "umbractl", "queue", "--json"))
        return sum(row["messages"] for row in queue["messages"] if row["state"] == "held")
