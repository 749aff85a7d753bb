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
# # Will it fit, and how fast can it be?
#
# Those questions are best answered before chips are paid for. The TPU compiler runs on any machine,
# and its program says how much memory a chip needs, how many operations it does, and what moves.
# Here a small model is compiled for four TPUs that are not here, a large one is refused, ways to
# cut a model are compared, and the plans of six published models are laid side by side.
#
# The TPU compiler comes with `pip install -e ".[tpu]"`.

# %%
import json
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

import moejax
from moejax.config import Config, default_config
from moejax.planning import show
from moejax.planning.chips import parse_topology
from moejax.planning.result import DoesNotFit
from moejax.planning.search import plan

jax.config.update("jax_platforms", "cpu")  # traced here, compiled for the chips named

# %% [markdown]
# ## A plan
#
# A config and a topology are all it takes. What is compiled is the training step that would run:
# forward, backward, optimizer, router state. `moejax plan experiments/switch.py:smoke
# --topology=v5e:2x4` does the same from the command line.


# %%
def config(layers: int, dim: int, experts: int, mesh: dict, rows: int, sequence: int) -> Config:
    config = default_config()
    config.model.update(layers=layers, dim=dim, ffn=2 * dim, heads=dim // 64, dtype="bfloat16")
    config.moe.update(experts=experts, dispatch="gather", groups="sequence", capacity_factor=1.25)
    config.data.update(sequence=sequence, batch=rows)
    config.mesh.update(mesh)
    return Config.from_dict(config)


small = config(1, 128, 4, {"data": 1, "expert": 4}, rows=16, sequence=128)
found = plan(small, parse_topology("v5e:2x2"), "small")
print(show.text(show.tables(found)[:4], found.notes))

# %% [markdown]
# Read it from top to bottom. *FLOPs, program* against *model*: what the compiled program does
# beside what the formula says a step needs; 1.25 times the experts' part is the capacity factor.
# *Memory*: by kind, the total is what must be below the device's. *Collectives*: one layer, two
# all-to-alls each way. *Roofline*: the time of the busiest resource, if all that moves hides behind
# compute (*overlap*), or nothing does (*sum*). It is an upper bound on speed, not a forecast.

# %%
calls = {r["pass"]: r["calls"] for r in found.collectives if r["kind"] == "all-to-all"}
assert found.compiled and calls == {"forward": 2, "backward": 2}
assert found.memory.total < found.hbm
assert 1.0 < found.flops / found.model_flops < 1.25

# %% [markdown]
# ## What does not fit
#
# ... is refused with the numbers and what to change first; where parameters and optimizer alone are
# too much, before anything is compiled. `moejax plan --search` goes on from there by itself.

# %%
large = config(32, 4096, 8, {"data": 1, "fsdp": 2, "expert": 4}, rows=64, sequence=4096)
try:
    plan(large, parse_topology("v5e:2x4"), "large")
except DoesNotFit as error:
    print(error)
    assert error.needed > error.available
else:
    raise AssertionError("it should not fit")

# %% [markdown]
# ## Ways to cut one model
#
# The same model on one node of eight H100s: experts on their own devices, weights in pieces, or a
# mixture of both. GPU plans are formulas, nothing is compiled, so that a sweep takes seconds; good
# for choosing what to try, not for the last gigabyte.

# %%
topology, meshes = parse_topology("h100:1x8"), ((8, 1), (4, 2), (2, 4), (1, 8))
plans = {
    f"fsdp {f} x\nexpert {e}": plan(
        config(8, 1024, 16, {"data": 1, "fsdp": f, "expert": e}, rows=64, sequence=1024), topology
    )
    for f, e in meshes
}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
bottom = np.zeros(len(plans))
for kind in ("parameters", "optimizer", "gradients", "activations", "temporaries"):
    values = np.array([getattr(p.memory, kind) for p in plans.values()]) / 2**30
    left.bar(list(plans), values, bottom=bottom, label=kind)
    bottom += values
left.set(ylabel="GiB a device", title="memory")
left.legend(loc="upper left", bbox_to_anchor=(1, 1))
for name in ("compute", "hbm", "collectives"):
    values = [1e3 * getattr(p.estimate, name) for p in plans.values()]
    right.plot(list(plans), values, marker="o", label=name)
right.set(ylabel="ms a step, at best", title="time of each resource", ylim=(0, None))
right.legend()
plt.show()

# %% [markdown]
# ## Six published models
#
# `experiments/pods/` has them at full size, each compiled for a topology on which it fits; that
# took minutes a model, so their plans are kept in `experiments/results/pods`. Nothing ran on a TPU.

# %%
RESULTS = Path(moejax.__file__).parents[1] / "experiments" / "results" / "pods"
pods = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
assert len(pods) == 6 and all(p["compiled"] for p in pods.values())
print(f"{'model':<17} {'topology':<11} {'mesh':<22} {'params':>8} {'active':>7}  step at best")
for name, p in pods.items():
    mesh = " x ".join(f"{axis} {n}" for axis, n in p["mesh"].items() if n > 1)
    seconds = [p["seconds"][f"step_{how}"] for how in ("overlap", "sum")]
    print(
        f"{name:<17} {p['topology']:<11} {mesh:<22} {p['params']['total'] / 1e9:7.1f}B "
        f"{p['params']['active'] / 1e9:6.1f}B  {seconds[0]:.3g} to {seconds[1]:.3g} s"
    )

# %% [markdown]
# Memory first: what fills a device, in percent of what it has. Weights and their gradients
# (Switch-C and GShard, whose Adafactor keeps little besides), or what a large batch needs on its
# way (the others): the one asks for more devices, the other for remat, accumulation or more cuts of
# the batch.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.4), sharey=True, layout="constrained")
start = np.zeros(len(pods))
for kind in ("parameters", "optimizer", "gradients", "activations", "temporaries"):
    values = np.array([100 * p["memory"][kind] / p["memory"]["hbm"] for p in pods.values()])
    left.barh(list(pods), values, left=start, label=kind)
    start += values
left.set(xlabel="% of a device's memory", title="memory", xlim=(0, 100))
left.legend(fontsize=8)
for n, name in enumerate(("compute", "hbm", "collectives")):
    values = np.array([p["seconds"][name] / p["seconds"]["compute"] for p in pods.values()])
    right.barh(np.arange(len(pods)) + 0.25 * (n - 1), values, 0.25, label=name)
right.set(xlabel="seconds / seconds of compute", title="time of each resource", xscale="log")
right.legend(fontsize=8)
plt.show()

assert all(p["memory"]["total"] < p["memory"]["hbm"] for p in pods.values())
assert all(p["seconds"]["step_overlap"] <= p["seconds"]["step_sum"] for p in pods.values())

# %% [markdown]
# Then time: the longest bar of a model is what to work on. Where it is memory traffic, more tokens
# a step or less recomputing help; where it is collectives, another mesh. Memory traffic here counts
# whole buffers, which for dropless expert parallelism (the DeepSeeks) is far more than what an even
# load touches. The assumptions stand in `moejax.planning.roofline.ASSUMPTIONS`.
