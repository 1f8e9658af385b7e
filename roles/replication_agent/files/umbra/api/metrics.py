"""The state of the group as Prometheus metrics, read from the same report as the status."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from umbra.api.report import GroupReport


class ReportCollector(Collector):
    """Turns a report into gauges at each scrape."""

    def __init__(self, report: Callable[[], GroupReport]) -> None:
        self._report = report

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the gauges of one scrape."""
        report = self._report()
        yield GaugeMetricFamily(
            "umbra_protected",
            "1 when every acknowledged thing is on two nodes",
            value=float(report.protected),
        )
        reasons = GaugeMetricFamily(
            "umbra_degraded_reason", "1 for each reason of a degradation", labels=["reason"]
        )
        for reason in report.reasons:
            reasons.add_metric([reason], 1.0)
        yield reasons
        checks = GaugeMetricFamily(
            "umbra_check_passed", "1 when the check of this node passes", labels=["check"]
        )
        for check in report.checks:
            checks.add_metric([check.name], float(check.passed))
        yield checks
        yield GaugeMetricFamily(
            "umbra_epoch", "Epoch of the primary's right to act", value=float(report.epoch)
        )
        if report.coordinator != "static":
            yield GaugeMetricFamily(
                "umbra_automatic_failover_paused",
                "1 while automatic failover is off by an operator's wish",
                value=float(report.paused),
            )
            yield GaugeMetricFamily(
                "umbra_protected_shadows",
                "Shadows that have all that was acknowledged, by the coordinator",
                value=float(len(report.protected_set)),
            )
            state = GaugeMetricFamily(
                "umbra_node_state", "1 for the state that the node is in", labels=["node", "state"]
            )
            for node in report.nodes:
                state.add_metric([node.node, node.state], 1.0)
            yield state
        labels = ["node", "site"]
        primary = GaugeMetricFamily("umbra_node_primary", "1 for the primary", labels=labels)
        reachable = GaugeMetricFamily(
            "umbra_node_reachable", "1 when the node answers", labels=labels
        )
        changes = GaugeMetricFamily(
            "umbra_node_lag_changes", "Mailbox changes that the node lacks", labels=labels
        )
        seconds = GaugeMetricFamily(
            "umbra_node_lag_seconds", "Age of the oldest change that the node lacks", labels=labels
        )
        messages = GaugeMetricFamily(
            "umbra_node_shadow_messages", "Messages in transit held for other nodes", labels=labels
        )
        size = GaugeMetricFamily("umbra_node_shadow_bytes", "Their content in bytes", labels=labels)
        for node in report.nodes:
            key = [node.node, node.site]
            primary.add_metric(key, float(node.role == "primary"))
            reachable.add_metric(key, float(node.reachable))
            changes.add_metric(key, node.lag_changes)
            seconds.add_metric(key, node.lag_s)
            messages.add_metric(key, node.shadow_messages)
            size.add_metric(key, node.shadow_bytes)
        yield from (primary, reachable, changes, seconds, messages, size)
        if report.service_addresses:
            place = GaugeMetricFamily(
                "umbra_service_address",
                "1 when the node has the service address",
                labels=["node", "address"],
            )
            for node in report.nodes:
                for address in report.service_addresses:
                    place.add_metric([node.node, address], float(address in node.service_addresses))
            yield place
