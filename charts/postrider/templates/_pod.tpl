{{/* Renders the pod of a role. Takes root, name, and role (its values). */}}
{{- define "postrider.pod" -}}
{{- $ := .root -}}
{{- $role := .role -}}
{{- $mounts := include "postrider.mounts" (list $ .name) | fromYaml -}}
metadata:
  annotations:
    # Each role has its own file, so that a change restarts only the roles that it affects.
    checksum/config: {{ include "postrider.config" (list $ .name) | sha256sum }}
    checksum/urls: {{ printf "%s\n%s" $.Values.redis.url $.Values.postgres.url | sha256sum }}
    {{- with $role.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  labels:
    {{- include "postrider.podLabels" $ | nindent 4 }}
    app.kubernetes.io/component: {{ .name }}
    # Distinguishes the pods of a role from those of jobs and tests.
    postrider/management: "true"
    {{- with $role.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "postrider.serviceAccountName" $ }}
  # postrider never uses the Kubernetes API.
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "postrider.gracePeriod" $ }}
  securityContext: {{- toYaml $.Values.podSecurityContext | nindent 4 }}
  {{- with $.Values.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $role.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $role.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $role.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $role.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- include "postrider.spread" . | nindent 2 }}
  containers:
    - name: postrider
      image: {{ include "postrider.image" $ }}
      imagePullPolicy: {{ $.Values.image.pullPolicy }}
      args: [run, --config, /etc/postrider/config/postrider.yaml]
      securityContext: {{- toYaml $.Values.securityContext | nindent 8 }}
      ports:
        {{- if eq .name "api" }}
        - {name: http, containerPort: 8080}
        {{- end }}
        - {name: management, containerPort: 9090}
      {{- $env := include "postrider.postgresEnv" $ }}
      {{- if or $env $role.extraEnv }}
      env:
        {{- with $env }}
        {{- . | trim | nindent 8 }}
        {{- end }}
        {{- with $role.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- end }}
      {{- with $role.extraEnvFrom }}
      envFrom: {{- toYaml . | nindent 8 }}
      {{- end }}
      startupProbe:
        httpGet: {path: /startupz, port: management}
        periodSeconds: 1
        timeoutSeconds: 2
        failureThreshold: {{ $role.startupSeconds }}
      readinessProbe:
        httpGet: {path: /readyz, port: management}
        periodSeconds: 2
        timeoutSeconds: 2
        failureThreshold: 2
      livenessProbe:
        httpGet: {path: /livez, port: management}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 3
      {{- if and (gt (int $.Values.drain.preStopSeconds) 0) (semverCompare ">=1.30.0-0" $.Capabilities.KubeVersion.Version) }}
      lifecycle:
        preStop:
          sleep: {seconds: {{ $.Values.drain.preStopSeconds }}}
      {{- end }}
      resources: {{- toYaml $role.resources | nindent 8 }}
      volumeMounts:
        - {name: config, mountPath: /etc/postrider/config, readOnly: true}
        {{- include "postrider.volumeMounts" $mounts | trim | nindent 8 }}
        {{- with $role.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: config
      configMap:
        name: {{ include "postrider.fullname" $ }}
        items:
          - {key: {{ .name }}.yaml, path: postrider.yaml}
    {{- include "postrider.volumes" $mounts | trim | nindent 4 }}
    {{- with $role.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{- define "postrider.spread" -}}
{{- $constraints := .role.topologySpreadConstraints -}}
{{- if .role.topologySpread.enabled -}}
{{- range $key := list "kubernetes.io/hostname" "topology.kubernetes.io/zone" -}}
{{- $labels := include "postrider.selector" $.root | fromYaml -}}
{{- $_ := set $labels "app.kubernetes.io/component" $.name -}}
{{- $constraints = append $constraints (dict "maxSkew" 1 "topologyKey" $key "whenUnsatisfiable" $.role.topologySpread.whenUnsatisfiable "labelSelector" (dict "matchLabels" $labels) "matchLabelKeys" (list "pod-template-hash")) -}}
{{- end -}}
{{- end -}}
{{- with $constraints -}}
topologySpreadConstraints: {{- toYaml . | nindent 2 }}
{{- end -}}
{{- end }}
