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

.PHONY: test test-long lint fmt
test: ## all checks and tests, against real servers, which are stopped afterwards: KEEP=1 keeps them
	@dev/test all $(if $(KEEP),--keep)

test-long: ## what takes longer: the chart, the API description at length, the soak
	@dev/test long $(if $(KEEP),--keep)

lint: ## rustfmt, clippy, shellcheck and cargo-deny
	@dev/test lint

fmt: ## format the Rust code
	@$(CARGO) fmt --all

.PHONY: soak
soak: ## everything at once while things fail, and what must hold: MINUTES=10 SEED=1
	@dev/setup --test && SOAK_SECONDS=$$(( $(or $(MINUTES),10) * 60 )) SOAK_SEED=$(SEED) \
	$(CARGO) test --test it soak::whatever -- --nocapture

.PHONY: dlq bench docs
dlq: ## list the dead letters of the stack that runs
	@servers=$$(dev/stack env) && eval "$$servers" && export POSTRIDER_KAFKA__BROKERS="$${POSTRIDER_KAFKA__BROKERS:-$$KAFKA_BROKERS}" && \
	$(CARGO) run -q --profile quick --bin postrider -- dlq list

bench: ## measure; results go to bench/results: WHAT="feed feed-growth"
	@dev/setup --bench && bench/run $(WHAT)

docs: ## write the generated parts of the documentation
	@$(CARGO) run -q -- docs && dev/chart docs

.PHONY: image kind-up kind-down deploy e2e rights chart
image: ## the container image, as postrider:dev, with Docker or without
	@dev/image --size

kind-up: ## a cluster in Docker, with what postrider needs (kind, kubectl, helm)
	@kind get clusters 2>/dev/null | grep -qx postrider || kind create cluster --config kind-config.yaml --wait 120s
	@kubectl --context kind-postrider apply --kustomize k8s/kind
	@for what in statefulset/kafka statefulset/postgres deployment/redis; do \
	kubectl --context kind-postrider rollout status $$what --timeout 300s || exit 1; done
	@kubectl --context kind-postrider wait --for=condition=Complete job/kafka-topic --timeout 300s

kind-down: ## remove that cluster with everything in it
	@kind delete cluster --name postrider

deploy: ## build the image and install or upgrade the chart in that cluster
	@dev/image && kind load docker-image postrider:dev --name postrider
	@helm --kube-context kind-postrider upgrade --install postrider charts/postrider --values charts/postrider/ci/kind-values.yaml --wait --timeout 300s
	@kubectl --context kind-postrider rollout restart deployment --selector app.kubernetes.io/instance=postrider >/dev/null
	@kubectl --context kind-postrider rollout status deployment --selector app.kubernetes.io/instance=postrider --timeout 300s

e2e: ## deploy in anger, on the cluster of KUBECONFIG or on one of ../shared/kube
	@tests/e2e/run

rights: ## run each role with the rights that the chart gives it, on a broker with ACLs
	@tests/chart/rights

chart: ## write what is generated of the chart, and check all of it
	@dev/chart docs && dev/chart check

.PHONY: clean
clean: ## stop the stack, delete its data and all build output
	@dev/stack wipe
	@$(CARGO) clean
