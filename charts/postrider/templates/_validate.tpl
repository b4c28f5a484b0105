{{/* Checks that a schema cannot express. Reports all problems at once, as sentences that name the value. */}}
{{- define "postrider.validate" -}}
{{- $problems := list -}}
{{- $kafka := .Values.kafka -}}
{{- if not (or $kafka.brokers $kafka.strimzi.cluster) -}}
{{- $problems = append $problems "kafka.brokers is empty: name the bootstrap servers, such as [\"kafka:9092\"], or set kafka.strimzi.cluster" -}}
{{- end -}}
{{- if not (or .Values.redis.url .Values.redis.existingSecret) -}}
{{- $problems = append $problems "redis.url is empty: set it, or set redis.existingSecret to a secret that contains it" -}}
{{- end -}}
{{- range $name := list "redis" "postgres" -}}
{{- $server := index $.Values $name -}}
{{- if and $server.url $server.existingSecret -}}
{{- $problems = append $problems (printf "%s.url and %s.existingSecret are both set: choose one" $name $name) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.postgres.tls.mode (hasPrefix "verify" .Values.postgres.tls.mode) (not .Values.postgres.tls.caSecret) -}}
{{- $problems = append $problems "postgres.tls.mode verifies the server: set postgres.tls.caSecret to the secret with its certificate authority" -}}
{{- end -}}
{{- if include "postrider.usesSasl" . -}}
{{- if not (include "postrider.saslSecret" (list . "api")) -}}
{{- $problems = append $problems (printf "kafka.securityProtocol is %s: set kafka.sasl.existingSecret, or kafka.strimzi.user.enabled" $kafka.securityProtocol) -}}
{{- end -}}
{{- if not (include "postrider.saslUsername" (list . "api")) -}}
{{- $problems = append $problems "kafka.sasl.username is empty" -}}
{{- end -}}
{{- else if $kafka.sasl.existingSecret -}}
{{- $problems = append $problems (printf "kafka.sasl.existingSecret is set, but kafka.securityProtocol is %s: use sasl_ssl or sasl_plaintext" $kafka.securityProtocol) -}}
{{- end -}}
{{- if and $kafka.strimzi.user.enabled (eq $kafka.strimzi.user.authentication "tls") (ne $kafka.securityProtocol "ssl") -}}
{{- $problems = append $problems "kafka.strimzi.user.authentication is tls: set kafka.securityProtocol to ssl" -}}
{{- end -}}
{{- if and (or $kafka.strimzi.topics.enabled $kafka.strimzi.user.enabled) (not $kafka.strimzi.cluster) -}}
{{- $problems = append $problems "kafka.strimzi.topics and kafka.strimzi.user need kafka.strimzi.cluster, the name of the Kafka resource" -}}
{{- end -}}
{{- if gt (int $kafka.strimzi.topics.minInsyncReplicas) (int $kafka.strimzi.topics.replicas) -}}
{{- $problems = append $problems "kafka.strimzi.topics.minInsyncReplicas is above replicas: no write could succeed" -}}
{{- end -}}
{{- if and .Values.rotation.enabled .Values.rotation.leaseSeconds (le (int .Values.rotation.leaseSeconds) (int (include "postrider.gracePeriod" .))) -}}
{{- $problems = append $problems (printf "rotation.leaseSeconds is %v, and a pod may take %v s to drain: set it to that time plus the time that a process needs to become ready" .Values.rotation.leaseSeconds (include "postrider.gracePeriod" .)) -}}
{{- end -}}
{{- range $name := include "postrider.roles" . | fromYamlArray -}}
{{- $role := include "postrider.role" (list $ $name) | fromYaml -}}
{{- with $role.autoscaling -}}
{{- if .enabled -}}
{{- if and (eq $name "api") (eq .type "lag") -}}
{{- $problems = append $problems "roles.api.autoscaling.type is lag, but the api consumes nothing: use cpu" -}}
{{- end -}}
{{- if gt (int .minReplicas) (int .maxReplicas) -}}
{{- $problems = append $problems (printf "roles.%s.autoscaling.minReplicas is above maxReplicas" $name) -}}
{{- end -}}
{{- if and (eq .type "cpu") (not (dig "requests" "cpu" "" $role.resources)) -}}
{{- $problems = append $problems (printf "roles.%s.autoscaling.type is cpu: set roles.%s.resources.requests.cpu, because the target is a percentage of it" $name $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if eq $name "relay" -}}
{{- $routes := dig "gateway" "relays" (dig "gateway" "relays" list $.Values.config) $role.config -}}
{{- if not (or $routes (include "postrider.postgresOn" $)) -}}
{{- $problems = append $problems "roles.relay has nothing to do without Postgres and without config.gateway.relays: set roles.relay.enabled to false" -}}
{{- end -}}
{{- if and $role.autoscaling.enabled (eq $role.autoscaling.type "lag") (not $routes) -}}
{{- $problems = append $problems "roles.relay.autoscaling.type is lag, but config.gateway.relays is empty, and the outbox has no lag in Kafka: use cpu" -}}
{{- end -}}
{{- end -}}
{{- range include "postrider.plainCredentials" (mergeOverwrite (deepCopy $.Values.config) (deepCopy $role.config)) | fromYamlArray -}}
{{- $problems = append $problems . -}}
{{- end -}}
{{- range $path := list "redis.url" "postgres.url" "kafka.sasl.password" "kafka.tls.key_password" "auth.bootstrap_key" -}}
{{- range $config := list $.Values.config $role.config -}}
{{- $found := $config -}}
{{- range splitList "." $path -}}
{{- $found = ternary (index (ternary $found dict (kindIs "map" $found)) .) "" (kindIs "map" $found) -}}
{{- end -}}
{{- if $found -}}
{{- $problems = append $problems (printf "config.%s is a secret and would be in a config map: use the chart's values redis, postgres, kafka and auth" $path) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range include "postrider.plainCredentials" (dict "telemetry" .Values.telemetry "auth" (dict "token" (dict "jwks_url" .Values.auth.jwksUrl))) | fromYamlArray -}}
{{- $problems = append $problems . -}}
{{- end -}}
{{- if .Values.roles.api.enabled -}}
{{- $role := include "postrider.role" (list $ "api") | fromYaml -}}
{{- if not (dig "gateway" "topics" "allow" list (mergeOverwrite (deepCopy .Values.config) (deepCopy $role.config))) -}}
{{- $problems = append $problems "config.gateway.topics.allow is not set: list the topics that /produce may write to, such as [\"orders\", \"app.*\"], or [\"*\"] for all except postrider's own" -}}
{{- end -}}
{{- range concat (include "postrider.authProblems" . | fromYamlArray) (include "postrider.callerProblems" . | fromYamlArray) -}}
{{- $problems = append $problems . -}}
{{- end -}}
{{- end -}}
{{- if and .Values.roles.api.enabled (include "postrider.postgresOn" .) (not .Values.roles.relay.enabled) -}}
{{- $problems = append $problems "roles.relay is off: with Postgres, posts would be accepted and never reach a feed" -}}
{{- end -}}
{{- if not (include "postrider.roles" . | fromYamlArray) -}}
{{- $problems = append $problems "no role is enabled" -}}
{{- end -}}
{{- if and (or .Values.ingress.enabled .Values.httpRoute.enabled) (not .Values.roles.api.enabled) -}}
{{- $problems = append $problems "ingress and httpRoute need the api: enable roles.api" -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) -}}
{{- $problems = append $problems "ingress.hosts is empty" -}}
{{- end -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) -}}
{{- $problems = append $problems "httpRoute.parentRefs is empty: name the Gateway" -}}
{{- end -}}
{{- if $problems -}}
{{- fail (printf "\n\nThese values cannot be installed:\n  - %s\n" (join "\n  - " (uniq $problems))) -}}
{{- end -}}
{{- end }}

