"""The shop, and "where you are logged in", in real browsers."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Person, Shop

pytestmark = pytest.mark.django_db(transaction=True)
PATIENCE = 200  # clicks


def test_a_cart_fills_across_workers_and_outlives_the_login(
    person: Callable[..., Person], shop: Shop
) -> None:
    visitor = person()
    page = visitor.go("/")
    workers: set[str] = set()
    number = 0
    while len(workers) < 2 and number < PATIENCE:  # which of them is asked, the kernel decides
        number += 1
        page.get_by_label("Add Reading lamp to the cart").click()
        expect(page.locator(".cart h2 .badge")).to_have_text(str(number))
        workers.add(page.locator("[data-worker]").inner_text())
    assert len(workers) == 2
    visitor.log_in("ann")
    expect(page.locator(".who")).to_have_text("ann")
    expect(page.locator(".cart h2 .badge")).to_have_text(str(number))
    page.get_by_role("button", name="Buy").click()
    expect(page.get_by_role("status")).to_contain_text("Thank you")


def test_revoking_in_one_browser_logs_the_other_out_at_its_next_click(
    person: Callable[..., Person], shop: Shop
) -> None:
    phone, laptop = person(user_agent="Phone/1.0"), person(user_agent="Laptop/2.0")
    phone.log_in("ann")
    laptop.log_in("ann")
    phone.page.get_by_label("Add Potted fern to the cart").click()  # not flushed yet
    expect(phone.page.locator(".cart h2 .badge")).to_have_text("1")

    page = laptop.go("/devices/")
    devices = page.locator(".devices li")
    expect(devices).to_have_count(2)
    expect(devices.filter(has_text="Laptop/2.0")).to_contain_text("this one")
    expect(devices.filter(has_text="Phone/1.0")).to_contain_text("127.0.0.1")
    devices.filter(has_text="Phone/1.0").get_by_role("button", name="Log out there").click()
    expect(devices).to_have_count(1)

    phone.go("/")
    expect(phone.page.get_by_role("link", name="Log in")).to_be_visible()
    expect(phone.page.locator(".cart .empty")).to_be_visible()
    laptop.go("/")
    expect(laptop.page.locator(".who")).to_have_text("ann")


def test_logging_out_everywhere_else(person: Callable[..., Person], shop: Shop) -> None:
    people = [person(user_agent=f"Browser/{n}.0") for n in range(3)]
    for each in people:
        each.log_in("ben")
    other = person()
    other.log_in("cleo")
    page = people[0].go("/devices/")
    page.get_by_role("button", name="Log out everywhere else").click()
    expect(page.get_by_role("status")).to_contain_text("2 other places")
    for each in people[1:]:
        assert re.search("/login/", each.go("/devices/").url)
    for each, name in ((people[0], "ben"), (other, "cleo")):
        expect(each.go("/").locator(".who")).to_have_text(name)


def test_no_page_of_the_shop_has_a_key(person: Callable[..., Person], shop: Shop) -> None:
    people = [person(), person()]
    for each in people:
        each.log_in("ann")
        each.go("/devices/")
        each.go("/")
    for key in shop.session_keys():
        for each in people:
            assert not any(key[:9] in text for text in each.html + each.addresses)
