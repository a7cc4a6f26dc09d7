// Talking to the daemon that served this page.

export class ApiError extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.signedOut = status === 401 || error.code === "insufficient_scope";
  }
}

async function call(method, path, body, signal) {
  let response;
  try {
    const headers = body === undefined ? {} : { "Content-Type": "application/json" };
    const data = body === undefined ? undefined : JSON.stringify(body);
    response = await fetch(path, { method, headers, body: data, signal, credentials: "same-origin", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "The daemon cannot be reached." });
  }
  let answer = null;
  try {
    answer = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  if (!response.ok) throw new ApiError(response.status, answer?.error ?? { message: `The daemon answered with status ${response.status}.` });
  return answer;
}

export function get(path, query = {}, signal = undefined) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return call("GET", given.length ? `${path}?${new URLSearchParams(given)}` : path, undefined, signal);
}

export const post = (path, body = {}) => call("POST", path, body);
export const remove = (path) => call("DELETE", path, {});

// Events after the one with this id as they happen, while the page can be seen; none is missed in between.
export function follow(last, onevent, onstate) {
  let source = null, timer = null;
  const close = () => { source?.close(); source = null; };
  const open = () => {
    clearTimeout(timer);
    if (source || document.hidden) return;
    source = new EventSource(`/admin/events?after=${last}`);
    source.onopen = () => onstate(true);
    source.onmessage = (message) => {
      const event = JSON.parse(message.data);
      if (event.id > last) { last = event.id; onevent(event); }
    };
    source.onerror = () => {
      onstate(false);
      if (source?.readyState === EventSource.CLOSED) { close(); timer = setTimeout(open, 5000); }
    };
  };
  const turn = () => (document.hidden ? close() : open());
  document.addEventListener("visibilitychange", turn);
  open();
  return () => { document.removeEventListener("visibilitychange", turn); clearTimeout(timer); close(); };
}
