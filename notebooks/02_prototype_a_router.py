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
# # Can I try a router of my own?
#
# In ten lines, and without touching the library. A router in moejax is a pure function: from what
# it sees of the tokens (`RouterInput`) to a list of assignments (`Routing`). A function of your own
# works wherever a built-in one does: in the layer, in training, on any mesh, in the report. Here is
# one that lets every token decide *how many* experts it needs: it takes experts, best first, until
# their probabilities reach `p` (Huang et al. 2024, 2403.07652).

# %%
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from moejax import MoE, RouterInput, combine_TE, dependence, make_router, token_choice
from moejax.config import Config, ModelConfig, MoeConfig, default_config, router_config
from moejax.moe import MoeOptions
from moejax.training.loop import train
from moejax.training.records import read_records

# %% [markdown]
# ## The router
#
# `token_choice` turns each token's list of experts into a `Routing`. An entry equal to the number
# of experts means *nowhere*, so a token may list up to `k` experts and use fewer.


# %%
def top_p(r: RouterInput, *, k: int = 4, p: float = 0.6):
    """Experts, best first, until their probabilities reach p; at most k of them."""
    probs_TE = jax.nn.softmax(r.logits_TE)
    weight_TK, expert_TK = jax.lax.top_k(probs_TE, k)
    reached_TK = jnp.cumsum(weight_TK, axis=-1) - weight_TK
    expert_TK = jnp.where(reached_TK < p, expert_TK, probs_TE.shape[-1])
    return token_choice(r, expert_TK, weight_TK, probs_TE)


# %% [markdown]
# ## What it does
#
# Twelve tokens, from undecided (left) to sure (right). The surer a token's router is, the fewer
# experts the token gets. `combine_TE` is the routing as a dense matrix, for looking at.

# %%
logits_TE = jax.random.normal(jax.random.key(0), (12, 8)) * jnp.linspace(0.3, 4.0, 12)[:, None]
routing = top_p(RouterInput(logits_TE, valid_T=jnp.ones(12, bool)))
dense_TE = np.asarray(combine_TE(routing))

figure, axis = plt.subplots(figsize=(7, 3.2))
image = axis.imshow(dense_TE.T, cmap="viridis", aspect="auto")
axis.set(xlabel="token: undecided to sure", ylabel="expert", title="weight of each expert")
figure.colorbar(image)
plt.show()

many_T = (dense_TE > 0).sum(axis=1)
print("experts per token:", many_T)
reached_T = dense_TE.sum(axis=1)
assert ((reached_T >= 0.6) | (many_T == 4)).all()
assert many_T[:4].mean() > many_T[-4:].mean()

# %% [markdown]
# ## In a layer
#
# `moejax.MoE` is an ordinary Flax NNX module. It says how many assignments each expert got, and the
# router's gradient is worth a look for every new router: a weight that is constant (top-1
# renormalised to 1) would leave it without one.

# %%
x_BSD = jax.random.normal(jax.random.key(1), (2, 16, 32))
layer = MoE(ModelConfig(dim=32, ffn=64), MoeConfig(experts=8), top_p, rngs=nnx.Rngs(0))
graph, params = nnx.split(layer)


@jax.jit
def gradient(params):
    def loss(params):
        y_BSD, stats = nnx.merge(graph, params)(x_BSD)
        return jnp.square(y_BSD).sum(), stats

    return jax.grad(loss, has_aux=True)(params)


grads, stats = gradient(params)
size = float(jnp.linalg.norm(grads.w_router_DE[...]))
print("load of each expert", stats.load_E, " router's gradient, norm", f"{size:.1f}")
assert 32 < int(stats.load_E.sum()) < 4 * 32 and size > 0

# %% [markdown]
# ## Does it leak?
#
# A token that picks its own experts should depend on no other token. `moejax.dependence` tries it.

# %%
found = dependence(MoeOptions(make_router(top_p)), num_experts=8)
print(found)
assert found.causal and not found.others

# %% [markdown]
# ## Train with it
#
# A config takes the function where it takes a name. Both runs see the same text, in the same order;
# the text is the Python standard library, so nothing is downloaded.


# %%
def run(router, workdir: Path, **options) -> list[dict]:
    config = default_config()
    config.model.update(layers=1, dim=32, ffn=64, heads=2)
    config.data.update(sequence=64, batch=16)
    config.optimizer.update(learning_rate=1e-2, warmup=10)
    config.train.update(steps=60, log_every=3, eval_every=0, eval_rows=16, checkpoint_every=0)
    config.router = router_config(router, **options)
    config.balance.load_balance = 0.01
    train(Config.from_dict(config), workdir, quiet=True)
    return [r for r in read_records(workdir / "metrics.jsonl") if r["kind"] == "train"]


with tempfile.TemporaryDirectory() as folder:
    runs = {
        "top_p": run(top_p, Path(folder) / "top_p", k=4, p=0.6),
        "topk, k=2": run("topk", Path(folder) / "topk", k=2),
    }

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
for name, records in runs.items():
    steps = [r["step"] for r in records]
    left.plot(steps, [r["loss"] for r in records], label=name)
    right.plot(steps, [r["max_vio"] for r in records], label=name)
left.set(xlabel="step", ylabel="loss, nats per byte", title="training loss")
right.set(xlabel="step", ylabel="MaxVio", title="load imbalance (0 = even)")
left.legend()
figure.tight_layout()
plt.show()

for name, records in runs.items():
    print(f"{name:<10} loss {records[-1]['loss']:.3f}   MaxVio {records[-1]['max_vio']:.2f}")
ends = [records[-1]["loss"] for records in runs.values()]
assert max(ends) < 3.2 and abs(ends[0] - ends[1]) < 0.15  # it learns as topk does

# %% [markdown]
# One seed of a tiny model shows that a router learns, not that it is better: for that, several
# seeds and equal active parameters, there is `moejax compare`. To keep the router: put the function
# into an experiment file (`config.router = router_config(top_p)`), and `moejax train` and `moejax
# compare` take it from there.
