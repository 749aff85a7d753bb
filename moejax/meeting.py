"""How the processes of one run find each other: the flags of the verbs that train.

Several processes train together: the same command on each. A TPU slice, a Kubernetes job and Slurm
tell them who they are; elsewhere --coordinator, --num_processes and --process_id do.
"""

from absl import flags

COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where the cluster does not say"
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "processes in all")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "which of them this is, from 0")
WAIT = flags.DEFINE_integer("wait", 300, "seconds to wait for all processes to start", 1)


def meet() -> None:
    """Set the platform's flags, keep what will be compiled, and join the other processes, before a
    device is used.

    Raises:
      ValueError: as `moejax.training.processes.join`.
    """
    from moejax.training.compiled import keep_compiled
    from moejax.training.flags import set_xla_flags
    from moejax.training.processes import join

    set_xla_flags()
    keep_compiled()
    join(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, WAIT.value)
