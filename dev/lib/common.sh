# shellcheck shell=bash
# Helpers shared by the scripts in dev/: messages, deadlines, locks, ports and child processes.

# Shared by all stacks of this user: jars, templates, port reservations.
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/postrider

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

now_ms() { local t=${EPOCHREALTIME/[.,]/}; echo "${t%???}"; }
# seconds_since START_MS: "1.2"
seconds_since() { local d=$(($(now_ms) - $1)); printf '%d.%d' $((d / 1000)) $((d % 1000 / 100)); }

# await SECONDS COMMAND...: repeats COMMAND until it succeeds; 1 when the time is over.
await() {
  local until=$(($(now_ms) + $1 * 1000))
  shift
  while ! "$@"; do
    (($(now_ms) < until)) || return 1
    sleep 0.03
  done
}

# lock FILE SECONDS: holds FILE until the script or subshell ends; children started by `launch` do not inherit it.
lock() {
  mkdir -p "$(dirname "$1")"
  local fd
  exec {fd}>>"$1"
  flock -w "$2" "$fd" || die "another process has held $1 for $2 s"
}

as_root() {
  if ((EUID == 0)); then "$@"; else sudo "$@"; fi
}

# --- ports ---------------------------------------------------------------------------------------------------------

listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# listening_ports: all ports in LISTEN state, one per line, without starting ss.
listening_ports() {
  local hex
  cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | awk '$4 == "0A" { n = split($2, a, ":"); print a[n] }' | sort -u |
    while read -r hex; do echo $((16#$hex)); done
}

# next_free_port FROM: the first port from FROM on that nobody listens on.
next_free_port() {
  local taken port=$1
  taken=" $(listening_ports | tr '\n' ' ') "
  while [[ $taken == *" $port "* ]]; do port=$((port + 1)); done
  echo "$port"
}

# reserve_ports OWNER NAME...: prints "NAME=PORT" lines. A port is reserved for the folder OWNER in the cache, so that a
# stack that is down does not lose its ports to a second one. They lie below the kernel's ephemeral range (32768 and up).
reserve_ports() (
  local owner=$1 taken port file name
  shift
  lock "$CACHE/ports.lock" 30
  mkdir -p "$CACHE/ports"
  taken=" $(listening_ports | tr '\n' ' ') "
  for name in "$@"; do
    while :; do
      port=$((20000 + (RANDOM << 15 | RANDOM) % 12000))
      [[ $taken == *" $port "* ]] && continue
      file=$CACHE/ports/$port
      # A reservation whose folder is gone has lapsed.
      [[ -e $file && -d $(<"$file") ]] && continue
      break
    done
    echo "$owner" >"$file"
    taken+="$port "
    echo "$name=$port"
  done
)

# release_ports: gives the ports of $STATE back.
release_ports() {
  local number
  [[ -e $STATE/ports ]] || return 0
  while IFS='=' read -r _ number; do rm -f "$CACHE/ports/$number"; done <"$STATE/ports"
}

# --- child processes -----------------------------------------------------------------------------------------------
# A pid file holds "PID START": the start time tells our process from a later one that was given the same id.

start_time_of() {
  local stat
  { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 1
  stat=${stat##*) }
  # shellcheck disable=SC2086
  set -- $stat
  [[ $1 != Z && $1 != X ]] || return 1
  echo "${20}"
}

# pid_of SERVICE: its process id; 1 when it does not run.
pid_of() {
  local pid start
  { read -r pid start <"$STATE/pids/$1"; } 2>/dev/null || return 1
  [[ -n $start && $(start_time_of "$pid") == "$start" ]] || return 1
  echo "$pid"
}
running() { pid_of "$1" >/dev/null; }

# launch SERVICE COMMAND...: starts COMMAND in a session of its own, with its output in the service's log and none of our
# file descriptors (else a reader of our output, or a lock, would wait for it).
launch() {
  local service=$1 pid fd
  shift
  mkdir -p "$STATE/pids" "$STATE/logs"
  (
    for fd in /proc/self/fd/*; do
      fd=${fd##*/}
      if ((fd > 2)); then eval "exec $fd>&-" 2>/dev/null || true; fi
    done
    cd /
    exec setsid "$@" </dev/null >>"$STATE/logs/$service.log" 2>&1
  ) &
  pid=$!
  echo "$pid $(start_time_of "$pid" || true)" >"$STATE/pids/$service"
}

children_of() { cat "/proc/$1/task/$1/children" 2>/dev/null || true; }

# signal_all SIGNAL SERVICE: to the process and its direct children (Postgres' backends).
signal_all() {
  local pid
  pid=$(pid_of "$2") || return 0
  # shellcheck disable=SC2046
  kill "-$1" "$pid" $(children_of "$pid") 2>/dev/null || true
}

# gone PID: nothing of it runs. A killed process is a zombie as soon as its first thread has ended; until the last one has, it
# goes on holding its ports and locks.
gone() {
  [[ -d /proc/$1 ]] || return 0
  start_time_of "$1" >/dev/null && return 1
  local threads=("/proc/$1/task/"*)
  ((${#threads[@]} <= 1))
}

# kill_now SERVICE: kill -9, and wait until the process and its children are gone.
kill_now() {
  local pid child family
  pid=$(pid_of "$1") || return 0
  family="$pid $(children_of "$pid")"
  # shellcheck disable=SC2086
  kill -9 $family 2>/dev/null || true
  for child in $family; do await 10 gone "$child" || die "$1: process $child survives kill -9"; done
  rm -f "$STATE/pids/$1"
}

# wait_stopped SERVICE SECONDS: waits for an end that was asked for; after that kill -9, and says so.
wait_stopped() {
  local pid
  pid=$(pid_of "$1") || { rm -f "$STATE/pids/$1"; return 0; }
  if ! await "$2" gone "$pid"; then
    say "$1 did not stop within $2 s: kill -9"
    kill_now "$1"
  fi
  rm -f "$STATE/pids/$1"
}

# tail_log SERVICE: the end of its log, for an error message.
tail_log() {
  say "--- end of $STATE/logs/$1.log"
  tail -n 15 "$STATE/logs/$1.log" >&2 2>/dev/null || true
  say "---"
}

# await_ready SERVICE SECONDS PROBE...: like await, but ends at once when the process has died, and shows its log.
await_ready() {
  local service=$1 seconds=$2 until
  until=$(($(now_ms) + $2 * 1000))
  shift 2
  while ! "$@"; do
    if ! running "$service"; then
      tail_log "$service"
      die "$service ended while starting"
    fi
    if (($(now_ms) > until)); then
      tail_log "$service"
      die "$service did not answer within $seconds s"
    fi
    sleep 0.03
  done
}
