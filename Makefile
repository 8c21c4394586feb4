# Everything runs in a virtual environment that tools/setup.py makes on the first call (.venv, or $SEMANTIC_STYLE_VENV),
# and in a real ComfyUI, which it finds or brings.
#   make demo    the demo graphs in a headless ComfyUI; writes output/
#   make test    all tests
#   make quick   those of them that need no ComfyUI, for work in between
#   make setup   only the environment
#   make lint    ruff and mypy
#   make figures every picture and table that the demo model made, again: hours; after another model was trained
#   make clean   caches and output/; `make distclean` the environment, too
PYTHON ?= python3
IN_VENV = $(PYTHON) tools/setup.py --
# Two processes share the tests, a file at a time; a ComfyUI server each.
SHARED = -n 2 --dist loadfile

.PHONY: demo test quick setup lint figures clean distclean

demo:
	@$(IN_VENV) tools/run.py demo.run $(ARGS)

test:
	@$(IN_VENV) -m pytest $(SHARED) $(ARGS)

quick:
	@$(IN_VENV) -m pytest $(SHARED) -m "not slow" tests/unit $(ARGS)

setup:
	@$(PYTHON) tools/setup.py

lint:
	@$(IN_VENV) -m ruff check .
	@$(IN_VENV) tools/check_types.py

figures:
	@$(IN_VENV) tools/run.py benchmarks.demo_model --write
	@$(IN_VENV) tools/run.py benchmarks.quality --write
	@$(IN_VENV) tools/run.py benchmarks.sliders --write
	@$(IN_VENV) tools/run.py benchmarks.saliency_quality --write
	@$(IN_VENV) tools/run.py benchmarks.position_code --write
	@$(IN_VENV) tools/run.py benchmarks.guidance_steps --write
	@$(IN_VENV) tools/run.py demo.gallery --write
	@$(IN_VENV) tools/run.py demo.run
	@cp output/semantix_image_5_what_the_terms_did.png docs/plot_semantix.png
	@$(IN_VENV) tools/help_pictures.py
	@$(IN_VENV) tools/workflows.py
	@$(IN_VENV) tools/workflows.py --screens docs semantix_simple scsa_simple spin_simple

clean:
	rm -rf output build .pytest_cache .ruff_cache .mypy_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
