"""Counting in small programs written by hand."""

import numpy as np
import pytest

from moejax.planning.chips import parse_topology
from moejax.planning.collectives import Collective, axes_of, collectives, first_group
from moejax.planning.flops import count_flops
from moejax.planning.hlo import Shape, parse, shapes_of
from moejax.planning.loops import runs
from moejax.planning.memory import is_backward, largest_tensors, short, stacked_bytes
from moejax.planning.pod import memory_error
from moejax.planning.roofline import collective_seconds, gpu_places
from moejax.planning.traffic import hbm_bytes

# A loop of 5 around one product [8,16] x [16,16] and one exchange, that stacks its results.
PROGRAM = """
HloModule example

%condition (c.0: (s32[], f32[8,16], f32[5,8,16])) -> pred[] {
  %c.0 = (s32[]{:T(128)}, f32[8,16]{1,0}, f32[5,8,16]{2,1,0}) parameter(0)
  %limit = s32[] constant(5)
  %at = s32[] get-tuple-element(%c.0), index=0
  ROOT %less = pred[] compare(%at, %limit), direction=LT
}

%body (b.0: (s32[], f32[8,16], f32[5,8,16])) -> (s32[], f32[8,16], f32[5,8,16]) {
  %b.0 = (s32[]{:T(128)}, f32[8,16]{1,0}, f32[5,8,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b.0), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%b.0), index=1
  %stack = f32[5,8,16]{2,1,0} get-tuple-element(%b.0), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %w = f32[16,16]{1,0:T(8,128)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %y = f32[8,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %z = f32[8,16]{1,0} all-to-all(%y), replica_groups={{0,1},{2,3}}, dimensions={0}, metadata={op_name="jit(f)/jvp()/while/body/exchange"}
  %new = f32[5,8,16]{2,1,0} dynamic-update-slice(%stack, %z, %i)
  ROOT %out = (s32[], f32[8,16]{1,0}, f32[5,8,16]{2,1,0}) tuple(%next, %z, %new)
}

ENTRY %main (p: f32[8,16]) -> f32[5,8,16] {
  %p = f32[8,16]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %empty = f32[5,8,16]{2,1,0} broadcast(%zero), dimensions={}
  %start = (s32[], f32[8,16]{1,0}, f32[5,8,16]{2,1,0}) tuple(%zero, %p, %empty)
  %loop = (s32[], f32[8,16]{1,0}, f32[5,8,16]{2,1,0}) while(%start), condition=%condition, body=%body, metadata={op_name="jit(f)/jvp()/while"}
  ROOT %result = f32[5,8,16]{2,1,0} get-tuple-element(%loop), index=2
}
"""  # noqa: E501
MODULE = parse(PROGRAM)
TIMES = runs(MODULE)
ARRAY = 8 * 16 * 4


def test_loops():
    assert TIMES.trips == {"loop": 5} and TIMES.times == {"main": 1, "body": 5}
    longer = PROGRAM.replace("constant(5)", "constant(11)").replace(
        "constant(1)\n", "constant(2)\n"
    )
    assert runs(parse(longer)).trips == {"loop": 6}  # 0, 2, 4, 6, 8, 10
    stated = PROGRAM.replace(
        "body=%body,", 'body=%body, backend_config={"known_trip_count":{"n":"7"}},'
    )
    assert runs(parse(stated)).trips == {"loop": 7}
    opaque = runs(parse(PROGRAM.replace("direction=LT", "direction=NE")))
    assert opaque.unknown == ("loop",) and opaque.times["body"] == 1


def test_what_another_core_of_the_chip_is_given_is_counted():
    """TPU7x starts exchanges by `call-start`, whose computation `to_apply` names."""
    text = """
%sent (q: f32[8,16]) -> f32[8,16] {
  %q = f32[8,16]{1,0} parameter(0)
  ROOT %z = f32[8,16]{1,0} all-to-all(%q), replica_groups={{0,1},{2,3}}, dimensions={0}
}

ENTRY %main (p: f32[8,16]) -> f32[8,16] {
  %p = f32[8,16]{1,0} parameter(0)
  %go = ((f32[8,16]{1,0}), f32[8,16]{1,0}, u32[]) call-start(%p), async_execution_thread="sparsecore", to_apply=%sent
  ROOT %end = f32[8,16]{1,0} call-done(%go)
}
"""  # noqa: E501
    module = parse(text)
    (found,) = collectives(module, runs(module), {"data": 2, "expert": 2})
    assert (found.kind, found.axes, found.times, found.bytes) == ("all-to-all", "expert", 1, ARRAY)


def test_flops():
    assert count_flops(MODULE, TIMES).total == 5 * 2 * 8 * 16 * 16


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY computation in 5 characters"):
        parse("hello")


