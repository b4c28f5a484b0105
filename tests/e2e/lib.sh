# shellcheck shell=bash disable=SC2034,SC2154,SC2317  # its caller's variables, and functions that `await` calls
# The steps of tests/e2e/run, which sources this file after dev/lib/common.sh and sets ONE, TWO, work and the options.

SHARED=../shared/kube
VALUES=(--values charts/postrider/ci/kind-values.yaml --values tests/e2e/values.yaml)

step() { say "$(printf '%4d s  %s' "$SECONDS" "$*")"; }
# Like `await`, but polls less often, because the tests share the processors with the cluster.
await_cluster() { local seconds=$1; shift; paced() { "$@" || { sleep 0.7; return 1; }; }; await "$seconds" paced "$@"; }
figures=()
figure() { figures+=("\"$1\": $2"); say "        $1: $2"; }
write_figures() {
  if [[ -z $RESULTS ]]; then return; fi
  figure rate "$RATE"
  figure seconds "$SECONDS"
  figure node "\"$(kubectl get nodes -o 'jsonpath={.items[0].status.nodeInfo.kubeletVersion}, {.items[0].status.nodeInfo.containerRuntimeVersion}')\""
  (IFS=,; printf '{%s}\n' "${figures[*]}") | jq . >"$work/figures"
  tests/e2e/result "$work/figures" "$RESULTS" "$COMMAND" >&2
}

# --- cluster and images --------------------------------------------------------------------------------------------

onenode() { [[ $(kubectl get nodes -o name 2>/dev/null) == node/onenode ]]; }

start_cluster() {
  if [[ -z ${KUBECONFIG:-} ]]; then
    [[ -x $SHARED/up ]] || die "KUBECONFIG is not set, and there is no $SHARED"
    WE_STARTED=yes
    eval "$("$SHARED/up")"
  fi
  command -v helm >/dev/null || export PATH="$CACHE/bin:$PATH"
  kubectl get --raw /readyz >/dev/null || die "the cluster does not answer"
}

# Loads two versions: images with different contents but the same program.
load_images() {
  if [[ $IMAGES == no ]]; then return 0; fi
  local binary=()
  if [[ -n $BINARY ]]; then binary=(--binary "$BINARY"); fi
  dev/image --tag postrider:dev "${binary[@]}" --size >"$work/size"
  figure image_compressed_mib "$(awk '$1 == "compressed:" { print $2 }' "$work/size")"
  if onenode; then
    "$SHARED/deps-images" >/dev/null 2>"$work/images.log" || { cat "$work/images.log" >&2; return 1; }
    next_version buildah
    "$SHARED/load" postrider:dev postrider:next
  else
    next_version docker
    kind load docker-image postrider:dev postrider:next --name postrider
  fi
}
next_version() {
  mkdir -p "$work/next"
  printf 'FROM postrider:dev\nLABEL org.opencontainers.image.version=next\nENV POSTRIDER_TELEMETRY__LOG_FILTER=info\n' >"$work/next/Dockerfile"
  if [[ $1 == buildah ]]; then
    buildah bud --quiet --isolation chroot --pull-never -t postrider:next "$work/next" >/dev/null
  else
    docker build --quiet -t postrider:next "$work/next" >/dev/null
  fi
}

