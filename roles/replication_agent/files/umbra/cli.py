"""``umbractl``: the operator's command, a client of the local agent's API.

Exit status: 0 done or protected, 1 refused or degraded, 2 wrong usage.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from umbra import __version__
from umbra.api.client import ApiError, call, stream

RESUBMIT_TIMEOUT = 3600.0


def main() -> None:
    """Entry point of ``umbractl``."""
    try:
        cli(prog_name="umbractl")
    except ApiError as error:
        _fail(str(error))


def _fail(sentence: str) -> NoReturn:
    click.echo(f"umbractl: {sentence}", err=True)
    raise SystemExit(1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """See and steer the redundancy group that this host belongs to."""


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the API's answer as it is.")
def status(as_json: bool) -> None:
    """Show the group: one line a node, protected or degraded and why."""
    report = call("GET", "/status")
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _print_status(report)
    raise SystemExit(0 if report["protected"] else 1)


@cli.command()
def health() -> None:
    """Print protected, or degraded and the reasons."""
    answer = call("GET", "/health")
    click.echo(answer["status"])
    for reason in answer["reasons"]:
        click.echo(f"  {reason}")
    raise SystemExit(0 if answer["status"] == "protected" else 1)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the API's answer as it is.")
@click.option("--retry", is_flag=True, help="Try what was set aside again; on the primary.")
@click.option("--drop", metavar="ID", help="Delete a message that was set aside: it is lost.")
def queue(as_json: bool, retry: bool, drop: str | None) -> None:
    """Show the messages in transit: what this node holds, and who holds copies of its own.

    Set aside (parked) is what could not be carried on and would fail again.
    """
    if drop is not None:
        call("POST", "/parked", {"drop": drop}, timeout=30)
        click.echo(f"{drop} is deleted.")
        return
    if retry:
        call("POST", "/parked", {}, timeout=30)
        click.echo("What was set aside is tried again; umbractl queue shows what becomes of it.")
        return
    answer = call("GET", "/queue")
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    else:
        _print_queue(answer)


@cli.command()
@click.option("--recipient", required=True, metavar="MAILBOX", help="Whose mailbox lacks them.")
@click.option("--since", metavar="TIME", help="Accepted from then on: 2h, 3d, 2026-11-22T10:30.")
@click.option("--until", metavar="TIME", help="Accepted before then; default: now.")
@click.option("--dry-run", is_flag=True, help="Only say what would be sent.")
@click.option("--json", "as_json", is_flag=True, help="Print the API's answer as it is.")
def resubmit(
    recipient: str, since: str | None, until: str | None, dry_run: bool, as_json: bool
) -> None:
    """Send delivered messages again to a mailbox that lacks them; on the primary.

    Without --since, all that the safety net has. Times without an offset are UTC.
    """
    body = {"recipient": recipient, "since": since, "until": until, "dry_run": dry_run}
    answer = call("POST", "/resubmit", body, timeout=RESUBMIT_TIMEOUT)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    else:
        _print_resubmitted(answer)
    raise SystemExit(1 if answer["failed"] else 0)


@cli.command()
@click.argument("to", metavar="NODE")
@click.option("--dry-run", is_flag=True, help="Only say whether it would be done.")
@click.option(
    "--timeout", "timeout_s", default=60.0, show_default=True, help="Seconds to wait at most."
)
def switchover(to: str, dry_run: bool, timeout_s: float) -> None:
    """Make NODE the primary; nothing is lost. Does nothing if it is already."""
    body = {"to": to, "dry_run": dry_run, "timeout_s": timeout_s}
    # After the wait, which that bounds, comes the move itself; the agent bounds it by a minute.
    result = call("POST", "/switchover", body, timeout=timeout_s + 70)
    if not result["changed"]:
        click.echo(f"{to} is the primary already.")
    elif dry_run:
        click.echo(f"The primary would move from {result['from']} to {to}.")
        if lacking := result.get("uncovered"):
            click.echo(
                f"{result.get('uncovered_count', len(lacking))} messages of its queue have no copy"
                f" on {to} and would wait on hold on {result['from']}: {', '.join(lacking[:5])}"
            )
    else:
        for step in result["steps"]:
            click.echo(f"  {step['name']:<10} {step['seconds']:7.3f} s")
        click.echo(
            f"The primary moved from {result['from']} to {to}, epoch {result['epoch']};"
            f" clients were without it for {result['outage_s']:.3f} s."
        )


@cli.command()
@click.option("--candidate", default="", metavar="NODE", help="The new primary; default: this one.")
@click.option("--accept-loss", is_flag=True, help="What only the lost primary has may be lost.")
@click.option(
    "--without-stonith", is_flag=True, help="Do not run the hook: you know that it is switched off."
)
def failover(candidate: str, accept_loss: bool, without_stonith: bool) -> None:
    """Make this node, or NODE, the primary although the primary is gone."""
    report = call("GET", "/status")
    candidate = candidate or report["node"]
    body = {"candidate": candidate, "accept_loss": accept_loss, "stonith": not without_stonith}
    if accept_loss and report["coordinator"] == "static":
        _confirm_loss(report)
    elif accept_loss:
        _confirm_known_loss(candidate, call("POST", "/failover", {**body, "dry_run": True}))
    result = call("POST", "/failover", body, timeout=90)
    if result.get("stonith"):
        click.echo(f"stonith: {result['stonith']}")
    click.echo(
        f"{result['to']} is the primary, epoch {result['epoch']}."
        " umbractl status shows what is being resubmitted."
    )


@cli.command()
def pause() -> None:
    """Turn automatic failover off, for the whole group; everything else goes on."""
    result = call("POST", "/pause", {"on": True}, timeout=30)
    click.echo(
        "Automatic failover is paused until umbractl unpause: no shadow takes over by itself."
        if result["changed"]
        else "Automatic failover was paused already."
    )


@cli.command()
def unpause() -> None:
    """Turn automatic failover on again."""
    result = call("POST", "/pause", {"on": False}, timeout=30)
    click.echo(
        "Automatic failover is on." if result["changed"] else "Automatic failover was on already."
    )


@cli.command(name="open")
@click.option(
    "--force", is_flag=True, required=True, help="You know that no other node acts as primary."
)
def open_(force: bool) -> None:
    """Open this node, which waits for a peer, on your word that no other is primary."""
    _confirm_loss(call("GET", "/status"))
    result = call("POST", "/open", {}, timeout=60)
    click.echo(f"This node is open as primary, epoch {result['epoch']}.")


@cli.command()
@click.argument("user", default="", metavar="[USER]")
@click.option("--reason", required=True, metavar="TEXT", help="Shown with the status.")
def suspend(user: str, reason: str) -> None:
    """Copy no mailbox changes to the shadow any more, of USER or of everybody.

    They are recorded, and copied after umbractl resume. Until then the group is degraded.
    """
    call("POST", "/suspend", {"user": user, "reason": reason}, timeout=60)
    click.echo(
        f"The mirror of {user or 'all mailboxes'} is suspended: what changes from now on is on this"
        " node only, and the group is degraded, until umbractl resume."
    )


@cli.command()
@click.argument("user", default="", metavar="[USER]")
def resume(user: str) -> None:
    """Copy mailbox changes to the shadow again, what was recorded meanwhile first."""
    result = call("POST", "/resume", {"user": user}, timeout=60)
    whose = user or "all mailboxes"
    click.echo(
        f"The mirror of {whose} is resumed; umbractl status shows how it catches up."
        if result["changed"]
        else f"The mirror of {whose} was not suspended."
    )


@cli.command()
@click.argument("node")
@click.option(
    "--rate", type=click.FloatRange(min=0), default=0.0, show_default=True, metavar="MB/S",
    help="Send no more than so many megabytes a second: at least 0.1, or 0 for no limit.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object each second.")
def seed(node: str, rate: float, as_json: bool) -> None:
    """Build the copy of NODE anew while this node serves, or watch a seeding that runs.

    Whoever stops watching stops nothing. An interrupted one goes on by itself; --rate of a second
    call holds from then on.
    """
    rows = stream("/seed", {"node": node, "rate": rate * 1e6})
    done = False
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("users,"),
        TextColumn("{task.fields[speed]}"),
    )  # fmt: skip
    hidden = as_json or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True, quiet=hidden), disable=hidden) as progress:
        task = progress.add_task(node, total=None, speed="")
        for row in rows:
            if as_json:
                click.echo(json.dumps(row))
            if "done" in row:
                done = row["done"]
                break
            left = f", {row['remaining_s']} s left" if row["remaining_s"] is not None else ""
            progress.update(
                task, total=row["total"] or None, completed=row["users"],
                description=f"{node} {row['phase']}",
                speed=f"{row['bytes_per_s'] / 1e6:.1f} MB/s{left}",
            )  # fmt: skip
    if not done:
        _fail(f"{node} is not complete; umbractl status tells why.")
    if not as_json:
        click.echo(f"{node} has a whole copy.")


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the API's answer as it is.")
def merged(as_json: bool) -> None:
    """Show what was merged when a former primary came back: what it had and this node had not.

    On the node that was primary then. Of each user the differences before the merge.
    """
    answer = call("GET", "/merged")
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    for merge in answer["merged"]:
        click.echo(
            f"{merge['peer']} came back in epoch {merge['epoch']}, {_time(merge['since'])}:"
            f" {merge['count']} users differed."
        )
        rows = [{**user, "peer": merge["peer"], "outcome": "merged", "reason": ""}
                for user in merge["users"]]  # fmt: skip
        if rows:
            _print_differences(rows)
    if not answer["merged"]:
        click.echo("Nothing was ever merged here.")


@cli.command()
@click.argument("users", nargs=-1, metavar="[USER]...")
@click.option("--repair", is_flag=True, help="Make the copies that differ what the primary has.")
@click.option("--bodies", is_flag=True, help="Compare the content of messages too; reads it all.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each result.")
def verify(users: tuple[str, ...], repair: bool, bodies: bool, as_json: bool) -> None:
    """Compare the mailboxes of the primary and each shadow, all users' unless some are named.

    Ends with 0 if all are the same or were repaired, else with 1.
    """
    rows = stream("/verify", {"users": users, "repair": repair, "bodies": bodies})
    total = next(rows, {}).get("total", 0)
    counts: Counter[str] = Counter()
    told: list[dict[str, Any]] = []
    done = False
    hidden = as_json or not sys.stderr.isatty()
    with Progress(
        console=Console(stderr=True, quiet=hidden), disable=hidden, transient=True
    ) as progress:
        task = progress.add_task("comparing", total=total)
        for row in rows:
            if row.get("done"):
                done = True
                break
            counts[row["outcome"]] += 1
            progress.advance(task)
            if as_json:
                click.echo(json.dumps(row))
            elif row["outcome"] != "equal":
                told.append(row)
    if not as_json:
        _print_verified(told, counts)
    if not done:
        _fail("the agent ended before all was compared.")
    raise SystemExit(0 if counts["equal"] + counts["repaired"] == total else 1)


def _print_differences(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("user", "node", "outcome", "mailbox", "what", "primary", "there"):
        table.add_column(name, overflow="fold")
    for row in sorted(rows, key=lambda row: (row["user"], row["peer"])):
        head = [row["user"], row["peer"], row["outcome"]]
        if not row["differences"]:
            table.add_row(*map(_text, [*head, "", row["reason"], "", ""]))
        for item in row["differences"]:
            values = [item["mailbox"], item["what"], item["here"] or "-", item["there"] or "-"]
            table.add_row(*map(_text, [*head, *values]))
            head = ["", "", ""]
        if row["differences"] and (left := row["count"] - len(row["differences"])):
            table.add_row("", "", "", "", f"and {left} more", "", "")
        if row["differences"] and row["reason"]:
            table.add_row("", "", "", "", _text(row["reason"]), "", "")
    _console().print(table)


def _print_verified(rows: list[dict[str, Any]], counts: Counter[str]) -> None:
    if rows:
        _print_differences(rows)
    words = [f"{count} {outcome}" for outcome, count in sorted(counts.items())]
    click.echo(", ".join(words) if words else "There is nobody to compare.")


def _console() -> Console:
    # In a playbook's output there is no terminal whose width must be kept.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def _text(words: str, style: str = "") -> Text:
    """Return ``words`` as they are: no markup, and nothing that a terminal would obey."""
    return Text("".join(char if char.isprintable() else "?" for char in words), style=style)


def _confirm_loss(report: dict[str, Any]) -> None:
    me = report["node"]
    for node in report["nodes"]:
        if node["node"] != me:
            answers = "answers" if node["reachable"] else "does not answer"
            click.echo(f"{node['node']}: {answers}, last known as {node['role']}.")
    click.echo(
        "If another node still acts as primary, two will, and their changes must be merged.\n"
        "Messages and mailbox changes that only the other node has are missing until it returns."
    )
    typed = click.prompt(
        f"Type the name of this node ({me}) to go on", default="", show_default=False
    )
    if typed != me:
        _fail("nothing was changed.")


def _confirm_known_loss(candidate: str, loss: dict[str, Any]) -> None:
    if loss["certain"]:
        click.echo(f"{candidate} has everything that was acknowledged; nothing is lost.")
        words = "lose nothing"
    else:
        amounts = [
            "?" if loss[key] is None else f"{loss[key]:g}"
            for key in ("messages", "changes", "seconds")
        ]
        click.echo(
            f"{candidate} lacks, as far as it has heard: {amounts[0]} messages that only the lost"
            f" primary has, {amounts[1]} mailbox changes, and whatever was acknowledged in the last"
            f" {amounts[2]} seconds.\n"
            "When the lost primary returns, its mailboxes are merged and its queue is on hold."
        )
        if loss.get("renewed"):
            click.echo(f"{candidate} had everything, but on another disk: this one began anew.")
        for node, seconds in loss.get("others", {}).items():
            click.echo(f"{node} had everything {seconds:g} seconds ago.")
        words = f"lose {' '.join(amounts)}"
    if click.prompt(f"Type `{words}` to go on", default="", show_default=False) != words:
        _fail("nothing was changed.")


def _print_status(report: dict[str, Any]) -> None:
    console = _console()
    table = Table(box=None, pad_edge=False)
    for name in ("node", "site", "role", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("lag", "shadow queue"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("since", no_wrap=True)
    for node in report["nodes"]:
        state = node["state"] if node["reachable"] else "unreachable"
        lag = f"{node['lag_changes']} / {node['lag_s']:.1f} s" if node["lag_changes"] else "0"
        queue = (
            f"{node['shadow_messages']} / {_size(node['shadow_bytes'])}"
            if node["shadow_messages"]
            else "0"
        )
        table.add_row(
            _text(node["node"]), _text(node["site"]),
            _text(node["role"], style="bold" if node["role"] == "primary" else ""),
            _text(state, style="" if node["reachable"] else "red"), lag, queue,
            _text(_time(node["since"])),
        )  # fmt: skip
    console.print(table)
    console.print()
    word = (
        Text("protected", style="green")
        if report["protected"]
        else Text("degraded", style="bold red")
    )
    console.print(
        Text(f"group {report['group']}: ").append(word).append(f", epoch {report['epoch']}")
    )
    for reason in report["reasons"]:
        console.print(_text(f"  {reason}"))
    if report["coordinator"] != "static":
        names = ", ".join(report["protected_set"]) or "nobody"
        on = "paused (umbractl unpause)" if report["paused"] else "on"
        console.print(
            Text(f"coordinator {report['coordinator']}: protected {names}; automatic failover {on}")
        )
        for node in report["nodes"]:
            policy = f"; policy {node['policy']}" if node["policy"] not in ("", "automatic") else ""
            if node["cause"]:
                console.print(_text(f"  {node['node']}: {node['state']}: {node['cause']}{policy}"))
    for check in report["checks"]:
        if not check["passed"]:
            console.print(_text(f"check {check['name']}: {check['message']}"))
    for address in report["service_addresses"]:
        places = [n["node"] for n in report["nodes"] if address in n["service_addresses"]]
        console.print(_text(f"service address {address}: {' and '.join(places) or 'nowhere'}"))
    change = report["last_switchover"]
    if change:
        outage = f", outage {change['outage_s']:.3f} s" if change["outage_s"] is not None else ""
        kind = "switchover" if change["planned"] else "failover"
        at = _time(change["at"])
        console.print(_text(f"last {kind}: {change['from']} to {change['to']}, {at}{outage}"))


def _print_queue(answer: dict[str, Any]) -> None:
    console = _console()
    if answer["messages"]:
        table = Table(box=None, pad_edge=False)
        table.add_column("primary", no_wrap=True)
        for name in ("messages", "size", "oldest"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("next", no_wrap=True)
        for row in answer["messages"]:
            words = row["origin"], str(row["messages"]), _size(row["bytes"]), _age(row["oldest_s"])
            table.add_row(*map(_text, (*words, row["next"])))
        console.print(table)
    else:
        console.print(_text(f"{answer['node']} holds no message."))
    for row in answer["copies"]:
        where = "here" if row["holder"] == answer["node"] else f"at {row['holder']}"
        console.print(_text(f"copies of this node's own queue {where}: {row['messages']}"))
    for row in answer.get("parked", ()):
        name = f"{row['shadow_id']} ({row['message_id'] or 'no message id'})"
        console.print(_text(f"parked {name} of {row['origin']}: {row['reason']}"))


def _print_resubmitted(answer: dict[str, Any]) -> None:
    console = _console()
    table = Table(box=None, pad_edge=False)
    for name in ("accepted", "sender", "message id"):
        table.add_column(name)
    table.add_column("size", justify="right", no_wrap=True)
    for row in answer["messages"]:
        words = _time(row["accepted"]), row["sender"] or "<>", row["message_id"]
        table.add_row(*map(_text, words), _size(row["bytes"]))
    if answer["messages"]:
        console.print(table)
        console.print()
    window = f"accepted from {_time(answer['since'])} to {_time(answer['until'])}"
    console.print(_text(f"{answer['recipient']}, {window}:"))
    sent = "would be sent again" if answer["dry_run"] else "sent again"
    for count, what in (
        (answer["found"], "in the safety net"),
        (answer["present"], "in the mailbox already"),
        (answer["queued"], "in the queue still"),
        (answer["resubmitted"], sent),
        (len(answer["failed"]), "refused"),
    ):
        console.print(f"{count:>8} {what}")
    for shadow_id, reason in list(answer["failed"].items())[:5]:
        console.print(_text(f"  {shadow_id}: {reason}"))


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _time(text: str) -> str:
    """Return an ISO time to the second, in UTC."""
    return f"{text[:10]} {text[11:19]} UTC" if text else ""


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
