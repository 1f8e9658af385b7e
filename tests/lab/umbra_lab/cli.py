"""The command line of the lab."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from . import cgroups, disk, hosts, image, lifecycle, prerequisites, wan
from .links import PAIRS
from .paths import Lab, locked
from .plan import ALL_HOSTS, EXTRA_HOSTS, HOSTS, SITES, check_lab_name, host, names, site_of
from .shell import LabError, say

Command = Callable[[Lab, argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a failure is one sentence on stderr."""
    options = _parser().parse_args(arguments)
    try:
        lab = Lab(check_lab_name(options.name))
        if options.function is not _prerequisites:
            prerequisites.check()
        status: int = options.function(lab, options)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return error.status
    except OSError as error:  # a full disk, a file system that is read-only, ...
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lab: interrupted: `lab up` goes on, `lab down` removes all.", file=sys.stderr)
        return 130
    return status


def _locked(lab: Lab) -> AbstractContextManager[None]:
    return locked(lab.lock, f"Waiting for another command that changes lab {lab.name}.")


def _prerequisites(lab: Lab, options: argparse.Namespace) -> int:
    prerequisites.install()
    return 0


def _image(lab: Lab, options: argparse.Namespace) -> int:
    for name in image.ensure([options.release], rebuild=options.rebuild).values():
        say(f"The image {name} is ready.")
    return 0


def _up(lab: Lab, options: argparse.Namespace) -> int:
    members = [host(name) for name in options.hosts.split(",")] if options.hosts else list(HOSTS)
    disks = [host(name) for name in options.disks.split(",")] if options.disks else []
    for member in disks:
        if lab.host_dir(member).exists() and not disk.exists(lab, member):
            raise LabError(f"{member.name} was made without a disk of its own: `lab down` first.")
    with _locked(lab):
        lifecycle.up(lab, members, _changes(options), disks)
    say(f"Lab {lab.name} is up: {', '.join(member.name for member in members)}.")
    return 0


def _down(lab: Lab, options: argparse.Namespace) -> int:
    for one in lifecycle.all_labs() if options.all else [lab]:
        with _locked(one):
            lifecycle.down(one)
            one.lock.unlink(missing_ok=True)
        say(f"Lab {one.name} is removed.")
    return 0


def _check_clean(lab: Lab, options: argparse.Namespace) -> int:
    labs = lifecycle.all_labs() if options.all else [lab]
    left = [line for one in labs for line in lifecycle.leftovers(one)]
    cgroups.release_root()
    for line in left:
        print(line)
    if not left:
        say("Nothing is left.")
    return 1 if left else 0


def _exec(lab: Lab, options: argparse.Namespace) -> int:
    command = hosts.enter_command(lab, host(options.host), options.command)
    os.execvp(command[0], command)


def _shell(lab: Lab, options: argparse.Namespace) -> int:
    command = hosts.control_command(lab, ["ssh", "-t", host(options.host).name])
    os.execvp(command[0], command)


def _control(lab: Lab, options: argparse.Namespace) -> int:
    command = hosts.control_command(lab, options.command)
    os.execvp(command[0], command)


def _status(lab: Lab, options: argparse.Namespace) -> int:
    print(f"{'HOST':<9}{'SITE':<9}{'IPV4':<16}{'IPV6':<19}STATE")
    made = [m for m in EXTRA_HOSTS if lab.host_dir(m).exists()]
    for m in (*HOSTS, *made):
        print(f"{m.name:<9}{m.site.name:<9}{m.v4!s:<16}{m.v6!s:<19}{hosts.state(lab, m)}")
    print(f"WAN relay: {'running' if wan.is_running(lab) else 'off'}")
    return 0


def _list(lab: Lab, options: argparse.Namespace) -> int:
    for one in lifecycle.all_labs():
        on = [member.name for member in ALL_HOSTS if hosts.is_on(one, member)]
        print(f"{one.name:<21}{', '.join(on) or 'no host is on'}")
    return 0


