// The token that is looked at: its experts and weights, in a card and in words.

function card() {
  const t = looked();
  const domain = DATA.text.domains[DATA.text.domain_T[t] - 1];
  byId("token-title").textContent =
    `Token ${count(t + 1)} of ${count(TOKENS)}${domain ? `, ${domain}` : ""}`;
  const around = make(
    "p",
    { class: "around" },
    before(t, 14),
    make("mark", {}, quoted(DATA.text.piece[t])),
    after(t, 14),
  );
  fill(byId("card"), around, ...perModel((model) => choices(model, t)));
}

const before = (t, n) =>
  DATA.text.piece
    .slice(Math.max(0, t - n), t)
    .join("")
    .replaceAll("\n", "↵");
const after = (t, n) =>
  DATA.text.piece
    .slice(t + 1, t + 1 + n)
    .join("")
    .replaceAll("\n", "↵");

const LISTED = 8; // of a token's choices; ReMoE may have dozens

function choices(model, t) {
  const { layer } = state;
  const found = model.choices(t, layer);
  const more = found.length > LISTED ? `And ${found.length - LISTED} more. ` : "";
  const rows = found
    .slice(0, LISTED)
    .map(({ expert, weight, dropped }) =>
      make(
        "li",
        { class: `e${expert}${dropped ? " dropped" : ""}` },
        make("span", { class: "name" }, `expert ${expert}`),
        make(
          "span",
          { class: "track", "aria-hidden": "true" },
          make("span", { "--part": Math.min(1, Math.abs(weight)) }),
        ),
        make("span", { class: "number" }, fixed(weight, 3)),
        make("span", { class: "note" }, dropped ? "dropped" : ""),
      ),
    );
  const list = rows.length
    ? make("ol", { class: "choices" }, ...rows)
    : make("p", {}, "No expert: the layer adds nothing.");
  return [list, make("p", { class: "soft" }, more + uncertainty(model, t)), prediction(model, t)];
}

function uncertainty(model, t) {
  const at = t * model.L + state.layer;
  const margin = model.margin_TL[at];
  const overruled = margin < 0 ? ": a bias or a limit overruled the scores" : "";
  return (
    `Entropy ${fixed(model.entropy_TL[at])} of ${fixed(Math.log(model.experts))} nats, ` +
    `margin ${fixed(margin, 3)}${overruled}.`
  );
}

function prediction(model, t) {
  const right = model.guess[t] === DATA.text.target[t];
  const guess = make("code", { class: "piece" }, quoted(model.guess[t]));
  const next = make("code", { class: "piece" }, quoted(DATA.text.target[t]));
  return make(
    "p",
    { class: "soft" },
    "Guesses ",
    guess,
    right ? " next, and is right." : " next; it is ",
    ...(right ? [] : [next, "."]),
  );
}

/** The focused token for those who listen. */
function describe() {
  const t = state.token;
  const told = MODELS.map((model) => {
    const list = model
      .choices(t, state.layer)
      .slice(0, LISTED)
      .map(
        ({ expert, weight, dropped }) =>
          `expert ${expert} weight ${fixed(weight)}${dropped ? ", dropped" : ""}`,
      );
    return (MODELS.length > 1 ? `${model.title}: ` : "") + (list.join("; ") || "no expert");
  });
  return (
    `${spoken(DATA.text.piece[t])}, token ${t + 1}, layer ` +
    `${MODELS[0].layers[state.layer]}. ${told.join(". ")}`
  );
}

watch(["token", "hover", "layer"], card);
watch(["token", "layer"], () => (byId("live").textContent = describe()));
