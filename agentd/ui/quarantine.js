// Feedback that was kept apart: let out, or deleted.

import { get, post } from "./api.js";
import { button, confirm, empty, fill, h, toast } from "./dom.js";
import { moment, plural, sentence, textOf } from "./format.js";

export async function show(main, app) {
  const { feedback, total } = await get("/admin/feedback", { state: "quarantined", limit: 100 }, app.signal);
  const title = h("div.head", h("h1", "Quarantine"));
  if (!feedback.length) {
    fill(main, title, empty("Nothing is kept apart.", "Feedback lands here when its source says more than anybody could mean, keeps changing its mind, or is not believed by the configuration. It teaches nothing until you release it."));
    return;
  }
  const chosen = new Set();
  const again = () => show(main, app);
  const release = button("Release", async () => {
    if (await app.attempt(() => post("/admin/release", { feedback: [...chosen] }))) { toast(`${plural(chosen.size, "piece")} released: examples to learn from.`); again(); }
  }, { kind: "main" });
  const discard = button("Delete", async () => {
    if (!(await confirm(`Delete ${plural(chosen.size, "piece")} of feedback?`, "They are gone for good, with the answers that nothing else was said about.", "Delete"))) return;
    if (await app.attempt(() => post("/admin/forget", { feedback: [...chosen] }))) { toast("Deleted."); again(); }
  });
  const update = () => {
    release.disabled = discard.disabled = !chosen.size;
    all.checked = chosen.size === feedback.length;
  };
  const boxes = feedback.map((row) => h("input", { type: "checkbox", "aria-label": `Choose ${row.id}`, onchange: (event) => { chosen[event.target.checked ? "add" : "delete"](row.id); update(); } }));
  const all = h("input", { type: "checkbox", onchange: () => {
    for (const [i, box] of boxes.entries()) { box.checked = all.checked; chosen[all.checked ? "add" : "delete"](feedback[i].id); }
    update();
  } });
  fill(main, title, h("p.muted", `${plural(total, "piece")} of feedback ${total === 1 ? "is" : "are"} kept apart and ${total === 1 ? "teaches" : "teach"} nothing.${total > feedback.length ? ` The newest ${feedback.length} are shown.` : ""}`),
    h("section.card", h("div.head", h("label.check", all, "All of these"), h("div.row", discard, release)),
      h("ul.list", feedback.map((row, i) => h("li.row", boxes[i], h("div.grow",
        h("p", h("span.tag", row.kind), " ", said(row), row.task ? h("span.muted", ` in ${row.task}`) : null),
        h("p.muted", sentence(row.reason ?? "")),
        h("p.muted", `${row.author ?? "somebody"}, ${moment(row.created_at)}`), answer(row, app)))))));
  update();
}

const said = (row) => (typeof row.value === "object" && row.value ? textOf(row.value.content ?? row.value.chosen ?? row.value) : String(row.value));

function answer(row, app) {
  const details = h("details", { ontoggle: async () => {
    if (details.childElementCount > 1) return;
    try {
      const about = await get(`/admin/inferences/${encodeURIComponent(row.inference_id)}`, {}, app.signal);
      details.append(h("div.says", h("b", "asked"), h("pre", textOf(about.input.messages?.at(-1)?.content ?? about.input.prompt))), h("div.says.answer", h("b", `answered by revision ${about.revision}`), h("pre", about.output || "(nothing)")));
    } catch (error) { details.append(h("p.bad", error.message)); }
  } }, h("summary", "The answer it is about"));
  return row.inference_id ? details : null;
}
