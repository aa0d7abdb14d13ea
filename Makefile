# Every target does all its own set-up: Python >= 3.10 with its venv module is all that has to be there.
#   make help           what there is
#   make demo PYTHON=python3.12   another interpreter (used when .venv is made)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OUT := ce-plugin-demo
ARGS :=
METADATA := setup.cfg pyproject.toml
# What is run on other interpreters and versions: all but detectors, the command line, reports and benchmarks, and
# stored numbers, which are those of one set of versions.
QUICK := $(addprefix tests/,attribution concepts effects expected interventions trials test_sites.py test_guard.py test_errors.py \
  test_package.py test_compatibility.py)
SCRIPTS = $(shell grep -l '^if __name__ == "__main__":' benchmarks/*.py benchmarks/*/*.py)

# glibc returns large blocks to the system after every operation, which slows convolutional networks down on a CPU
# (docs/performance.md); other C libraries take no notice of these.
demo test test-slow test-oldest test-python docs gallery: export MALLOC_MMAP_MAX_ = 0
demo test test-slow test-oldest test-python docs gallery: export MALLOC_TRIM_THRESHOLD_ = 20000000000

.DEFAULT_GOAL := help
.PHONY: help build demo test test-slow test-oldest test-python check format docs gallery benchmark clean distclean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

# A stamp per set of extras: it is made again when the metadata change, so that a second call starts at once.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "ce-plugin needs Python >= 3.10, but $(PYTHON) is not. Say which one to take: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo "$(PYTHON) -m venv failed: install Python's venv module (Debian: apt-get install python3-venv)."; exit 1; }
	@touch $@

$(VENV)/.installed-%: $(VENV)/.created $(METADATA)
	$(PIP) install --quiet --editable '.[$*]'
	@touch $@

demo: $(VENV)/.installed-demo  ## explain two photographs with a real network; says where the report is
	$(BIN)/ce-plugin demo --out $(OUT) --force $(ARGS)
	@echo "The report is $(abspath $(OUT))/report.html: open it in a browser."

test: $(VENV)/.installed-demo $(VENV)/.installed-test  ## all tests, doctests of the package and the docs included (ARGS="-k name")
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(VENV)/.installed-demo $(VENV)/.installed-test  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

# In an environment of its own, which is made anew: the row of docs/works-with.md is written anew too.
define on_other_versions
	@echo "This installs PyTorch into $(1), which may take several GB."
	$(2) -m venv --clear $(1)
	$(1)/bin/python -m pip --disable-pip-version-check install --quiet $(3) --editable '.[demo,networks,data]' pytest hypothesis import-linter
	-$(1)/bin/python -m pytest --junitxml=$(1)/tests.xml $(QUICK) $(ARGS)
	$(1)/bin/python -m benchmarks.works_with.versions $(4) $(1)/tests.xml
endef

test-oldest:  ## the tests on Python 3.10 and the lower bounds of setup.cfg (PYTHON=python3.10)
	sed -n '/^install_requires/,/^\[/s/^ *\([A-Za-z0-9_-]*\)>=\(.*\)/\1==\2/p' setup.cfg > .oldest.txt
	$(call on_other_versions,.venv-oldest,$(PYTHON),--constraint .oldest.txt,oldest)

test-python:  ## the tests on another interpreter and the newest versions for it (PYTHON=python3.13)
	$(call on_other_versions,.venv-newest,$(PYTHON),--upgrade,newest)

check: $(VENV)/.installed-test  ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict
	$(BIN)/lint-imports

format: $(VENV)/.installed-test  ## let ruff write what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs  ## the documentation, in docs/_build/html; a warning is an error
	$(BIN)/sphinx-build -W --keep-going -b html -d docs/_build/doctrees docs docs/_build/html
	@echo "The documentation is $(abspath docs/_build/html)/index.html."

gallery: export CE_PLUGIN_GALLERY = full
gallery: export CE_PLUGIN_CACHE ?= $(CURDIR)/.gallery-cache
gallery: $(VENV)/.installed-docs  ## the documentation with the gallery in full: minutes a page; needs CE_PLUGIN_DATA
	@test -d "$$CE_PLUGIN_DATA" || { echo "Set CE_PLUGIN_DATA to the folder of the data sets (examples/gallery/README.rst)."; exit 1; }
	$(BIN)/sphinx-build -W --keep-going -b html -d docs/_build/doctrees docs docs/_build/html
	@echo "The gallery is $(abspath docs/_build/html)/gallery/index.html, its pictures $(abspath docs/gallery/images)."

benchmark: $(VENV)/.installed-demo $(VENV)/.installed-benchmark  ## list the benchmarks; RUN=name runs one (ARGS="..." goes to it)
ifdef RUN
	$(BIN)/python -m benchmarks.$(subst /,.,$(RUN:.py=)) $(ARGS)
else
	@echo "Run one by name, for example: make benchmark RUN=coverage.regions"
	@for script in $(SCRIPTS); do name=$${script#benchmarks/}; \
	  printf '  %-24s %s\n' "$$(echo $${name%.py} | tr / .)" "$$(sed -n '1s/^"""//;1s/"""$$//;1p' $$script)"; done
endif

build: $(VENV)/.created  ## wheel and source archive in dist/, checked in a fresh environment
	rm -rf build dist .venv-build
	$(PIP) install --quiet build
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv .venv-build
	.venv-build/bin/python -m pip --disable-pip-version-check install --quiet dist/*.whl
	cd dist && ../.venv-build/bin/ce-plugin --version && ../.venv-build/bin/ce-plugin doctor
	cd dist && ../.venv-build/bin/python -c "import torch, ce_plugin; \
	  print(ce_plugin.CausalEffect(torch.nn.Linear(3, 2)).estimate(torch.ones(1, 3), answer=True).summary())"
	rm -rf .venv-build

clean:  ## remove what was built (not .venv, not a report)
	rm -rf build dist docs/_build docs/gallery docs/sg_execution_times.rst .gallery-cache examples/gallery/.gallery-cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find ce_plugin tests examples benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove .venv and its like too
	rm -rf $(VENV) .venv-oldest .venv-newest .oldest.txt *.egg-info
