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
# # What lies where, and what moves?
#
# A layer with many experts outgrows a device long before it outgrows the arithmetic of one. So its
# experts are spread over devices, and tokens travel to them. Here that is watched on eight
# simulated devices: which piece of each array every device holds, what the compiled program sends,
# that the result is the same as on one device, and what other ways to cut the layer would send
# instead.
#
# The number of simulated devices must be set before JAX looks for them.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from moejax import MoE
from moejax.config import Config, MeshConfig, ModelConfig, MoeConfig, default_config
from moejax.data import open_dataset
from moejax.planning.collectives import between_devices, summary
from moejax.sharding import batch_sharding, make_mesh, param_shardings
from moejax.training.program import build_program

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# %% [markdown]
# ## The mesh
#
# Devices stand in a grid with named axes: `data`, `fsdp`, `expert`, `tensor`. Here two rows of
# four: experts are cut over four devices, and there are two such rows, each with half of the batch.
# (An axis of size 1 cuts nothing.)

# %%
mesh = make_mesh(MeshConfig(data=2, expert=4))
print(dict(mesh.shape))
print(np.array([[device.id for device in row] for row in mesh.devices.reshape(2, 4)]))

# %% [markdown]
# ## What lies where
#
# One table, `moejax.sharding.SHARDINGS`, says how each kind of array is cut; the letters of its
# name are its axes. Each block below is a piece of the array, and the numbers are the devices that
# hold it. Tokens are cut over all eight devices. Experts are cut over the four of a row, so two
# devices hold the same two experts. The router is needed everywhere and is small.

# %%
model = ModelConfig(dim=64, ffn=128)
config = MoeConfig(experts=8, dispatch="gather", groups="sequence", capacity_factor=1.25)
layer = MoE(model, config, "topk", rngs=nnx.Rngs(0))
graph, params = nnx.split(layer)
weights = nnx.to_pure_dict(params)
x_BSD = jax.random.normal(jax.random.key(0), (8, 64, 64))

cut_weights = jax.device_put(weights, param_shardings(weights, mesh))
cut_BSD = jax.device_put(x_BSD, batch_sharding(mesh))


def show_pieces(panel, name: str, array: jax.Array) -> None:
    """The array's first two axes, cut as it lies."""
    holders: dict[tuple, list[int]] = {}
    for shard in array.addressable_shards:
        (top, bottom, _), (left, right, _) = (
            shard.index[axis].indices(array.shape[axis]) for axis in (0, 1)
        )
        holders.setdefault((top, bottom, left, right), []).append(shard.device.id)
    for n, ((top, bottom, left, right), devices) in enumerate(sorted(holders.items())):
        size = (right - left, bottom - top)
        panel.add_patch(plt.Rectangle((left, top), *size, facecolor=f"C{n}", edgecolor="white"))
        text = ", ".join(map(str, devices))
        panel.text((left + right) / 2, (top + bottom) / 2, text, ha="center", va="center")
    panel.set(title=f"{name} {array.shape}", xlim=(0, array.shape[1]), ylim=(array.shape[0], 0))
    axes = name.rpartition("_")[2]
    panel.set(ylabel=f"axis {axes[0]}", xlabel=f"axis {axes[1]}")


figure, panels = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
show_pieces(panels[0], "x_BSD", cut_BSD)
show_pieces(panels[1], "w_in_EDF", cut_weights["w_in_EDF"])
show_pieces(panels[2], "w_router_DE", cut_weights["w_router_DE"])
plt.show()

assert cut_weights["w_in_EDF"].addressable_shards[0].data.shape == (2, 64, 128)

# %% [markdown]
# ## The same result as on one device
#
# The layer is not told about devices. Where a mesh is set and its arrays lie on it, it works in
# pieces; outputs, gradients, loads and drops are those of one device.


# %%
def loss(weights, x_BSD):
    y_BSD, stats = nnx.merge(graph, weights)(x_BSD)
    return jnp.square(y_BSD).mean(), (y_BSD, stats)


step = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
(_, (alone_BSD, alone_stats)), (alone_gradient, _) = jax.jit(step)(weights, x_BSD)
with jax.set_mesh(mesh):
    compiled = jax.jit(step).lower(cut_weights, cut_BSD).compile()
(_, (y_BSD, stats)), (gradient, _) = compiled(cut_weights, cut_BSD)

off = {"output": float(jnp.abs(np.asarray(y_BSD) - np.asarray(alone_BSD)).max())}
for name, value in gradient.items():
    off[name] = float(np.abs(np.asarray(value) - np.asarray(alone_gradient[name])).max())
print("largest differences:", {name: f"{value:.0e}" for name, value in off.items()})
print("load", np.asarray(stats.load_E), " dropped", np.asarray(stats.dropped_K))
assert max(off.values()) < 1e-5
assert (np.asarray(stats.load_E) == np.asarray(alone_stats.load_E)).all()
assert (np.asarray(stats.dropped_K) == np.asarray(alone_stats.dropped_K)).all()

# %% [markdown]
# ## What moves
#
# `moejax.planning` reads the compiled program: every exchange between devices, along which axes,
# forward or backward, how many bytes. Rows go to their experts and come back: two all-to-alls, and
# two more for the gradients. What is left are sums: of the statistics, and of the gradients of what
# several devices hold.

# %%
rows = summary(between_devices(compiled, mesh))
for row in rows:
    print(
        f"{row['kind']:<12} along {row['axes']:<12} {row['pass']:<9} "
        f"{row['calls']} calls {row['bytes'] / 1024:8.1f} KiB"
    )
