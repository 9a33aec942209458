"""The plan: who holds what, and who does what in which order. The one language between methods and testbeds."""

from harness.plan.actions import (
    Action,
    Collective,
    Combine,
    Commit,
    Compute,
    Free,
    Load,
    Recv,
    Send,
    Step,
    Store,
)
from harness.plan.plan import Phase, Plan, Shard
from harness.plan.values import Tensor, Value

__all__ = [
    "Action",
    "Collective",
    "Combine",
    "Commit",
    "Compute",
    "Free",
    "Load",
    "Phase",
    "Plan",
    "Recv",
    "Send",
    "Shard",
    "Step",
    "Store",
    "Tensor",
    "Value",
]
