"""moejax: Mixture-of-Experts routing, tried, compared and scaled in JAX.

The legend of every name in the code. `x_TD` is an array of T rows and D columns; einsum letters
are the same letters in lower case.

    B batch (sequences)       E experts                     V vocabulary
    S sequence                K experts per token           L layers
    T = B S tokens            C capacity, slots             H heads, A width of a head
    D model width             N assignments of tokens       G kv heads, or groups of tokens
    F feed-forward hidden         to experts
"""

__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moejax.causality import dependence
    from moejax.model import MoE, Transformer
    from moejax.routing import (
        ROUTERS,
        MoeStats,
        RouterInput,
        RouterSpec,
        Routing,
        combine_TE,
        make_router,
        token_choice,
        token_noise,
    )

__all__ = [
    "ROUTERS",
    "MoE",
    "MoeStats",
    "RouterInput",
    "RouterSpec",
    "Routing",
    "Transformer",
    "combine_TE",
    "dependence",
    "make_router",
    "token_choice",
    "token_noise",
]


def __getattr__(name: str) -> Any:
    """The public names, imported on first use: `import moejax` alone stays cheap."""
    import importlib

    if name in __all__:
        homes = {"MoE": "model", "Transformer": "model", "dependence": "causality"}
        home = f"moejax.{homes.get(name, 'routing')}"
        return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'moejax' has no attribute {name!r}")
