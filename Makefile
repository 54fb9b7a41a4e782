# imgfs: every image of every registry is a directory.
#
#   make run     build, mount at /mnt/images, show a first listing
#   make test    install what the tests need, run them all
#   make help    the other targets

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build
MAKEFLAGS += --no-print-directory

GO ?= go
MOUNT ?= /mnt/images
PREFIX ?= /usr/local
DESTDIR ?=
IMAGE ?= debian/stable-slim
FUZZTIME ?= 60s
BENCHTIME ?= 1s
# make bench: which benchmarks, images, links and sides, all when empty; how often each side runs.
BENCH ?=
IMAGES ?=
LINKS ?=
SIDES ?=
RUNS ?= 3
# The rooms: packages that are tested without a mount of the built binary.
rooms = $(shell $(GO) list ./... | grep -v /integration)

# Mounting and unpacking take root; the files that root's build makes stay apart.
ASROOT := $(shell [ "$$(id -u)" = 0 ] || echo 'sudo -E env "PATH=$(PATH)" GOCACHE=/var/tmp/imgfs-root-cache')

.PHONY: help build install man run umount deps check lint test unit integration race bench benchdeps roombench faults fuzz clean

help: ## say what each target does
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

build: ## bin/imgfs
	$(GO) build -trimpath -o bin/imgfs ./cmd/imgfs

man: build ## docs/man, from the help texts
	rm -rf docs/man
	bin/imgfs man docs/man

install: build ## the binary, mount(8)'s helper, man pages and completions, below PREFIX=/usr/local
	install -D -m 755 bin/imgfs $(DESTDIR)$(PREFIX)/bin/imgfs
	install -d $(DESTDIR)/sbin $(DESTDIR)$(PREFIX)/share/man/man1
	ln -sf $(PREFIX)/bin/imgfs $(DESTDIR)/sbin/mount.fuse.imgfs
	install -m 644 docs/man/*.1 $(DESTDIR)$(PREFIX)/share/man/man1
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions $(DESTDIR)$(PREFIX)/share/zsh/site-functions
	bin/imgfs completion bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/imgfs
	bin/imgfs completion zsh > $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_imgfs

run: ## install what is missing, build, mount at MOUNT=/mnt/images, list an image
	@scripts/need.sh fusermount3=fuse3
	@command -v $(GO) >/dev/null || { echo "make: Go is missing; see https://go.dev/dl/"; exit 1; }
	@$(MAKE) build
	@scripts/run.sh bin/imgfs $(MOUNT) $(IMAGE)

umount: ## undo make run
	@scripts/asroot.sh bin/imgfs umount $(MOUNT)

deps: ## install what the tests need (Debian, Ubuntu)
	@scripts/need.sh docker-registry=docker-registry umoci=umoci skopeo=skopeo debootstrap=debootstrap \
		fusermount3=fuse3 getfattr=attr setfacl=acl zstd=zstd gcc=gcc git=git

lint: ## gofmt, vet, staticcheck, the import diagram
	@unformatted="$$(gofmt -l $$(git ls-files '*.go'))"; if [ -n "$$unformatted" ]; then echo "gofmt -w $$unformatted"; exit 1; fi
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	$(GO) test -count=1 -run '^TestRooms' ./integration/

unit: ## the rooms' own tests, with -race, and again on one processor
	$(GO) test -race -timeout 20m $(rooms)
	GOMAXPROCS=1 $(GO) test -count=1 -timeout 20m $(rooms)

check: lint unit ## everything that needs no registry and no root

integration: deps ## the built binary against real registries and real images
	$(ASROOT) $(GO) test -count=1 -timeout 25m ./integration/

race: deps ## the integration tests against a server built with -race
	$(ASROOT) env IMGFS_TEST_RACE=1 $(GO) test -count=1 -timeout 25m -run '^Test(ReadersTogether|Sharing|Progressive|Hostile|DirectoryOperations)' ./integration/

test: deps lint unit race integration ## what continuous integration runs

bench: deps benchdeps ## imgfs beside its peers, and docs/benchmarks.md from that: hours, or BENCH=Cold IMAGES=python LINKS=1G RUNS=1
	$(ASROOT) env IMGFS_BENCH=$(CURDIR)/bin/bench IMGFS_BENCH_IMAGES='$(IMAGES)' IMGFS_BENCH_LINKS='$(LINKS)' IMGFS_BENCH_SIDES='$(SIDES)' \
		IMGFS_BENCH_RUNS=$(RUNS) $(GO) test -count=1 -timeout 10h -v -run '^TestBench($(or $(BENCH),.*)|ZPage)' ./integration/

benchdeps:
	@scripts/need.sh containerd=containerd runc=runc mkfs.erofs=erofs-utils gnuplot=gnuplot-nox curl=curl

faults: deps ## the table of what a registry may do, and what is seen of it
	$(ASROOT) env IMGFS_TEST_LONG=1 $(GO) test -count=1 -timeout 20m -v -run '^TestFaults$$' ./integration/

roombench: ## benchmarks of all rooms; compare two outputs with: go tool benchstat OLD NEW
	$(GO) test -run '^$$' -bench . -benchmem -benchtime $(BENCHTIME) $(rooms)

fuzz: ## each fuzzer for FUZZTIME=60s
	@scripts/fuzz.sh $(FUZZTIME)

clean: ## remove what was built; the corpus of the tests stays in the user's cache directory
	rm -rf bin
	$(GO) clean -testcache
