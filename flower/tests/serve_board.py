"""One daemon with a tiny model and examples, for the tests beside this: run in agentd's environment.

Arguments: settings as JSON, laid over those of engine transformers with the fleet `home`; the number of examples; the
number of the first. Prints a JSON line once it serves, and one for every line that it reads: kill, start, status. Ends
with stdin.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support.tiny_passes import SETTINGS, examples, gguf
from tools.daemon import DaemonProcess

FLEET = {"name": "home", "send": ["ledger", "adapter", "figures"]}


def main(settings: str, number: str, first: str) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        DaemonProcess(gguf(Path(folder)), _merged(json.loads(settings))) as board,
    ):
        board.start()
        answer = board.post("/v1/examples", examples(int(number), first=int(first), length=5))
        assert answer.status == 200, answer.body
        print(json.dumps({"admin": str(board.admin)}), flush=True)
        for line in sys.stdin:
            match line.strip():
                case "kill":
                    board.kill()
                case "start":
                    board.start()
            alive = board.process is not None and board.process.poll() is None
            print(json.dumps(board.status() if alive else {}), flush=True)


def _merged(over: dict[str, Any]) -> dict[str, Any]:
    gate = {**SETTINGS["adapt"]["gate"], "max_regression": 1}
    own = {**SETTINGS, "adapt": {**SETTINGS["adapt"], "gate": gate}, "fleet": FLEET}
    return {**own, **over, "fleet": {**FLEET, **over.get("fleet", {})}}


if __name__ == "__main__":
    main(*sys.argv[1:])
