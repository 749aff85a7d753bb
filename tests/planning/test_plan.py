"""Plans of real compilations: the TPU compiler must be installed, and no test skips without it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from moejax.dispatch import BATCH_AXES, Experts, Shared, grouped_ffn
from moejax.moe import MoeOptions, MoeParams, moe
from moejax.planning import show, topology
from moejax.planning.chips import parse_topology
from moejax.planning.collectives import between_devices
from moejax.planning.flops import count_flops
from moejax.planning.hlo import parse
from moejax.planning.loops import runs
from moejax.planning.node import plan_node
from moejax.planning.pod import compile_step, read_plan
from moejax.planning.result import DoesNotFit, vocabulary
from moejax.planning.search import candidates, changes, meshes, search
from moejax.planning.topology import topology_devices
from moejax.routing import make_router
from moejax.sharding import make_mesh
from moejax.training.flags import TPU_FLAGS
from moejax.training.program import lay_out
from tests.tiny import tiny

EIGHT = parse_topology("v5e:2x4")
LAYERS = 3
CONFIG = tiny(
    model={"layers": LAYERS, "dim": 128, "ffn": 256, "dtype": "bfloat16"},
    moe={"experts": 8, "ffn": 256, "groups": "sequence", "capacity_factor": 1.0},
    data={"sequence": 128, "batch": 8},
    mesh={"data": 1, "expert": 8},
)


@pytest.fixture(scope="module")
def compiled():
    laid = lay_out(CONFIG, vocabulary(CONFIG), make_mesh(CONFIG.mesh, topology_devices(EIGHT)))
    return laid, compile_step(CONFIG, laid, EIGHT.chip.hbm)


@pytest.fixture(scope="module")
def plan(compiled):
    return read_plan(CONFIG, EIGHT, "tiny", *compiled, seconds=1.0)


def test_the_compiler_describes_the_devices():
    assert [d.platform for d in topology.topology_devices(EIGHT)] == ["tpu"] * 8


def test_two_exchanges_a_layer_and_pass(plan):
    exchanges = {
        row["pass"]: row["calls"]
        for row in plan.collectives
        if row["kind"] == "all-to-all" and row["axes"] == "expert"
    }
    assert exchanges == {"forward": 2 * LAYERS, "backward": 2 * LAYERS}
    # Slots of a device: 8 sequences over 8 devices, 128 x 2 assignments, [E, C, D] in bfloat16.
    forward = next(r for r in plan.collectives if r["kind"] == "all-to-all")
    assert forward["bytes"] == 2 * LAYERS * 256 * 128 * 2
    assert not [row for row in plan.collectives if row["axes"] != "expert"]


def test_program_computes_what_the_model_needs(plan):
    assert plan.model_flops == plan.size.flops * 128
    assert 0.95 < plan.flops / plan.model_flops < 1.1


def test_so_it_does_with_shared_experts_and_rows_that_travel_sorted():
    moe = {"experts": 8, "ffn": 256, "shared": 1, "capacity_factor": 1.0, "dispatch": "gather"}
    config = tiny(
        model={"layers": 1, "dim": 256, "ffn": 512, "dtype": "bfloat16"},
        moe=moe,  # its groups are the batch, so that it moves rows as dropless does
        data={"sequence": 128, "batch": 8},
        mesh={"data": 1, "expert": 8},
    )
    laid = lay_out(config, vocabulary(config), make_mesh(config.mesh, topology_devices(EIGHT)))
    compiled = compile_step(config, laid, EIGHT.chip.hbm)
    plan = read_plan(config, EIGHT, "shared", laid, compiled, seconds=1.0)
    assert 0.95 < plan.flops / plan.model_flops < 1.1


def test_loops_are_multiplied_out(compiled):
    """The compiler's own analysis counts each loop's body once: so do we, told that they run
    once."""
    module = parse(compiled[1].as_text())
    times = runs(module)
    assert not times.unknown and sorted(set(times.trips.values()))[-1] == LAYERS
    once = times._replace(times=dict.fromkeys(times.times, 1))
    theirs = compiled[1].cost_analysis()["flops"]
    # Theirs has the elementwise operations too.
    assert 0.8 * theirs < count_flops(module, once).total < theirs
    assert count_flops(module, times).total > 1.5 * theirs


def test_memory_by_kind_adds_up_to_the_compilers(compiled, plan):
    stats = compiled[1].memory_analysis()
    arguments = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    extra = plan.memory.total - arguments - stats.generated_code_size_in_bytes
    assert 0 <= extra < 2**20  # metrics that are no old buffer
    routed = 3 * 128 * 256 * LAYERS * 4  # one of 8 experts in float32
    assert routed < plan.memory.parameters < plan.size.total * 4 / 2
    assert 1.99 < plan.memory.optimizer / plan.memory.parameters < 2.01


def test_what_it_says(plan):
    content = json.loads(json.dumps(plan.to_dict()))
    assert content["devices"] == 8 and content["mesh"]["expert"] == 8
    assert content["memory"]["total"] < content["memory"]["hbm"] == 16 * 2**30
    step = content["seconds"]
    assert step["step_overlap"] == max(step["compute"], step["hbm"], step["collectives"])
    assert 0 < content["mfu"]["sum"] < content["mfu"]["overlap"] <= 1
    tables = show.tables(plan)
    text, page = show.text(tables), show.page(plan, tables)
    for part in ("all-to-all", "parameters", "step, overlap", "v5e:2x4", "largest tensors"):
        assert part in text and part in page
    assert "http" not in page


def test_grouped_products_are_not_masked_dense():
    """Of the forward pass and all gradients, on one TPU: 9 products of N rows."""
    rows, dim, hidden, experts = 1024, 128, 256, 8
    where = SingleDeviceSharding(topology_devices(EIGHT)[0])

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def loss(*args):
        return jnp.square(grouped_ffn(*args).astype(jnp.float32)).sum()

    into = array(experts, dim, hidden)
    args = (array(rows, dim), into, into, array(experts, hidden, dim), array(experts, dtype="i4"))
    compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*args).compile()
    module = parse(compiled.as_text())
    ratio = count_flops(module, runs(module)).total / (9 * 2 * rows * dim * hidden)
    assert 0.99 < ratio < 1.1


def test_gpus_are_planned_by_formula():
    found = plan_node(CONFIG, parse_topology("h100:1x8"), "tiny")
    assert not found.compiled and "analytic" in found.notes[0]
    calls = {(r["kind"], r["pass"]): r["calls"] for r in found.collectives}
    assert calls["all-to-all", "forward"] == calls["all-to-all", "backward"] == 2 * LAYERS
    again = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, remat="full"))
    assert plan_node(again, parse_topology("h100:1x8")).flops == pytest.approx(found.flops * 4 / 3)


BIG = tiny(
    model={"layers": 24, "dim": 4096, "heads": 32, "ffn": 14336, "dtype": "bfloat16"},
    moe={"experts": 8, "ffn": 14336, "dispatch": "dropless"},
    data={"sequence": 2048, "batch": 64},
)


def test_what_does_not_fit_names_both_numbers_and_the_change():
    with pytest.raises(DoesNotFit, match=r"GiB needed of 74\.51 GiB .*raise mesh\.fsdp"):
        plan_node(BIG, parse_topology("h100:4x8"))
    with pytest.raises(DoesNotFit, match=r"GiB needed of 16\.00 GiB"):  # nothing is compiled
        mesh = make_mesh(BIG.mesh, topology_devices(EIGHT))
        compile_step(BIG, lay_out(BIG, 256, mesh), EIGHT.chip.hbm)


def test_search_tries_remat_then_accumulation_then_meshes():
    nodes = parse_topology("h100:4x8")
    said = []
    found, tries = search(BIG, nodes, "big", 32, 20, said.append)
    assert tries == said and tries[-1].outcome == "fits"
    assert found is not None and found.memory.total == tries[-1].needed < 80e9
    assert [t.change for t in tries[:4]] == [
        "",
        "--config.model.remat=routing",
        "--config.model.remat=full",
        "--config.model.remat=full --config.train.accumulation=2",
    ]
    assert "--config.mesh.fsdp=" in tries[-1].change
    none, all_tried = search(BIG, nodes, "big", 32, 2, said.append)
    assert none is None and len(all_tried) == 2


def test_candidates_are_possible_meshes():
    found = list(meshes(CONFIG, 16))
    assert {"data": 2, "fsdp": 1, "expert": 8, "tensor": 1} in found
    assert all(m["data"] * m["fsdp"] * m["expert"] == 16 and m["expert"] <= 8 for m in found)
    first, second, third, *_ = candidates(CONFIG, 8)
    assert first == CONFIG and changes(CONFIG, second) == "--config.model.remat=routing"
    assert changes(CONFIG, third) == "--config.model.remat=full"


DIM, ROWS = 512, 1024  # of the layer; rows of each of eight devices


@pytest.fixture(scope="module")
def dropless_layer():
    """A layer with shared experts, forward and backward, as training compiles it; and its mesh."""
    mesh = make_mesh(CONFIG.mesh, topology_devices(EIGHT))
    options = MoeOptions(make_router("topk"), "dropless")

    def lies(shape, *cut, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*cut)))

    hidden, experts = 1024, 8
    into = lies((experts, DIM, hidden), "expert")
    p = MoeParams(
        lies((DIM, experts), dtype=jnp.float32),
        Experts(into, lies((experts, hidden, DIM), "expert"), into),
        shared=Shared(lies((DIM, hidden)), lies((hidden, DIM)), lies((DIM, hidden))),
    )

    def loss(p, x_BSD):
        valid_BS = jnp.ones(x_BSD.shape[:2], bool)
        y_BSD, stats = moe(p, x_BSD, options=options, valid_BS=valid_BS)
        return jnp.square(y_BSD.astype(jnp.float32)).mean() + stats.z

    with jax.set_mesh(mesh):
        x_BSD = lies((8, ROWS, DIM), BATCH_AXES)
        lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(p, x_BSD)
        flags = dict(flag.removeprefix("--").split("=") for flag in TPU_FLAGS)
        return lowered.compile(compiler_options=flags), mesh


def test_dropless_rows_travel_in_ragged_exchanges(dropless_layer):
    """Two of rows forward and two backward; nobody gathers the rows of others."""
    found = between_devices(*dropless_layer)
    ragged = [c for c in found if c.kind == "ragged-all-to-all"]
    assert sorted(c.backward for c in ragged) == [False, False, True, True]
    # What else is exchanged is counts: less than one device's rows. (Gradients are added up.)
    others = [c for c in found if c.kind not in ("ragged-all-to-all", "all-reduce")]
    assert others and max(c.bytes for c in others) < ROWS * DIM * 2


def test_shared_experts_work_while_rows_travel(dropless_layer):
    """In the scheduled program their products stand between the start of an exchange and its end:
    the hidden rows on the way there, the outputs on the way back, and backward alike."""
    beside, under_way = [], None
    text = dropless_layer[0].as_text()
    for line in text[text.index("\nENTRY") :].splitlines():
        if " ragged-all-to-all-start(" in line:
            under_way = 0
        elif " ragged-all-to-all-done(" in line:
            beside.append(under_way)
            under_way = None
        elif under_way is not None:
            under_way += "shared" in line and "dot_general" in line
    assert len(beside) == 4 and all(products for products in beside), beside
