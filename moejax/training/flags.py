"""XLA flags that let collectives run beside computation, each with its reason, in one place.

Only flags that the supported versions of libtpu accept for every generation of chips: an unknown
flag, or one that a generation does not support, ends the process. (The often copied set
`xla_tpu_enable_async_collective_fusion_*` is refused for v5p by libtpu 0.0.50.)
"""

import os
from collections.abc import MutableMapping
from importlib.util import find_spec

# flag -> why. libtpu reads them from LIBTPU_INIT_ARGS.
TPU_FLAGS = {
    "--xla_tpu_enable_latency_hiding_scheduler=true": (
        "orders a step so that work which needs no transferred data stands between the start of a "
        "transfer and its end"
    ),
    "--xla_tpu_enable_async_all_to_all=true": (
        "tokens travel to their experts while dense parts of the layer are computed"
    ),
    "--xla_tpu_enable_async_ragged_all_to_all=true": (
        "the same for rows that travel sorted; off by default"
    ),
    "--xla_enable_async_all_gather=true": (
        "the weights of the next layer, cut over `fsdp`, arrive while this one is computed"
    ),
    "--xla_tpu_overlap_compute_collective_tc=true": (
        "the tensor core goes on computing while its own collectives run"
    ),
}

# flag -> why. XLA reads them from XLA_FLAGS.
GPU_FLAGS = {
    "--xla_gpu_enable_latency_hiding_scheduler=true": ("as on TPU; on GPUs it is off by default"),
}
GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


def set_xla_flags(environment: MutableMapping[str, str] = os.environ) -> None:
    """Add the flags of the accelerators whose support is installed. To be called before JAX looks
    for devices. A flag that the user has set keeps the user's value."""
    if find_spec("libtpu"):
        _add(environment, "LIBTPU_INIT_ARGS", TPU_FLAGS)
    if any(find_spec(plugin) for plugin in GPU_PLUGINS):
        _add(environment, "XLA_FLAGS", GPU_FLAGS)


def _add(environment: MutableMapping[str, str], variable: str, flags: dict[str, str]) -> None:
    given = environment.get(variable, "").split()
    names = {flag.partition("=")[0] for flag in given}
    new = [flag for flag in flags if flag.partition("=")[0] not in names]
    environment[variable] = " ".join([*given, *new])
