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
# # Who sees the future?
#
# A decoder predicts its next token, so nothing of what comes later may reach it. Attention is
# masked for that. A router is not: as soon as tokens are compared, for a place in an expert's
# buffer or by an expert that picks its favourites, a token's output depends on tokens that it must
# not know. The training loss then looks better than what the model can do when it writes. Which
# routers leak?

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from moejax import MoE, dependence, make_router
from moejax.config import (
    Config,
    ModelConfig,
    MoeConfig,
    RouterConfig,
    default_config,
    router_config,
)
from moejax.data import open_dataset
from moejax.moe import MoeOptions
from moejax.training.program import build_program

# %% [markdown]
# ## Change one token, see which outputs move
#
# That is the whole test. A batch of three sequences of eight tokens goes through one MoE layer;
# then again with one token replaced, for each of the 24 tokens and in 32 random batches.
#
# Six layers: a router's name and options, the capacity factor (None: nothing drops), and the
# *group*, within which tokens compete.

# %%
SETTINGS = {
    "top-2,\nnothing dropped": ("topk", {}, None, "batch"),
    "top-1, capacity 1\nin each sequence": ("switch", {}, 1.0, "sequence"),
    "top-2, capacity 1\nin each sequence": ("topk", {}, 1.0, "sequence"),
    "expert choice\nin the whole batch": ("expert_choice", {}, None, "batch"),
    "expert choice among\ntokens at one position": ("expert_choice", {}, None, "position"),
    "hash of the\nnext token": ("hash", {"look": "next"}, None, "batch"),
}
B, S, D, E = 3, 8, 16, 4
T = B * S


def moved(router: str, options: dict, factor: float | None, groups: str) -> jax.Array:
    """[T, T]: how often the output at a token (row) moved when another one (column) changed."""
    layer = MoE(
        ModelConfig(dim=D, ffn=D, activation="relu"),
        MoeConfig(experts=E, capacity_factor=factor, groups=groups, dispatch="gather"),
        RouterConfig(router, tuple(options.items())),
        rngs=nnx.Rngs(0),
    )
    state = layer.init_state(vocab_size=256)

    def output(x_TD, token_T):
        y_BSD, _ = layer(x_TD.reshape(B, S, D), token_BS=token_T.reshape(B, S), state=state)
        return y_BSD.reshape(T, D)

    def trial(key):
        keys = jax.random.split(key, 4)
        x_TD, other_TD = (jax.random.normal(k, (T, D)) for k in keys[:2])
        token_T, others_T = (jax.random.randint(k, (T,), 0, 256) for k in keys[2:])
        y_TD = output(x_TD, token_T)

        def with_another(changed):
            now_T = jnp.arange(T) == changed
            x, token = (
                jnp.where(now_T[:, None], other_TD, x_TD),
                jnp.where(now_T, others_T, token_T),
            )
            return jnp.abs(output(x, token) - y_TD).max(-1) > 1e-4

        return jax.lax.map(with_another, jnp.arange(T)).T

    return np.asarray(jax.jit(lambda keys: jax.lax.map(trial, keys).mean(0))(KEYS))


KEYS = jax.random.split(jax.random.key(0), 32)
found = {name: moved(*setting) for name, setting in SETTINGS.items()}

# %% [markdown]
# Each row is an output, each column a token that was changed, lines separate the sequences. Grey is
# the token itself, **blue** an earlier token of its sequence, which is allowed, **red** a later
# one: a leak. **Orange** are other sequences, which will not be there when the model writes alone.

# %%
sequence_T, place_T = np.divmod(np.arange(T), S)
same_TT = sequence_T[:, None] == sequence_T
later_TT = same_TT & (place_T > place_T[:, None])
earlier_TT = same_TT & (place_T < place_T[:, None])
COLOURS = {"blue": earlier_TT, "red": later_TT, "orange": ~same_TT, "grey": np.eye(T, dtype=bool)}
RGB = {"blue": (0.1, 0.3, 0.8), "red": (0.8, 0.0, 0.0), "orange": (0.95, 0.6, 0.1)}

figure, panels = plt.subplots(2, 3, figsize=(10, 7.6), layout="constrained")
for panel, (name, share_TT) in zip(panels.flat, found.items(), strict=True):
    strength_TT1 = np.where(share_TT > 0, 0.25 + 0.75 * share_TT, 0)[..., None]
    image = np.ones((T, T, 3))
    for colour, where_TT in COLOURS.items():
        full = np.array(RGB.get(colour, (0.6, 0.6, 0.6)))
        image = np.where(where_TT[..., None], 1 - strength_TT1 * (1 - full), image)
    panel.imshow(image)
    for edge in (S - 0.5, 2 * S - 0.5):
        panel.axhline(edge, color="black", lw=0.5)
        panel.axvline(edge, color="black", lw=0.5)
    panel.set(title=name, xticks=[], yticks=[])
