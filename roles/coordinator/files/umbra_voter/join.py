"""``umbra-coordinator-join``: makes this host's voter one of a cluster that runs already.

For a voter whose data are lost, or that takes the place of another host. The member that it
replaces is taken off the list, this one is added as a learner, which has no vote, gets all data
from the others, and is promoted when it has them. The others serve throughout: they are a majority
before, between and after. Each step looks at what is there, so whoever dies half-way is run again.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CTL = "umbra-etcdctl"
UNIT = "umbra-coordinator.service"
DROP_IN = Path("/run/systemd/system") / f"{UNIT}.d" / "join.conf"


class JoinError(Exception):
    """The voter does not join; one sentence for people."""


@dataclass(frozen=True)
class Member:
    """A line of the cluster's list. One that has never started has no name."""

    id: str
    name: str
    url: str
    learner: bool


@dataclass(frozen=True)
class Plan:
    """What is to be done, in this order. ``start`` means to start with empty data."""

    remove: tuple[Member, ...] = ()
    add: bool = False
    start: bool = False
    promote: bool = False


def parse(text: str) -> list[Member]:
    """Read what ``member list -w json`` says. JoinError if it makes no sense."""
    try:
        return [
            Member(
                f"{row['ID']:x}",
                row.get("name", ""),
                row["peerURLs"][0],
                bool(row.get("isLearner")),
            )
            for row in json.loads(text)["members"]
        ]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise JoinError(f"the list of members makes no sense: {error!r}") from None


def decide(members: Sequence[Member], voters: Mapping[str, str], name: str, has_data: bool) -> Plan:
    """Return what makes ``name`` a voter.

    :param members: the cluster's list.
    :param voters: the inventory's voters, with the address for members of each.
    :param has_data: this host has a member's data.

    JoinError if that would take more than one member off the list.
    """
    own = next((member for member in members if member.url == voters[name]), None)
    gone = [member for member in members if member.url not in voters.values()]
    if own is not None and own.name and not has_data:
        # It was a member, and what it had promised to remember is lost: it must not vote as such.
        gone.append(own)
        own = None
    if len(gone) > 1:
        names = " and ".join(member.name or member.url for member in gone)
        raise JoinError(f"{names} would both be taken off the list; only one at a time is replaced")
    if own is None and has_data:
        raise JoinError("this host has the data of another member; move them away first")
    return Plan(tuple(gone), own is None, not has_data, own is None or own.learner)


def joining(config: str, members: Sequence[Member], name: str, url: str) -> str:
    """Return the configuration for the first start: the list as the cluster has it now."""
    names = {member.url: member.name or member.url for member in members} | {url: name}
    cluster = ",".join(f"{n}={u}" for u, n in names.items())
    config = re.sub(r"(?m)^initial-cluster:.*$", f"initial-cluster: {json.dumps(cluster)}", config)
    return re.sub(r"(?m)^initial-cluster-state:.*$", "initial-cluster-state: existing", config)


def run(*argv: str) -> str:
    """Run a program. JoinError with its own words if it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=90)
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).rpartition("Error: ")[2].split())
        raise JoinError(f"{' '.join(argv[:3])} failed: {words[-400:]}")
    return done.stdout


def join(
    voters: Mapping[str, str], name: str, others: str, etc: Path, data: Path, timeout: float
) -> bool:
    """Make ``name`` a voter; False if it is one already."""

    def members() -> list[Member]:
        return parse(run(CTL, "member", "list", "-w", "json", "--endpoints", others))

    has_data = any((data / "member" / "wal").glob("*"))
    plan = decide(members(), voters, name, has_data)
    if plan == Plan():
        # Who died between the vote and the end has left the first start's configuration.
        left = DROP_IN.exists()
        if left:
            finish(etc)
            print(f"{name} votes already, and starts like any other from now on")
        return left
    for member in plan.remove:
        change(timeout, "remove", member.id, "--endpoints", others)
        print(f"{member.name or member.url} is taken off the list")
    if plan.add:
        url = f"--peer-urls={voters[name]}"
        change(timeout, "add", name, "--learner", url, "--endpoints", others)
        print(f"{name} is added, without a vote yet")
    if plan.start:
        start(joining((etc / "etcd.yml").read_text(), members(), name, voters[name]), etc)
    else:
        run("systemctl", "start", UNIT)
    if plan.promote:
        own = next(m.id for m in members() if m.url == voters[name])
        change(timeout, "promote", own, "--endpoints", others)
        print(f"{name} has all data, and votes")
    finish(etc)
    return True


def start(config: str, etc: Path) -> None:
    """Start the member with another configuration, which counts until it has data."""
    path = etc / "join.yml"
    path.write_text(config)
    path.chmod(0o644)
    DROP_IN.parent.mkdir(parents=True, exist_ok=True)
    DROP_IN.write_text(f"[Service]\nExecStart=\nExecStart=/usr/bin/etcd --config-file {path}\n")
    run("systemctl", "daemon-reload")
    # What it may be doing since the data were lost is trying in vain.
    run("systemctl", "restart", UNIT)


def change(timeout: float, *what: str) -> None:
    """Change the list of members; JoinError if that is refused for so many seconds.

    It is refused while a member has not been connected to all others for 5 s, and a promotion while
    the learner lacks data.
    """
    until = time.monotonic() + timeout
    while True:
        try:
            run(CTL, "member", *what)
        except JoinError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.5)
        else:
            return


def finish(etc: Path) -> None:
    """The next start is one like any other."""
    DROP_IN.unlink(missing_ok=True)
    (etc / "join.yml").unlink(missing_ok=True)
    run("systemctl", "daemon-reload")


def main() -> int:
    """Entry point: 0 when this host's voter is one of the cluster's."""
    parser = argparse.ArgumentParser(
        prog="umbra-coordinator-join", description="Join a cluster of voters that runs already."
    )
    parser.add_argument("--name", required=True)
    parser.add_argument("--voter", action="append", required=True, metavar="NAME=URL")
    parser.add_argument("--endpoints", required=True, help="the other voters")
    parser.add_argument("--etc", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for getting the data")
    options = parser.parse_args()
    voters = dict(item.split("=", 1) for item in options.voter)
    try:
        changed = join(
            voters, options.name, options.endpoints, options.etc, options.data, options.timeout
        )
    except (JoinError, OSError, subprocess.TimeoutExpired) as error:
        print(f"umbra-coordinator-join: {error}", file=sys.stderr)
        return 1
    if not changed:
        print(f"{options.name} is a voter already")
    return 0


if __name__ == "__main__":
    sys.exit(main())
