# Two commands for a newcomer: `make bench` runs the main job, `make test` the tests. Both set up what they need.
PYTHON ?= python3
VENV := .venv
DEV := .venv-dev

.PHONY: bench test lint docs soak reference speed strength clean

bench: $(VENV)/ready
	$(VENV)/bin/robust-bench --attack pgd --defense madry

test: $(DEV)/ready
	$(DEV)/bin/python -m pytest -n auto

lint: $(DEV)/ready
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy

docs: $(DEV)/ready
	$(DEV)/bin/python -m mkdocs build --strict

soak: $(DEV)/ready
	$(DEV)/bin/python -m pytest -m soak

reference: $(DEV)/ready
	$(DEV)/bin/python -m pytest -m reference

# Peers to compare with live in an environment of their own.
speed strength: .venv-speed/ready
	.venv-speed/bin/python benchmarks/publish.py $@

.venv-speed/ready: pyproject.toml
	$(PYTHON) -m venv .venv-speed
	.venv-speed/bin/pip install --quiet --editable . 'adversarial-robustness-toolbox>=1.20'
	.venv-speed/bin/pip install --quiet --no-deps torchattacks pyautoattack convex_adversarial
	touch $@

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet .
	touch $@

$(DEV)/ready: pyproject.toml
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(DEV) .venv-speed build dist *.egg-info
