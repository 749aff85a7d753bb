"""The experts' feed-forward network over rows that are sorted by expert, or lie in its buffers.

One function with one contract; `choose` says which implementation a platform gets, and why.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array, lax

from moejax.dispatch import blocks, products, trial
from moejax.dispatch.measured import Choice
from moejax.dispatch.products import Activation, manual_axes
from moejax.dispatch.rows import Rows, zero_tail
from moejax.dispatch.trial import Sizes

Weights = tuple[Array, ...]  # (w_in_EDF,) or (w_in_EDF, w_gate_EDF)


class Implementation(NamedTuple):
    """forward: (activation, rows, ins, w_out_EFD, load_E) -> (y, residuals). backward: (activation,
    dy, rows, ins, w_out_EFD, load_E, residuals) -> gradients of rows, ins and w_out_EFD. `rows` and
    their gradients are `Rows`."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def _on(kind: products.Products) -> Implementation:
    return Implementation(partial(products.forward, kind), partial(products.backward, kind))


IMPLEMENTATIONS = {
    "blocks": Implementation(blocks.forward, blocks.backward),
    "ragged_dot": _on(products.RAGGED),
    "ragged_dot, kernel": _on(products.RAGGED_ON_TPU),
    "hopper": _on(products.HOPPER),
    "tokamax": _on(products.TOKAMAX),
    "batched": _on(products.BATCHED),
}

# Sorted rows on a GPU: which is fastest depends on sizes, versions and the chip, so it is measured.
# JAX alone writes the first two; the others are kernels for some chips, types and widths.
WITHOUT_KERNELS = ("ragged_dot", "blocks")
ON_GPU = (*WITHOUT_KERNELS, "hopper", "tokamax")


def choose(platform: str, buffers: bool = False, sizes: Sizes = trial.USUAL) -> Choice:
    """Which implementation `grouped_ffn` lowers to on a platform: cpu, tpu, or any other.

    Args:
      platform: as in `jax.default_backend()`, of the devices that it is compiled for.
      buffers: for rows [E, C, D] instead of sorted ones [N, D].
      sizes: on a GPU, of the experts that it is measured on, once: `kept` has it afterwards.
    """
    if platform == "cpu":
        if buffers:
            return Choice("blocks", "free slots cost nothing, batched products work on them too")
        return Choice("blocks", "lax.ragged_dot is masked-dense there: E times the work")
    if buffers:
        return Choice("batched", "equal buffers are what matrix units are built for")
    if platform == "tpu":
        return Choice(
            "ragged_dot, kernel",
            "lax.ragged_dot is a grouped product; its weight gradient, which JAX 0.10 expands to a "
            "masked dense one, is JAX's megablox kernel",
        )
    # Inside shard_map kernels cannot say along which mesh axes their results vary.
    among = WITHOUT_KERNELS if sizes.varying else ON_GPU
    return trial.on_gpu(sizes, tuple((name, IMPLEMENTATIONS[name]) for name in among))


def grouped_ffn(
    rows_ND: Array,
    w_in_EDF: Array,
    w_gate_EDF: Array | None,
    w_out_EFD: Array,
    load_E: Array,
    activation: Activation = jax.nn.silu,
    by: str | None = None,
    tail: bool = True,
) -> Array:
    """Applies expert e's network to its rows: the first load_E[0] rows are expert 0's, and so on.

    With a gate the network is (activation(x w_gate) * (x w_in)) w_out (for silu it is SwiGLU,
    arXiv:2002.05202), without one activation(x w_in) w_out. Rows past sum(load_E) give 0 and no
    gradient, whatever they hold. Products accumulate in float32, also the weights' gradients.

    Args:
        rows_ND: inputs, sorted by expert; or [E, C, D], a buffer for each expert, whose first
            load_E[e] rows are used and whose others are zeros.
        w_in_EDF: input weights, dtype of the rows, like the other two.
        w_gate_EDF: gate weights, or None.
        w_out_EFD: output weights.
        load_E: int32, the number of rows of each expert; may depend on data.
        activation: elementwise.
        by: of `IMPLEMENTATIONS`; None = the one that `choose` names for the platform.
        tail: False where rows past sum(load_E) are finite, get finite gradients, and nobody looks
            at what they give.

    Returns:
        Outputs in the shape and dtype of the rows.
    """
    ins = (w_in_EDF,) if w_gate_EDF is None else (w_in_EDF, w_gate_EDF)
    clean = partial(zero_tail, load_E=load_E) if tail else lambda rows: rows
    args = _vary_alike((Rows(clean(rows_ND)), ins, w_out_EFD, load_E))
    return clean(_ffn(activation, by, *args))


