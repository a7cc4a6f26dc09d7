"""Pictures of the dashboard for the docs, from a daemon that serves a tiny model and has learned twice; and what the
page costs: time to its first paint, bytes, and memory of the daemon.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from agentd.api.ui import FOLDER
from agentd.ctl.proxy import proxy
from tools import tiny_model
from tools.browser import Browser, Page
from tools.daemon import ROOT, DaemonProcess, end_daemons_on_sigterm, eventually

_GOOD = ("A warm and funny film", "Splendid, and never a minute too long", "It has wit and heart", "A joy to watch")
_BAD = (
    "Dull, loud and far too long",
    "I wanted my two hours back",
    "A tired story without wit",
    "A mess to sit through",
)
_ENDS = (
    "with a cast that knows it",
    "from the first scene on",
    "even for its fans",
    "and so is the music",
    "all in all",
)
_LENIENT = {"alpha": 0.4, "min_holdout": 5, "max_drift": 100, "max_skill_loss": 1}
_PROMPT = "Did the reviewer like this movie? Answer yes or no.\n\n{text}"
_RUNS = 9  # loads of the page whose median is told
_PAGES = ("", "review", "learning", "learning/1", "revisions", "tasks", "quarantine", "events")
_LOOKS = 5  # at the daemon's memory, whose median is told


def reviews(n: int) -> Iterator[tuple[str, str]]:
    """(text, label) of made-up reviews."""
    for i in range(n):
        texts = _GOOD if i % 2 else _BAD
        yield f"{texts[i // 2 % 4]}, {_ENDS[i // 8 % 5]}. ({i})", "yes" if i % 2 else "no"


def learn(daemon: DaemonProcess, rows: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"task": "reviews", "text": text, "label": label}) for text, label in rows]
    daemon.post("/v1/examples", "\n".join(lines).encode())
    daemon.post("/admin/adapt", {}, admin=True)
    eventually(lambda: not daemon.status()["pass"] and daemon.status()["last_pass"], 120)


def judge(daemon: DaemonProcess, rows: list[tuple[str, str]]) -> None:
    for text, label in rows:
        answer = daemon.ask(_PROMPT.format(text=text), metadata={"task": "reviews"}).json
        daemon.post("/v1/feedback", {"inference_id": answer["id"], "kind": "label", "value": label})


def show(page: Page, name: str) -> None:
    page.run(f"location.hash = '#/{name}'")
    page.wait("!!document.querySelector('main h1')")
    page.run("new Promise((done) => setTimeout(done, 1500))")  # charts are drawn, and toasts are gone


def shoot(page: Page, name: str, path: Path) -> None:
    """A picture of at most 256 colours, which are more than the page has."""
    show(page, name)
    page.screenshot(path)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(256).save(path, optimize=True)


def paints(page: Page, address: str) -> tuple[list[float], list[float]]:
    """Milliseconds until the page shows something, and until it shows what is served, of several loads with an empty
    cache: first and largest contentful paint."""
    first: list[float] = []
    largest: list[float] = []
    for _ in range(_RUNS):
        page.open("about:blank")
        page.forget_files()
        page.open(address)
        page.wait("!!document.querySelector('main h1')")
        page.run("new Promise((done) => setTimeout(done, 500))")
        first.append(page.wait("performance.getEntriesByName('first-contentful-paint')[0]?.startTime"))
        largest.append(
            page.run(
                "new Promise((done) => new PerformanceObserver((list) => done(list.getEntries().at(-1).startTime))"
                ".observe({type: 'largest-contentful-paint', buffered: true}))"
            )
        )
    return first, largest


def transferred(page: Page, address: str) -> tuple[int, int]:
    """How many files a browser with an empty cache asks for when it opens every page, and their bytes with headers."""
    page.open("about:blank")
    page.forget_files()
    page.open(address)
    for name in _PAGES:
        show(page, name)
    sizes = page.run(
        "[...performance.getEntriesByType('resource'), ...performance.getEntriesByType('navigation')]"
        ".filter((each) => each.name.includes('/ui/')).map((each) => each.transferSize)"
    )
    return len(sizes), sum(sizes)


def memory(daemon: DaemonProcess) -> float:
    """MB (PSS) of the daemon's process."""
    looks: list[float] = []
    for _ in range(_LOOKS):
        looks.append(daemon.status()["memory"]["processes"]["daemon"] / 1e6)
        time.sleep(0.5)
    return statistics.median(looks)


def main() -> None:
    end_daemons_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "docs", help="where to (default: docs)")
    options = parser.parse_args()
    settings: dict[str, Any] = {
        "tasks": {"reviews": {"choices": ["yes", "no"], "prompt": _PROMPT}},
        "adapt": {"trial": {"duration": "300ms", "max_latency": 100}, "gate": _LENIENT},
    }
    rows = list(reviews(300))
    with tempfile.TemporaryDirectory(prefix="agentd-") as folder:
        model = tiny_model.write(Path(folder) / "tiny.gguf")
        with DaemonProcess(model, settings) as daemon, proxy(daemon.ctl) as port, Browser() as browser:
            daemon.start()
            judge(daemon, rows[:20])
            learn(daemon, rows[20:150])
            judge(daemon, rows[150:170])
            learn(daemon, rows[170:260])
            judge(daemon, rows[260:280])
            daemon.ask(_PROMPT.format(text=rows[281][0]), metadata={"task": "reviews"})
            before = memory(daemon)
            page = browser.page()
            page.size(1100, 760)
            token = daemon.post("/admin/dashboard", admin=True).json["token"]
            page.open(f"http://127.0.0.1:{port}/ui/#key={token}")
            page.wait("!!document.querySelector('main h1')")
            page.media(prefers_color_scheme="light")
            shoot(page, "", options.folder / "dashboard-light.png")
            page.media(prefers_color_scheme="dark")
            page.size(720, 560)
            shoot(page, "review", options.folder / "dashboard-dark.png")
            page.media(prefers_color_scheme="light")
            page.size(360, 560, mobile=True)
            shoot(page, "revisions", options.folder / "dashboard-phone.png")
            page.size(1100, 760)
            address = f"http://127.0.0.1:{port}/ui/"
            files, sent = transferred(page, address)
            after = memory(daemon)
            print(f"the daemon takes {after:.1f} MB (PSS) with every page opened, {after - before:+.1f} than before")
            plain = sum(path.stat().st_size for path in FOLDER.iterdir())
            print(f"{files} files: {plain:,} bytes, {sent:,} as they are sent, headers included")
            for name, times in zip(("first", "largest"), paints(page, address), strict=True):
                middle, worst = statistics.median(times), max(times)
                print(f"{name} contentful paint: {middle:.0f} ms (median of {_RUNS} loads), {worst:.0f} ms at most")


if __name__ == "__main__":
    main()
