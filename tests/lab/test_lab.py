"""The lab itself, for real: everything other tests lean on. Needs root; about a minute."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

LAB = str(Path(__file__).with_name("lab"))
NAME = "selftest"
OTHER = "selftest-2"
pytestmark = [
    pytest.mark.timeout(600),  # the first run builds the image
    pytest.mark.skipif(os.geteuid() != 0, reason="the lab needs root"),
]


def call(
    *arguments: str, name: str = NAME, status: int = 0, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, LAB, "--name", name, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == status, f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def on(host: str, *command: str, status: int = 0, name: str = NAME) -> str:
    return call("exec", host, "--", *command, status=status, name=name).stdout


def round_trips(source: str, target: str, *options: str) -> list[float]:
    """Milliseconds, shortest first."""
    output = on(source, "ping", "-c", "25", "-i", "0.02", "-W", "1", *options, target)
    return sorted(
        float(line.split("time=")[1].split()[0]) for line in output.splitlines() if "time=" in line
    )


def reaches(source: str, target: str, name: str = NAME) -> bool:
    command = [sys.executable, LAB, "--name", name, "exec", source, "--"]
    command += ["ping", "-q", "-c", "2", "-i", "0.1", "-W", "0.5", target]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def own_namespace() -> list[str]:
    """Every link, address and route of the machine's own network namespace."""
    commands = [["ip", "-o", "link"], ["ip", "route", "show", "table", "all"]]
    outputs = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for command in (*commands, ["ip", "-6", "route", "show", "table", "all"])
    ]
    # A route learned by router advertisement counts its seconds.
    return sorted(re.sub(r" expires \S+", "", "".join(outputs)).splitlines())


@pytest.fixture(scope="module")
def machine() -> list[str]:
    return own_namespace()


@pytest.fixture(scope="module", autouse=True)
def lab(machine: list[str]) -> Iterator[None]:
    call("down")  # what an interrupted run has left
    call("up", "--disks", "witness", timeout=590)
    yield
    call("down")
    call("check-clean")


def test_up_again_changes_nothing() -> None:
    init_started = ["cut", "-d", " ", "-f22", "/proc/1/stat"]
    before = on("mail-a", *init_started)
    started = time.monotonic()
    call("up")
    assert time.monotonic() - started < 20
    assert on("mail-a", *init_started) == before


@pytest.mark.parametrize("host", ["mail-a", "mail-b", "witness", "client"])
def test_a_host_is_a_whole_debian(host: str) -> None:
    assert on(host, "systemctl", "is-system-running") == "running\n"
    assert on(host, "hostname", "-f") == f"{host}.example.org\n"
    assert "trixie" in on(host, "cat", "/etc/os-release")


def test_ssh_by_names_and_addresses_with_known_keys() -> None:
    for target in ("mail-a", "mail-a.example.org", "192.0.2.10", "2001:db8:a::10"):
        done = call("control", "--", "ssh", target, "hostname; echo $LANG")
        assert done.stdout == "mail-a\nC.UTF-8\n"


def test_the_controller_finds_the_projects_ansible() -> None:
    tools = Path(LAB).parents[2] / ".venv" / "bin"
    assert call("control", "--", "sh", "-c", "echo $PATH").stdout.startswith(f"{tools}:")


def test_exit_statuses_are_passed() -> None:
    on("client", "sh", "-c", "exit 7", status=7)
    call("control", "--", "ssh", "client", "exit 8", status=8)


def test_an_unknown_name_is_refused_at_once() -> None:
    started = time.monotonic()
    on("mail-a", "getent", "hosts", "unknown.example.net", status=2)
    assert time.monotonic() - started < 8


def test_there_is_no_way_out() -> None:
    on("mail-a", "ping", "-c", "1", "-W", "1", "10.255.255.1", status=1)


def test_a_host_cannot_set_the_clock() -> None:
    for prefix in ([], ["systemd-run", "--quiet", "--wait", "--pipe"]):
        bounding = on("mail-a", *prefix, "grep", "CapBnd", "/proc/self/status").split()[1]
        assert not int(bounding, 16) >> 25 & 1  # CAP_SYS_TIME
        assert int(bounding, 16) >> 12 & 1  # CAP_NET_ADMIN


