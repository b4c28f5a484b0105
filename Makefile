# `make` lists the targets. The work is done by the scripts in dev/ and bench/, which take options.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# One place decides the flags of every cargo call: other flags would make cargo rebuild everything.
CARGO := . dev/lib/env.sh && cargo

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run run-api run-processor run-relay
run: ## start Kafka, Redis, Postgres and postrider with all roles; Ctrl-C stops all of it
	@dev/run --role all

run-api: ## only the api role, on the stack that runs or a new one
	@dev/run --role api

run-processor: ## only the processor role
	@dev/run --role processor

run-relay: ## only the relay role
	@dev/run --role relay

.PHONY: infra infra-down
infra: ## start Kafka, Redis and Postgres, and leave them up
	@dev/setup && dev/stack up && dev/stack env

infra-down: ## stop them; data is kept (`dev/stack wipe` deletes it)
	@dev/stack down

.PHONY: test lint fmt
test: ## all checks and tests, against real servers
	@dev/test all

lint: ## rustfmt, clippy and shellcheck
	@dev/test lint

fmt: ## format the Rust code
	@$(CARGO) fmt

.PHONY: soak
soak: ## everything at once while things fail, and what must hold: MINUTES=10 SEED=1
	@dev/setup --test && $(CARGO) build --bin postrider && SOAK_SECONDS=$$(( $(or $(MINUTES),10) * 60 )) SOAK_SEED=$(SEED) \
	cargo test --test it soak::whatever -- --nocapture

.PHONY: dlq bench docs
dlq: ## list the dead letters of the stack that runs
	@servers=$$(dev/stack env) && eval "$$servers" && export POSTRIDER_KAFKA__BROKERS="$${POSTRIDER_KAFKA__BROKERS:-$$KAFKA_BROKERS}" && \
	$(CARGO) run -q --release --bin postrider -- dlq list

bench: ## measure; results go to bench/results
	@dev/setup --bench && bench/run

docs: ## write the generated parts of the documentation
	@$(CARGO) run -q -- docs

.PHONY: clean
clean: ## stop the stack, delete its data and all build output
	@dev/stack wipe
	@$(CARGO) clean
