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

.PHONY: dlq bench docs
dlq: ## list the dead letters (not there yet)
	@echo "make dlq: the command \`postrider dlq list\` is not there yet" >&2; exit 1

bench: ## measure; results go to bench/results
	@dev/setup --bench && bench/run

docs: ## write the generated parts of the documentation
	@$(CARGO) run -q -- docs

.PHONY: clean
clean: ## stop the stack, delete its data and all build output
	@dev/stack wipe
	@$(CARGO) clean
