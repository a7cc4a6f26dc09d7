"""What this board does in a fleet: who may ask for what, when it says "not now", and what is remembered of it.

Nothing here connects to anyone. A client of the fleet (flower/) asks over the admin socket, for a contribution to a
round (`train`) or to take in what the fleet has come to (`take`); both are passes. A round is named by a run of the
fleet and a number: asked for again it is answered with what is recorded, and rounds older than the newest one are not
taken up again.
"""

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlite_utils import Database

from agentd import ids
from agentd.adapt.controller import Adaptation
from agentd.adapt.passes.contribution import Order
from agentd.adapt.triggers import in_quiet_hours
from agentd.config.schema import Config, FleetSettings
from agentd.engine.process.supervisor import Supervisor
from agentd.errors import Conflict, NoConsent, NotFound, NotNow, OtherBase
from agentd.learn import privacy
from agentd.models import ModelFile
from agentd.revision import fleet_file
from agentd.revision.archive import AdapterArchive, Archive, WeightsArchive
from agentd.revision.files import RevisionFiles
from agentd.store import fleet, passes
from agentd.store.database import Store
from agentd.store.fleet import TAKE, TRAIN, FleetRound
from agentd.store.passes import Pass
from agentd.store.row import to_json

_AGAIN = frozenset({"failed", "refused"})  # ends of a pass after which its round may be asked for again
_SHOWN = 50  # rounds


@dataclass(frozen=True)
class Asked:
    """Who asks, and for which round: `base_sha256`, `engine` and `dtype` are what the fleet learns on, `peer` is who
    its server is."""

    fleet: str
    run: str
    number: int
    base_sha256: str
    engine: str
    dtype: str
    peer: str | None


@dataclass(frozen=True)
class Wish:
    """What a contribution is to be made of: the kinds that are taken, the most wanted first, and the first of the
    directions' seeds with their number."""

    kinds: tuple[str, ...]
    first_seed: int
    seeds: int


