"""Batch assignment: in training all tokens are shared out together, so that loads come out even.

A token's expert then depends on the other tokens of its group, later ones included: training leaks
unless the group is a position (`moe.groups`). Evaluation compares no tokens: each takes its best.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moejax.routing.spec import RouterSpec
from moejax.routing.types import RouterInput, Routing, token_choice


def base(r: RouterInput, *, k: int = 1, epsilon: float = 1e-3, rounds: int = 1000) -> Routing:
    """BASE: the assignment of T / E tokens to each expert with the highest sum of logits.

    Lewis et al. 2021, 2103.16716. The weight is sigmoid(logit); evaluation takes the argmax. Of T'
    valid tokens an expert takes ceil(T' / E) at most. The paper shuffles tokens between devices
    first; here a group is assigned as a whole. It also starts the experts' output matrix at 0.

    Args:
      r: the router's input.
      k: 1; any other value is refused.
      epsilon: the step of the auction, in logits: the sum is within T epsilon of the best one.
      rounds: the auction stops after so many; tokens without an expert then go nowhere.

    sums: unassigned = those tokens.

    Raises:
      ValueError: k other than 1; in training, a group that E does not divide.
    """
    num_tokens, num_experts = r.logits_TE.shape
    if k != 1:
        raise ValueError(f"base routes each token to 1 expert, got k={k}; use sinkhorn for k > 1")
    logits_TE = jax.lax.stop_gradient(r.logits_TE)
    if r.key is None:
        expert_T = logits_TE.argmax(-1).astype(jnp.int32)
    elif num_tokens % num_experts:
        raise ValueError(
            f"base: {num_tokens} tokens of a group are not divisible by {num_experts} experts; "
            "change data.batch, data.sequence or moe.groups"
        )
    else:
        expert_T = auction(logits_TE, r.valid_T, epsilon=epsilon, rounds=rounds)
    scores_TE = jax.nn.sigmoid(r.logits_TE)
    weight_TK = scores_TE.at[jnp.arange(num_tokens), expert_T].get(mode="fill", fill_value=0.0)
    routing = token_choice(r, expert_T[:, None], weight_TK[:, None], scores_TE)
    unassigned = jnp.sum(r.valid_T & (expert_T == num_experts), dtype=jnp.int32)
    return routing._replace(sums={"unassigned": unassigned})


def auction(value_TE: jax.Array, valid_T: jax.Array, *, epsilon: float, rounds: int) -> jax.Array:
    """Each valid token's expert, int32 [T], at most ceil(T' / E) tokens an expert; E = none.

    Bertsekas' auction for alike places: a token without one bids, for the expert of the highest
    value less price, what makes it as good as the second best, plus epsilon. An expert keeps its
    highest bids; its price is the lowest of them once it is full, 0 before.
    """
    num_tokens, num_experts = value_TE.shape
    places = -(-valid_T.sum() // num_experts)
    token_T = jnp.arange(num_tokens)

    def unfinished(carry: Any) -> jax.Array:
        count, expert_T, _, _ = carry
        return (count < rounds) & jnp.any(valid_T & (expert_T == num_experts))

    def bid(carry: Any) -> Any:
        count, expert_T, bid_T, price_E = carry
        # With one expert the second best is the best itself.
        best_T2, wanted_T2 = jax.lax.top_k(value_TE - price_E[None], min(2, num_experts))
        wanted_T, lead_T = wanted_T2[:, 0], best_T2[:, 0] - best_T2[:, -1]
        free_T = valid_T & (expert_T == num_experts)
        bid_T = jnp.where(free_T, price_E[wanted_T] + lead_T + epsilon, bid_T)
        expert_T = jnp.where(free_T, wanted_T, expert_T)
        # By expert, the highest bid first: the rank is the place in the run.
        order_T = jnp.lexsort((-bid_T, expert_T))
        load_E = jnp.zeros(num_experts, jnp.int32).at[expert_T].add(1, mode="drop")
        start_E = jnp.cumsum(load_E) - load_E
        rank_T = jnp.zeros(num_tokens, jnp.int32).at[order_T].set(token_T)
        kept_T = rank_T - start_E.at[expert_T].get(mode="clip") < places
        expert_T = jnp.where(kept_T, expert_T, num_experts)
        lowest_E = jnp.full(num_experts, jnp.inf).at[expert_T].min(bid_T, mode="drop")
        return count + 1, expert_T, bid_T, jnp.where(load_E >= places, lowest_E, 0.0)

    nobody_T = jnp.full(num_tokens, num_experts, jnp.int32)
    start = jnp.int32(0), nobody_T, jnp.zeros(num_tokens), jnp.zeros(num_experts)
    return jax.lax.while_loop(unfinished, bid, start)[1]


def sinkhorn(
    r: RouterInput,
    *,
    k: int = 1,
    tolerance: float = 1e-4,
    iterations: int = 100,
    order: str = "k_major",
) -> Routing:
    """The K largest entries of a token's row in the balanced plan (Clark et al. 2022, 2202.01169).

    Evaluation takes the K largest logits. The plan has no gradient; the weight is sigmoid(logit)
    for k = 1, else the raw softmax. A balanced plan's largest entries are only roughly balanced.
    """
    logits_TE = jax.lax.stop_gradient(r.logits_TE)
    if r.key is not None:
        logits_TE = sinkhorn_plan(logits_TE, r.valid_T, tolerance=tolerance, iterations=iterations)
    _, expert_TK = jax.lax.top_k(logits_TE, k)
    scores_TE = jax.nn.sigmoid(r.logits_TE) if k == 1 else jax.nn.softmax(r.logits_TE)
    weight_TK = jnp.take_along_axis(scores_TE, expert_TK, axis=-1)
    return token_choice(r, expert_TK, weight_TK, scores_TE, order)


def sinkhorn_plan(
    logits_TE: jax.Array, valid_T: jax.Array, *, tolerance: float = 1e-4, iterations: int = 100
) -> jax.Array:
    """log pi, pi = diag(u) exp(logits) diag(v): rows of valid tokens sum to 1 / T', columns to 1 /
    E; -inf for the others.

    In logarithms, so that nothing overflows. Ends once log v moves by less than `tolerance` on
    average, or after so many iterations: rows are then exact, columns as near as it got.
    """
    num_experts = logits_TE.shape[1]
    tokens = jnp.maximum(valid_T.sum(), 1)
    logits_TE = jnp.where(valid_T[:, None], logits_TE, 0.0)
    log_rows, log_columns = -jnp.log(tokens.astype(jnp.float32)), -jnp.log(float(num_experts))

    def row_scale(v_E: jax.Array) -> jax.Array:
        u_T = log_rows - jax.nn.logsumexp(logits_TE + v_E[None], axis=1)
        # No valid token at all: the plan is empty, and its columns must not become infinite.
        return jnp.where(valid_T | ~valid_T.any(), u_T, -jnp.inf)

    def unfinished(carry: Any) -> jax.Array:
        count, _, moved = carry
        return (count < iterations) & (moved >= tolerance)

    def scale(carry: Any) -> Any:
        count, v_E, _ = carry
        new_E = log_columns - jax.nn.logsumexp(logits_TE + row_scale(v_E)[:, None], axis=0)
        return count + 1, new_E, jnp.abs(new_E - v_E).mean()

    start = jnp.int32(0), jnp.zeros(num_experts), jnp.float32(jnp.inf)
    v_E = jax.lax.while_loop(unfinished, scale, start)[1]
    plan_TE = logits_TE + row_scale(v_E)[:, None] + v_E[None]
    return jnp.where(valid_T[:, None], plan_TE, -jnp.inf)


def token_rounding(
    r: RouterInput, *, k: int = 2, tile: int = 128, rounding: str = "nearest"
) -> Routing:
    """Top-K, then every expert's load rounded to a multiple of the kernel's tile (SonicMoE, Guo et
    al. 2025, 2512.14080).

    An expert ranks the tokens that chose it by weight, then all others by probability, and keeps
    the first ones. Weights sum to 1 over the K chosen; a lost choice is not made up for, an added
    token weighs its raw probability. An expert that the group has too few tokens to fill up is
    rounded down. Rounding needs several tiles an expert: in a group whose fair share K T / E is
    less than one tile, that share (2 at least) is the tile. Evaluation rounds nothing.

    Args:
      r: the router's input.
      k: choices of a token, 2 or more.
      tile: rows of a tile; 1 rounds nothing.
      rounding: 'nearest' (half goes to the even multiple), 'up' or 'down'.

    Raises:
      ValueError: k = 1, whose weight would be the constant 1; unknown rounding; tile below 1.
    """
    if k < 2:
        raise ValueError(f"token_rounding renormalises over k choices, needs k >= 2, got k={k}")
    if rounding not in ("nearest", "up", "down"):
        raise ValueError(f"unknown rounding={rounding!r}: use 'nearest', 'up' or 'down'")
    if tile < 1:
        raise ValueError(f"token_rounding: tile={tile} must be at least 1")
    num_tokens, num_experts = r.logits_TE.shape
    probs_TE = jax.nn.softmax(r.logits_TE)
    weight_TK, expert_TK = jax.lax.top_k(probs_TE, k)
    weight_TK = weight_TK / weight_TK.sum(-1, keepdims=True)
    if r.key is None or tile == 1:
        return token_choice(r, expert_TK, weight_TK, probs_TE)
    tile = min(tile, max(2, k * num_tokens // num_experts))

    row_TK = jnp.broadcast_to(jnp.arange(num_tokens)[:, None], expert_TK.shape)
    chosen_TE = jnp.zeros(probs_TE.shape, bool).at[row_TK, expert_TK].set(True)
    chosen_TE = chosen_TE & r.valid_T[:, None]
    worth_TE = jax.lax.stop_gradient(probs_TE.at[row_TK, expert_TK].set(weight_TK))
    class_TE = jnp.where(chosen_TE, 0, jnp.where(r.valid_T[:, None], 1, 2))
    order_TE = jnp.lexsort((-worth_TE, class_TE), axis=0)
    rank_TE = jnp.argsort(order_TE, axis=0)
    load_E = chosen_TE.sum(0)
    target_E = round_load(load_E, tile, rounding, r.valid_T.sum())

    kept_TK = jnp.take_along_axis(rank_TE < target_E[None], expert_TK, axis=1)
    routing = token_choice(r, jnp.where(kept_TK, expert_TK, num_experts), weight_TK, probs_TE)
    # An expert is filled up by less than a tile, and from no more tokens than there are.
    place_EA = load_E[:, None] + jnp.arange(min(tile - 1, num_tokens))[None]
    token_EA = jnp.take_along_axis(order_TE.T, jnp.minimum(place_EA, num_tokens - 1), axis=1)
    expert_EA = jnp.broadcast_to(jnp.arange(num_experts)[:, None], place_EA.shape)
    expert_A = jnp.where(place_EA < target_E[:, None], expert_EA, num_experts).reshape(-1)
    token_A = token_EA.reshape(-1)
    weight_A = probs_TE.at[token_A, expert_A].get(mode="fill", fill_value=0.0)
    return Routing(
        jnp.concatenate([routing.token_N, token_A.astype(jnp.int32)]),
        jnp.concatenate([routing.expert_N, expert_A.astype(jnp.int32)]),
        jnp.concatenate([routing.weight_N, weight_A]),
        jnp.concatenate([routing.choice_N, jnp.full_like(token_A, k, jnp.int32)]),
        probs_TE,
    )


def round_load(load_E: jax.Array, tile: int, rounding: str, most: jax.Array) -> jax.Array:
    """Each load as a multiple of `tile` that is not above `most`."""
    tiles_E, rest_E = load_E // tile, load_E % tile
    if rounding == "nearest":
        up_E = (2 * rest_E > tile) | ((2 * rest_E == tile) & (tiles_E % 2 == 1))
    else:
        up_E = (rest_E > 0) & (rounding == "up")
    raised_E = (tiles_E + up_E) * tile
    return jnp.where(raised_E <= most, raised_E, tiles_E * tile)


ROUTERS = {
    "base": RouterSpec(
        base,
        "batch",
        "sigmoid, raw",
        "exact in training",
        "Lewis et al. 2021, 2103.16716",
        "SciPy's optimal assignment",
        weights=jax.nn.initializers.orthogonal(0.1),
    ),
    "sinkhorn": RouterSpec(
        sinkhorn,
        "batch",
        "sigmoid (k = 1) or softmax, raw",
        "soft in training",
        "Clark et al. 2022, 2202.01169",
        "row and column sums of the plan",
    ),
    "token_rounding": RouterSpec(
        token_rounding,
        "batch",
        "softmax, renormalised; added tokens raw",
        "load_balance loss; whole tiles in training",
        "Guo et al. 2025, 2512.14080",
        "rounding by hand",
    ),
}
