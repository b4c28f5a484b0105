{{/* Lists the consumer groups of a role with their topics. Takes (list $ "processor"). */}}
{{- define "postrider.consumers" -}}
{{- $ := index . 0 -}}
{{- $config := include "postrider.config" . | fromYaml -}}
{{- $groups := dig "kafka" "group_prefix" "" $config -}}
{{- $topics := dig "kafka" "topic_prefix" "" $config -}}
{{- if eq (index . 1) "processor" }}
- {group: {{ $groups }}postrider-kv{{ include "postrider.epoch" (dig "kv" "epoch" 0 $config) }}, topic: {{ $topics }}messages}
{{- if include "postrider.postgresOn" $ }}
- {group: {{ $groups }}postrider-comments{{ include "postrider.epoch" (dig "comments" "epoch" 0 $config) }}, topic: {{ $topics }}comments}
- {group: {{ $groups }}{{ dig "messages" "group" "client-response-group" $config }}{{ include "postrider.epoch" (dig "messages" "epoch" 0 $config) }}, topic: {{ $topics }}message}
- {group: {{ $groups }}postrider-feed{{ include "postrider.epoch" (dig "feed" "epoch" 0 $config) }}, topic: {{ $topics }}post-events}
{{- end }}
{{- else }}
{{- range dig "gateway" "relays" list $config }}
- {group: {{ $groups }}{{ .group | default (printf "http-consumer-%s" .name) }}, topic: {{ .topic }}}
{{- end }}
{{- end }}
{{- end }}

{{- define "postrider.epoch" -}}
{{- if gt (int .) 0 }}-e{{ int . }}{{ end -}}
{{- end }}

{{/* KEDA reads the user name only from a secret. Takes (list $ "processor"). */}}
{{- define "postrider.kedaAuthentication" -}}
{{- $arguments := . -}}
{{- $fullname := printf "%s-%s-kafka" (include "postrider.fullname" (index . 0)) (index . 1) -}}
{{- with index . 0 -}}
{{- $ := . -}}
{{- if or (include "postrider.usesSasl" .) (include "postrider.usesTls" .) }}
{{- if include "postrider.usesSasl" . }}
---
apiVersion: v1
kind: Secret
metadata:
  name: {{ $fullname }}-username
  labels: {{- include "postrider.labels" . | nindent 4 }}
stringData:
  username: {{ include "postrider.saslUsername" $arguments | quote }}
{{- end }}
---
apiVersion: keda.sh/v1alpha1
kind: TriggerAuthentication
metadata:
  name: {{ $fullname }}
  labels: {{- include "postrider.labels" . | nindent 4 }}
spec:
  secretTargetRef:
    {{- if include "postrider.usesSasl" . }}
    - {parameter: username, name: {{ $fullname }}-username, key: username}
    - {parameter: password, name: {{ include "postrider.saslSecret" $arguments }}, key: {{ .Values.kafka.sasl.passwordKey }}}
    {{- end }}
    {{- if include "postrider.usesTls" . }}
    {{- with include "postrider.kafkaCaSecret" . }}
    - {parameter: ca, name: {{ . }}, key: {{ $.Values.kafka.tls.caKey }}}
    {{- end }}
    {{- with include "postrider.kafkaCertificateSecret" $arguments }}
    - {parameter: cert, name: {{ . }}, key: {{ $.Values.kafka.tls.certificateKey }}}
    - {parameter: key, name: {{ . }}, key: {{ $.Values.kafka.tls.keyKey }}}
    {{- end }}
    {{- end }}
{{- end }}
{{- end }}
{{- end }}