CONVOLUTIONS = {
    # As TPU programs write them; each equals a batched product.
    "product": ("f32[8,32]", "f32[8,16]", "f32[16,32]", "dim_labels=bf_io->bf", 2 * 8 * 16 * 32),
    "four products in one": (
        "f32[4,8,32]",
        "f32[4,8,16]",
        "f32[4,16,32]",
        "window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
        4 * 2 * 8 * 16 * 32,
    ),
    "heads apart": (
        "f32[8,4,32]",
        "f32[8,16,1]",
        "f32[4,16,32]",
        "window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_0io->b0f",
        4 * 2 * 8 * 16 * 32,
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    out, left, right, attributes, expected = CONVOLUTIONS[name]
    text = f"""
ENTRY %main (a: {left}, b: {right}) -> {out} {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %c = {out} convolution(%a, %b), {attributes}
}}
"""
    module = parse(text)
    assert count_flops(module, runs(module)).products == expected


def test_kernels_say_what_they_cost():
    text = """
ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8] parameter(0)
  ROOT %k = f32[8] custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"x(","cost_estimate":{"flops":"4096","transcendentals":"0"}}}
}
"""  # noqa: E501
    module = parse(text)
    assert count_flops(module, runs(module)).kernels == 4096


def test_collectives():
    mesh = {"data": 2, "expert": 2}
    (found,) = collectives(MODULE, TIMES, mesh)
    assert found[:6] == ("all-to-all", "expert", (0, 1), ARRAY, 5, False)


GROUPS = {
    "replica_groups={{0,2},{1,3}}": (0, 2),
    "replica_groups=[2,2]<=[4]": (0, 1),
    "replica_groups=[2,2]<=[2,2]T(1,0)": (0, 2),
    "replica_groups=mesh['x'=2,'y'=2] {'x'}": (0, 2),
    "replica_groups=mesh['x'=2,'y'=2] {'x','y'}": (0, 1, 2, 3),
    "replica_groups=mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'y'}": (0, 2),
    "replica_groups=mesh['x'=4] {'x':(1)2}": (0, 2),
    "replica_groups=mesh['x'=4] {'x':(2)2}": (0, 1),
    "replica_groups={}": (0, 1, 2, 3),
    "source_target_pairs={{0,1},{1,0}}": (0, 1),
}


@pytest.mark.parametrize("text", GROUPS)
def test_groups(text):
    assert first_group(f"channel_id=1, {text}, dimensions={{0}}", 4) == GROUPS[text]


def test_axes():
    mesh = {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1}
    assert axes_of((0, 1), mesh) == "expert"
    assert axes_of((0, 2, 4, 6), mesh) == "data,fsdp"


def test_shapes():
    tiled, inner = shapes_of("(bf16[4,16]{1,0:T(8,128)(2,1)S(1)}, pred[])")
    assert tiled == Shape("bf16", (4, 16), False) and tiled.bytes == 128
    assert inner.bytes == 1 and inner.hbm and str(tiled) == "bf16[4,16]"
    assert Shape("s4", (3,)).bytes == 2


def test_memory():
    assert stacked_bytes(MODULE, TIMES) == (5 * ARRAY, 0)
    backward = parse(PROGRAM.replace('jit(f)/jvp()/while"', 'jit(f)/transpose(jvp())/while"'))
    assert stacked_bytes(backward, runs(backward)) == (0, 5 * ARRAY)
    assert not is_backward("jit(f)/transpose(jvp())/while/rematted_computation/while")
    largest = largest_tensors(MODULE, TIMES, 1)[0]
    assert largest.shape == "f32[5,8,16]" and largest.places == 2
    assert short("jit(f)/transpose(jvp())/while/body/dot") == "backward/dot"


def test_traffic():
    # Once: the stack's first value (with the scalar it comes from). Five times: the product reads x
    # and writes y (w is on the chip), the exchange reads and writes, the slice is written.
    assert hbm_bytes(MODULE, TIMES) == 5 * ARRAY + 4 + 5 * (2 + 2 + 1) * ARRAY + 5 * 3 * 4


def test_messages_that_memory_ran_out():
    text = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
    text += "temporaries (28.35G) exceeds available HBM (15.75G)."
    assert memory_error(text) == (28.35 * 2**30, 15.75 * 2**30)
    other = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.5M of 256.00M hbm."
    assert memory_error(other) == (512.5 * 2**20, 256 * 2**20)
    assert memory_error("INTERNAL: something else") is None


def test_seconds_of_collectives():
    ring = [(i, 0, 0) for i in range(4)]
    four = parse_topology("v5p:4x1x1")

    def seconds(kind):
        return collective_seconds(
            [Collective(kind, "x", (0, 1, 2, 3), 800, 3, False, "")], four, ring
        )

    # 1200 GB/s a chip in both directions over three axes: 200 GB/s along one.
    np.testing.assert_allclose(seconds("all-gather"), 3 * 600 / 200e9)
    np.testing.assert_allclose(seconds("all-reduce"), 3 * 1200 / 200e9)
    np.testing.assert_allclose(seconds("all-to-all"), 3 * 800 * 4 / 4 / 200e9)
    nodes = parse_topology("h100:2x8")
    near, far = (Collective("all-gather", "x", g, 800, 1, False, "") for g in ((0, 1), (0, 8)))
    places = gpu_places(nodes, 16)
    np.testing.assert_allclose(collective_seconds([near], nodes, places), 400 / 450e9)
    np.testing.assert_allclose(collective_seconds([far], nodes, places), 400 / 50e9)


@pytest.mark.parametrize(
    "name, message",
    {
        "v9:2x2": r"unknown topology 'v9:2x2'.*v5p:4x4x8",
        "v5p": r"after ':' come sides.*got ''",
        "v5p:4x4": r"has 2 sides, a torus of v5p has 3",
        "h100:2x16": r"at most 8 GPUs a node, got 2x16",
    }.items(),
)
def test_topologies_that_are_none(name, message):
    with pytest.raises(ValueError, match=message):
        parse_topology(name)


def test_topologies():
    pod = parse_topology("v5p:4x4x8")
    assert pod.chips == 128 and not pod.gpu
    assert parse_topology("h200:8").chips == 8 and parse_topology("h200:8").gpu
