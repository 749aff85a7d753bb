"""A benchmark's figures as a terminal table, JSON and plots, and beside those of a saved run."""

import json
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from moejax.benching.layer import Failed, Measured
from moejax.benching.shapes import Case
from moejax.dispatch.grouped import choose
from moejax.training.hardware import device_name

if TYPE_CHECKING:
    from moejax.benching.step import Step


class Row(NamedTuple):
    """A ratio of rates, and the budget it must reach."""

    what: str
    ratio: float
    budget: str
    held: bool


class Bench(NamedTuple):
    """All that a run measured, and on what."""

    machine: dict[str, Any]
    lines: Sequence[Measured] = ()
    failed: Sequence[Failed] = ()
    budgets: Sequence[Row] = ()
    step: "Step | None" = None
    depths: Mapping[int, float] = MappingProxyType({})


def machine(dtype: str, cases: Sequence[Case]) -> dict[str, Any]:
    """What the figures must be read with. `grouped`: what the experts of each case get, and why."""
    platform = jax.default_backend()
    return {
        "device": device_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # of the last minute, before the first line
        "dtype": dtype,
        "jax": metadata.version("jax"),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "grouped": {
            case.name: choose(platform, sizes=case.experts_of(dtype))._asdict()
            for case in cases
            if {"dropless", "layer"} & {*case.ways}  # on a GPU a trial of half a minute and more
        },
        "buffers": choose(platform, buffers=True)._asdict(),
    }


def lines_of(measured: Sequence[Measured], against: dict[str, float]) -> list[str]:
    """The table of the layer; with the shares of a saved run where they are given."""
    head = f"{'':<12}{'way':<19}{'ms':>9}{'quartiles':>15}{'GFLOP/s':>9}{'of dense':>9}"
    head += f"{'temp MiB':>10}{'compile s':>10}" + (f"{'before':>8}" if against else "")
    found, group = [], None
    for line in measured:
        if group != (line.case, line.both):
            group = line.case, line.both
            found += ["", f"{line.case}: {line.sizes}, load {line.skew}, {line.passes}", head]
        spread = f"{1e3 * line.low:.1f}-{1e3 * line.high:.1f}"
        text = f"{'':<12}{line.way:<19}{1e3 * line.seconds:>9.1f}{spread:>15}"
        text += f"{line.flops_per_s / 1e9:>9.1f}{line.share:>9.2f}"
        text += f"{line.temp_bytes / 2**20:>10.1f}{line.compile_seconds:>10.1f}"
        if line.key in against:
            text += f"{against[line.key]:>8.2f}"
        found.append(text)
    return found[1:]


def text(bench: Bench, against: dict[str, float]) -> str:
    """Everything, for the terminal."""
    there = bench.machine
    shared = there["load"] > 0.25 * there["cores"]
    found = [f"{there['device']}, {there['cores']} cores, {there['dtype']}, JAX {there['jax']}"]
    if shared:
        found.append(
            f"other work on this machine: load {there['load']:.1f}; read ratios, not times"
        )
    found += chosen_lines(there)
    found += left_out(bench)
    found += ["", *lines_of(bench.lines, against)]
    found += ["", *step_lines(bench)]
    found += ["", f"{'ratios of rates':<40}{'measured':>10}{'budget':>10}"]
    for row in bench.budgets:
        found.append(f"{row.what:<40}{row.ratio:>10.2f}{row.budget:>10}{_missed(row)}")
    return "\n".join(found)


def chosen_lines(there: dict[str, Any]) -> list[str]:
    """Which grouped products were chosen, once for all cases that got them for one reason."""
    cases: dict[str, list[str]] = {}
    for case, chosen in there["grouped"].items():
        cases.setdefault(f"{chosen['name']} ({chosen['why']})", []).append(case)
    buffers = there["buffers"]
    found = [f"experts on sorted rows, {', '.join(of)}: {what}" for what, of in cases.items()]
    return [*found, f"experts on buffers: {buffers['name']} ({buffers['why']})"]


def left_out(bench: Bench) -> list[str]:
    """What did not run here, once for both passes."""
    whys = (f"left out, {line.case}, {line.way}: {line.why}" for line in bench.failed)
    return list(dict.fromkeys(whys))


