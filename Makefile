# Builds and installs outbox_relay as a Postgres extension, in the way of PGXS:
#
#   make && sudo make install                     for the Postgres of the pg_config in PATH
#   make PG_CONFIG=/usr/lib/postgresql/16/bin/pg_config
#
# Needs Rust, libclang and the server's headers; `scripts/setup` finds or installs everything but Rust.
# FEATURES="a b" adds cargo features. DESTDIR works. `make help` lists the rest.

EXTENSION := outbox_relay
PG_CONFIG ?= pg_config
CARGO     ?= cargo
FEATURES  ?=

INSTALL      := install
target_dir   := $(or $(CARGO_TARGET_DIR),target)
library      := $(target_dir)/release/lib$(EXTENSION).so

# The targets that need no Postgres must work without one.
ifneq ($(filter-out help clean sql demo test test-redis-versions test-postgres-versions test-assertions test-packages test-monitoring test-moving test-debezium test-examples deb dist image bench bench-quick chaos fuzz deny record-broadcaster site,$(or $(MAKECMDGOALS),all)),)
major := $(shell $(PG_CONFIG) --version 2>/dev/null | sed -nE 's/^PostgreSQL ([0-9]+).*/\1/p')
ifeq ($(major),)
$(error "$(PG_CONFIG)" is no working pg_config. Name one with PG_CONFIG=..., or let scripts/setup install Postgres and say where it is)
endif
ifeq ($(filter $(major),15 16 17 18),)
$(error $(PG_CONFIG) is of Postgres $(major); $(EXTENSION) supports 15 to 18. Name another with PG_CONFIG=...)
endif
pkglibdir         := $(shell $(PG_CONFIG) --pkglibdir)
sharedir          := $(shell $(PG_CONFIG) --sharedir)
includedir_server := $(shell $(PG_CONFIG) --includedir-server)
endif

# An absolute path: build scripts don't run here.
cargo_env     = PGRX_PG_CONFIG_PATH="$$(realpath -s "$$(command -v $(PG_CONFIG))")"
comma        := ,
empty        :=
space        := $(empty) $(empty)
features      = pg$(major)$(if $(strip $(FEATURES)),$(comma)$(subst $(space),$(comma),$(strip $(FEATURES))))

.PHONY: all sql install install-strip uninstall demo test test-redis-versions test-postgres-versions test-assertions test-packages test-monitoring test-moving test-debezium test-examples deb dist image lint bench bench-quick chaos fuzz deny record-broadcaster site clean help headers cargo

# Not the first target.
.DEFAULT_GOAL := all

