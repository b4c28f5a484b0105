# shellcheck shell=bash
# Redis: one server, or a cluster of three masters that have all slots.
# Redis persists nothing while it runs, so `kill` loses everything, as a cache may. A graceful stop keeps the data.

redis_services() {
  if [[ $REDIS == cluster ]]; then printf '%s\n' redis-1 redis-2 redis-3; else echo redis; fi
}
redis_ports() {
  local service
  for service in $(redis_services); do
    echo "$service"
    if [[ $REDIS == cluster ]]; then echo "$service-bus"; fi
  done
}

redis_url() { echo "redis://127.0.0.1:$(port "$1")"; }
# redis_urls: prints one URL, or the three URLs of the cluster separated by commas.
redis_urls() {
  local service list=''
  for service in $(redis_services); do list+=",$(redis_url "$service")"; done
  echo "${list#,}"
}
redis_cli() {
  local service=$1
  shift
  timeout 20 redis-cli -h 127.0.0.1 -p "$(port "$service")" "$@" 2>/dev/null
}
redis_major() { local v; v=$(redis-server --version); v=${v#*v=}; echo "${v%%.*}"; }

redis_start() {
  local service=$1 major args
  major=$(redis_major)
  mkdir -p "$STATE/$service"
  args=(--port "$(port "$service")" --bind 127.0.0.1 --protected-mode no --dir "$STATE/$service" --daemonize no
    --save '' --appendonly no --tcp-backlog 4096 --maxclients 10000)
  # Before version 7, DEBUG is always allowed, and the port of the cluster bus is the port + 10000.
  if ((major >= 7)); then args+=(--enable-debug-command yes); fi
  if [[ $REDIS == cluster ]]; then
    args+=(--cluster-enabled yes --cluster-node-timeout 3000 --cluster-config-file nodes.conf)
    if ((major >= 7)); then args+=(--cluster-port "$(port "$service-bus")"); fi
  fi
  launch "$service" redis-server "${args[@]}"
}

redis_answers() { listening "$(port "$1")" && [[ $(redis_cli "$1" PING) == PONG ]]; }

redis_wait() {
  await_ready "$1" 60 redis_answers "$1"
  # Redis has loaded the file. It is deleted, so that Redis is empty after a later kill.
  rm -f "$STATE/$1/dump.rdb"
}

# redis_form_cluster: assigns the slots and connects the nodes (once), then waits until all nodes report a healthy
# cluster.
redis_form_cluster() {
  local i service bus
  [[ $REDIS == cluster ]] || return 0
  if [[ ! -e $STATE/redis-cluster-formed ]]; then
    for i in 1 2 3; do
      redis_cli "redis-$i" CLUSTER SET-CONFIG-EPOCH "$i" >/dev/null || true
      # shellcheck disable=SC2046
      redis_cli "redis-$i" CLUSTER ADDSLOTS $(seq $((16384 * (i - 1) / 3)) $((16384 * i / 3 - 1))) >/dev/null ||
        die "redis-$i did not accept its slots"
    done
    for i in 2 3; do
      bus=()
      if (($(redis_major) >= 7)); then bus=("$(port "redis-$i-bus")"); fi
      redis_cli redis-1 CLUSTER MEET 127.0.0.1 "$(port "redis-$i")" "${bus[@]}" >/dev/null ||
        die "redis-1 could not connect to redis-$i"
    done
    : >"$STATE/redis-cluster-formed"
  fi
  for service in $(redis_services); do
    if running "$service"; then await_ready "$service" 60 redis_cluster_ok "$service"; fi
  done
}
redis_cluster_ok() {
  local info
  info=$(redis_cli "$1" CLUSTER INFO) && [[ $info == *cluster_state:ok* && $info == *cluster_known_nodes:3* ]]
}

redis_stop() {
  running "$1" || return 0
  # A paused or hung server does not accept the command. The caller then kills it after its deadline.
  timeout 5 redis-cli -h 127.0.0.1 -p "$(port "$1")" SHUTDOWN SAVE >/dev/null 2>&1 || true
}
# shellcheck disable=SC2034
REDIS_STOP_SECONDS=10
