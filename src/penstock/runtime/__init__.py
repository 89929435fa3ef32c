"""Runtime: carries out StepPlans on the devices of this process."""

from penstock.runtime.encoder import EncoderRunner
from penstock.runtime.host import available_memory, cpu_count
from penstock.runtime.local import LocalExecutor
from penstock.runtime.memory import check_weights, free_memory, plan_pools
from penstock.runtime.runner import Runner

__all__ = [
    "EncoderRunner",
    "LocalExecutor",
    "Runner",
    "available_memory",
    "check_weights",
    "cpu_count",
    "free_memory",
    "plan_pools",
]
