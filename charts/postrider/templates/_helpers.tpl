{{- define "postrider.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end }}

{{- define "postrider.fullname" -}}
{{- $name := include "postrider.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{- define "postrider.selector" -}}
app.kubernetes.io/name: {{ include "postrider.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "postrider.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "postrider.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: postrider
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Labels of pods. They depend on the appVersion but not on the chart's version, so that a change of the chart alone
  does not restart pods. */}}
{{- define "postrider.podLabels" -}}
{{ include "postrider.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: postrider
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "postrider.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "postrider.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "postrider.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end }}

{{/* Merges the values of a role over `defaults`. Takes (list $ "api"). */}}
{{- define "postrider.role" -}}
{{- $root := index . 0 -}}
{{- $own := index $root.Values.roles (index . 1) -}}
{{- toYaml (mergeOverwrite (deepCopy $root.Values.defaults) (deepCopy $own)) -}}
{{- end }}

{{- define "postrider.postgresOn" -}}
{{- if or .Values.postgres.url .Values.postgres.existingSecret }}true{{ end -}}
{{- end }}

{{/* The mode of authentication in effect. YAML reads an unquoted `off` as false. */}}
{{- define "postrider.authMode" -}}
{{- $role := include "postrider.role" (list . "api") | fromYaml -}}
{{- $mode := dig "auth" "mode" .Values.auth.mode (mergeOverwrite (deepCopy .Values.config) (deepCopy $role.config)) -}}
{{- ternary "off" (default "" $mode) (eq (toString $mode) "false") -}}
{{- end }}

{{/* The issuer whose tokens the api accepts; empty if there is none. */}}
{{- define "postrider.issuer" -}}
{{- if eq (include "postrider.authMode" .) "required" -}}
{{- dig "auth" "token" "issuer" "" (include "postrider.config" (list . "api") | fromYaml) -}}
{{- end -}}
{{- end }}

{{/* Scheme of the API port: `https` if the configuration in effect names a certificate. */}}
{{- define "postrider.scheme" -}}
{{- $config := include "postrider.config" (list . "api") | fromYaml -}}
{{- ternary "https" "http" (not (empty (dig "http" "tls" "certificate_file" "" $config))) -}}
{{- end }}

{{/* URL of the API for `helm test`. With TLS, it has the name that certificates for a service usually have. */}}
{{- define "postrider.testUrl" -}}
{{- $host := include "postrider.fullname" . -}}
{{- if eq (include "postrider.scheme" .) "https" -}}
{{- $host = printf "%s.%s.svc" $host .Release.Namespace -}}
{{- end -}}
{{- .Values.tests.url | default (printf "%s://%s:%v" (include "postrider.scheme" .) $host .Values.service.port) -}}
{{- end }}

{{/* Secret with the bootstrap key; empty if there is none. */}}
{{- define "postrider.bootstrapSecret" -}}
{{- if and .Values.roles.api.enabled .Values.auth.bootstrapKey.enabled (eq (include "postrider.authMode" .) "required") -}}
{{- .Values.auth.bootstrapKey.existingSecret | default (printf "%s-bootstrap" (include "postrider.fullname" .)) -}}
{{- end -}}
{{- end }}

{{- define "postrider.usesTls" -}}
{{- if has .Values.kafka.securityProtocol (list "ssl" "sasl_ssl") }}true{{ end -}}
{{- end }}
{{- define "postrider.usesSasl" -}}
{{- if hasPrefix "sasl_" .Values.kafka.securityProtocol }}true{{ end -}}
{{- end }}

{{- define "postrider.strimziVersion" -}}
{{- if .Values.kafka.strimzi.apiVersion -}}
{{- .Values.kafka.strimzi.apiVersion -}}
{{- else if .Capabilities.APIVersions.Has "kafka.strimzi.io/v1" -}}
kafka.strimzi.io/v1
{{- else if .Capabilities.APIVersions.Has "kafka.strimzi.io/v1beta2" -}}
kafka.strimzi.io/v1beta2
{{- else -}}
kafka.strimzi.io/v1
{{- end -}}
{{- end }}
{{- define "postrider.strimziNamespace" -}}
{{- default .Release.Namespace .Values.kafka.strimzi.namespace -}}
{{- end }}
{{/* Name of the role's KafkaUser. Takes (list $ "api"), like the templates below, because each role has its own user. */}}
{{- define "postrider.kafkaUser" -}}
{{- $ := index . 0 -}}
{{- printf "%s-%s" (default (include "postrider.fullname" $) $.Values.kafka.strimzi.user.name) (index . 1) -}}
{{- end }}

{{- define "postrider.brokers" -}}
{{- $kafka := .Values.kafka -}}
{{- if $kafka.brokers -}}
{{- join "," $kafka.brokers -}}
{{- else -}}
{{- $port := ternary 9093 9092 (eq (include "postrider.usesTls" .) "true") -}}
{{- printf "%s-kafka-bootstrap.%s.svc:%d" $kafka.strimzi.cluster (include "postrider.strimziNamespace" .) $port -}}
{{- end -}}
{{- end }}

{{- define "postrider.saslUsername" -}}
{{- $ := index . 0 -}}
{{- $user := $.Values.kafka.strimzi.user -}}
{{- if $.Values.kafka.sasl.username -}}
{{- $.Values.kafka.sasl.username -}}
{{- else if $user.enabled -}}
{{- include "postrider.kafkaUser" . -}}
{{- end -}}
{{- end }}
{{- define "postrider.saslSecret" -}}
{{- $ := index . 0 -}}
{{- $user := $.Values.kafka.strimzi.user -}}
{{- if $.Values.kafka.sasl.existingSecret -}}
{{- $.Values.kafka.sasl.existingSecret -}}
{{- else if and $user.enabled (eq $user.authentication "scram-sha-512") -}}
{{- include "postrider.kafkaUser" . -}}
{{- end -}}
{{- end }}
{{- define "postrider.kafkaCaSecret" -}}
{{- if .Values.kafka.tls.caSecret -}}
{{- .Values.kafka.tls.caSecret -}}
{{- else if .Values.kafka.strimzi.cluster -}}
{{- printf "%s-cluster-ca-cert" .Values.kafka.strimzi.cluster -}}
{{- end -}}
{{- end }}
{{- define "postrider.kafkaCertificateSecret" -}}
{{- $ := index . 0 -}}
{{- $user := $.Values.kafka.strimzi.user -}}
{{- if $.Values.kafka.tls.userSecret -}}
{{- $.Values.kafka.tls.userSecret -}}
{{- else if and $user.enabled (eq $user.authentication "tls") -}}
{{- include "postrider.kafkaUser" . -}}
{{- end -}}
{{- end }}

{{/* Differs from the full name, which Strimzi uses for the KafkaUser's secret. */}}
{{- define "postrider.urlsSecret" -}}
{{- printf "%s-urls" (include "postrider.fullname" .) -}}
{{- end }}

{{/* Maps the folders of a role's mounted secrets to the secret and its keys, as YAML. Takes (list $ "api"). */}}
{{- define "postrider.mounts" -}}
{{- $name := index . 1 -}}
{{- $arguments := . -}}
{{- with index . 0 -}}
{{- $ := . -}}
{{- include "postrider.referenced" $arguments }}
{{- if eq $name "api" }}
{{- with include "postrider.bootstrapSecret" . }}
bootstrap-key: {secret: {{ . }}, keys: {key: {{ $.Values.auth.bootstrapKey.key }}}}
{{- end }}
{{- with .Values.tls }}
{{- if .existingSecret }}
tls: {secret: {{ .existingSecret }}, keys: {tls.crt: {{ .certificateKey }}, tls.key: {{ .keyKey }}}}
{{- end }}
{{- end }}
{{- end }}
{{- if include "postrider.usesSasl" . }}
kafka-password: {secret: {{ include "postrider.saslSecret" $arguments }}, keys: {password: {{ .Values.kafka.sasl.passwordKey }}}}
{{- end }}
{{- if include "postrider.usesTls" . }}
{{- with include "postrider.kafkaCaSecret" . }}
kafka-ca: {secret: {{ . }}, keys: {ca.crt: {{ $.Values.kafka.tls.caKey }}}}
{{- end }}
{{- with include "postrider.kafkaCertificateSecret" $arguments }}
kafka-certificate: {secret: {{ . }}, keys: {user.crt: {{ $.Values.kafka.tls.certificateKey }}, user.key: {{ $.Values.kafka.tls.keyKey }}}}
{{- end }}
{{- end }}
{{- with .Values.redis }}
redis: {secret: {{ .existingSecret | default (include "postrider.urlsSecret" $) }}, keys: {url: {{ ternary .urlKey "redis-url" (not (empty .existingSecret)) }}}}
{{- end }}
{{- if include "postrider.postgresOn" . }}
{{- with .Values.postgres }}
postgres: {secret: {{ .existingSecret | default (include "postrider.urlsSecret" $) }}, keys: {url: {{ ternary .urlKey "postgres-url" (not (empty .existingSecret)) }}}}
{{- if .tls.caSecret }}
postgres-ca: {secret: {{ .tls.caSecret }}, keys: {ca.crt: {{ .tls.caKey }}}}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "postrider.volumes" -}}
{{- range $name, $mount := . }}
- name: {{ $name }}
  secret:
    secretName: {{ $mount.secret }}
    defaultMode: 0440
    items:
      {{- range $path, $key := $mount.keys }}
      - {key: {{ $key }}, path: {{ $path }}}
      {{- end }}
{{- end }}
{{- end }}

{{- define "postrider.volumeMounts" -}}
{{- range $name, $mount := . }}
- {name: {{ $name }}, mountPath: /etc/postrider/secrets/{{ $name }}, readOnly: true}
{{- end }}
{{- end }}

{{/* sqlx reads these variables like libpq; parameters in the URL take precedence. */}}
{{- define "postrider.postgresEnv" -}}
{{- with .Values.postgres.tls.mode }}
- {name: PGSSLMODE, value: {{ . | quote }}}
{{- end }}
{{- if .Values.postgres.tls.caSecret }}
- {name: PGSSLROOTCERT, value: /etc/postrider/secrets/postgres-ca/ca.crt}
{{- end }}
{{- end }}

{{/* Grace period of a pod in seconds: the duration of a stop (docs/operations.md#stop) plus 4 s of reserve. */}}
{{- define "postrider.gracePeriod" -}}
{{- with .Values.drain -}}
{{- add .preStopSeconds .readinessDelaySeconds (mul 2 .graceSeconds) 11 4 -}}
{{- end -}}
{{- end }}
