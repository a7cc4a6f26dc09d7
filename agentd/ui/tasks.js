// Tasks: how often answers were right over time, and what there is to learn from.

import { get, post } from "./api.js";
import { lines } from "./charts.js";
import { button, empty, fill, h, toast } from "./dom.js";
import { day, percent, sentence } from "./format.js";

export async function show(main, app) {
  const { tasks } = await get("/admin/tasks", {}, app.signal);
  fill(main, h("h1", "Tasks"), tasks.length ? tasks.map((task) => card(task, main, app)) : empty("There are no tasks yet.", "A task is declared in the configuration, or by the first feedback that names it. Requests name theirs in metadata.task."));
}

function card(task, main, app) {
  const { train, holdout } = task.examples, scores = task.scores, recall = task.recall;
  const facts = [["New examples", train.new], ["Learned from", train.used], ["Held out", holdout], ["Judged by", task.metric], ["Declared by", task.source]];
  const set = async (value) => {
    const before = recall.setting;
    if (!(await app.attempt(() => post(`/admin/tasks/${encodeURIComponent(task.name)}/recall`, { recall: value })))) return;
    recall.setting = value;
    toast(`Recall of ${task.name} is ${value}.`, { undo: () => set(before) });
    show(main, app);
  };
  return h("section.card", { "aria-label": task.name }, h("div.head", h("h2", task.name),
    h("div.row", { role: "group", "aria-label": `Past corrections in prompts of ${task.name}` }, h("span.muted", "recall"), ["off", "auto", "on"].map((value) => button(value, () => set(value), { key: `${task.name} ${value}`, "aria-pressed": String(recall.setting === value) })))),
  h("p.row", task.choices.length ? task.choices.slice(0, 40).map((choice) => h("span.tag", choice)) : h("span.muted", "free text and calls"), task.choices.length > 40 ? `and ${task.choices.length - 40} more` : null),
  scores.length ? course(task) : h("p.muted", "No answer has been judged yet. ", h("a", { href: "#/review" }, "Review answers"), " to see how often they are right."),
  h("dl.facts", facts.map(([name, value]) => h("div", h("dt", name), h("dd", value)))),
  h("p.muted", recall.on ? `Past corrections stand in prompts${recall.k ? `, ${recall.k} at most` : ""}.` : "No past corrections stand in prompts.", recall.reason ? ` ${sentence(recall.reason)}` : ""));
}

// Accuracy as served. Days and revisions with few answers are taken together, as `agentctl history` does.
function course({ name, scores }) {
  const points = [];
  for (const each of scores) {
    const last = points.at(-1);
    if (last && last.revision === each.revision && last.n < 10) { last.n += each.n; last.right += each.right; }
    else points.push({ ...each });
  }
  const marks = points.flatMap((each, i) => (i === 0 || points[i - 1].revision !== each.revision ? [{ x: i, text: `r${each.revision}` }] : []));
  return lines({ label: `Accuracy of ${name} over time, ${percent(points.at(-1).right / points.at(-1).n)} at last`, low: 0, high: 1, y: percent, x: (i) => day(points[Math.round(i)].day), marks,
    series: [{ name: "right as served", kind: "a", points: points.map((each, i) => [i, each.right / each.n]) }] });
}
