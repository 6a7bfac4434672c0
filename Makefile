# make demo   the whole story on MetaWorld Assembly, about ten minutes: report.html with numbers, plots and videos
# make lab    JupyterLab on the tour
# make test   everything continuous integration checks
# make soak   the long versions: ten thousand hostile actions on each arm backend, a thousand bus faults, twenty seeds of planted faults
# make bench  throughput against plain loops, and how long a person waits in the browser
# make docs   the Quarto site (needs quarto)
SHELL := /bin/bash
export PYTHONDONTWRITEBYTECODE =    # many containers set it: every import would compile anew
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup gl browser demo lab test soak bench docs readme clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

setup: .venv/.ok ## the Python environment in .venv
.venv/.ok: pyproject.toml constraints.txt .ci/setup
	@PYTHON="$(PYTHON)" .ci/setup

gl: setup ## headless rendering
	@.ci/gl

browser: ## a Chromium for the browser tests
	@.ci/browser

demo: setup gl ## the whole story in about ten minutes
	@$(BIN)/clam demo $(ARGS)

lab: setup gl ## JupyterLab on the tour
	@$(BIN)/jupyter lab $$([ "$$(id -u)" = 0 ] && echo --allow-root) $(ARGS) nbs/91_tour.ipynb

test: export MPLBACKEND = Agg
test: export CLAM_QUIET = 1
test: export OMP_NUM_THREADS = 1
test: ## export is fresh, notebooks run, tests pass
	@$(MAKE) --no-print-directory -j 2 setup browser
	@$(MAKE) --no-print-directory gl
	@.ci/quiet "clam/ is what the notebooks export" .ci/fresh
	@.ci/quiet "notebooks run" .ci/notebooks
	@.ci/quiet "tests pass" .ci/tests

soak: setup gl ## the tests that are short in `make test`, at full length
	@CLAM_SOAK=1 OMP_NUM_THREADS=1 CLAM_QUIET=1 $(BIN)/python -m pytest -n 2 -m "soak or soak_only" tests $(ARGS)

bench: setup gl browser ## throughput against plain reference loops, as ratios; waiting times in the browser
	@$(BIN)/clam bench $(ARGS)
	@CLAM_SOAK=1 OMP_NUM_THREADS=1 CLAM_QUIET=1 $(BIN)/python -m pytest tests/browser/test_browser_speed.py

docs: setup ## the Quarto site in _docs
	@command -v quarto >/dev/null || { echo "error: quarto is not on PATH; install it from https://quarto.org and run make docs again" >&2; exit 2; }
	@$(BIN)/python .ci/generated.py
	@set -o pipefail; $(BIN)/nbdev_docs 2>&1 | tee .venv/docs.log
	@! grep -E 'WARN|ERROR' .venv/docs.log || { echo "error: quarto warned, see above" >&2; exit 1; }

readme: setup ## README.md and the sidebar from the notebooks
	@$(BIN)/python .ci/generated.py

clean: ## remove what can be made again (not data, not runs)
	@rm -rf _proc _docs .pytest_cache .quarto nbs/nbdev.yml nbs/.quarto build dist *.egg-info
	@find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
