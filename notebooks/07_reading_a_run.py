# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What did the router learn?
#
# A trained model with experts invites stories: *this expert does punctuation, that one does code*.
# Most of them are also true of a router that chose at random, or of the text itself. Here a small
# model is trained, its routing is written down token by token, and each number is read beside two
# others: what chance alone gives, and what the same routing gives once the tokens are shuffled.

# %%
import html
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, Image, display

from moejax.analyzing.figures import all_figures
from moejax.analyzing.subject import analyse_run
from moejax.config import Config, default_config, router_config
from moejax.training.loop import train
from moejax.training.saved import open_run
from moejax.training.traced import trace_text
from moejax.viewing import page
from moejax.viewing.gathering import panel_of

# %% [markdown]
# ## A run
#
# Two layers of eight experts, two a token, kept even by a bias; 120 steps on the code and the prose
# of the Python standard library, with a checkpoint every 30 steps. The same from the command line
# is `moejax train --config=... --workdir=...`.

# %%
STEPS, EXPERTS, K = 120, 8, 2

config = default_config()
config.model.update(layers=2, dim=32, ffn=32, heads=2)
config.moe.experts = EXPERTS
config.data.update(sequence=64, batch=16)
config.optimizer.update(learning_rate=1e-2, warmup=10)
config.train.update(steps=STEPS, eval_rows=32, eval_every=0, checkpoint_every=30, keep=10)
config.router = router_config("loss_free", k=K, bias_rate=0.02)

workdir = Path(tempfile.mkdtemp()) / "run"
summary = train(Config.from_dict(config), workdir, quiet=True)
print(f"{summary['bpb']:.2f} bits per byte after {STEPS} steps")

# %% [markdown]
# ## A trace: who went where
#
# `trace_text` runs the saved model over a text. What comes back has a column for each question:
# which experts, with which weight, whether one was full, how sure the router was. `T` counts tokens
# (bytes here), `L` layers, `R` choices.

# %%
run = open_run(workdir, progress=False)
text = "def area(radius):\n    return 3.14 * radius ** 2  # of a circle, from its radius\n"
trace = trace_text(run, text)
print("experts", trace.expert_TLR.shape, "weights", trace.weight_TLR.shape)

colours = plt.get_cmap("Set3").colors


def coloured(layer: int) -> str:
    """The text, each byte on the colour of its first expert."""
    spans = []
    for token, expert in zip(trace.token_T, trace.expert_TLR[:, layer, 0], strict=True):
        colour = ",".join(str(int(255 * part)) for part in colours[expert])
        shown = html.escape(chr(token)).replace("\n", "&#8629;\n")
        spans.append(f'<span style="background:rgb({colour});color:#000">{shown}</span>')
    return f"<pre>layer {layer}\n{''.join(spans)}</pre>"


display(HTML(coloured(0) + coloured(1)))
assert len(trace) == len(text) and not trace.dropped_TLR.any()

# %% [markdown]
# `moejax view` makes a page of this that one can walk through: every token's experts and weights,
# the steps of the layer, the loads of every recorded step. The same in Python, one file without a
# network:

# %%
panel = panel_of("a small run", workdir, run, trace)
view = workdir.parent / "view.html"
view.write_text(page([panel], "A small run"), encoding="utf-8")
print(f"{view.name}: {view.stat().st_size / 1e3:.0f} kB; open it in a browser")

# %% [markdown]
# ## Numbers, beside chance
#
# `moejax analyze` reads held-out text and measures. *By chance* is a router that draws its experts
# at random. *Shuffled* keeps the routing, and deals the tokens of each document (for domains: the
# labels, for ids: the ids) anew: what is left then was not about the order, the domain or the id.

# %%
found = analyse_run(workdir, rows=256)
figures = found.measures.figures()
print(f"{'':<20}{'value':>8}{'chance':>8}{'shuffled':>10}   mean of the layers")
for name, figure in figures.items():
    held = "" if figure.shuffled is None else f"{np.mean(figure.shuffled):10.3f}"
    print(f"{name:<20}{np.mean(figure.value):8.3f}{np.mean(figure.random):8.3f}{held:>10}")

# %% [markdown]
# Read three of them.
#
# - **The token decides.** Two occurrences of one byte share far more experts than two of different
#   bytes. A router of so small a model is mostly a table from bytes to experts.
# - **Repetition is not memory.** Neighbours do share an expert more often than chance says; so do
#   they once shuffled. Most of it is what documents are made of, the lesser part their order.
# - **Domains.** Code and prose use the experts differently, and by more than shuffled labels would.
#   But they also consist of other bytes: compare with the first line before calling it *topic*.

# %%
own, other = figures["vocabulary_input"], figures["repetition_first"]
assert np.mean(own.value) > 2 * np.mean(own.shuffled)
assert np.mean(other.value) > np.mean(other.random)
assert np.mean(figures["domains"].value) > 2 * np.mean(figures["domains"].shuffled)

shown = {figure.name: figure for figure in all_figures(found)}
print(", ".join(shown))
for name in ("repetition", "saturation"):
    display(Image(shown[name].png))

# %% [markdown]
# ## What is an expert worth?
#
# The test of a story is to take the expert away: each token's best, its second, one of the two by
# lot, and one that it had not chosen. The last is the control, and costs nothing by design. If the
# best one were worth no more than one by lot, the order of the choices would mean nothing.

# %%
display(Image(shown["ablation"].png))
assert found.ablation is not None
whole, (best, second) = found.ablation["whole"], found.ablation["rank"]
by_lot, unchosen = found.ablation["chosen"], found.ablation["other"]
print(f"bits per byte, whole: {whole:.3f}")
for what, bpb in {"best": best, "second": second, "by lot": by_lot, "unchosen": unchosen}.items():
    print(f"  without the {what:<9} +{bpb - whole:.3f}")
assert best > by_lot > second > whole and abs(unchosen - whole) < 1e-5


# %% [markdown]
# All of it in one command, with a page and a JSON file: `moejax analyze RUN`. Next: [will it fit on
# a pod?](08_planning_a_pod.ipynb)
