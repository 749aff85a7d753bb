// The bar: layer and choice; and the theme.

function nextTo(label, control) {
  return make("label", {}, make("span", {}, label), control);
}

const RANKS = Math.min(LISTED, ...MODELS.map(({ R }) => R));
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
  ...Array.from({ length: RANKS }, (_, r) =>
    make("option", { value: r }, `${ordinal(r + 1)} choice`),
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
  ...(RANKS > 1 ? [nextTo("Colour by", rankSelect)] : []),
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
  byId("theme").textContent = `Theme: ${theme || "system"}`;
  drawActive();
  if (TRAINED.length) drawMaps();
}
byId("theme").addEventListener("click", () =>
  setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]),
);
night.addEventListener("change", () => setTheme(document.documentElement.dataset.theme));
setTheme("");
