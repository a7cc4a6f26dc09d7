// What should have been said: a text beside what was said, or calls of the request's tools as forms.

import { button, fill, h } from "./dom.js";

export function form(answer, save, cancel) {
  const tools = (answer.input.tools ?? []).map((tool) => tool.function).filter(Boolean), calls = h("div.card");
  const text = h("textarea", { rows: 5, "aria-label": "What should have been said", value: answer.output, oninput: () => compare() });
  const changes = h("p.diff.small", { "aria-label": "Difference" }), wrong = h("p.bad", { role: "alert" });
  const compare = () => fill(changes, text.value === answer.output ? [] : difference(answer.output, text.value));
  const forms = new Set();
  const add = (name, known) => {
    const one = callForm(tools, name, known, () => { forms.delete(one); one.node.remove(); });
    forms.add(one);
    calls.append(one.node);
  };
  for (const { function: { name, arguments: said } } of answer.tool_calls) if (tools.some((tool) => tool.name === name)) add(name, parsed(said));
  const done = (event) => {
    event.preventDefault();
    wrong.textContent = "";
    try {
      const made = [...forms].map((one) => ({ type: "function", function: { name: one.name(), arguments: JSON.stringify(one.values()) } }));
      if (!made.length && !text.value.trim()) throw new Error("Write what should have been said.");
      save(made.length ? { content: text.value || null, tool_calls: made } : text.value);
    } catch (error) { wrong.textContent = error.message; }
  };
  return h("form.card", { onsubmit: done, novalidate: true, onkeydown: (event) => event.key === "Escape" && cancel() },
    h("label", h("span", tools.length ? "Text (none, where a call is all of it)" : "What should have been said"), text), changes,
    tools.length ? [calls, button("Add a call", () => add(tools[0].name, {}))] : null, wrong,
    h("div.row.end", button("Cancel", cancel), h("button.main", "Save correction")));
}

function parsed(said) {
  try { return typeof said === "string" ? JSON.parse(said) : said ?? {}; } catch { return {}; }
}

// One call: the function and a control for each of its arguments, by their schemas.
function callForm(tools, name, known, remove) {
  const fields = h("div.facts"), rest = new Map();
  const select = h("select", { "aria-label": "Function", onchange: () => show({}) }, tools.map((tool) => h("option", { value: tool.name }, tool.name)));
  select.value = name;
  const show = (values) => {
    rest.clear();
    const { properties = {}, required = [] } = tools.find((tool) => tool.name === select.value).parameters ?? {};
    fill(fields, Object.entries(properties).map(([key, schema]) => {
      const control = input(schema, values[key]);
      rest.set(key, { ...control, needed: required.includes(key) });
      return h("label", { title: schema.description }, h("span", required.includes(key) ? key : `${key} (optional)`), control.node);
    }));
  };
  show(known);
  return {
    node: h("fieldset", h("legend", "Call"), h("div.row", select, button("Remove", remove, { kind: "link" })), fields),
    name: () => select.value,
    values: () => {
      const values = {};
      for (const [key, control] of rest) {
        const value = control.value(key);
        if (value !== undefined) values[key] = value;
        else if (control.needed) throw new Error(`${select.value} needs ${key}.`);
      }
      return values;
    },
  };
}

function input(schema, value) {
  const type = Array.isArray(schema.type) ? schema.type[0] : schema.type;
  const options = schema.enum ?? (type === "boolean" ? [true, false] : null);
  if (options) {
    const node = h("select", h("option", { value: "" }, "–"), options.map((each, i) => h("option", { value: String(i) }, String(each))));
    node.value = String(value === undefined ? "" : Math.max(-1, options.indexOf(value))).replace("-1", "");
    return { node, value: () => (node.value === "" ? undefined : options[Number(node.value)]) };
  }
  if (type === "number" || type === "integer") {
    const node = h("input", { type: "number", step: type === "integer" ? 1 : "any", min: schema.minimum, max: schema.maximum, value: value ?? "" });
    return { node, value: (key) => {
      if (node.value === "" && !node.validity.badInput) return undefined;
      if (!node.validity.valid) throw new Error(`${key}: ${node.validationMessage}`);
      return Number(node.value);
    } };
  }
  const plain = type === "string";
  const node = plain ? h("input", { value: value ?? "" }) : h("textarea.code", { rows: 2, value: value === undefined ? "" : JSON.stringify(value), "aria-description": "JSON" });
  return { node, value: (key) => {
    if (node.value === "") return plain && value === "" ? "" : undefined;
    if (plain) return node.value;
    try { return JSON.parse(node.value); } catch { throw new Error(`${key} is not valid JSON.`); }
  } };
}

// Words that went and came, by their longest common subsequence.
export function difference(before, after) {
  const a = before.match(/\s+|\S+/g) ?? [], b = after.match(/\s+|\S+/g) ?? [];
  if (a.length * b.length > 1e6) return [h("ins", after)];
  const longest = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--) longest[i][j] = a[i] === b[j] ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
  const parts = [];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { parts.push(a[i++]); j++; }
    else if (j >= b.length || (i < a.length && longest[i + 1][j] >= longest[i][j + 1])) parts.push(h("del", a[i++]));
    else parts.push(h("ins", b[j++]));
  }
  return parts;
}
