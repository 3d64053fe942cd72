"""The figures of this host for Prometheus; needs the extra `[prometheus]`.

    path("metrics", deferred_sessions.prometheus.metrics)

Imported by projects, never by the package. Whichever worker answers, it answers for all
processes of the host, so no multiprocess mode is needed. Invariant: there are figures only,
no session key and nothing of any session.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from django.http import HttpRequest, HttpResponse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe

from deferred_sessions import statistics
from deferred_sessions.exceptions import DeferredSessionsError
from deferred_sessions.statistics import Counter, Gauge

try:
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError(
        "deferred_sessions.prometheus needs prometheus-client: "
        "pip install 'django-deferred-sessions[prometheus]'"
    ) from error

PREFIX: Final = "deferred_sessions"


class SessionsCollector(Collector):
    """Collects the figures of this host at each scrape; for a registry of the project's own."""

    def collect(self) -> Iterator[Metric]:
        """Yield a metric for each counter and each gauge."""
        figures = statistics.read()
        for counter, count in figures.counters.items():
            yield CounterMetricFamily(metric_name(counter), _help(counter), value=count)
        for gauge, value in figures.gauges().items():
            yield GaugeMetricFamily(metric_name(gauge), _help(gauge), value=value)

    def describe(self) -> Iterator[Metric]:
        """Yield nothing: registering must not open the store, which fork comes after."""
        return iter(())


@never_cache
@require_safe
def metrics(_request: HttpRequest) -> HttpResponse:
    """Answer a scrape; 503 if the store of this host cannot be used.

    Anybody who gets to the view may see the figures: keep it from the public, as any such
    endpoint. It uses neither sessions nor the database.
    """
    registry = CollectorRegistry()
    registry.register(SessionsCollector())
    try:
        text = generate_latest(registry)
    except DeferredSessionsError as error:
        return HttpResponse(f"{error}\n", status=503, content_type="text/plain")
    return HttpResponse(text, content_type=CONTENT_TYPE_LATEST)


def metric_name(figure: Counter | Gauge) -> str:
    """Return what Prometheus calls `figure`; to counters it adds `_total`."""
    return f"{PREFIX}_{figure.name.lower()}"


def _help(figure: Counter | Gauge) -> str:
    return f"{figure.name.capitalize().replace('_', ' ')}; see the README."
