# Everything goes into .venv, out/ and runs/ of this folder, nothing elsewhere. `make help` lists the targets.
# Settings go on the command line: make demo PROMPT="a green triangle spinning" SEED=3

PYTHON ?= python3
VENV = .venv
OUT = out
PROMPT = a red square bouncing, a blue circle at rest
SEED = 0
POLICY = dsa
RUN = runs/demo
SCALE = cpu
DEVICE = cpu
PYTEST =

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# An editable install sees changed Python at once. These make it stale: what is installed, and what is compiled.
SOURCES := pyproject.toml constraints.txt setup.py CMakeLists.txt \
           $(shell find csrc kernels -type f ! -name '*.py' ! -name '*.pyc')

.PHONY: help demo test bench train clean distclean
.DELETE_ON_ERROR:

help:
	@echo 'make demo    install into $(VENV), make a video from a prompt, draw what was spent'
	@echo 'make test    the linter, the type checker and all tests'
	@echo 'make bench   the benchmarks: tables on the terminal, JSON under $(OUT)/bench'
	@echo 'make train   train the demo again: SCALE=quick, cpu (hours) or gpu (minutes, with DEVICE=cuda); goes on where it was'
	@echo 'make clean   remove what was built and made; make distclean: the virtual environment too'

demo: $(VENV)/installed
	@mkdir -p '$(OUT)'
	$(BIN)/dsa-rt generate '$(PROMPT)' --seed $(SEED) --policy '$(POLICY)' --device $(DEVICE) --scale 4 \
	    --out '$(OUT)/demo.mp4' --chart '$(OUT)/demo.png' --stats '$(OUT)/demo.json'
	@echo
	@echo 'The video is $(OUT)/demo.mp4. $(OUT)/demo.png shows what each chunk got, $(OUT)/demo.json holds every figure.'

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy dsa_rt
	$(BIN)/python -m pytest $(PYTEST)

train: $(VENV)/installed
	$(BIN)/dsa-rt train --out '$(RUN)' --scale $(SCALE) --device $(DEVICE)
	@echo 'The bundles are in $(RUN)/bundles. Try one: $(BIN)/dsa-rt generate "$(PROMPT)" --bundle $(RUN)/bundles/streaming --out clip.mp4'

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("dsa_rt needs Python 3.11 or later; $(PYTHON) is " + sys.version.split()[0] + ": name another one, make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed: $(VENV)/created $(SOURCES)
	$(PIP) -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/created $(SOURCES)
	$(PIP) -e '.[test]'
	@touch $@ $(VENV)/installed

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks '$(OUT)' dsa_rt/_native*.so
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -f $(VENV)/installed $(VENV)/installed-test

distclean: clean
	rm -rf $(VENV)
