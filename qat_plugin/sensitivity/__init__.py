"""Which layers suffer from which scheme, and the policy that spends a budget of bytes where it hurts least."""

from qat_plugin.sensitivity.auto import AutoPolicy, auto_policy, check_reachable
from qat_plugin.sensitivity.budget import Budget, MaxDrop
from qat_plugin.sensitivity.damage import Damage, Measure
from qat_plugin.sensitivity.options import CANDIDATES, Choices, Group, Option, choices_of
from qat_plugin.sensitivity.ranking import Entry, Sensitivity, rank_layers, ranked

__all__ = [
    "CANDIDATES", "AutoPolicy", "Budget", "Choices", "Damage", "Entry", "Group", "MaxDrop", "Measure", "Option",
    "Sensitivity", "auto_policy", "check_reachable", "choices_of", "rank_layers", "ranked",
]  # fmt: skip
