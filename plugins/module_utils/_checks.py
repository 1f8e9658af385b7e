# Copyright (c) umbra.mail contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The health checks of a redundancy group: pure functions from what was measured to a verdict."""

from __future__ import annotations

import datetime
import typing as t

Check = dict[str, t.Any]
Status = t.Mapping[str, t.Any]


def check(
    name: str, passed: bool, message: str, value: t.Any = None, threshold: t.Any = None
) -> Check:
    """Return one check in the form that the agent's API uses too."""
    return {
        "name": name,
        "passed": passed,
        "value": value,
        "threshold": threshold,
        "message": message,
    }


def agent_answers(error: str | None, host: str) -> Check:
    """The agent of this host answers its API."""
    if error is None:
        return check("agent answers", True, f"The agent on {host} answers.", True, True)
    return check("agent answers", False, error, False, True)


def one_primary(status: Status) -> Check:
    """Exactly one reachable node of the group says that it is primary.

    What an unreachable one was when it was last heard does not count.
    """
    primaries = [
        node["node"]
        for node in nodes(status)
        if node.get("role") == "primary"
        and (node.get("reachable") or node["node"] == status.get("node"))
    ]
    if len(primaries) == 1:
        message = f"{primaries[0]} is the only primary."
    elif primaries:
        message = "{} all say that they are primary.".format(", ".join(primaries))
    else:
        message = "No node is primary, so no mail is taken; see umbractl status for the reason."
    return check("one primary", len(primaries) == 1, message, len(primaries), 1)


def protected(status: Status) -> Check:
    """Every acknowledged thing is on two nodes."""
    ok = bool(status.get("protected"))
    reasons = "; ".join(str(reason) for reason in status.get("reasons", []))
    message = "Every acknowledged message and change is on two nodes."
    return check(
        "protected",
        ok,
        message if ok else "Degraded: %s." % (reasons or "no reason given"),
        ok,
        True,
    )


def peers_reachable(status: Status) -> Check:
    """This node reaches every other node of the group."""
    lost = [
        node["node"]
        for node in nodes(status)
        if not node.get("reachable") and node["node"] != status.get("node")
    ]
    message = (
        "Every other node is reachable."
        if not lost
        else "Not reachable: {}.".format(", ".join(lost))
    )
    return check("peers reachable", not lost, message, len(lost), 0)


def lag(status: Status, threshold_s: float) -> Check:
    """No shadow is further behind than the threshold."""
    worst, name = max(
        ((float(node.get("lag_s") or 0.0), str(node["node"])) for node in nodes(status)),
        default=(0.0, "no node"),
    )
    message = f"{name} is furthest behind, by {worst:.1f} s." if worst > 0 else "No node is behind."
    return check("lag", worst <= threshold_s, message, round(worst, 3), threshold_s)


def shadow_queue_age(status: Status, threshold_s: float) -> list[Check]:
    """Hold the age that the agent tells against another threshold.

    Empty if it tells none, as an agent of an older version does.
    """
    name = "shadow queue age"
    return [
        check(
            name, (item["value"] or 0) <= threshold_s, item["message"], item["value"], threshold_s
        )
        for item in status.get("checks") or []
        if item["name"] == name
    ]


def postfix_on_primary_only(active: bool, role: str | None) -> Check:
    """Postfix runs when this node is primary, and only then."""
    wanted = role == "primary"
    message = "Postfix {} and this node is {}.".format(
        "runs" if active else "is stopped",
        role or "in no known role",
    )
    return check("postfix on primary only", active == wanted, message, active, wanted)


MILTER = "umbra/milter.sock"
MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]


def entrances(settings: t.Mapping[str, str] | None) -> list[Check]:
    """Every way in which mail comes into Postfix leads past the agent, so that it is shadowed.

    :param settings: what Postfix's configuration says, by the names of postconf: parameters
        (``smtpd_milters``), overrides (``smtp/inet/smtpd_milters``) and commands
        (``smtp/inet/command``). None if it cannot be read.
    """
    if settings is None:
        return [check("entrances", False, "Postfix's configuration cannot be read.")]
    found = []
    for key, command in settings.items():
        service, _slash, field = key.rpartition("/")
        if field == "command" and command.split()[:1] == ["smtpd"]:

            def effective(name: str, service: str = service) -> str:
                return settings.get(f"{service}/{name}", settings.get(name, ""))

            past = "no_milters" in effective("receive_override_options")
            name = service.rpartition("/")[0]
            found.append(_entrance(name, not past and MILTER in effective("smtpd_milters")))
    local = MILTER in settings.get("non_smtpd_milters", "")
    bounces = "bounce" in settings.get("internal_mail_filter_classes", "")
    return [*found, _entrance("sendmail", local), _entrance("bounces", local and bounces)]


