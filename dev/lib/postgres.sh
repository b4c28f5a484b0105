# shellcheck shell=bash
# Postgres as an ordinary child process. fsync stays on, because Postgres is the source of truth.

POSTGRES_PASSWORD=postrider

# Prints the program folder of the newest Debian or Ubuntu package, or of the initdb in PATH.
postgres_bin() {
  local dir best=''
  for dir in /usr/lib/postgresql/*/bin; do
    [[ -x $dir/postgres && -x $dir/initdb ]] || continue
    if [[ -z $best ]] || (($(postgres_major "$dir") > $(postgres_major "$best"))); then best=$dir; fi
  done
  if [[ -z $best ]] && command -v initdb >/dev/null; then best=$(dirname "$(command -v initdb)"); fi
  echo "$best"
}
postgres_major() { local v=${1#/usr/lib/postgresql/}; v=${v%%/*}; echo "${v%%.*}"; }

# Postgres refuses to run as root. If this script runs as root, another user runs Postgres.
postgres_user() { if id postgres >/dev/null 2>&1; then echo postgres; else echo nobody; fi; }
as_postgres() { (cd / && postgres_prefix && "${AS_POSTGRES[@]}" "$@"); }
postgres_prefix() {
  AS_POSTGRES=()
  ((EUID == 0)) || return 0
  local user
  user=$(postgres_user)
  AS_POSTGRES=(setpriv "--reuid=$(id -u "$user")" "--regid=$(id -g "$user")" --init-groups)
}

# postgres_data: prints the data folder. It is in /var/tmp if the other user cannot reach the state folder, as in a
# clone in /root.
postgres_data() {
  local dir=$STATE/postgres
  if [[ ! -e $STATE/postgres-data ]]; then
    mkdir -p "$dir"
    if ((EUID == 0)); then
      chown "$(postgres_user)" "$dir"
      if ! as_postgres test -w "$dir" 2>/dev/null; then
        rmdir "$dir"
        dir=/var/tmp/postrider-$(printf '%s' "$STATE" | sha256sum | cut -c1-12)
        mkdir -p "$dir"
        chown "$(postgres_user)" "$dir"
      fi
    fi
    chmod 700 "$dir"
    echo "$dir" >"$STATE/postgres-data"
  fi
  cat "$STATE/postgres-data"
}

# postgres_cache BIN MAJOR: creates a new cluster with postrider's role and database once, as a template that is copied,
# because initdb takes seconds.
postgres_cache() {
  local bin=$1 template=$CACHE/postgres-$2
  [[ -e $template/complete ]] && return 0
  (
    lock "$CACHE/postgres.lock" 120
    [[ -e $template/complete ]] && exit 0
    say "creating a Postgres $2 template (once)"
    rm -rf "$template"
    mkdir -p "$template"
    work=$(mktemp -d /var/tmp/postrider-template.XXXXXX)
    trap 'rm -rf "$work"' EXIT
    echo "$POSTGRES_PASSWORD" >"$work/password"
    if ((EUID == 0)); then chown -R "$(postgres_user)" "$work"; fi
    {
      as_postgres "$bin/initdb" -D "$work/data" -U postgres --pwfile="$work/password" --auth=scram-sha-256 \
        --encoding=UTF8 --locale=C.UTF-8 --no-sync --no-instructions &&
        as_postgres "$bin/postgres" --single -D "$work/data" postgres <<END
CREATE ROLE postrider LOGIN CREATEDB PASSWORD '$POSTGRES_PASSWORD'
GRANT pg_monitor, pg_signal_backend TO postrider
CREATE DATABASE postrider OWNER postrider
END
    } </dev/null >"$work/log" 2>&1 || {
      tail -n 20 "$work/log" >&2
      die "initdb failed"
    }
    cp -r "$work/data" "$template/data"
    : >"$template/complete"
  )
}

postgres_start() {
  local bin major data
  bin=$(postgres_bin)
  [[ -n $bin ]] || die "Postgres is not installed; run dev/setup"
  data=$(postgres_data)
  if [[ ! -e $data/PG_VERSION ]]; then
    major=$("$bin/postgres" --version | grep -oE '[0-9]+' | head -1)
    postgres_cache "$bin" "$major"
    # Deletes what an interrupted copy left behind.
    find "${data:?}" -mindepth 1 -delete
    cp -r "$CACHE/postgres-$major/data/." "$data/"
    chmod -R go-rwx "$data"
    if ((EUID == 0)); then chown -R "$(postgres_user)" "$data"; fi
  else
    # Data of an older version needs that version.
    major=$(<"$data/PG_VERSION")
    if [[ -x /usr/lib/postgresql/$major/bin/postgres ]]; then bin=/usr/lib/postgresql/$major/bin; fi
  fi
  postgres_forget_dead "$data"
  # The path of a socket may have at most 107 bytes.
  local sockets=$data
  ((${#data} < 85)) || sockets=''
  postgres_prefix
  launch postgres "${AS_POSTGRES[@]}" "$bin/postgres" -D "$data" -p "$(port postgres)" -c listen_addresses=127.0.0.1 \
    -c "unix_socket_directories=$sockets" -c max_connections=200 -c shared_buffers=128MB -c fsync=on \
    -c max_wal_size=2GB -c log_line_prefix='%m [%p] %d '
}

# postgres_forget_dead DATA: deletes the lock files of a killed Postgres. After kill -9, they may name a zombie that no
# process has reaped (in a container without an init), or a new process with the same id. Postgres would then refuse to
# start. Fails if a live postmaster uses DATA.
postgres_forget_dead() {
  local pid
  { read -r pid <"$1/postmaster.pid"; } 2>/dev/null || return 0
  if start_time_of "$pid" >/dev/null && tr '\0' ' ' <"/proc/$pid/cmdline" | grep -qF -- "-D $1 "; then
    die "another Postgres (pid $pid) uses $1"
  fi
  rm -f "$1/postmaster.pid" "$1"/.s.PGSQL.*
}

postgres_answers() {
  listening "$(port postgres)" &&
    [[ $(PGPASSWORD=$POSTGRES_PASSWORD PGCONNECT_TIMEOUT=5 timeout 10 "$(postgres_bin)/psql" -XAtq \
      -h 127.0.0.1 -p "$(port postgres)" -U postrider -d postrider -c 'SELECT 1' 2>/dev/null) == 1 ]]
}
postgres_wait() { await_ready postgres 60 postgres_answers; }

# postgres_stop [immediate]: stops in fast mode, which ends sessions. In immediate mode, the next start does a recovery.
postgres_stop() {
  local pid signal=INT
  pid=$(pid_of postgres) || return 0
  if [[ ${1:-} == immediate ]]; then signal=QUIT; fi
  kill "-$signal" "$pid" 2>/dev/null || true
}
# shellcheck disable=SC2034
POSTGRES_STOP_SECONDS=20

postgres_url() { echo "postgres://$1:$POSTGRES_PASSWORD@127.0.0.1:$(port postgres)/postrider"; }
postgres_wipe() {
  local dir
  [[ -e $STATE/postgres-data ]] || return 0
  dir=$(<"$STATE/postgres-data")
  if [[ $dir == "$STATE/postgres" || $dir == /var/tmp/postrider-* ]]; then rm -rf "$dir"; fi
}