# Without the operators' CRDs, the chart is installed without the operators' resources.
WITHOUT_OPERATORS=()
apply_crds() {
  local folder
  if [[ ! -d $SHARED/crds ]]; then
    WITHOUT_OPERATORS=(--set metrics.serviceMonitor.enabled=false --set metrics.prometheusRule.enabled=false)
    return 0
  fi
  for folder in "$SHARED"/crds/*/; do kubectl apply --server-side --force-conflicts --filename "$folder" >/dev/null; done
  kubectl wait --for=condition=Established crd --all --timeout 60s >/dev/null
}
has_strimzi() { kubectl get crd kafkatopics.kafka.strimzi.io >/dev/null 2>&1; }

# validate NAME: has the API server validate every object that the chart renders with these values, in a dry run.
validate() {
  if [[ ! -d $SHARED/crds ]]; then return 0; fi
  helm template one charts/postrider --kube-version "$(kubectl version -o json | jq -r .serverVersion.gitVersion)" --values "charts/postrider/ci/$1-values.yaml" --is-upgrade --no-hooks --api-versions kafka.strimzi.io/v1 |
    kubectl apply --dry-run=server --validate=strict --filename - >"$work/validated"
  kubectl apply --dry-run=server --validate=strict --filename k8s/strimzi/3-brokers/kafka.yaml >>"$work/validated"
}

make_namespace() {
  kubectl delete namespace "$1" --ignore-not-found --wait --timeout 120s >/dev/null
  kubectl create namespace "$1" >/dev/null
  kubectl label namespace "$1" pod-security.kubernetes.io/enforce=restricted >/dev/null
}

# --- the chart -----------------------------------------------------------------------------------------------------

# chart install|upgrade RELEASE NAMESPACE ARGUMENT...
chart() {
  local verb=$1 release=$2 namespace=$3
  shift 3
  helm "$verb" "$release" charts/postrider --namespace "$namespace" "${VALUES[@]}" "${WITHOUT_OPERATORS[@]}" --wait --wait-for-jobs --timeout 240s "$@" >"$work/helm.log" ||
    { cat "$work/helm.log" >&2; return 1; }
}

ready() { kubectl --namespace "$1" rollout status "deployment/postrider-$2" --timeout 180s >/dev/null; }

# pods NAMESPACE ROLE: prints the pods that are not terminating.
pods() {
  kubectl --namespace "$1" get pods --selector "app.kubernetes.io/component=$2" -o json |
    jq -r '.items[] | select(.metadata.deletionTimestamp == null) | .metadata.name' | sort
}

# job NAME NAMESPACE ARGUMENT...: runs postrider in a pod that the network policies allow, with the API key of the secret
# KEY_SECRET if that is set.
job() {
  local name=$1 namespace=$2
  shift 2
  kubectl --namespace "$namespace" delete job "$name" --ignore-not-found --wait >/dev/null
  jq -n --arg name "$name" --arg access "${ACCESS:-yes}" --arg alias "${HOST_ALIAS:-}" --arg secret "${KEY_SECRET:-}" --args '{
    apiVersion: "batch/v1", kind: "Job", metadata: {name: $name},
    spec: {backoffLimit: 0, template: {
      metadata: {labels: {"postrider-client": $access}},
      spec: {restartPolicy: "Never", automountServiceAccountToken: false,
        hostAliases: ($alias | split(" ") | if . == [] then [] else [{ip: .[0], hostnames: .[1:]}] end),
        securityContext: {runAsNonRoot: true, runAsUser: 65532, seccompProfile: {type: "RuntimeDefault"}},
        containers: [{name: "client", image: "postrider:dev", imagePullPolicy: "IfNotPresent", args: $ARGS.positional,
          env: (if $secret == "" then [] else [{name: "API_KEY", valueFrom: {secretKeyRef: {name: $secret, key: "key"}}}] end),
          securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: ["ALL"]}}}]}}}}' \
    -- "$@" | kubectl --namespace "$namespace" create --filename - >/dev/null
}
# job_end NAME NAMESPACE SECONDS: waits for the job's end and prints its output; returns 1 if it failed.
job_end() {
  local state=''
  finished() {
    state=$(kubectl --namespace "$2" get job "$1" -o 'jsonpath={.status.conditions[?(@.status=="True")].type}')
    [[ $state == *Complete* || $state == *Failed* ]]
  }
  await_cluster "$3" finished "$1" "$2" || die "the job $1 did not end within $3 s"
  kubectl --namespace "$2" logs "job/$1" || true
  [[ $state == *Complete* ]]
}

# roundtrip NAMESPACE RELEASE: a round trip through every feature, from inside the cluster.
roundtrip() {
  job roundtrip "$1" roundtrip --url "http://$2:8080" --topic "${TOPIC:-roundtrip}"
  job_end roundtrip "$1" 90 >"$work/roundtrip" || { cat "$work/roundtrip" >&2; die "the round trip failed"; }
}

load_begin() {
  local name=$1 namespace=$2
  shift 2
  job "$name" "$namespace" roundtrip --url http://postrider:8080 "$@"
  kubectl --namespace "$namespace" wait --for=condition=Ready pod --selector "job-name=$name" --timeout 60s >/dev/null
}
load_end() {
  job_end "$1" "$2" 240 >"$work/$1" || { cat "$work/$1" >&2; die "the job $1 failed under load"; }
  sed 's/^/        /' "$work/$1" >&2
  figure "$1_failed_requests" "$(sed -n 's/^pushed .*, \([0-9]*\) failed$/\1/p' "$work/$1")"
  figure "$1_accepted" "$(sed -n 's/^pushed  *\([0-9]*\) .*/\1/p' "$work/$1")"
  figure "$1_p50_ms" "$(sed -n 's/^latency .*p50 \([0-9.]*\) ms.*/\1/p' "$work/$1")"
  figure "$1_p99_ms" "$(sed -n 's/^latency .*p99 \([0-9.]*\) ms.*/\1/p' "$work/$1")"
  figure "$1_max_ms" "$(sed -n 's/^latency .*max \([0-9.]*\) ms.*/\1/p' "$work/$1")"
}

