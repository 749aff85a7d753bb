// Keys: in the text arrows walk, anywhere else they are the browser's.

const IN_TEXT = {
  ArrowLeft: () => focusToken(state.token - 1),
  ArrowRight: () => focusToken(state.token + 1),
  ArrowDown: () => showLayer(state.layer - 1),
  ArrowUp: () => showLayer(state.layer + 1),
  Home: () => focusToken(0),
  End: () => focusToken(TOKENS - 1),
};
const ANYWHERE = {
  "[": () => showLayer(state.layer - 1),
  "]": () => showLayer(state.layer + 1),
  Escape: () => show({ expert: -1, hover: -1 }),
};
for (const step of STAGES.keys()) ANYWHERE[step + 1] = () => showStep(step + 1);

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const inText = event.target.dataset?.t !== undefined;
  const act = (inText && IN_TEXT[event.key]) || ANYWHERE[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});

const TOLD = {
  "← →": "the token before, the token after",
  "↓ ↑": "a layer down, a layer up (in the text)",
  "Home End": "the first token, the last one",
  "[ ]": "a layer down, a layer up (anywhere)",
  "1 – 7": "a step of the way through the layer",
  Escape: "all experts again",
};
for (const [keys, what] of Object.entries(TOLD)) {
  const marks = keys.split(" ").map((key) => make("kbd", {}, key));
  byId("keys").append(make("dt", {}, ...marks), make("dd", {}, what));
}
