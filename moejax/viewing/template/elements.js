// Making elements, and saying numbers and tokens.

const byId = (id) => document.getElementById(id);

/** An element. Style comes as custom properties: {"--part": 0.5}. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function fill(element, ...children) {
  element.replaceChildren(...children);
}

const ENGLISH = new Intl.NumberFormat("en");
const count = (n) => ENGLISH.format(n);
const percent = (part) => `${(100 * part).toFixed(part < 0.0995 ? 1 : 0)} %`;
const fixed = (x, digits = 2) => (Number.isFinite(x) ? x.toFixed(digits).replace("-", "−") : "–");
const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

const SIGNS = { "\n": "↵", "\t": "⇥", " ": "␣", "\r": "␍", "": "∙" };

/** A token in one line, white space made visible. */
function quoted(piece) {
  if (piece === "") return "∙";
  const text = [...piece].map((c) => SIGNS[c] ?? c).join("");
  return text.length > 24 ? `${text.slice(0, 24)}…` : text;
}

const NAMES = { "\n": "new line", "\t": "tab", " ": "space", "": "part of a character" };
const spoken = (piece) => NAMES[piece] ?? piece;

const token = (t) => make("code", { class: "piece" }, quoted(DATA.text.piece[t]));

/** The name of a panel, where there are two. */
const heading = (model) => (MODELS.length > 1 ? [make("h3", {}, model.title)] : []);

/** One box a model, side by side where there is room. */
function perModel(draw) {
  return MODELS.map((model) =>
    make("div", { class: `model p${model.index}` }, ...heading(model), ...draw(model)),
  );
}

/** A row of buttons as one stop of the tab key; arrows move inside. */
function roving(container) {
  container.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const buttons = [...container.querySelectorAll("button")];
    const next = buttons[buttons.indexOf(event.target) + move];
    if (!next) return;
    event.preventDefault();
    event.stopPropagation();
    for (const button of buttons) button.tabIndex = button === next ? 0 : -1;
    next.focus();
  });
}
