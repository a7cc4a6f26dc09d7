// Passes: as bands over time, and each one with its curves and what the gate saw.

import { get } from "./api.js";
import { bar, lines, timeline } from "./charts.js";
import { button, empty, fill, h, redraw } from "./dom.js";
import { PHASES, bytes, duration, how, moment, number, plural, sentence } from "./format.js";
import { change } from "./revisions.js";

const SPANS = { "24 h": 86400e3, "7 days": 7 * 86400e3, all: Infinity };

export async function show(main, app, id) {
  if (id) return detail(main, app, id);
  let passes = [], history = [], span = "all";
  const chart = h("section.card"), list = h("section.card", { "aria-label": "Passes" });
  fill(main, h("h1", "Learning"), chart, list);
  const draw = () => {
    redraw(chart, [passes, history, span], () => {
      const first = Math.min(...[...passes.map((row) => row.created_at), ...history.map((row) => row.at)].map((at) => new Date(at).getTime()), Date.now() - 3600e3);
      return [h("div.head", h("h2", "What served, and when it learned"), h("div.row", { role: "group", "aria-label": "Span" }, Object.keys(SPANS).map((name) => button(name, () => { span = name; draw(); }, { "aria-pressed": String(name === span) })))),
        timeline(passes, history, Math.max(first - 60e3, Date.now() - SPANS[span]), app.status?.revision ?? 0)];
    });
    redraw(list, passes, () => (passes.length ? h("ul.list", passes.map(row))
      : empty("There has been no pass yet.", "One starts by itself when enough is new and the device is idle; Learn now, on the first page, does not wait.")));
  };
  const load = async () => {
    [{ passes }, { activations: history }] = await Promise.all([get("/admin/passes", { brief: true, limit: 500 }, app.signal), get("/admin/history", { limit: 1000 }, app.signal)]);
    draw();
  };
  await load();
  app.listen((event) => { if (event.pass_id !== null || event.revision !== null) load(); });
  return undefined;
}

const took = (row) => (new Date(row.finished_at ?? Date.now()) - new Date(row.created_at)) / 1000;
const state = (row) => h("span", { class: `tag ${row.state}` }, row.state.replace("_", " "));

const row = (each) => h("li", h("a.whole", { href: `#/learning/${each.id}` },
  h("div.row", h("h3", `Pass ${each.id}`), state(each), each.revision !== null && each.state === "committed" ? h("span.muted", `revision ${each.revision}`) : null),
  h("span.muted", [moment(each.created_at), duration(took(each)), how(each), each.n_train ? `${plural(each.n_train, "example")}, ${each.n_holdout} held out` : null].filter(Boolean).join(" · ")),
  each.reason ?? each.gate.reason ? h("span.small", sentence(each.reason ?? each.gate.reason)) : null));

async function detail(main, app, id) {
  const load = async () => {
    const { pass, steps, events } = await get(`/admin/passes/${encodeURIComponent(id)}`, {}, app.signal);
    const gate = pass.gate ?? {};
    fill(main, h("p", h("a", { href: "#/learning" }, "← All passes")), h("div.row", h("h1", `Pass ${pass.id}`), state(pass)),
      h("p.muted", [moment(pass.created_at), duration(took(pass)), `started ${pass.trigger === "manual" ? "by hand" : `by ${pass.trigger}`}`, how(pass)].filter(Boolean).join(" · ")),
      pass.reason ?? gate.reason ? h("p", { class: `note ${pass.state === "committed" ? "calm" : pass.state === "failed" ? "bad" : ""}` }, sentence(pass.reason ?? gate.reason)) : null,
      curves(steps), judged(gate), spent(pass),
      h("section.card", h("h2", "Events"), h("ul.log", events.map((event) => h("li", h("time", { datetime: event.at }, moment(event.at)), h("span", sentence(`${event.kind}: ${event.message}`)))))));
  };
  await load();
  app.listen((event) => { if (String(event.pass_id) === id) load(); });
}

function curves(steps) {
  const card = (title, mine) => h("section.card", h("h2", title), lines({ label: title, x: (step) => `step ${Math.round(step)}`, y: number, height: 200, series: [
    { name: "loss", kind: "a", points: mine.map((step) => [step.step, step.loss ?? NaN]) }, { name: "loss on dev", kind: "b", points: mine.map((step) => [step.step, step.dev_loss ?? NaN]) },
    { name: "accuracy on dev", kind: "c", points: mine.map((step) => [step.step, step.dev_accuracy ?? NaN]) }] }));
  return [["bp", "Backpropagation"], ["zo", "Zeroth-order steps"]].map(([phase, title]) => [title, steps.filter((step) => step.phase === phase)]).filter(([, mine]) => mine.length).map(([title, mine]) => card(title, mine));
}

function judged({ tasks = {}, skills = {}, drift = null }) {
  if (!Object.keys(tasks).length) return null;
  const answers = Object.entries(tasks).flatMap(([task, facts]) => (facts.answers ?? []).map((each) => [task, each]));
  const mark = (right) => (right === true ? h("span.tag.right", "right") : right === false ? h("span.tag.wrong", "wrong") : null);
  return h("section.card", h("h2", "What the gate saw"),
    h("div.scroll", h("table", h("thead", h("tr", ["Task", "Before → after", "p"].map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", Object.entries(tasks).map(([task, facts]) => h("tr", h("td", task), h("td", change(facts)), h("td.num", number(facts.p_accuracy ?? facts.p_loss))))))),
    Object.keys(skills).length ? h("details", h("summary", "Skills of the base"), h("ul.small", Object.entries(skills).map(([group, each]) => h("li", `${group}: ${number(each.before)} → ${number(each.after)}`)))) : null,
    drift === null ? null : h("p.muted", `Drift from the base: ${number(drift)} nats per token`),
    answers.length ? h("details", h("summary", `${plural(answers.length, "answer")} that ${answers.length === 1 ? "was" : "were"} compared`), h("ul.list", answers.map(([task, each]) => h("li", h("p.muted", task), h("pre", each.input), h("p", h("b", "right "), each.right),
      h("p", mark(each.before_right), " before: ", each.before), h("p", mark(each.after_right), " after: ", each.after))))) : null);
}

function spent(pass) {
  const phases = PHASES.map((name) => [name, pass.phases[name]]).filter(([, seconds]) => seconds > 0), peaks = pass.peaks ?? {};
  if (!phases.length) return null;
  const predicted = pass.predicted_bytes, peak = pass.peak_bytes;
  return h("section.card", h("h2", "What it cost"),
    bar(phases.map(([name, seconds], i) => ({ name, value: seconds, text: duration(seconds), kind: "abc"[i % 3] })), "Time"),
    h("p.muted", phases.map(([name, seconds]) => `${name} ${duration(seconds)}`).join(" · ")),
    peak ? h("p.muted", `Memory at its peak ${bytes(peak)}; predicted ${bytes(predicted)}. `, ["daemon", "engine", "trainer"].filter((name) => peaks[name]).map((name) => `${name} ${bytes(peaks[name])}`).join(" · ")) : null);
}