def _entrance(name: str, shadowed: bool) -> Check:
    message = (
        "Mail that comes in here is shadowed before it is acknowledged."
        if shadowed
        else "Mail that comes in here has no shadow: the agent's milter is not asked about it."
    )
    return check(f"entrance {name}", shadowed, message, shadowed, True)


def service_ports(name: str, role: str | None, port_open: t.Mapping[int, bool]) -> Check:
    """Clients get through to the service ports of the primary, and of no other node.

    A primary need not offer every port (POP3 may not be installed), but SMTP it must.
    """
    opened = sorted(port for port, is_open in port_open.items() if is_open)
    shown = ", ".join(str(port) for port in opened) or "none"
    if role == "primary":
        passed = 25 in opened or (25 not in port_open and bool(opened))
        message = f"{name} is primary; open there: {shown}."
    else:
        passed = not opened
        message = f"{name} is not primary; open there: {shown}."
    return check(
        f"service ports {name}", passed, message, opened, "open" if role == "primary" else []
    )


def disk_space(path: str, free_percent: float | None, threshold: float) -> Check:
    """The file system of a path has enough room; None means that the path is not there."""
    name = f"disk space {path}"
    if free_percent is None:
        return check(name, False, f"{path} does not exist.", None, threshold)
    return check(
        name,
        free_percent >= threshold,
        f"{path} has {free_percent:.0f} % free.",
        round(free_percent, 1),
        threshold,
    )


def certificate_expiry(path: str, days: float | None, threshold: float) -> Check:
    """A certificate is valid for long enough; None means that it cannot be read."""
    name = f"certificate {path}"
    if days is None:
        return check(name, False, f"{path} is no readable certificate.", None, threshold)
    if days < 0:
        message = f"{path} expired {-days:.0f} days ago."
    else:
        message = f"{path} is valid for {days:.0f} more days."
    return check(name, days >= threshold, message, round(days, 1), threshold)


def clock(peer: str, difference_s: float | None, threshold_s: float) -> Check:
    """The clocks of this node and a peer agree; None means that the peer did not answer."""
    name = f"clock {peer}"
    if difference_s is None:
        return check(name, False, f"{peer} did not tell its time.", None, threshold_s)
    message = f"The clock of {peer} differs by {difference_s:.1f} s at most."
    return check(name, difference_s <= threshold_s, message, round(difference_s, 1), threshold_s)


def inventory_role(status: Status) -> Check:
    """Tell when the role is not the one in the inventory.

    Only a note: the inventory's role counts for a group that is being made.
    """
    own = own_role(status)
    listed = status.get("inventory_role")
    if own == listed:
        message = "The role is the one in the inventory."
    else:
        message = f"Note: this node is {own}; the inventory's {listed} counts for a new group only."
    return check("inventory role", True, message, own, listed)


def nodes(status: Status) -> list[dict[str, t.Any]]:
    """Return the group's nodes as this node's agent sees them."""
    return list(status.get("nodes") or [])


def own_role(status: Status) -> str | None:
    """Return the role of the node that was asked."""
    for node in nodes(status):
        if node.get("node") == status.get("node"):
            return str(node.get("role"))
    return None


def clock_difference(peer_s: float, before_s: float, after_s: float) -> float:
    """Return the difference in seconds that is certain, from a peer's clock in whole seconds.

    The peer's true time lies in [peer_s, peer_s + 1), ours in [before_s, after_s].
    """
    return max(0.0, peer_s - after_s, before_s - (peer_s + 1.0))


def days_left(not_after: str, now: datetime.datetime) -> float:
    """Return the days until ``Jan  2 03:04:05 2027 GMT``, as openssl says it; or ValueError."""
    month, _space, rest = " ".join(not_after.split()).partition(" ")
    # Not %b, which is the month in the host's language.
    end = datetime.datetime.strptime(f"{MONTHS.index(month) + 1} {rest}", "%m %d %H:%M:%S %Y GMT")
    return (end.replace(tzinfo=datetime.UTC) - now).total_seconds() / 86400.0


def merge(own: t.Sequence[Check], agents: t.Sequence[Check]) -> list[Check]:
    """Join the module's checks with the agent's.

    On one name the module's wins: its threshold is the one that was asked for.
    """
    names = {item["name"] for item in own}
    return list(own) + [dict(item) for item in agents if item.get("name") not in names]
