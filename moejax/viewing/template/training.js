// Loads while the model trained: a map of time and experts, and the bars of one moment.

const TRAINED = (PAIRED ? MODELS.slice(0, 1) : MODELS).filter((model) => model.history);
const MOMENTS = [...new Set(TRAINED.flatMap((model) => model.history.step))].sort((a, b) => a - b);
const FULL = 3; // times an even share: as strong as the map's colour gets

/** The place in a model's history of the last record up to a step. */
function recordAt(model, step) {
  const after = model.history.step.findIndex((recorded) => recorded > step);
  return after < 0 ? model.history.step.length - 1 : Math.max(0, after - 1);
}

function loadAt(model, h) {
  const begin = (h * model.L + state.layer) * model.experts;
  return model.history.load_HLE.subarray(begin, begin + model.experts);
}

function setTraining() {
  if (!TRAINED.length) {
    fill(byId("time"), make("p", { class: "soft" }, "No loads were recorded while it trained."));
    return;
  }
  state.moment = MOMENTS.length - 1;
  const slider = make("input", {
    type: "range",
    id: "moment",
    min: 0,
    max: MOMENTS.length - 1,
    value: state.moment,
    "aria-label": "Training step",
    oninput: (event) => show({ moment: Number(event.target.value) }),
  });
  fill(byId("time"), make("label", {}, make("span", { id: "moment-name" }), slider));
  fill(
    byId("moments"),
    ...TRAINED.map((model) =>
      make(
        "div",
        { class: `model p${model.index}` },
        ...(TRAINED.length > 1 ? [make("h3", {}, model.run)] : []),
        make(
          "div",
          { class: "map" },
          make("canvas", { role: "img" }),
          make("span", { class: "cursor" }),
        ),
        make(
          "p",
          { class: "soft" },
          `One row an expert, 0 on top; steps ${count(model.history.step[0])} to ` +
            `${count(model.history.step.at(-1))}. The stronger, the more load.`,
        ),
        make("div", { class: "bars chart", role: "img" }),
        make("p", { class: "soft told" }),
      ),
    ),
  );
  watch(["layer"], drawMaps);
  watch(["layer", "moment"], drawMoment);
}

/** One row an expert, one column a record; the stronger, the more load. */
function drawMaps() {
  const [r, g, b] = isDark() ? [255, 190, 92] : [160, 44, 12];
  for (const model of TRAINED) {
    const canvas = byId("moments").querySelector(`.p${model.index} canvas`);
    const moments = model.history.step.length;
    canvas.width = moments;
    canvas.height = model.experts;
    const image = new ImageData(moments, model.experts);
    for (let h = 0; h < moments; h++)
      loadAt(model, h).forEach((load, e) =>
        image.data.set([r, g, b, 255 * Math.min(1, load / FULL)], 4 * (e * moments + h)),
      );
    canvas.getContext("2d").putImageData(image, 0, 0);
    canvas.setAttribute(
      "aria-label",
      `Loads of ${model.experts} experts over ${moments} records of the training; MaxVio ` +
        `${fixed(maxVio(loadAt(model, 0)))} at first, ` +
        `${fixed(maxVio(loadAt(model, moments - 1)))} at last`,
    );
  }
}

function drawMoment() {
  const step = MOMENTS[state.moment];
  byId("moment-name").textContent = `Step ${count(step)}`;
  byId("moment").value = state.moment;
  byId("moment").setAttribute("aria-valuetext", `step ${step}`);
  const most = Math.max(
    2,
    ...TRAINED.flatMap((model) => [...loadAt(model, recordAt(model, step))]),
  );
  for (const model of TRAINED) {
    const box = byId("moments").querySelector(`.p${model.index}`);
    const h = recordAt(model, step);
    const load_E = loadAt(model, h);
    box.querySelector(".cursor").style.setProperty("--at", (h + 0.5) / model.history.step.length);
    drawBars(model, box.querySelector(".bars"), load_E, most);
    const idle = load_E.filter((load) => load < 0.1).length;
    box.querySelector(".told").textContent =
      `MaxVio ${fixed(maxVio(load_E))}: the busiest expert has ${fixed(Math.max(...load_E))} ` +
      `times an even share; ` +
      `${idle} of ${model.experts} have less than a tenth of one.`;
  }
}

function drawBars(model, bars, load_E, most) {
  bars.style.setProperty("--even", 1 / most);
  bars.setAttribute(
    "aria-label",
    `Load over an even share, by expert: ${[...load_E].map((load) => fixed(load, 1)).join(", ")}`,
  );
  fill(
    bars,
    ...Array.from(load_E, (load, e) =>
      make(
        "div",
        { class: `bar e${e}`, "data-load": load.toFixed(3), title: `expert ${e}: ${fixed(load)}` },
        make("span", { class: "column" }, make("span", { class: "kept", "--part": load / most })),
        make("span", { class: "label" }, e),
      ),
    ),
  );
}

setTraining();
