// Layer, choice, theme and keys.

function nextTo(label, control) {
  return make("label", {}, make("span", {}, label), control);
}

const layerSlider = make("input", {
  type: "range",
  id: "layer",
  min: 0,
  max: LAYERS - 1,
  value: 0,
  "aria-label": "Layer",
  oninput: (event) => showLayer(Number(event.target.value)),
});
const layerName = make("output", { id: "layer-name", for: "layer" });
const rankSelect = make(
  "select",
  { id: "rank", onchange: (event) => show({ rank: Number(event.target.value) }) },
  ...Array.from(
    {
      length: Math.min(
        8,
        MODELS.reduce((r, m) => Math.min(r, m.R), 8),
      ),
    },
    (_, r) => make("option", { value: r }, `${ordinal(r + 1)} choice`),
  ),
);

fill(
  byId("bar"),
  make(
    "button",
    {
      type: "button",
      id: "lower",
      "aria-label": "Lower layer",
      onclick: () => showLayer(state.layer - 1),
    },
    "‹",
  ),
  layerName,
  make(
    "button",
    {
      type: "button",
      id: "higher",
      "aria-label": "Higher layer",
      onclick: () => showLayer(state.layer + 1),
    },
    "›",
  ),
  layerSlider,
  ...(rankSelect.options.length > 1 ? [nextTo("Colour by", rankSelect)] : []),
  make(
    "button",
    { type: "button", id: "all", onclick: () => show({ expert: -1 }) },
    "Show all experts",
  ),
);

watch(["layer"], () => {
  const names = MODELS[0].layers;
  layerName.textContent = `Layer ${names[state.layer]} (${names[0]} – ${names.at(-1)})`;
  layerSlider.value = state.layer;
  layerSlider.setAttribute("aria-valuetext", layerName.textContent);
});
watch(["rank"], () => (rankSelect.value = state.rank));
watch(["expert"], () => (byId("all").hidden = state.expert < 0));

const THEMES = ["", "light", "dark"];

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = { "": "Theme: system", light: "Theme: light", dark: "Theme: dark" }[
    theme
  ];
  drawActive();
  if (TRAINED.length) drawMaps();
}
byId("theme").addEventListener("click", () =>
  setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]),
);
night.addEventListener("change", () => setTheme(document.documentElement.dataset.theme));
setTheme("");

const KEYS = {
  "← →": [
    "the token before, the token after",
    { ArrowLeft: () => focusToken(state.token - 1), ArrowRight: () => focusToken(state.token + 1) },
  ],
  "↓ ↑": [
    "a layer down, a layer up (in the text)",
    { ArrowDown: () => showLayer(state.layer - 1), ArrowUp: () => showLayer(state.layer + 1) },
  ],
  "Home End": [
    "the first token, the last one",
    { Home: () => focusToken(0), End: () => focusToken(TOKENS - 1) },
  ],
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const inText = event.target.dataset?.t !== undefined;
  const inField = event.target.matches("input, select");
  const act =
    inText && Object.assign({}, ...Object.values(KEYS).map(([, acts]) => acts))[event.key];
  if (act) {
    event.preventDefault();
    act();
  } else if (event.key === "Escape") show({ expert: -1, hover: -1 });
  else if (inField) return;
  else if (event.key === "[") showLayer(state.layer - 1);
  else if (event.key === "]") showLayer(state.layer + 1);
  else if (/^[1-7]$/.test(event.key)) showStep(Number(event.key));
});

const told = [
  ...Object.entries(KEYS).map(([keys, [what]]) => [keys, what]),
  ["[ ]", "a layer down, a layer up (anywhere)"],
  ["1 – 7", "a step of the way through the layer"],
  ["Escape", "no expert selected"],
];
fill(
  byId("keys"),
  ...told.flatMap(([keys, what]) => [
    make("dt", {}, ...keys.split(" ").map((key) => make("kbd", {}, key))),
    make("dd", {}, what),
  ]),
);
