# Everything goes into .venv, out/, runs/ and bench/results/ of this folder, nothing elsewhere; `make help` lists it.
# Settings go on the command line: make demo PROMPT="a green triangle spinning" SEED=3

PYTHON ?= python3
VENV = .venv
OUT = out
PROMPT = a red square bouncing, a blue circle at rest
SEED = 0
POLICY = dsa
DEVICE = cpu
RUN = runs/demo
SCALE = cpu
BENCH = suite imports ops speed memory quality
PYTEST =

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# The install is editable: changed Python counts at once. It is made again when one of these changes.
SOURCES := pyproject.toml constraints.txt setup.py CMakeLists.txt \
           $(shell find csrc kernels -type f ! -name '*.py' ! -name '*.pyc')

.PHONY: help demo test bench train clean distclean
.DELETE_ON_ERROR:

help:
	@echo 'make demo       make a video from a prompt: PROMPT="a green triangle spinning" SEED=3 POLICY=dsa-paper'
	@echo 'make test       linter, type checker, all tests: PYTEST="-k policy" for some of them'
	@echo 'make bench      every benchmark, one after the other: BENCH="speed quality" for some of them'
	@echo 'make train      train the demo again, on from where it stopped: SCALE=quick | cpu | gpu, DEVICE=cuda, RUN=folder'
	@echo 'make clean      remove what was built and made; make distclean: the virtual environment $(VENV) too'

demo: $(VENV)/installed
	@mkdir -p '$(OUT)'
	$(BIN)/dsa-rt generate '$(PROMPT)' --seed $(SEED) --policy '$(POLICY)' --device $(DEVICE) --scale 4 \
	    --out '$(OUT)/demo.mp4' --chart '$(OUT)/demo.png' --stats '$(OUT)/demo.json'
	@echo
	@echo 'The video is $(OUT)/demo.mp4; $(OUT)/demo.png shows what each chunk got; $(OUT)/demo.json holds every figure.'

# A file's tests stay in one process, as what they build is made once for each file; the longest ones begin early.
test: export PATH := $(CURDIR)/$(BIN):$(PATH)
test: $(VENV)/installed-test
	ruff check .
	mypy
	python -m pytest -n auto --dist loadfile --no-loadscope-reorder --maxprocesses 8 $(PYTEST)

bench: $(VENV)/installed
	@missed=; for name in $(BENCH); do \
	    echo; echo "== bench.$$name"; \
	    $(BIN)/python -m bench.$$name || { code=$$?; [ $$code -eq 1 ] || exit $$code; missed="$$missed $$name"; }; \
	done; \
	echo; echo 'The results are in bench/results.'; \
	[ -z "$$missed" ] || { echo "a requirement is missed in:$$missed"; exit 1; }

train: $(VENV)/installed
	$(BIN)/dsa-rt train --out '$(RUN)' --scale $(SCALE) --device $(DEVICE)
	@echo 'Try the result: $(BIN)/dsa-rt generate "$(PROMPT)" --bundle $(RUN)/bundles/streaming --out clip.mp4'

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("dsa_rt needs Python 3.11 or later and $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed: $(VENV)/created $(SOURCES)
	$(INSTALL) -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/created $(SOURCES)
	$(INSTALL) -e '.[test]'
	@touch $@ $(VENV)/installed

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks '$(OUT)' dsa_rt/_native*.so
	rm -f $(VENV)/installed $(VENV)/installed-test
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
