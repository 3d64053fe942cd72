"""The cookie that tells the director to which node a visitor belongs.

Set by the middleware, for directors that set none by themselves. Invariant: it holds the
node's public name and nothing else; who forges it reaches another node, and no more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.http import HttpRequest
from django.http.response import HttpResponseBase


class NodeCookie:
    """Names this node to visitors who have a session."""

    def __init__(self, name: str, node: str, attributes: Callable[[], dict[str, Any]]) -> None:
        self.name = name
        self._node = node
        self._attributes = attributes

    def mark(self, request: HttpRequest, response: HttpResponseBase) -> None:
        """Set the cookie, unless the visitor has it, or no session that was used.

        A page that used no session may be cached for everybody, so nothing is set there; the
        session engine has made one that did vary by cookie.
        """
        session: Any = request.session
        if request.COOKIES.get(self.name) == self._node or session.is_empty():
            return
        if session.accessed or session.modified:
            response.set_cookie(self.name, self._node, **self._attributes())
