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
# # When an expert is full, who is left out?
#
# Accelerators want arrays of fixed size, so an expert gets a buffer of C rows, its *capacity*, for
# each group of tokens. What does not fit is dropped: the token goes on with what its other experts
# say, or with nothing but the residual stream. How many are dropped, beside what chance alone would
# drop? Which ones? And does it matter how the rows are moved?

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from moejax import MoE, RouterInput, make_router
from moejax.config import ModelConfig, MoeConfig, RouterConfig
from moejax.dispatch import Experts, capacity, einsum, gather, make_plan
from moejax.routing.floors import drop_floor

# %% [markdown]
# ## Three ways to move rows, one result
#
# `einsum` multiplies by one-hot matrices, as in 2020; `gather` copies rows into buffers and back;
# `dropless` sorts them by expert and needs no buffers. They are given the same plan of who goes
# where, so they agree in outputs and gradients, also where the plan drops. Here the capacity factor
# is 1: just enough if the load were even.


# %%
def output_and_gradient(dispatch: str, x_BSD: jax.Array):
    config = MoeConfig(experts=8, dispatch=dispatch, capacity_factor=1.0)
    layer = MoE(ModelConfig(dim=16, ffn=32), config, "topk", rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)

    def loss(params):
        y_BSD, stats = nnx.merge(graph, params)(x_BSD)
        return jnp.square(y_BSD).sum(), (y_BSD, stats)

    gradient, (y_BSD, stats) = jax.jit(jax.grad(loss, has_aux=True))(params)
    return y_BSD, jax.tree.leaves(gradient), stats


x_BSD = jax.random.normal(jax.random.key(1), (2, 32, 16))
found = {name: output_and_gradient(name, x_BSD) for name in ("einsum", "gather", "dropless")}
y_BSD, gradient, stats = found["einsum"]
print("dropped by rank of choice:", stats.dropped_K, "of", x_BSD.shape[0] * x_BSD.shape[1], "each")
for name in ("gather", "dropless"):
    other_BSD, others, other_stats = found[name]
    off = [jnp.abs(a - b).max() for a, b in zip(gradient, others, strict=True)]
    print(
        f"{name:<9} differs from einsum by {float(jnp.abs(other_BSD - y_BSD).max()):.0e} in the "
        f"output, {float(max(off)):.0e} in the gradients"
    )
    assert jnp.allclose(other_BSD, y_BSD, atol=1e-5)
    assert all(jnp.allclose(a, b, atol=1e-3) for a, b in zip(gradient, others, strict=True))
    assert (other_stats.dropped_K == stats.dropped_K).all() and int(stats.dropped_K.sum()) > 0

# %% [markdown]
# ## ... at different prices
#
# A one-hot matrix has T x E x C entries, and C grows with T: the price of a token grows with the
# number of tokens it is dispatched with. Copying costs no multiplications at all. Operations as the
# compiler counts them, over those of the experts alone:

# %%
D, F, E, K = 64, 128, 8, 2
keys = jax.random.split(jax.random.key(0), 3)
experts = Experts(
    jax.random.normal(keys[0], (E, D, F)) / D**0.5, jax.random.normal(keys[1], (E, F, D)) / F**0.5
)
router = make_router("topk", {"k": K})


def flops(dispatch, tokens: int) -> float:
    def layer(x_TD, logits_TE):
        routing = router.route(RouterInput(logits_TE, jnp.ones(tokens, bool)))
        return dispatch(experts, x_TD, make_plan(routing, 1.0), "relu", False)[0]

    shapes = [jax.ShapeDtypeStruct((tokens, size), jnp.float32) for size in (D, E)]
    return jax.jit(layer).lower(*shapes).compile().cost_analysis()["flops"]


many = (128, 256, 512, 1024)
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
prices = {}
for dispatch in (einsum, gather):
    of_experts = [2 * K * 2 * D * F * tokens for tokens in many]
    prices[dispatch] = [flops(dispatch, t) / f for t, f in zip(many, of_experts, strict=True)]
    axis.plot(many, prices[dispatch], marker="o", label=dispatch.__name__)
axis.set(xlabel="tokens in a group", ylabel="FLOPs / the experts'", ylim=(0, None))
axis.set_xticks(many)
axis.legend()
plt.show()

assert prices[einsum][-1] > 3 * prices[gather][-1] and prices[gather][-1] < 1.3

# %% [markdown]
# ## How many are dropped
#
# That depends on nothing but the loads: an expert with n assignments and C slots drops n - C. Loads
# are never even, not even where tokens choose at random, and the smaller the group, the more uneven
# they are. So there is a floor, `drop_floor`, below which no router can be expected to come without
# arranging tokens among each other. The dots are the loads of 400 groups, the lines that floor; the
# red dots are of logits that favour some experts.

# %%
T, GROUPS = 64, 400
random_GTE = jax.random.normal(jax.random.key(2), (GROUPS, 512, E))
skewed_GTE = random_GTE + 0.8 * jnp.linspace(1, -1, E)


@jax.jit
def loads(logits_GTE):
    expert_GTK = jax.lax.top_k(logits_GTE, K)[1]
    return jax.nn.one_hot(expert_GTK, E).sum((1, 2))


