// The seven stages of a layer for one token: what is drawn at each.

const STAGES = [
  ["Token", tokenStage],
  ["Router logits", logitStage],
  ["Scores", scoreStage],
  ["Top-k", topStage],
  ["Dispatch", dispatchStage],
  ["Experts", expertStage],
  ["Weighted sum", sumStage],
];

const says = (...parts) => make("p", {}, ...parts);

function tokenStage(model) {
  const { dim } = model.sizes;
  const t = state.token;
  return [
    make(
      "p",
      { class: "around large" },
      before(t, 30),
      make("mark", {}, quoted(DATA.text.piece[t])),
      after(t, 30),
    ),
    says(
      `Layer ${model.layers[state.layer]} holds a vector x of D = ${dim} numbers for `,
      token(t),
      `. It knows what stands before the token, and nothing of what follows. Which of ` +
        `${model.experts} experts should work on it?`,
    ),
  ];
}

/** A column for each expert; `chosen` = those that are filled, null = all. */
function chart(model, value_E, chosen, digits = 2) {
  const high = Math.max(...value_E, 0);
  const low = Math.min(...value_E, 0);
  const range = high - low || 1;
  const best = Array.from(value_E.keys()).sort((a, b) => value_E[b] - value_E[a]);
  const bestLeft = best.find((e) => !chosen?.has(e));
  const bars = Array.from(value_E, (value, e) => {
    const part = Math.abs(value) / range;
    const from = ((value < 0 ? value : 0) - low) / range;
    const shown = chosen === null ? model.experts <= 16 : chosen.has(e) || e === bestLeft;
    return make(
      "div",
      {
        class: `bar e${e}${chosen && !chosen.has(e) ? " hollow" : ""}`,
        title: `expert ${e}: ${fixed(value, 4)}`,
      },
      make("span", { class: "value" }, shown ? fixed(value, digits) : ""),
      make(
        "span",
        { class: "column" },
        make("span", { class: "kept", "--part": part, "--from": from }),
      ),
      make("span", { class: "label" }, e),
    );
  });
  const told = best
    .slice(0, 3)
    .map((e) => `expert ${e} ${fixed(value_E[e], digits)}`)
    .join(", ");
  return make(
    "div",
    {
      class: "bars chart",
      role: "img",
      "aria-label": `${model.experts} experts; highest: ${told}`,
      "--zero": -low / range,
    },
    ...bars,
  );
}

function logitStage(model) {
  const what = {
    softmax:
      "A matrix of D × E turns x into one number for each expert. They are shown as " +
      "logarithms of the probabilities: the logits but for a constant.",
    sigmoid: "A matrix of D × E turns x into one number for each expert, its logit.",
    "":
      "A matrix of D × E turns x into one number for each expert. This router's logits cannot " +
      "be told from its scores; these are the scores.",
  };
  return [chart(model, model.logits(state.token, state.layer), null), says(what[model.gate])];
}

function scoreStage(model) {
  const what = {
    softmax: "The softmax makes probabilities of the logits: all above 0, together 1.",
    sigmoid:
      "A sigmoid makes a score between 0 and 1 of each logit, on its own: experts do not " +
      "compete yet.",
    "": "The scores that the router chooses by.",
  };
  const entropy = model.entropy_TL[state.token * model.L + state.layer];
  return [
    chart(model, model.scores(state.token, state.layer), null),
    says(
      `${what[model.gate]} Their entropy is ${fixed(entropy)} nats; `,
      `at ${fixed(Math.log(model.experts))} the router would not know anything.`,
    ),
  ];
}

function topStage(model) {
  const found = model.choices(state.token, state.layer);
  const chosen = new Set(found.map(({ expert }) => expert));
  const margin = model.margin_TL[state.token * model.L + state.layer];
  let close = `The last one taken is ${fixed(margin, 3)} ahead of the best one left.`;
  if (margin < 0)
    close =
      "An expert with a higher score was not taken: a bias that balances the loads, or a " +
      "limit, overruled the scores.";
  if (!Number.isFinite(margin)) close = "None is left.";
  const score_E = model.scores(state.token, state.layer);
  return [
    chart(model, score_E, chosen, 3),
    says(
      found.length
        ? `${plural(chosen.size, "expert")} of ${model.experts} taken. ${close}`
        : "No expert took this token.",
    ),
  ];
}

