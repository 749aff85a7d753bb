"""The devices of a topology that is not here: the TPU compiler is enough to describe them."""

import functools
import importlib.util
import os

import jax

from moejax.planning.chips import Topology

# Without these libtpu asks the cloud who it is, and complains.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing runs, so several processes may compile
}


def require_compiler() -> None:
    """Raises ValueError where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("no TPU compiler (libtpu) here: pip install 'moejax[tpu]'")


@functools.cache
def topology_devices(topology: Topology) -> tuple[jax.Device, ...]:
    """The devices of a TPU topology, for a mesh to compile for; nothing can run on them.

    Raises:
      ValueError: no libtpu, or sides that this chip is not built in.
    """
    require_compiler()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"unknown topology {topology.name!r}: {text}") from error
    return tuple(found.devices)
