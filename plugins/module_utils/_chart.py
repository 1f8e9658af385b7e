# Copyright (c) umbra.mail contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lays out the timeline chart of a failover test: pure geometry, for a template to write down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 1000  # of the plot, in the units of the SVG
LANE = 110  # height of one series
GAP = 26  # between two lanes
LANES = (("messages", "Messages acknowledged"), ("changes", "Mailbox changes acknowledged"))


def chart(timeline: Mapping[str, Any], moves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the SVG is made of, in its own units: lanes, failures, moves, time axis."""
    bin_s = timeline["bin_ms"] / 1000.0
    bins = len(timeline["messages"])
    scale = WIDTH / bins  # units for one bin
    lanes = []
    for place, (name, title) in enumerate(LANES):
        values = timeline[name]
        top = place * (LANE + GAP)
        peak = max([*values, 1])
        lanes.append(
            {
                "name": name,
                "title": title,
                "top": top,
                "bottom": top + LANE,
                "peak": peak,
                "path": area(values, peak, scale, top),
            }
        )
    failed_top = len(LANES) * (LANE + GAP)
    return {
        "width": WIDTH,
        "height": failed_top + 24,
        "bins": bins,
        "bin_ms": timeline["bin_ms"],
        "lanes": lanes,
        "failed": [
            {"x": round(place * scale, 2), "width": round(max(scale, 1.5), 2), "count": count}
            for place, count in enumerate(timeline["failed"])
            if count
        ],
        "failed_top": failed_top,
        "moves": [
            {
                "x": round(move["begin_s"] / bin_s * scale, 2),
                "width": round(max((move["end_s"] - move["begin_s"]) / bin_s * scale, 2.0), 2),
                "label": "{} → {}".format(move["from"], move["to"]),
            }
            for move in moves
        ],
        "ticks": [
            {"x": round(second / bin_s * scale, 2), "label": f"{second} s"}
            for second in ticks(bins * bin_s)
        ],
    }


def area(values: Sequence[int], peak: int, scale: float, top: float) -> str:
    """Return the SVG path of a stepped area; a bin without anything touches the ground."""
    ground = top + LANE
    parts = [f"M0 {ground:g}"]
    level = 0
    for place, value in enumerate(values):
        if value != level:
            parts.append(f"H{place * scale:.2f}V{ground - LANE * value / peak:.2f}")
            level = value
    parts.append(f"H{len(values) * scale:.2f}V{ground:g}Z")
    return "".join(parts)


def ticks(duration_s: float) -> list[int]:
    """Return about ten round seconds along the axis."""
    step = next(
        (step for step in (1, 2, 5, 10, 15, 30, 60, 120, 300) if duration_s / step <= 12), 600
    )
    return list(range(0, int(duration_s) + 1, step))
