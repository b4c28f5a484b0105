# shellcheck shell=sh
# Every script that calls cargo sources this file. Source it in your own shell as well (bash, zsh or plain sh):
#   . dev/lib/env.sh
# Cargo rebuilds everything if the flags differ between two calls, so only this file sets them. mold links several times
# faster than ld, but a machine without mold must still be able to build.
if [ -z "${RUSTFLAGS+set}" ] && command -v mold >/dev/null 2>&1; then
  export RUSTFLAGS="-C link-arg=-fuse-ld=mold"
fi
if ! command -v cargo >/dev/null 2>&1 && [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ]; then
  export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
fi