def share_dropped(load_GE, tokens: int, factor: float) -> float:
    slots = capacity(factor, K * tokens, E, tokens)
    return float(jnp.maximum(load_GE - slots, 0).sum() / load_GE.sum())


factors = np.arange(0.5, 2.51, 0.125)
figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
for (name, logits_GTE, tokens), colour in zip(
    (
        ("skewed, 64 tokens", skewed_GTE, 64),
        ("random, 64 tokens", random_GTE, 64),
        ("random, 512 tokens", random_GTE, 512),
    ),
    ("C3", "C0", "C2"),
    strict=True,
):
    load_GE = loads(logits_GTE[:, :tokens])
    drops = np.array([share_dropped(load_GE, tokens, f) for f in factors])
    axis.plot(factors, 100 * drops, ".", color=colour, label=name)
    if logits_GTE is random_GTE:
        floors = np.array([drop_floor(tokens, E, K, f) for f in factors])
        axis.plot(factors, 100 * floors, color=colour, lw=1, label=f"floor, {tokens} tokens")
        assert np.abs(drops - floors).max() < 0.01
    else:
        assert (drops[(factors >= 1) & (factors < 2)] > 0.02).all()
axis.set(xlabel="capacity factor", ylabel="assignments dropped, %", ylim=(0, None))
axis.axvline(1, color="black", lw=0.5)
axis.legend()
plt.show()

# %% [markdown]
# ## Which are dropped: the order decides
#
# Assignments take slots in the order in which the router lists them. Three orders are in use:
#
# - `k_major` (GShard): all first choices, then all second choices;
# - `token_major`: all choices of the first token, then of the next;
# - `bpr`, batch-prioritised routing (V-MoE, 2106.05974): as `k_major`, the most confident token
#   first.
#
# All drop the same number. Here is who, in groups of 64 skewed tokens at a factor of 1.


# %%
def dropped(order: str) -> jax.Array:
    """[G, T, K]: whether each choice of each token was dropped."""
    router = make_router("topk", {"k": K, "order": order})

    @jax.jit
    @jax.vmap
    def of_group(logits_TE):
        routing = router.route(RouterInput(logits_TE, jnp.ones(T, bool)))
        plan = make_plan(routing, 1.0)
        return jnp.zeros((T, K)).at[plan.token_N, routing.choice_N].set(plan.expert_N == E)

    return of_group(skewed_GTE[:, :T])


drops = {order: np.asarray(dropped(order)) for order in ("k_major", "token_major", "bpr")}
confidence_GT = np.asarray(jax.nn.softmax(skewed_GTE[:, :T]).max(-1))
rank_GT = np.argsort(np.argsort(-confidence_GT, axis=1), axis=1)

figure, panels = plt.subplots(1, 3, figsize=(12, 3.4), sharey=True, layout="constrained")
for n, (order, dropped_GTK) in enumerate(drops.items()):
    panels[0].bar(np.arange(K) + 0.25 * (n - 1), 100 * dropped_GTK.mean((0, 1)), 0.25, label=order)
    panels[1].plot(100 * dropped_GTK.mean((0, 2)), label=order)
    by_rank_T = [dropped_GTK[rank_GT == t].mean() for t in range(T)]
    panels[2].plot(100 * np.array(by_rank_T), label=order)
panels[0].set(ylabel="dropped, %", title="by rank of choice")
panels[0].set_xticks(range(K), ["first", "second"])
panels[1].set(xlabel="place in the group", title="by position")
panels[2].set(xlabel="place by confidence, surest first", title="by confidence")
panels[0].legend()
plt.show()

# %% [markdown]
# `k_major` protects first choices at the price of second ones. `token_major` is fair to choices and
# hard on whoever comes late, which in a sequence is always the same: the end. `bpr` drops what the
# router is least sure of: its authors' way to get along with a small capacity.
#
# With two choices, all but `token_major` let later tokens push earlier ones out, which a causal
# model must not do: [who leaks](05_who_leaks.ipynb).

# %%
total = {order: int(dropped_GTK.sum()) for order, dropped_GTK in drops.items()}
assert len(set(total.values())) == 1, total
first, second = drops["k_major"].mean((0, 1))
assert second > 2 * first
by_position_T = drops["token_major"].mean((0, 2))
assert by_position_T[:16].mean() < 0.1 * by_position_T[-16:].mean()
sure, unsure = (drops["bpr"][part].mean() for part in (rank_GT < T // 4, rank_GT >= T - T // 4))
assert sure < 0.75 * unsure

# %% [markdown]
# ## A token that is left behind
#
# Where all of a token's choices are dropped, the layer adds nothing to it: a row of zeros. The
# statistics count such tokens.

# %%
config = MoeConfig(experts=8, capacity_factor=0.5)
layer = MoE(ModelConfig(dim=16, ffn=32), config, RouterConfig("switch"), rngs=nnx.Rngs(0))
y_BSD, stats = layer(x_BSD)
zeros = int((y_BSD == 0).all(-1).sum())
print(f"{zeros} of {x_BSD.shape[0] * x_BSD.shape[1]} tokens get a row of zeros")
assert zeros == int(stats.left_behind) > 0
