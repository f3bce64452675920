"""The contract that every attack keeps, a test a check."""

import pytest
from robustbench_lite.testing import attack_checks

from robust_bench_shrinking_steps import ShrinkingStepsAttack

CHECKS = dict(attack_checks(ShrinkingStepsAttack()))


@pytest.mark.parametrize("name", CHECKS)
def test_contract(name: str) -> None:
    CHECKS[name]()
