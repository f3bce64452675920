"""Bounds on what a network answers over a ball of inputs."""

from robustbench_lite.bounds import rules as rules
from robustbench_lite.bounds.balls import Ball as Ball
from robustbench_lite.bounds.graph import Graph as Graph
from robustbench_lite.bounds.graph import Unbounded as Unbounded
from robustbench_lite.bounds.graph import trace as trace
