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
# # What does a router's gradient know?
#
# A discrete router is trained by differentiating the weights of the experts that happened to be
# chosen. It never hears what the others would have said. On a small problem that can be computed:
# the *dense* gradient asks every expert, and for routers that draw, the *expected* gradient
# enumerates every draw. Here each router's own gradient is held against both.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt

from moejax import make_router
from moejax.analysis.gradients import (
    Problem,
    average_quality,
    dense_gradient,
    router_gradient,
)

# %% [markdown]
# ## One token, three experts
#
# Expert outputs are the numbers 0, 1 and 3, the target is 3: the third expert is right. But the
# router prefers the first. The loss is $(y - 3)^2 / 2$; a *negative* derivative of a logit means
# that training will raise it.

# %%
problem = Problem(
    logits_TE=jnp.asarray([[1.0, 0.5, 0.0]]),
    v_TED=jnp.asarray([[[0.0], [1.0], [3.0]]]),
    target_TD=jnp.asarray([[3.0]]),
)
routers = {
    "top-1": make_router("topk", {"k": 1}),
    "top-2 raw": make_router("topk", {"k": 2}),
    "top-2 renormalised": make_router("topk", {"k": 2, "renormalise": True}),
    "DenseMixer top-1": make_router("densemixer", {"k": 1}),
}
gradients = {"dense: every expert": dense_gradient(make_router("topk"), problem)[0]}
for name, router in routers.items():
    gradients[name] = router_gradient(router, problem, None)[0]
for name, gradient_E in gradients.items():
    print(f"{name:22s}", "  ".join(f"{float(g):+.3f}" for g in gradient_E))

dense_E, mixed_E = gradients["dense: every expert"], gradients["DenseMixer top-1"]
assert dense_E[2] < 0 and (gradients["top-1"] == 0).all()  # the third logit should rise
assert gradients["top-2 raw"][1] < 0 < gradients["top-2 raw"][2]
assert jnp.allclose(mixed_E / jnp.linalg.norm(mixed_E), dense_E / jnp.linalg.norm(dense_E))

# %% [markdown]
# Asked densely, the router should raise the third logit. Top-1 sees only that expert 0 gives
# nothing, whatever its weight: no gradient at all. Top-2 raises the second, the best it has met.
# DenseMixer computes every expert for the sake of the gradient. Its forward pass is top-1's, and so
# is the loss it differentiates: the direction is the dense one, the size that of top-1's error.

# %% [markdown]
# ## Random problems: bias and scatter over how sure the router is
#
# Twelve tokens, six experts with random outputs, random targets. *Cosine* and *bias* compare the
# mean gradient with the dense one; *deviation* is the scatter over draws.

# %%
arms = {
    "switch": ("switch", {}),
    "top-2": ("topk", {"k": 2}),
    "top-2 renormalised": ("topk", {"k": 2, "renormalise": True}),
    "gshard (random second)": ("gshard_top2", {}),
    "noisy top-2": ("noisy_topk", {"k": 2}),
    "sparsemixer": ("sparsemixer2", {"k": 1}),
    "densemixer": ("densemixer", {"k": 2}),
}
scales = (0.25, 0.5, 1.0, 2.0, 4.0)
found = {
    arm: [average_quality(name, options, scale=scale, problems=16, draws=48) for scale in scales]
    for arm, (name, options) in arms.items()
}

# %%
figure, panels = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
titles = ("cosine with the dense gradient", "bias / size of the dense gradient", "deviation / size")
for panel, title, field in zip(panels, titles, ("cosine", "bias", "deviation"), strict=True):
    for arm, by_scale in found.items():
        panel.plot(scales, [float(getattr(q, field)) for q in by_scale], marker=".", label=arm)
    panel.set(title=title, xscale="log", xlabel="scale of the logits")
    panel.set_xticks(scales, [f"{scale:g}" for scale in scales])
    panel.minorticks_off()
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
plt.show()

at_1 = {arm: by_scale[scales.index(1.0)] for arm, by_scale in found.items()}
assert at_1["top-2 renormalised"].cosine < at_1["top-2"].cosine < at_1["densemixer"].cosine
assert at_1["densemixer"].cosine > 0.95 and at_1["sparsemixer"].deviation > 0.2

# %% [markdown]
# ## Against its own expected loss
#
# A router that draws could also be asked for the gradient of *its own* expected loss: not what the
# dense mixture would say, but how the loss it really has moves with the logits, chances included.
# Differentiating the weights of a draw leaves out how the chance of that draw moves.

# %%
for name, options in (
    ("gshard_top2", {}),
    ("noisy_topk", {"k": 2}),
    ("sparsemixer2", {"k": 1}),
):
    sizes = {"experts": 3, "problems": 16, "draws": 128}
    q = average_quality(name, options, against="expected", **sizes)
    print(
        f"{name:14s} cosine {float(q.cosine):.2f}   bias {float(q.bias):.2f}   "
        f"deviation {float(q.deviation):.2f}"
    )
    assert q.bias > 0.2

# %% [markdown]
# ## How many experts are enough?
#
# The bias of top-k falls as k grows, until at k = E there is none.

# %%
biases = []
for k in (1, 2, 4, 6):
    q = average_quality("topk", {"k": k}, problems=16, draws=1)
    print(f"k={k}: cosine {float(q.cosine):.3f}   bias {float(q.bias):.3f}")
    biases.append(float(q.bias))
assert biases == sorted(biases, reverse=True) and biases[-1] < 1e-5
