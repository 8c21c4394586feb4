# Everything runs in a virtual environment that tools/setup.py makes on the first call (.venv, or $SEMANTIC_STYLE_VENV).
#   make demo    the demo graphs in a headless ComfyUI, or the same pictures without it; writes output/
#   make test    all tests; those that need ComfyUI are skipped with a reason where there is none
#   make setup   only the environment; tries again to install ComfyUI where that failed before
#   make lint    ruff and mypy
#   make clean   caches and output/; `make distclean` the environment, too
PYTHON ?= python3
IN_VENV = $(PYTHON) tools/setup.py --

.PHONY: demo test setup lint clean distclean

demo:
	@$(IN_VENV) tools/run.py demo.run $(ARGS)

test:
	@$(IN_VENV) -m pytest $(ARGS)

setup:
	@$(PYTHON) tools/setup.py --retry-host

lint:
	@$(IN_VENV) -m ruff check .
	@$(IN_VENV) tools/check_types.py

clean:
	rm -rf output build .pytest_cache .ruff_cache .mypy_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
