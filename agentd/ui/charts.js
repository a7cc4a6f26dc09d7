// Charts in SVG, drawn at the width that there is.

import { h, s } from "./dom.js";
import { clock, day } from "./format.js";

// `draw(width)` returns an SVG element; it is called again when the width changes.
function fitting(draw, height) {
  const box = h("div.chart", { style: { "min-height": `${height}px` } });
  let width = 0;
  new ResizeObserver(([entry]) => {
    const now = Math.floor(entry.contentRect.width);
    if (now > 40 && now !== width) { width = now; box.replaceChildren(draw(width)); }
  }).observe(box);
  return box;
}

const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
const finite = (points) => points.filter(([, y]) => Number.isFinite(y));
const tick = (value) => (Math.abs(value) >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(2))));

// series: [{name, kind, points: [[x, y]]}]; `y` and `x` write a value; marks: [{x, text}] stand over the line.
export function lines({ label, series, low, high, y = tick, x = String, marks = [], height = 170 }) {
  const drawn = series.map((each) => ({ ...each, points: finite(each.points) })).filter((each) => each.points.length);
  if (!drawn.length) return h("p.muted", "No figures yet.");
  const xs = drawn.flatMap((each) => each.points.map((point) => point[0]));
  const ys = drawn.flatMap((each) => each.points.map((point) => point[1]));
  const [left, right] = [Math.min(...xs), Math.max(...xs)];
  let bottom = low ?? Math.min(...ys), top = high ?? Math.max(...ys);
  if (top - bottom < 1e-9) { top += 0.5; bottom -= low === undefined ? 0.5 : 0; }
  const readout = h("span.readout");
  const draw = (width) => {
    const pad = { left: 40, right: 12, top: marks.length ? 20 : 8, bottom: 20 };
    const w = width - pad.left - pad.right, tall = height - pad.top - pad.bottom;
    const px = (value) => pad.left + (right > left ? (value - left) / (right - left) : 0.5) * w;
    const py = (value) => pad.top + (1 - (value - bottom) / (top - bottom)) * tall;
    const grid = [0, 0.5, 1].map((share) => {
      const value = bottom + share * (top - bottom);
      return [s("line.grid", { x1: pad.left, x2: width - pad.right, y1: py(value), y2: py(value) }),
        s("text", { x: pad.left - 6, y: py(value) + 4, "text-anchor": "end" }, y(value))];
    });
    const cursor = s("line.cursor", { y1: pad.top, y2: height - pad.bottom, x1: -9, x2: -9 });
    let edge = -Infinity;
    const flags = marks.filter((mark) => mark.x >= left && mark.x <= right).map((mark) => {
      const at = px(mark.x), shown = at >= edge;
      if (shown) edge = at + 8 * mark.text.length + 8;
      return [s("line.mark", { x1: at, x2: at, y1: pad.top, y2: height - pad.bottom }),
        shown && s("text", { x: Math.min(at, width - 8 * mark.text.length), y: 12 }, mark.text)];
    });
    const svg = s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
      grid, flags,
      s("text", { x: pad.left, y: height - 4 }, x(left)),
      right > left && s("text", { x: width - pad.right, y: height - 4, "text-anchor": "end" }, x(right)),
      drawn.map((each) => {
        const points = each.points.map(([a, b]) => [px(a), py(b)]);
        return [s("path", { class: `line ${each.kind}`, d: path(points) }),
          points.length < 25 && points.map(([a, b]) => s("circle", { class: `dot ${each.kind}`, cx: a, cy: b, r: 3 }))];
      }), cursor);
    svg.addEventListener("pointermove", (event) => {
      const at = left + ((event.offsetX - pad.left) / w) * (right - left);
      const nearest = drawn.map((each) => [each, each.points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a))]);
      const where = nearest.reduce((a, b) => (Math.abs(b[1][0] - at) < Math.abs(a[1][0] - at) ? b : a))[1][0];
      cursor.setAttribute("x1", px(where)); cursor.setAttribute("x2", px(where));
      readout.textContent = `${x(where)}: ${nearest.map(([each, point]) => `${each.name} ${y(point[1])}`).join(", ")}`;
    });
    svg.addEventListener("pointerleave", () => { cursor.setAttribute("x1", -9); cursor.setAttribute("x2", -9); readout.textContent = ""; });
    return svg;
  };
  const legend = drawn.length > 1 || drawn[0].name
    ? h("p.legend", drawn.map((each) => h("span", { class: each.kind }, each.name)), readout) : null;
  return h("figure", legend, fitting(draw, height));
}

