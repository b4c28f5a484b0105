{{/* Renders the Kafka ACLs of a role; docs/operations.md#rights explains them. Takes root, role and
  postrider's topics. */}}
{{- define "postrider.rights" -}}
{{- $ := index . 0 -}}
{{- $name := index . 1 -}}
{{- $role := include "postrider.role" (list $ $name) | fromYaml -}}
{{- $config := mergeOverwrite (deepCopy $.Values.config) (deepCopy $role.config) -}}
{{- $prefix := dig "kafka" "topic_prefix" "" $config -}}
{{- $reads := dict "api" (list "presence") "processor" (list "messages" "comments" "message" "post-events") "relay" list -}}
{{- $writes := dict "api" (list "messages" "audit" "comments" "message" "presence") "processor" (list "messages" "message-events" "dead-letter-events") "relay" (list "post-events" "dead-letter-deliveries") -}}
{{- $routes := dig "gateway" "relays" list (mergeOverwrite (deepCopy $.Values.config) (include "postrider.role" (list $ "relay") | fromYaml).config) -}}
{{- if dig "dlq" "admin" true $config -}}
{{- /* The api reads and deletes dead letters, and replays their records to the original topics. */ -}}
{{- $_ := set $reads "api" (list "presence" "dead-letter-events" "dead-letter-deliveries" "messages") -}}
{{- $_ := set $writes "api" (concat $writes.api (list "post-events" "dead-letter-events" "dead-letter-deliveries")) -}}
{{- end -}}
{{- range index . 2 }}
{{- $own := trimPrefix $prefix .name }}
- resource: {type: topic, name: {{ .name }}, patternType: literal}
  operations: {{ concat (ternary (list "Read") list (has $own (get $reads $name))) (ternary (list "Write") list (has $own (get $writes $name))) (list "Describe" "DescribeConfigs") (ternary list (list "Create") $.Values.kafka.strimzi.topics.enabled) | toJson | replace "\"" "" | replace "," ", " }}
{{- end }}
{{- if eq $name "api" }}
# Topics that /produce may write to. Their settings limit the records.
{{- range dig "gateway" "topics" "allow" list $config }}
- resource: {type: topic, name: {{ ternary . (trimSuffix "*" .) (eq . "*") | quote }}, patternType: {{ ternary "prefix" "literal" (and (ne . "*") (hasSuffix "*" .)) }}}
  operations: [Write, Describe, DescribeConfigs{{ if dig "gateway" "auto_create_topics" false $config }}, Create{{ end }}]
{{- end }}
{{- if dig "dlq" "admin" true $config }}
{{- range $routes }}
# Topics of routes, to which dead letters are replayed.
- resource: {type: topic, name: {{ .topic }}, patternType: literal}
  operations: [Read, Write, Describe, DescribeConfigs]
{{- end }}
{{- end }}
{{- else }}
{{- if eq $name "relay" }}
{{- range $routes }}
- resource: {type: topic, name: {{ .topic }}, patternType: literal}
  operations: [Read, Describe]
{{- end }}
{{- end }}
{{- range include "postrider.consumers" (list $ $name) | fromYamlArray }}
- resource: {type: group, name: {{ .group }}, patternType: literal}
  operations: [Read, Describe]
{{- end }}
{{- end }}
# Broker settings: the group protocol, and automatic topic creation.
- resource: {type: cluster}
  operations: [DescribeConfigs]
{{- end }}
