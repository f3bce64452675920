"""The contracts of plugins, for tests of one's own: each check is a function that raises AssertionError with a
sentence."""

from robustbench_lite.testing.attacks import Bar as Bar
from robustbench_lite.testing.attacks import attack_checks as attack_checks
from robustbench_lite.testing.attacks import check_attack as check_attack
from robustbench_lite.testing.certifiers import certifier_checks as certifier_checks
from robustbench_lite.testing.certifiers import check_certifier as check_certifier
from robustbench_lite.testing.common import Check as Check
from robustbench_lite.testing.defenses import check_defense as check_defense
from robustbench_lite.testing.defenses import defense_checks as defense_checks
