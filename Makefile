# Each target sets itself up: the first one run makes .venv from requirements.lock (see .ci/setup), the others find it.
# Another interpreter: make PYTHON=python3.12 demo
export PYTHON

BIN := .venv/bin
READY := .venv/.ready
SMALLDOCS := _build/smalldocs/bin/smalldocs
# What `make lock` holds still while it renews the rest.
HOLD := torch==2.13.0
PYTHONS := python3.11 python3.12 python3.13

.DEFAULT_GOAL := help
.PHONY: help demo test test-results book book-test zoo hard-set families held-out later bench bench-zoo bench-held-out bench-later bench-search bench-sizes bench-families bench-lies bench-decisions bench-told against-released bench-sample bench-report fuzz soak full-size gpu-proof course lab lint export check-export readme quarto-check lock dist test-pythons clean

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(READY): requirements.lock pyproject.toml settings.ini hatch_build.py
	@.ci/setup

demo: $(READY) ## scan the embedded models and say which of them are backdoored
	$(BIN)/terd demo

test: $(READY) ## run the tests and every chapter, and a quick look at the results; not the built book
	$(BIN)/pytest -n 2 --dist worksteal -m 'not browser and not results'

test-results: $(READY) ## hold the committed tables against all that they must say
	$(BIN)/pytest -q tests/results

book: $(READY) ## build the book into _build/html; warnings are errors
	$(BIN)/python book/build.py

book-test: book ## open every page of the built book in Chromium
	$(BIN)/pytest -n 2 -m browser tests/test_book.py tests/test_one_number.py tests/test_live.py tests/test_apparatus.py tests/test_report.py

# Training is a tenth faster when glibc keeps its large buffers.
zoo: export MALLOC_TRIM_THRESHOLD_ = 4000000000
zoo: export MALLOC_MMAP_THRESHOLD_ = 4000000000
zoo: $(READY) ## train the embedded models again from their seeds; RES=32, 64 or 128: the larger ones
	$(BIN)/terd zoo build $(if $(RES),--size $(RES))

# What the search is tried on; see workshop G.
hard-set: export MALLOC_TRIM_THRESHOLD_ = 4000000000
hard-set: export MALLOC_MMAP_THRESHOLD_ = 4000000000
hard-set: $(READY) ## train the models of the hard set again from their seeds
	$(BIN)/terd zoo build --hard

# Other paths, other predictions; see chapter 20.
families: export MALLOC_TRIM_THRESHOLD_ = 4000000000
families: export MALLOC_MMAP_THRESHOLD_ = 4000000000
families: $(READY) ## train the models of every other family again from their seeds
	$(BIN)/terd zoo build --families

held-out: export MALLOC_TRIM_THRESHOLD_ = 4000000000
held-out: export MALLOC_MMAP_THRESHOLD_ = 4000000000
held-out: $(READY) ## train the models that the search is measured on once
	$(BIN)/terd zoo build --held-out

later: export MALLOC_TRIM_THRESHOLD_ = 4000000000
later: export MALLOC_MMAP_THRESHOLD_ = 4000000000
later: $(READY) ## train the models of chapter 20b: later attacks, in their published trainings
	$(BIN)/terd zoo build --later

bench: bench-zoo bench-search bench-sizes bench-families ## measure every set of models, and fit the default detectors

bench-zoo: $(READY) ## measure the defence on the embedded models
	$(BIN)/terd bench

bench-search: $(READY) ## measure every search on the hard set
	$(BIN)/terd bench --hard

bench-sizes: $(READY) ## measure the defence on the models of 32, 64 and 128 pixels, or only those of RES=64
	$(BIN)/terd bench --sizes $(if $(RES),--size $(RES))

bench-families: $(READY) ## measure the search on every other family, and which sampler carries which backdoor
	$(BIN)/terd bench --families --seeds 1

bench-held-out: $(READY) ## measure the search on the held-out models, after `make held-out`
	$(BIN)/terd bench --held-out --seeds 1

bench-later: $(READY) ## measure every method on the later attacks, after `make later`
	$(BIN)/terd bench --later --seeds 1

bench-lies: $(READY) ## measure what becomes of models whose files lie
	$(BIN)/terd bench --lies

