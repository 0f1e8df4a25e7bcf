# shellcheck shell=bash
# For scripts that need a bare Debian (source it): a tree made by debootstrap, with this machine's network. Needs root.

# Makes tree $2 of Debian's suite $1, with only sudo and certificates added; packages that are installed there start no
# server.
make_debian_tree() {
    command -v debootstrap >/dev/null || apt-get -o DPkg::Lock::Timeout=120 install -y -qq --no-install-recommends debootstrap >/dev/null
    debootstrap --variant=minbase --include=ca-certificates,sudo "$1" "$2" http://deb.debian.org/debian >"$2.log" || { tail "$2.log" >&2; return 1; }
    cp -L /etc/resolv.conf /etc/hosts "$2/etc/"
    cp -L /etc/ssl/certs/ca-certificates.crt "$2/etc/ssl/certs/"
}

# Runs a command in tree $1, in namespaces that end with it and take all mounts and processes along. The Rust toolchain
# is at /opt/rust, read-only.
in_tree() {
    local toolchain
    toolchain=$(rustc --print sysroot)
    mkdir -p "$1/opt/rust"
    unshare --mount --pid --fork --kill-child bash -euc '
        mount --make-rprivate /
        # The root is a mount, as on a machine: otherwise a mount namespace within it fails.
        mount --bind "$1" "$1"
        mount -t proc proc "$1/proc"
        mount --rbind /dev "$1/dev"
        mount --bind -o ro "$2" "$1/opt/rust"
        exec chroot "$1" "${@:3}"' - "$1" "$toolchain" "${@:2}" </dev/null
}

# Installs packages in tree $1.
apt_in_tree() {
    printf '#!/bin/sh\nexit 101\n' >"$1/usr/sbin/policy-rc.d"
    chmod 755 "$1/usr/sbin/policy-rc.d"
    in_tree "$1" apt-get update -qq &&
        in_tree "$1" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${@:2}" >"$1.log" 2>&1 ||
        { tail "$1.log" >&2; return 1; }
}
