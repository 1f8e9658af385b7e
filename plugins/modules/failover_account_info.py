#!/usr/bin/python
# Copyright (c) umbra.mail contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: failover_account_info
short_description: Account for every message and change of a failover test
version_added: 0.1.0
description:
  - Reads the log of a failover test's workload and what was found in the mailboxes afterwards, and
    says what is lost,
    there twice, altered or different between the nodes.
  - The role P(umbra.mail.failover_test#role) runs it on the controller.
author:
  - umbra.mail contributors (@umbra-mail)
attributes:
  check_mode:
    support: full
    description: The module never changes anything.
  diff_mode:
    support: N/A
    description: Nothing changes, so there is nothing to show.
  idempotent:
    support: full
    description: The same files give the same report.
options:
  directory:
    description:
      - Where the run's files are. C(log.jsonl) is the workload's log and C(marks.jsonl) has the
        marks that the playbook set
        around each move, one JSON object a line; C(NAME.json) is what each reader found.
    type: path
    required: true
  views:
    description: Names of the readers. Everything must hold in every view.
    type: list
    elements: str
    required: true
  moves:
    description:
      - The moves of the primary in their order; O(moves[].from) and O(moves[].to) are node names.
    type: list
    elements: dict
    default: []
    suboptions:
      from:
        description: The primary before.
        type: str
        required: true
      to:
        description: The primary after.
        type: str
        required: true
      outage_s:
        description: How long no node was open, as the agents measured it.
        type: float
  min_messages:
    description: A test with fewer acknowledged messages proves nothing, and fails.
    type: int
    default: 500
  min_changes:
    description: A test with fewer acknowledged changes proves nothing, and fails.
    type: int
    default: 500
"""

EXAMPLES = r"""
- name: Account for the run
  umbra.mail.failover_account_info:
    directory: build/reports/failover_test
    views: [outside, mail-a, mail-b]
    moves:
      - {from: mail-a, to: mail-b}
      - {from: mail-b, to: mail-a}
  register: account
"""

RETURN = r"""
report:
  description: The account; every key is described in the collection's docs, failover_test.
  returned: success
  type: dict
  sample: {"kind": "switchover", "acknowledged": 1240, "lost": 0, "verdict": "pass"}
table:
  description: The same as lines of a table for the terminal.
  returned: success
  type: list
  elements: str
chart:
  description: The geometry of the timeline chart.
  returned: success
  type: dict
"""

import json
import os
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.umbra.mail.plugins.module_utils import _accounting as accounting
from ansible_collections.umbra.mail.plugins.module_utils._chart import chart
from ansible_collections.umbra.mail.plugins.module_utils._tables import report_lines


def read_lines(path: str) -> list[dict[str, t.Any]]:
    """Read JSON lines. A last line that a killed workload left half-written is left out."""
    with open(path, encoding="utf-8") as file:
        lines = file.readlines()
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [json.loads(line) for line in lines]


def read_json(path: str) -> dict[str, t.Any]:
    """Read one JSON object."""
    with open(path, encoding="utf-8") as file:
        return dict(json.load(file))


def result(params: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """Return the module's result."""
    directory = params["directory"]
    log = read_lines(os.path.join(directory, "log.jsonl"))
    marks = read_lines(os.path.join(directory, "marks.jsonl"))
    views = {name: read_json(os.path.join(directory, name + ".json")) for name in params["views"]}
    moves = [
        {key: move[key] for key in ("from", "to", "outage_s") if move.get(key) is not None}
        for move in params["moves"]
    ]
    minimum = {
        "acknowledged": params["min_messages"],
        "changes_acknowledged": params["min_changes"],
    }
    report = accounting.account(log, marks, views, moves, minimum)
    operations = [item for item in log if item["type"] == "op"]
    begin = log[0]["at"]
    end = max([item["end"] for item in operations] + [begin])
    return {
        "report": report,
        "table": report_lines(report),
        "chart": chart(accounting.timeline(operations, begin, end), report["moves"]),
    }


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "views": {"type": "list", "elements": "str", "required": True},
            "moves": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "from": {"type": "str", "required": True},
                    "to": {"type": "str", "required": True},
                    "outage_s": {"type": "float"},
                },
            },
            "min_messages": {"type": "int", "default": 500},
            "min_changes": {"type": "int", "default": 500},
        },
        supports_check_mode=True,
    )
    try:
        answer = result(module.params)
    except (OSError, ValueError, KeyError, IndexError, StopIteration) as error:
        module.fail_json(msg=f"the run cannot be accounted for: {type(error).__name__}: {error}")
    module.exit_json(changed=False, **answer)


if __name__ == "__main__":
    main()
