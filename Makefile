# Two commands do everything: `make serve` to try it, `make test` to check it.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements/lock.txt
GRAPH ?= examples/digits/graph.yaml

.PHONY: install serve test lint coverage bench image-test proto lock clean

install: .venv/.installed          ## .venv with the servinggraph command in it

serve: install                     ## serve the example graph
	$(BIN)/servinggraph serve $(GRAPH)

test: .venv/.dev                   ## install what the tests need, run everything
	scripts/system-packages.sh dot=graphviz curl=curl redis-server=redis-server prometheus=prometheus systemd-analyze=systemd java=openjdk-17-jre-headless mvn=maven
	scripts/kafka-libs.sh
	$(BIN)/python -m pytest -q

lint: .venv/.dev                   ## style, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

coverage: .venv/.dev               ## tests with branch coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

bench: .venv/.dev                  ## ours beside the peers; takes about 15 minutes
	scripts/system-packages.sh wrk=wrk
	$(BIN)/python loadtests/bench.py

image-test: .venv/.dev             ## build the images with buildah, run them, test them; as root
	scripts/system-packages.sh buildah=buildah debootstrap=debootstrap
	scripts/image.sh
	$(BIN)/python -m pytest -q -p no:cacheprovider deploy/docker

proto: .venv/.dev                  ## messages of the gRPC front end from their .proto files
	$(BIN)/python scripts/proto.py

lock:                              ## resolve requirements/lock.txt anew
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml requirements/dev.in --extra grpc --extra kafka --extra kafka-dev --extra onnx --extra otel --extra plot --extra redis --extra remote --extra test --extra tools \
	  --no-header --no-emit-index-url --no-annotate --python-version 3.11 --upgrade -o requirements/lock.txt
	$(BIN)/uv pip compile pyproject.toml requirements/gpu.in --extra grpc --extra kafka --extra onnx-gpu --extra redis --extra remote \
	  --constraint requirements/lock.txt --no-header --no-emit-index-url --no-annotate --python-version 3.11 --upgrade -o requirements/lock-gpu.txt

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/bin/python:
	scripts/venv.sh $(PYTHON)

.venv/.installed: .venv/bin/python pyproject.toml requirements/lock.txt
	$(PIP) --editable '.[grpc,onnx,plot,tools]'
	touch $@

.venv/.dev: .venv/.installed requirements/dev.in
	$(PIP) --editable '.[grpc,kafka,kafka-dev,onnx,otel,plot,redis,remote,test,tools]' --requirement requirements/dev.in
	touch $@
