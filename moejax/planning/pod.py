"""The plan of a config on a TPU topology: its training step compiled by the TPU compiler."""

import math
import re
import time
from typing import Any

import jax
from jax.stages import Compiled

from moejax.config import Config
from moejax.moe import spread_dispatch
from moejax.planning.chips import Topology
from moejax.planning.collectives import collectives
from moejax.planning.flops import count_flops
from moejax.planning.hlo import parse
from moejax.planning.loops import runs
from moejax.planning.memory import largest_tensors, local_bytes, memory
from moejax.planning.result import Counted, DoesNotFit, Plan, advice, vocabulary
from moejax.planning.topology import topology_devices
from moejax.planning.traffic import hbm_bytes
from moejax.sharding import make_mesh
from moejax.training.program import Laid, lay_out, lower_train_step


def plan_pod(config: Config, topology: Topology, name: str = "") -> Plan:
    """Compiles the step that training runs, and reads the program.

    Raises:
      ValueError: the mesh does not fit the topology, the batch or a weight; no TPU compiler.
      DoesNotFit: more memory than a device has.
    """
    devices = topology_devices(topology)
    laid = lay_out(config, vocabulary(config), make_mesh(config.mesh, list(devices)))
    hbm = topology.chip.hbm * topology.chips / len(devices)
    start = time.perf_counter()
    compiled = compile_step(config, laid, hbm)
    seconds = time.perf_counter() - start
    return read_plan(config, topology, name, laid, compiled, seconds)


def compile_step(config: Config, laid: Laid, hbm: float) -> Compiled:
    """Raises DoesNotFit, before the compiler is asked where the state alone is too much."""
    state = local_bytes((laid.state.params, laid.state.opt_state))
    how = advice(config, dict(laid.mesh.shape), state, hbm)
    if state > hbm:
        raise DoesNotFit(state, hbm, how)
    lowered = lower_train_step(config, vocabulary(config), laid)
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = memory_error(str(error))
        if found is None:
            raise
        raise DoesNotFit(*found, how) from error


def memory_error(text: str) -> tuple[float, float] | None:
    """(bytes needed, bytes there) of the compiler's message that memory ran out."""
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        return None
    size = r"([\d.]+)([KMGT]?)i?B?"
    patterns = (
        rf"\({size}\) exceeds available HBM \({size}\)",
        rf"Used {size} of {size} hbm",
    )
    for pattern in patterns:
        if found := re.search(pattern, text):
            needed, there = (
                float(found[i]) * 1024 ** " KMGT".index(found[i + 1] or " ") for i in (1, 3)
            )
            return needed, there
    return None


def read_plan(
    config: Config, topology: Topology, name: str, laid: Laid, compiled: Any, seconds: float
) -> Plan:
    """The figures of a compiled step."""
    mesh = dict(laid.mesh.shape)
    module = parse(compiled.as_text())
    times = runs(module)
    flops = count_flops(module, times)
    counted = Counted(
        places=[tuple(device.coords) for device in laid.mesh.devices.flat],
        memory=memory(compiled.memory_analysis(), laid.state, module, times),
        flops=flops.products + flops.kernels / spare_rows(config, mesh),
        worst_flops=flops.total,
        hbm_bytes=hbm_bytes(module, times),
        collectives=collectives(module, times, mesh),
        tensors=largest_tensors(module, times),
        notes=notes_of(config, mesh, times.unknown),
        compile_seconds=seconds,
    )
    return Plan.of(config, topology, name, mesh, counted)


def spare_rows(config: Config, mesh: dict[str, int]) -> float:
    """Rows of the experts' buffers over the rows that hold tokens at an even load: without a
    `moe.buffer_factor` dropless expert parallelism has room for the rows of all shards on one."""
    moe = config.moe
    sorted_rows = moe.experts and spread_dispatch(moe.dispatch, moe.groups) == "dropless"
    return min(moe.buffer_factor or math.inf, mesh["expert"]) if sorted_rows else 1.0


def notes_of(config: Config, mesh: dict[str, int], unknown: tuple[str, ...]) -> tuple[str, ...]:
    """What a reader of the plan must know."""
    notes = []
    if (spare := spare_rows(config, mesh)) > 2:
        notes.append(
            f"a device has room for {spare:g} times its fair share of rows, and every pass over "
            "them costs it whole: moe.buffer_factor=2 bounds that, what does not fit drops"
        )
    again = (config.model.remat != "none") + (config.train.accumulation > 1)
    if again:
        more = ("a third", "two thirds")[again - 1]
        notes.append(f"the program recomputes the forward pass: expect {more} more FLOPs")
    if unknown:
        notes.append(f"loops whose length could not be read count once: {', '.join(unknown)}")
    return tuple(notes)
