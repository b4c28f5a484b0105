{{/* Credentials in the configuration. A reference `{secretKeyRef: {name: …, key: …}}` may replace a relay's target_url,
  a header value, or the URL or secret that verifies tokens. It becomes a file that is mounted from the secret. */}}

{{/* Lists the references in a role's configuration by name and key. Takes (list $ "relay"). */}}
{{- define "postrider.references" -}}
{{- $root := index . 0 -}}
{{- $role := include "postrider.role" . | fromYaml -}}
{{- $config := mergeOverwrite (dict "telemetry" (dict "otlp" (pick $root.Values.telemetry.otlp "headers"))) (deepCopy $root.Values.config) (deepCopy $role.config) -}}
{{- $found := list -}}
{{- if eq (index . 1) "relay" -}}
{{- range dig "gateway" "relays" list $config -}}
{{- $found = concat $found (list .target_url) (values (.headers | default dict)) -}}
{{- end -}}
{{- end -}}
{{- if eq (index . 1) "api" -}}
{{- $found = concat $found (values (pick (dig "auth" "token" dict $config) "jwks_url" "secret")) -}}
{{- end -}}
{{- $otlp := dig "telemetry" "otlp" dict $config -}}
{{- $found = concat $found (list $otlp.endpoint) (values ($otlp.headers | default dict)) -}}
{{- range $found -}}
{{- if and (kindIs "map" .) (hasKey . "secretKeyRef") }}
- {{ toJson .secretKeyRef }}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Folder of a referenced secret. Its name is shortened, because volume names are limited to 63 characters. */}}
{{- define "postrider.referenceFolder" -}}
{{- printf "ref-%s-%s" (. | replace "." "-" | trunc 48 | trimSuffix "-") (. | sha256sum | trunc 6) -}}
{{- end }}

{{/* Maps folders to the referenced secrets and keys, like `postrider.mounts`. */}}
{{- define "postrider.referenced" -}}
{{- $folders := dict -}}
{{- range include "postrider.references" . | fromYamlArray -}}
{{- $folder := include "postrider.referenceFolder" .name -}}
{{- $keys := (get $folders $folder | default dict).keys | default dict -}}
{{- $_ := set $keys .key .key -}}
{{- $_ := set $folders $folder (dict "secret" .name "keys" $keys) -}}
{{- end -}}
{{- if $folders }}
{{ toYaml $folders }}
{{ end -}}
{{- end }}

{{- define "postrider.referenceFile" -}}
/etc/postrider/secrets/{{ include "postrider.referenceFolder" .name }}/{{ .key }}
{{- end }}

{{/* Replaces references with file names, in the given configuration itself. */}}
{{- define "postrider.filesForSecrets" -}}
{{- $holders := list -}}
{{- range dig "gateway" "relays" list . -}}
{{- $holders = append $holders (dict "section" . "url" "target_url") -}}
{{- end -}}
{{- with dig "telemetry" "otlp" nil . -}}
{{- $holders = append $holders (dict "section" . "url" "endpoint") -}}
{{- end -}}
{{- with dig "auth" "token" nil . -}}
{{- $holders = concat $holders (list (dict "section" . "url" "jwks_url") (dict "section" . "url" "secret")) -}}
{{- end -}}
{{- range $holder := $holders -}}
{{- $section := $holder.section -}}
{{- $url := get $section $holder.url -}}
{{- if kindIs "map" $url -}}
{{- $_ := set $section (printf "%s_file" $holder.url) (include "postrider.referenceFile" $url.secretKeyRef) -}}
{{- $_ := unset $section $holder.url -}}
{{- end -}}
{{- range $name, $value := $section.headers | default dict -}}
{{- if and (kindIs "map" $value) (hasKey $value "secretKeyRef") -}}
{{- $_ := set $section.headers $name (dict "file" (include "postrider.referenceFile" $value.secretKeyRef)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Reports the plain-text credentials in a configuration, one sentence per line. Takes the configuration. */}}
{{- define "postrider.plainCredentials" -}}
{{- $telling := "(?i)(^|[-_.])(authorization|auth|cookie|key|apikey|token|jwt|secret|password|passwd|signature|sig|credentials?|session)s?([-_.]|$)" -}}
{{- $sections := list -}}
{{- range dig "gateway" "relays" list . -}}
{{- $sections = append $sections (dict "path" (printf "config.gateway.relays (%s)" (.name | default "?")) "url" (.target_url | default "") "key" "target_url" "headers" (.headers | default dict)) -}}
{{- end -}}
{{- with dig "telemetry" "otlp" nil . -}}
{{- $sections = append $sections (dict "path" "telemetry.otlp" "url" (.endpoint | default "") "key" "endpoint" "headers" (.headers | default dict)) -}}
{{- end -}}
{{- with dig "auth" "token" nil . -}}
{{- $sections = append $sections (dict "path" "auth" "url" (.jwks_url | default "") "key" "the URL of the issuer's keys" "headers" dict) -}}
{{- if and .secret (kindIs "string" .secret) }}
- "config.auth.token.secret is a secret and would be in a config map: write {secretKeyRef: {name: SECRET, key: KEY}} in its place"
{{- end -}}
{{- end -}}
{{- range $section := $sections -}}
{{- range $name, $value := $section.headers -}}
{{- if and (kindIs "string" $value) (regexMatch $telling $name) }}
- {{ printf "%s: the header `%s` is a credential and would be in a config map: write {secretKeyRef: {name: SECRET, key: KEY}} in its place" $section.path $name | quote }}
{{- end -}}
{{- end -}}
{{- if kindIs "string" $section.url -}}
{{- $query := regexReplaceAll "^[^?]*" $section.url "" -}}
{{- $named := false -}}
{{- range regexFindAll "[?&][^=&#]+" $query -1 -}}
{{- $named = or $named (regexMatch $telling (substr 1 -1 .)) -}}
{{- end -}}
{{- if or (regexMatch "://[^/?#]*@" $section.url) $named }}
- {{ printf "%s: %s has a credential and would be in a config map: write {secretKeyRef: {name: SECRET, key: KEY}} in its place" $section.path $section.key | quote }}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $name, $_ := dig "kafka" "properties" dict . -}}
{{- if regexMatch "(?i)password|secret|token|credential|private|key\\.pem|jaas|oauthbearer\\.config" $name }}
- {{ printf "config.kafka.properties: `%s` is a credential and would be in a config map: use kafka.sasl and kafka.tls, or extraEnv with a secretKeyRef" $name | quote }}
{{- end -}}
{{- end -}}
{{- end }}
