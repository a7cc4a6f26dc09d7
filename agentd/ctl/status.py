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
    unusable, stale = answer["unusable_examples"], answer["stale_examples"]
    for task in sorted({*answer["examples"], *unusable, *stale}):
        counts = answer["examples"].get(task, {"train": {"new": 0, "used": 0}, "holdout": 0})
        parts = [f"{counts['train']['new']} new", f"{counts['train']['used']} used", f"{counts['holdout']} holdout"]
        parts += [f"{unusable[task]} cannot be used"] if task in unusable else []
        parts += [f"{stale[task]} set aside, their label, its meaning or their tool is gone"] if task in stale else []
        summary[f"examples of {task}"] = ", ".join(parts)
    processes = {name: pss for name, pss in memory["processes"].items() if pss}
    each = ", ".join(f"{name} {output.size(pss)}" for name, pss in processes.items())
    summary["memory"] = f"{output.size(sum(processes.values()))} ({each})"
    summary["memory available"] = (
        f"{output.size(memory['available_bytes'])}, {output.size(memory['reserve_bytes'])} kept free"
    )
    summary["next pass"] = next_pass(trigger)
    return summary | {"state directory": answer["state_dir"], "socket": answer["socket"], "pid": answer["pid"]}


def next_pass(trigger: JSON) -> str:
    """When a pass starts by itself, or what is missing until it does."""
    if trigger["paused"]:
        return "paused; `agentctl resume` lets passes start again"
    if not trigger["enabled"]:
        return "only by `agentctl adapt` (adapt.enabled is false)"
    if trigger.get("waits_for"):
        return f"due; it waits for {trigger['waits_for']}"
    if trigger["new_examples"] >= trigger["min_examples"]:
        return "as soon as nothing else is to be done"
    missing = [_missing(task, facts) for task, facts in trigger["missing"].items()]
    return "; ".join(missing) or f"{trigger['min_examples']} more new examples"


def _missing(task: str, facts: JSON) -> str:
    if facts["more"] is None:
        return f"{task}: {facts['reason']}"
    reason = f" ({facts['reason']})" if facts["reason"] else ""
    return f"{task}: about {facts['more']} more until the {facts['until']}{reason}"


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
