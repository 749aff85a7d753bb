# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What is a Mixture-of-Experts layer?
#
# It takes the place of a transformer's feed-forward network: E networks instead of one, of which
# every token visits only K. So the layer holds E networks' worth of parameters, and a token pays
# for K. Here is one layer taken apart, one stage a cell, and put together again: the pieces give
# what `moejax.MoE` gives, and what the obvious, wasteful formula gives.
#
# Names carry their axes: `x_TD` is an array of T tokens by D features, E are experts, K choices, F
# the hidden width of an expert, N = T K assignments of tokens to experts.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from moejax import MoE, RouterInput, combine_TE, make_router
from moejax.config import Config, ModelConfig, MoeConfig, RouterConfig
from moejax.dispatch import Experts, make_plan
from moejax.model.size import model_size
from moejax.reference import dense_moe

# %% [markdown]
# ## Parameters against FLOPs
#
# A small transformer, its feed-forward networks replaced by E experts, two for each token. The
# dashed line is a dense transformer whose one network is as wide as those two together. Parameters
# grow with E. The operations that a token costs stay at the dense model's, but for the router's D x
# E matrix: capacity is bought without paying for it at every token.


# %%
def size(experts: int, ffn: int):
    model = ModelConfig(dim=256, ffn=ffn)
    return model_size(Config(model, MoeConfig(experts=experts), RouterConfig("topk")), 256)


many = (2, 4, 8, 16, 32, 64)
sizes, dense = [size(e, 1024) for e in many], size(0, 2 * 1024)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
left.plot(many, [s.total / 1e6 for s in sizes], marker="o", label="held")
left.plot(many, [s.active / 1e6 for s in sizes], marker="o", label="at work on one token")
left.axhline(dense.total / 1e6, ls="--", color="grey", label="dense")
left.set(ylabel="parameters, millions", title="parameters", yscale="log")
right.plot(many, [s.flops / 1e6 for s in sizes], marker="o", label="top-2 of E")
right.axhline(dense.flops / 1e6, ls="--", color="grey", label="dense")
right.set(ylabel="training FLOPs a token, millions", title="operations", ylim=(0, 60))
for panel in (left, right):
    panel.set(xlabel="experts E", xscale="log")
    panel.set_xticks(many, [str(e) for e in many])
    panel.minorticks_off()
    panel.legend()
plt.show()

assert sizes[-1].total > 25 * dense.total
assert sizes[-1].flops < 1.02 * dense.flops

# %% [markdown]
# ## A layer and some tokens
#
# Twelve tokens, four experts, two for each token. The tokens are cut into two sequences, as a model
# would hand them over; the layer itself does not care.

# %%
T, D, E, K = 12, 16, 4, 2
router = make_router("topk", {"k": K, "renormalise": True})
layer = MoE(
    ModelConfig(dim=D, ffn=32, activation="relu"),
    MoeConfig(experts=E),
    RouterConfig("topk", (("k", K), ("renormalise", True))),
    rngs=nnx.Rngs(0),
)
x_TD = jax.random.normal(jax.random.key(1), (T, D))
for name in ("w_router_DE", "w_in_EDF", "w_out_EFD"):
    print(f"{name:<12} {getattr(layer, name).shape}")

# %% [markdown]
# ## 1. The router: logits, softmax, top-k
#
# One matrix product scores every expert for every token. A softmax makes the scores comparable, the
# K best experts are chosen, and their probabilities are divided by their sum: the *gate weights*.

# %%
logits_TE = x_TD @ layer.w_router_DE[...]
probs_TE = jax.nn.softmax(logits_TE)
weight_TK, expert_TK = jax.lax.top_k(probs_TE, K)
weight_TK = weight_TK / weight_TK.sum(-1, keepdims=True)
print("token 0 goes to experts", expert_TK[0], "with weights", weight_TK[0])

# %% [markdown]
# ## 2. A routing: the same as a list
#
# moejax writes those choices as a sparse tokens x experts matrix in coordinate form: assignment n
# says that `token_N[n]` goes to `expert_N[n]` and counts `weight_N[n]`. Every router returns that,
# also those in which experts choose tokens. `combine_TE` is the matrix itself.

# %%
routing = router.route(RouterInput(logits_TE, valid_T=jnp.ones(T, bool)))
chosen_TE = combine_TE(routing)

