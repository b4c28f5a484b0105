# shellcheck shell=bash
# Helpers shared by the scripts in dev/: messages, deadlines, locks, ports and child processes.

# Jars, templates and port reservations, which all stacks of this user share.
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/postrider

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

now_ms() { local t=${EPOCHREALTIME/[.,]/}; echo "${t%???}"; }
# seconds_since START_MS: "1.2"
seconds_since() { local d=$(($(now_ms) - $1)); printf '%d.%d' $((d / 1000)) $((d % 1000 / 100)); }

# await SECONDS COMMAND...: repeats COMMAND until it succeeds. Returns 1 after SECONDS.
await() {
  local until=$(($(now_ms) + $1 * 1000))
  shift
  while ! "$@"; do
    (($(now_ms) < until)) || return 1
    sleep 0.03
  done
}

# lock FILE SECONDS: locks FILE until the script or subshell ends. Waits up to SECONDS. Children that `launch` starts do
# not inherit the lock.
lock() {
  mkdir -p "$(dirname "$1")"
  local fd
  exec {fd}>>"$1"
  flock -n "$fd" && return
  say "waiting for another process that has locked $1"
  flock -w "$2" "$fd" || die "another process has locked $1 for $2 s"
}

as_root() {
  if ((EUID == 0)); then "$@"; else sudo "$@"; fi
}

listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# listening_ports: prints all ports in the state LISTEN, one per line. Reads /proc instead of starting ss.
listening_ports() {
  local hex
  cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | awk '$4 == "0A" { n = split($2, a, ":"); print a[n] }' | sort -u |
    while read -r hex; do echo $((16#$hex)); done
}

# next_free_port FROM: prints the first port, starting at FROM, that no process listens on.
next_free_port() {
  local taken port=$1
  taken=" $(listening_ports | tr '\n' ' ') "
  while [[ $taken == *" $port "* ]]; do port=$((port + 1)); done
  echo "$port"
}

# reserve_ports OWNER NAME...: prints "NAME=PORT" lines. The cache stores the reservation of a port for the folder OWNER,
# so that no other stack takes it while this stack is down. The ports are below the kernel's ephemeral range, which
# starts at 32768.
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
      # A reservation ends when its folder is deleted.
      [[ -e $file && -d $(<"$file") ]] && continue
      break
    done
    echo "$owner" >"$file"
    taken+="$port "
    echo "$name=$port"
  done
)

# release_ports: deletes the reservations of the ports of $STATE.
release_ports() {
  local number
  [[ -e $STATE/ports ]] || return 0
  while IFS='=' read -r _ number; do rm -f "$CACHE/ports/$number"; done <"$STATE/ports"
}

# A pid file contains "PID START". The start time distinguishes the process from a later one with the same id.
start_time_of() {
  local stat
  { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 1
  stat=${stat##*) }
  # shellcheck disable=SC2086
  set -- $stat
  [[ $1 != Z && $1 != X ]] || return 1
  echo "${20}"
}

# pid_of SERVICE: prints the service's process id. Returns 1 if it is not running.
pid_of() {
  local pid start
  { read -r pid start <"$STATE/pids/$1"; } 2>/dev/null || return 1
  [[ -n $start && $(start_time_of "$pid") == "$start" ]] || return 1
  echo "$pid"
}
running() { pid_of "$1" >/dev/null; }

# launch SERVICE COMMAND...: starts COMMAND in its own session, with its output in the service's log. COMMAND inherits
# no other file descriptors. Otherwise, readers of this script's output and waiters for a lock would wait for COMMAND.
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

# signal_all SIGNAL SERVICE: sends SIGNAL to the process and its direct children (the backends of Postgres).
signal_all() {
  local pid
  pid=$(pid_of "$2") || return 0
  # shellcheck disable=SC2046
  kill "-$1" "$pid" $(children_of "$pid") 2>/dev/null || true
}

# gone PID: succeeds if no thread of PID is running. A killed process is a zombie as soon as its first thread has ended,
# but it keeps its ports and locks until its last thread has ended.
gone() {
  [[ -d /proc/$1 ]] || return 0
  start_time_of "$1" >/dev/null && return 1
  local threads=("/proc/$1/task/"*)
  ((${#threads[@]} <= 1))
}

# kill_now SERVICE: sends kill -9, and waits until the process and its children have ended.
kill_now() {
  local pid child family
  pid=$(pid_of "$1") || return 0
  family="$pid $(children_of "$pid")"
  # shellcheck disable=SC2086
  kill -9 $family 2>/dev/null || true
  for child in $family; do await 10 gone "$child" || die "$1: process $child is still running 10 s after kill -9"; done
  rm -f "$STATE/pids/$1"
}

# wait_stopped SERVICE SECONDS: waits until a stopping service has ended. After SECONDS it sends kill -9 and reports it.
wait_stopped() {
  local pid
  pid=$(pid_of "$1") || { rm -f "$STATE/pids/$1"; return 0; }
  if ! await "$2" gone "$pid"; then
    say "$1 did not stop within $2 s: kill -9"
    kill_now "$1"
  fi
  rm -f "$STATE/pids/$1"
}

# tail_log SERVICE: prints the end of the service's log, for an error message.
tail_log() {
  say "--- end of $STATE/logs/$1.log"
  tail -n 15 "$STATE/logs/$1.log" >&2 2>/dev/null || true
  say "---"
}

# await_ready SERVICE SECONDS PROBE...: like await, but reports every two seconds that it waits, and ends the script with
# the service's log if the service has ended or does not respond in time.
await_ready() {
  local service=$1 seconds=$2 until t0 report=2000
  t0=$(now_ms)
  until=$((t0 + $2 * 1000))
  shift 2
  while ! "$@"; do
    if ! running "$service"; then
      tail_log "$service"
      die "$service ended while starting"
    fi
    if (($(now_ms) > until)); then
      tail_log "$service"
      die "$service did not respond within $seconds s"
    fi
    if (($(now_ms) - t0 > report)); then
      report=$((report + 2000))
      say "waiting for $service: no response after $(seconds_since "$t0") s (log: $STATE/logs/$service.log)"
    fi
    sleep 0.03
  done
}
