// The way through the layer: seven buttons, and the stage that is chosen.

function stageName(i) {
  const known = MODELS.every(({ gate }) => gate === MODELS[0].gate) && MODELS[0].gate;
  return i === 2 ? ({ softmax: "Softmax", sigmoid: "Sigmoid" }[known] ?? "Scores") : STAGES[i][0];
}

const stepButtons = STAGES.map((_, i) =>
  make(
    "button",
    { type: "button", "data-step": i + 1, onclick: () => showStep(i + 1) },
    make("span", { class: "index", "aria-hidden": "true" }, i + 1),
    stageName(i),
  ),
);
fill(byId("step-buttons"), ...stepButtons);
roving(byId("step-buttons"));

function drawStage() {
  stepButtons.forEach((button, i) => {
    button.setAttribute("aria-pressed", state.step === i + 1);
    button.tabIndex = state.step === i + 1 ? 0 : -1;
  });
  byId("stage").dataset.step = state.step;
  fill(byId("stage"), ...perModel(STAGES[state.step - 1][1]));
}

watch(["step", "token", "layer"], drawStage);
