"""What the mailbox half measures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING
from weakref import WeakSet

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from umbra.mailbox.mirror import PeerMirror

BUCKETS = (
    0.002,
    0.004,
    0.006,
    0.008,
    0.012,
    0.016,
    0.024,
    0.04,
    0.08,
    0.16,
    0.32,
    0.64,
    1.28,
    2.56,
    5.12,
    20.48,
    81.92,
)

SYNC_SECONDS = Histogram(
    "umbra_mirror_sync_seconds", "Duration of one user's sync", ["peer"], buckets=BUCKETS
)
WAIT_SECONDS = Histogram(
    "umbra_mirror_wait_seconds",
    "How long a change waited for the mirror",
    ["peer"],
    buckets=BUCKETS,
)
SYNCS = Counter("umbra_mirror_syncs_total", "Syncs by outcome", ["peer", "outcome"])
COALESCED = Counter(
    "umbra_mirror_coalesced_total", "Changes that shared a sync with an earlier one", ["peer"]
)
NOTIFICATIONS = Counter(
    "umbra_mirror_notifications_total", "Dovecot's notifications by answer", ["answer"]
)
FORETOLD = Counter(
    "umbra_mirror_foretold_total",
    "Syncs by whether what the peer would say was foretold",
    ["peer", "how"],
)
CARRIED = Counter(
    "umbra_mirror_carried_bytes_total", "Bytes of dsync streams", ["peer", "direction"]
)
VERIFIED = Counter(
    "umbra_mirror_verified_total", "Comparisons of one user by outcome", ["peer", "outcome"]
)
COPIES_REMOVED = Counter(
    "umbra_mirror_copies_removed_total",
    "Messages removed here before a merge because the primary had them too",
)
EXPUNGED = Counter(
    "umbra_mirror_expunged_total",
    "Messages that were expunged while they were copied here, so that the sync failed",
)
DIFFERENT = Gauge(
    "umbra_mirror_different_users", "Users who differed when they were last compared", ["peer"]
)
REFUSED = Counter("umbra_mirror_refused_total", "dsync connections refused", ["side"])

_mirrors: WeakSet[PeerMirror] = WeakSet()


def watch(mirror: PeerMirror) -> None:
    """Show the gauges of ``mirror`` for as long as it lives."""
    _mirrors.add(mirror)


class _Gauges(Collector):
    def collect(self) -> Iterable[Metric]:
        """Read the gauges when they are asked for, so that they cost nothing in between."""
        rows = {
            "waiting": ("Changes that wait for the mirror", lambda mirror: mirror.waiting),
            "changed_users": (
                "Users with changes that the peer lacks and nobody waits for",
                lambda mirror: mirror.behind,
            ),
            "running": ("Syncs that run", lambda mirror: mirror.running),
            "lag_seconds": (
                "Age of the oldest change that the peer lacks",
                lambda mirror: mirror.lag()[1],
            ),
            "protected": (
                "1 if every change waits for the peer and nothing is noted",
                lambda mirror: mirror.phase.value == "protected",
            ),
            "waited_for": (
                "1 if changes shall wait for the peer, 0 if it follows",
                lambda mirror: mirror.limit.waits,
            ),
            "catchup_done": ("Users synced since the catch-up began", lambda mirror: mirror.done),
            "catchup_total": ("Users that the catch-up began with", lambda mirror: mirror.total),
            "suspended": (
                "1 if the mirror of all mailboxes is suspended",
                lambda mirror: mirror.limit.value == "recording",
            ),
            "suspended_users": (
                "Users whose mirror is suspended",
                lambda mirror: mirror.suspended,
            ),
            "findings": ("Users that cannot be mirrored", lambda mirror: len(mirror.findings)),
        }
        for name, (text, value) in rows.items():
            family = GaugeMetricFamily(f"umbra_mirror_{name}", text, labels=["peer"])
            for mirror in list(_mirrors):
                family.add_metric([mirror.peer], float(value(mirror)))  # type: ignore[no-untyped-call]
            yield family


REGISTRY.register(_Gauges())
