// What works on the focused token, layer by layer: everything in a dense twin, a few experts here.

function grid(model, lit) {
  const ratio = devicePixelRatio || 1;
  const cell = between(6, Math.floor(560 / model.experts), 32);
  const height = between(6, Math.floor(420 / model.L), 32);
  const canvas = make("canvas", {
    width: model.experts * cell * ratio,
    height: model.L * height * ratio,
  });
  canvas.style.width = `${model.experts * cell}px`;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  for (let l = 0; l < model.L; l++)
    for (let e = 0; e < model.experts; e++) {
      const part = lit(l, e);
      const box = [e * cell + 1, (model.L - 1 - l) * height + 1, cell - 2, height - 2];
      pen.fillStyle = part ? paint(e, model.experts, part) : isDark() ? "#ffffff14" : "#0000000f";
      pen.fillRect(...box);
    }
  return canvas;
}

function picture(title, canvas, told) {
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${title}. ${told}`);
  return make(
    "figure",
    {},
    make("figcaption", {}, make("b", {}, title)),
    canvas,
    make("p", { class: "soft" }, told),
  );
}

function drawActive() {
  fill(
    byId("grids"),
    ...perModel((model) => {
      const { total, active } = model.sizes;
      const at = Array.from(
        { length: model.L },
        (_, l) =>
          new Set(
            model
              .choices(state.token, l)
              .filter(({ dropped }) => !dropped)
              .map(({ expert }) => expert),
          ),
      );
      const visited = at.reduce((sum, experts) => sum + experts.size, 0);
      const all = model.L * model.experts;
      return [
        picture(
          "Dense: all of it",
          grid(model, () => 1),
          `Were each layer one network as wide as its ${model.experts} experts together, all ` +
            `${count(total)} parameters would work on every token.`,
        ),
        picture(
          "Sparse: this token's way",
          grid(model, (l, e) => (at[l].has(e) ? 1 : 0)),
          `${visited} of ${all} experts (${percent(visited / all)}) work on ` +
            `${quoted(DATA.text.piece[state.token])}, bottom layer to top. ` +
            `The model keeps ${count(total)} parameters and uses about ${count(active)} a ` +
            `token: ${percent(active / total)}.`,
        ),
      ];
    }),
  );
}

watch(["token"], drawActive);
