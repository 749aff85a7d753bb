"""Plans of the published models in pods/, each on a topology on which it fits, and their table.

    python -m experiments.plan_pods [NAME ...] [--table]

Compiles each training step with the TPU compiler (minutes a model, no TPU), or those named, and
writes experiments/results/pods: NAME.json, NAME.txt, and the README.md with the table of all that
are there. --table compiles nothing.
"""

import json
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from absl import app, flags

from moejax.cli import load_experiment
from moejax.config import Config
from moejax.planning import show
from moejax.planning.chips import parse_topology
from moejax.planning.result import DoesNotFit, versions
from moejax.planning.search import plan
from moejax.training.loop import source_commit

FOLDER = flags.DEFINE_string("folder", "experiments/results/pods", "output folder")
TABLE = flags.DEFINE_bool("table", False, "write the table only")

PODS = Path(__file__).parent / "pods"
NAMES = ("switch_c", "gshard_600b", "mixtral_8x7b", "olmoe_1b_7b", "deepseek_moe_16b")
NAMES += ("deepseek_v3",)


def load(name: str) -> ModuleType:
    """The module of a pod.

    Raises:
      FileNotFoundError: no pod of that name, with the nearest.
    """
    return load_experiment(str(PODS / f"{name}.py"))


def make(name: str, out: Path) -> None:
    """Plan one pod, and write what was found; also where it does not fit."""
    module = load(name)
    config, topology = Config.from_dict(module.get_config()), parse_topology(module.TOPOLOGY)
    start, commit = time.perf_counter(), source_commit()
    try:
        found = plan(config, topology, name)
    except DoesNotFit as error:
        content: dict[str, Any] = {"error": str(error), "topology": topology.name}
        content |= {"versions": versions(), "seconds": time.perf_counter() - start}
        text = f"{name} on {topology.name} {error}"
    else:
        content, text = found.to_dict(), show.text(show.tables(found), found.notes)
    content["commit"] = commit
    (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (out / f"{name}.txt").write_text(text + "\n")
    print(f"{name}\n\n{text}\n", flush=True)


def row(name: str, plan: dict[str, Any]) -> list[str]:
    """One line of the table."""
    title = (load(name).__doc__ or "").partition(":")[0]
    if "twin" in (load(name).__doc__ or ""):
        title += " (decoder-only twin)"
    link = f"[{title}]({name}.txt)"
    if "error" in plan:
        return [link, plan["topology"], plan["error"], *[""] * (len(COLUMNS) - 3)]
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    memory, params, seconds = plan["memory"], plan["params"], plan["seconds"]
    return [
        link,
        f"{plan['topology']}, {mesh}",
        f"{params['total'] / 1e9:,.1f} / {params['active'] / 1e9:.2f}",
        f"{plan['tokens'] / 2**20:.0f} Mi",
        f"{memory['total'] / 2**30:.1f} of {memory['hbm'] / 2**30:.0f}",
        f"{plan['flops']['ratio']:.2f}",
        f"{seconds['step_overlap']:.3g} to {seconds['step_sum']:.3g}",
        f"{100 * plan['mfu']['sum']:.0f} to {100 * plan['mfu']['overlap']:.0f} %",
        f"{plan['compile_seconds']:.0f}",
        ", ".join(f"{k} {v}" for k, v in plan["versions"].items()),
        plan["commit"],
    ]


COLUMNS = (
    *("model", "topology, mesh", "parameters / active, 10^9", "tokens a step"),
    *("memory a device, GiB", "FLOPs / model's", "step, s", "MFU", "compiled in, s"),
    *("with", "at commit"),
)


def readme(out: Path) -> str:
    """The table of all plans of a folder."""
    lines = [
        "# Published models on named topologies",
        "",
        "Each whole training step (forward, backward, optimizer) was compiled by the TPU compiler "
        "for the topology; nothing ran on one. Written by `python -m experiments.plan_pods`. Step "
        "time and MFU are rooflines, from no collective overlapping with compute to all of them, "
        "experts evenly loaded; memory traffic counts whole buffers. A commit with + had changes "
        "beside it. What differs from the published training stands at the top of each file in "
        "[pods](../../pods).",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"| {' | '.join('---' for _ in COLUMNS)} |",
    ]
    for name in NAMES:
        if (path := out / f"{name}.json").is_file():
            lines.append(f"| {' | '.join(row(name, json.loads(path.read_text())))} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")  # traced here, compiled for the chips named
    out = Path(FOLDER.value)
    out.mkdir(parents=True, exist_ok=True)
    for name in () if TABLE.value else arguments[1:] or NAMES:
        make(name, out)
    (out / "README.md").write_text(readme(out))


if __name__ == "__main__":
    app.run(main)
