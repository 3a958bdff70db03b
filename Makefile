# make lab        set everything up and open JupyterLab on the notebook
# make test       set everything up and run the whole CPU suite, a browser test included
# make setup      their common part; does nothing when nothing changed
# make notebooks  run every notebook without a screen, into build/notebooks/*.html
# make lint       ruff, on notebooks too
#
# Needs Python >= 3.11 with venv, make and a C++ compiler. Settings: PYTHON=python3.12, VENV=dir (an active conda
# environment made from environment.yml too), PQLAB_CACHE=dir, PYTEST_ARGS='-k pool', LAB_ARGS='--port 9999'.

SHELL := /bin/sh
# Threads that wait asleep: spinning ones fight the browser, the server and each other for the cores.
export OMP_WAIT_POLICY ?= PASSIVE
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

# The plain name: pip then takes the registry's default build, which is CUDA on Linux, or a CPU wheel found on disk.
TORCH := 2.13.0
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# The releases that the suite passed with; CONSTRAINTS= takes whatever is newest.
CONSTRAINTS ?= .ci/constraints.txt
VENV ?= .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.pqlab
CONDA := $(wildcard $(VENV)/conda-meta)

# One list of files per cache directory: what the last set-up left there. A missing one starts the set-up again.
ASSETS := $(STAMPS)/assets-$(shell printf %s "$$PQLAB_CACHE" | cksum | cut -d' ' -f1)
ASSET_SOURCES := $(wildcard pqlab/prepare.py pqlab/store.py pqlab/models/*.py pqlab/quantization/*.py pqlab/kernels/*.py \
	pqlab/kernels/csrc/* pqlab/kernels/csrc/*/*)
fail = { echo "pqlab: $(1)" >&2; exit 1; }

.PHONY: help lab test setup package browser notebooks lint format clean

help:
	@sed -n 's/^# \{0,1\}//; 1,8p' Makefile

$(STAMPS)/venv:
ifeq ($(CONDA),)
	@test -n "$(PYTHON)" || $(call fail,no Python >= 3.11 found; install one and run make again or name it: make PYTHON=/path/to/python3)
	@$(PYTHON) -m venv "$(VENV)" || $(call fail,could not make $(VENV); on Debian and Ubuntu: apt-get install python3-venv)
endif
	@mkdir -p "$(STAMPS)" && touch $@

$(STAMPS)/torch-$(TORCH): $(STAMPS)/venv
ifeq ($(CONDA),)
	@$(BIN)/python -m pip install "torch==$(TORCH)" || $(call fail,pip could not install torch $(TORCH); its message is above. A network or proxy fault: run make again. Another torch >= 2.9: make TORCH=2.9.1)
endif
	@touch $@

$(STAMPS)/package: pyproject.toml $(CONSTRAINTS) $(STAMPS)/torch-$(TORCH)
ifeq ($(CONDA),)
	@$(BIN)/python -m pip install $(CONSTRAINTS:%=-c %) -e ".[all]" || $(call fail,pip could not install pqlab and its extras; its message is above. A network or proxy fault: run make again. A broken environment: rm -r $(VENV) and run make again)
else
	@$(BIN)/python -m pip install --no-deps --no-build-isolation -e . || $(call fail,pip could not install pqlab into $(VENV); update it: conda env update -f environment.yml)
endif
	@touch $@

package: $(STAMPS)/package

setup: package
	@have() { test -s "$(ASSETS)" && test -z "$$(find $(ASSET_SOURCES) -newer "$(ASSETS)" | head -1)" \
		&& while IFS= read -r file; do test -e "$$file" || return 1; done < "$(ASSETS)"; }; \
	have || $(BIN)/python -m pqlab setup --list "$(ASSETS)" \
		|| $(call fail,the set-up stopped; its message is above. What is done stays done: make setup goes on from there)

# JupyterLab asks everybody whether to fetch its news; the answer of an environment of our own is no.
$(STAMPS)/settings: $(STAMPS)/package
ifeq ($(CONDA),)
	@mkdir -p "$(VENV)/share/jupyter/lab/settings" && printf '%s\n' \
		'{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}' \
		> "$(VENV)/share/jupyter/lab/settings/overrides.json"
endif
	@touch $@

lab: setup $(STAMPS)/settings
	$(BIN)/jupyter lab notebooks/00_explore.ipynb \
		--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate \
		$(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS)

browser: package
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
		command -v $$name >/dev/null 2>&1 && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends chromium && exit 0; fi; \
	$(BIN)/python -m playwright install chromium \
		|| $(call fail,no Chromium for the browser test; install one so that "chromium" is on the PATH)

# Two files at a time: most tests keep one core busy.
test: setup browser
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS) \
		|| $(call fail,pytest failed with exit code $$?; run one test with: make test PYTEST_ARGS='-n 0 -x -k name')

# Figures carry plotly.js in the page; panels are drawn into it, since live ones need a kernel.
notebooks: setup
	@mkdir -p build/notebooks
	PLOTLY_RENDERER=plotly_mimetype+notebook PQLAB_PANELS=static $(BIN)/python -m nbconvert --to html --execute --output-dir build/notebooks \
		--HTMLExporter.require_js_url= --HTMLExporter.mathjax_url= --HTMLExporter.widget_renderer_url= \
		notebooks/*.ipynb \
		|| $(call fail,a notebook failed; the message above names its cell)

lint: package
	@$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check . \
		|| $(call fail,ruff found faults; most are mended by: make format)

format: package
	@$(BIN)/python -m ruff check --fix . ; $(BIN)/python -m ruff format .

clean:
	rm -rf build artifacts "$(STAMPS)"
