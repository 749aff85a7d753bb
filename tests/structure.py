"""What compiled programs are made of, by case: counted, not timed.

    python -m tests.structure

writes structure.json again for the installed JAX; the diff is what a change did to the programs.
"""

if __name__ == "__main__":
    import tests.conftest  # noqa: F401  its flags, before JAX is there

import functools
import json
import re
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.benching.layer import both_ways
from moejax.benching.shapes import Case, rows, weights
from moejax.config import MeshConfig
from moejax.moe import MoeOptions, MoeParams, moe
from moejax.planning.collectives import KINDS
from moejax.routing import make_router
from moejax.sharding import make_mesh
from moejax.training.program import lay_out, lower_train_step
from tests import tiny

FILE = Path(__file__).with_name("structure.json")
VERSION = "jax " + ".".join(metadata.version("jax").split(".")[:2])
LAYER = Case("layer", dim=32, ffn=64, experts=8, k=2, tokens=512)
SPREAD = MeshConfig(data=2, expert=4)


def layer(dispatch: str, spread: bool) -> Any:
    """Forward and backward of one layer, on one device or with its experts on four."""
    factor = None if dispatch == "dropless" else 1.25
    groups = "sequence" if spread else "batch"  # across devices `gather` has no buffers
    options = MoeOptions(make_router("topk", {"k": LAYER.k}), dispatch, "swiglu", factor, groups)

    def run(p: Any, x_BSD: jax.Array, valid_BS: jax.Array) -> jax.Array:
        return moe(p, x_BSD, options=options, valid_BS=valid_BS)[0]

    mesh = make_mesh(SPREAD if spread else MeshConfig(data=1), jax.devices()[: 8 if spread else 1])

    def place(a: jax.Array, *spec: Any) -> jax.Array:
        return jax.device_put(a, NamedSharding(mesh, P(*spec)))

    experts = jax.tree.map(lambda w: place(w, "expert"), weights(LAYER))
    p = MoeParams(place(jnp.zeros((LAYER.dim, LAYER.experts))), experts)
    cut = ("data", "expert"), None
    x_BSD = place(rows(LAYER, LAYER.tokens).reshape(8, -1, LAYER.dim), *cut)
    valid_BS = place(jnp.ones((8, LAYER.tokens // 8), bool), *cut)
    with jax.set_mesh(mesh):
        return jax.jit(both_ways(run)).lower(p, x_BSD, valid_BS).compile()


@functools.cache
def step(layers: int = 2) -> Any:
    """A training step on eight devices, lowered."""
    config = tiny.tiny(
        router={"name": "topk", "k": 2},
        model={"layers": layers},
        moe={"dispatch": "dropless"},
        mesh={"data": 2, "expert": 2, "tensor": 2},
    )
    laid = lay_out(config, tiny.VOCABULARY, make_mesh(config.mesh))
    return lower_train_step(config, tiny.VOCABULARY, laid)


@functools.cache
def compiled_step() -> Any:
    return step().compile()


CASES = {
    "einsum": lambda: layer("einsum", False),
    "gather": lambda: layer("gather", False),
    "dropless": lambda: layer("dropless", False),
    "gather, experts on four": lambda: layer("gather", True),
    "dropless, experts on four": lambda: layer("dropless", True),
    "training step on eight": compiled_step,
}


def structure(compiled: Any) -> dict[str, Any]:
    """FLOPs (a loop's body counted once) and temporary bytes on one device, and how often the
    program's text has a matmul, a loop, a sort, and each kind of collective."""
    text = compiled.as_text()
    opcodes = Counter(re.findall(r" ([a-z][a-z0-9-]*)\(", text))
    kinds = {kind: opcodes[kind] + opcodes[f"{kind}-start"] for kind in KINDS}
    return {
        "flops": int(compiled.cost_analysis()["flops"]),
        "temp_bytes": int(compiled.memory_analysis().temp_size_in_bytes),
        "matmuls": opcodes["dot"],
        "loops": opcodes["while"],
        "sorts": opcodes["sort"],
        **{kind: count for kind, count in kinds.items() if count},
    }


def main() -> None:
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    known[VERSION] = {name: structure(build()) for name, build in CASES.items()}
    FILE.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
