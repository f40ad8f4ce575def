"""What a server counts, in Prometheus' own words."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Of one server; none of it is global."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "selfwright_requests",
            "Requests that were answered.",
            ("method", "route", "status"),
            registry=registry,
        )
        self.seconds = Histogram(
            "selfwright_request_seconds",
            "From a request's head to the end of its answer.",
            ("route",),
            buckets=SECONDS,
            registry=registry,
        )
        self.busy = Gauge("selfwright_requests_in_flight", "Requests now.", registry=registry)
        self.sessions = Gauge("selfwright_sessions", "Sessions that are open.", registry=registry)
        self.games = Gauge("selfwright_games", "Playground games.", registry=registry)
        self.tokens = Counter(
            "selfwright_tokens", "Tokens read and sampled.", ("kind",), registry=registry
        )
        self.refusals = Counter(
            "selfwright_refusals", "Requests refused, by reason.", ("reason",), registry=registry
        )
        self.swaps = Counter(
            "selfwright_adapters", "Adapters offered, by result.", ("result",), registry=registry
        )

    def text(self) -> bytes:
        return generate_latest(self._registry)