def step_lines(bench: Bench) -> list[str]:
    """The training step, the peer's, and what depth costs to compile."""
    s = bench.step
    if s is None:
        return []
    found = [
        "training step: L4 D128 F256 E8 K2, 16 x 256 tokens, dropless, AdamW",
        f"  {1e3 * s.seconds:.0f} ms ({1e3 * s.low:.0f}-{1e3 * s.high:.0f}), "
        f"{s.tokens_per_s:,.0f} tokens/s, MFU {s.mfu:.1%} on active parameters",
        f"  input {s.input_share:.1%} of a step; compile {s.compile_seconds:.1f} s; first step "
        f"after {s.first_seconds:.1f} s; temporaries {s.temp_bytes / 2**20:.0f} MiB",
    ]
    if s.peer:
        spread = f"{1e3 * s.peer.low:.0f}-{1e3 * s.peer.high:.0f}"
        found.append(
            f"  {s.peer.name}: {1e3 * s.peer.seconds:.0f} ms ({spread}), "
            f"{s.peer.tokens_per_s:,.0f} tokens/s; in turns, ours is {s.peer.ours:.2f} times as "
            "fast"
        )
    of = ", ".join(f"{seconds:.1f} s at {layers}" for layers, seconds in bench.depths.items())
    return [*found, f"  compile time by layers: {of}"] if of else found


def write(bench: Bench, folder: Path) -> None:
    """cpu.json (read by --against), cpu.md and cpu.png; for another backend, of its name."""
    folder.mkdir(parents=True, exist_ok=True)
    name = jax.default_backend()
    (folder / f"{name}.json").write_text(json.dumps(to_json(bench), indent=1) + "\n")
    (folder / f"{name}.md").write_text(markdown(bench))
    if bench.lines:
        plot(bench, folder / f"{name}.png")


def markdown(bench: Bench) -> str:
    """The same figures for a page."""
    there = bench.machine
    found = [
        f"{there['device']}, {there['cores']} cores, {there['dtype']}, JAX {there['jax']}, load "
        f"{there['load']:.1f} before the run"
        + (f", XLA_FLAGS {there['xla_flags']}." if there["xla_flags"] else "."),
        "",
        "| ratio of rates | measured | budget |",
        "| --- | --- | --- |",
        *(f"| {r.what} | {r.ratio:.2f} | {r.budget}{_missed(r)} |" for r in bench.budgets),
        "",
        "| sizes | load | way | pass | s (quartiles) | share of the dense rate | GFLOP/s "
        "| temporaries, MiB | compile, s |",
        "| --- " * 9 + "|",
    ]
    for line in bench.lines:
        what = f"| {line.sizes} | {line.skew} | {line.way} | {line.passes} "
        taken = f"| {line.seconds:.4g} ({line.low:.4g}-{line.high:.4g}) | {line.share:.2f} "
        needs = f"| {line.temp_bytes / 2**20:.0f} | {line.compile_seconds:.1f} |"
        known = line.compile_seconds > 0  # a peer's program does not say
        found.append(
            what + taken + f"| {line.flops_per_s / 1e9:.1f} {needs if known else '| – | – |'}"
        )
    notes = [*chosen_lines(there), *left_out(bench)]
    found += ["", *(f"{line.strip()}  " for line in [*notes, *step_lines(bench)])]
    return "\n".join(found) + "\n"


def _missed(row: Row) -> str:
    return "" if row.held else ", missed"


def to_json(bench: Bench) -> dict[str, Any]:
    return {
        "machine": bench.machine,
        "lines": [{"key": line.key, **line._asdict()} for line in bench.lines],
        "failed": [line._asdict() for line in bench.failed],
        "budgets": [row._asdict() for row in bench.budgets],
        "step": _step_json(bench.step),
        "compile_seconds_by_layers": dict(bench.depths),
    }


def _step_json(step: "Step | None") -> dict[str, Any] | None:
    return step and {**step._asdict(), "peer": step.peer and step.peer._asdict()}


def shares_of(path: Path) -> dict[str, float]:
    """The shares of the dense rate that a saved run reached, by line.

    Raises:
      ValueError: a file that is not a saved run.
    """
    try:
        return {line["key"]: line["share"] for line in json.loads(path.read_text())["lines"]}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"--against={path} is not what `moejax bench --out` wrote") from error


def plot(bench: Bench, path: Path) -> None:
    """The share of the dense rate of every line, forward and backward, as one picture."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    both = [line for line in bench.lines if line.both and line.way != "dense"]
    cases = list(dict.fromkeys(line.case for line in both))
    ways = list(dict.fromkeys(line.way for line in both))
    figure, axis = plt.subplots(figsize=(8, 0.5 + 0.16 * len(both) + 0.2 * len(cases)))
    colour = dict(zip(ways, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    places, labels, at = [], [], 0.0
    for case in cases:
        lines = [line for line in both if line.case == case]
        for line in lines:
            axis.barh(at, line.share, color=colour[line.way], label=line.way)
            at += 1
        places.append(at - (len(lines) + 1) / 2)
        labels.append(f"{case}\n{lines[0].sizes}")
        at += 0.7
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_yticks(places, labels, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("rate over that of a dense network of equal active FLOPs")
    handles, names = axis.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    axis.legend(unique.values(), unique.keys(), fontsize=7, bbox_to_anchor=(1, 1), loc="upper left")
    there = bench.machine
    axis.set_title(f"forward + backward, {there['device']}, {there['dtype']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
