// A colour for each expert: hues around the OKLCH circle, of two lightnesses where there are many.
// Text on them keeps a contrast above 4.5 in light and in dark (a test computes it).

const MANY = 12; // more hues than this at one lightness are hard to tell apart

/** [lightness, chroma, hue] of an expert's background. */
function shade(expert, experts, dark) {
  const levels = experts > MANY ? 2 : 1;
  const hue = (25 + (360 * Math.floor(expert / levels)) / Math.ceil(experts / levels)) % 360;
  const second = expert % levels;
  if (dark) return [second ? 0.38 : 0.485, second ? 0.1 : 0.12, hue];
  return [second ? 0.75 : 0.88, second ? 0.13 : 0.085, hue];
}

const oklch = ([lightness, chroma, hue]) => `oklch(${lightness} ${chroma} ${hue.toFixed(1)})`;
const night = matchMedia("(prefers-color-scheme: dark)");
const isDark = () =>
  (document.documentElement.dataset.theme || (night.matches ? "dark" : "light")) === "dark";

/** .p0 .e3 and so on: the property --e, that backgrounds and bars use. */
function colourRules() {
  const rules = [];
  for (const model of MODELS)
    for (let e = 0; e < model.experts; e++) {
      const [light, dark] = [false, true].map((dark) => oklch(shade(e, model.experts, dark)));
      rules.push(`.p${model.index} .e${e} { --e: light-dark(${light}, ${dark}); }`);
    }
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(rules.join("\n"));
  document.adoptedStyleSheets.push(sheet);
}
colourRules();

/** A canvas's colour; with less of it as the part falls from 1 to 0. */
function paint(expert, experts, part = 1) {
  const [lightness, chroma, hue] = shade(expert, experts, isDark());
  return `oklch(${lightness} ${chroma * 1.3} ${hue} / ${part})`;
}
