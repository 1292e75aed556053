# Q-IPsec. `make help` lists what a person wants; README.md explains it.
SHELL := /bin/bash
BIN := bin
GOTOOL := go tool -modfile=scripts/tools/go.mod

.PHONY: help build testtools testplugin plugin demo demo-stage1 lab lab-down testbed testbed-shell testbed-down test check fuzz bench soak clean

help: ## this list
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' Makefile

build: ## the programs, into bin/
	@mkdir -p $(BIN)
	@CGO_ENABLED=0 go build -trimpath -o $(BIN)/ ./cmd/qipsecd ./cmd/qkdsim ./cmd/qipsec

testtools: # what the scenarios run besides
	@mkdir -p $(BIN)
	@CGO_ENABLED=0 go build -trimpath -o $(BIN)/ ./testenv/fakekme ./testenv/ivcheck ./testenv/memscan ./testenv/mitm ./testenv/plugproxy ./testenv/rekeyer ./testenv/testrun ./testenv/udpnum

testplugin: # a plugin that leaves charon's add_sa alone, for testenv/secrets.sh
	@CHARON_PLUGIN_DEFINES=-DQI_TEST_NO_ADD_SA scripts/charon-plugin.sh $(BIN)/no-add-sa

plugin: ## charon's qipsec plugin, into bin/
	@scripts/deps.sh build tunnel
	@scripts/charon-plugin.sh $(BIN)

demo: ## the main job: two gateways, one tunnel keyed by QKD keys, every step observed
	@scripts/deps.sh build tunnel
	@$(MAKE) --no-print-directory build plugin
	@TESTENV_OUT=out/demo testenv/run testenv/demo.sh

demo-stage1: build ## the paper's stage 1, seven steps, no IPsec, no root
	@scripts/demo-stage1.sh

lab: build ## two QKMS nodes on loopback for anyone who wants the key API, no root
	@scripts/lab.sh up

lab-down: ## stop the lab
	@scripts/lab.sh down

testbed: ## the two gateways of the demo stay up until testbed-down
	@scripts/deps.sh build tunnel
	@$(MAKE) --no-print-directory build plugin
	@scripts/testbed.sh up

testbed-shell: ## a shell on a gateway of the testbed: NODE=a or NODE=b
	@scripts/testbed.sh shell $(NODE)

testbed-down: ## stop the testbed
	@scripts/testbed.sh down

test: ## every test
	@scripts/deps.sh build tunnel plugincheck test
	@$(MAKE) --no-print-directory build testtools plugin testplugin check
	@scripts/test.sh

check: ## gofumpt, go vet, staticcheck
	@fmt="$$($(GOTOOL) gofumpt -l cmd conf ike kms qkdsim sad testenv)"; [ -z "$$fmt" ] || { echo "gofumpt would change: $$fmt"; exit 1; }
	@go vet ./...
	@$(GOTOOL) staticcheck ./...

fuzz: ## each fuzz target for FUZZTIME (10s)
	@scripts/fuzz.sh

bench: build ## the table of measurements, each row beside its reference
	@scripts/bench.sh

soak: ## the tests with full counts; COUNT and SEED override, PART names one
	@scripts/deps.sh build tunnel
	@$(MAKE) --no-print-directory build testtools plugin
	@scripts/soak.sh

clean: ## remove what was built
	@rm -rf $(BIN) out