def _logs(lab: Lab, options: argparse.Namespace) -> int:
    path = lab.host_dir(host(options.host)) / "console.log"
    if not path.exists():
        raise LabError(f"{options.host} has never been booted in lab {lab.name!r}.")
    print(path.read_text(errors="replace"), end="")
    return 0


def _power_off(lab: Lab, options: argparse.Namespace) -> int:
    with _locked(lab):
        hosts.power_off(lab, host(options.host))
    return 0


def _power_on(lab: Lab, options: argparse.Namespace) -> int:
    with _locked(lab):
        lifecycle.power_on(lab, host(options.host))
    return 0


def _freeze(lab: Lab, options: argparse.Namespace) -> int:
    member = host(options.host)
    if not hosts.is_on(lab, member):
        raise LabError(f"{member.name} is off in lab {lab.name!r}.")
    cgroups.set_frozen(hosts.cgroup(lab, member), options.frozen)
    return 0


def _disk(lab: Lab, options: argparse.Namespace) -> int:
    options.action(lab, host(options.host))
    return 0


def _wan_cut(lab: Lab, options: argparse.Namespace) -> int:
    a, b = site_of(options.a).name, site_of(options.b).name
    if a == b:
        raise LabError(f"{options.a} and {options.b} are at the same site: no WAN is between them.")
    pairs = [(a, b)] if options.one_way else [(a, b), (b, a)]
    wan.change(lab, pairs, cut=options.cut)
    return 0


def _wan_set(lab: Lab, options: argparse.Namespace) -> int:
    if not (changes := _changes(options)):
        raise LabError("Name what to set: --delay, --jitter, --loss or --rate.")
    pairs = list(PAIRS)
    if options.between:
        a, b = (site_of(name).name for name in options.between)
        pairs = [pair for pair in PAIRS if set(pair) == {a, b}]
    wan.change(lab, pairs, **changes)
    return 0


def _wan_show(lab: Lab, options: argparse.Namespace) -> int:
    table = wan.settings(lab)
    try:
        counters = wan.apply(lab)
    except OSError as error:
        raise LabError("The WAN's relay does not answer: run `lab up`.") from error
    print("FROM     TO           DELAY   JITTER    LOSS         RATE  STATE    PACKETS  DROPPED")
    for (a, b), s in table.items():
        count = counters[f"{a}>{b}"]
        rate = f"{s.rate_kbit:g} kbit/s" if s.rate_kbit else "-"
        print(
            f"{a:<9}{b:<9}{s.delay_ms:>6g} ms{s.jitter_ms:>6g} ms{s.loss_percent:>6g} %{rate:>13}  "
            f"{'cut' if s.cut else 'open':<6}{count['forwarded']:>10}{count['dropped']:>9}"
        )
    return 0


def _ssh_config(lab: Lab, options: argparse.Namespace) -> int:
    print(lab.ssh_config)
    return 0


def _inventory_vars(lab: Lab, options: argparse.Namespace) -> int:
    """The connection variables of each host; only `control` reaches the addresses."""
    print(
        json.dumps(
            {
                member.name: {
                    "ansible_host": str(member.v4),
                    "ansible_user": "root",
                    "ansible_ssh_common_args": f"-F {lab.ssh_config}",
                    "umbra_site": member.site.name,
                }
                for member in HOSTS
            },
            indent=2,
        )
    )
    return 0


