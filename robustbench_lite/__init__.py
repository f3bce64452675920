"""Adversarial robustness on one row: what survives every attack, and whether the evaluation was sound."""

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Else the last bits of a matrix product may depend on where in memory its rows lie, and so on the batch. MKL reads this
# when it is first used, hence it stands before all else.
os.environ.setdefault("MKL_CBWR", "AUTO")

# In a wheel the plugin folders lie inside this package, in a checkout beside it.
__path__ += [str(toml.parent) for toml in Path(__file__).resolve().parents[1].glob("pyproject.toml")]

if TYPE_CHECKING:
    from robustbench_lite.blackbox import black_box as black_box
    from robustbench_lite.certifying import certify_inputs as certify_inputs
    from robustbench_lite.evaluation import evaluate as evaluate
    from robustbench_lite.evaluation import fit_attack as fit_attack
    from robustbench_lite.matrix import benchmark as benchmark
    from robustbench_lite.registry import attack as attack
    from robustbench_lite.registry import certifier as certifier
    from robustbench_lite.registry import defense as defense
    from robustbench_lite.threat import ThreatModel as ThreatModel
    from robustbench_lite.trained import load_defense as load_defense

_FACE = {
    "ThreatModel": "threat",
    "attack": "registry",
    "benchmark": "matrix",
    "black_box": "blackbox",
    "certifier": "registry",
    "certify_inputs": "certifying",
    "defense": "registry",
    "evaluate": "evaluation",
    "fit_attack": "evaluation",
    "load_defense": "trained",
}
__all__ = ["__version__", *_FACE]


def __getattr__(name: str) -> object:
    if name not in _FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FACE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
