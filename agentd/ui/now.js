// What is the case now: what serves, what learns or why nothing does, memory, accuracy, what happened last.

import { get, post } from "./api.js";
import { bar, spark, timeline } from "./charts.js";
import { button, confirm, fill, h, redraw, toast } from "./dom.js";
import { PHASES, ago, bytes, duration, how, percent, plural, sentence } from "./format.js";

const WORDS = { plan: "plan", tap: "read", train: "learn", gate: "prove", stage: "pack", swap: "swap", trial: "trial" };

export async function show(main, app) {
  const [passes, history, tasks, happened] = await Promise.all([
    get("/admin/passes", { brief: true, limit: 50 }, app.signal), get("/admin/history", { limit: 200 }, app.signal),
    get("/admin/tasks", {}, app.signal), get("/admin/events", { limit: 8 }, app.signal)]);
  const hero = h("section"), learning = h("section.card", { "aria-label": "Learning" });
  const memory = h("section.card", { "aria-label": "Memory" }), requests = h("section.card", { "aria-label": "Requests" });
  const line = h("section.card"), accuracy = h("div.pair"), log = h("section.card");
  fill(main, hero, learning, h("div.pair", memory, requests), accuracy, line, log);

  const rate = [];
  app.watch((status) => {
    redraw(hero, [status.revision, status.model.name, status.problem, status.held, status.trial, Math.floor(status.uptime_seconds / 60), status.state], () => top(status));
    redraw(learning, [status.pass, status.next_trigger, status.last_pass, status.examples], () => learn(status, app));
    redraw(memory, [status.memory, status.pass?.predicted_bytes], () => room(status));
    rate.push(status.requests.served);
    if (rate.length > 60) rate.shift();
    redraw(requests, [status.requests, status.feedback, rate], () => asked(status, rate));
  });
  redraw(accuracy, 1, () => tasks.tasks.filter((task) => task.scores.length).map(score));
  const lately = () => redraw(log, happened.events.map((event) => event.id), () => [
    h("div.head", h("h2", "Lately"), h("a", { href: "#/events", class: "small" }, "All events")),
    happened.events.length ? h("ul.log", [...happened.events].reverse().map((event) => h("li", h("time", { datetime: event.at }, ago(event.at)), h("span", sentence(`${event.kind}: ${event.message}`)))))
      : h("p.muted", "Nothing has happened yet.")]);
  lately();
  const course = () => redraw(line, [passes.passes, history.activations], () => {
    const times = [...passes.passes.map((row) => row.created_at), ...history.activations.map((row) => row.at)].map((at) => new Date(at).getTime());
    const begin = Math.min(Date.now() - 3600e3, ...times.map((at) => at - 60e3));
    return [h("div.head", h("h2", "What served, and when it learned"), h("a", { href: "#/learning", class: "small" }, "All passes")),
      passes.passes.length || history.activations.length ? timeline(passes.passes, history.activations, begin, app.status?.revision ?? 0)
        : h("p.muted", "The base model has always served. Revisions appear here as they are learned.")];
  });
  course();
  app.listen(async (event) => {
    happened.events = [...happened.events, event].slice(-8);
    lately();
    if (event.pass_id === null && event.revision === null) return;
    [passes.passes, history.activations] = [(await get("/admin/passes", { brief: true, limit: 50 }, app.signal)).passes, (await get("/admin/history", { limit: 200 }, app.signal)).activations];
    course();
  });
}

function top(status) {
  const model = status.model;
  const facts = [model.name, model.architecture, model.n_layer && plural(model.n_layer, "block"), model.classes ? plural(model.classes.length, "class", "classes") : model.n_ctx && `context ${model.n_ctx}`, `up ${duration(status.uptime_seconds)}`];
  const title = status.state === "loading" ? "The model is being loaded" : status.revision ? `Revision ${status.revision} serves` : "The base model serves";
  const held = Object.values(status.held);
  return [h("h1", title), h("p.muted", facts.filter(Boolean).join(" · ")),
    status.problem ? h("p.note.bad", { role: "alert" }, sentence(status.problem)) : null,
    held.length ? h("p.note", sentence(`Learning waits: ${held.join("; ")}`)) : null,
    status.trial ? h("p.note.calm", `Revision ${status.trial.revision} is on trial${status.trial.seconds_left === null ? "" : ` for ${duration(status.trial.seconds_left)} more`}. It is taken back by itself if it does worse.`) : null];
}

