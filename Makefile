# umbra.mail: everything is run from here; `make` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

LAB  ?= demo#     name of the lab that `make lab` and `make demo` use
HOST ?= mail-a#   host that `make lab-shell` enters
SECONDS ?= 60#    how long `make fuzz` takes for each parser; KEEP=1 adds to the corpus
OPERATIONS ?= 2000#  how many `make model` makes; SEED=N makes the same again
FROM ?=#          the former version for `make upgrade`
TRIALS ?= 200#    how many `make faults` makes; SEED=N makes the same again, FAULT=NAME only that fault's
export LAB
export PATH := $(CURDIR)/.venv/bin:$(PATH)
lab := tests/lab/lab --name $(LAB)

.PHONY: help venv collection lab lab-shell lab-down demo test lint unit gates sanity integration faults faults-witness faults-three model upgrade from fuzz bench-transport bench-mailbox bench-failover changelog lock root

help: ## List the targets
	@awk -F ':.*## ' '/^##-/ { printf "\n%s\n", substr($$0, 6) } \
	    /^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

##-- The lab and the demo (root needed)
demo: root collection ## Build a lab, provision a pair, send real mail, move the primary there and back, report
	@tests/demo.sh

lab: root collection ## Bring the lab up, ready for playbooks
	@tests/lab/lab prerequisites && $(lab) up

lab-shell: root ## Look around on a lab host: make lab-shell HOST=mail-a
	@$(lab) shell $(HOST)

lab-down: root ## Remove the lab: no process, mount, namespace or interface stays
	@$(lab) down

##-- Tests
test: root collection ## Everything that CI runs, fast tests first
	@tests/lab/lab prerequisites
	@tests/run.py sanity lint unit gates lab integration faults witness

lint: collection ## ruff, mypy, yamllint, ansible-lint
	@tests/run.py lint

unit: collection ## Unit tests
	@tests/run.py unit

gates: collection ## What linters do not check: defaults against argument specs, documentation, names
	@tests/run.py gates

sanity: collection ## ansible-test sanity on the built collection
	@tests/run.py sanity

integration: root collection ## The molecule scenarios, one after the other, in a lab of their own
	@tests/lab/lab prerequisites
	@tests/run.py lab integration witness

faults: root collection ## Fault trials: load, one fault, every acknowledged message accounted for
	@tests/lab/lab prerequisites && tests/lab/lab --name faults up --disks mail-a,mail-b
	@tests/lab/lab --name faults control -- ansible-playbook -i inventories/lab umbra.mail.site
	@python -m tests.faults --lab faults --trials $(TRIALS) $(if $(SEED),--seed $(SEED)) \
	    $(if $(FAULT),--fault "$(FAULT)")
	@tests/lab/lab --name faults down

faults-witness: root collection ## The same where a witness decides and nobody moves a hand
	@tests/lab/lab prerequisites && tests/lab/lab --name faults up --disks mail-a,mail-b
	@tests/lab/lab --name faults control -- ansible-playbook -i inventories/lab umbra.mail.site \
	    -e replication_agent_coordinator=etcd -e replication_agent_failover_limit=1000 \
	    -e '{"replication_agent_client_probes": ["203.0.113.72"]}'
	@python -m tests.faults --lab faults --witness --trials $(TRIALS) $(if $(SEED),--seed $(SEED)) \
	    $(if $(FAULT),--fault "$(FAULT)") --output build/faults/witness.json
	@tests/lab/lab --name faults down

faults-three: root collection ## The same with three mail hosts at three sites
	@tests/lab/lab prerequisites && tests/lab/lab --name faults up --hosts mail-a,mail-b,mail-c,client
	@tests/lab/lab --name faults control -- ansible-playbook -i tests/integration/three/inventory umbra.mail.site \
	    -e replication_agent_coordinator=etcd -e replication_agent_failover_limit=1000
	@python -m tests.faults --lab faults --three --trials $(TRIALS) $(if $(SEED),--seed $(SEED)) \
	    $(if $(FAULT),--fault "$(FAULT)") --output build/faults/three.json
	@tests/lab/lab --name faults down

model: root collection ## Random mailbox operations, without and with faults: each OK is held against the shadow's disk
	@tests/lab/lab prerequisites && tests/lab/lab --name model up --disks mail-a,mail-b
	@tests/lab/lab --name model control -- ansible-playbook -i inventories/lab umbra.mail.site
	@tests/lab/lab --name model control -- python -m tests.model --operations $(OPERATIONS) $(if $(SEED),--seed $(SEED))
	@tests/lab/lab --name model control -- python -m tests.model --operations $(OPERATIONS) $(if $(SEED),--seed $(SEED)) \
	    --faults
	@tests/lab/lab --name model down

upgrade: root from collection ## From another version (FROM=COMMIT) to this one and back while mail flows
	@rm -rf build/former && git clone --quiet . build/former && git -C build/former checkout --quiet "$(FROM)"
	@$(MAKE) -C build/former collection
	@tests/lab/lab prerequisites && tests/lab/lab --name upgrade up --disks mail-a,mail-b
	@python -m tests.upgrade --lab upgrade --former build/former
	@tests/lab/lab --name upgrade down

from:
	@test -n "$(FROM)" || { echo "make upgrade: say from which version, FROM=COMMIT" >&2; exit 2; }

fuzz: venv ## The coverage-guided fuzzer on both parsers of the transport
	@python -m tests.fuzz.run --seconds $(SECONDS) $(if $(KEEP),--keep)

##-- Benchmarks (root needed)
bench-transport: root collection ## Plain Postfix, our milter and two peers: messages/s and latency, into build/bench/transport.json
	@tests/lab/lab prerequisites
	@python -m tests.bench.transport.run

bench-mailbox: root collection ## Dovecot alone, our mirror, Dovecot 2.3's replicator: latency, lag, growth, into build/bench/mailbox.json
	@tests/lab/lab prerequisites
	@python -m tests.bench.mailbox.run

bench-failover: root collection ## Lost hosts and switchovers, as clients outside see them, into build/bench/failover.json
	@tests/lab/lab prerequisites
	@python -m tests.bench.failover.run

##-- The collection
collection: venv ## Build the tarball (build/dist) and install it into build/collections, where playbooks run from
	@tests/tools/collection

venv: ## Make .venv from the locked requirements (PYTHON=python3.12 chooses another Python)
	@tests/tools/venv $(PYTHON)

changelog: venv ## Write CHANGELOG.md from changelogs/fragments
	@antsibull-changelog release --update-existing

lock: venv ## Lock requirements.in into requirements.txt again
	@python -m venv --clear build/lock && build/lock/bin/pip install --quiet uv
	@build/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate \
	    --upgrade requirements.in --output-file requirements.txt

root:
	@[ "$$(id -u)" = 0 ] || { echo "The lab needs root: run this with sudo." >&2; exit 2; }
