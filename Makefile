SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c

DEVICES  ?= 1000
BITS     ?= 3072
FUZZTIME ?= 30s
# Where the demo keeps the public-key directory.
DIRECTORY ?= file

STATICCHECK           := honnef.co/go/tools/cmd/staticcheck@v0.8.2
PROTOC_GEN_GO         := google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
PROTOC_GEN_CONNECT_GO := connectrpc.com/connect/cmd/protoc-gen-connect-go@v1.21.1

# A target's prerequisites come in their order also under make -j: the tools are installed before they are used.
.NOTPARALLEL:
DEPS := deps-build deps-demo deps-plugin deps-packages deps-bench deps-check deps-test deps-generate
.PHONY: help build man demo plugin install packages packages-test release reproducible vaultdev check test flaky \
	soak kills bench benchstat lint fuzz fuzz-plugin generate clean $(DEPS)

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# $(call go-build,WHAT,PACKAGES) builds into bin/. go build -v prints a line for each package that it
# compiles: those that are stale.
go-build = $(CURDIR)/scripts/step.sh -q \
	-n "$$(go list -trimpath -deps -f '{{if .Stale}}{{.ImportPath}}{{end}}' $(2) | wc -l) packages" \
	'building $(1)' go build -v -trimpath $(STAMP) -o $(CURDIR)/bin/ $(2)
# --version names the commit, if git can name it here, whatever GOFLAGS says.
STAMP := $(if $(shell git rev-parse HEAD 2>/dev/null),-buildvcs=true)

man: build ## bin/man: the manual pages; bin/completion: for bash, zsh and fish
	@mkdir -p bin/man bin/completion
	@for p in factory keysvc mesim; do \
		bin/$$p man >bin/man/$$p.1; \
		for s in bash zsh fish; do bin/$$p completion $$s >bin/completion/$$p.$$s; done; \
	done

build: deps-build ## bin/factory, bin/keysvc and bin/mesim
	@mkdir -p bin
	@$(call go-build,the programs,./cmd/...)

# DEVICES=1000, BITS=2048|3072|4096, DIRECTORY=file|vault
demo: deps-demo build $(if $(filter vault,$(DIRECTORY)),vaultdev) ## the whole flow on SoftHSM
	DEVICES=$(DEVICES) BITS=$(BITS) DIRECTORY=$(DIRECTORY) scripts/demo.sh

plugin: deps-plugin ## bin/kme.fdx, the extension of freeDiameter (FREEDIAMETER=PREFIX: of one that is not the system's)
	@mkdir -p bin
	$(MAKE) -C plugins/freediameter OUT=$(CURDIR)/bin

# DESTDIR= and PREFIX=/usr/local; docs/install.md says what follows.
install: ## what is built in bin/: programs, man pages, completion, units, users, sample configurations
	@DESTDIR="$(DESTDIR)" PREFIX="$(PREFIX)" scripts/install.sh bin

packages: deps-packages ## bin/packages: a .deb and a .rpm of keysvc, factory, mesim and kme.fdx, of the last commit
	@scripts/step.sh 'building the packages' scripts/release.sh bin/packages --programs

packages-test: deps-test ## the packages installed, upgraded, removed and purged, in a copy of this machine's files
	@scripts/step.sh 'the packages, installed, upgraded and removed' scripts/packages-test.sh

release: deps-packages ## bin/release: programs, kme.fdx, packages, archive, SBOM, SHA256SUMS of the last commit
	@scripts/step.sh 'building the release' scripts/release.sh bin/release

reproducible: deps-packages ## build the release twice, in two places and with empty caches, and compare all bytes
	@scripts/step.sh 'building the release twice' scripts/reproducible.sh

# A vault or bao that is on PATH is used. Vault's server, built from its own source, takes minutes the first time. It is
# a module of its own, so that none of it enters the product.
VAULT_SERVER := $(or $(shell command -v vault || command -v bao),bin/vaultdev)
vaultdev: deps-build $(filter bin/vaultdev,$(VAULT_SERVER)) ## a real Vault server: bin/vaultrun starts it
	@mkdir -p bin
	@$(call go-build,bin/vaultrun,./tools/vaultrun)