function learn(status, app) {
  const pass = status.pass, trigger = status.next_trigger;
  if (pass) {
    const at = PHASES.indexOf(pass.phase);
    const figures = [["Loss", pass.loss?.toFixed(3)], ["Loss on dev", pass.dev_loss?.toFixed(3)], ["Memory", pass.memory_bytes ? `${bytes(pass.memory_bytes)} of ${bytes(pass.predicted_bytes)}` : null], ["Time", duration(pass.seconds)], ["Left in this phase", pass.seconds_left === null ? null : duration(pass.seconds_left)]];
    return [h("div.head", h("h2", `Learning: pass ${pass.id}`),
      button("Stop", async () => { if (await confirm(`Stop pass ${pass.id}?`, "What it has learned so far is lost. What serves stays as it is, and the examples stay new.", "Stop the pass")) app.attempt(() => post("/admin/cancel")); })),
    h("ol.steps", PHASES.map((phase, i) => h("li", { class: i < at ? "done" : null, "aria-current": i === at ? "step" : null }, WORDS[phase]))),
    h("progress", pass.steps ? { max: pass.steps, value: pass.step, "aria-label": pass.phase } : { "aria-label": pass.phase }),
    h("p.muted", [how(pass), pass.steps ? `step ${pass.step} of ${pass.steps}` : null, pass.message].filter(Boolean).join(" · ")),
    h("dl.facts", figures.filter(([, value]) => value).map(([name, value]) => h("div", h("dt", name), h("dd", value))))];
  }
  const missing = Object.entries(trigger.missing).map(([task, facts]) => (facts.more === null ? `${task}: ${facts.reason}` : `${task}: about ${facts.more} more until the ${facts.until}${facts.reason ? ` (${facts.reason})` : ""}`));
  const due = trigger.new_examples >= trigger.min_examples;
  const why = trigger.paused ? "Paused: no pass starts by itself."
    : !trigger.enabled ? "Passes start only when you ask for one (adapt.enabled is false)."
    : trigger.waits_for ? `A pass is due. It waits for ${trigger.waits_for}.`
    : due ? "A pass starts as soon as nothing else is to be done."
    : `Not enough is new: ${plural(trigger.new_examples, "new example")} of ${trigger.min_examples}.`;
  const last = status.last_pass;
  return [h("div.head", h("h2", "Learning"), h("div.row",
    trigger.paused ? button("Resume", () => app.attempt(() => post("/admin/resume")), { key: "pause" }) : button("Pause", () => app.attempt(async () => { await post("/admin/pause"); toast("No pass starts by itself.", { undo: () => app.attempt(() => post("/admin/resume")) }); }), { key: "pause" }),
    button("Learn now", () => app.attempt(() => post("/admin/adapt")), { kind: "main" }))),
  h("p.lead", why),
  missing.length && !due ? h("ul.muted", missing.map((text) => h("li", text))) : null,
  last ? h("p.muted", "Last: ", h("a", { href: `#/learning/${last.id}` }, `pass ${last.id}`), ` ${last.state.replace("_", " ")}${last.reason ? ` (${last.reason})` : ""}.`) : null];
}

function room(status) {
  const { processes, available_bytes: available, reserve_bytes: reserve } = status.memory;
  const used = Object.values(processes).reduce((sum, n) => sum + (n ?? 0), 0), kept = Math.min(reserve, available);
  const kinds = { daemon: "a", engine: "b", trainer: "c" };
  const parts = Object.entries(processes).filter(([, n]) => n).map(([name, n]) => ({ name, value: n, text: bytes(n), kind: kinds[name] ?? "a" }));
  return [h("h2", "Memory"), h("p.big", bytes(used)),
    bar([...parts, { name: "free", value: available - kept, text: bytes(available - kept), kind: "free" }, { name: "kept free", value: kept, text: bytes(kept), kind: "kept" }], "Memory"),
    h("p.legend", parts.map((part) => h("span", { class: { a: "a", b: "c", c: "b" }[part.kind] }, `${part.name} ${part.text}`))),
    h("p.muted", `A pass may take ${bytes(Math.max(0, available - reserve))}; ${bytes(reserve)} behind the line ${available < reserve ? "should be" : "are"} left to the rest of the device.`)];
}

function asked(status, rate) {
  const { active, waiting, served, failed } = status.requests;
  const steps = rate.slice(1).map((n, i) => n - rate[i]);
  return [h("h2", "Requests"), h("div.head", h("p.big", active ? `${active} now` : "idle"), steps.length > 2 ? spark(steps, "answers between two looks", { low: 0 }) : null),
    h("p.muted", [`${served} served`, `${failed} failed`, waiting ? `${waiting} waiting` : null].filter(Boolean).join(" · ")),
    h("p.muted", `${plural(status.feedback.total, "piece")} of feedback. `, h("a", { href: "#/review" }, "Review answers"))];
}

function score(task) {
  const n = task.scores.reduce((sum, each) => sum + each.n, 0), right = task.scores.reduce((sum, each) => sum + each.right, 0);
  const last = task.scores.filter((each) => each.revision === task.scores.at(-1).revision);
  const latest = last.reduce((sum, each) => sum + each.right, 0) / last.reduce((sum, each) => sum + each.n, 0);
  return h("section.card", h("div.head", h("h2", task.name), spark(task.scores.map((each) => each.right / each.n), "accuracy over time", { low: 0, high: 1 })),
    h("p.big", percent(latest)), h("p.muted", `right as served by revision ${task.scores.at(-1).revision}; ${percent(right / n)} of all ${n} that were judged`));
}
