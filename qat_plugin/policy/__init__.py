"""Policy -> Plan: which layer gets which scheme, resolved against one model."""

from qat_plugin.policy.plan import LayerPlan, Plan, human_bytes
from qat_plugin.policy.policy import Policy, PolicyLike, largest_divisor, plan_for, runs_convolutions, unknown_layers
from qat_plugin.policy.roles import ROLES, Candidate, candidates, clean_name
from qat_plugin.policy.rules import Rule

__all__ = [
    "ROLES", "Candidate", "LayerPlan", "Plan", "Policy", "PolicyLike", "Rule",
    "candidates", "clean_name", "human_bytes", "largest_divisor", "plan_for", "runs_convolutions",
    "unknown_layers",
]  # fmt: skip
