# make test and make demo are all a newcomer needs: each makes .venv if it is missing, installs, runs.
PYTHON ?= python3
BIN = .venv/bin
RUN = runs/demo
DRAWN = $${XDG_CACHE_HOME:-$$HOME/.cache}/ssrl/synthetic-1000-*/images

.PHONY: test demo bench

$(BIN)/installed: requirements.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

test: $(BIN)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

demo: $(BIN)/installed
	$(BIN)/python SSRL.py
	$(BIN)/python eval_knn.py --pretrained $(RUN)/checkpoint-0000.pth --k 15
	$(BIN)/python eval_knn.py --pretrained $(RUN) --k 15
	$(BIN)/python eval_linear.py --pretrained $(RUN) --features color
	$(BIN)/python eval_linear.py --pretrained $(RUN) --features handmade
	$(BIN)/python eval_linear.py --pretrained $(RUN)
	$(BIN)/python visualize_attention.py --pretrained $(RUN) --image $(DRAWN)/p000[0-3]_left.jpg
	$(BIN)/python -m tools.report --table $(RUN)
	$(BIN)/python -m tools.report $(RUN)

# every speed figure of a CPU, in some 18 minutes on two cores: make bench PHOTOGRAPHS=folder
bench: $(BIN)/installed
	@test -d "$(PHOTOGRAPHS)" || { echo "say which photographs: make bench PHOTOGRAPHS=folder"; exit 2; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-bench.txt
	$(BIN)/python -m benchmarks.bench_prepare --photographs "$(PHOTOGRAPHS)"
	$(BIN)/python -m benchmarks.bench_data --photographs "$(PHOTOGRAPHS)"
	$(BIN)/python -m benchmarks.bench_step --photographs "$(PHOTOGRAPHS)" --rounds 4
	$(BIN)/python -m benchmarks.bench_train --photographs "$(PHOTOGRAPHS)"
	$(BIN)/python -m benchmarks.bench_eval
	$(BIN)/python -m benchmarks.bench_whole
	$(BIN)/python -m benchmarks.bench_parts --photographs "$(PHOTOGRAPHS)"