// A line without axes, for a glance.
export function spark(values, label, { low, high } = {}) {
  const shown = values.filter(Number.isFinite);
  const bottom = low ?? Math.min(...shown), top = high ?? Math.max(...shown);
  const points = shown.map((value, i) => [2 + (116 * i) / Math.max(1, shown.length - 1), 26 - (22 * (value - bottom)) / (top - bottom || 1)]);
  return s("svg.spark", { viewBox: "0 0 120 30", width: 120, height: 30, role: "img", "aria-label": label },
    s("path.line.a", { d: path(points) }),
    points.length && s("circle.dot.a", { cx: points.at(-1)[0], cy: points.at(-1)[1], r: 2.5 }));
}

// What served when, and passes as bands, from `begin` to now.
export function timeline(passes, activations, begin, serving) {
  const now = Date.now(), height = 86;
  const time = (at) => new Date(at).getTime();
  const changes = [...activations].sort((a, b) => a.id - b.id);
  const spans = [{ revision: changes[0]?.previous ?? serving, from: -Infinity }, ...changes.map((each) => ({ revision: each.revision, from: time(each.at) }))];
  const draw = (width) => {
    const px = (at) => Math.min(width, Math.max(0, ((at - begin) / (now - begin)) * width));
    const served = spans.map((span, i) => {
      const from = px(span.from), to = i + 1 < spans.length ? px(spans[i + 1].from) : width;
      if (to - from < 0.5) return null;
      return [s("rect", { class: `span s${span.revision % 4}`, x: from, y: 4, width: Math.max(1, to - from - 1), height: 26, rx: 4 },
        s("title", `revision ${span.revision}`)),
      to - from > 26 && s("text.on", { x: from + 7, y: 21 }, to - from > 90 ? `revision ${span.revision}` : `r${span.revision}`)];
    });
    const bands = passes.filter((row) => !row.finished_at || time(row.finished_at) >= begin).map((row) => {
      const from = px(time(row.created_at)), to = row.finished_at ? px(time(row.finished_at)) : width;
      const text = `pass ${row.id}, ${row.state}`;
      return s("a", { href: `#/learning/${row.id}`, "aria-label": text },
        s("rect", { class: `band ${row.finished_at ? row.state : "running"}`, x: Math.min(from, width - 6), y: 38, width: Math.max(6, to - from), height: 22, rx: 3 }, s("title", text)));
    });
    const long = now - begin > 86400e3;
    return s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": "What served, and when passes ran" },
      served, s("line.grid", { x1: 0, x2: width, y1: 64, y2: 64 }), bands,
      s("text", { x: 0, y: 80 }, long ? day(begin) : clock(begin)), s("text", { x: width, y: 80, "text-anchor": "end" }, "now"));
  };
  return fitting(draw, height);
}

// Parts of a whole: [{name, value, kind, text}].
export function bar(parts, label) {
  const sum = parts.reduce((total, part) => total + part.value, 0) || 1;
  return h("div.bar", { role: "img", "aria-label": `${label}: ${parts.map((part) => `${part.name} ${part.text}`).join(", ")}` },
    parts.map((part) => h("i", { class: part.kind, title: `${part.name} ${part.text}`, style: { "flex-grow": String(part.value / sum) } })));
}