bin/vaultdev: $(wildcard tools/vaultdev/*.go) tools/vaultdev/go.mod tools/vaultdev/go.sum
	@mkdir -p bin
	@export GOWORK=off; cd tools/vaultdev && $(call go-build,a Vault server (minutes),.)

# For a package: a machine that is eight times slower than ours passes too.
TIMEOUT := 45m

# A test that needs one of these says so in its name.
SERVERS := Vault|Postgres|Browser|S6a
# These take seconds of CPU each, or tens of seconds in which no other test of their package runs. make check leaves
# them, and all on NSS softoken, to make test.
LONG := TestPageCommands TestDemo TestOpenSSLAgrees TestOutsideProgram TestSpy TestCheckDirectories TestPinnedTACs \
	TestPrometheus TestBackup TestProvisionDirectoryAway TestReconcile TestManyStarts \
	TestModel TestModelAtOnce TestProperty TestPropertyAtOnce TestMutatedPayloads TestMutatedMessages \
	TestRefusalsTakeAsLong TestKnownRefusalsTakeAsLong TestBoundRefusalsTakeAsLong TestMetricsAreNoOracle \
	TestRotated TestKilled TestNothingIsLeft TestRotation TestWycheproof TestAudit TestStations \
	TestReaderCacheBound TestRevocationsCacheBound TestRevocationsTooLarge TestRevocationsOfAMillion \
	TestWeaknesses TestWeakOperator TestWeakFactory TestSetupInterrupted TestNetworkHSM TestNothingIsLeftByAnOutage \
	TestReadingRests TestOverload TestReadersShareCache TestInstanceEnds TestUpgradeOnSQLite
# make check has these of TestScripts.
SHORT_SCRIPTS := line service version
LONG_SCRIPTS = $(call any-of,$(filter-out $(SHORT_SCRIPTS),$(basename $(notdir $(wildcard \
	cmd/testdata/script/*.txtar)))))
# The two runs are a partition: every test is in one of them.
LATER = $(SERVERS)|^($(call any-of,$(LONG)))$$|^TestScripts$$/^($(LONG_SCRIPTS))$$
LATER_PACKAGES = $(sort $(dir $(shell grep -rlE '^func (Test\w*($(SERVERS))|($(call any-of,$(LONG) TestScripts))\b)' \
	--include=*_test.go .)))
# Most tests wait for something most of the time: for a disk, a server, a time to pass. Lint has done go vet. The linker
# takes half as long without what debuggers read.
GO_TEST = go test -race -timeout $(TIMEOUT) -p $(shell expr 3 '*' "$$(nproc)") \
	-parallel $(shell expr 2 '*' "$$(nproc)") -vet=off -ldflags=-w
# openCryptoki's daemon needs root.
ROOT_ONLY := $(if $(filter-out 0,$(shell id -u)),|OpenCryptoki)

# What the run of an operator's side on a second token leaves out: tests that have SoftHSM's token all the same, need a
# factory's by way of the same module, or a security officer; what imitates a token that is far away or full; and those
# that NSS softoken fails, for a reason that docs/tokens.md has: it makes no second copy of a token key, either.
SOFTHSM_ONLY := Wycheproof ACVP Attributes Sides UnwrapTemplates WhatLeaves Renew Pool OpenRefuses FunctionList \
	EnrolRefuses Officer TestGivenUp$$ GivenUpHandle KWPByEitherName TestWeak TrialsOf RemoteKilled \
	KnownRefusalsTakeAsLong Rotated ResealDamaged RememberLotKeys \
	CallsAndDepth NetworkHSM TestLimits LeftInABusySession FullToken AtAnyMoment
empty :=
any-of = $(subst $(empty) ,|,$(strip $(1)))

# go test begins with what comes first: the packages that take longest, so that none of them runs alone in the end.
LONGEST := ./internal/proof ./binding/sqlstore ./binding ./cmd ./directory ./internal/faultmodule ./vaultstore \
	./factory/station ./hsmkeys ./internal/postgres

check: lint deps-check ## lint, and the short tests that need no Vault, PostgreSQL, browser or Diameter
	@$(if $(ROOT_ONLY),echo 'TestDoctorOnOpenCryptoki is left out: only root can run it')
	@scripts/step.sh 'short tests without servers' scripts/leaves-nothing.sh \
		$(GO_TEST) -skip '$(LATER)$(ROOT_ONLY)' $(LONGEST) work

# What cuts networks needs network namespaces. Where there are none, make test leaves it out, and says so in the end.
NO_NETWORKS = $(shell unshare --net true 2>/dev/null || echo CutOff)
LONG_TESTS = $(GO_TEST) -run '$(LATER)' $(NO_NETWORKS:%=-skip %) $(LONGEST) $(LATER_PACKAGES)
NSS_TESTS = KMEHSM_TEST_OPERATOR=nss $(GO_TEST) -skip '$(SERVERS)|$(call any-of,$(SOFTHSM_ONLY))' \
	./binding ./hsmkeys/... ./internal/faultmodule
# What the packages are made of, and the page that their test follows.
PACKAGED = git ls-tree -r HEAD | grep -vE '_test\.go$$|/testdata/|[[:space:]](docs|policies|tools|\.ci)/'; \
	git rev-parse HEAD:docs/install.md
test: check deps-test vaultdev ## what CI runs: check, and all other tests
	@scripts/step.sh "long tests, those with servers, and an operator's side on NSS softoken" \
		scripts/leaves-nothing.sh scripts/together.sh "$(LONG_TESTS)" "$(NSS_TESTS)"
	@scripts/once.sh model "$$(spin -V; gcc --version; cat docs/model/binding.pml scripts/model.sh)" \
		scripts/step.sh 'the model of a binding, by spin' scripts/model.sh
	@scripts/once.sh reproducible "$$(go version; gcc --version; $(PACKAGED))" \
		scripts/step.sh 'the release, linked twice' scripts/reproducible.sh --warm
	@if unshare --mount true 2>/dev/null; then \
		exec scripts/once.sh packages "$$(go version; gcc --version; $(PACKAGED))" \
			scripts/step.sh 'the packages, installed, upgraded and removed' scripts/packages-test.sh; \
	else \
		echo 'the packages are not installed: it needs root, and the right to mount'; \
	fi
	@cd tools/sbom && GOWORK=off exec ../../scripts/step.sh 'the check of SBOMs' go test .
	$(MAKE) fuzz-plugin-seeds
	@$(if $(NO_NETWORKS),echo 'NO NETWORK WAS CUT: only root can run the tests whose names end with CutOff' >&2)

# It goes on where it ended, and says how long that will take. Results are in var/flaky. It leaves out what only root
# can run, as make test does.
LEFT_OUT = $(call any-of,$(ROOT_ONLY:|%=%) $(NO_NETWORKS))
flaky: deps-test vaultdev ## the tests N=20 times with every core busy, and once with GOMAXPROCS=1
	$(if $(LEFT_OUT),ARGS="$${ARGS:-} -test.skip=$(LEFT_OUT)") N=$(or $(N),20) \
		PACKAGES="$(or $(PACKAGES),$(LONGEST) work)" scripts/flaky.sh

soak: deps-test vaultdev ## a year in an hour: var/soak (STORE=sqlite|postgres BINDINGS=10000000 DURATION=1h SEED=n)
	STORE=$(STORE) BINDINGS=$(BINDINGS) DURATION=$(DURATION) SEED=$(SEED) scripts/soak.sh

# 200 random kill -9 of factory and Vault over a lot of 20,000 devices; 200 of keysvc and PostgreSQL; an HSM away for
# 10 s; 10,000 attaches over S6a, with a tenth of all answers lost.
kills: deps-test vaultdev ## the long tests: kill -9, outages and lost answers, over and over
	KMEHSM_SOAK=1 go test -count=1 -timeout 60m -run KilledWhilePublishing -v ./internal/proof
	KMEHSM_SOAK=1 go test -count=1 -timeout 100m -run TestS6aChaos -v ./internal/proof
	KMEHSM_SOAK=1 go test -count=1 -timeout 60m -run 'Killed|TestMutated' -v ./binding
	KMEHSM_SOAK=1 go test -count=1 -timeout 20m -run 'TestOutage|TestRemoteKilled' -v ./internal/faultmodule

# ONLY=attach,rpc measures these parts, and keeps the others of bench.json; BITS=2048 measures one size. PAIRS=6 and
# SECONDS_EACH=2 say how often and how long.
bench: deps-bench build vaultdev ## how near all is to the bare token, in ten minutes: var/bench/bench.json (ONLY=PARTS)
	go build -trimpath $(STAMP) -o bin/ ./tools/bench
	scripts/bench.sh

benchstat: deps-demo ## the hot paths at revision BASE=HEAD~1 and now, compared by benchstat (COUNT=6)
	BASE=$(or $(BASE),HEAD~1) COUNT=$(or $(COUNT),6) scripts/benchstat.sh

# staticcheck.conf has what staticcheck looks for. go fix shows where newer Go says the same in less. With -trimpath,
# they read what the programs are linked from, instead of compiling it once more.
lint: export GOFLAGS := $(GOFLAGS) -trimpath
lint: deps-check ## gofmt, go vet, go fix, staticcheck, shellcheck and the width of lines
	@scripts/widths.sh
	@scripts/step.sh 'go fix' go fix -diff work
	@unformatted=$$(gofmt -l .); [ -z "$$unformatted" ] || \
		{ printf 'run gofmt -w on:\n%s\n' "$$unformatted" >&2; exit 1; }
	@scripts/step.sh 'go vet' go vet work
	@scripts/step.sh staticcheck go run $(STATICCHECK) work
	shellcheck *.sh scripts/*.sh .ci/run

# go test takes one fuzz target of one package at a time.
fuzz: deps-test fuzz-plugin ## every fuzz target for FUZZTIME=30s
	@go list -f '{{.ImportPath}} {{.Dir}}' work | while read -r pkg dir; do \
		for target in $$(grep -hoE '^func Fuzz[A-Za-z0-9_]*' "$$dir"/*_test.go 2>/dev/null | cut -c 6-); do \
			echo "$$pkg $$target"; \
			go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) "$$pkg" </dev/null || exit; \
		done; \
	done

PLUGIN_FUZZER = bin/fuzz-plugin/fuzz -dict=plugins/freediameter/test/fuzz.dict -print_final_stats=1 -verbosity=0 \
	-artifact_prefix=bin/fuzz-plugin/
fuzz-plugin: bin/fuzz-plugin/fuzz # kme.fdx's, by libFuzzer
	@mkdir -p bin/fuzz-plugin/corpus
	@scripts/step.sh 'fuzzing kme.fdx' $(PLUGIN_FUZZER) -max_total_time=$(FUZZTIME:s=) bin/fuzz-plugin/corpus
fuzz-plugin-seeds: bin/fuzz-plugin/fuzz # always the same inputs
	@scripts/once.sh fuzz-plugin "$$(cat $< plugins/freediameter/test/fuzz.dict | sha256sum)" \
		scripts/step.sh 'fuzzing kme.fdx' $(PLUGIN_FUZZER) -seed=1 -runs=1000000
.PHONY: bin/fuzz-plugin/fuzz fuzz-plugin-seeds
bin/fuzz-plugin/fuzz: deps-test
	@mkdir -p bin/fuzz-plugin
	@$(MAKE) -C plugins/freediameter OUT=$(CURDIR)/bin/fuzz-plugin $(CURDIR)/$@

generate: deps-generate ## the Go code of api/kme/v1
	GOBIN="$(CURDIR)/bin/tools" go install $(PROTOC_GEN_GO)
	GOBIN="$(CURDIR)/bin/tools" go install $(PROTOC_GEN_CONNECT_GO)
	PATH="$(CURDIR)/bin/tools:$$PATH" protoc --proto_path=api \
		--go_out=api --go_opt=paths=source_relative \
		--connect-go_out=api --connect-go_opt=paths=source_relative \
		api/kme/v1/*.proto

# Only what make itself has made: below var/ there are also tokens and journals, and with them keys.
clean: ## remove bin/ and var/demo/
	rm -rf bin var/demo

$(DEPS): deps-%:
	@scripts/deps.sh $*