{{/* Lists what is wrong with authentication, one sentence per line. */}}
{{- define "postrider.authProblems" -}}
{{- $mode := include "postrider.authMode" . -}}
{{- $config := include "postrider.config" (list . "api") | fromYaml -}}
{{- $token := dig "auth" "token" dict $config -}}
{{- if not $mode }}
- "auth.mode is not set: write `required` to ask every request for a credential, or `\"off\"` to let everybody who reaches the pods read and write everything"
{{- end }}
{{- if and (eq $mode "required") (not (or (include "postrider.bootstrapSecret" .) $token.issuer (include "postrider.postgresOn" .))) }}
- "auth.mode is required, but no credential could be accepted: set auth.bootstrapKey.enabled, auth.issuer, or Postgres, which stores API keys"
{{- end }}
{{- if and $token.issuer (not $token.audiences) }}
- "auth.audiences is empty: list the audiences, of which a token's claim `aud` must have one"
{{- end }}
{{- if and (or .Values.auth.audiences .Values.auth.jwksUrl .Values.auth.algorithms) (not .Values.auth.issuer) }}
- "auth.audiences, auth.jwksUrl and auth.algorithms are for tokens: set auth.issuer"
{{- end }}
{{- if and (has "HS256" ($token.algorithms | default list)) (not (or $token.secret $token.secret_file)) }}
- "auth.algorithms has HS256: set config.auth.token.secret to {secretKeyRef: {name: SECRET, key: KEY}}, the secret that the issuer signs with"
{{- end }}
{{- end }}

{{/* Lists what is wrong with how callers reach the api and are told apart, one sentence per line. */}}
{{- define "postrider.callerProblems" -}}
{{- $config := include "postrider.config" (list . "api") | fromYaml -}}
{{- $limits := dig "limits" dict $config -}}
{{- $proxied := or .Values.ingress.enabled .Values.httpRoute.enabled -}}
{{- if and (or $limits.requests_per_second $limits.bytes_per_second) (eq (include "postrider.authMode" .) "off") $proxied (not (dig "http" "trusted_proxies" list $config)) }}
- "limits are per address while auth.mode is off, and every client has the address of the proxy in front (ingress, httpRoute): list the proxies' networks in config.http.trusted_proxies"
{{- end }}
{{- $tls := dig "http" "tls" dict $config -}}
{{- if ne (empty $tls.certificate_file) (empty $tls.key_file) }}
- "config.http.tls needs both certificate_file and key_file"
{{- end }}
{{- end }}
