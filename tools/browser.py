"""A real Chromium without a window, driven through its DevTools protocol over a pipe: no driver, no library.

https://chromedevtools.github.io/devtools-protocol/. Messages are JSON, each ended by a zero byte; the browser reads
file descriptor 3 and writes 4.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_PATIENCE = 60.0  # seconds for one answer of the browser
_KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowDown": 40, "ArrowUp": 38}
_SHIFT = 8  # of Input.dispatchKeyEvent's modifiers


class BrowserFailed(Exception):
    """The browser did not do what it was asked, or is gone."""


def executable() -> str | None:
    """The browser of this machine; AGENTD_TEST_BROWSER names another."""
    names = (os.environ["AGENTD_TEST_BROWSER"],) if "AGENTD_TEST_BROWSER" in os.environ else NAMES
    return next((path for name in names if (path := shutil.which(name))), None)


class Browser:
    """A browser with a profile of its own that is gone afterwards. Raises BrowserFailed where there is none."""

    def __init__(self) -> None:
        path = executable()
        if path is None:
            raise BrowserFailed("there is no Chromium here (on Debian: apt install chromium)")
        self._folder = tempfile.mkdtemp(prefix="agentd-browser-")
        reads, self._to = os.pipe()
        self._from, writes = os.pipe()
        command = [path, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={self._folder}"]
        command += ["--no-first-run", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
        command += [
            "--disable-extensions",
            "--disable-sync",
            "--disable-component-update",
            "--no-default-browser-check",
        ]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []

        def place() -> None:  # in the child: the two ends where the browser looks for them
            low, high = os.dup(reads), os.dup(writes)
            os.dup2(low, 3)
            os.dup2(high, 4)

        self._process = subprocess.Popen(
            [*command, "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=place,
            env={**os.environ, "HOME": self._folder},
        )
        os.close(reads)
        os.close(writes)
        self._buffer, self._last = b"", 0
        self.listeners: list[Callable[[dict[str, Any]], None]] = []

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for end in (self._to, self._from):
            os.close(end)
        try:
            self._process.wait(5)  # it ends when its pipe does
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def page(self) -> "Page":
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        return Page(self, session)

    def call(self, method: str, parameters: dict[str, Any] | None = None, session: str | None = None) -> dict[str, Any]:
        """The result of a command. Raises BrowserFailed."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters or {}}
        message |= {"sessionId": session} if session else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _PATIENCE
        while (answer := self._read(deadline)).get("id") != self._last:
            pass
        if "error" in answer:
            raise BrowserFailed(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _read(self, deadline: float) -> dict[str, Any]:
        """The next message; events go to the listeners on the way."""
        while b"\0" not in self._buffer:
            if not select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise BrowserFailed(f"the browser did not answer within {_PATIENCE:g} s")
            piece = os.read(self._from, 1 << 16)
            if not piece:
                raise BrowserFailed("the browser is gone")
            self._buffer += piece
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            for listener in self.listeners:
                listener(message)
        return message


class Page:
    """One tab. `problems` are errors of its console, exceptions of its scripts, and violations of its policy."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.problems: list[str] = []
        self.clicked: list[str] = []  # names of controls
        browser.listeners.append(self._note)
        for domain in ("Page", "Runtime", "Log", "Audits"):
            self._call(f"{domain}.enable")

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, parameters, self._session)

    def _note(self, message: dict[str, Any]) -> None:
        if message.get("sessionId") != self._session:
            return
        said = message["params"]
        match message["method"]:
            case "Runtime.exceptionThrown":
                details = said["exceptionDetails"]
                self.problems.append(details.get("exception", {}).get("description") or details["text"])
            case "Runtime.consoleAPICalled" if said["type"] in ("error", "assert"):
                self.problems.append(" ".join(str(each.get("value", each.get("description"))) for each in said["args"]))
            case "Log.entryAdded" if said["entry"]["level"] == "error" or said["entry"]["source"] == "security":
                self.problems.append(f"{said['entry']['text']} {said['entry'].get('url', '')}")
            case "Audits.issueAdded" if said["issue"]["code"] == "ContentSecurityPolicyIssue":
                self.problems.append(json.dumps(said["issue"]["details"]))

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)

    def size(self, width: int, height: int, *, scale: float = 1, mobile: bool = False) -> None:
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )

    def forget_files(self) -> None:
        """The next page finds an empty cache."""
        self._call("Network.clearBrowserCache")

    def media(self, **features: str) -> None:
        """E.g. prefers_color_scheme="dark"."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self._call("Emulation.setEmulatedMedia", features=named)

    def run(self, script: str) -> Any:
        """The value of an expression, or of what it promises. Raises BrowserFailed with its exception."""
        answer = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise BrowserFailed(details.get("exception", {}).get("description") or details["text"])
        return answer["result"].get("value")

    def wait(self, script: str, timeout: float = 20.0) -> Any:
        """The first true value of an expression. Raises BrowserFailed with what the page shows instead."""
        deadline = time.monotonic() + 5 * timeout  # as tools.daemon.eventually: only what never happens is a fault
        while not (value := self.run(script)):
            if time.monotonic() > deadline:
                raise BrowserFailed(f"{script} did not come true; {self.problems}; the page:\n{self.text()[:3000]}")
            time.sleep(0.05)
        return value

    def text(self, selector: str = "body") -> str:
        return str(self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def has(self, text: str, selector: str = "body", timeout: float = 20.0) -> None:
        """Waits until the page shows a text."""
        self.wait(
            f"(document.querySelector({json.dumps(selector)})?.innerText ?? '').includes({json.dumps(text)})", timeout
        )

    def click(self, name: str, role: str = "button, a, summary, label, select", within: str = "body") -> None:
        """A real click in the middle of the first visible control whose name begins with this one."""
        top, roles, start = json.dumps(within), json.dumps(role), json.dumps(name)
        found = (
            f"[...(document.querySelector({top})?.querySelectorAll({roles}) ?? [])].find((each) =>"
            " each.checkVisibility() && !each.disabled"
            f" && (each.ariaLabel || each.innerText || '').trim().startsWith({start}))"
        )
        self.wait(f"Boolean({found})")
        self.clicked.append(name)
        self.run(f"{found}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box = self.run(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({found}.getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def press(self, key: str, *, shift: bool = False) -> None:
        text = "\r" if key == "Enter" else key if len(key) == 1 else ""
        code = _KEYS.get(key, ord(key[0].upper()))
        common = {"key": key, "windowsVirtualKeyCode": code, "modifiers": _SHIFT if shift else 0}
        self._call(
            "Input.dispatchKeyEvent",
            type="keyDown" if text else "rawKeyDown",
            **common,
            **({"text": text} if text else {}),
        )
        self._call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        self._call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        data = self._call("Page.captureScreenshot", format="png", optimizeForSpeed=False)["data"]
        path.write_bytes(base64.b64decode(data))
