"""Optimizers and learning-rate schedules, from optax."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from moejax.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int, peak: Any = None) -> optax.Schedule:
    """Learning rate by optimizer step: linear warm-up to the peak, then the named decay.

    cosine and wsd end at final_fraction x peak at `steps`; rsqrt follows peak x sqrt(warmup /
    step). `peak` may be traced; None = the config's learning rate.

    Raises:
      ValueError: a warm-up that does not end before the run does.
    """
    peak, warmup = config.learning_rate if peak is None else peak, config.warmup
    if warmup >= steps:
        raise ValueError(f"optimizer.warmup={warmup} must end before train.steps={steps}")
    rest, final = steps - warmup, config.final_fraction * peak
    decay = min(rest, max(1, round(config.decay_fraction * steps)))
    after: optax.Schedule
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, config.final_fraction)
    elif config.schedule == "rsqrt":
        after = functools.partial(_inverse_square_root, peak, max(1, warmup))
    elif config.schedule == "wsd":
        after = optax.linear_schedule(peak, final, decay, transition_begin=rest - decay)
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def _inverse_square_root(peak: float, start: int, step: ArrayLike) -> jax.Array:
    # Not below 0: `join_schedules` asks during the warm-up too.
    return peak * jnp.sqrt(start / (start + jnp.maximum(step, 0)))


def make_optimizer(
    config: OptimizerConfig, steps: int, peak: Any = None
) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW or Adafactor; weight decay on matrices only. `peak`: see
    `make_schedule`."""
    schedule = make_schedule(config, steps, peak)
    if config.name == "adamw":
        update = optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=_matrices,
        )
    else:
        # optax does not multiply Adafactor's decay by the learning rate; AdamW's it does.
        update = optax.adafactor(
            schedule,
            weight_decay_rate=lambda step: config.weight_decay * schedule(step),
            weight_decay_mask=_matrices,
            multiply_by_parameter_scale=True,
        )
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    return optax.chain(clip, update)


def _matrices(params: optax.Params) -> optax.Params:
    """True for weights, False for scales, whatever layer axis is stacked in front."""
    scales = ("scale_D", "scale_1")
    return jax.tree.map_with_path(lambda path, _: path[-1].key not in scales, params)
