"""The dashboard: its files, and the way into it.

The page itself is open to whoever reaches the door; all that it shows comes from /admin, which is not. A session is one
kind of credentials (`access`), over TCP and through `agentctl dashboard`.
"""

import gzip
import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

import agentd
from agentd.api.access import Access, Scope, author
from agentd.api.lenient import Body, Text
from agentd.api.requests import parse
from agentd.api.services import services
from agentd.api.sessions import TOKEN_SECONDS, cookie_name, require_own_page
from agentd.errors import NoSession, NotFound

FOLDER = Path(agentd.__file__).parent / "ui"
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


class TokenBody(Body):
    """POST /ui/session: the token that `agentctl dashboard` printed."""

    token: Text


async def page(request: Request) -> Response:
    """GET /ui/ and the files that the page asks for."""
    name = request.path_params.get("name") or "index.html"
    path = FOLDER / name
    if path.suffix not in _TYPES or not path.is_file() or path.parent != FOLDER:
        raise NotFound("page", name)
    data = path.read_bytes()
    headers = {**_HEADERS, "ETag": f'W/"{hashlib.sha256(data).hexdigest()[:32]}"', "Vary": "Accept-Encoding"}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        data = gzip.compress(data, 6, mtime=0)
        headers["Content-Encoding"] = "gzip"
    return Response(data, media_type=_TYPES[path.suffix], headers=headers)


async def entrance(request: Request) -> Response:
    """GET /ui: names in the page are relative to /ui/."""
    return RedirectResponse("/ui/", 308)


async def begin(request: Request) -> Response:
    """POST /ui/session: a token becomes a cookie."""
    require_own_page(request.headers)
    request.state.own_page = True
    body = await parse(request, TokenBody, 4096)
    cookie = services(request).sessions.begin(body.token)
    response = JSONResponse({"signed_in": True}, headers={"Cache-Control": "no-store"})
    response.set_cookie(
        cookie_name(request.headers), cookie, httponly=True, samesite="strict", secure=request.url.scheme == "https"
    )
    return response


async def end(request: Request) -> Response:
    """DELETE /ui/session: signing out."""
    require_own_page(request.headers)
    services(request).sessions.end(request.headers)
    response = JSONResponse({"signed_in": False})
    response.delete_cookie(cookie_name(request.headers), httponly=True, samesite="strict")
    return response


async def offer(request: Request) -> Response:
    """POST /admin/dashboard: a token for one browser, good once and for some minutes."""
    await parse(request, Body, 1024)
    s = services(request)
    if getattr(request.state, "own_page", False):
        raise NoSession("a page cannot let in another one; run `agentctl dashboard`")
    token = s.sessions.offer(author(request))
    return JSONResponse({"token": token, "expires_seconds": TOKEN_SECONDS})


async def by_session(request: Request) -> Access | None:
    """What a session's cookie gives where no one has anything by coming in. Raises FromWebPage."""
    session = services(request).sessions.of(request.method, request.headers)
    if session is None:
        return None
    request.state.own_page = True
    return Access(Scope.ADMIN, session.author)