exchanges = {row["pass"]: row["calls"] for row in rows if row["kind"] == "all-to-all"}
assert exchanges == {"forward": 2, "backward": 2}
assert all(row["axes"] == "expert" for row in rows if row["kind"] == "all-to-all")

# %% [markdown]
# Who sends how much to whom? Sequence b lies on device b, experts 2i and 2i + 1 on the i-th
# device of each row. So a token never leaves its row of the mesh: each row has all experts.

# %%
_, recorded = nnx.merge(graph, weights)(x_BSD, record=True)
expert_BSK = np.asarray(recorded.decisions.expert_TR)
kept_BSK = (expert_BSK < 8) & ~np.asarray(recorded.decisions.dropped_TR)
rows_XX = np.zeros((8, 8), int)
for device in range(8):
    first = device - device % 4  # of its row of the mesh
    np.add.at(rows_XX[device], first + expert_BSK[device][kept_BSK[device]] // 2, 1)

figure, axis = plt.subplots(figsize=(4.2, 3.6), layout="constrained")
image = axis.imshow(rows_XX, cmap="Blues")
for place, count in np.ndenumerate(rows_XX):
    colour = "white" if count > 20 else "black"
    axis.text(place[1], place[0], count or "", color=colour, ha="center", va="center", fontsize=8)
axis.set(xlabel="to device", ylabel="from device", title="rows that a layer moves")
figure.colorbar(image)
plt.show()

assert rows_XX.sum() == int(np.asarray(stats.kept_E).sum())
assert (rows_XX[:4, 4:] == 0).all() and (rows_XX[4:, :4] == 0).all()

# %% [markdown]
# ## Other ways to cut it
#
# The same layer over eight devices, all along one axis. `data` copies all weights and sums all
# gradients; `fsdp` cuts them, and fetches what it needs when it needs it; `expert` sends tokens
# instead of weights; `tensor` cuts each expert, shows every token to all devices, and sums what
# they make of it. Nothing runs here: the compiler is asked, for a larger layer.

# %%
big = MoE(ModelConfig(dim=256, ffn=512), config, "topk", rngs=nnx.Rngs(0))
big_graph, big_params = nnx.split(big)
big_weights = nnx.to_pure_dict(big_params)


def big_loss(weights, x_BSD):
    return jnp.square(nnx.merge(big_graph, weights)(x_BSD)[0]).mean()


def laid(array, sharding):
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


held, sent = {}, {}
for axis in ("data", "fsdp", "expert", "tensor"):
    mesh = make_mesh(MeshConfig(**{"data": 1, axis: 8}))
    where = param_shardings(big_weights, mesh)
    abstract = jax.tree.map(laid, big_weights, where)
    tokens = laid(jax.ShapeDtypeStruct((8, 64, 256), jnp.float32), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        both = jax.jit(jax.grad(big_loss, (0, 1)), out_shardings=(where, tokens.sharding))
        compiled = both.lower(abstract, tokens).compile()
    shapes = jax.tree.map(lambda a, s: np.prod(s.shard_shape(a.shape)), big_weights, where)
    held[axis] = 4 * sum(jax.tree.leaves(shapes)) / 2**20
    sent[axis] = {}
    for row in summary(between_devices(compiled, mesh)):
        sent[axis][row["kind"]] = sent[axis].get(row["kind"], 0) + row["bytes"] / 2**20

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
left.bar(held.keys(), held.values(), color="grey")
left.set(ylabel="MiB of weights a device", title="held")
bottom = np.zeros(4)
for kind in sorted({kind for kinds in sent.values() for kind in kinds}):
    values = np.array([kinds.get(kind, 0) for kinds in sent.values()])
    right.bar(list(sent), values, bottom=bottom, label=kind)
    bottom += values
right.set(ylabel="MiB a device, forward + backward", title="moved")
right.legend()
plt.show()

total = {axis: sum(kinds.values()) for axis, kinds in sent.items()}
assert held["expert"] < held["data"] / 7 and held["fsdp"] < held["data"] / 7
assert total["expert"] < min(total["data"], total["fsdp"])

# %% [markdown]
# With few tokens and many weights, as here, moving tokens is the cheapest; with many tokens a
# device the balance tips. `moejax plan` answers that for a whole training step and real chips:
# [planning a pod](08_planning_a_pod.ipynb).
#
# ## A whole training run
#
# The mesh is a section of the config, and nothing else changes. Eight steps on one device, and on 2
# x 4 with the experts cut:


# %%
def losses(mesh: MeshConfig, devices: int) -> list[float]:
    config = default_config()
    config.model.update(layers=1, dim=32, ffn=32, heads=2)
    config.data.update(sequence=32, batch=16)
    config.train.steps = 8
    config.optimizer.warmup = 2
    config.mesh.update(data=mesh.data, expert=mesh.expert)
    config = Config.from_dict(config)
    text = open_dataset(config.data, progress=False)
    there = tuple(jax.devices()[:devices])
    program = build_program(config, text.vocab_size, len(text.domains), there)
    state, found = program.init(0, text.count_V), []
    for _, (batch, _) in zip(range(8), text.train_batches(0, seed=0), strict=False):
        state, metrics = program.train_step(state, program.put(batch))
        found.append(float(metrics["loss"]))
    return found


one, eight = losses(MeshConfig(data=1), 1), losses(MeshConfig(data=2, expert=4), 8)
for step, (a, b) in enumerate(zip(one, eight, strict=True), 1):
    print(f"step {step}: one device {a:.6f}, eight {b:.6f}")
assert np.allclose(one, eight, atol=1e-4)
