# Targets that load BPF programs need root. `make setup` is what the others start from; it is quick the second time.
.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python
PYTEST := $(PYTHON) -m pytest
READY := $(VENV)/.graft-setup

.NOTPARALLEL:
.PHONY: help setup demo recording test unit kernel e2e lint format check fuzz soak bench bench-lean test-kernels test-package allowed-helpers wheel deb clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what is missing: Debian packages, .venv, bpffs (root; repeatable)
	@.ci/setup

demo: setup ## nginx in a namespace that has only lo, answering through the host's stack (root)
	@examples/demo

recording: setup ## the recording in the README, made anew (root)
	@examples/record

# Two processes, each with namespaces, cgroups and an installation of its own; tests/conftest.py says what stays together.
test: setup lint ## lint, then every test in one run (root)
	$(PYTEST) -n 2 --dist loadgroup --no-loadscope-reorder tests/unit tests/kernel tests/e2e tests/hostile

unit: $(READY) ## the tests that need neither root nor a kernel feature
	$(PYTEST) -n 2 --dist loadgroup --no-loadscope-reorder tests/unit

kernel: setup ## the tests with real BPF programs (root)
	$(PYTEST) tests/kernel

e2e: setup ## the tests with real servers and clients under graft (root)
	$(PYTEST) tests/e2e

lint: $(READY) ## ruff, ruff format --check, mypy --strict, import-linter
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(VENV)/bin/lint-imports --no-logo

format: $(READY) ## put the code into shape: imports and ruff format
	$(PYTHON) -m ruff check --fix-only --select I .
	$(PYTHON) -m ruff format .

check: lint unit ## what runs before a push: lint and unit tests, under a minute

# FUZZ="--seconds 600 --seed 7 --transport direct"; python -m tests.fuzz --help tells the rest.
fuzz: setup ## socket calls out of a seed, by a program under random policies, with a judge of its own (root; FUZZ=)
	$(PYTHON) -m tests.fuzz $(FUZZ)

# SOAK="--minutes 60 --seed 7"; what failed is in build/soak.json.
soak: setup ## twenty containers of every kind under load, while what serves them is killed (root; SOAK=)
	$(PYTHON) -m tests.soak $(SOAK)

bench: setup ## graft bench, long rounds; writes build/bench.json and docs/performance.md (root; BENCH=)
	$(PYTHON) -m tests.bench $(BENCH)

# LEAN="--counts 1,60": how many programs at once.
bench-lean: setup ## memory and CPU time of many programs under `graft run`, and of containers; prints a table (root)
	$(PYTHON) -m tests.bench.lean $(LEAN)

# QUICK=1: boot and `graft up`, half a minute a kernel. KERNELS="6.1 newest" chooses. GUESTS=3: at a time.
VM := $(PYTHON) -m tests.vm $(if $(KERNELS),--kernels "$(KERNELS)") $(if $(GUESTS),--guests $(GUESTS))

test-kernels: ## Graft on Debian's kernels 6.1, 6.12 and its newest, in virtual machines; QUICK=1, KERNELS= (root, slow)
	@.ci/setup vm
	@$(VM) $(if $(QUICK),quick,whole)

test-package: deb ## the Debian package in a virtual machine: installation, reboot, upgrade, removal (root, slow)
	@.ci/setup vm
	@$(VM) package --kernels 6.1

allowed-helpers: ## what those kernels allow BPF programs, for tests/support/allowed_helpers.json (root)
	@.ci/setup vm
	@$(VM) helpers

# setuptools leaves a copy of the sources in build/, and would put a module that is gone since into the next wheel.
wheel: $(READY) ## build dist/graft-*.whl
	rm -rf build/lib build/bdist.* dist
	$(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@ls dist/*.whl

deb: ## build dist/graft_*.deb with Debian's tools, and check it with lintian (root for missing packages)
	@.ci/setup deb
	rm -rf build/deb && mkdir -p build/deb/graft dist
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp -P --parents -t build/deb/graft
	cd build/deb/graft && dpkg-buildpackage --build=binary --no-sign --jobs=auto
	lintian --fail-on error build/deb/graft_*.changes
	mv build/deb/graft_*.deb dist/
	@ls dist/*.deb

clean: ## remove everything that can be made again, .venv too
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Made by `make setup`; older than pyproject.toml it is made anew.
$(READY): pyproject.toml setup.py bpf/graft.h $(wildcard graft/swap/compiled/* graft/swap/compiled_waiter/* graft/oci/compiled/* graft/bench/compiled/* graft/splice/native/*.py) .ci/setup
	@.ci/setup
	@touch $@
