// One model over the text: what it decided for token t at layer l.

const LEVELS = 255;

class Model {
  constructor(packed, index) {
    const { title, run, experts, layers, facts, sizes, guess, scores, history } = packed;
    Object.assign(this, { index, title, run, experts, layers, facts, sizes, guess });
    [this.T, this.L, this.R] = packed.expert.shape;
    this.expert_TLR = arrayOf(packed.expert);
    this.weight_TLR = arrayOf(packed.weight);
    this.droppedBits = arrayOf(packed.dropped);
    this.entropy_TL = arrayOf(packed.entropy);
    this.margin_TL = arrayOf(packed.margin);
    this.chosen_TLR = arrayOf(packed.chosen); // scores of the experts in expert_TLR
    this.gate = scores.gate;
    this.low_TL = arrayOf(scores.low);
    this.high_TL = arrayOf(scores.high);
    this.level_TLE = arrayOf(scores.level);
    this.history = history && { step: history.step, load_HLE: arrayOf(history.load) };
    this.loadsByLayer = new Map();
  }

  expert(t, l, r) {
    return this.expert_TLR[(t * this.L + l) * this.R + r];
  }

  dropped(t, l, r) {
    const i = (t * this.L + l) * this.R + r;
    return Boolean((this.droppedBits[i >> 3] >> (7 - (i & 7))) & 1);
  }

  /** The token's choices, best first. */
  choices(t, l) {
    const found = [];
    for (let r = 0; r < this.R; r++) {
      const expert = this.expert(t, l, r);
      if (expert === this.experts) continue;
      const weight = this.weight_TLR[(t * this.L + l) * this.R + r];
      found.push({ expert, weight, dropped: this.dropped(t, l, r) });
    }
    return found;
  }

  /** Router logits; of a softmax up to a constant, of an unknown gate the scores themselves. */
  logits(t, l) {
    const at = t * this.L + l;
    const low = this.low_TL[at];
    const range = this.high_TL[at] - low;
    const level_E = this.level_TLE.subarray(at * this.experts, (at + 1) * this.experts);
    return Float32Array.from(level_E, (level) => low + (range * level) / LEVELS);
  }

  /** Scores of all experts: in 8 bits, those of the chosen ones in 16. */
  scores(t, l) {
    const gates = { softmax: Math.exp, sigmoid: (v) => 1 / (1 + Math.exp(-v)), "": (v) => v };
    const score_E = this.logits(t, l).map(gates[this.gate]);
    for (let r = 0; r < this.R; r++) {
      const expert = this.expert(t, l, r);
      if (expert < this.experts) score_E[expert] = this.chosen_TLR[(t * this.L + l) * this.R + r];
    }
    return score_E;
  }

  /** Assignments of the text to each expert of a layer, {kept, dropped}. */
  loads(l) {
    if (!this.loadsByLayer.has(l)) {
      const empty = () => ({ kept: 0, dropped: 0 });
      const load_E = Array.from({ length: this.experts }, empty);
      for (let t = 0; t < this.T; t++)
        for (const { expert, dropped } of this.choices(t, l))
          load_E[expert][dropped ? "dropped" : "kept"] += 1;
      this.loadsByLayer.set(l, load_E);
    }
    return this.loadsByLayer.get(l);
  }

  /** Tokens of the text that an expert of a layer was given, in its order: {token, dropped}. */
  buffer(l, expert) {
    const found = [];
    for (let t = 0; t < this.T; t++)
      for (const choice of this.choices(t, l))
        if (choice.expert === expert) found.push({ token: t, dropped: choice.dropped });
    return found;
  }
}

/** The largest load over an even share, minus 1. */
function maxVio(load_E) {
  const total = load_E.reduce((sum, load) => sum + load, 0);
  return total ? (Math.max(...load_E) * load_E.length) / total - 1 : 0;
}

const DATA = JSON.parse(document.getElementById("data").textContent);
const MODELS = DATA.panels.map((packed, index) => new Model(packed, index));
const TOKENS = DATA.text.piece.length;
const LAYERS = MODELS[0].L;
const PAIRED = DATA.paired; // two checkpoints of one run: the same experts
DATA.text.document_T = arrayOf(DATA.text.document);
DATA.text.domain_T = arrayOf(DATA.text.domain);
