# `make` lists the targets. Everything runs in .venv, made on first use from requirements.lock.
# Another interpreter:  make -B setup PYTHON=/path/to/python3.12

PY   := .venv/bin/python
PIP  := $(PY) -m pip --disable-pip-version-check
UV   := $(shell command -v uv 2>/dev/null)
NB   ?= $(filter-out notebooks/09_%,$(sort $(wildcard notebooks/*.ipynb)))
COURSE := $(sort $(wildcard notebooks/0[1-5]_*.ipynb))
ARGS ?=
PARTS ?= where sinks how when
# Keeps the kernel's language and cell tags, which papermill needs; takes out what papermill leaves behind.
STRIP := $(PY) -m nbstripout --keep-id --extra-keys "metadata.papermill cell.metadata.papermill"

.PHONY: help setup quickstart study test lint format notebooks course bench lab

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

setup: .venv/.ready  ## make .venv with the pinned packages

quickstart: .venv/.ready  ## train, evaluate and compare a few small models on drawn shapes
	$(PY) -m detrlib sweep papermill_runs/configs/quickstart.yaml

study: .venv/.ready  ## sparse where, with what sinks, how and when (one to three hours each on two cores); make study PARTS=where
	@for part in $(PARTS); do $(PY) -m detrlib sweep papermill_runs/study/$$part.yaml || exit 1; done

test: .venv/.ready  ## run the tests; make test ARGS="-k attention"
	$(PY) -m pytest $(ARGS)

lint: .venv/.ready  ## check style, and that notebooks hold no outputs
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@for f in notebooks/*.ipynb; do [ ! -e "$$f" ] || $(STRIP) --verify "$$f" || exit 1; done

format: .venv/.ready  ## mend style, strip notebooks
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .
	@for f in notebooks/*.ipynb; do [ ! -e "$$f" ] || $(STRIP) "$$f" || exit 1; done

notebooks: .venv/.ready  ## execute all notebooks into build/notebooks; make notebooks NB=notebooks/02_*.ipynb
	@mkdir -p build/notebooks
	@for f in $(NB); do echo "$$f"; $(PY) -m detrlib notebook "$$f" "build/$$f" || exit 1; done

course: .venv/.course  ## execute notebooks 01 to 05 and make pages of them: build/course/html/index.html
	@mkdir -p build/course
	@for f in $(COURSE); do echo "$$f"; $(PY) -m detrlib notebook "$$f" "build/course/$${f##*/}" || exit 1; done
	@cp notebooks/*.md build/course/
	$(PY) -m sphinx -q -W --keep-going -c notebooks build/course build/course/html

bench: .venv/.ready  ## execute the benchmark notebook into build/notebooks; make bench ARGS="-p threads=1"
	@mkdir -p build/notebooks
	$(PY) -m detrlib notebook 10_benchmarks build/notebooks/10_benchmarks.ipynb $(ARGS)

lab: .venv/.ready  ## open JupyterLab
	GOMP_SPINCOUNT=1000 $(PY) -m jupyter lab $(ARGS)

.venv/.course: .venv/.ready pyproject.toml
	@echo "Installing what makes pages of notebooks, once."
	@if [ -n "$(UV)" ]; then "$(UV)" pip install --quiet --python $(PY) -c requirements.lock -e '.[course]'; \
	else $(PIP) install --quiet -c requirements.lock -e '.[course]'; fi
	@touch $@

# The stamp is written last, so an interrupted installation starts afresh.
.venv/.ready: pyproject.toml requirements.lock
	@set -e; \
	if [ -L .venv ]; then echo "error: .venv is a link to $$(readlink .venv), which make would alter. Remove the link to let make build an environment here, or use what it links to:  make -o $@ $(MAKECMDGOALS)"; exit 1; fi; \
	rm -f $@; \
	if [ -n "$(PYTHON)" ]; then names="$(PYTHON)"; else names="python3.14 python3.13 python3.12 python3.11 python3 python"; fi; \
	wanted="import sys; sys.exit(sys.version_info < (3, 11))"; found=; python=; \
	for name in $$names; do \
	    "$$name" -c "$$wanted" 2>/dev/null || continue; found="$$name"; \
	    if [ -n "$(UV)" ] || "$$name" -c "import venv, ensurepip" 2>/dev/null; then python="$$name"; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "detrlib needs Python 3.11 or newer; tried: $$names. Name one with  make setup PYTHON=..."; exit 1; fi; \
	if [ -z "$$python" ]; then echo "$$found has no venv module (on Debian and Ubuntu: apt install python3-venv), and uv is not installed"; exit 1; fi; \
	echo "Making .venv with $$("$$python" --version). The first time this downloads some GB and takes a few minutes."; \
	rm -rf .venv; uv="$(UV)"; \
	if [ -n "$$uv" ]; then "$$uv" venv --quiet --python "$$(command -v "$$python")" .venv; \
	else \
	    "$$python" -m venv .venv; \
	    if $(PIP) install --quiet uv; then uv=.venv/bin/uv; fi; \
	fi; \
	if [ -n "$$uv" ]; then \
	    { "$$uv" pip install --compile-bytecode --python $(PY) -r requirements.lock 2>&1 && touch .venv/.pinned; } \
	        | grep -v -e '^ *[-+~] ' -e '^ Downloaded' -e '^Downloading .*([0-9.]*KiB)' -e '^Downloading .*([0-9]\{1,2\}\.[0-9]*MiB)' || true; \
	fi; \
	if [ ! -e .venv/.pinned ]; then uv=; \
	    echo "Without uv it takes some minutes longer."; \
	    $(PY) -m ensurepip >/dev/null; \
	    { $(PIP) install --progress-bar off -r requirements.lock && touch .venv/.pinned; } \
	        | sed -n -e '/^ *Downloading .*[0-9][0-9].*[MG]B)/p' -e '/^ *Using cached .*[0-9][0-9].*[MG]B)/p' -e 's/^\(Installing\) collected.*/\1 .../p'; \
	    [ -e .venv/.pinned ]; \
	fi; \
	if [ -n "$$uv" ]; then "$$uv" pip install --quiet --python $(PY) --no-deps -e .; \
	else $(PIP) install --quiet --no-deps -e .; fi; \
	touch $@; echo "Ready."