# CREATE EXTENSION reads one script. The directory is a prerequisite too: its time changes when a part goes.
version     := $(shell sed -nE "s/^default_version = '(.*)'/\1/p" $(EXTENSION).control)
sql_script  := sql/$(EXTENSION)--$(version).sql
sql_parts   := $(sort $(wildcard sql/schema/*.sql))
$(sql_script): $(sql_parts) sql/schema
	@awk 'FNR == 1 && NR > 1 { print "" } { print }' $(sql_parts) >$@.part && mv $@.part $@

# What the library was built for: installing another one would keep the server from starting.
stamp := $(target_dir)/release/$(EXTENSION).built-for

all: headers cargo $(sql_script) ## build the extension (release)
	@rm -f "$(stamp)"
	$(cargo_env) $(CARGO) build --release --locked -p $(EXTENSION) --no-default-features --features $(features)
	@echo "$(features)" >"$(stamp)"

sql: $(sql_script) ## join the parts of the SQL script, sql/schema/
	@:

headers:
	@test -f "$(includedir_server)/postgres.h" || { \
	    echo "The server headers of Postgres $(major) are missing ($(includedir_server)/postgres.h)." >&2; \
	    echo "On Debian and Ubuntu: apt install postgresql-server-dev-$(major), or run scripts/setup." >&2; \
	    exit 1; }

cargo:
	@command -v $(firstword $(CARGO)) >/dev/null || { \
	    echo "$(firstword $(CARGO)) is not in the PATH of $$(id -un). Run make as the user who has Rust, and only then sudo make install." >&2; \
	    exit 1; }

# Builds only what is missing, since it often runs as another user.
install: $(sql_script) ## copy it into Postgres's directories (builds it first, if that was not done for this Postgres)
	@test -f "$(library)" && test "$$(cat "$(stamp)" 2>/dev/null)" = "$(features)" || $(MAKE) --no-print-directory all
	$(INSTALL) -d "$(DESTDIR)$(pkglibdir)" "$(DESTDIR)$(sharedir)/extension"
	$(INSTALL) -m 755 "$(library)" "$(DESTDIR)$(pkglibdir)/$(EXTENSION).so"
	$(INSTALL) -m 644 $(EXTENSION).control sql/$(EXTENSION)--*.sql "$(DESTDIR)$(sharedir)/extension/"

install-strip: install ## install it without debug symbols: a fifth of the size
	strip --strip-debug "$(DESTDIR)$(pkglibdir)/$(EXTENSION).so"

uninstall: ## remove it from Postgres's directories
	rm -f "$(DESTDIR)$(pkglibdir)/$(EXTENSION).so"
	rm -f "$(DESTDIR)$(sharedir)/extension/$(EXTENSION).control"
	rm -f "$(DESTDIR)$(sharedir)/extension/$(EXTENSION)"--*.sql

demo: ## show it at work on throwaway servers (KEEP=1 leaves them running)
	scripts/demo

test: ## run all tests on throwaway servers (TEST_ARGS=... are arguments of the runner)
	scripts/test

test-redis-versions: ## run the tests of Redis on Redis 6.2 and 8, Valkey 8 and 9 (fetched; VERSIONS=... selects)
	scripts/redis-versions $(VERSIONS)

test-postgres-versions: ## run all tests on Postgres 16, 17 and 18 (fetched; VERSIONS=... selects, SMOKE=1 runs the quick tests)
	scripts/postgres-versions $(VERSIONS)

test-assertions: ## run all tests on a Postgres with assertions (built from Debian's source package; TEST_ARGS=...)
	PG_CONFIG=$$(scripts/postgres-with-assertions) && export PG_CONFIG && scripts/test

test-packages: ## build each package, install, use and remove it (VERSIONS="16 17 18" adds majors, PARTS="deb dist" selects)
	scripts/test-packages $(PARTS)

deb: ## build Debian packages for each major whose headers are installed, and a source package: target/deb
	scripts/deb

dist: ## make the archive for PGXN: target/dist
	scripts/dist

image: ## build the extension image for CloudNativePG with the Postgres 18 of PG_CONFIG: target/image
	scripts/image

test-moving: ## move an application from django-broadcaster (of PyPI) and back, under load, while a consumer counts events
	scripts/test-moving

test-debezium: ## compare with Debezium (of PyPI, 200 MB; needs a JDK), and move an outbox table away from it under load
	scripts/test-debezium

test-monitoring: ## scrape a server with Debian's Prometheus and contrib/monitoring, and query every panel and alert
	scripts/test-monitoring

test-examples: ## run the projects of examples/ on throwaway servers (fetches packages; EXAMPLES="psycopg django" selects)
	scripts/test-examples $(EXAMPLES)

lint: headers ## check formatting, clippy, modules and their lengths, the SQL script and dependencies, as CI does
	$(CARGO) fmt --all --check
	$(cargo_env) $(CARGO) clippy --workspace --all-targets --locked --no-default-features --features $(features) -- -D warnings
	scripts/lint-structure
	scripts/lint-sql
	scripts/lint-version
	scripts/deny

bench: ## measure the figures of docs/performance.md, their floors and their rivals (BENCH_ARGS=... selects)
	scripts/bench $(BENCH_ARGS)

bench-quick: ## measure them with small numbers and without the rivals (ten minutes)
	scripts/bench --quick $(BENCH_ARGS)

chaos: ## break everything at random and check that nothing is lost or repeated (SEED=, MINUTES=, CHAOS_ARGS=...)
	scripts/chaos $(if $(SEED),--seed $(SEED)) $(if $(MINUTES),--minutes $(MINUTES)) $(CHAOS_ARGS)

fuzz: ## look for inputs that break the code of the protocol (FUZZ_SECONDS=60 is the time for each target)
	scripts/fuzz $(FUZZ_ARGS)

deny: ## check licences, sources and known vulnerabilities of dependencies (cargo-deny; fetches RustSec's database)
	scripts/deny --advisories

record-broadcaster: ## record what django-broadcaster writes, for the tests (fetches it from PyPI)
	@dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && python3 -m venv "$$dir" && \
	    "$$dir/bin/pip" install --quiet --disable-pip-version-check -r tests/django_broadcaster/requirements.txt && \
	    "$$dir/bin/python" tests/django_broadcaster/record.py

site: ## build the documents as a static site in target/site/html (fetches mkdocs-material and mermaid)
	scripts/site

clean: ## remove what was built
	$(CARGO) clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 29
