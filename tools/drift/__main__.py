"""A LeNet-5 meets rotated images: labels arrive as feedback, the daemon adapts by itself, and accuracy comes back.

A real daemon on a real socket, with configs/drift.yaml; every figure is measured in this run. Images are those of
Fashion-MNIST (Debian's dataset-fashion-mnist, or a folder with its four files), or scikit-learn's digits where there
are none.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from agentd.ctl.errors import CtlError
from agentd.engine.int8 import model as int8_model
from agentd.ids import epoch
from tools.bench.paper.int8_data import Images, digits, load, rotated
from tools.daemon import ROOT, DaemonProcess, ToolFailed, end_daemons_on_sigterm
from tools.drift import model
from tools.drift.camera import Camera, Seen
from tools.drift.plot import Point, draw, points

CONFIG = ROOT / "configs" / "drift.yaml"
WINDOW = 100  # answers in a point of the curve
PAUSE = 1.0  # seconds between windows: the camera rests, and a pass may begin
LONGEST_PAUSE = 60.0  # seconds that it rests until that pass has ended, on a machine that is slow or busy
LABELLED = 0.6  # of the answers get a label
RECOVERED = 0.5  # of what was lost must come back


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.drift", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="a folder with Fashion-MNIST's four files")
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits, whatever data there is")
    parser.add_argument("--angle", type=int, default=45, help="degrees by which the camera is turned (default: 45)")
    parser.add_argument("--upright", type=int, default=4, metavar="N", help="windows before that (default: 4)")
    parser.add_argument("--turned", type=int, default=24, metavar="N", help="windows after it (default: 24)")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of the float model (default: 1500)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curve here, as PNG or SVG (matplotlib)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    end_daemons_on_sigterm()
    console = Console(highlight=False)
    torch.set_num_threads(1)  # the daemon needs the other core, and small batches gain little from it
    images = digits() if options.digits else load(options.data)
    with tempfile.TemporaryDirectory(prefix="agentd-drift-") as folder:
        try:
            figures = Drift(console, options, images, Path(folder)).run()
        except (ToolFailed, CtlError) as error:
            console.print(f"[red]{error}[/red]")
            return 1
        except subprocess.CalledProcessError as error:
            console.print(f"[red]{error.stderr.strip()}[/red]")
            return 1
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if figures["recovered"] >= RECOVERED else 1


class Drift:
    def __init__(self, console: Console, options: argparse.Namespace, images: Images, folder: Path) -> None:
        self._console, self._options, self._images, self._folder = console, options, images, folder
        self._names = model.classes(images)
        self._seen: list[Seen] = []
        self._shown: list[tuple[Tensor, int]] = []
        self._random = random.Random(0)
        self._stream = self._images_in_turn()
        self._began = self._epoch = 0.0

    def run(self) -> dict[str, Any]:
        say, options = self._console.print, self._options
        say(f"[bold]agentd[/bold]: a classifier that follows its drifting world ({self._images.name})\n")
        path = self._train()
        say(f"1 [bold]Model[/bold]: LeNet-5, {path.stat().st_size / 1e3:.0f} kB in int8")
        with DaemonProcess(path, config=CONFIG) as daemon:
            daemon.start()
            camera = Camera(daemon.api)
            self._began, self._epoch = time.monotonic(), time.time()
            try:
                say("2 [bold]Upright[/bold]: the world it was trained on")
                self._watch(daemon, camera, options.upright, 0)
                turned_at = self._now()
                say(f"3 [bold]The camera is turned by {options.angle}°[/bold]; {LABELLED:.0%} of answers get a label")
                self._watch(daemon, camera, options.turned, options.angle)
            finally:
                camera.close()
            passes = self._passes(daemon)
            status = daemon.ctl.get("/admin/status")
        curve = points(self._seen, self._unadapted(path), WINDOW)
        figures = self._figures(curve, turned_at, passes, status)
        if options.plot:
            title = f"LeNet-5 in int8, {self._images.name}: the camera is turned by {options.angle}°"
            draw(options.plot, curve, turned_at, passes, title)
        self._report(figures)
        return figures

    # --- the stream

    def _train(self) -> Path:
        with self._bar() as bar:
            task = bar.add_task("  training LeNet-5 upright, fp32", total=self._options.steps)
            advance = lambda step: bar.update(task, completed=step)  # noqa: E731  # one line says it
            return model.make(self._images, self._folder, self._options.steps, advance)

    def _watch(self, daemon: DaemonProcess, camera: Camera, windows: int, angle: int) -> None:
        """Shows `windows` windows of images, each followed by a pause; prints the accuracy of each."""
        for _ in range(windows):
            right = 0
            for _ in range(WINDOW):
                image, label = next(self._stream)
                if angle:
                    image = rotated(image[None], angle)[0]
                answer = camera.classify(image)
                hit = answer["label"] == self._names[label]
                right += hit
                self._seen.append(Seen(self._now(), hit, answer["agentd"]["revision"], angle))
                self._shown.append((image, label))
                if self._random.random() < LABELLED:
                    camera.correct(answer["id"], self._names[label])
            revision = self._seen[-1].revision
            self._console.print(f"  {self._now():6.1f} s  {right / WINDOW:6.1%}  {'█' * (right // 4):25}  r{revision}")
            self._rest(daemon)

    def _rest(self, daemon: DaemonProcess) -> None:
        """What the windows show is then how much was learned, and not how fast this machine is today."""
        time.sleep(PAUSE)
        deadline = time.monotonic() + LONGEST_PAUSE
        while time.monotonic() < deadline and daemon.ctl.get("/admin/status")["pass"]:
            time.sleep(PAUSE / 4)

    def _images_in_turn(self) -> Any:
        """Test images in a shuffled order, again and again; nothing that the float model was trained on."""
        x, labels = self._images.test
        while True:
            order = list(range(len(labels)))
            self._random.shuffle(order)
            for i in order:
                yield x[i], int(labels[i])

    def _now(self) -> float:
        return time.monotonic() - self._began

    # --- what came of it

    def _passes(self, daemon: DaemonProcess) -> list[dict[str, Any]]:
        """The passes that have ended, the oldest first, with their times in seconds since the start."""
        rows = daemon.ctl.get("/admin/passes", limit=100)["passes"]
        return [
            {
                "began": self._seconds(row["created_at"]),
                "at": self._seconds(row["finished_at"]),
                "outcome": row["state"],
                "revision": row["revision"],
                "method": row["method"],
                "blocks": row["blocks"],
                "n_train": row["n_train"],
                "reason": row["reason"],
                "phases": row["phases"],
                "peak_bytes": row["peak_bytes"],
                "predicted_bytes": row["predicted_bytes"],
            }
            for row in reversed(rows)
            if row["finished_at"]
        ]

    def _seconds(self, moment: str) -> float:
        return epoch(moment) - self._epoch

    def _unadapted(self, path: Path) -> list[bool]:
        """Whether the model as it was would have been right, for every image shown: computed here, one by one."""
        loaded = int8_model.load(path)
        hits = []
        for image, label in self._shown:
            logits, _ = loaded.network.forward(loaded.quantised(image[None].double()))
            hits.append(int(logits.mantissa.argmax(1)) == label)
        return hits

    def _figures(
        self, curve: list[Point], turned_at: float, passes: list[dict[str, Any]], status: dict[str, Any]
    ) -> dict[str, Any]:
        upright = [point for point in curve if point.at < turned_at]
        turned = [point for point in curve if point.at >= turned_at]
        last = turned[-max(1, len(turned) // 4) :]
        before, lost = fmean(p.served for p in upright), fmean(p.unadapted for p in turned)
        after = fmean(p.served for p in last)
        return {
            "data": self._images.name,
            "angle": self._options.angle,
            "accuracy_upright": before,
            "accuracy_turned_unadapted": lost,
            "accuracy_turned_at_the_end": after,
            "recovered": (after - lost) / (before - lost) if before > lost else 0.0,
            "answers": len(self._seen),
            "failed": status["requests"]["failed"],
            "labels": status["feedback"]["total"],
            "quarantined": status["feedback"]["quarantined"],
            "seconds": self._now(),
            "passes": passes,
            "processes": status["memory"]["processes"],
            "curve": [[p.at, p.served, p.unadapted] for p in curve],
        }

    def _report(self, figures: dict[str, Any]) -> None:
        say = self._console.print
        committed = [each for each in figures["passes"] if each["outcome"] == "committed"]
        say("\n4 [bold]What came of it[/bold]")
        end = figures["accuracy_turned_at_the_end"]
        say(f"  upright                              {figures['accuracy_upright']:.1%}")
        say(f"  turned, had it not learned           {figures['accuracy_turned_unadapted']:.1%}")
        say(f"  turned, at the end                   [bold green]{end:.1%}[/bold green]")
        say(f"  of what was lost came back           {figures['recovered']:.0%}")
        say(f"  passes                               {len(figures['passes'])}, of which {len(committed)} committed")
        say(f"  answers, failed                      {figures['answers']}, {figures['failed']}")
        say(f"  labels, in quarantine                {figures['labels']}, {figures['quarantined']}")
        if self._options.plot:
            say(f"  the curve                            {self._options.plot}")

    def _bar(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
        return Progress(*columns, console=self._console, transient=True)


if __name__ == "__main__":
    sys.exit(main())