const NEIGHBOURS = 9; // shown on each side in an expert's buffer

function dispatchStage(model) {
  const rows = model.choices(state.token, state.layer).map(({ expert, dropped }) => {
    const buffer = model.buffer(state.layer, expert);
    const at = buffer.findIndex((row) => row.token === state.token);
    const begin = between(0, at - NEIGHBOURS, Math.max(0, buffer.length - 2 * NEIGHBOURS - 1));
    const cells = buffer.slice(begin, begin + 2 * NEIGHBOURS + 1).map((row) => {
      const kind = `slot${row.dropped ? " dropped" : ""}${row.token === state.token ? " here" : ""}`;
      const piece = quoted(DATA.text.piece[row.token]);
      return make(
        "li",
        { class: kind, title: `token ${row.token + 1}` },
        row.dropped ? make("s", {}, piece) : piece,
      );
    });
    const lost = buffer.filter((row) => row.dropped).length;
    const kept =
      `${count(at + 1)} of the ${count(buffer.length)} tokens of this text that it ` + `is given`;
    return make(
      "div",
      { class: `buffer e${expert}` },
      make(
        "p",
        {},
        make("b", {}, `Expert ${expert}`),
        ` number ${kept}`,
        lost ? `; ${count(lost)} found it full` : "",
        dropped ? ", this one too: it is dropped." : ".",
      ),
      make("ol", { class: "slots", "aria-label": `Buffer of expert ${expert}` }, ...cells),
    );
  });
  return [
    ...rows,
    says(
      `Tokens for the same expert are gathered in its buffer, here in the order of the text. ` +
        `Its capacity: ${model.facts.capacity ?? "unknown"}. What finds no slot is struck ` +
        `through and passes the layer by.`,
    ),
  ];
}

function expertStage(model) {
  const { dim, ffn, shared } = model.sizes;
  const found = model.choices(state.token, state.layer).filter(({ dropped }) => !dropped);
  const busy = new Set(found.map(({ expert }) => expert));
  const boxes = Array.from({ length: model.experts }, (_, e) =>
    make("li", { class: `expert e${e}${busy.has(e) ? " busy" : ""}` }, `${e}`),
  );
  const also = shared
    ? ` Besides, ${plural(shared, "shared expert")} ${shared === 1 ? "works" : "work"} on ` +
      `every token.`
    : "";
  return [
    make(
      "ol",
      {
        class: "experts",
        role: "img",
        "aria-label": `${busy.size} of ${model.experts} experts at work: ${[...busy].join(", ")}`,
      },
      ...boxes,
    ),
    says(
      `${busy.size} of ${model.experts} experts compute: each takes x from ${dim} to ${ffn} ` +
        `numbers and back to ${dim}. The others cost this token nothing.${also}`,
    ),
  ];
}

function sumStage(model) {
  const found = model.choices(state.token, state.layer);
  const total =
    found.reduce((sum, { weight, dropped }) => sum + (dropped ? 0 : Math.abs(weight)), 0) || 1;
  const terms = found.map(({ expert, weight, dropped }) =>
    make(
      "span",
      { class: `term e${expert}${dropped ? " dropped" : ""}` },
      dropped
        ? make("s", {}, `${fixed(weight, 3)} · E${expert}(x)`)
        : `${fixed(weight, 3)} · E${expert}(x)`,
    ),
  );
  const parts = found
    .filter(({ dropped }) => !dropped)
    .map(({ expert, weight }) =>
      make("span", { class: `e${expert}`, "--part": Math.abs(weight) / total }, `${expert}`),
    );
  const shared = model.sizes.shared ? [make("span", { class: "term" }, "shared(x)")] : [];
  return [
    make("p", { class: "sum" }, "y = ", ...joined([...terms, ...shared], " + ")),
    make("div", { class: "weights", "aria-hidden": "true" }, ...parts),
    says(
      "The weights are the router's, and through them it learns. A dropped choice counts " +
        "nothing. y is added to x, and the next layer goes on.",
    ),
    prediction(model, state.token),
  ];
}

const joined = (items, sign) => items.flatMap((item, i) => (i ? [sign, item] : [item]));
