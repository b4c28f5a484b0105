# shellcheck shell=bash disable=SC2034,SC2154,SC2317  # its caller's variables, and functions that `await` calls
# Does the work of Strimzi's operators for the Kafka of tests/e2e/servers: creates the certificate authorities, the
# listeners' certificate, a topic for each KafkaTopic, and for each KafkaUser its secret, credentials and ACLs. Sourced by
# tests/e2e/run.

# shellcheck source=dev/lib/tls.sh
source dev/lib/tls.sh

kafka() { kubectl --namespace "$ONE" exec statefulset/kafka -- "$@" </dev/null; }
# Runs AclCommand with java, because not every image has kafka-acls.sh.
kafka_acls() { kafka java -Xmx128m -XX:TieredStopAtLevel=1 -Dorg.slf4j.simpleLogger.defaultLogLevel=warn -cp '/opt/kafka/libs/*' org.apache.kafka.tools.AclCommand --bootstrap-server localhost:9092 "$@"; }

# put_secret NAMESPACE NAME ARGUMENT...
put_secret() {
  local namespace=$1 name=$2
  shift 2
  kubectl --namespace "$namespace" create secret generic "$name" "$@" --dry-run=client -o yaml | kubectl apply --filename - >/dev/null
}

# Creates the cluster's authority, which clients trust, and the clients' authority, which brokers trust.
operator_authorities() {
  mkdir "$work/cluster" "$work/clients"
  {
    tls_authority "$work/cluster" '/O=io.strimzi/CN=cluster-ca v0'
    tls_authority "$work/clients" '/O=io.strimzi/CN=clients-ca v0'
    tls_issue "$work/cluster" server '/O=io.strimzi/CN=events-kafka' "subjectAltName=DNS:kafka.$ONE.svc,DNS:events-kafka-bootstrap.$ONE.svc
extendedKeyUsage=serverAuth"
  } >"$work/openssl" 2>&1 || { cat "$work/openssl" >&2; die "openssl could not make the certificates"; }
  cat "$work/cluster"/{server.key,server.crt,ca.crt} >"$work/server.pem"
  put_secret "$1" kafka-listeners --from-file="$work/server.pem" --from-file=clients-ca.crt="$work/clients/ca.crt"
}

# operator_cluster NAMESPACE: creates the secret with the cluster's authority, and the service of the Kafka `events`.
operator_cluster() {
  put_secret "$1" events-cluster-ca-cert --from-file="$work/cluster/ca.crt" --from-literal=ca.password=unused
  kubectl --namespace "$ONE" apply --filename - >/dev/null <<'END'
apiVersion: v1
kind: Service
metadata: {name: events-kafka-bootstrap}
spec:
  selector: {app.kubernetes.io/name: kafka}
  ports: [{name: plain, port: 9092}, {name: scram, port: 9093}, {name: mtls, port: 9094}]
END
}

# Renews the cluster's authority: clients then trust the old one and the new one.
operator_renews_authority() {
  mkdir "$work/renewed"
  tls_authority "$work/renewed" '/O=io.strimzi/CN=cluster-ca v1' 2>/dev/null
  cat "$work/renewed/ca.crt" >>"$work/cluster/ca.crt"
  operator_cluster "$1"
}

operator_topics() {
  kubectl --namespace "$1" get kafkatopics.kafka.strimzi.io -o json | jq -r '.items[].spec
    | "--topic \(.topicName) --partitions \(.partitions) --replication-factor \(.replicas) "
      + ([.config | to_entries[] | "--config \(.key)=\(.value)"] | join(" "))' |
    while read -ra words; do
      kafka kafka-topics.sh --bootstrap-server localhost:9092 --create --if-not-exists "${words[@]}" >/dev/null
    done
}

operator_user_names() { kubectl --namespace "$1" get kafkausers.kafka.strimzi.io -o json | jq -r '.items[].metadata.name'; }
# operator_users NAMESPACE: creates the users, one for each role.
operator_users() {
  local name
  for name in $(operator_user_names "$1"); do operator_user "$1" "$name"; done
}

# operator_user NAMESPACE NAME: creates a user with its ACLs and credentials.
operator_user() {
  local name=$2 kind principal words
  kubectl --namespace "$1" get kafkausers.kafka.strimzi.io "$name" -o json >"$work/user"
  kind=$(jq -r .spec.authentication.type "$work/user")
  if [[ $kind == tls ]]; then principal=User:CN=$name; else principal=User:$name; fi
  jq -r '.spec.authorization.acls | group_by([.resource.type, .resource.patternType, .operations])[]
    | (.[0].operations | map("--operation \(.)"))
      + (if .[0].resource.type == "cluster" then ["--cluster"] else
          map("--\(.resource.type) \(.resource.name)")
          + ["--resource-pattern-type \(if .[0].resource.patternType == "prefix" then "prefixed" else "literal" end)"] end)
    | join(" ")' "$work/user" >"$work/rights"
  while read -ra words; do
    kafka_acls --add --allow-principal "$principal" "${words[@]}" >"$work/acls" || { cat "$work/acls" >&2; die "Kafka refused the ACLs"; }
  done <"$work/rights"
  if [[ $kind == tls ]]; then operator_certificate "$1" "$name"; else operator_password "$1" "$name"; fi
}

# operator_renews NAMESPACE password|certificate: renews the credentials of every user.
operator_renews() {
  local name
  for name in $(operator_user_names "$1"); do "operator_$2" "$1" "$name"; done
}

# Both replace the user's secret. A new password invalidates the old one.
operator_password() {
  local password
  password=$(openssl rand -hex 16)
  kafka kafka-configs.sh --bootstrap-server localhost:9092 --alter --entity-type users --entity-name "$2" --add-config "SCRAM-SHA-512=[password=$password]" >/dev/null
  put_secret "$1" "$2" --from-literal=password="$password" \
    --from-literal=sasl.jaas.config="org.apache.kafka.common.security.scram.ScramLoginModule required username=\"$2\" password=\"$password\";"
}
operator_certificate() {
  tls_issue "$work/clients" user "/CN=$2" 'extendedKeyUsage=clientAuth' >"$work/openssl" 2>&1 || { cat "$work/openssl" >&2; die "openssl made no certificate"; }
  put_secret "$1" "$2" --from-file="$work/clients/ca.crt" --from-file="$work/clients/user.crt" --from-file="$work/clients/user.key"
}
