"""The shop: a catalogue, a cart in the session, and a till."""

from __future__ import annotations

import os
import time
from typing import Any

from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.contrib.auth.views import LoginView
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST

from deferred_sessions.handles import handle_of
from deferred_sessions.models import Session
from deferred_sessions.session_page import pages_of
from testproject.shop.catalogue import BY_SLUG, PRODUCTS


def catalogue(request: HttpRequest) -> HttpResponse:
    """Show what there is, and what is in the cart."""
    cart = request.session.get("cart", {})
    lines = [
        {"product": BY_SLUG[slug], "count": count, "cents": BY_SLUG[slug].cents * count}
        for slug, count in cart.items()
        if slug in BY_SLUG
    ]
    return render(
        request,
        "shop/catalogue.html",
        {
            "products": PRODUCTS,
            "lines": lines,
            "total": sum(line["cents"] for line in lines),
            "count": sum(line["count"] for line in lines),
            "worker": os.getpid(),
        },
    )


@require_POST
def add(request: HttpRequest, slug: str) -> HttpResponse:
    """Put one more into the cart."""
    if slug in BY_SLUG:
        _change(request, slug, +1)
    return redirect("catalogue")


@require_POST
def remove(request: HttpRequest, slug: str) -> HttpResponse:
    """Take one out of the cart."""
    _change(request, slug, -1)
    return redirect("catalogue")


@require_POST
def buy(request: HttpRequest) -> HttpResponse:
    """Empty the cart; nothing is delivered."""
    if request.session.pop("cart", None):
        messages.success(request, "Thank you! Nothing will be delivered.")
    return redirect("catalogue")


@login_required
def devices(request: HttpRequest) -> HttpResponse:
    """Show where the customer is logged in."""
    sessions = Session.objects.for_user(request.user).order_by("-written_at")
    own = handle_of(str(request.session.session_key))
    pages = sorted(pages_of(sessions, time.time()), key=lambda page: page.handle != own)
    context = {"pages": pages, "own": own, "worker": os.getpid()}
    return render(request, "shop/devices.html", context)


@login_required
@require_POST
def log_out_there(request: HttpRequest, handle: str) -> HttpResponse:
    """End one of the customer's own sessions."""
    if Session.objects.for_user(request.user).by_handles([handle]).revoke():
        messages.success(request, "Logged out there.")
    return redirect("devices")


@login_required
@require_POST
def log_out_elsewhere(request: HttpRequest) -> HttpResponse:
    """End all of the customer's sessions but this one."""
    count = Session.objects.revoke_all(request.user, keep=request.session.session_key)
    messages.success(request, f"Logged out in {count} other places.")
    return redirect("devices")


class LogIn(LoginView):
    """The till asks who you are."""

    template_name = "shop/login.html"

    def get_context_data(self, **context: Any) -> dict[str, Any]:
        """Add what the frame of the page shows."""
        return super().get_context_data(worker=os.getpid(), **context)


def _change(request: HttpRequest, slug: str, by: int) -> None:
    cart = request.session.get("cart", {})
    cart[slug] = cart.get(slug, 0) + by
    if cart[slug] <= 0:
        del cart[slug]
    request.session["cart"] = cart
