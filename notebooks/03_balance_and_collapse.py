# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What keeps experts busy?
#
# A router that is trained on the loss alone has a rich-get-richer problem: an expert that is chosen
# more learns more, and is chosen even more. Here the same tiny transformer is trained four times on
# the same text, with nothing against that, and with three remedies: a balance loss, a z-loss, and a
# bias that is moved without any loss. One of the three is not a remedy for this at all.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display

from moejax.config import Config, default_config, router_config
from moejax.data import open_dataset
from moejax.routing.floors import max_vio_floor
from moejax.training.program import build_program

# %% [markdown]
# ## Four runs that differ in one thing
#
# One layer, eight experts, top-1, 1,024 bytes of the Python standard library a step. The router
# starts with strong opinions (`router_scale`) and learns fast, so that 120 steps show what a large
# run shows in thousands.
#
# - **none**: the most probable expert, and cross entropy only.
# - **balance loss** (Switch, 2101.03961): plus 0.03 of $E \sum_e f_e P_e$, which is 1 when all
#   experts get equal shares $f$ of the tokens and $P$ of the probability.
# - **z-loss** (ST-MoE, 2202.08906): plus 0.01 of the mean squared logsumexp of the logits.
# - **bias** (loss-free, 2408.15664): each expert's score has a bias, used for choosing only; after
#   each step it goes up by 0.02 where an expert had too few tokens, and down where too many. Its
#   scores are sigmoids, as in the paper; the others' a softmax.
#
# The weight 1e-9 changes nothing; it has every run report the two losses.

# %%
STEPS, EXPERTS = 120, 8


def config(router: str, balance: dict[str, float], **options) -> Config:
    config = default_config()
    config.model.update(layers=1, dim=32, ffn=32, heads=2)
    config.moe.update(experts=EXPERTS, router_scale=10.0)
    config.data.update(sequence=64, batch=16)
    config.optimizer.update(learning_rate=2e-2, warmup=10)
    config.train.steps = STEPS
    config.router = router_config(router, k=1, **options)
    config.balance.update({"load_balance": 1e-9, "router_z": 1e-9, **balance})
    return Config.from_dict(config)


RUNS = {
    "none": config("topk", {}),
    "balance loss": config("topk", {"load_balance": 0.03}),
    "z-loss": config("topk", {"router_z": 0.01}),
    "bias": config("loss_free", {}, bias_rate=0.02),
}

# %% [markdown]
# ## Train, and watch
#
# `moejax train` does this with checkpoints and logs. Underneath is one compiled function, from a
# state and a batch to the next state and what there is to say about the step; it can be called by
# hand. *MaxVio* is the load of the busiest expert over the mean, minus 1: 0 is even, 7 is one of
# eight experts with everything. The dotted line is what tokens that choose at random would show.

# %%
text = open_dataset(RUNS["none"].data, progress=False)
floor = max_vio_floor(tokens=16 * 64, experts=EXPERTS, k=1)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
left.set(xlabel="step", ylabel="loss, nats per byte", xlim=(0, STEPS), ylim=(2.2, 4.5))
right.set(xlabel="step", ylabel="MaxVio", xlim=(0, STEPS), ylim=(0, 7))
right.axhline(floor, color="black", ls=":")
picture = display(figure, display_id=True)


def smooth(values: list[float], width: int = 10) -> np.ndarray:
    return np.convolve(values, np.ones(width) / width, "valid")


def run(name: str, config: Config) -> list[dict]:
    program = build_program(config, text.vocab_size, len(text.domains))
    state, log = program.init(0, text.count_V), []
    curves = [panel.plot([], [], label=name)[0] for panel in (left, right)]
    left.legend()
    for step, (batch, _) in zip(range(1, STEPS + 1), text.train_batches(0, seed=0), strict=False):
        state, metrics = program.train_step(state, program.put(batch))
        log.append(jax.device_get(metrics))
        if step % 40 == 0:
            for curve, key in zip(curves, ("loss", "max_vio"), strict=True):
                values = smooth([m[key] for m in log])
                curve.set_data(np.arange(len(values)) + 10, values)
            picture.update(figure)
    return log


logs = {name: run(name, config) for name, config in RUNS.items()}
plt.close(figure)

# %% [markdown]
# Without a remedy the load stays several times off. The balance loss and the bias bring it down to
# where chance is in sight; the z-loss does not. The losses differ little: in so short a training
# imbalance does not cost much by itself. It costs elsewhere: with experts on different devices the
# busiest one sets the time of the step, and with a capacity its tokens are dropped.

# %%
late = {name: log[-STEPS // 4 :] for name, log in logs.items()}
vio = {name: np.mean([m["max_vio"] for m in part]) for name, part in late.items()}
loss = {name: np.mean([m["loss"] for m in part]) for name, part in late.items()}
for name in RUNS:
    print(f"{name:<13} MaxVio {vio[name]:.2f}   loss {loss[name]:.3f}")

assert vio["none"] > 1.5 and vio["z-loss"] > 1.0
assert max(vio["balance loss"], vio["bias"]) < 0.6 * vio["none"]
assert max(loss.values()) - min(loss.values()) < 0.15

# %% [markdown]
# ## Who gets the tokens
#
# Each row is an expert, each column a step; bright means many tokens. *Collapse* is a picture with
# one bright row. Dark rows are parameters that are paid for and not used.

# %%
figure, panels = plt.subplots(1, 4, figsize=(12, 2.6), sharey=True, layout="constrained")
for panel, (name, log) in zip(panels, logs.items(), strict=True):
    load_SE = np.stack([m["load_LE"][0] for m in log])
    image = panel.imshow(load_SE.T, aspect="auto", cmap="magma", vmin=0, vmax=0.6)
    panel.set(title=name, xlabel="step", yticks=range(EXPERTS))
panels[0].set_ylabel("expert")
figure.colorbar(image, ax=panels, label="share of the tokens")
plt.show()

# %% [markdown]
# ## What each remedy works on
#
# The balance loss itself falls to 1 where it is trained, and gets there by the bias too. The z-loss
# pulls at the *size* of the logits, which keeps a router from growing so sure that rounding in low
# precision decides. That is worth having, and is no balance: use it beside one of the others.

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
for panel, key, title in zip(
    panels,
    ("load_balance", "router_z"),
    ("$E \\sum_e f_e P_e$, 1 = even", "mean squared logsumexp of the logits"),
    strict=True,
):
    for name, log in logs.items():
        values = smooth([m["balance"][key] for m in log])
        panel.plot(np.arange(len(values)) + 10, values, label=name)
    panel.set(xlabel="step", title=title)
panels[0].legend()
panels[1].set_yscale("log")
plt.show()

z = {name: np.mean([m["balance"]["router_z"] for m in part]) for name, part in late.items()}
assert z["z-loss"] < 0.5 * z["none"]

# %% [markdown]
# One seed of a tiny model shows mechanisms, not which remedy is best; for that there is
# `moejax compare experiments/loss_free.py:smoke`. Next: [what a capacity does to a crowded
# expert](04_capacity_and_drops.ipynb).