figure, panels = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True, layout="constrained")
titles = ("softmax over all experts", f"weights of the {K} chosen")
for panel, matrix_TE, title in zip(panels, (probs_TE, chosen_TE), titles, strict=True):
    image = panel.imshow(matrix_TE.T, cmap="viridis", aspect="auto", vmin=0, vmax=1)
    panel.set(title=title, xlabel="token", xticks=range(T), yticks=range(E))
panels[0].set_ylabel("expert")
figure.colorbar(image, ax=panels)
plt.show()

by_hand_TE = jnp.zeros((T, E)).at[jnp.arange(T)[:, None], expert_TK].set(weight_TK)
assert jnp.allclose(chosen_TE, by_hand_TE)
assert jnp.allclose(chosen_TE.sum(1), 1)

# %% [markdown]
# ## 3. Dispatch: rows move to their experts
#
# An expert wants its tokens side by side, so that it can work on them with one matrix product. The
# *plan* sorts the assignments by expert. Below, each mark is a row: as the router listed them (all
# first choices, then all second ones), and as the experts get them.

# %%
plan = make_plan(routing, capacity_factor=None)  # None: room for everybody, nothing is dropped
order_N = plan.order_N
rows_ND = x_TD[plan.token_N[order_N]]
print("rows of each expert:", plan.load_E)

figure, panels = plt.subplots(2, 1, figsize=(9, 2.6), layout="constrained")
for panel, index_N, title in (
    (panels[0], jnp.arange(T * K), "as routed"),
    (panels[1], order_N, "as dispatched"),
):
    panel.imshow(plan.expert_N[index_N][None], cmap="tab10", vmin=0, vmax=9, aspect="auto")
    for n, token in enumerate(plan.token_N[index_N]):
        panel.text(n, 0, int(token), ha="center", va="center", color="white")
    panel.set(title=f"{title}: number = token, colour = expert", xticks=[], yticks=[])
plt.show()

assert bool((jnp.diff(plan.expert_N[order_N]) >= 0).all()) and int(plan.load_E.sum()) == T * K

# %% [markdown]
# ## 4. The experts
#
# Each is an ordinary feed-forward network on its own rows, and there are no rows but those.

# %%
ends = np.cumsum(plan.load_E)
outputs = [
    jax.nn.relu(rows_ND[end - count : end] @ layer.w_in_EDF[e]) @ layer.w_out_EFD[e]
    for e, (end, count) in enumerate(zip(ends, plan.load_E.tolist(), strict=True))
]
y_ND = jnp.concatenate(outputs)

# %% [markdown]
# ## 5. Combine: rows move back
#
# Every token gets the sum of its experts' outputs, each times its gate weight. That weight is also
# the only way by which a gradient of the output reaches the router: the choice itself has none.

# %%
weighted_ND = plan.weight_N[order_N][:, None] * y_ND
y_TD = jnp.zeros((T, D)).at[plan.token_N[order_N]].add(weighted_ND)

# %% [markdown]
# ## The same, three times
#
# The pieces above; the layer; and the formula, $y_t = \sum_e w_{te}\,\mathrm{FFN}_e(x_t)$, which
# `moejax.reference` computes as it stands: every expert on every token, most of it times zero. That
# oracle is what all of moejax's ways to move tokens are tested against.

# %%
layer_BSD, stats = layer(x_TD.reshape(2, -1, D))
experts = Experts(layer.w_in_EDF[...], layer.w_out_EFD[...])
oracle_TD = dense_moe(experts, x_TD, chosen_TE, "relu")

largest = float(jnp.abs(oracle_TD).max())
for name, other_TD in (("pieces", y_TD), ("layer", layer_BSD.reshape(T, D))):
    off = float(jnp.abs(other_TD - oracle_TD).max())
    print(f"{name:<7} largest difference from the oracle {off:.1e}, of outputs up to {largest:.2f}")
    assert off < 1e-5 * largest

# %% [markdown]
# ## What the layer says about itself
#
# It writes nothing anywhere. What a training step wants to know comes out beside `y`: how many
# assignments each expert got, how many were dropped, what balance losses are made of.

# %%
print("load of each expert      ", stats.load_E, "even would be", T * K / E)
print("dropped by rank of choice", stats.dropped_K)
print("tokens without any expert", stats.left_behind)
assert (stats.load_E == plan.load_E).all() and int(stats.dropped_K.sum()) == 0

# %% [markdown]
# Next: [write a router of your own](02_prototype_a_router.ipynb), see [what happens when nobody
# keeps the load even](03_balance_and_collapse.ipynb), or read `moejax/moe.py`: the same stages, one
# line each.
