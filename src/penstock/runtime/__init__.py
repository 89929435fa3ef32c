"""Runtime: carries out StepPlans on the devices of this process."""

from penstock.runtime.encoder import EncoderRunner
from penstock.runtime.fit import fit
from penstock.runtime.host import available_memory, cpu_count
from penstock.runtime.local import LocalExecutor
from penstock.runtime.memory import free_memory, plan_pools
from penstock.runtime.runner import Runner

__all__ = [
    "EncoderRunner",
    "LocalExecutor",
    "Runner",
    "available_memory",
    "cpu_count",
    "fit",
    "free_memory",
    "plan_pools",
]
