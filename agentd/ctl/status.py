"""What the daemon is doing now, and which software this is."""

import platform

from agentd import __version__
from agentd.ctl import output, progress
from agentd.ctl.client import JSON, Daemon
from agentd.ctl.errors import CtlError
from agentd.ctl.options import Json, Socket


def status(as_json: Json = False, socket: Socket = None) -> None:
    """What is served, what is learning, and the memory it takes."""
    answer = Daemon(socket).get("/admin/status")
    if as_json:
        output.document(answer)
    elif output.on_terminal():
        output.facts(summary(answer))
    else:
        output.facts(answer)


def summary(answer: JSON) -> JSON:
    """The status in the order and the words of a person."""
    model, memory, trigger = answer["model"], answer["memory"], answer["next_trigger"]
    running, trial = answer["pass"], answer["trial"]
    summary: JSON = {
        "state": answer["state"],
        **({"problem": answer["problem"]} if answer.get("problem") else {}),
        "revision": answer["revision"],
        "model": _model(model),
        "up": output.duration(answer["uptime_seconds"]),
        "requests": ", ".join(f"{count} {name}" for name, count in answer["requests"].items()),
    }
    if trial:
        summary["trial"] = (
            f"revision {trial['revision']}, "
            + ("" if trial["seconds_left"] is None else f"{output.duration(trial['seconds_left'])} left, ")
            + f"{trial['attempts_left']} attempts left"
        )
    if running and not running["done"]:
        parts = [running["phase"], progress.steps(running), progress.loss(running), progress.left(running)]
        summary["pass"] = f"{running['id']}: " + "  ".join(part for part in parts if part)
    feedback = answer["feedback"]
    summary["feedback"] = feedback["total"]
    if apart := feedback["quarantined"]:
        summary["feedback"] = f"{feedback['total']}, {apart} in quarantine (agentctl feedback list --state quarantined)"
    for task, counts in answer["examples"].items():
        train = counts["train"]
        usable = f"{train['new']} new, {train['used']} used, {counts['holdout']} holdout"
        left_out = answer.get("unusable_examples", {}).get(task)
        summary[f"examples of {task}"] = usable + (f", {left_out} cannot be used" if left_out else "")
    processes = {name: pss for name, pss in memory["processes"].items() if pss}
    each = ", ".join(f"{name} {output.size(pss)}" for name, pss in processes.items())
    summary["memory"] = f"{output.size(sum(processes.values()))} ({each})"
    summary["memory available"] = (
        f"{output.size(memory['available_bytes'])}, {output.size(memory['reserve_bytes'])} kept free"
    )
    if trigger["paused"]:
        summary["next pass"] = "paused; `agentctl resume` lets passes start again"
    elif not trigger["enabled"]:
        summary["next pass"] = "only by `agentctl adapt` (adapt.enabled is false)"
    elif trigger.get("waits_for"):
        summary["next pass"] = f"due; it waits for {trigger['waits_for']}"
    else:
        summary["next pass"] = _next_pass(trigger)
    return summary | {"state directory": answer["state_dir"], "socket": answer["socket"], "pid": answer["pid"]}


def _next_pass(trigger: JSON) -> str:
    """What is missing until a pass starts by itself."""
    more = trigger["min_examples"] - trigger["new_examples"]
    waits = [f"{task}: {reason}" for task, reason in trigger.get("waiting", {}).items()]
    if trigger["new_examples"] or not waits:
        waits.insert(0, f"{more} more new examples" if more > 0 else "as soon as nothing else is to be done")
    return "; ".join(waits)


def _model(model: JSON) -> str:
    """The model in one line; what is not known before it is loaded is left out."""
    layers, context, classes = model.get("n_layer"), model.get("n_ctx"), model.get("classes")
    facts = [
        model.get("architecture"),
        None if layers is None else f"{layers} {'layers' if classes else 'blocks'}",
        None if model.get("size_bytes") is None else output.size(model["size_bytes"]),
        f"{len(classes)} classes" if classes else None if context is None else f"context {context}",
    ]
    known = ", ".join(str(fact) for fact in facts if fact is not None)
    return f"{model['name']} ({known})" if known else str(model["name"])


def version(as_json: Json = False, socket: Socket = None) -> None:
    """The versions of agentctl and of the daemon, if one is running."""
    try:
        daemon = Daemon(socket).get("/admin/status")["version"]
    except CtlError:
        daemon = None
    versions = {"agentctl": __version__, "agentd": daemon, "python": platform.python_version()}
    if as_json:
        output.document(versions)
    else:
        output.facts(versions | {"agentd": daemon or "not reachable"})
