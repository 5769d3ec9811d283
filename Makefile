# make reproduce      the paper's experiments, as executed notebooks (runs/) and figures (figures/)
#   PROFILE=name      with the settings in workflow/profiles/name
#   MODEL=model       on a model of yours: a hub id, a folder or a .gguf file; its run is called
#                     PROFILE-model (NAME=... to change that). A model that refuses at least half of
#                     the attacks is taken as aligned (ALIGNED=yes or no to decide it).
# make clean-run      forget what PROFILE has run: needed after a change in the library or in data
# make test           lint, types and the tests, but for those of a browser, of installing and of Slurm
# make test-quick     the same without the tests that are slow or need a network
# make coverage       the same tests, and how much of the library they reach: docs/coverage.csv
# make docs           the site, in docs/_build/html
# make drill          kill runs of the smoke profile at random moments, in a copy of this checkout
# make verify         the figures against their manifests, and what is behind each
#   CHAPTER=name      run one chapter of PROFILE again and compare its tables
# make test-slurm     the smoke profile through a Slurm of one node, as by itself (needs Slurm, munge)
# make test-browser   the site and the chapters in a real browser (needs chromium)
# make test-install   what is shipped, in new environments of each Python on the path (downloads)
# Each does all set-up first, in .venv, once.

PROFILE = embedded
MODEL =
NAME =
ALIGNED =
CHAPTER =
SNAKEMAKE_FLAGS =
KILLS = 20
SEED = 0
PYTHON = $(firstword $(foreach python,python3.11 python3.12 python3.13 python3,$(shell $(python) -c $(SUPPORTED) 2>/dev/null && echo $(python))))
SUPPORTED = 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'
PROFILES = $(sort $(patsubst workflow/profiles/%/config.yaml,%,$(wildcard workflow/profiles/*/config.yaml)))
BIN = .venv/bin
USERS_MODEL = $(foreach word,PROFILE MODEL NAME ALIGNED,'$(subst ','\'',$($(word)))')
READY = .venv/.ready
# tests of several files at once; OMP_WAIT_POLICY=passive lets their threads wait asleep
BESIDE = -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: reproduce test test-quick lint types coverage docs verify drill test-browser test-install test-slurm outputs export readme lab lock clean-run help

# Ctrl-C reaches make, this shell and snakemake. The chapter says its line; the shell then says
# nothing, so that make ends as interrupted, without a line of its own.
SNAKEMAKE = stopped=; trap stopped=1 INT; SSAH_MAKE=$$PPID $(BIN)/snakemake \
    --workflow-profile workflow/profiles/$(PROFILE) $(SNAKEMAKE_FLAGS)
FINISHED = ; status=$$?; test -z "$$stopped" || exit 0; test $$status = 0 || exit $$status; \
    echo "finished: notebooks in runs/$$run/notebooks, figures and tables in figures/$$run"; \
    cat "runs/$$run/agreement.txt" 2>/dev/null || true
WITH_CONFIG = config=$$($(BIN)/python workflow/run_config.py $(PROFILE) "$$run") || exit 2; \
    $(SNAKEMAKE) --config $$config$(FINISHED)

reproduce: known-profile $(READY)
ifeq ($(MODEL)$(NAME)$(ALIGNED),)
	@run=$(PROFILE); $(WITH_CONFIG)
else
	@$(BIN)/python workflow/users_model.py check $(USERS_MODEL)
	@run=$$($(BIN)/python workflow/users_model.py name $(USERS_MODEL)); $(WITH_CONFIG)
endif

help:
	@sed -n -e '/^#/!q' -e 's/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

test: lint types
	@OMP_WAIT_POLICY=passive exec $(BIN)/python -m pytest $(BESIDE) --durations=10

test-quick: lint types  ## without those that take long
	@OMP_WAIT_POLICY=passive exec $(BIN)/python -m pytest $(BESIDE) -m 'not slow and not network and not browser and not install'

lint: $(READY)  ## line length, unused imports, undefined names
	@$(BIN)/ruff check --quiet nbs ssah_nb tests workflow benchmarks docs

types: $(READY)  ## the annotations; the first time takes half a minute
	@$(BIN)/mypy --no-error-summary

coverage: $(READY)
	@$(BIN)/coverage erase
	@$(BIN)/coverage run -m pytest
	@$(BIN)/coverage combine -q
	@$(BIN)/python docs/coverage_table.py

docs: $(READY)  ## chapters as the embedded run executed them, where runs/embedded has them
	@$(BIN)/python docs/build.py
	@$(BIN)/sphinx-build -q -W --keep-going -n -b html docs/_build/source docs/_build/html
	@echo "site: docs/_build/html/index.html"

verify: $(READY)
	@exec $(BIN)/python workflow/verify.py $(if $(CHAPTER),--chapter '$(CHAPTER)' --profile '$(PROFILE)')

drill: $(READY)  ## 20 kills and an interrupt of the smoke profile, each taken up again
	@exec $(BIN)/python workflow/drill.py --kills $(KILLS) --seed $(SEED)

test-browser: docs
	@$(BIN)/python -c 'import playwright' 2>/dev/null || $(BIN)/python -m pip install -q -e '.[browser]'
	@exec $(BIN)/python -m pytest -m browser tests/test_browser.py

test-slurm: $(READY)
	@exec $(BIN)/python workflow/slurm.py

test-install: $(READY)
	@exec $(BIN)/python -m pytest -m install tests/test_install.py

outputs: $(READY)  ## run the chapters with their default parameters and keep their outputs in nbs/
	@exec $(BIN)/python workflow/store_outputs.py

export: $(READY)  ## nbs/*.ipynb -> ssah_nb/*.py
	@$(BIN)/python workflow/clean_notebooks.py && $(BIN)/nbdev_export

readme: $(READY)  ## nbs/index.ipynb -> README.md; the source of cells tagged remove_input stays out
	@$(BIN)/jupyter nbconvert nbs/index.ipynb --execute --to notebook --output-dir runs/readme --log-level ERROR
	@$(BIN)/jupyter nbconvert runs/readme/index.ipynb --to markdown --output-dir . --output README --log-level ERROR \
	    --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_input_tags remove_input
	@sed 's#\.\./figures/#figures/#g' README.md | cat -s > README.new && mv README.new README.md

lab: $(READY)
	@exec $(BIN)/jupyter lab nbs

lock: $(READY)  ## after a change in pyproject.toml: what this .venv then holds becomes the lock file
	@$(BIN)/python -m pip install -e '.[run,train,test,docs,dev]'
	@{ head -n 2 requirements.lock; $(BIN)/python -m pip freeze --all --exclude pip --exclude-editable | sed 's/+cpu$$//'; } > requirements.new
	@mv requirements.new requirements.lock

clean-run: known-profile  ## forget what a profile has run (with MODEL=: on that), so that it runs anew
ifeq ($(MODEL)$(NAME),)
	@test ! -e runs/$(PROFILE) || $(BIN)/python workflow/one_run.py $(PROFILE)
	@rm -rf "runs/$(PROFILE)"
else
	@run=$$($(BIN)/python workflow/users_model.py name $(USERS_MODEL)) && \
	    $(BIN)/python workflow/one_run.py "$$run" && rm -rf "runs/$$run"
endif

.PHONY: known-profile
known-profile:
	@case "$(words $(PROFILE))  $(PROFILES) " in "1 "*" $(PROFILE) "*) ;; \
	    *) echo "error: unknown PROFILE '$(PROFILE)'; known: $(PROFILES)" >&2; exit 2 ;; esac

$(READY): requirements.lock pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	    test -n "$(PYTHON)" || { echo "error: no Python 3.11 to 3.13 found; name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }; \
	    $(PYTHON) -c $(SUPPORTED) 2>/dev/null || { echo "error: PYTHON=$(PYTHON) is not Python 3.11 to 3.13" >&2; exit 2; }; \
	    $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) lacks venv; on Debian: apt install python3-venv" >&2; exit 2; }; \
	    $(PYTHON) -m venv .venv; }
	@$(BIN)/python -m pip install --no-compile -r requirements.lock  # what is imported is compiled then
	@$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	@touch $@
