# Copyright (c) umbra.mail contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tables for the terminal, as lists of lines."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 74  # what Ansible leaves of 80 columns


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Align columns: numbers to the right, text to the left, two blanks between."""
    cells = [list(head), *[[shown(value) for value in row] for row in rows]]
    widths = [max(len(row[place]) for row in cells) for place in range(len(head))]
    right = [
        bool(rows)
        and all(
            isinstance(row[place], (int, float)) and not isinstance(row[place], bool)
            for row in rows
        )
        for place in range(len(head))
    ]
    lines = [
        "  ".join(
            cell.rjust(width) if numbers else cell.ljust(width)
            for cell, width, numbers in zip(row, widths, right, strict=False)
        )
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return [line.rstrip() for line in lines]


def shown(value: Any) -> str:
    """Return a value as a person reads it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ",".join(map(shown, value)) or "none"
    return str(value)


def health_lines(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return every check of every node, and after them in words those that failed.

    A node without checks gave no answer and is shown so.
    """
    rows = []
    failed = []
    for name, health in results.items():
        missing = {
            "name": "host reachable",
            "passed": False,
            "value": False,
            "threshold": True,
            "message": health.get("msg") or "The host cannot be reached.",
        }
        for item in health.get("checks", [missing]):
            verdict = "passed" if item["passed"] else "FAILED"
            values = [cut(shown(item[key])) for key in ("value", "threshold")]
            rows.append([name, verdict, item["name"], *values])
            if not item["passed"]:
                failed += wrapped(f"FAILED {name}, {item['name']}: {item['message']}")
    return [*table(["node", "result", "check", "value", "threshold"], rows), *failed]


def status_lines(status: Mapping[str, Any]) -> list[str]:
    """Return one line for each node of the group, as one agent sees it."""
    keys = ("node", "site", "role", "state", "reachable", "lag_changes", "lag_s", "shadow_messages")
    rows = [[node.get(key) for key in keys] for node in status.get("nodes") or []]
    head = ["node", "site", "role", "state", "reachable", "lag", "lag s", "shadow queue"]
    return table(head, rows)


def cut(text: str, width: int = 12) -> str:
    """Shorten a text that would make a column too wide."""
    return text if len(text) <= width else text[: width - 1] + "…"


def wrapped(text: str) -> list[str]:
    """Break a sentence into lines that fit a terminal."""
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """Return a failover test's report as a table."""
    lines = table(
        ["", "acknowledged", "refused", "unknown", "lost", "twice", "altered"],
        [
            ["messages"]
            + [
                report[key]
                for key in ("acknowledged", "refused", "unknown", "lost", "duplicated", "altered")
            ],
            ["changes"]
            + [
                report[key]
                for key in (
                    "changes_acknowledged",
                    "changes_refused",
                    "changes_unknown",
                    "changes_lost",
                )
            ]
            + [None, None],
        ],
    )
    lines.append("")
    lines += table(
        ["move", "at s", "took s", "SMTP outage s", "IMAP outage s"],
        [
            [
                f"{move['from']} -> {move['to']}",
                move["begin_s"],
                round(move["end_s"] - move["begin_s"], 3),
                move["smtp_outage_s"],
                move["imap_outage_s"],
            ]
            for move in report["moves"]
        ],
    )
    latency = report["op_latency_ms"]
    lines += [
        "",
        f"latency: p50 {shown(latency['p50'])} ms, p99 {shown(latency['p99'])} ms",
        f"{report['samples_sent']} different real messages; compared: {', '.join(report['views'])}",
    ]
    for item in report["findings"][:10]:
        lines += wrapped(f"{item['what']} ({item['view']}): {item['text']}")
    return [*lines, "", f"verdict: {report['verdict']}", *report["reasons"]]
