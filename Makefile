# Every target sets up .venv by itself; a second call installs nothing.
.PHONY: demo test check nightly test-matrix fuzz bench clean

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CANDIDATES := python3.11 python3.12 python3.13 python3.14 python3 python
RECENT := import sys; sys.exit(sys.version_info < (3, 11))

# Tests start hundreds of processes; each would compile the package anew without its byte code.
unexport PYTHONDONTWRITEBYTECODE
# Two tests run at a time: threads of linear algebra in each would wait for those of the other.
test check nightly test-matrix: export OPENBLAS_NUM_THREADS = 1

demo: $(VENV)/.installed-all
	@mkdir -p demo
	$(BIN)/onnxc quantize models/digits_cnn.onnx \
	  --data models/digits_cnn_calib.npz --val models/digits_cnn_val.npz \
	  -o demo/digits_cnn.int8.onnx

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict -p onnxc -p passes -p calib
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist worksteal

nightly: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# The quick suite with the oldest and with the newest release of everything that pyproject.toml
# allows, and what is built installed where nothing else is; this needs a package index.
test-matrix: $(VENV)-oldest/.installed $(VENV)-newest/.installed
	@set -e; for end in oldest newest; do echo "$$end:"; \
	  $(VENV)-$$end/bin/python -m pip list --format=freeze | grep -E '^(numpy|onnx|click|rich)'; \
	  $(VENV)-$$end/bin/python -m pytest -n 2 --dist worksteal $(TESTS); done
	$(VENV)-newest/bin/python tests/fresh.py

# FUZZ_SECONDS, FUZZ_FOLDER: how long all targets together, and where findings are kept
fuzz: $(VENV)/.installed-fuzz
	$(BIN)/python tests/fuzz/run.py

bench: $(VENV)/.installed-dev
	@set -e; for script in $(sort $(wildcard tests/bench/*.py)); do \
	  echo "$$script"; $(BIN)/python "$$script"; done

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest demo build dist .fuzz

# The stamps are newer than pyproject.toml exactly when the installed packages are up to date.
$(VENV)/.installed-all: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[all]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[dev]'
	@touch $(VENV)/.installed-all $@

$(VENV)-%/.installed: pyproject.toml tests/oldest.py | $(BIN)/python
	rm -rf $(@D)
	$(BIN)/python -m venv $(@D)
	$(BIN)/python tests/oldest.py $* > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet -c $(@D)/constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.installed-fuzz: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[dev,fuzz]'
	@touch $(VENV)/.installed-all $(VENV)/.installed-dev $@

$(BIN)/python:
	@for python in $(CANDIDATES); do \
	  if $$python -c '$(RECENT)' 2>/dev/null; then exec $$python -m venv $(VENV); fi; \
	done; echo "onnxc needs Python 3.11 or newer; none of these is: $(CANDIDATES)" >&2; exit 1
