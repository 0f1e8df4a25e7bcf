# shellcheck shell=bash
# For scripts that make what is released (source it): the version, its time and its files.

version=$(sed -nE '/^\[workspace.package\]/,/^\[/s/^version = "(.*)"/\1/p' Cargo.toml)
# The same files must make the same packages.
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct 2>/dev/null || date +%s)

# Writes the files that git tracks, with uncommitted changes, and the SQL script as a tar file below the path $1;
# further arguments go to git archive.
released_files() {
    local tree
    git rev-parse --git-dir >/dev/null || { echo "This needs a git checkout, which tells the files to package" >&2; return 1; }
    # Otherwise `git stash create` fails where a file was touched but not changed.
    git update-index -q --refresh >&2 || true
    tree=$(git stash create)
    [[ -z $tree ]] || echo "(with uncommitted changes)" >&2
    make --no-print-directory sql >&2
    local script=() name=sql/outbox_relay--$version.sql
    [[ -n $(git ls-files "$name") ]] || script=(--prefix="$1sql/" --add-file="$name")
    # A zip file has local times.
    TZ=UTC git archive "${script[@]}" --prefix="$1" "${@:2}" "${tree:-HEAD}"
}
