"""The transport's metrics; labels are at most a peer's name or a short reason."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

ACCEPTED = Counter("umbra_messages_accepted_total", "Messages answered with acceptance", ["copy"])
REFUSED = Counter(
    "umbra_messages_refused_total", "Messages answered with a temporary refusal", ["reason"]
)
SHADOW_SECONDS = Histogram(
    "umbra_shadow_seconds",
    "Time from end of message to the answer, for messages that a shadow took",
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
)
SHADOW_FAILED = Counter(
    "umbra_shadow_failed_total", "Shadow messages that a peer did not take", ["peer", "code"]
)
STORED = Counter("umbra_store_messages_total", "Messages made durable in the local store")
COMMITS = Counter("umbra_store_commits_total", "Transactions of the local store, one fsync each")
STORE_FULL = Counter("umbra_store_full_total", "Messages that the local store had no room for")
DISCARDED = Counter(
    "umbra_shadow_discarded_total",
    "Shadow messages discarded because they left the primary's queue",
)
OUTSTANDING = Gauge(
    "umbra_shadow_outstanding", "Messages in the queue that a holder keeps a copy of", ["holder"]
)
BACK_FILLED = Counter("umbra_back_filled_total", "Messages accepted alone that a shadow has now")
RESUBMITTED = Counter("umbra_resubmitted_total", "Shadow messages resubmitted after a promotion")
DUPLICATES = Counter(
    "umbra_duplicates_dropped_total",
    "Deliveries and resubmissions left out because the recipient's mailbox had the message",
)
ONCE_REFUSED = Counter(
    "umbra_once_refused_total", "Questions of deliveries that were not what they must be"
)
NET_MISSED = Counter(
    "umbra_safety_net_missed_total", "Messages that this node could not keep after their delivery"
)
NET_PURGED = Counter("umbra_safety_net_purged_total", "Messages removed as too old or too much")
MILTER_ERRORS = Counter(
    "umbra_milter_protocol_errors_total", "Milter connections closed for a protocol error"
)
