# qdiff from a checkout. Needs make and Python 3.11 or newer, nothing else: every target makes .venv and installs first.
# `make help` lists the targets. pip's own settings (PIP_* in the environment) apply to the installation.

VENV ?= .venv
RUN ?= runs/pixart
PROMPT ?= a rocket on a blue background
ARGS ?=

# The first Python that is new enough and can make environments, the version that constraints.txt was made with before others.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3 python3.14; do \
	$$name -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$name && break; done)
# tensorrt-rtx has no wheel for other systems.
EXTRAS ?= $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),cpu$(comma)rtx$(comma)app,cpu$(comma)app)
comma := ,

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
INSTALL := $(PIP) install --constraint constraints.txt
# Stamps carry the checksum of what decides the installation: a changed file installs anew, a touched one does not.
SUM := $(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
RUNTIME := $(VENV)/.installed-$(SUM)
DEV := $(VENV)/.installed-dev-$(SUM)
PEERS := $(VENV)/.installed-bench-$(SUM)

.DEFAULT_GOAL := help
.PHONY: help run test check types demo page docs bench bench-check ptq constraints clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  settings: RUN=$(RUN) VENV=$(VENV) PYTHON=$(or $(PYTHON),none found) EXTRAS=$(EXTRAS) ARGS='more arguments'"

run: $(RUNTIME) ## the main job: calibrate, quantize, export, build, generate and report on the bundled PixArt
	$(BIN)/qdiff run --model pixart -o $(RUN) $(ARGS)

test: check ## check, then all tests (ARGS='-k name' for some)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0 $(ARGS)

check: $(DEV) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory types

# Type checkers do not read import hooks: they get a tree of links in which the mapped folders stand where Python sees them.
types: $(DEV)
	@rm -rf .dev/qdiff && mkdir -p .dev/qdiff
	@for path in qdiff/*; do case $$path in */__pycache__) ;; *) ln -s ../../$$path .dev/qdiff/ ;; esac; done
	@for name in calib export engines app; do ln -s ../../$$name .dev/qdiff/$$name; done
	MYPYPATH=.dev $(BIN)/mypy -p qdiff

demo: run ## one picture of PROMPT from the fastest engine of RUN, in RUN/demo.png
	$(BIN)/qdiff generate $(RUN) --prompt "$(PROMPT)" --seed 0 -o $(RUN)/demo.png

docs: $(DEV) ## the documentation site in .dev/site, strictly: no broken link
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

page: run ## the web page on RUN, at http://127.0.0.1:7860
	$(BIN)/qdiff demo $(RUN)

bench: $(PEERS) ## time one denoising step against the peers (ARGS='--config pixart-67m --json')
	$(BIN)/python -m bench.step $(or $(ARGS),--config pixart-67m)

bench-check: $(RUNTIME) ## short fresh runs of the recorded benchmarks, their ratios beside bench/results
	$(BIN)/python -m bench.check

ptq: $(PEERS) ## quantization methods beside the peers' (ARGS='--work DIR --only NAME'); hours
	$(BIN)/python -m bench.ptq $(ARGS)

constraints: $(DEV) $(PEERS) ## write constraints.txt anew from what is installed
	@{ sed -n '/^#/p' constraints.txt; \
	   $(PIP) freeze --all --exclude pip --exclude qdiff-deploy | sed -n -E 's/^([A-Za-z0-9._-]+==[^+ ]+)(\+.*)?$$/\1/p'; \
	 } > constraints.new && mv constraints.new constraints.txt

clean: ## remove what tests and builds left (not .venv, not runs)
	rm -rf build dist *.egg-info .dev .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf $(VENV)

# torch goes first and alone: its pinned version is then chosen before any other package can ask for another build of it.
$(RUNTIME):
	@test -n "$(PYTHON)" || { echo "qdiff needs Python 3.11 or newer with the venv module; set PYTHON=…" >&2; exit 4; }
	@echo "installing into $(VENV)" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet --upgrade 'pip>=25.1'
	@$(INSTALL) $$(grep '^torch==' constraints.txt)
	@$(INSTALL) --editable '.[$(EXTRAS)]'
	@rm -f $(VENV)/.installed-*
	@touch $@

$(DEV): $(RUNTIME)
	@$(INSTALL) --group dev
	@touch $@

$(PEERS): $(RUNTIME)
	@$(INSTALL) --editable '.[bench]'
	@touch $@
