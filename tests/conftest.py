"""The models here are tiny: one thread a test, and as many tests at once as there are cores (``pytest -n auto``)."""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests run
torch.set_num_threads(1)
