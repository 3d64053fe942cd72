"""Addresses of the shop."""

from __future__ import annotations

from django.contrib.auth.views import LogoutView
from django.urls import path

from testproject.shop import views

urlpatterns = [
    path("", views.catalogue, name="catalogue"),
    path("add/<slug:slug>/", views.add, name="add"),
    path("remove/<slug:slug>/", views.remove, name="remove"),
    path("buy/", views.buy, name="buy"),
    path("devices/", views.devices, name="devices"),
    path("devices/elsewhere/", views.log_out_elsewhere, name="log_out_elsewhere"),
    path("devices/<str:handle>/", views.log_out_there, name="log_out_there"),
    path("login/", views.LogIn.as_view(next_page="catalogue"), name="login"),
    path("logout/", LogoutView.as_view(next_page="catalogue"), name="logout"),
]