def test_packages_install_with_no_way_out() -> None:
    on("client", "apt-get", "update", "-qq")
    on("client", "apt-get", "install", "-y", "-qq", "netcat-openbsd")
    assert "OpenBSD" in on("client", "sh", "-c", "nc -h 2>&1")


@pytest.mark.parametrize("version", ["-4", "-6"])
def test_the_wan_delays_every_pair_and_only_the_wan(version: str) -> None:
    # The median: a busy machine makes some packets late, never early.
    for source, target in (("client", "mail-a"), ("mail-a", "mail-b"), ("witness", "mail-b")):
        times = round_trips(source, target, version)
        assert times[0] >= 4.0
        assert times[len(times) // 2] < 10
    assert round_trips("client", "203.0.113.129")[12] < 2


def test_delay_and_loss_change_while_it_runs() -> None:
    call("wan", "set", "--delay", "20", "--between", "alpha", "beta")
    try:
        assert round_trips("mail-a", "mail-b")[0] >= 40
        assert round_trips("mail-a", "witness")[0] < 20
        call("wan", "set", "--loss", "100", "--between", "mail-a", "mail-b")
        assert not reaches("mail-a", "mail-b")
    finally:
        call("wan", "set", "--delay", "2", "--loss", "0", "--rate", "0")
    assert reaches("mail-a", "mail-b")


def test_a_rate_bounds_the_throughput() -> None:
    size = 60_000
    on("mail-b", "sh", "-c", f"head -c {size} /dev/urandom >/root/blob")
    copy = ["control", "--", "scp", "-q", "mail-b:/root/blob", "/dev/null"]
    call("wan", "set", "--rate", "256")
    try:
        started = time.monotonic()
        call(*copy)
        assert time.monotonic() - started > size * 8 / 256_000
    finally:
        call("wan", "set", "--rate", "0")


def test_a_cut_is_between_two_sites_only_and_heals() -> None:
    call("wan", "cut", "alpha", "beta")
    try:
        assert not reaches("mail-a", "mail-b")
        assert not reaches("mail-a", "2001:db8:b::10")
        assert reaches("mail-a", "203.0.113.71")  # the LAN is no part of the WAN
        assert reaches("mail-a", "2001:db8:e::8")
        for pair in (("mail-a", "witness"), ("mail-b", "witness"), ("client", "mail-a")):
            assert reaches(*pair)
    finally:
        call("wan", "heal", "mail-a", "mail-b")
    assert reaches("mail-a", "mail-b")


def test_a_one_way_cut_stops_one_direction() -> None:
    watch = 'timeout 2 python3 -c "{}"'
    receive = "import socket; s=socket.socket(2,2); s.bind(('',9)); print(s.recv(9).decode())"
    send = "import socket; socket.socket(2,2).sendto(b'through', ('{}', 9))"

    def through(source: str, target: str, address: str) -> bool:
        command = [sys.executable, LAB, "--name", NAME, "exec", target, "--", "sh", "-c"]
        command += [watch.format(receive)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as receiver:
            time.sleep(1)
            on(source, "python3", "-c", send.format(address))
            return "through" in receiver.communicate()[0]

    call("wan", "cut", "alpha", "beta", "--one-way")
    try:
        assert not through("mail-a", "mail-b", "198.51.100.10")
        assert through("mail-b", "mail-a", "192.0.2.10")
    finally:
        call("wan", "heal", "alpha", "beta")


def test_power_off_kills_at_once_and_files_stay() -> None:
    on("witness", "sh", "-c", "echo kept >/root/kept; sync; nft add table ip lost")
    call("power-off", "witness")
    assert "witness  gamma    203.0.113.10    2001:db8:c::10     off" in call("status").stdout
    assert not reaches("client", "witness")
    assert "is off" in call("exec", "witness", "--", "true", status=1).stderr
    call("power-on", "witness")
    assert on("witness", "cat", "/root/kept") == "kept\n"
    assert on("witness", "nft", "list", "tables") == ""  # what was in the kernel is gone
    assert call("control", "--", "ssh", "witness", "hostname").stdout == "witness\n"


def test_a_disk_of_its_own_forgets_what_was_not_synced_stalls_and_fails() -> None:
    assert "without a disk" in call("up", "--disks", "mail-a", status=1).stderr
    on("witness", "sh", "-c", "echo kept >/root/synced; sync -f /root; echo lost >/root/unsynced")
    call("power-off", "witness")
    call("power-on", "witness")
    assert on("witness", "sh", "-c", "cat /root/synced /root/unsynced; true") == "kept\n"
    writer = ["systemctl", "show", "--property=SubState", "--value", "writer"]
    call("disk", "stall", "witness")
    try:
        on("witness", "systemd-run", "--quiet", "--unit=writer", "touch", "/root/late")
        time.sleep(0.5)
        assert on("witness", *writer) == "running\n"
    finally:
        call("disk", "release", "witness")
    time.sleep(0.5)
    assert on("witness", *writer) == "dead\n"
    assert "late" in on("witness", "ls", "/root")
    call("disk", "fail", "witness")
    assert "Input/output" in call("exec", "witness", "--", "touch", "/root/x", status=1).stderr
    call("power-off", "witness")
    assert "is off" in call("disk", "stall", "witness", status=1).stderr
    call("power-on", "witness")
    on("witness", "touch", "/root/x")


def test_a_frozen_host_stands_still_and_goes_on() -> None:
    tick = "for i in $(seq 600); do date +%s%N >/root/tick; sleep 0.05; done"
    on("mail-b", "systemd-run", "--quiet", "--unit=tick", "sh", "-c", tick)
    file = Path(f"/var/lib/umbra-lab/{NAME}/hosts/mail-b/upper/root/tick")
    time.sleep(0.5)
    call("freeze", "mail-b")
    before = file.read_text()
    time.sleep(0.5)
    assert file.read_text() == before
    assert "is frozen" in call("exec", "mail-b", "--", "true", status=1).stderr
    call("thaw", "mail-b")
    time.sleep(0.5)
    assert file.read_text() != before
    on("mail-b", "systemctl", "stop", "tick")


def test_the_relay_is_restarted_with_its_settings() -> None:
    call("wan", "set", "--delay", "15")
    (pid,) = (
        entry.name
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and f"umbra_lab.relay\0{NAME}\0" in read(entry / "cmdline")
    )
    os.kill(int(pid), signal.SIGKILL)
    assert not reaches("client", "mail-a")
    call("up")
    try:
        assert round_trips("client", "mail-a")[0] >= 30
    finally:
        call("wan", "set", "--delay", "2")


def read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def test_two_labs_side_by_side_and_interruptions() -> None:
    """`up` killed at several instants is mended by the next; the first lab is never touched."""
    try:
        for seconds in (0.2, 0.45, 0.9, 2.0):
            process = subprocess.Popen(
                [sys.executable, LAB, "--name", OTHER, "up", "--hosts", "mail-a,client"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            time.sleep(seconds)
            process.kill()
            process.wait()
        call("up", "--hosts", "mail-a,client", name=OTHER)
        on("mail-a", "sh", "-c", "echo other >/root/which", name=OTHER)
        on("mail-a", "test", "-e", "/root/which", status=1)
        call("power-off", "mail-a", name=OTHER)
        assert not reaches("client", "mail-a", name=OTHER)
        assert reaches("client", "mail-a")
        process = subprocess.Popen([sys.executable, LAB, "--name", OTHER, "down"])
        time.sleep(0.25)
        process.kill()
        process.wait()
    finally:
        call("down", name=OTHER)
    assert call("check-clean", name=OTHER).stdout == ""
    assert call("control", "--", "ssh", "mail-a", "hostname").stdout == "mail-a\n"
    call("check-clean", status=1)


def test_nothing_is_made_in_the_machines_own_namespace(machine: list[str]) -> None:
    assert own_namespace() == machine


def test_mistakes_are_one_sentence() -> None:
    for arguments in (
        ["exec", "mail-c", "--", "true"],
        ["wan", "cut", "alpha", "mail-a"],
        ["wan", "set"],
    ):
        error = call(*arguments, status=1).stderr
        assert error.startswith("lab: ")
        assert len(error.splitlines()) == 1
    nobody = ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, LAB, "up"]
    done = subprocess.run(nobody, capture_output=True, text=True, check=False, cwd="/")
    if "Permission denied" not in done.stderr:  # a work tree that nobody may read cannot show it
        assert done.returncode == 2
        assert done.stderr == "lab: umbra.mail's lab needs root: run it with sudo.\n"
