// Figures and times as people read them.

export function bytes(n) {
  if (n === null || n === undefined) return "–";
  for (const unit of ["B", "KiB", "MiB"]) {
    if (Math.abs(n) < 1024) return `${n.toFixed(unit === "B" || n >= 100 ? 0 : 1)} ${unit}`;
    n /= 1024;
  }
  return `${n.toFixed(2)} GiB`;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return seconds < 600 ? `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s` : `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

export const percent = (share) => (share === null || share === undefined ? "–" : `${(100 * share).toFixed(share > 0 && share < 1 ? 1 : 0)} %`);
export const number = (value) => (typeof value !== "number" ? "–" : Number.isInteger(value) ? String(value) : value.toPrecision(3));
export const plural = (n, noun, many = `${noun}s`) => `${n} ${n === 1 ? noun : many}`;
export const sentence = (text) => (text ? text[0].toUpperCase() + text.slice(1) + (/[.!?…]$/.test(text) ? "" : ".") : "");

const DAY = { day: "numeric", month: "short" }, CLOCK = { hour: "2-digit", minute: "2-digit" };
export const clock = (at) => new Date(at).toLocaleTimeString([], CLOCK);
export const day = (at) => new Date(at).toLocaleDateString([], DAY);
export const moment = (at) => (new Date(at).toDateString() === new Date().toDateString() ? clock(at) : `${day(at)}, ${clock(at)}`);

export function ago(at) {
  const seconds = (Date.now() - new Date(at)) / 1000;
  if (seconds < 45) return "just now";
  if (seconds < 3600) return `${Math.max(1, Math.round(seconds / 60))} min ago`;
  if (seconds < 86400) return `${Math.round(seconds / 3600)} h ago`;
  return day(at);
}

// What one message says, as text.
export function textOf(content) {
  if (typeof content === "string") return content;
  if (Array.isArray(content)) return content.map((part) => part.text ?? `[${part.type}]`).join("\n");
  return content === null || content === undefined ? "" : JSON.stringify(content);
}

export const PHASES = ["plan", "tap", "train", "gate", "stage", "swap", "trial"];
export const how = (row) => (row.method ? `${row.method}${row.blocks === null ? "" : `, k = ${row.blocks}`}` : "");
