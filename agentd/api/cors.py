"""Web pages that the configuration names may use the API over TCP from a browser (serve.origins); no others may.

What they bring is an API key in a header. Cookies are never theirs: there is no Access-Control-Allow-Credentials.
"""

import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_METHODS = "GET, POST, DELETE"
_SHOWN = "x-agentd-ignored, retry-after"
_MAX_AGE = "600"  # seconds a browser may remember the answer to a preflight
_HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,4096}")


class Cors:
    """ASGI middleware; `app.state` has the services, whose configuration may change."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        origin = headers.get("origin", "").lower()
        if not origin or origin not in scope["app"].state.services.config.serve.origins:
            await self._app(scope, receive, send)
            return
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await Response(status_code=204, headers=_preflight(headers, origin))(scope, receive, send)
            return

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer["Access-Control-Allow-Origin"] = origin
                answer["Access-Control-Expose-Headers"] = _SHOWN
                answer.add_vary_header("Origin")
            await send(message)

        await self._app(scope, receive, marked)


def _preflight(headers: Headers, origin: str) -> dict[str, str]:
    asked = headers.get("access-control-request-headers", "")
    answer = {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Methods": _METHODS,
        "Access-Control-Max-Age": _MAX_AGE,
        "Vary": "Origin",
    }
    if _HEADER_NAMES.fullmatch(asked):  # clients send headers of their own with every request; none of them does harm
        answer["Access-Control-Allow-Headers"] = asked
    if headers.get("access-control-request-private-network") == "true":
        answer["Access-Control-Allow-Private-Network"] = "true"
    return answer
