// What is shown, and who draws it again when it changes.

const state = {
  layer: 0, // its place among those with experts
  token: Math.min(24, TOKENS - 1), // in focus
  hover: -1, // the token under the pointer; -1 = none
  rank: 0, // which choice gives the colour
  expert: -1, // whose tokens stand out; -1 = all
  chosenIn: 0, // the panel where it was selected
  step: 1, // of the way through the layer, 1 to 7
  moment: 0, // of the training
};
const watchers = [];

/** Draw now, and whenever one of these changes. */
function watch(keys, draw) {
  watchers.push([keys, draw]);
  draw();
}

function show(changes) {
  const changed = Object.keys(changes).filter((key) => state[key] !== changes[key]);
  Object.assign(state, changes);
  for (const [keys, draw] of watchers) if (keys.some((key) => changed.includes(key))) draw();
}

const between = (low, value, high) => Math.max(low, Math.min(high, value));
const showLayer = (layer) => show({ layer: between(0, layer, LAYERS - 1) });
const showToken = (token) => show({ token: between(0, token, TOKENS - 1), hover: -1 });
const showStep = (step) => show({ step: between(1, step, 7) });

/** Selects an expert, or nobody where it was selected already. */
function showExpert(model, expert) {
  const same = state.expert === expert && state.chosenIn === model.index;
  show({ expert: same ? -1 : expert, chosenIn: model.index });
}

/** The expert that stands out in a panel; of two trainings the experts have nothing in common. */
const selectedIn = (model) => (PAIRED || state.chosenIn === model.index ? state.expert : -1);
const looked = () => (state.hover < 0 ? state.token : state.hover);
