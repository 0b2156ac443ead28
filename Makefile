# Everything from a plain Python: `make demo`, `make test`. Nothing of ROS needs to be installed.

PYTHON ?= python3
VENV := $(CURDIR)/.venv
STAMPS := $(VENV)/.stamps
BUILD := $(CURDIR)/.build

# A sourced ROS installation, or a Python of such a venv that runs make, must not leak into this one.
CLEAN := env -u PYTHONPATH -u AMENT_PREFIX_PATH -u CMAKE_PREFIX_PATH -u COLCON_PREFIX_PATH \
	-u LD_LIBRARY_PATH -u ROS_DISTRO -u _ROS_WHEELS_BOOTSTRAP_COMPLETE
COLCON := $(CLEAN) AMENT_PREFIX_PATH=$(VENV) CMAKE_PREFIX_PATH=$(VENV) \
	PATH="$(VENV)/bin:$$PATH" $(VENV)/bin/colcon --log-base $(BUILD)/log
WORKSPACE := --build-base $(BUILD) --merge-install --install-base $(VENV) --base-paths . kp_msgs

SOURCES := setup.py setup.cfg package.xml $(shell find kp_frontend kp_training launch config \
	resource -type f -not -path '*/__pycache__/*')
MESSAGES := $(shell find kp_msgs cmake -type f)

# Runs a step quietly; its whole output is shown only when it fails.
define quietly
	@mkdir -p $(BUILD) $(STAMPS)
	@echo "$(1) ..."
	@$(2) >$(BUILD)/step.log 2>&1 || { cat $(BUILD)/step.log; echo "failed: $(1)"; exit 1; }
endef

.PHONY: help setup setup-export demo test colcon-test lint bench gpu-check clean

help:
	@echo "make setup   a virtual environment in .venv with ROS 2, torch and this package"
	@echo "make setup-export   adds ONNX and TensorRT for RTX, for kp export and its tests"
	@echo "make demo    a real stereo stream through the real node; look into demo_out/"
	@echo "make test    unit and integration tests"
	@echo "make colcon-test   the same tests with colcon, as in a ROS workspace"
	@echo "make lint    ruff and mypy"
	@echo "make bench   speed of the front end on this machine"
	@echo "make gpu-check   build, tests, speed and profile on an NVIDIA GPU, in minutes"
	@echo "make clean   remove everything that was made"

setup: $(STAMPS)/kp_frontend

# The stamp of a step is written only after it, so that an interrupted step is done again.
$(STAMPS)/requirements: requirements.txt
	$(call quietly,making the virtual environment,$(CLEAN) $(PYTHON) -m venv $(VENV))
	$(call quietly,installing requirements (some minutes the first time),\
		$(CLEAN) $(VENV)/bin/python -m pip install -r requirements.txt)
	@touch $@

# ONNX and TensorRT for RTX, apart because they are large and neither the demo nor a robot needs them.
$(STAMPS)/requirements-export: requirements-export.txt $(STAMPS)/requirements
	$(call quietly,installing requirements for kp export,\
		$(CLEAN) $(VENV)/bin/python -m pip install -r requirements-export.txt)
	@touch $@

setup-export: setup $(STAMPS)/requirements-export

$(STAMPS)/kp_msgs: $(STAMPS)/requirements $(MESSAGES)
	$(call quietly,building kp_msgs,$(COLCON) build $(WORKSPACE) --packages-select kp_msgs --cmake-args \
		-DPython3_EXECUTABLE=$(VENV)/bin/python -DBUILD_TESTING=OFF \
		-DCMAKE_PROJECT_INCLUDE=$(CURDIR)/cmake/drop_missing_includes.cmake)
	@touch $@

$(STAMPS)/kp_frontend: $(STAMPS)/kp_msgs $(SOURCES)
	$(call quietly,building kp_frontend,$(COLCON) build $(WORKSPACE) --packages-select kp_frontend)
	@ln -sfn ../lib/kp_frontend/kp $(VENV)/bin/kp
	@touch $@

demo: setup
	@$(CLEAN) $(VENV)/bin/kp demo --out demo_out

test: setup
	@$(CLEAN) $(VENV)/bin/python -m pytest test -n 2 --dist loadfile $(PYTEST_ARGS)

colcon-test: setup
	@$(COLCON) test $(WORKSPACE) --packages-select kp_frontend kp_msgs $(COLCON_ARGS)
	@$(COLCON) test-result --test-result-base $(BUILD)/kp_frontend --all

lint: setup
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(CLEAN) $(VENV)/bin/mypy

gpu-check: setup
	@$(CLEAN) $(VENV)/bin/python bench/gpu_check.py --out gpu_check_out

bench: setup
	@$(CLEAN) $(VENV)/bin/kp bench

clean:
	rm -rf .venv .build demo_out gpu_check_out .pytest_cache .ruff_cache .mypy_cache .hypothesis build install log
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
