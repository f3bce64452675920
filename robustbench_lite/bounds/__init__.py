"""Bounds on what a network answers over a ball of inputs.

bounds = Bounds(trace(model, shape), Ball(x, threat))
bounds.lower(differences(labels, classes)).amin(1) > 0
"""

from robustbench_lite.bounds import rules as rules
from robustbench_lite.bounds.alpha import optimised as optimised
from robustbench_lite.bounds.balls import Ball as Ball
from robustbench_lite.bounds.graph import Graph as Graph
from robustbench_lite.bounds.graph import Unbounded as Unbounded
from robustbench_lite.bounds.graph import trace as trace
from robustbench_lite.bounds.linear import Bounds as Bounds
from robustbench_lite.bounds.linear import differences as differences
from robustbench_lite.bounds.projections import estimated as estimated
