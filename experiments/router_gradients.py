"""Whose gradient tells the router what it should know? Bias and variance of each router's gradient.

    python -m experiments.router_gradients

A discrete router is trained by differentiating the weights of the experts that happened to be
chosen. On small problems the exact gradient can be computed instead (`moejax.analysis.gradients`),
so each router's own can be held against it: how far off is its mean (bias, cosine), how much does
it scatter (deviation), and how does that change as the router becomes sure of itself (the scale of
the logits). No training: takes about two minutes on two CPU cores.
"""

import json
from pathlib import Path
from typing import Any

from absl import app, flags

from moejax.analysis.gradients import OUTCOMES, Quality, average_quality

OUT = flags.DEFINE_string("out", "experiments/results/router_gradients", "output folder")

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "switch": ("switch", {}),
    "top-2 raw": ("topk", {"k": 2}),
    "top-2 renormalised": ("topk", {"k": 2, "renormalise": True}),
    "gshard": ("gshard_top2", {}),
    "loss-free": ("loss_free", {"k": 2}),
    "expert choice": ("expert_choice", {"k": 2}),
    "noisy top-2": ("noisy_topk", {"k": 2}),
    "V-MoE": ("vmoe", {"k": 2}),
    "ReMoE": ("remoe", {"k": 2}),
    "sparsemixer": ("sparsemixer2", {"k": 1}),
    "densemixer": ("densemixer", {"k": 2}),
    "BASE": ("base", {}),
    "sinkhorn": ("sinkhorn", {"k": 2}),
}
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
ENUMERATED = 3  # experts, where outcomes are enumerated


def measure(arms: dict[str, tuple[str, dict[str, Any]]] = ARMS, **sizes: int) -> dict[str, Any]:
    """arm -> {'dense' | 'expected': {scale: [cosine, bias, deviation]}}."""

    def numbers(q: Quality) -> list[float]:
        return [float(x) for x in q]

    found: dict[str, Any] = {}
    for arm, (name, options) in arms.items():
        found[arm] = {
            "dense": {
                scale: numbers(average_quality(name, options, scale=scale, **sizes))
                for scale in SCALES
            }
        }
        if name in OUTCOMES:
            settings = {"against": "expected", "experts": ENUMERATED, **sizes}
            found[arm]["expected"] = {
                scale: numbers(average_quality(name, options, scale=scale, **settings))
                for scale in SCALES
            }
    return found


def table(found: dict[str, Any]) -> str:
    """At scale 1, as Markdown."""
    lines = [
        "| router | against | cosine | bias | deviation |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm, kinds in found.items():
        for kind, by_scale in kinds.items():
            cells = " | ".join(f"{x:.2f}" for x in by_scale[1.0])
            lines.append(f"| {arm} | {kind} | {cells} |")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Cosine with the dense gradient and scatter, over the scale of the logits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    dashes = ("-", "--", ":")
    for i, (arm, kinds) in enumerate(found.items()):
        style = {"color": f"C{i % 7}", "linestyle": dashes[i // 7], "marker": ".", "label": arm}
        by_scale = kinds["dense"]
        panels[0].plot(SCALES, [by_scale[s][0] for s in SCALES], **style)
        if by_scale[1.0][2] > 0:
            panels[1].plot(SCALES, [by_scale[s][2] for s in SCALES], **style)
    panels[0].set(title="Cosine with the gradient of the dense mixture", ylim=(0, 1.02))
    panels[1].set(title="Deviation over draws, relative to that gradient", ylim=(0, None))
    for panel in panels:
        panel.set(xscale="log", xlabel="scale of the logits")
        panel.set_xticks(SCALES, [f"{scale:g}" for scale in SCALES])
        panel.minorticks_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(_: list[str]) -> None:
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    found = measure()
    (out / "results.json").write_text(json.dumps(found, indent=1))
    text = table(found)
    (out / "table.md").write_text(f"{text}\n")
    draw(found, out / "gradients.png")
    print(text)


if __name__ == "__main__":
    app.run(main)
