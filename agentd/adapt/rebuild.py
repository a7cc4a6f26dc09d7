"""Taking feedback back: forgetting it, and learning again without it.

Forgetting deletes rows and working files at once. The weights of revisions that learned from what was forgotten are
another matter: `forget` names them, `rebuild` gives them up and learns again from the nearest revision that did not.
"""

import asyncio
import shutil
from collections.abc import Mapping
from typing import Any

from sqlite_utils import Database

from agentd.adapt.controller import Adaptation
from agentd.store import forgetting, passes
from agentd.store.database import Store
from agentd.store.forgetting import Forgotten, Selection


async def forget(
    store: Store,
    adaptation: Adaptation,
    selection: Selection,
    *,
    dry_run: bool,
    weights: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Deletes what `selection` names and returns what that was, and the revisions that had learned from it. `weights`
    say how far the sources are believed whose answers stay. All at once, or in pieces where the disk is too full.

    A running pass is stopped, for it may be learning from it; where only a mistake is taken back (`keep_inferences`)
    one that is known not to goes on. Raises NotFound, StorageFull.
    """
    forgotten: Forgotten = await store.call(forgetting.look, selection)
    if not dry_run:
        if not (selection.keep_inferences and await _is_apart(store, adaptation, forgotten)):
            await adaptation.stop("feedback is being forgotten")
        if limit := await store.piece(await store.call(forgetting.size, forgotten)):
            while await store.call(forgetting.forget_some, selection, forgotten, limit, weights):
                await store.checkpoint()
        else:
            forgotten = await store.call(forgetting.forget, selection, weights)
        await asyncio.to_thread(_remove_folders, adaptation, forgotten.passes)
        await store.checkpoint()  # deleted pages are overwritten in the log first
    return {**forgotten.as_json(), "dry_run": dry_run}


async def rebuild(
    store: Store,
    adaptation: Adaptation,
    selection: Selection | None,
    options: dict[str, Any],
    weights: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Forgets what `selection` names, gives up every revision that holds something forgotten, and starts a pass from
    the nearest one that does not, on what those had learned otherwise.

    Returns what was forgotten, the revision that serves now, those given up, and the pass, None if nothing had to be
    learned again. Raises NotFound, EngineUnavailable before anything is done, and what stands in the way of a rollback.
    """
    adaptation.require_engine()
    forgotten = None
    if selection is not None:
        forgotten = await forget(store, adaptation, selection, dry_run=False, weights=weights)
    await adaptation.stop("the revisions are rebuilt")
    serving = adaptation.serving
    clean = await store.call(forgetting.clean_ancestor, serving)
    if clean != serving:
        await adaptation.rollback(clean, "rebuilt: revisions since then hold what was forgotten")
    given_up = await store.call(_give_up)
    for number in given_up:
        await asyncio.to_thread(adaptation.files.remove, number)
    started = await adaptation.start("manual", options) if given_up else None
    return {"forgotten": forgotten, "revision": adaptation.serving, "given_up": given_up, "pass": started}


async def _is_apart(store: Store, adaptation: Adaptation, forgotten: Forgotten) -> bool:
    """Whether a pass runs that has read its examples already, and none of these."""
    running = adaptation.progress_json(running_only=True)
    if running is None or running["id"] in forgotten.passes:
        return False
    return bool(await store.call(passes.has_examples, running["id"]))


def _give_up(db: Database) -> list[int]:
    return forgetting.discard_holders(db, "it held what was forgotten")


def _remove_folders(adaptation: Adaptation, numbers: list[int]) -> None:
    for number in numbers:
        shutil.rmtree(adaptation.folder(number), ignore_errors=True)
