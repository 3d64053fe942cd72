"""What the shop sells: kept in code, so that the only writes are those of sessions."""

from __future__ import annotations

from typing import Final, NamedTuple


class Product(NamedTuple):
    """Something to put into the cart."""

    slug: str
    name: str
    note: str
    cents: int
    hue: int
    """Of the picture, in degrees."""
    picture: str
    """An SVG path in a box of 48 by 48."""


PRODUCTS: Final = (
    Product(
        "kettle",
        "Enamel kettle",
        "Two litres, and a whistle you can hear in the garden.",
        3900,
        12,
        "M12 20h20l4 18H8zM16 20c0-8 12-8 12 0M34 24l8-4-2 10zM22 12h4v-4h-4z",
    ),
    Product(
        "lamp",
        "Reading lamp",
        "Warm light on the page, and nowhere else.",
        5400,
        45,
        "M14 8h20l6 16H8zM22 24h4v14h-4zM14 38h20v4H14z",
    ),
    Product(
        "notebook",
        "Ruled notebook",
        "Opens flat. 192 pages, one of them left for tomorrow.",
        1250,
        205,
        "M12 6h24v36H12zM16 6v36M21 15h10M21 21h10M21 27h7",
    ),
    Product(
        "fern",
        "Potted fern",
        "Asks for water once a week and for nothing else.",
        1800,
        140,
        "M16 30h16l-3 12H19zM24 30C24 18 14 14 8 14c2 8 8 12 16 12"
        "M24 26c0-10 8-16 16-16-1 9-7 14-16 14",
    ),
    Product(
        "scarf",
        "Lambswool scarf",
        "Long enough to be lent, warm enough to be missed.",
        4600,
        330,
        "M10 10c8 6 20 6 28 0l2 6c-9 6-23 6-32 0zM28 17l6 22h-8l-3-20z",
    ),
    Product(
        "teapot",
        "Stoneware teapot",
        "For three cups, or for one person with time.",
        3200,
        265,
        "M12 18h20c4 14-2 20-10 20s-14-6-10-20zM32 22c8-2 8 10-1 9M12 22l-6-4v8zM19 14h6v4h-6z",
    ),
)
BY_SLUG: Final = {product.slug: product for product in PRODUCTS}
