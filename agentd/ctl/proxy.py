"""What is sent to a loopback port goes to the admin socket, marked as a browser's, for as long as `agentctl dashboard`
runs.
"""

import http.client
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from agentd.ctl.client import Daemon, UnixConnection
from agentd.ctl.errors import UsageError

_BROWSER = "x-agentd-browser"  # the daemon gives such a request what its session may do, and no more
_HOSTS = ("127.0.0.1", "localhost", "::1")
_OF_THE_CONNECTION = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
_MAX_BODY = 1 << 24  # bytes


@contextmanager
def proxy(daemon: Daemon, port: int = 0) -> Iterator[int]:
    """Passes on what comes to a loopback port; yields the port. Raises UsageError where that is taken."""

    class Handler(_Handler):
        admin = daemon

    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise UsageError(f"port {port} cannot be used: {error.strerror}; name another with --port") from None
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    """Passes every request on to the admin socket, marked as a browser's, and the answer back as it comes."""

    admin: Daemon
    protocol_version = "HTTP/1.1"
    timeout = 75  # seconds for which an idle connection is kept

    def _pass_on(self) -> None:
        if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in _HOSTS:
            return self._refuse(403, "this address is for 127.0.0.1 alone")  # a name that was pointed at us
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not length.isdigit() or int(length) > _MAX_BODY:
            return self._refuse(413, "a body needs a length, and is too long here")
        body = self.rfile.read(int(length))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _OF_THE_CONNECTION}
        connection = UnixConnection(self.admin.path, self.admin.timeout)
        try:
            connection.request(self.command, self.path, body or None, {**headers, _BROWSER: "1"})
            self._answer(connection.getresponse())
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        except (OSError, http.client.HTTPException):
            self._refuse(502, "the daemon does not answer; is it running?")
        finally:
            connection.close()
        return None

    do_GET = do_HEAD = do_POST = do_DELETE = _pass_on  # noqa: N815  http.server's names

    def _answer(self, response: http.client.HTTPResponse) -> None:
        self.send_response_only(response.status)
        for name, value in response.getheaders():
            if name.lower() not in _OF_THE_CONNECTION:
                self.send_header(name, value)
        bodyless = self.command == "HEAD" or response.status in (204, 304)
        if response.getheader("Content-Length") is None and not bodyless:
            self.send_header("Connection", "close")  # a stream ends with its connection
            self.close_connection = True
        self.end_headers()
        while part := response.read1(1 << 16):
            self.wfile.write(part)

    def _refuse(self, status: int, message: str) -> None:
        data = json.dumps({"error": {"message": message, "type": "server_error", "code": "proxy"}}).encode()
        self.close_connection = True
        with suppress(OSError):
            self.send_response_only(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        return None
