// Elements by hand. Everything that users, models or programs have written becomes text nodes, never HTML.

const SVG = "http://www.w3.org/2000/svg";

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, each] of Object.entries(value)) element.style.setProperty(key, each);
    else if (name === "value") element.value = value;
    else if (name === "class") element.classList.add(...String(value).split(" ").filter(Boolean));
    else element.setAttribute(name, value === true ? "" : value);
  }
  add(element, children);
  return element;
}

function add(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : String(child));
  }
}

const make = (create) => (name, ...rest) => {
  const [tag, ...classes] = name.split("."), element = create(tag);
  if (classes.length) element.classList.add(...classes);
  return build(element, rest[0]?.constructor === Object ? rest.shift() : {}, rest);
};
export const fill = (node, ...children) => { node.replaceChildren(); add(node, children); };
// h("p.muted", { title: "…" }, ...children); the attributes may be left out.
export const h = make((tag) => document.createElement(tag));
export const s = make((tag) => document.createElementNS(SVG, tag));

// Draws into `node` again where `state` differs from the last time; the focus stays on the control with the same data-key.
export function redraw(node, state, draw) {
  const signature = JSON.stringify(state);
  if (node.signature === signature) return;
  node.signature = signature;
  const key = node.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  fill(node, draw());
  if (key) node.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus();
}

export function button(label, onclick, { kind = "", key = null, ...rest } = {}) {
  return h("button", { type: "button", class: kind, "data-key": key ?? (typeof label === "string" ? label : null), onclick, ...rest }, label);
}

export const empty = (title, ...text) => h("div.empty", h("strong", title), h("p", text));
export const code = (text) => h("code", text);

// A question that has to be answered before something is done that cannot be undone. Resolves to true or false.
export function confirm(title, text, action) {
  return new Promise((resolve) => {
    const done = (answer) => { dialog.close(); dialog.remove(); resolve(answer); };
    const dialog = h("dialog", { "aria-labelledby": "ask", oncancel: (event) => { event.preventDefault(); done(false); } },
      h("h2", { id: "ask" }, title), h("p", text),
      h("div.row.end",
        button("Cancel", () => done(false), { autofocus: true }),
        button(action, () => done(true), { kind: "danger" })));
    document.body.append(dialog);
    dialog.showModal();
  });
}

// A short message at the foot of the page, with a way back where there is one.
export function toast(text, { undo = null, error = false } = {}) {
  const box = h("div", { class: error ? "toast bad" : "toast" }, h("span", text));
  const remove = () => box.remove();
  let timer = setTimeout(remove, undo || error ? 9000 : 4000);
  if (undo) box.append(button("Undo", () => { remove(); undo(); }, { kind: "link" }));
  box.append(button("×", remove, { kind: "link", "aria-label": "Dismiss" }));
  box.addEventListener("pointerenter", () => clearTimeout(timer));
  box.addEventListener("pointerleave", () => { timer = setTimeout(remove, 3000); });
  fill(document.getElementById("toasts"), box);  // the last one alone: Undo must not be a guess
}
