// Answers that nobody has judged yet, one after the other: right, wrong, or what should have been said.

import { get, post } from "./api.js";
import { button, empty, fill, h, toast } from "./dom.js";
import { form } from "./calls.js";
import { ago, textOf } from "./format.js";

const PAGE = 20;

export async function show(main, app) {
  const { tasks } = await get("/admin/tasks", {}, app.signal);
  const skipped = new Set();
  let queue = [], task = "", editing = false;
  const pick = h("select", { "aria-label": "Task", onchange: () => { task = pick.value; skipped.clear(); queue = []; next(); } }, h("option", { value: "" }, "All tasks"), tasks.map(({ name }) => h("option", { value: name }, name)));
  const card = h("section.card", { "aria-live": "polite" });
  fill(main, h("div.head", h("h1", "Review"), tasks.length ? pick : null), card);

  async function next() {
    editing = false;
    if (!queue.length) {
      const { inferences } = await get("/admin/inferences", { judged: false, task, limit: PAGE, offset: skipped.size }, app.signal);
      queue = inferences.filter((each) => !skipped.has(each.id));
    }
    draw();
  }

  // Says something of the answer, with a way to take it back.
  async function say(answer, kind, value) {
    const fed = await app.attempt(() => post("/v1/feedback", { inference_id: answer.id, kind, value }));
    if (!fed) return;
    const text = fed.state ? `Stored, without effect: ${fed.reason}.` : fed.example_id ? `Stored; an example of ${fed.task} to learn from.` : "Stored.";
    toast(text, { undo: async () => {
      if (!(await app.attempt(() => post("/admin/forget", { feedback: [fed.id], keep_inferences: true })))) return;
      queue = [answer, ...queue.filter((each) => each.id !== answer.id)];
      draw();
    } });
    queue = queue.filter((each) => each.id !== answer.id);
    next();
  }

  function draw() {
    const answer = queue[0];
    if (!answer) {
      fill(card, empty(skipped.size ? "That was the last one." : "Nothing waits for you.", skipped.size ? "Answers that you skipped come back when you open this page again." : "Every answer has been judged, or none has been given yet. New ones appear here as they are served."),
        h("div.row", { style: { "justify-content": "center" } }, button("Look again", () => { skipped.clear(); next(); }, { kind: "main" })));
      return;
    }
    const choices = answer.task ? (tasks.find((each) => each.name === answer.task)?.choices ?? []) : [];
    const skip = () => { skipped.add(queue.shift().id); next(); };
    const edit = () => { editing = true; draw(); };
    const few = choices.length && choices.length <= 12 && !answer.tool_calls.length;
    const act = few
      ? choices.map((choice, i) => button([choice, i < 9 ? h("kbd", i + 1) : null], () => say(answer, "label", choice), { key: choice, "data-shortcut": i < 9 ? i + 1 : null, "aria-pressed": String(choice === answer.output.trim()) }))
      : [button(["Right", h("kbd", "R")], () => say(answer, "boolean", true), { kind: "main", "data-shortcut": "r" }), button(["Wrong", h("kbd", "W")], () => say(answer, "boolean", false), { "data-shortcut": "w" }), button(["Correct it", h("kbd", "E")], edit, { "data-shortcut": "e" })];
    const messages = answer.input.messages ?? [{ role: "prompt", content: answer.input.prompt }];
    const before = messages.slice(0, -1);
    fill(card, 
      h("div.head", h("p.muted", [answer.task, answer.episode && `episode ${answer.episode}`, `revision ${answer.revision}`, ago(answer.created_at), answer.finish_reason === "length" ? "cut off" : null].filter(Boolean).join(" · "))),
      before.length ? h("details", h("summary", `${before.length} earlier ${before.length === 1 ? "message" : "messages"}`), before.map(turn)) : null,
      turn(messages.at(-1)),
      h("div.says.answer", h("b", "answer"), answer.output || !answer.tool_calls.length ? h("pre", answer.output || "(nothing)") : null, answer.tool_calls.map(call)),
      editing ? form(answer, (value) => say(answer, "demonstration", value), () => { editing = false; draw(); })
        : [few ? h("p.muted", "Which is right?") : null, h("div.row", act, button(["Skip", h("kbd", "S")], skip, { kind: "link", "data-shortcut": "s" }))]);
    if (editing) card.querySelector("textarea, input, select")?.focus();
  }

  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select, dialog")) return;
    card.querySelector(`[data-shortcut="${CSS.escape(event.key.toLowerCase())}"]`)?.click();
  }, { signal: app.signal });
  await next();
}

const turn = (message) => h("div.says", h("b", message.role), h("pre", textOf(message.content)), (message.tool_calls ?? []).map(call));
const call = ({ function: { name, arguments: said } }) => h("p.call", `${name}(${typeof said === "string" ? said : JSON.stringify(said)})`);