for panel in panels[1]:
    panel.set_xlabel("token that was changed")
for panel in panels[:, 0]:
    panel.set_ylabel("output at token")
plt.show()

# %% [markdown]
# Token choice without drops touches nobody else. With one choice and a capacity, tokens take slots
# in their order, and only earlier ones matter. With two, all first choices go before any second
# one, so a later token's first choice can push out an earlier token's second: a leak. An expert
# that picks from a pool compares everybody in it; picking from one position of all sequences, it
# never looks ahead, but depends on who shares the batch. The last router reads the next token
# outright: it is a control, for tests like this one to catch.
#
# ## The same in one call
#
# `moejax.dependence` runs such trials, with crowds at one expert and a gradient besides, for any
# router, also one of your own. `moejax train` asks it, and warns.

# %%
verdicts = {}
print(f"{'':<42} later tokens   other sequences")
for name, (router, options, factor, groups) in SETTINGS.items():
    layer = MoeOptions(make_router(router, options), capacity_factor=factor, groups=groups)
    verdicts[name] = dependence(layer, num_experts=8)
    later, others = verdicts[name].later, verdicts[name].others
    print(f"{' '.join(name.split()):<42} {'yes' if later else '-':<14} {'yes' if others else '-'}")
    assert later == bool((found[name][later_TT] > 0).any())
    assert others == bool((found[name][~same_TT] > 0).any())
assert verdicts["hash of the\nnext token"].later and not verdicts["top-2,\nnothing dropped"].later

# %% [markdown]
# ## What a leak is worth
#
# Two models that differ in one option: an expert chosen by a hash of the token, or of the *next*
# token. The second one's loss is far too good to be true: three bits of the answer stand in which
# of the eight experts it was sent to.


# %%
def config(router: str, layers: int, steps: int, moe: dict, **options) -> Config:
    config = default_config()
    config.model.update(layers=layers, dim=32, ffn=32, heads=2)
    config.moe.update(experts=8, **moe)
    config.data.update(sequence=64, batch=16)
    config.optimizer.update(learning_rate=2e-2, warmup=10)
    config.train.steps = steps
    config.router = router_config(router, **options)
    return Config.from_dict(config)


def train(config: Config):
    """The program, its last state, and the loss of each step."""
    program = build_program(config, text.vocab_size, len(text.domains))
    state, losses = program.init(0, text.count_V), []
    steps = range(config.train.steps)
    for _, (batch, _) in zip(steps, text.train_batches(0, seed=0), strict=False):
        state, metrics = program.train_step(state, program.put(batch))
        losses.append(float(metrics["loss"]))
    return program, state, losses


honest, oracle = (config("hash", 1, 60, {}, look=look) for look in ("token", "next"))
text = open_dataset(honest.data, progress=False)
curves = {"hash of the token": train(honest)[2], "hash of the next token": train(oracle)[2]}

figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for name, losses in curves.items():
    axis.plot(range(1, 61), losses, label=name)
axis.set(xlabel="step", ylabel="loss, nats per byte", ylim=(0, None))
axis.legend()
plt.show()

last = {name: np.mean(losses[-10:]) for name, losses in curves.items()}
assert last["hash of the next token"] < last["hash of the token"] - 0.7
assert oracle.leaks and not honest.leaks

# %% [markdown]
# Expert choice leaks less, and that is what makes it treacherous. Here it is trained with experts
# that pick from each sequence, and evaluated twice: as it was trained, and causally
# (`eval_groups="position"`), as it would have to write. The difference is what the pool gave away:
# after so few steps a little.

# %%
pool_moe = {"groups": "sequence", "eval_groups": "position"}
pool = config("expert_choice", 2, 120, pool_moe, k=1)
program, state, _ = train(pool)


def loss_of(evaluate) -> float:
    batches = [program.put(b) for b in text.validation_batches(limit_rows=128)]
    sums = [evaluate(state.params, state.router_state, b, text.bytes_V) for b in batches]
    return float(sum(s.nll_domain.sum() for s in sums) / sum(s.tokens for s in sums))


as_trained, causal = loss_of(program.eval_as_trained), loss_of(program.eval_step)
print(f"held-out loss, nats per byte: as trained {as_trained:.3f}, causally {causal:.3f}")
print(f"the leak: {causal - as_trained:+.3f}")
assert pool.leaks and causal - as_trained > 0.003

# %% [markdown]
# `moejax routers --causality` has the table of all routers; in `moejax compare` the leak of expert
# choice is a column. Next: [the same layer on eight devices](06_sharding.ipynb).
