#!/usr/bin/python
# Copyright (c) umbra.mail contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: switchover
short_description: Move the primary of a redundancy group to another node
version_added: 0.1.0
description:
  - Asks the umbra agent of the host it runs on to make another node the primary.
    Any node of the group accepts the request and hands it to the present primary.
  - Nothing acknowledged is lost by a switchover. When the agent cannot promise that, it refuses,
    and the
    module fails with the reason.
author:
  - umbra.mail contributors (@umbra-mail)
attributes:
  check_mode:
    support: full
    description: Asks the agent for a dry run, which makes every check and moves nothing.
  diff_mode:
    support: full
    description: Shows the primary before and after.
  idempotent:
    support: full
    description: Naming the node that is primary already changes nothing.
options:
  to:
    description: Name of the node that shall be primary.
    type: str
    required: true
  timeout:
    description:
      - Longest time in seconds for the whole move. After it the agent gives up and the old primary
        goes on.
    type: float
    default: 60
  socket:
    description: The agent's API socket.
    type: path
    default: /run/umbra/api.sock
seealso:
  - module: umbra.mail.group_health_info
"""

EXAMPLES = r"""
- name: Make mail-b the primary
  umbra.mail.switchover:
    to: mail-b

- name: See what a move would do, and whether it would be refused
  umbra.mail.switchover:
    to: mail-b
  check_mode: true
  diff: true
"""

RETURN = r"""
from:
  description: The primary before.
  returned: success
  type: str
  sample: mail-a
to:
  description: The primary after.
  returned: success
  type: str
  sample: mail-b
epoch:
  description: The group's epoch after the move.
  returned: success
  type: int
  sample: 7
outage_s:
  description:
    - Time in seconds during which no node had its service ports open, as the agents measured it.
  returned: when the primary moved
  type: float
  sample: 0.62
steps:
  description: The steps of the move and how long each took, in seconds.
  returned: when the primary moved, or would move
  type: list
  elements: dict
  sample: [{"name": "close ports", "seconds": 0.004}]
msg:
  description: What happened, in one sentence.
  returned: always
  type: str
  sample: The primary moved from mail-a to mail-b in 0.62 s.
"""

import time
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.umbra.mail.plugins.module_utils._agent import (
    DEFAULT_SOCKET,
    AgentClient,
    AgentError,
    AgentUnavailable,
)


class Client(t.Protocol):
    """What this module needs of the agent."""

    def status(self) -> dict[str, t.Any]: ...

    def switchover(self, to: str, timeout_s: float, dry_run: bool = False) -> dict[str, t.Any]: ...


def switch(
    client: Client,
    to: str,
    timeout: float,
    check_mode: bool,
    clock: t.Callable[[], float] = time.monotonic,
    sleep: t.Callable[[float], None] = time.sleep,
) -> dict[str, t.Any]:
    """Move the primary unless it is there already; return the module's result."""
    deadline = clock() + timeout
    status = client.status()
    before = status.get("primary")
    names = [str(node.get("node")) for node in status.get("nodes", [])]
    if to not in names:
        raise AgentError(
            "{} is not a node of the group {}; its nodes are: {}".format(
                to, status.get("group"), ", ".join(names) or "none"
            )
        )
    if before == to:
        return {
            "changed": False,
            "from": before,
            "to": to,
            "epoch": status.get("epoch"),
            "msg": f"{to} is the primary already.",
            "diff": diff(before, to),
        }
    try:
        answer = client.switchover(to, timeout, dry_run=check_mode)
    except AgentUnavailable as error:
        if check_mode:
            raise
        # The agent went away in the middle of the move. What it has done is told by the status.
        answer = await_primary(client, before, to, deadline, str(error), clock, sleep)
    result = {
        "changed": bool(answer.get("changed")),
        "from": answer.get("from", before),
        "to": answer.get("to", to),
        "epoch": answer.get("epoch"),
        "outage_s": answer.get("outage_s"),
        "steps": answer.get("steps", []),
        "diff": diff(before, to),
    }
    result["msg"] = sentence(result, check_mode)
    return result


def await_primary(
    client: Client,
    before: str | None,
    to: str,
    deadline: float,
    reason: str,
    clock: t.Callable[[], float],
    sleep: t.Callable[[float], None],
) -> dict[str, t.Any]:
    """Ask for the status until ``to`` is the primary or the deadline has passed."""
    while True:
        try:
            status = client.status()
        except AgentError as error:
            reason = str(error)
        else:
            if status.get("primary") == to:
                last = status.get("last_switchover") or {}
                return {
                    "changed": True,
                    "from": before,
                    "to": to,
                    "epoch": status.get("epoch"),
                    "outage_s": last.get("outage_s") if last.get("to") == to else None,
                }
        if clock() >= deadline:
            raise AgentUnavailable(
                f"no answer about the move to {to} ({reason}); look at umbractl status first"
            )
        sleep(0.5)


def diff(before: str | None, after: str) -> dict[str, str]:
    """Return the primary before and after, as Ansible's diff mode shows it."""
    return {"before": "primary: %s\n" % (before or "none"), "after": f"primary: {after}\n"}


def sentence(result: t.Mapping[str, t.Any], check_mode: bool) -> str:
    """Say in one sentence what a move did or would do."""
    if not result["changed"]:
        return "{} is the primary already.".format(result["to"])
    if check_mode:
        return "The primary would move from {} to {}.".format(result["from"], result["to"])
    outage = result["outage_s"]
    return "The primary moved from {} to {}{}.".format(
        result["from"],
        result["to"],
        "" if outage is None else f" in {outage:.2f} s",
    )


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "to": {"type": "str", "required": True},
            "timeout": {"type": "float", "default": 60.0},
            "socket": {"type": "path", "default": DEFAULT_SOCKET},
        },
        supports_check_mode=True,
    )
    params = module.params
    if params["timeout"] <= 0:
        module.fail_json(msg="timeout must be more than 0 seconds")
    try:
        result = switch(
            AgentClient(params["socket"]), params["to"], params["timeout"], module.check_mode
        )
    except AgentError as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