# The route in the values delivers to the api's simulator, which answers some requests with an error.
records_reach_the_relay() {
  delivered() {
    local pod
    pod=$(pods "$ONE" relay | head -1)
    kubectl get --raw "/api/v1/namespaces/$ONE/pods/$pod:9090/proxy/metrics" |
      grep -q '^postrider_relay_requests_total{.*outcome="delivered"} [1-9]'
  }
  await_cluster 120 delivered || die "no record of the topic reached the relay's target"
}

admin_is_on_the_management_port() {
  kubectl get --raw "/api/v1/namespaces/$ONE/pods/$(pods "$ONE" api | head -1):9090/proxy/admin/dlq?limit=1" |
    jq -e '.letters | type == "array"' >/dev/null || die "the management port of the api does not list dead letters"
}

credentials_are_required() {
  job stranger "$1" roundtrip --url http://postrider:8080 --room kv
  if job_end stranger "$1" 60 >"$work/stranger"; then die "a request without a credential was accepted"; fi
  grep -q 'answered 401' "$work/stranger" || { cat "$work/stranger" >&2; die "the job did not fail with 401, as expected"; }
}

stranger_is_shut_out() {
  ACCESS=no job stranger "$ONE" roundtrip --url http://postrider:8080 --room kv --timeout 8
  if job_end stranger "$ONE" 60 >"$work/stranger"; then die "a pod that no network policy allows got a response"; fi
  grep -qE 'timed out after 8 s|no connection to postrider within' "$work/stranger" || { cat "$work/stranger" >&2; die "the job did not fail by a timeout, as expected"; }
}

# Records the figures of metrics-server every ten seconds, its own interval, until it is stopped.
watch_use() {
  while sleep 10; do kubectl --namespace "$ONE" top pods --no-headers >>"$work/use" 2>/dev/null || true; done
}
# most ROLE COLUMN SUFFIX: prints the maximum of any pod of the role.
most() { awk -v role="postrider-$1-" -v suffix="$3" 'index($1, role) == 1 { sub(suffix, "", $'"$2"'); if ($'"$2"' + 0 > most) most = $'"$2"' + 0 } END { print most + 0 }' "$work/use"; }
requested() { kubectl --namespace "$ONE" get deployment "postrider-$1" -o "jsonpath={.spec.template.spec.containers[0].resources.requests.$2}"; }

