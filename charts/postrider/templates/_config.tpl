{{/* Renders the postrider.yaml of a role. Takes (list $ "api"). Later sources override earlier ones:
  values of the chart, `config`, the role's `config`. */}}
{{- define "postrider.config" -}}
{{- $root := index . 0 -}}
{{- $role := include "postrider.role" . | fromYaml -}}
{{- $known := include "postrider.knownConfig" . | fromYaml -}}
{{- $merged := mergeOverwrite $known (deepCopy $root.Values.config) (deepCopy $role.config) -}}
{{- include "postrider.filesForSecrets" $merged -}}
{{- if ne (index . 1) "api" -}}
{{- /* Only the api asks for credentials, and only its pods mount the secrets. */ -}}
{{- $merged = omit $merged "auth" -}}
{{- end -}}
{{- if and (ne (index . 1) "relay") (hasKey $merged "gateway") -}}
{{- /* Only the relay gets the routes, so that a new route does not restart other roles. */ -}}
{{- $_ := set $merged "gateway" (omit $merged.gateway "relays") -}}
{{- end -}}
{{- toYaml $merged -}}
{{- end }}

{{- define "postrider.knownConfig" -}}
{{- $ := index . 0 -}}
{{- $secrets := "/etc/postrider/secrets" -}}
role: {{ index . 1 }}
{{- if eq (index . 1) "api" }}
http:
  listen: ["0.0.0.0:8080"]
  {{- if $.Values.tls.existingSecret }}
  tls:
    certificate_file: {{ $secrets }}/tls/tls.crt
    key_file: {{ $secrets }}/tls/tls.key
  {{- end }}
  {{- with $.Values.cors.origins }}
  cors:
    origins: {{ toJson . }}
  {{- end }}
{{- with $.Values.limits }}
{{- if or .requestsPerSecond .bytesPerSecond }}
limits:
  requests_per_second: {{ int64 .requestsPerSecond }}
  bytes_per_second: {{ int64 .bytesPerSecond }}
  burst_seconds: {{ int64 .burstSeconds }}
{{- end }}
{{- end }}
{{- with $.Values.auth }}
auth:
  mode: {{ include "postrider.authMode" $ | quote }}
  {{- if include "postrider.bootstrapSecret" $ }}
  bootstrap_key_file: {{ $secrets }}/bootstrap-key/key
  {{- end }}
  {{- if .issuer }}
  token:
    issuer: {{ .issuer | quote }}
    audiences: {{ toJson .audiences }}
    {{- with .algorithms }}
    algorithms: {{ toJson . }}
    {{- end }}
    {{- with .jwksUrl }}
    jwks_url: {{ quote . }}
    {{- end }}
  {{- end }}
{{- end }}
{{- end }}
management:
  listen: ["0.0.0.0:9090"]
drain:
  readiness_delay_ms: {{ mul 1000 $.Values.drain.readinessDelaySeconds }}
  grace_ms: {{ mul 1000 $.Values.drain.graceSeconds }}
{{- if $.Values.rotation.enabled }}
rotation:
  files:
    {{- /* The relay uses Redis only to order restarts, and reads the mounted secret when it does so. */ -}}
    {{- /* The api uses a changed certificate without a restart. */ -}}
    {{- $unwatched := ternary (list "redis") (list "tls") (eq (index . 1) "relay") }}
    {{- range $name, $_ := include "postrider.mounts" . | fromYaml }}
    {{- if not (has $name $unwatched) }}
    - {{ $secrets }}/{{ $name }}
    {{- end }}
    {{- end }}
  lease_ms: {{ mul 1000 ($.Values.rotation.leaseSeconds | default (add 60 (include "postrider.gracePeriod" $))) }}
  spread_ms: {{ mul 1000 $.Values.rotation.spreadSeconds }}
{{- end }}
kafka:
  brokers: {{ include "postrider.brokers" $ | splitList "," | toJson }}
  security_protocol: {{ $.Values.kafka.securityProtocol }}
  {{- if include "postrider.usesSasl" $ }}
  sasl:
    mechanism: {{ $.Values.kafka.sasl.mechanism }}
    username: {{ include "postrider.saslUsername" . | quote }}
    password_file: {{ $secrets }}/kafka-password/password
  {{- end }}
  {{- if include "postrider.usesTls" $ }}
  tls:
    {{- if include "postrider.kafkaCaSecret" $ }}
    ca_file: {{ $secrets }}/kafka-ca/ca.crt
    {{- end }}
    {{- if include "postrider.kafkaCertificateSecret" . }}
    certificate_file: {{ $secrets }}/kafka-certificate/user.crt
    key_file: {{ $secrets }}/kafka-certificate/user.key
    {{- end }}
  {{- end }}
  {{- if $.Values.kafka.strimzi.topics.enabled }}
  topics:
    create: false
    replication_factor: {{ $.Values.kafka.strimzi.topics.replicas }}
    min_insync_replicas: {{ $.Values.kafka.strimzi.topics.minInsyncReplicas }}
  {{- end }}
redis:
  url_file: {{ $secrets }}/redis/url
  cluster: {{ $.Values.redis.cluster }}
{{- if include "postrider.postgresOn" $ }}
postgres:
  url_file: {{ $secrets }}/postgres/url
{{- end }}
telemetry:
  log_format: json
  {{- with $.Values.telemetry.logFilter }}
  log_filter: {{ . | quote }}
  {{- end }}
  {{- with $.Values.telemetry.otlp }}
  {{- if .endpoint }}
  otlp:
    endpoint: {{ .endpoint | quote }}
    protocol: {{ .protocol }}
    sample_ratio: {{ .sampleRatio }}
    {{- with .headers }}
    headers: {{- toYaml . | nindent 6 }}
    {{- end }}
  {{- end }}
  {{- end }}
{{- end }}

{{/* Lists the enabled roles. */}}
{{- define "postrider.roles" -}}
{{- range $name, $role := .Values.roles }}
{{- if $role.enabled }}
- {{ $name }}
{{- end }}
{{- end }}
{{- end }}
