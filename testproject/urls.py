"""Addresses of the test project."""

from __future__ import annotations

from django.contrib import admin
from django.urls import include, path

from deferred_sessions import health
from deferred_sessions.prometheus import metrics

urlpatterns = [
    path("admin/", admin.site.urls),
    path("healthz", health.view),
    path("metrics", metrics),
    path("probe/", include("testproject.probe")),
    path("", include("testproject.shop.urls")),
]