# A node reserves what a pod requests, so a pod must not use more than that.
use_fits_requests() {
  local role memory
  [[ -s $work/use ]] || { say "        metrics-server has no figures"; return 0; }
  for role in api processor relay; do
    memory=$(requested "$role" memory)
    figure "memory_${role}_mib" "$(most "$role" 3 Mi)"
    figure "memory_${role}_requested_mib" "${memory%Mi}"
    figure "cpu_${role}_millicores" "$(most "$role" 2 m)"
    figure "cpu_${role}_requested_millicores" "$(requested "$role" cpu | sed 's/m$//')"
    if [[ $BINARY == */debug/* ]]; then continue; fi # a debug build uses more memory than a release build
    (($(most "$role" 3 Mi) <= ${memory%Mi})) || die "a pod of the $role used more memory than it requests"
  done
}

# --- what may happen to it -----------------------------------------------------------------------------------------

# metrics NAMESPACE POD
metrics() { kubectl get --raw "/api/v1/namespaces/$1/pods/$2:9090/proxy/metrics" 2>/dev/null; }

# starts NAMESPACE ROLE...: prints each pod with the start time of its program, 0 if it does not respond. The time changes
# with each new secret, because the process then replaces itself within its container.
starts() {
  local namespace=$1 role pod
  shift
  for role in "$@"; do
    for pod in $(pods "$namespace" "$role"); do
      metrics "$namespace" "$pod" | awk -v pod="$pod" '$1 == "postrider_start_time_seconds" { at = $2 } END { print pod, (at == "" ? 0 : at) }' || true
    done
  done
}

# every_replaced NAMESPACE STARTS_BEFORE ROLE...: waits until every process has replaced itself and is ready.
every_replaced() {
  local namespace=$1 before=$2 role
  shift 2
  all_replaced() { remount "$namespace"; ! join <(sort <<<"$before") <(starts "$namespace" "$@" | sort) | awk '$3 <= $2 { old = 1 } END { exit !old }'; }
  await_cluster 240 all_replaced "$@" || die "not every process of $namespace picked up the new secret: start times before $before and now $(starts "$namespace" "$@")"
  for role in "$@"; do ready "$namespace" "$role"; done
}

# Annotates the pods: a kubelet updates mounted secrets when it syncs a pod, and a changed annotation triggers a sync.
remount() { kubectl --namespace "$1" annotate pods --selector postrider/management=true --overwrite "postrider/looked=$(now_ms)" >/dev/null; }

put_redis_url() {
  kubectl --namespace "$ONE" patch secret postrider-urls --type merge --patch "$(jq -n --arg url "$1" '{stringData: {"redis-url": $url}}')" >/dev/null
}

# Rotates to five wrong and five working secrets in turns, under load that lasts longer.
ten_rotations() {
  local number good=redis://redis:6379 before began begun seconds=225
  # Without the autoscaler, because a pod that it adds would start with a wrong secret.
  chart upgrade postrider "$ONE" --set image.tag=dev --set roles.api.replicas=2
  ready "$ONE" api
  roundtrip "$ONE" postrider
  refused() {
    local role pod
    remount "$ONE"
    for role in api processor; do
      for pod in $(pods "$ONE" "$role"); do
        metrics "$ONE" "$pod" | grep 'postrider_rotation_refused{what="redis"} 1' >/dev/null || return 1
      done
    done
  }
  before=$(restarts "$ONE")
  load_begin rotating "$ONE" --rate=200 --seconds="$seconds"
  begun=$SECONDS
  for number in 1 2 3 4 5; do
    put_redis_url "redis://nobody:wrong$number@redis:6379"
    await_cluster 60 refused || die "the wrong secret number $number was not refused by every process"
    began=$(starts "$ONE" api processor)
    # A newline at the end does not belong to the secret, but it changes the file.
    good+=$'\n'
    put_redis_url "$good"
    every_replaced "$ONE" "$began" api processor
  done
  figure ten_rotations_seconds "$((SECONDS - begun))"
  ((SECONDS - begun < seconds)) || die "ten rotations took longer than the load, $seconds s"
  load_end rotating "$ONE"
  [[ $(restarts "$ONE") == "$before" ]] || die "a rotation restarted a container: restarts were $before and are $(restarts "$ONE")"
}

# Prints the number of restarts of each container whose pod is not terminating.
restarts() {
  kubectl --namespace "$1" get pods --selector postrider/management=true -o json |
    jq -r '[.items[] | select(.metadata.deletionTimestamp == null)] | sort_by(.metadata.name) | map(.status.containerStatuses[0].restartCount) | join(" ")'
}

# Call this after all upgrades of the first release, because an upgrade resets the secret to the value in the chart.
rotated_secrets_are_picked_up() {
  local before_one before_two
  # A relay does not restart for the Redis secret, because it uses Redis only for the rotation lease.
  before_one=$(starts "$ONE" api processor) before_two=$(starts "$TWO" api processor relay)
  # The URL differs, but the server is the same; a changed file is enough.
  put_redis_url redis://redis:6379/0
  if has_strimzi; then
    operator_renews "$TWO" certificate
    every_replaced "$TWO" "$before_two" api processor relay
    second_works
  fi
  every_replaced "$ONE" "$before_one" api processor
  roundtrip "$ONE" postrider
}

SECOND=()
second_release() {
  SECOND=(--set "redis.url=redis://redis.$ONE.svc:6379" --set "postgres.url=postgres://postrider:postrider@postgres.$ONE.svc:5432/postrider"
    --set config.kafka.topic_prefix=two. --set config.kafka.group_prefix=two. --set config.redis.key_prefix=two:
    --set config.postgres.schema=two --set auth.mode=required --set-json 'config.gateway.relays=[]' --set-json 'config.gateway.topics.allow=["two.roundtrip"]' --set tests.topic=two.roundtrip --set image.tag=dev)
  make_namespace "$TWO"
  if has_strimzi; then
    operator_cluster "$TWO"
    # The objects are in the release's own namespace. The brokers have the address that Strimzi would give them.
    SECOND+=(--set kafka.strimzi.cluster=events --set kafka.strimzi.user.enabled=true
      --set kafka.strimzi.topics.enabled=true --set kafka.strimzi.topics.replicas=1 --set kafka.strimzi.topics.minInsyncReplicas=1
      --set-json 'kafka.strimzi.topics.extra=[{"name":"two.roundtrip","partitions":1}]')
    second install --set "kafka.brokers={events-kafka-bootstrap.$ONE.svc:9093}" --set kafka.securityProtocol=sasl_ssl
    operator_topics "$TWO"
    operator_users "$TWO"
  else
    second install --set "kafka.brokers={kafka.$ONE.svc:9092}"
  fi
  second_works
}
# Helm must not wait, because no pod can start before the operator has processed the objects.
second() {
  local verb=$1
  shift
  helm "$verb" postrider charts/postrider --namespace "$TWO" "${VALUES[@]}" "${WITHOUT_OPERATORS[@]}" "${SECOND[@]}" "$@" --timeout 240s >/dev/null
}
second_works() {
  local role
  for role in api processor relay; do ready "$TWO" "$role"; done
  KEY_SECRET=postrider-bootstrap TOPIC=two.roundtrip roundtrip "$TWO" postrider
}
bootstrap_key() { kubectl --namespace "$TWO" get secret postrider-bootstrap -o 'jsonpath={.data.key}'; }

client_certificates() {
  local key
  key=$(bootstrap_key)
  second upgrade --set "kafka.brokers={events-kafka-bootstrap.$ONE.svc:9094}" --set kafka.securityProtocol=ssl --set kafka.strimzi.user.authentication=tls
  [[ $(bootstrap_key) == "$key" ]] || die "the upgrade replaced the bootstrap key"
  operator_users "$TWO"
  second_works
}

# api_is_at REPLICAS_OR_MORE, api_is_back REPLICAS
api_is_at() { (($(kubectl --namespace "$ONE" get deployment postrider-api -o 'jsonpath={.status.readyReplicas}') >= $1)); }
api_is_back() { (($(kubectl --namespace "$ONE" get deployment postrider-api -o 'jsonpath={.spec.replicas}') == $1)); }

autoscaler_follows_the_load() {
  local before t0
  before=$(pods "$ONE" api)
  chart upgrade postrider "$ONE" --set image.tag=dev --set roles.api.autoscaling.enabled=true --set roles.api.autoscaling.minReplicas=2 \
    --set roles.api.autoscaling.maxReplicas=3 --set roles.api.autoscaling.targetCPUUtilizationPercentage=50 --set roles.api.autoscaling.behavior.scaleDown.stabilizationWindowSeconds=10
  [[ $(pods "$ONE" api) == "$before" ]] || die "enabling the autoscaler restarted the api"
  load_begin scaling "$ONE" --rate="$RATE" --seconds=60
  t0=$(now_ms)
  await_cluster 90 api_is_at 3 || { kubectl --namespace "$ONE" get hpa >&2; die "the autoscaler did not add a pod"; }
  figure scaled_up_seconds "$(seconds_since "$t0")"
  load_end scaling "$ONE"
  await_cluster 180 api_is_back 2 || die "the autoscaler did not remove the pod again"
}

# If the controller has no service in the cluster, its address is in the Ingress.
through_the_ingress() {
  local class=$1 address
  chart upgrade postrider "$ONE" --set image.tag=dev --set ingress.enabled=true --set ingress.className="$class" --set 'ingress.hosts={postrider.test}'
  address=$(kubectl get services --all-namespaces --selector app.kubernetes.io/name=ingress-nginx,app.kubernetes.io/component=controller -o 'jsonpath={.items[0].spec.clusterIP}' 2>/dev/null || true)
  if [[ -z $address ]]; then
    kubectl --namespace "$ONE" wait ingress/postrider --for=jsonpath='{.status.loadBalancer.ingress[0].ip}' --timeout 120s >/dev/null
    address=$(kubectl --namespace "$ONE" get ingress postrider -o 'jsonpath={.status.loadBalancer.ingress[0].ip}')
  fi
  HOST_ALIAS="$address postrider.test" job roundtrip "$ONE" roundtrip --url http://postrider.test --topic roundtrip
  job_end roundtrip "$ONE" 90 >"$work/roundtrip" || { cat "$work/roundtrip" >&2; die "the round trip through the ingress failed"; }
}

drain_a_node() {
  local node
  node=$(kubectl --namespace "$ONE" get pods --selector app.kubernetes.io/component=api -o 'jsonpath={.items[0].spec.nodeName}')
  load_begin draining "$ONE" --rate=200 --seconds=60
  kubectl drain "$node" --ignore-daemonsets --delete-emptydir-data --pod-selector app.kubernetes.io/name=postrider --timeout 120s >/dev/null
  kubectl uncordon "$node" >/dev/null
  load_end draining "$ONE"
}

# Helm does not wait until the pods have drained.
nothing_is_left() {
  left_behind() {
    kubectl --namespace "$1" get all,configmaps,secrets,serviceaccounts,networkpolicies,poddisruptionbudgets,ingresses,horizontalpodautoscalers \
      --selector app.kubernetes.io/instance=postrider -o name
  }
  nothing() { [[ -z $(left_behind "$1") ]]; }
  await_cluster 90 nothing "$1" || die "left behind: $(left_behind "$1")"
  kubectl --namespace "$1" exec statefulset/kafka -- kafka-topics.sh --bootstrap-server localhost:9092 --list | grep -qx messages ||
    die "the topics are gone"
}

report_failure() {
  local namespace role
  for namespace in "$ONE" "$TWO"; do
    kubectl get namespace "$namespace" >/dev/null 2>&1 || continue
    say "--- $namespace"
    kubectl --namespace "$namespace" get pods -o wide >&2 || true
    kubectl --namespace "$namespace" get events --sort-by .lastTimestamp 2>/dev/null | tail -n 15 >&2 || true
    for role in api processor relay migrate test; do
      kubectl --namespace "$namespace" logs --selector "app.kubernetes.io/component=$role" --tail 8 --prefix >&2 2>/dev/null || true
    done
  done
  say FAILED
}