def tokens_ffn(
    x_TD: Array,
    token_N: Array,
    weight_N: Array,
    w_in_EDF: Array,
    w_gate_EDF: Array | None,
    w_out_EFD: Array,
    load_E: Array,
    activation: Activation = jax.nn.silu,
    by: str | None = None,
) -> tuple[Array, Array]:
    """`grouped_ffn` of the rows x_TD[token_N], whose outputs times weight_N are added up at their
    tokens. On a CPU there is no array of all rows but the hidden ones.

    Args:
        x_TD: tokens.
        token_N: int32, sorted by expert.
        weight_N: float32; the hidden row is multiplied by it, as that gives the weights' gradients
            without the outputs.
        the others: as of `grouped_ffn`.

    Returns:
        y_TD, float32, and output_ED, float32: each expert's weighted outputs added up, which has no
        gradient.
    """
    ins = (w_in_EDF,) if w_gate_EDF is None else (w_in_EDF, w_gate_EDF)
    rows = Rows(x_TD, token_N, weight_N)
    y_TD, output_ED = _ffn(activation, by, *_vary_alike((rows, ins, w_out_EFD, load_E)))
    return y_TD, lax.stop_gradient(output_ED)


def _vary_alike(tree: Any) -> Any:
    # Inside shard_map: the gradient of weights that several shards of rows share is summed.
    axes = frozenset[str]().union(*map(manual_axes, jax.tree.leaves(tree)))

    def vary(a):
        missing = tuple(axes - manual_axes(a))
        return lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(vary, tree)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ffn(activation: Activation, by: str | None, rows: Rows, ins: Weights, w_out_EFD, load_E):
    return _forward(activation, by, rows, ins, w_out_EFD, load_E)[0]


def _forward(activation: Activation, by: str | None, rows: Rows, ins: Weights, w_out_EFD, load_E):
    # Chosen inside the two rules: around them, each path would keep the other's residuals.
    args = rows, ins, w_out_EFD, load_E
    y, pre = lax.platform_dependent(*args, **_by_platform("forward", activation, by, rows, ins))
    return y, (*args, pre)


def _backward(activation: Activation, by: str | None, residuals: Any, dy: Any):
    rows, ins, *_ = residuals
    if rows.token_N is not None:
        dy, _ = dy
    by_platform = _by_platform("backward", activation, by, rows, ins)
    drows, dins, dw_out_EFD = lax.platform_dependent(dy, *residuals, **by_platform)
    drows = drows._replace(x=drows.x.astype(rows.x.dtype))
    return drows, dins, dw_out_EFD, None


_ffn.defvjp(_forward, _backward)


def _by_platform(
    rule: str, activation: Activation, by: str | None, rows: Rows, ins: Weights
) -> dict[str, Callable[..., Any]]:
    experts, dim, ffn = ins[0].shape
    sizes = Sizes(experts, dim, ffn, rows.x.dtype.name, bool(manual_axes(rows.x)))

    def of(platform: str) -> Callable[..., Any]:
        made = IMPLEMENTATIONS[by or choose(platform, rows.x.ndim == 3, sizes).name]
        return partial(getattr(made, rule), activation)

    return {platform: of(platform) for platform in ("cpu", "tpu", "default")}
