# udanb: every command you need, `make help` prints this list.
# `make demo` and `make test` are enough to begin with; each installs what it needs into .venv, once.

PY ?= python3
BIN := .venv/bin
RUN ?= demo

export PATH := $(CURDIR)/$(BIN):$(PATH):$(CURDIR)/tools
export NO_ALBUMENTATIONS_UPDATE := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1
# On a busy machine OpenMP threads that spin while they wait make a step many times slower (30 s instead of 0.5 s was seen)
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help demo test export docs lab bench lint check clean distclean venv
.DEFAULT_GOAL := help

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

demo: venv ## adapt a small segmenter from one drawn street world to another: outputs/demo.ipynb, a few minutes
	@mkdir -p outputs
	@python tools/run.py nbs/train_uda.ipynb outputs/$(RUN).ipynb -p source demo
	@echo
	@echo "Executed notebook: outputs/$(RUN).ipynb   weights, metrics and figures: $$(dirname $$(ls -t outputs/demo-*/metrics.json | head -1))/"
	@echo "Open it with:      $(BIN)/jupyter lab outputs/$(RUN).ipynb"

test: venv ## run every page and run notebook (nbdev_test, smoke size), then pytest
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 nbdev_test --n_workers 2 --timing; pages=$$?; \
	OMP_NUM_THREADS=1 python -m pytest -n 2; unit=$$?; \
	[ $$pages = 0 ] || echo "nbdev_test failed, see above"; \
	[ $$pages = 0 ] && [ $$unit = 0 ]

export: venv ## pages -> udanb/*.py, notebooks cleaned, README.md, list of public names
	@nbdev_export && nbdev_clean && tools/quarto render nbs/index.ipynb -o README.md -t gfm && python tools/modules.py && python tools/api.py

check: venv ## generated files equal the pages; format, packages, page sizes, density, docstrings
	@bash tools/check.sh

docs: venv ## the site, in _docs/ (with Quarto if it is installed, else with tools/quarto)
	@rm -rf _proc _docs; touch README.md; nbdev_docs && echo "Site: _docs/index.html"

lab: venv ## JupyterLab in this folder
	@jupyter lab

bench: venv ## run the scripts in bench/, each prints a table and stores it beside itself
	@for f in bench/*.py; do [ -e "$$f" ] || { echo "no benchmarks yet"; break; }; echo "== $$f"; python $$f || exit 1; done

lint: venv ## ruff over modules, tests, tools and pages, and what its formatter would change
	@ruff check .
	@ruff format --check --output-format concise .

venv: .venv/.installed ## create .venv and install (again only when settings.ini, setup.py or constraints.txt change)

.venv/.installed: settings.ini setup.py constraints.txt
	@test -x $(BIN)/python || $(PY) -m venv .venv
	@echo "Installing into .venv (minutes, and 6 GB, the first time) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,offline]'
	@touch $@

clean: ## remove what docs, tests and python leave behind; data/, outputs/ and .venv stay
	rm -rf _docs _proc build dist *.egg-info .pytest_cache .hypothesis .ruff_cache nbs/.last_checked
	find . -name .venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print0 | xargs -0 rm -rf

distclean: clean ## clean, and remove .venv too
	rm -rf .venv
