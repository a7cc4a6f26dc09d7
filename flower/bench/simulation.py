"""Many boards on this machine, one in a hundred there at a time: convergence, the server's memory, and what travels.

    python bench/simulation.py [--boards 1000] [--alive 0.01] [--rounds 60] [--clip C --noise M] [--engine ray|local]

Boards are simulated (agentd_flower/simulated.py: a linear classifier, two of four classes each); ClientApp, strategy
and formats are those of real ones. `--engine ray` is Flower's simulation runtime (the extra `simulation`), `local`
calls the ClientApp in this process. Prints a JSON line for the run.
"""

import argparse
import functools
import json
import math
import resource
import sys
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from agentd_flower import simulated
from agentd_flower.client_app import client_app
from agentd_flower.local_grid import LocalGrid
from agentd_flower.simulated import SimulatedBoard
from agentd_flower.strategy import FleetStrategy, Progress, Settings
from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp


class Alive:
    """A grid of which only some boards are there, others in every round. Asking who is there begins a round."""

    def __init__(self, grid: Grid, share: float, seed: int) -> None:
        self._grid, self._share, self._dice = grid, share, np.random.default_rng(seed)
        self._there: list[int] = []

    def next(self) -> None:
        nodes = sorted(self._grid.get_node_ids())
        n = max(3, round(self._share * len(nodes)))
        self._there = [nodes[place] for place in self._dice.permutation(len(nodes))[:n]]

    def get_node_ids(self) -> Iterable[int]:
        return self._there

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self._grid.send_and_receive(messages, timeout=timeout)


@functools.lru_cache(maxsize=2048)
def board(number: int, clip: float | None, noise: float) -> SimulatedBoard:
    return SimulatedBoard(number, clip=clip, noise=noise)


def epsilon(options: argparse.Namespace, delta: float = 1e-5) -> float | None:
    """What the boards' rounds come to, on average: docs/fleet.md."""
    if not options.noise:
        return None
    rho = options.rounds * options.alive * 2 / options.noise**2
    return round(rho + 2 * math.sqrt(rho * math.log(1 / delta)), 2)


def run(grid: Grid, options: argparse.Namespace) -> dict[str, Any]:
    """Rounds one by one, each with other boards."""
    settings = Settings(
        fleet="simulated", robust=options.robust, min_boards=3, patience=0.0, seeds=options.seeds, pool=options.pool
    )
    fleet = FleetStrategy(settings, Progress(), seed=1, wait=0.0)
    alive, held = Alive(grid, options.alive, 3), simulated.held_out()
    begin, curve = time.monotonic(), []
    for number in range(1, options.rounds + 1):
        alive.next()
        fleet.start(alive, fleet.initial(), num_rounds=1)  # type: ignore[arg-type]  # as much of a Grid as is asked for
        if number % max(1, options.rounds // 6) == 0:
            weights = simulated.weights_of(fleet.progress.file)
            curve.append([number, round(held.accuracy(weights), 3), round(held.loss(weights), 3)])
    return {
        "boards": options.boards,
        "alive": options.alive,
        "rounds": options.rounds,
        "noise": options.noise,
        "epsilon": epsilon(options),
        "curve": curve,
        "seconds": round(time.monotonic() - begin, 1),
        "bytes_down": sum(each.down for each in fleet.rounds),
        "bytes_up": sum(each.up for each in fleet.rounds),
        "a_board_and_round": round(
            sum(each.down + each.up for each in fleet.rounds) / max(1, sum(e.asked for e in fleet.rounds))
        ),
        "file_bytes": len(fleet.progress.file),
        "server_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "server_knows": len(fleet._boards),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("boards", 1000), ("rounds", 60), ("seeds", 32), ("pool", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--alive", type=float, default=0.01)
    parser.add_argument("--clip", type=float)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--robust", choices=("mean", "trimmed"), default="trimmed")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    options = parser.parse_args()
    if options.engine == "local":
        app = client_app(lambda context: board(context.node_id, options.clip, options.noise))
        print(json.dumps({"engine": "local", **run(LocalGrid(app, range(1, options.boards + 1)), options)}))
        return 0
    from flwr.simulation import run_simulation

    server = ServerApp()

    @server.main()
    def main_(grid: Grid, context: Context) -> None:
        print(json.dumps({"engine": "ray", **run(grid, options)}), flush=True)

    app = client_app(lambda context: board(int(context.node_config["partition-id"]), options.clip, options.noise))
    run_simulation(server, app, options.boards, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