bench-decisions: $(READY) ## measure the guard on a million noises, and the repair on a dozen models
	$(BIN)/terd bench --decisions --jobs 1

bench-told: $(READY) ## measure TERD and Elijah as they are meant: told the attack, longer, thresholds of the same size
	$(BIN)/terd bench --told

against-released: $(READY) ## hold the first stage of TERD's released code, a clone in TERD=DIR, against ours; runs code of that clone
	$(BIN)/python tests/against_released.py $(TERD) --csv data/results/released.csv

bench-sample: $(READY) ## measure a tenth of the benchmark again, and print it beside the recorded rows
	@mkdir -p _build
	$(BIN)/terd bench --again _build/again.csv

bench-report: $(READY) ## make the tables and figures of chapter 21 from the measured rows, into _build/benchmark
	$(BIN)/terd bench --report --out _build/benchmark

fuzz: $(READY) ## open N mutants of honest folders, made from SEED, and say how each ended; SCAN=1: through whole scans
	$(BIN)/python tests/fuzz.py --n $(or $(N),3000) --seed $(or $(SEED),1) $(if $(SCAN),--scan)

soak: $(READY) ## scan N folders with two workers, of which one is killed each PERIOD seconds; KILLS=50: kill the whole scan; SHORT=1: searches of a few steps; SPEED=14: models a minute; CSV=FILE keeps what is found
	$(BIN)/python tests/soak.py $(if $(SPEED),--speed $(SPEED),$(if $(KILLS),--kills $(KILLS),--period $(or $(PERIOD),60))) $(if $(N),--n $(N)) $(if $(SHORT),--short) $(if $(CSV),--csv $(CSV))

full-size: $(READY) ## measure what models of full size cost: memory and seconds of an image, hours of a scan; CSV=FILE keeps the table
	$(BIN)/python tests/full_size.py $(if $(CSV),--csv $(CSV))

gpu-proof: $(READY) ## on one GPU, in about ten minutes: train a network of full size and one with a backdoor, scan both, write rows
	@mkdir -p _build
	$(BIN)/python -m terd_nb.lab.gpu_proof _build/gpu-proof --rows data/results/gpu_proof.csv $(if $(HONEST),--honest $(HONEST))

course: $(READY) ## make the students' archive: the chapters without their solutions
	@mkdir -p _build/course
	$(BIN)/terd course zip _build/course/terd-course.zip

lab: $(READY) ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir nbs

lint: $(READY) ## check the code's style
	$(BIN)/ruff check .

export: $(READY) ## write terd_nb/ from the notebooks, and clean their metadata
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

readme: $(READY) ## write README.md from nbs/index.ipynb, and the minutes in the plans for lecturers
	$(BIN)/python book/readme.py
	$(BIN)/python book/minutes.py >/dev/null

check-export: export readme ## fail if the committed library, README or plans are not what the notebooks give
	@git --no-pager diff --exit-code --stat -- nbs terd_nb README.md book/teaching.md
	@new=$$(git ls-files --others --exclude-standard -- nbs terd_nb); \
	if [ -n "$$new" ]; then echo "not committed: $$new" >&2; exit 1; fi

quarto-check: $(READY) $(SMALLDOCS) ## render the API reference that _quarto.yml describes, strictly, into _build/quarto
	$(BIN)/python book/quarto.py
	$(SMALLDOCS) render --strict _build/quarto

# It wants a newer fastcore than nbdev 2 bears, hence a home of its own.
$(SMALLDOCS): $(READY)
	$(BIN)/python -m venv --clear _build/smalldocs
	_build/smalldocs/bin/python -m pip install -q smalldocs==0.5.4

lock: ## renew requirements.lock from the ranges in settings.ini
	.ci/lock $(HOLD)

dist: $(READY) ## build the wheel and the source archive into dist/
	$(BIN)/python -m build --outdir dist

test-pythons: dist ## install the wheel on each Python of PYTHONS and run its demo
	.ci/test-pythons $(PYTHONS)

clean: ## remove what the other targets built, except .venv
	rm -rf _build dist _docs _proc .pytest_cache .ruff_cache
