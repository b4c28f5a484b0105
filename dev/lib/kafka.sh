# shellcheck shell=bash
# Kafka: one or three brokers in KRaft mode. Each process is both broker and controller.

KAFKA_VERSION=4.3.1
KAFKA_CACHE=$CACHE/kafka-$KAFKA_VERSION
SASL_USERNAME=postrider
SASL_PASSWORD=postrider-secret

kafka_services() {
  local i
  for ((i = 1; i <= BROKERS; i++)); do echo "kafka-$i"; done
}
kafka_ports() {
  local service
  for service in $(kafka_services); do
    printf '%s\n' "$service" "$service-controller"
    if [[ $SECURE == yes ]]; then printf '%s\n' "$service-sasl" "$service-mtls"; fi
  done
}

# kafka_bootstrap SUFFIX: prints the bootstrap servers of a listener (SUFFIX is "", "-sasl" or "-mtls").
kafka_bootstrap() {
  local service list=''
  for service in $(kafka_services); do list+=",127.0.0.1:$(port "$service$1")"; done
  echo "${list#,}"
}

kafka_classpath() { local jars=("$KAFKA_CACHE"/libs/*.jar); (IFS=:; echo "${jars[*]}"); }

# A class data archive halves the start time. It works only with one JVM build, so its name contains the build.
kafka_archive() { echo "$KAFKA_CACHE/classes-$(java -Xinternalversion 2>&1 | cksum | cut -d' ' -f1).jsa"; }

# SerialGC starts fastest, and has no concurrent collector threads, which would slow down small machines.
kafka_java() {
  local heap=$1
  shift
  KAFKA_JAVA=(java "-Xmx$heap" "-Xms$heap" -XX:+UseSerialGC -Xlog:disable -Xlog:all=error:stderr -XX:-UsePerfData
    "-Dlog4j2.configurationFile=$KAFKA_CACHE/log4j2.properties" "$@" -cp "$(kafka_classpath)")
}

# kafka_cache: fills the shared cache once, with the jars, a formatted metadata folder and the class archive.
kafka_cache() {
  [[ -e $KAFKA_CACHE/complete && -e $(kafka_archive) ]] && return 0
  (
    lock "$CACHE/kafka.lock" 600
    [[ -e $KAFKA_CACHE/complete ]] || kafka_fetch
    [[ -e $(kafka_archive) ]] || (kafka_train) || : >"$(kafka_archive)"
  )
}

kafka_fetch() {
  local t0
  t0=$(now_ms)
  say "fetching Kafka $KAFKA_VERSION with maven into $KAFKA_CACHE (once)"
  rm -rf "$KAFKA_CACHE"
  mkdir -p "$KAFKA_CACHE"
  sed "s/@KAFKA_VERSION@/$KAFKA_VERSION/" "$DEV/lib/kafka-pom.xml" >"$KAFKA_CACHE/pom.xml"
  cp "$DEV/lib/log4j2.properties" "$KAFKA_CACHE/log4j2.properties"
  timeout 900 mvn -B -q -f "$KAFKA_CACHE/pom.xml" dependency:copy-dependencies \
    "-DoutputDirectory=$KAFKA_CACHE/libs" </dev/null >"$KAFKA_CACHE/mvn.log" 2>&1 || {
    tail -n 20 "$KAFKA_CACHE/mvn.log" >&2
    die "maven could not fetch Kafka"
  }
  # The output of `format` depends only on the user's name and password. It is made once and copied to each new broker.
  cat >"$KAFKA_CACHE/template.properties" <<END
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:9093
listeners=PLAINTEXT://127.0.0.1:9092,CONTROLLER://127.0.0.1:9093
controller.listener.names=CONTROLLER
log.dirs=$KAFKA_CACHE/template
END
  kafka_java 128m
  "${KAFKA_JAVA[@]}" kafka.tools.StorageTool format -t AAAAAAAAAAAAAAAAAAAAAQ -c "$KAFKA_CACHE/template.properties" \
    --add-scram "SCRAM-SHA-512=[name=$SASL_USERNAME,password=$SASL_PASSWORD]" </dev/null >"$KAFKA_CACHE/format.log" 2>&1 || {
    tail -n 20 "$KAFKA_CACHE/format.log" >&2
    die "Kafka's storage format command failed"
  }
  [[ -e $KAFKA_CACHE/template/bootstrap.checkpoint ]] || die "Kafka's format left no bootstrap.checkpoint"
  : >"$KAFKA_CACHE/complete"
  say "fetched Kafka in $(seconds_since "$t0") s"
}

# Runs and stops one broker to record the class archive. Without the archive, Kafka only starts more slowly.
kafka_train() {
  local archive STATE BROKERS=1 SECURE=no KAFKA_EXTRA=()
  archive=$(kafka_archive)
  STATE=$(mktemp -d)
  # The trap contains the folder's name, because the function's variables do not exist any more at exit.
  # shellcheck disable=SC2064
  trap "STATE='$STATE'; kill_now kafka-1; release_ports; rm -rf '$STATE'" EXIT
  say "recording Kafka's class archive (once)"
  reserve_ports "$STATE" kafka-1 kafka-1-controller >"$STATE/ports"
  kafka_prepare kafka-1
  kafka_java 256m "-XX:ArchiveClassesAtExit=$archive.new"
  launch kafka-1 "${KAFKA_JAVA[@]}" kafka.Kafka "$STATE/kafka-1/server.properties"
  await_ready kafka-1 60 kafka_answers kafka-1
  printf 'one\ntwo\n' | timeout 10 kcat -P -b "$(kafka_bootstrap '')" -t warm-up -X acks=all -X compression.codec=lz4 || true
  timeout 10 kcat -C -b "$(kafka_bootstrap '')" -t warm-up -o beginning -e -q >/dev/null || true
  kill "$(pid_of kafka-1)"
  wait_stopped kafka-1 60
  mv "$archive.new" "$archive"
}

# kafka_prepare SERVICE: creates the data folder (once) and server.properties (at each start).
kafka_prepare() {
  local id=${1#kafka-} dir=$STATE/$1
  if [[ ! -e $dir/data/meta.properties ]]; then
    mkdir -p "$dir/data"
    [[ -e $STATE/cluster-id ]] || kafka_uuid >"$STATE/cluster-id"
    cp "$KAFKA_CACHE/template/bootstrap.checkpoint" "$dir/data/"
    printf 'version=1\nnode.id=%s\ndirectory.id=%s\ncluster.id=%s\n' \
      "$id" "$(kafka_uuid)" "$(<"$STATE/cluster-id")" >"$dir/data/meta.properties"
  fi
  kafka_properties "$1" >"$dir/server.properties"
}

# Prints 16 random bytes in Kafka's notation for ids. Kafka refuses ids that begin with a dash.
kafka_uuid() { local id; id=$(head -c 16 /dev/urandom | base64 | tr '+/' '-_'); id=${id%%=*}; echo "${id/#-/A}"; }

kafka_properties() {
  local service=$1 id=${1#kafka-} node voters='' replicas=1 min_isr=1
  for node in $(kafka_services); do voters+=",${node#kafka-}@127.0.0.1:$(port "$node-controller")"; done
  if ((BROKERS >= 3)); then replicas=3 min_isr=2; fi
  local listeners protocols=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
  listeners="PLAINTEXT://127.0.0.1:$(port "$service")"
  if [[ $SECURE == yes ]]; then
    listeners+=",SASL://127.0.0.1:$(port "$service-sasl"),MTLS://127.0.0.1:$(port "$service-mtls")"
    protocols+=,SASL:SASL_SSL,MTLS:SSL
  fi
  cat <<END
process.roles=broker,controller
node.id=$id
controller.quorum.voters=${voters#,}
controller.listener.names=CONTROLLER
listeners=$listeners,CONTROLLER://127.0.0.1:$(port "$service-controller")
advertised.listeners=$listeners
listener.security.protocol.map=$protocols
inter.broker.listener.name=PLAINTEXT
log.dirs=$STATE/$service/data
auto.create.topics.enable=true
num.partitions=6
default.replication.factor=$replicas
min.insync.replicas=$min_isr
offsets.topic.replication.factor=$replicas
offsets.topic.num.partitions=8
transaction.state.log.replication.factor=$replicas
transaction.state.log.min.isr=$min_isr
transaction.state.log.num.partitions=8
share.coordinator.state.topic.replication.factor=$replicas
share.coordinator.state.topic.min.isr=$min_isr
share.coordinator.state.topic.num.partitions=4
group.initial.rebalance.delay.ms=0
# A killed member is replaced after 10 s (default: 45), and partitions move at the next heartbeat.
group.consumer.min.session.timeout.ms=6000
group.consumer.session.timeout.ms=10000
group.consumer.min.heartbeat.interval.ms=1000
group.consumer.heartbeat.interval.ms=1000
message.max.bytes=2097152
replica.fetch.max.bytes=4194304
log.retention.hours=720
log.cleaner.dedupe.buffer.size=33554432
# Kafka preallocates the index files of every partition. Small ones save disk space with thousands of test topics.
log.index.size.max.bytes=1048576
num.recovery.threads.per.data.dir=2
END
  if ((BROKERS >= 3)); then
    # Three JVMs share the machine, so each gets fewer threads. A dead broker is detected after 5 s (default: 9).
    cat <<END
num.network.threads=2
num.io.threads=4
num.replica.fetchers=1
broker.heartbeat.interval.ms=1000
broker.session.timeout.ms=5000
END
  fi
  if [[ $SECURE == yes ]]; then
    cat <<END
ssl.keystore.type=PEM
ssl.keystore.location=$STATE/tls/server.pem
ssl.truststore.type=PEM
ssl.truststore.location=$STATE/tls/ca.crt
sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.sasl.ssl.client.auth=none
listener.name.sasl.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.mtls.ssl.client.auth=required
END
  fi
  # These come last, so that --kafka-config overrides the settings above.
  ((${#KAFKA_EXTRA[@]} == 0)) || printf '%s\n' "${KAFKA_EXTRA[@]}"
}

kafka_start() {
  local service=$1 heap=${KAFKA_HEAP:-512m} archive
  ((BROKERS == 1)) || heap=${KAFKA_HEAP:-288m}
  archive=$(kafka_archive)
  kafka_prepare "$service"
  kafka_java "$heap" -Xshare:auto "-XX:SharedArchiveFile=$archive"
  launch "$service" "${KAFKA_JAVA[@]}" kafka.Kafka "$STATE/$service/server.properties"
}

# kafka_answers SERVICE: succeeds if the broker answers a metadata request, and all running brokers are registered and
# not fenced.
kafka_answers() {
  local expected=0 service seen
  # kcat waits a second before it retries, so the port is tested first.
  listening "$(port "$1")" || return 1
  for service in $(kafka_services); do if running "$service"; then expected=$((expected + 1)); fi; done
  seen=$(timeout 10 kcat -L -J -m 5 -b "127.0.0.1:$(port "$1")" 2>/dev/null | jq '.brokers | length' 2>/dev/null) || return 1
  ((seen >= expected))
}

kafka_wait() { await_ready "$1" 60 kafka_answers "$1"; }

kafka_stop() { local pid; if pid=$(pid_of "$1"); then kill "$pid" 2>/dev/null || true; fi; }
# shellcheck disable=SC2034
KAFKA_STOP_SECONDS=20
