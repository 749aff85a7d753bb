// The text, set once; a layer or a choice changes classes only.

const spans = MODELS.map(() => []); // [panel][token]
const drawn = MODELS.map(() => new Array(TOKENS).fill("")); // the class each span has

function setText() {
  fill(byId("panels"), ...perModel((model) => [lines(model)]));
  byId("panels").addEventListener("pointerover", (event) => {
    show({ hover: event.target.dataset.t === undefined ? -1 : Number(event.target.dataset.t) });
  });
  byId("panels").addEventListener("pointerleave", () => show({ hover: -1 }));
  byId("panels").addEventListener("click", (event) => {
    if (event.target.dataset.t !== undefined) showToken(Number(event.target.dataset.t));
  });
  byId("panels").addEventListener("focusin", (event) => {
    if (event.target.dataset.t !== undefined) showToken(Number(event.target.dataset.t));
  });
  const boxes = [...byId("panels").querySelectorAll(".lines")];
  for (const box of boxes)
    box.addEventListener("scroll", () =>
      boxes.forEach((other) => (other.scrollTop = box.scrollTop)),
    );
}

/** Documents below each other where their domain is known, else behind each other. */
function lines(model) {
  const { document_T, domain_T, domains } = DATA.text;
  const box = make("div", {
    class: "lines",
    role: "listbox",
    "aria-label":
      `The text's ${count(TOKENS)} tokens. Arrow keys: left and right the token, ` +
      `up and down the layer`,
  });
  let line = null;
  let domain = 0;
  for (let t = 0; t < TOKENS; t++) {
    if (t === 0 || (document_T[t] !== document_T[t - 1] && domain_T[t])) {
      domain = domain_T[t];
      const name = domains[domain - 1] ?? "text";
      line = make("p", { role: "group", "aria-label": name });
      if (domain) box.append(make("span", { class: "domain", "aria-hidden": "true" }, name));
      box.append(line);
    }
    const span = make(
      "span",
      { "data-t": t, role: "option", tabindex: -1 },
      typeset(DATA.text.piece[t]),
    );
    spans[model.index].push(span);
    line.append(span);
  }
  if (domain) box.classList.add("with-domains");
  return box;
}

/** A token as it stands in the text: line ends visible, and still line ends. */
const typeset = (piece) =>
  piece === "" ? "∙" : piece.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t");

/** The colour of its choice; where an expert is selected, of that one or none. */
function classOf(model, t) {
  const { layer, rank } = state;
  const selected = selectedIn(model);
  if (selected >= 0) {
    const choice = model.choices(t, layer).find(({ expert }) => expert === selected);
    return choice ? `t e${selected}${choice.dropped ? " dropped" : ""} hit` : "t away";
  }
  const expert = model.expert(t, layer, rank);
  if (expert === model.experts) return "t none";
  return `t e${expert}${model.dropped(t, layer, rank) ? " dropped" : ""}`;
}

function colour() {
  for (const model of MODELS)
    for (let t = 0; t < TOKENS; t++) {
      const name = classOf(model, t);
      if (drawn[model.index][t] === name) continue;
      drawn[model.index][t] = name;
      spans[model.index][t].className = name;
    }
}

let marked = -1;

/** The focused token is the text's one stop of the tab key. */
function mark() {
  for (const own of spans) {
    if (marked >= 0) {
      own[marked].tabIndex = -1;
      own[marked].removeAttribute("aria-selected");
    }
    own[state.token].tabIndex = 0;
    own[state.token].setAttribute("aria-selected", "true");
  }
  marked = state.token;
}

/** Moves the focus to a token, in the panel that has it. */
function focusToken(t) {
  showToken(t);
  const own = spans.find((panel) => panel.includes(document.activeElement)) ?? spans[0];
  own[state.token].focus();
}

function legend() {
  const selected =
    state.expert < 0
      ? ""
      : ` Expert ${state.expert} is selected: its tokens stand out, Escape ends it.`;
  const same =
    MODELS.length > 1 && PAIRED
      ? ` ${percent(agreement())} of the tokens go to the same expert in both.`
      : "";
  const choice = MODELS[0].R > 1 ? `${ordinal(state.rank + 1)} choice` : "expert";
  byId("legend").textContent =
    `Coloured by each token's ${choice} at layer ${MODELS[0].layers[state.layer]}. ` +
    `Hatched: the expert was full and dropped it. Underlined: no expert. Click a token, or ` +
    `walk with the arrow keys.${same}${selected}`;
}

const ordinal = (n) =>
  `${n}${["th", "st", "nd", "rd"][n % 100 > 10 && n % 100 < 14 ? 0 : n % 10] ?? "th"}`;

/** The share of tokens whose choice is the same in both panels. */
function agreement() {
  let same = 0;
  for (let t = 0; t < TOKENS; t++)
    same += MODELS.every(
      (m) => m.expert(t, state.layer, state.rank) === MODELS[0].expert(t, state.layer, state.rank),
    );
  return same / TOKENS;
}

setText();
watch(["layer", "rank", "expert", "chosenIn"], colour);
watch(["layer", "rank", "expert", "chosenIn"], legend);
watch(["token"], mark);
