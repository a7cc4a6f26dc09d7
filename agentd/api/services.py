"""What the handlers work with; the daemon fills it."""

import time
from dataclasses import dataclass, field

from starlette.requests import Request

from agentd.adapt.controller import Adaptation
from agentd.adapt.holds import Holds
from agentd.api.peers import Flood
from agentd.config import Config
from agentd.engine.activity import Activity
from agentd.engine.supervisor import Supervisor
from agentd.models import ModelFile
from agentd.store.database import Store


@dataclass
class Services:
    config: Config
    store: Store
    supervisor: Supervisor
    activity: Activity
    adaptation: Adaptation
    model: ModelFile
    holds: Holds
    started: float = field(default_factory=time.monotonic)
    model_created: int = 0
    flood: Flood = field(default_factory=Flood)
    damage: str = ""  # what the last look at the whole state found

    def __post_init__(self) -> None:
        self.model_created = int(self.model.path.stat().st_mtime)

    @property
    def model_name(self) -> str:
        """The stable name that clients see; revisions change beneath it."""
        return self.model.path.stem


def services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found
