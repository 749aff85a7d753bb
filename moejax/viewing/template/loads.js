// How the text's assignments spread over the experts of a layer. A bar selects its expert.

function drawLoads() {
  fill(
    byId("load-bars"),
    ...perModel((model) => {
      const load_E = model.loads(state.layer);
      const total_E = load_E.map(({ kept, dropped }) => kept + dropped);
      const most = Math.max(1, ...total_E);
      const even = total_E.reduce((sum, load) => sum + load, 0) / model.experts;
      const bars = make("div", {
        class: "bars buttons",
        role: "group",
        "aria-label": "Load of each expert",
        "--even": even / most,
      });
      bars.append(...load_E.map((load, e) => loadBar(model, e, load, most, even)));
      roving(bars);
      const lost = load_E.reduce((sum, { dropped }) => sum + dropped, 0);
      const dropped = lost ? ` ${plural(lost, "assignment")} dropped, hatched.` : "";
      const told =
        `Line: an even share, ${count(Math.round(even))}. MaxVio ` +
        `${fixed(maxVio(total_E))}.${dropped}`;
      return [bars, make("p", { class: "soft" }, told)];
    }),
  );
}

function loadBar(model, e, { kept, dropped }, most, even) {
  const lost = dropped ? `, ${count(dropped)} of them dropped` : "";
  const share = even ? (kept + dropped) / even : 0;
  const button = make("button", {
    type: "button",
    class: `bar e${e}`,
    "data-e": e,
    "data-load": kept + dropped,
    "aria-pressed": selectedIn(model) === e,
    "aria-label":
      `expert ${e}: ${plural(kept + dropped, "assignment")}${lost}, ` +
      `${fixed(share)} of an even share`,
    title: `expert ${e}: ${count(kept + dropped)}${lost}, ${fixed(share)} of an even share`,
    tabindex: e === Math.max(0, selectedIn(model)) ? 0 : -1,
    onclick: () => {
      showExpert(model, e);
      byId("load-bars").querySelector(`.p${model.index} [data-e="${e}"]`).focus();
    },
  });
  button.append(
    make(
      "span",
      { class: "column" },
      make("span", { class: "lost", "--part": dropped / most }),
      make("span", { class: "kept", "--part": kept / most }),
    ),
    make("span", { class: "label" }, e),
  );
  return button;
}

watch(["layer", "expert", "chosenIn"], drawLoads);
