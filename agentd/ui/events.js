// The journal, live.

import { get } from "./api.js";
import { empty, fill, h, redraw } from "./dom.js";
import { moment, sentence } from "./format.js";

export async function show(main, app) {
  const events = (await get("/admin/events", { limit: 300 }, app.signal)).events;
  const field = h("input", { type: "search", placeholder: "Filter", "aria-label": "Filter events", oninput: () => draw() });
  const list = h("section.card"), live = h("p.pill");
  fill(main, h("div.head", h("h1", "Events"), h("div.row", live, field)), list);
  const draw = () => {
    live.textContent = app.live ? "live" : "not live";
    live.className = `pill ${app.live ? "good" : ""}`;
    const word = field.value.toLowerCase();
    const shown = events.filter((event) => `${event.kind} ${event.message}`.toLowerCase().includes(word)).slice(-300).reverse();
    redraw(list, [word, shown.map((event) => event.id)], () => (shown.length ? h("ul.log", shown.map(row))
      : empty(events.length ? "Nothing matches." : "Nothing has happened yet.", "Passes, swaps, rollbacks and faults appear here as they happen.")));
  };
  app.watch(draw);
  app.listen((event) => { if (!events.some((known) => known.id === event.id)) events.push(event); draw(); });
  draw();
}

const row = (event) => h("li", h("time", { datetime: event.at }, moment(event.at)), h("span", h("strong", sentence(event.kind).replace(/\.$/, "")), ` ${event.message}`,
  event.pass_id === null ? null : [" ", h("a", { href: `#/learning/${event.pass_id}` }, `pass ${event.pass_id}`)]));
