// The head of the page: what is looked at.

fill(
  byId("models"),
  ...MODELS.map((model) => {
    const { choices, total, active } = model.sizes;
    const size =
      `${fixed(choices, Number.isInteger(choices) ? 0 : 1)} of ${model.experts} ` +
      `experts in ${plural(model.L, "layer")}; ${count(active)} of ${count(total)} parameters ` +
      `a token`;
    const facts = Object.entries(model.facts).map(([name, what]) => `${name}: ${what}`);
    return make(
      "p",
      {},
      make("b", {}, model.title),
      make("span", { class: "soft" }, ` ${[size, ...facts].join(" · ")}`),
    );
  }),
);
document.documentElement.dataset.models = MODELS.length;
