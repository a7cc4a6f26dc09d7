// Revisions as a line: what came of what, what serves, and the way back and forward.

import { get, post } from "./api.js";
import { button, empty, fill, h, redraw, toast } from "./dom.js";
import { ago, bytes, how, moment, number, percent, sentence } from "./format.js";

export async function show(main, app) {
  const list = h("section.card", { "aria-label": "Line of revisions" }), past = h("section.card");
  fill(main, h("h1", "Revisions"), list, past);
  const load = async () => {
    const [{ revisions }, { activations }] = await Promise.all([get("/admin/revisions", {}, app.signal), get("/admin/history", { limit: 50 }, app.signal)]);
    redraw(list, revisions, () => draw(revisions, app, load));
    redraw(past, activations, () => [h("h2", "What served when"), activations.length
      ? h("ul.log", activations.map((each) => h("li", h("time", { datetime: each.at }, moment(each.at)), h("span", h("strong", `Revision ${each.revision}`), ` instead of ${each.previous}. ${sentence(each.reason)}`))))
      : h("p.muted", "Revision 0, the base model, has always served.")]);
  };
  await load();
  app.listen((event) => { if (event.revision !== null || event.pass_id !== null) load(); });
}

function draw(revisions, app, load) {
  const serving = revisions.find((row) => row.serving)?.id ?? 0;
  const swap = async (id, reason) => {
    const answer = await app.attempt(() => post("/admin/rollback", { revision: id, reason }));
    if (!answer) return;
    toast(`Revision ${answer.revision} serves instead of ${answer.previous}.`, { undo: () => swap(answer.previous, "undone on the dashboard") });
    load();
  };
  const row = (each) => {
    const may = ["base", "committed"].includes(each.state) && !each.serving;
    const word = `${each.id < serving ? "Roll back" : "Roll forward"} to ${each.id}`;
    return h("li", { class: each.serving ? "serving" : ["base", "committed"].includes(each.state) ? null : "dead" }, h("span.rail", { "aria-hidden": "true" }, h("i")),
      h("div.body", h("div.head", h("div.row", h("h2", each.id ? `Revision ${each.id}` : "Revision 0, the base model"),
        each.serving ? h("span.tag.committed", "serves") : each.state === "committed" ? null : h("span", { class: `tag ${each.state}` }, each.state.replace("_", " "))),
      may ? button(word, () => swap(each.id, "on the dashboard"), { key: `to${each.id}` }) : null),
      h("p.muted", [each.parent === null ? null : `from ${each.parent}`, how(each), each.size_bytes ? bytes(each.size_bytes) : null, ago(each.created_at), each.forgotten ? `holds ${each.forgotten} forgotten` : null].filter(Boolean).join(" · "),
        each.pass_id === null ? null : [" · ", h("a", { href: `#/learning/${each.pass_id}` }, `pass ${each.pass_id}`)]),
      h("ul.small", Object.entries(each.summary).map(([task, facts]) => h("li", `${task}: `, change(facts)))),
      each.reason ? h("p.muted", sentence(each.reason)) : null));
  };
  return [h("ol.graph", [...revisions].reverse().map(row)),
    revisions.length > 1 ? null : empty("Nothing has been learned yet.", "Every pass that proves itself adds a revision here. You can go back to any of them, answer for answer.")];
}

// A task's figures before and after.
export function change({ before, after, n }) {
  const name = typeof after?.accuracy === "number" && after.accuracy !== before?.accuracy ? "accuracy" : "loss", write = name === "accuracy" ? percent : number;
  if (!after) return "–";
  const better = name === "accuracy" ? after[name] - before?.[name] : before?.[name] - after[name];
  return [`${name} ${write(before?.[name])} → `, h("strong", { class: better > 1e-9 ? "good" : better < -1e-9 ? "bad" : null }, write(after[name])), n ? h("span.muted", ` on ${n} held out`) : null];
}