class Fleet:
    """`config`, `held` and `clock` are asked whenever they are needed: the configuration, why passes are held (by
    name), and the local time."""

    def __init__(
        self,
        config: Callable[[], Config],
        store: Store,
        engine: Supervisor,
        adaptation: Adaptation,
        model: ModelFile,
        held: Callable[[], Mapping[str, str]],
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._config, self._store, self._engine, self._adaptation = config, store, engine, adaptation
        self._model, self._held, self._clock = model, held, clock
        self._asking = asyncio.Lock()

    # --- what is asked for

    async def train(self, asked: Asked, wish: Wish, state: str | None, data: bytes | None) -> tuple[FleetRound, Pass]:
        """Begins to learn for a round, or says what came of it before. `state` is the sha256 of the file that the fleet
        has come to, None: the base; `data` that file, where the board need not have it.

        Raises NoConsent, OtherBase, Conflict, NotNow, NotFound where the file is not here, InvalidRequest.
        """
        settings = self._admit(asked)
        kinds = tuple(
            kind for kind in wish.kinds if kind in settings.send and kind in self._adaptation.kind.contributions
        )
        if not kinds:
            raise NoConsent(self._why_nothing(wish, settings))
        digest = _digest(asked, TRAIN, state, kinds=list(wish.kinds), first=wish.first_seed, seeds=wish.seeds)
        async with self._asking:
            if known := await self._known(asked, TRAIN, digest):
                return known
            await self._require_privacy(settings)
            self._require_time()
            start, leads_to = await self._state(asked, state, data)
            order = Order(
                asked.run,
                asked.number,
                kinds,
                self._model.sha256,
                start,
                leads_to,
                (wish.first_seed, wish.seeds),
                settings.clip,
                settings.noise,
            )
            return await self._begin(asked, TRAIN, digest, state, data, order=order)

    async def take(self, asked: Asked, data: bytes) -> tuple[FleetRound, Pass]:
        """Begins to take in what the fleet has come to, as a candidate, or says what came of it before.

        Raises NoConsent, OtherBase, Conflict, NotNow, InvalidRequest.
        """
        self._admit(asked)
        state = fleet_file.digest(data)
        digest = _digest(asked, TAKE, state)
        async with self._asking:
            if known := await self._known(asked, TAKE, digest):
                return known
            archive, _ = await self._state(asked, state, data)
            assert archive is not None
            self._require_time()
            return await self._begin(asked, TAKE, digest, state, data, imported=archive)

    async def round(self, run: str, number: int, action: str) -> tuple[FleetRound, Pass] | None:
        """What is known of an action in a round."""
        return await self._store.call(fleet.with_pass, run, number, action)

    async def result(self, run: str, number: int) -> bytes:
        """What a round made; handed out, it has left the board. Raises NotFound, NoConsent."""
        row = await self._store.call(fleet.find, run, number, TRAIN)
        settings = self._config().fleet
        if row is not None and row.kind is not None and (row.fleet != settings.name or row.kind not in settings.send):
            raise NoConsent(
                f"what round {run}/{number} made may not leave this board any more (fleet.name, fleet.send)"
            )
        return await self._store.call(fleet.send, run, number)

    async def figures(self, run: str, number: int, files: RevisionFiles) -> dict[str, Any]:
        """What may be told of how a file of the fleet did here: the sha256 of the weights that it leads to, which says
        nothing of this board, and with consent whether it serves and how its holdout came out, all tasks together.
        Raises NotFound, Conflict while it is not over."""
        known = await self.round(run, number, TAKE)
        if known is None:
            raise NotFound("round taken in", f"{run}/{number}")
        row, its_pass = known
        if its_pass.finished_at is None:
            raise Conflict(f"pass {its_pass.id} is not over")
        told: dict[str, Any] = {"weights_sha256": await self._weights(row, its_pass, files)}
        settings = self._config().fleet
        if row.fleet == settings.name and "figures" in settings.send:
            told |= {"accepted": its_pass.state == "committed", **_summed(its_pass.gate.get("tasks", {}))}
        await self._store.call(fleet.note_figures, run, number, len(to_json(told)))
        return told

    async def status(self) -> dict[str, Any]:
        """Who this board learns with, what may leave it and what has, and the newest rounds."""
        settings, kind = self._config().fleet, self._adaptation.kind
        totals = await self._store.call(fleet.totals)
        listed = [shown(*both) for both in await self._store.call(fleet.latest, _SHOWN)]
        epsilon = None if totals.rho is None else privacy.epsilon(totals.rho, settings.delta)
        return {
            "name": settings.name,
            "send": list(settings.send),
            "can_send": sorted(kind.contributions),
            "clip": settings.clip,
            "noise": settings.noise,
            "epsilon": epsilon if totals.contributions else 0.0,
            "delta": settings.delta,
            "max_epsilon": settings.max_epsilon,
            "waits_for": self._waits_for(),
            "base_sha256": self._model.sha256,
            "engine": kind.name,
            "dtype": kind.dtype(self._engine) if self._engine.info else None,
            "bytes_out": totals.bytes_out,
            "bytes_in": totals.bytes_in,
            "contributions": totals.contributions,
            "rounds": listed,
        }

    # --- who may, and when

    def _admit(self, asked: Asked) -> FleetSettings:
        settings, kind = self._config().fleet, self._adaptation.kind
        if settings.name is None:
            raise NoConsent("this board learns with no fleet; its owner sets fleet.name")
        if asked.fleet != settings.name:
            raise NoConsent(
                f"this board learns with the fleet {settings.name!r} (fleet.name), not with {asked.fleet!r}"
            )
        ours = self._model.sha256
        if asked.base_sha256 != ours:
            raise OtherBase(
                f"the fleet learns on the base with sha256 {asked.base_sha256}, and this board serves {ours}: another "
                f"model, or another quantisation of the same; what is learned on one means nothing on the other"
            )
        self._adaptation.require_engine()
        engine, dtype = kind.name, kind.dtype(self._engine)
        if (asked.engine, asked.dtype) != (engine, dtype):
            raise OtherBase(
                f"the fleet learns with engine {_engine(asked.engine, asked.dtype)}, and this board serves with "
                f"{_engine(engine, dtype)}"
            )
        return settings

    def _why_nothing(self, wish: Wish, settings: FleetSettings) -> str:
        kind, kinds = self._adaptation.kind, " or ".join(wish.kinds)
        if any(each in settings.send for each in wish.kinds):
            return (
                f"the fleet asks for {kinds}, and engine {kind.name} makes {' or '.join(kind.contributions) or 'none'}"
            )
        return f"the fleet asks for {kinds}, and this board sends {', '.join(settings.send) or 'nothing'} (fleet.send)"

    async def _require_privacy(self, settings: FleetSettings) -> None:
        """Raises NoConsent where one more contribution would tell more than the owner allows."""
        if settings.max_epsilon is None:
            return
        totals = await self._store.call(fleet.totals)
        spent = float("inf") if totals.rho is None else totals.rho
        after = privacy.epsilon(spent + privacy.rho(settings.noise), settings.delta)
        if after > settings.max_epsilon:
            raise NoConsent(
                f"one more contribution would make ε {after:.3g} at delta {settings.delta:g}, and fleet.max_epsilon is "
                f"{settings.max_epsilon:g}"
            )

    def _waits_for(self) -> str | None:
        config = self._config()
        if self._adaptation.paused:
            return "the owner has paused learning (`agentctl resume`)"
        if held := self._held():
            return "; ".join(held.values())
        if in_quiet_hours(config.adapt.trigger.quiet_hours, self._clock()):
            return f"the end of the quiet hours (adapt.trigger.quiet_hours: {config.adapt.trigger.quiet_hours})"
        return self._store.problem or self._adaptation.busy

    def _require_time(self) -> None:
        """Raises NotNow."""
        if reason := self._waits_for():
            raise NotNow(reason)

    # --- how

    async def _known(self, asked: Asked, action: str, digest: str) -> tuple[FleetRound, Pass] | None:
        """What is recorded of the same request, unless it came to nothing. Raises Conflict for another one in its name,
        and for a round that is over."""
        known = await self._store.call(fleet.with_pass, asked.run, asked.number, action)
        if known is not None:
            row, its_pass = known
            if row.request != digest:
                raise Conflict(f"round {asked.run}/{asked.number} was asked for before, with other contents")
            if its_pass.state not in _AGAIN:
                return row, its_pass
        newest = await self._store.call(fleet.newest, asked.run)
        if newest is not None and asked.number < newest:
            raise Conflict(f"round {asked.run}/{asked.number} is over: this board has seen round {newest} of that run")
        return None

    async def _state(
        self, asked: Asked, state: str | None, data: bytes | None
    ) -> tuple[WeightsArchive | AdapterArchive | None, str | None]:
        """The file that the fleet has come to, and the sha256 of the weights it leads to where that is known."""
        if state is None:
            return None, None
        leads_to = None
        kept = await self._store.call(fleet.kept, state)
        if data is None:
            if kept is None:
                raise NotFound("file of the fleet", state)
            data = kept[0]
        elif fleet_file.digest(data) != state:
            raise Conflict("the fleet's file is not the one that is named: its sha256 differs")
        if kept is not None:
            leads_to = kept[1]
        source = f"round {asked.run}/{asked.number} of fleet {asked.fleet}"
        archive = await asyncio.to_thread(lambda content: fleet_file.decode(content).archive(source), data)
        self._adaptation.kind.check_import(archive, self._engine)
        assert isinstance(archive, WeightsArchive | AdapterArchive)
        if kept is None:
            await self._store.call(fleet.keep, state, data)
        return archive, leads_to

    async def _begin(
        self,
        asked: Asked,
        action: str,
        digest: str,
        state: str | None,
        data: bytes | None,
        *,
        order: Order | None = None,
        imported: Archive | None = None,
    ) -> tuple[FleetRound, Pass]:
        """Starts the pass and notes its round, both at once: one that is asked for again is not done twice. Raises
        NotNow."""
        row = FleetRound(
            asked.run,
            asked.number,
            action,
            asked.fleet,
            asked.peer,
            digest,
            state,
            pass_id=0,
            kind=None,
            examples=None,
            rho=None,
            norm=None,
            bytes_in=len(data or b""),
            bytes_out=0,
            created_at=ids.now(),
            sent_at=None,
            result_bytes=None,
        )

        def noted(db: Database, number: int) -> None:
            fleet.begin(db, replace(row, pass_id=number))

        options = {"fleet": f"{asked.run}/{asked.number}"}
        try:
            number = await self._adaptation.start("manual", options, imported, order, noted)
        except Conflict as error:
            raise NotNow(str(error)) from None
        return replace(row, pass_id=number), await self._store.call(passes.get, number)

    async def _weights(self, row: FleetRound, its_pass: Pass, files: RevisionFiles) -> str | None:
        """The sha256 of the weights that a file leads to, which a revision's manifest has."""
        if its_pass.revision is not None:
            manifest = await asyncio.to_thread(files.manifest, its_pass.revision) or {}
            if digest := manifest.get("weights_sha256"):
                await self._store.call(fleet.leads_to, str(row.state), digest)
                return str(digest)
        kept = await self._store.call(fleet.kept, str(row.state))
        return kept[1] if kept else None


def shown(row: FleetRound, its_pass: Pass) -> dict[str, Any]:
    """An action in a round, with how its pass goes."""
    how = {"state": its_pass.state, "reason": its_pass.reason, "done": its_pass.finished_at is not None}
    return {**row.shown(), **how, "revision": its_pass.revision}


def _summed(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Holdout of all tasks together, by number of examples: before and after, without the tasks' names."""
    total = sum(facts["n"] for facts in tasks.values())
    told: dict[str, Any] = {"n": total}
    for side in ("before", "after"):
        for figure in ("accuracy", "loss"):
            known = [(facts["n"], facts[side][figure]) for facts in tasks.values() if facts[side][figure] is not None]
            n = sum(count for count, _ in known)
            told[f"{figure}_{side}"] = sum(count * value for count, value in known) / n if n else None
    return told


def _engine(name: str, dtype: str) -> str:
    return f"{name} in {dtype}" if dtype else name


def _digest(asked: Asked, action: str, state: str | None, **wish: Any) -> str:
    """Of all that makes two requests the same one; who the server says it is does not."""
    base = {"fleet": asked.fleet, "base": asked.base_sha256, "engine": asked.engine, "dtype": asked.dtype}
    return hashlib.sha256(to_json({"action": action, "state": state, **base, **wish}).encode()).hexdigest()
