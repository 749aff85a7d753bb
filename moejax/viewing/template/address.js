// The address keeps what is shown: view.html#layer=3&token=24&step=4 opens there again, and
// at=training scrolls to that section.

const KEPT = ["layer", "rank", "token", "step", "moment", "expert", "chosenIn"];
const LIMITS = {
  layer: LAYERS - 1,
  rank: RANKS - 1,
  token: TOKENS - 1,
  step: 7,
  moment: Math.max(0, MOMENTS.length - 1),
  expert: Math.min(...MODELS.map((model) => model.experts)) - 1,
  chosenIn: MODELS.length - 1,
};
const UNCHANGED = { ...state };

function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  if (THEMES.includes(asked.get("theme"))) setTheme(asked.get("theme"));
  const found = {};
  for (const key of KEPT) {
    const value = Number.parseInt(asked.get(key), 10);
    if (value >= (key === "step" ? 1 : 0) && value <= LIMITS[key]) found[key] = value;
  }
  show({ ...UNCHANGED, ...found });
  document.querySelector(`section[id="${CSS.escape(asked.get("at") ?? "")}"]`)?.scrollIntoView();
}

function writeAddress() {
  const parts = KEPT.filter((key) => state[key] !== UNCHANGED[key]).map(
    (key) => `${key}=${state[key]}`,
  );
  const { theme } = document.documentElement.dataset;
  if (theme) parts.push(`theme=${theme}`);
  if (parts.length || location.hash) history.replaceState(null, "", `#${parts.join("&")}`);
}

readAddress();
addEventListener("hashchange", readAddress);
let writing = 0;
watch(KEPT, () => {
  clearTimeout(writing);
  writing = setTimeout(writeAddress, 400); // browsers refuse more than some changes a second
});
