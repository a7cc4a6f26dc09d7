// The frame: signing in, pages, the state that all of them show.

import { ApiError, follow, get, post } from "./api.js";
import { button, code, fill, h, redraw, toast } from "./dom.js";

const PAGES = [["", "Now"], ["review", "Review"], ["learning", "Learning"], ["revisions", "Revisions"], ["tasks", "Tasks"], ["quarantine", "Quarantine"], ["events", "Events"]];
const main = document.getElementById("main"), lost = document.getElementById("lost");
let leaving = new AbortController(), watchers = [], listeners = [], timer = null, unfollow = null;
// Counts times of being signed in and out: what was asked before says nothing about now, and must not wipe a half-typed token.
let session = 0, out = false;

const app = {
  status: null, waiting: null, live: false,
  signal: null,
  // `fn(status)` now and whenever it is known anew; `fn(event)` for every event; both until the page is left.
  watch(fn) { watchers.push(fn); if (app.status) fn(app.status); },
  listen(fn) { listeners.push(fn); },
  refresh,
  // Does something that the daemon may refuse; says so, and returns undefined then.
  async attempt(work) {
    try {
      const answer = await work();
      refresh();
      return answer;
    } catch (error) {
      complain(error);
      return undefined;
    }
  },
};

function complain(error) {
  if (error.name === "AbortError") return;
  if (error.signedOut && out) return;
  if (error.signedOut) signIn();
  else toast(error.message, { error: true });
}

async function refresh() {
  clearTimeout(timer);
  if (out) return undefined;
  let pause = 5000;
  const asked = session;
  try {
    const status = await get("/admin/status");
    if (asked !== session) return undefined;
    app.status = status;
    lost.hidden = true;
    frame(app.status);
    for (const fn of [...watchers]) fn(app.status);
    if (app.status.pass || route().name === "") pause = 2000;
  } catch (error) {
    if (asked !== session) return undefined;
    if (error.signedOut) return signIn();
    if (!(error instanceof ApiError)) throw error;
    lost.hidden = false;
    lost.textContent = error.status && error.status !== 502 ? error.message : "The daemon does not answer. Trying again…";
    document.getElementById("state").className = "pill bad";
    document.getElementById("state").textContent = "not reachable";
  }
  if (!document.hidden) timer = setTimeout(refresh, pause);
  return undefined;
}

function frame(status) {
  const state = document.getElementById("state"), pass = status.pass;
  const [kind, text] = status.state !== "serving" ? ["warn", status.state]
    : status.problem ? ["bad", "needs attention"]
    : pass ? ["busy", `learning${pass.steps ? `, ${pass.phase} ${Math.round((100 * pass.step) / pass.steps)} %` : `, ${pass.phase}`}`]
    : status.trial ? ["busy", "on trial"] : ["good", `revision ${status.revision} serves`];
  if (state.textContent !== text) state.textContent = text;
  state.className = `pill ${kind}`;
  const here = route().name, counts = { quarantine: status.feedback.quarantined };
  redraw(document.getElementById("nav"), [here, counts], () => PAGES.map(([name, title]) =>
    h("li", h("a", { href: `#/${name}`, "data-key": name, "aria-current": here === name ? "page" : null }, title,
      counts[name] ? h("b", { "aria-label": `${counts[name]} waiting` }, counts[name]) : null))));
}

function route() {
  const [, name = "", argument = null] = location.hash.split("/");
  return PAGES.some(([known]) => known === name) ? { name, argument } : { name: "", argument: null };
}

async function navigate(focus = true) {
  leaving.abort();
  leaving = new AbortController();
  app.signal = leaving.signal;
  watchers = [];
  listeners = [];
  const { name, argument } = route(), signal = app.signal;
  const title = PAGES.find(([known]) => known === name)[1];
  document.title = `${title} · agentd`;
  if (app.status) frame(app.status);
  document.querySelector("nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "nearest" });
  try {
    const { show } = await import(`./${name || "now"}.js`);
    if (signal.aborted) return;
    fill(main, h("p.empty", "Loading…"));
    await show(main, app, argument);
    if (signal.aborted) return;
    if (focus) { main.focus({ preventScroll: true }); scrollTo(0, 0); }
  } catch (error) {
    if (signal.aborted || error.name === "AbortError") return;
    if (error.signedOut) signIn();
    else fill(main, h("div.empty", h("h1", "This page could not be read."), h("p", error.message), button("Try again", () => navigate(), { kind: "main" })));
  }
}

// Signing in: the daemon's owner asks for a token, good once and for minutes, and the page trades it for a cookie.

async function trade(token) {
  await post("/ui/session", { token });
  session += 1;
  out = false;
  history.replaceState(null, "", "#/");
}

function signIn(problem = null) {
  session += 1;
  out = true;
  clearTimeout(timer);
  leaving.abort();
  watchers = [];
  unfollow?.();
  app.status = unfollow = null;
  redraw(document.getElementById("nav"), null, () => null);
  document.getElementById("state").textContent = "signed out";
  document.getElementById("state").className = "pill";
  const field = h("input", { name: "token", autocomplete: "off", spellcheck: "false", required: true, "aria-describedby": "help" });
  const form = h("form.row", { onsubmit: async (event) => {
    event.preventDefault();
    try { await trade(field.value.trim().replace(/^.*#key=/, "")); begin(); } catch (error) { signIn(error.message); }
  } }, h("label.grow", h("span", "Token"), field), h("button.main", "Sign in"));
  fill(main, h("section.card", { "aria-label": "Sign in" }, h("h1", "Sign in"),
    problem ? h("p.note.bad", { role: "alert" }, problem) : null,
    h("p", { id: "help" }, "Run ", code("agentctl dashboard"), " on the device and open the address that it prints, or paste it here. It is good once, for a few minutes."), form));
  field.focus();
}

async function begin() {
  const key = /^#key=(.+)$/.exec(location.hash)?.[1];
  if (key) {
    try { await trade(key); } catch (error) { return signIn(error.message); }
  }
  await Promise.all([navigate(false), refresh()]);
  if (!app.status || unfollow) return undefined;
  const { events } = await get("/admin/events", { limit: 1 });
  unfollow = follow(events.at(-1)?.id ?? 0, (event) => { for (const fn of [...listeners]) fn(event); refresh(); }, (live) => { app.live = live; });
  return undefined;
}

addEventListener("hashchange", () => (location.hash.startsWith("#key=") ? begin() : location.hash.startsWith("#/") && navigate()));
document.addEventListener("visibilitychange", () => document.hidden || refresh());
document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
addEventListener("unhandledrejection", (event) => { if (event.reason?.name === "AbortError" || event.reason instanceof ApiError) { event.preventDefault(); complain(event.reason); } });
begin();
