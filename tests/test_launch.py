"""The launch scripts run what moejax understands; XLA's flags are those the compilers know."""

import os
import shlex
import subprocess
import sys

import pytest

from moejax.training import flags
from tests import tiny

FOLDER = tiny.ROOT / "experiments/launch"
SCRIPTS = sorted(FOLDER.iterdir())
CLUSTER = {
    "TPU": "t",
    "ZONE": "z",
    "CLUSTER": "c",
    "IMAGE": "i",
    "TPU_TYPE": "v5p-8",
    "STORAGE": "s",
}
PARSE = """
import sys
from absl import flags
from moejax import cli, train
from moejax.config import Config
assert cli.parse(sys.argv[1:]) == []
config = Config.from_dict(flags.FLAGS.config)
print(train.WORKDIR.value, config.mesh.expert, config.train.seed)
"""
COMPILE = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from moejax.training.flags import TPU_FLAGS, set_xla_flags
set_xla_flags()
def layer(x, w):
    return jax.lax.all_to_all(x, "x", 1, 0, tiled=True) @ jax.lax.all_gather(w, "x", tiled=True)
for name in ("v4:2x2x2", "v5e:2x4", "v5p:2x2x2", "v6e:2x4"):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    mesh = Mesh(np.array(devices).reshape(-1), ("x",))
    cut = NamedSharding(mesh, P("x"))
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=cut)
    w = jax.ShapeDtypeStruct((1024 // len(devices), 1024), jnp.bfloat16, sharding=cut)
    f = jax.shard_map(layer, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    assert "all-to-all" in jax.jit(f).lower(x, w).compile().as_text()
    print(name)
"""


def python(code, *arguments, **environment):
    command = [sys.executable, "-c", code, *arguments]
    env = {**tiny.environment(), **environment}
    done = subprocess.run(command, cwd=tiny.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def dry(script, *arguments):
    """What a script would run on each machine."""
    env = {"PATH": os.environ["PATH"], "DRY_RUN": "1", **CLUSTER}
    command = ["bash", str(script), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


def test_the_scripts_are_there():
    assert {"tpu_vm.sh", "gke_xpk.sh", "slurm.sbatch"} == {script.name for script in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_trains_the_experiment_that_it_is_given(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    words = shlex.split(dry(script, "experiments/switch.py:small", "--config.mesh.expert=8"))
    command = words[words.index("moejax") :]
    command = command[: command.index("&")] if "&" in command else command
    assert command[:2] == ["moejax", "train"]
    workdir, expert, _ = python(PARSE, *command[1:]).split()
    assert workdir.endswith("runs/switch-small") and expert == "8"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_says_how_it_is_used(script):
    done = subprocess.run(["bash", str(script)], env={**os.environ, **CLUSTER}, capture_output=True)
    assert done.returncode != 0 and b"usage: " in done.stderr


def test_every_compiler_takes_the_flags():
    """libtpu for every generation of chips, and XLA of the installed jaxlib."""
    tpu = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5e-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    # No chip is used: the lock that keeps two processes from sharing one is not needed.
    assert python(COMPILE, ALLOW_MULTIPLE_LIBTPU_LOAD="true", **tpu).split()[-1] == "v6e:2x4"
    assert "Cpu" in python("import jax; print(jax.devices())", XLA_FLAGS=" ".join(flags.GPU_FLAGS))


def test_a_flag_of_the_user_stays(monkeypatch):
    monkeypatch.setattr(flags, "find_spec", lambda name: name != "jax_cuda12_plugin")
    environment = {"LIBTPU_INIT_ARGS": "--xla_enable_async_all_gather=false --mine=1"}
    flags.set_xla_flags(environment)
    words = environment["LIBTPU_INIT_ARGS"].split()
    assert words[:2] == ["--xla_enable_async_all_gather=false", "--mine=1"]
    assert len(words) == 2 + len(flags.TPU_FLAGS) - 1
    assert environment["XLA_FLAGS"] == " ".join(flags.GPU_FLAGS)
    flags.set_xla_flags(environment)
    assert environment["LIBTPU_INIT_ARGS"].split() == words


@pytest.mark.parametrize(("finishes", "code"), [(True, 0), (False, 1)])
def test_on_gke_a_run_that_only_saved_is_started_again(tmp_path, finishes, code):
    """A stand-in for moejax: told to stop, it ends with 0, as a run that saved does."""
    line = dry(FOLDER / "gke_xpk.sh", "x.py:small").replace("/moejax", str(tmp_path))
    line = line.replace("/runs", str(tmp_path))
    fake = tmp_path / "moejax"
    summary = f"touch {tmp_path}/x-small/summary.json" if finishes else "true"
    fake.write_text(
        "#!/bin/bash\n"
        f"trap '{summary}; exit 0' TERM\n"
        "echo up; for i in {1..100}; do sleep .05; done; exit 3\n"
    )
    fake.chmod(0o755)
    (tmp_path / "x-small").mkdir()
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    shell = subprocess.Popen(["bash", "-c", line], env=env, stdout=subprocess.PIPE, text=True)
    assert shell.stdout.readline() == "up\n"
    shell.terminate()
    shell.communicate(timeout=10)
    assert shell.returncode == code
