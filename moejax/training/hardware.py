"""What the machine could do at best, so that a run can say which share of it it reached (MFU)."""

import functools
import time

import jax
import jax.numpy as jnp

# Dense peak in bfloat16, FLOP/s a device, from the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


@functools.cache
def peak_flops() -> float:
    """FLOP/s of all devices together: the data sheet's, or on a CPU a measured float32 matmul."""
    devices = jax.devices()
    kind = devices[0].device_kind
    for name, flops in sorted(PEAK_FLOPS.items(), key=lambda item: -len(item[0])):
        if kind.startswith(name):
            return flops * len(devices)
    return _measured_flops()


def _measured_flops(size: int = 1024, repeats: int = 3) -> float:
    multiply = jax.jit(jnp.matmul)
    x = jnp.ones((size, size))
    multiply(x, x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def device_name() -> str:
    """What the results were measured on, e.g. '8 x TPU v5'."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"