def _changes(options: argparse.Namespace) -> dict[str, float]:
    wanted = {
        "delay_ms": options.delay,
        "jitter_ms": options.jitter,
        "loss_percent": options.loss,
        "rate_kbit": options.rate,
    }
    return {key: value for key, value in wanted.items() if value is not None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lab", description=__doc__)
    parser.add_argument(
        "--name", default=os.environ.get("UMBRA_LAB_NAME", "demo"), help="which lab; default: demo"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Command, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(function=function)
        return command

    def add_host(name: str, function: Command, help: str) -> argparse.ArgumentParser:
        command = add(name, function, help)
        command.add_argument("host", metavar="HOST", help=names(ALL_HOSTS))
        return command

    add("prerequisites", _prerequisites, "check the machine, install missing Debian packages")
    command = add("image", _image, "build the hosts' image unless it is cached")
    command.add_argument("--rebuild", action="store_true", help="anew, with today's packages")
    command.add_argument("--release", choices=image.PACKAGES, default="trixie")
    command = add("up", _up, "make the lab, or what is missing of it")
    command.add_argument(
        "--hosts", metavar="NAME,...", help=f"only these hosts of {names(ALL_HOSTS)}"
    )
    command.add_argument(
        "--disks", metavar="NAME,...", help="new hosts with a file system of their own: see `disk`"
    )
    command.add_argument("--wan-delay", dest="delay", type=float, metavar="MS", help="one way: 2")
    command.add_argument("--wan-loss", dest="loss", type=float, metavar="PERCENT", help="default 0")
    command.set_defaults(rate=None, jitter=None)
    command = add("down", _down, "remove the lab and everything it made")
    command.add_argument("--all", action="store_true", help="every lab of this machine")
    command = add("check-clean", _check_clean, "list what is left of the lab: status 1 if any")
    command.add_argument("--all", action="store_true", help="every lab of this machine")
    command = add_host("exec", _exec, "run a command in a host: lab exec HOST -- COMMAND...")
    command.add_argument("command", nargs="+", metavar="COMMAND")
    command = add("control", _control, "run a command on the controller: lab control -- ssh HOST")
    command.add_argument("command", nargs="+", metavar="COMMAND")
    add_host("shell", _shell, "log in to a host")
    add("status", _status, "a table of the lab's hosts")
    add("list", _list, "the labs of this machine")
    add_host("logs", _logs, "print a host's console log")
    add_host("power-off", _power_off, "kill all of a host's processes at once; the files stay")
    add_host("power-on", _power_on, "boot a host that is off")
    command = add_host("freeze", _freeze, "stop all of a host's processes where they stand")
    command.set_defaults(frozen=True)
    command = add_host("thaw", _freeze, "let a frozen host go on")
    command.set_defaults(frozen=False)
    add("ssh-config", _ssh_config, "print the path of the lab's SSH configuration")
    add("inventory-vars", _inventory_vars, "print connection variables for Ansible as JSON")

    actions = commands.add_parser("disk", help="break a host's own disk").add_subparsers(
        required=True, metavar="ACTION"
    )
    for name, act, help in (
        ("stall", disk.stall, "whoever writes waits"),
        ("release", disk.release, "let a stalled disk go on"),
        ("fail", disk.fail, "EIO for everything, until the host is powered off and on"),
    ):
        action = actions.add_parser(name, help=help)
        action.add_argument("host", metavar="HOST", help=names(ALL_HOSTS))
        action.set_defaults(function=_disk, action=act)

    actions = commands.add_parser("wan", help="look at and change the WAN").add_subparsers(
        required=True, metavar="ACTION"
    )
    for name, cut in (("cut", True), ("heal", False)):
        action = actions.add_parser(name, help=f"{name} the way between two sites (or hosts)")
        action.add_argument("a", metavar="A", help=", ".join(site.name for site in SITES))
        action.add_argument("b", metavar="B")
        action.add_argument("--one-way", action="store_true", help="only packets from A to B")
        action.set_defaults(function=_wan_cut, cut=cut)
    action = actions.add_parser("set", help="change delay, jitter, loss or rate while it runs")
    action.add_argument("--delay", type=float, metavar="MS", help="one way")
    action.add_argument("--jitter", type=float, metavar="MS", help="up to so much later")
    action.add_argument("--loss", type=float, metavar="PERCENT")
    action.add_argument("--rate", type=float, metavar="KBIT", help="0: no limit")
    action.add_argument("--between", nargs=2, metavar=("A", "B"), help="only this pair")
    action.set_defaults(function=_wan_set)
    actions.add_parser("show", help="settings and counters").set_defaults(function=_wan_show)
    return parser
