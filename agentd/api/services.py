"""What the handlers work with; the daemon fills it."""

import time
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from agentd.adapt.controller import Adaptation
from agentd.adapt.fleet import Fleet
from agentd.adapt.holds import Holds
from agentd.adapt.recall.switch import RecallSwitch
from agentd.api.access import Authority
from agentd.api.key_ring import KeyRing
from agentd.api.peers import RateLimiter
from agentd.api.sessions import Sessions
from agentd.api.telemetry import Telemetry
from agentd.api.traffic import Traffic
from agentd.config.schema import Config
from agentd.engine.process.activity import Activity
from agentd.engine.process.supervisor import Supervisor
from agentd.errors import UnknownModel
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
    rate_limiter: RateLimiter = field(default_factory=RateLimiter)
    traffic: Traffic = field(default_factory=Traffic)
    telemetry: Telemetry | None = None
    wrong_credentials: RateLimiter = field(default_factory=RateLimiter)
    keys: KeyRing = field(init=False)
    fleet: Fleet = field(init=False)
    authorities: list[Authority] = field(init=False)  # of kinds of credentials, in the order they are asked
    tcp: list[dict[str, Any]] = field(default_factory=list)  # addresses, and what is needed there
    sessions: Sessions = field(default_factory=Sessions)
    stopping: bool = False  # the daemon ends, and with it what would go on for ever
    damage: str = ""  # what the last look at the whole state found

    def __post_init__(self) -> None:
        self.model_created = int(self.model.path.stat().st_mtime)
        self.keys = KeyRing(self.store)
        self.fleet = Fleet(
            lambda: self.config,
            self.store,
            self.supervisor,
            self.adaptation,
            self.model,
            lambda: self.holds.reasons,
        )
        self.authorities = [self.keys]

    @property
    def recall(self) -> RecallSwitch:
        return self.adaptation.recall

    @property
    def model_name(self) -> str:
        """The stable name that clients see; revisions change beneath it."""
        return self.model.path.stem

    def resolve(self, model: str | None) -> str:
        """The name under which a request is answered that asks for this one. Raises UnknownModel."""
        if model in self.config.serve.aliases:
            return str(model)
        if model not in (None, "default", self.model_name):
            raise UnknownModel(str(model), self.model_name)
        return self.model_name


def services(request: Request) -> Services:
    bundle: Services = request.app.state.services
    return bundle
