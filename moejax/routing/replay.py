"""Router replay: a run's choices are written down per token, and another run follows them.

Used to take the router out of a comparison (frozen routing), and in reinforcement learning, where
training must visit the experts that the rollout visited (Ma et al. 2025, 2510.11370).
"""

import jax
import jax.numpy as jnp

from moejax.routing.spec import RouterSpec
from moejax.routing.types import RouterInput, Routing, token_choice

WEIGHTS = ("recorded", "softmax", "softmax_renorm", "sigmoid")


def replay(
    r: RouterInput, *, k: int = 2, weight: str = "recorded", order: str = "k_major"
) -> Routing:
    """The experts of `r.recorded`, whatever the logits say.

    With recorded weights the router has no gradient; with live ones (Ma et al. 2025) it learns to
    weigh what was chosen for it. Where nothing is recorded, in evaluation, the router chooses its
    own k best, and weighs them so; 'recorded' is 'softmax' there.

    Args:
      r: the router's input; `recorded` may be None.
      k: choices where nothing is recorded; a recording brings its own number.
      weight: 'recorded'; or live from the logits: 'softmax', 'softmax_renorm' (divided by its sum
        over the chosen), 'sigmoid'.
      order: 'k_major' or 'token_major'.

    Raises:
      ValueError: unknown weight or order.
    """
    if weight not in WEIGHTS:
        raise ValueError(f"unknown weight {weight!r}: use {', '.join(WEIGHTS)}")
    scores_TE = (jax.nn.sigmoid if weight == "sigmoid" else jax.nn.softmax)(r.logits_TE)
    if r.recorded is None:
        _, expert_TR = jax.lax.top_k(jax.lax.stop_gradient(scores_TE), k)
    else:
        expert_TR = r.recorded.expert_TR.astype(jnp.int32)
    if weight == "recorded" and r.recorded is not None:
        weight_TR = r.recorded.weight_TR
    else:
        weight_TR = jnp.take_along_axis(
            scores_TE, jnp.minimum(expert_TR, scores_TE.shape[-1] - 1), axis=-1
        )
        weight_TR = jnp.where(expert_TR < scores_TE.shape[-1], weight_TR, 0.0)
        if weight == "softmax_renorm":
            total_T = weight_TR.sum(-1, keepdims=True)
            weight_TR = weight_TR / jnp.where(total_T > 0, total_T, 1.0)
    return token_choice(r, expert_TR, weight_TR, scores_TE, order)


ROUTERS = {
    "replay": RouterSpec(
        replay,
        "token",
        "recorded, or live softmax, sigmoid",
        "as recorded",
        "Ma et al. 2025, 2510.11370",
        "the recorded run's own losses, to 1e-6",
    ),
}
