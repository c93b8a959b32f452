# novalet: see `make help`.
GO ?= go
# No stamp of the checkout: git refuses one that belongs to somebody else, as under sudo.
GOFLAGS += -trimpath -buildvcs=false
export CGO_ENABLED = 0
VERSION ?= 0.1.0
SHIM = engine/shim/novalet-shim
STATE ?= /srv/novalet-cloud
export STATE

.PHONY: help build shim install unit test lint fuzz race demo cloud cloud-down bench-boot bench-engine bench-image bench-load bench-network clean need-go test-bus test-cloud test-cloudimage test-net test-release test-sriov test-sriov-vm test-vm

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

need-go:
	@MAKECMDGOALS="$(MAKECMDGOALS)" sh tests/need-go.sh "$(GO)"

shim: need-go
	@$(GO) build $(GOFLAGS) -ldflags='-s -w' -o $(SHIM) ./cmd/novalet-shim

build: shim ## build bin/novalet, one static program
	@$(GO) build $(GOFLAGS) -tags shim -ldflags='-s -w -X main.version=$(VERSION)' -o bin/novalet ./cmd/novalet
	@echo "bin/novalet: $$(du -h bin/novalet | cut -f1), $$(bin/novalet version)"

install: build ## install the program, the unit and the completion on this host
	install -D -m 755 bin/novalet $(DESTDIR)/usr/bin/novalet
	install -D -m 644 configs/novalet.service $(DESTDIR)/lib/systemd/system/novalet.service
	install -d $(DESTDIR)/usr/share/bash-completion/completions
	bin/novalet completion bash >$(DESTDIR)/usr/share/bash-completion/completions/novalet

unit: need-go ## tests that need neither root nor network
	@tests/run.sh unit

test-bus: need-go ## the message bus against a RabbitMQ of its own, which is stopped and cut off, and oslo.messaging; needs root
	@tests/run.sh bus

test: need-go ## everything that CI runs; needs root
	@tests/run.sh all

lint: need-go ## gofmt, vet, staticcheck, shellcheck
	@tests/run.sh lint

race: need-go ## unit tests under the race detector
	@tests/run.sh race

fuzz: need-go ## every fuzz target, FUZZTIME each (default 20s)
	@tests/run.sh fuzz

demo: need-go ## boot two instances on this machine, without OpenStack (KEEP=1 leaves them)
	@tests/run.sh packages-demo
	@$(MAKE) --no-print-directory build
	@tests/images/demo.sh /var/cache/novalet/images
	@bin/novalet demo $(if $(KEEP),--keep) $(DEMO_ARGS)

cloud: need-go ## a real OpenStack on this machine with novalet as its compute service (RELEASE=, NET=)
	@devstack/install.sh
	@$(MAKE) --no-print-directory build
	@devstack/up.sh
	@devstack/try.sh

.PHONY: tempest tempest-smoke
tempest: need-go ## Tempest's compute and scenario tests against the cloud, brought up if there is none (SET=smoke|full)
	@devstack/install.sh
	@[ -x bin/novalet ] || $(MAKE) --no-print-directory build
	@tests/tempest/run.sh $(or $(SET),full) '$(REGEX)'

tempest-smoke: ## the part of it that CI runs
	@$(MAKE) --no-print-directory tempest SET=smoke

cloud-down: ## remove it without a trace
	@devstack/down.sh --wipe

test-cloud: need-go ## the tests against the cloud that is up
	@tests/run.sh cloud-tests

test-net: need-go ## the tests of networks on clouds of Neutron's other mechanisms (NET='ovs ovs-hybrid ovn', also macvtap), each brought up for them; needs root
	@tests/run.sh net

test-sriov: need-go ## the test of ports of vnic_type direct, on a cloud with a stand-in for the card, brought up for it; needs root
	@tests/run.sh sriov

test-sriov-vm: need-go ## the plugging of a card's virtual functions, on a card that QEMU emulates (no KVM needed); needs root
	@tests/run.sh sriov-vm

test-release: need-go ## tests on a cloud of the newest release (RELEASE=2026.2), brought up for them; needs root
	@tests/run.sh release

test-vm: need-go ## engine, demo and the installed unit on Debian's kernel, cgroup2 and systemd, in a virtual machine (no KVM needed); needs root
	@tests/run.sh vm

test-cloudimage: need-go ## one disk image boots in QEMU (no KVM needed) and here, and stays as it is; needs root
	@tests/run.sh cloudimage

bench-boot: build ## boots against stock nova-compute on the cloud that is up (ROUNDS=11)
	@devstack/compute.sh start stock stock1
	@NOVALET_CLOUD=$(STATE) $(GO) run ./tests/bench/boot $(if $(ROUNDS),-rounds $(ROUNDS)); rc=$$?; devstack/compute.sh stop stock stock1; exit $$rc

bench-engine: need-go ## containers against Debian's crun and runc (needs the packages crun, runc)
	@$(GO) run ./tests/bench/engine $(if $(ROUNDS),-rounds $(ROUNDS))

bench-image: need-go ## first and next use of an image against tar and umoci (needs mmdebstrap, umoci, skopeo, zstd, qemu-utils, 30 GB in /var/tmp) (ROUNDS=, TREE=)
	@$(GO) run ./tests/bench/image $(if $(ROUNDS),-rounds $(ROUNDS)) $(if $(TREE),-tree $(TREE))

bench-load: need-go ## 10,000 operations through one agent on the embedded controller: is it as small and quick as at first? (OPS=)
	@$(GO) run ./tests/bench/load $(if $(OPS),-ops $(OPS))

bench-network: need-go ## instances' data path against plain veth and NAT
	@$(GO) run ./tests/bench/network

clean: ## remove what was built
	rm -rf bin build $(SHIM)
