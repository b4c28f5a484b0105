# shellcheck shell=sh
# Sourced by every script that calls cargo, and by developers' shells (bash, zsh or plain sh):
#   . dev/lib/env.sh
# Cargo rebuilds everything when the flags differ between two calls, so the flags are chosen here and nowhere else.
# mold links several times faster than ld, but a machine without it must still build.
if [ -z "${RUSTFLAGS+set}" ] && command -v mold >/dev/null 2>&1; then
  export RUSTFLAGS="-C link-arg=-fuse-ld=mold"
fi
if ! command -v cargo >/dev/null 2>&1 && [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ]; then
  export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
fi
