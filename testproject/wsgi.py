"""The WSGI application of the test project: the shop, with the live figures beside it."""

from __future__ import annotations

import os

from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "testproject.settings")
_django = get_wsgi_application()

from testproject.shop.figures import with_figures  # noqa: E402 - needs the settings

application = with_figures(_django)
