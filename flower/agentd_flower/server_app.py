"""The ServerApp: `flwr run flower/` starts it; [tool.flwr.app.config] says what it does, `--run-config` what else."""

import json
from logging import INFO
from pathlib import Path

from flwr.app import Context
from flwr.common import log
from flwr.serverapp import Grid, ServerApp

from agentd_flower.strategy import FleetStrategy, Progress, Settings

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    state = str(config.get("state") or "")
    keep = Path(state).expanduser() if state else None
    strategy = FleetStrategy(settings_of(config), Progress.read(keep), keep=keep, wait=float(config["timeout"]))
    strategy.start(
        grid=grid, initial_arrays=strategy.initial(), num_rounds=int(config["rounds"]), timeout=float(config["timeout"])
    )
    for each in strategy.rounds:
        log(INFO, "%s", json.dumps(vars(each)))


def settings_of(config: dict[str, object]) -> Settings:
    """Raises ValueError."""
    known = {name.replace("_", "-"): name for name in Settings.__dataclass_fields__}
    return Settings(**{known[key]: value for key, value in config.items() if key in known})  # type: ignore[arg-type]
