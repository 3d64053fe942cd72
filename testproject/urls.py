"""Addresses of the test project."""

from __future__ import annotations

from django.contrib import admin
from django.urls import include, path

from deferred_sessions import health

urlpatterns = [
    path("admin/", admin.site.urls),
    path("healthz", health.view),
    path("probe/", include("testproject.probe")),
    path("", include("testproject.shop.urls")),
]
