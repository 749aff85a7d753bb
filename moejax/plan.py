"""Plan a config on chips that are not here:
moejax plan experiments/switch.py:smoke --topology=v5e:2x4 [--search] [--json=F] [--html=F]"""

import json
import sys
from pathlib import Path

import jax
from absl import flags

from moejax import cli
from moejax.config import Config

TOPOLOGY = flags.DEFINE_string(
    "topology", None, "v4, v5p, tpu7x:XxYxZ; v5e, v6e:XxY; h100, h200:NODESxGPUS (by formula)"
)
SEARCH = flags.DEFINE_bool("search", False, "try remat, accumulation and meshes until one fits")
TRIES = flags.DEFINE_integer("tries", 12, "with --search: at most so many")
JSON = flags.DEFINE_string("json", None, "also write the plan to this file, as JSON")
HTML = flags.DEFINE_string("html", None, "also write the plan to this file, as a page")


def main(arguments: list[str]) -> int:
    """Returns 1 where the config does not fit."""
    if arguments:
        raise ValueError(f"unknown argument {arguments[0]!r}; overrides are --config.KEY=VALUE")
    if "config" not in flags.FLAGS or TOPOLOGY.value is None:
        raise ValueError("an experiment FILE.py:SCALE and --topology=v5p:4x4x4 are needed")
    from moejax.planning import show  # here: a typo should not wait for JAX
    from moejax.planning.chips import parse_topology
    from moejax.planning.result import DoesNotFit
    from moejax.planning.search import plan, search
    from moejax.planning.topology import topology_devices

    jax.config.update("jax_platforms", "cpu")  # traced here, compiled for the chips named
    config, topology = Config.from_dict(flags.FLAGS.config), parse_topology(TOPOLOGY.value)
    name = flags.FLAGS.experiment
    devices = topology.chips if topology.gpu else len(topology_devices(topology))
    tables = []
    if SEARCH.value:
        found, tries = search(config, topology, name, devices, TRIES.value, _say)
        tables.append(show.tries_table(tries))
        if found is None:
            print(show.text(tables))
            print(f"error: none of {len(tries)} tries fits {topology.name}", file=sys.stderr)
            return 1
    else:
        try:
            found = plan(config, topology, name)
        except DoesNotFit as error:
            print(f"error: {name} on {topology.name} {error}", file=sys.stderr)
            return 1
    tables += show.tables(found)
    print(show.text(tables, found.notes))
    if JSON.value:
        content = found.to_dict()
        if SEARCH.value:
            content["tries"] = [t._asdict() for t in tries]
        Path(JSON.value).write_text(json.dumps(content, indent=2))
    if HTML.value:
        Path(HTML.value).write_text(show.page(found, tables))
    return 0


def _say(tried) -> None:
    from moejax.planning import show

    needs = "" if tried.needed is None else f"{show.size(tried.needed)}, "
    print(f"{tried.change or 'as given'}: {needs}{tried.outcome}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
