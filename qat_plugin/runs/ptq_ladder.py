"""``ptq=ladder``: methods without training, the cheapest first, up to the first that is good enough.

Round to nearest, grids by search, AWQ, GPTQ, and at last schemes mixed by measuring. Each rung is a row of the report;
a rung that was measured in an earlier session is not measured again.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any, Final

from torch import nn

from qat_plugin import report as reporting
from qat_plugin.atomic import write_text
from qat_plugin.errors import PolicyError
from qat_plugin.policy import Plan
from qat_plugin.report import Row
from qat_plugin.runs.choosing import chosen_policy
from qat_plugin.runs.journal import say
from qat_plugin.runs.ladder import Ladder
from qat_plugin.runs.subject import network_of
from qat_plugin.sensitivity import MaxDrop
from qat_plugin.sensitivity.damage import Damage

_METHODS: Final = ("rtn", "mse", "awq", "gptq")
_MIXED: Final = "mixed"
_FOUND: Final = "ladder.json"


class PtqLadder(Ladder):
    """Quantization without training, as much of it as ``max_drop`` asks for."""

    def _ptq(self) -> None:
        drop = MaxDrop.parse(self.config.max_drop)
        best: tuple[float, str] | None = None
        for method in (*_METHODS, _MIXED):
            damage = self._try(method)
            if damage is None:
                continue
            if drop.allows(damage):
                self._settle(method, f"{method}: the first within max_drop={drop.text}")
                return
            best = min(best or (damage.kl, method), (damage.kl, method))
        assert best is not None
        self._settle(best[1], f"{best[1]}: none is within max_drop={drop.text}; this one is nearest in KL")

    def _converted(self) -> None:
        found = json.loads((self.folder.path / _FOUND).read_text(encoding="utf-8"))
        self.plan = Plan.from_list(found["plan"], self.plan.model)
        self._convert(self._made(found["method"]), self.plan)

    def _try(self, method: str) -> Damage | None:
        """Climb one rung and measure it; ``None`` where mixing finds nothing."""
        name = f"{reporting.PTQ}, {method}"
        if self.report.row(name) is None:
            try:
                network = self._made(method)
            except PolicyError as error:
                say(f"ptq: {method}: {error}")
                return None
            self._measure(name, network)
            reporting.write_report(self.report, self.folder.path)
        return self._damage(name)

    def _made(self, method: str) -> nn.Module:
        if method != _MIXED:
            return self._quantized(f"ptq-{method}", method=method)
        return self._quantized("ptq-mixed", method="gptq", plan=self._mixed_plan())

    def _mixed_plan(self) -> Plan:
        """The plan of the policy that fits ``max_drop`` with the fewest bytes; found once in a run."""
        config = copy.deepcopy(self.config)
        config.policy.auto.quantize = "gptq"
        policy = chosen_policy(config, self.subject, self.folder)
        return policy.plan(network_of(self.subject.build()))

    def _damage(self, name: str) -> Damage:
        row, reference = self.report.row(name), self.report.row(reporting.FLOAT)
        assert row is not None
        assert reference is not None
        mine: Any = row.metrics
        theirs: Any = reference.metrics
        return Damage(mine.kl, mine.loss - theirs.loss, mine.top1_agreement)

    def _settle(self, method: str, note: str) -> None:
        """Take a rung's model for the rest of the run."""
        row = self.report.row(f"{reporting.PTQ}, {method}")
        assert row is not None
        self._add(Row(reporting.PTQ, row.metrics, note=note))
        plan = self._mixed_plan() if method == _MIXED else self.plan
        write_text(self.folder.path / _FOUND, json.dumps({"method": method, "plan": plan.to_list()}))
        self.report = replace(self.report, plan=tuple(plan.to_list()))
        say(f"ptq: {note}")
