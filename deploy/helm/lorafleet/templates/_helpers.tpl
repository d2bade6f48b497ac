{{/* The release's name for its objects, at most 40 characters, so that what is added fits into 63. */}}
{{- define "lorafleet.name" -}}
{{- if .Values.fullnameOverride }}{{ .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- $full := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) }}
{{- $full | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* Labels that select the pods of a component: (list $ "gateway"). They never change. */}}
{{- define "lorafleet.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ default $root.Chart.Name $root.Values.nameOverride | trunc 63 }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* All labels of an object of a component: (list $ "gateway"). */}}
{{- define "lorafleet.labels" -}}
{{- $root := index . 0 -}}
{{ include "lorafleet.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- end }}

{{/* A group of workers with the defaults of all: (list $ "cpu"). Returns JSON. */}}
{{- define "lorafleet.group" -}}
{{- $root := index . 0 -}}
{{- $group := get $root.Values.workers (index . 1) | default dict -}}
{{- mergeOverwrite (deepCopy $root.Values.workerDefaults) $group | toJson -}}
{{- end }}

{{/* The models of all bases, the default one first, as JSON. */}}
{{- define "lorafleet.models" -}}
{{- concat (list .Values.model.name) .Values.model.more | toJson -}}
{{- end }}

{{/* The model of a group's base: (list $ "cpu"). */}}
{{- define "lorafleet.modelOf" -}}
{{- $root := index . 0 -}}
{{- $model := default $root.Values.model.name (include "lorafleet.group" . | fromJson).model -}}
{{- if not (has $model (include "lorafleet.models" $root | fromJsonArray)) }}
{{- fail (printf "workers.%s.model: %s is neither model.name nor in model.more" (index . 1) $model) }}
{{- end }}
{{- $model -}}
{{- end }}

{{/* The name of a group's base: (list $ "cpu"). */}}
{{- define "lorafleet.baseOf" -}}
{{- $root := index . 0 -}}
{{- $model := include "lorafleet.modelOf" . -}}
{{- $name := hasPrefix "/" $model | ternary (base $model | trimSuffix ".gguf") $model -}}
{{- eq $model $root.Values.model.name | ternary (default $name $root.Values.model.servedName) $name -}}
{{- end }}

{{/* The names of the secrets. */}}
{{- define "lorafleet.fleetSecret" -}}{{ default (printf "%s-fleet" (include "lorafleet.name" .)) .Values.secrets.fleet }}{{- end }}
{{- define "lorafleet.usersSecret" -}}
{{ default (printf "%s-queue-users" (include "lorafleet.name" .)) .Values.secrets.queueUsers }}
{{- end }}

{{/* An image: (list $ .Values.image.control). */}}
{{- define "lorafleet.image" -}}
{{- $root := index . 0 -}}
{{- $tag := default $root.Chart.AppVersion $root.Values.image.tag -}}
{{ index . 1 }}{{ hasPrefix "sha256:" $tag | ternary "@" ":" }}{{ $tag }}
{{- end }}

{{/* What a setting's value is as a variable: whole numbers without an exponent. */}}
{{- define "lorafleet.value" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ printf "%.0f" . }}{{ else }}{{ . }}{{ end }}
{{- end }}

{{/* The queue's URL for a user: (list $ "gateway"). */}}
{{- define "lorafleet.queueUrl" -}}
{{- $root := index . 0 -}}
{{- $external := $root.Values.queue.external -}}
{{- if $root.Values.queue.enabled -}}
redis://{{ index . 1 }}@{{ include "lorafleet.name" $root }}-queue:6379/0
{{- else -}}
{{ $external.tls | ternary "rediss" "redis" }}{{ if $external.sentinels }}-sentinel{{ end }}://{{ default (index . 1) $external.user }}@
{{- if $external.sentinels -}}
{{ join "," $external.sentinels }}/{{ required "queue.external.primaryName: what the Sentinels call the primary" $external.primaryName }}
{{- else -}}
{{ required "queue.external.host: with queue.enabled: false, name the queue" $external.host }}:
{{- include "lorafleet.value" $external.port }}
{{- end -}}
/{{ include "lorafleet.value" $external.database }}
{{- end }}
{{- end }}

{{/*
The variables of a service, the last of a name winning: (list $ user settings…).
A dict of settings further right goes over those to its left.
*/}}
{{- define "lorafleet.env" -}}
{{- $root := index . 0 -}}
{{- $user := index . 1 -}}
{{- $settings := dict "grace_s" $root.Values.graceSeconds "model" $root.Values.model.name -}}
{{- with $root.Values.model.servedName }}{{ $_ := set $settings "served_name" . }}{{ end -}}
{{- with $root.Values.model.more }}{{ $_ := set $settings "more_models" (join "," .) }}{{ end -}}
{{- range (concat (list $root.Values.settings) (slice . 2)) }}{{ $settings = mergeOverwrite $settings (deepCopy (default dict .)) }}{{ end -}}
- { name: REDIS_URL, value: {{ include "lorafleet.queueUrl" (list $root $user) | quote }} }
- { name: LORAFLEET_REDIS_PASSWORD_FILE, value: /queue-user/password }
- { name: LORAFLEET_DATA, value: /data }
{{- if has $user (list "gateway" "store" "worker") }}
- { name: LORAFLEET_SECRET_FILE, value: /secret/fleet }
{{- end }}
{{- if and (not $root.Values.queue.enabled) $root.Values.queue.external.caSecret }}
- { name: LORAFLEET_REDIS_CA_FILE, value: /queue-ca/ca.crt }
{{- end }}
{{- if and (not $root.Values.queue.enabled) $root.Values.queue.external.sentinelSecret }}
- { name: LORAFLEET_REDIS_SENTINEL_PASSWORD_FILE, value: /sentinel/password }
{{- end }}
{{- if $root.Values.secrets.hubToken }}
- { name: HF_TOKEN_PATH, value: /hub-token/token }
{{- end }}
{{- if and $root.Values.secrets.s3 (has $user (list "gateway" "store")) }}
- { name: AWS_SHARED_CREDENTIALS_FILE, value: /s3/credentials }
{{- end }}
{{- range $name, $value := $settings }}
- { name: LORAFLEET_{{ upper $name }}, value: {{ include "lorafleet.value" $value | quote }} }
{{- end }}
{{- end }}

{{/* Where a service finds its secrets: (list $ user). */}}
{{- define "lorafleet.mounts" -}}
{{- $root := index . 0 -}}
- { name: tmp, mountPath: /tmp }
- { name: queue-user, mountPath: /queue-user, readOnly: true }
{{- if has (index . 1) (list "gateway" "store" "worker") }}
- { name: secret, mountPath: /secret, readOnly: true }
{{- end }}
{{- if and (not $root.Values.queue.enabled) $root.Values.queue.external.caSecret }}
- { name: queue-ca, mountPath: /queue-ca, readOnly: true }
{{- end }}
{{- if and (not $root.Values.queue.enabled) $root.Values.queue.external.sentinelSecret }}
- { name: sentinel, mountPath: /sentinel, readOnly: true }
{{- end }}
{{- if $root.Values.secrets.hubToken }}
- { name: hub-token, mountPath: /hub-token, readOnly: true }
{{- end }}
{{- if and $root.Values.secrets.s3 (has (index . 1) (list "gateway" "store")) }}
- { name: s3, mountPath: /s3, readOnly: true }
{{- end }}
{{- end }}

{{- define "lorafleet.volumes" -}}
{{- $root := index . 0 -}}
{{- $user := index . 1 -}}
- name: tmp
  emptyDir: { sizeLimit: 2Gi }
- name: queue-user
  secret:
    secretName: {{ include "lorafleet.usersSecret" $root }}
    defaultMode: 0440
    items: [{ key: {{ $user }}, path: password }]
{{- if has $user (list "gateway" "store" "worker") }}
- name: secret
  secret: { secretName: {{ include "lorafleet.fleetSecret" $root }}, defaultMode: 0440, items: [{ key: fleet, path: fleet }] }
{{- end }}
{{- if and (not $root.Values.queue.enabled) $root.Values.queue.external.caSecret }}
- name: queue-ca
  secret: { secretName: {{ $root.Values.queue.external.caSecret }}, items: [{ key: ca.crt, path: ca.crt }] }
{{- end }}
{{- if and (not $root.Values.queue.enabled) $root.Values.queue.external.sentinelSecret }}
- name: sentinel
  secret:
    secretName: {{ $root.Values.queue.external.sentinelSecret }}
    defaultMode: 0440
    items: [{ key: password, path: password }]
{{- end }}
{{- with $root.Values.secrets.hubToken }}
- name: hub-token
  secret: { secretName: {{ . }}, defaultMode: 0440, items: [{ key: token, path: token }] }
{{- end }}
{{- if and $root.Values.secrets.s3 (has $user (list "gateway" "store")) }}
- name: s3
  secret: { secretName: {{ $root.Values.secrets.s3 }}, defaultMode: 0440, items: [{ key: credentials, path: credentials }] }
{{- end }}
{{- end }}

{{/* Where gateways and workers find the model. */}}
{{- define "lorafleet.modelMounts" -}}
- { name: hub, mountPath: /home/lorafleet/.cache/huggingface }
{{- if .Values.model.claim }}
- { name: models, mountPath: /models, readOnly: true }
{{- end }}
{{- end }}

{{- define "lorafleet.modelVolumes" -}}
- name: hub
  {{- if .Values.model.cacheClaim }}
  persistentVolumeClaim: { claimName: {{ .Values.model.cacheClaim }} }
  {{- else }}
  emptyDir: { sizeLimit: {{ .Values.model.cacheSize }} }
  {{- end }}
{{- with .Values.model.claim }}
- name: models
  persistentVolumeClaim: { claimName: {{ . }}, readOnly: true }
{{- end }}
{{- end }}

{{/* How every pod runs: (list $ component values). */}}
{{- define "lorafleet.pod" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $values := index . 2 -}}
serviceAccountName: {{ include "lorafleet.name" $root }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: { type: RuntimeDefault }
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
# No two of a component on one node while there is another.
affinity:
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector: {{- include "lorafleet.pods" (list $root $component) | nindent 12 }}
{{- end }}

{{- define "lorafleet.container" -}}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  privileged: false
  capabilities: { drop: [ALL] }
{{- end }}


{{/* The memory of the queue's container in bytes. */}}
{{- define "lorafleet.queueBytes" -}}
{{- $units := dict "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- $unit := regexFind "[KMGT]i$" .Values.queue.memory -}}
{{- mul (trimSuffix $unit .Values.queue.memory | int64) (get $units $unit) -}}
{{- end }}

{{/* The kinds of scalers that the groups of workers use, as words. */}}
{{- define "lorafleet.scalers" -}}
{{- range $key, $_ := .Values.workers }}
{{- $scaling := (include "lorafleet.group" (list $ $key) | fromJson).autoscaling }}
{{- if $scaling.enabled }}{{ if $scaling.prometheus }}prometheus{{ else }}metrics-api{{ end }} {{ end }}
{{- end }}
{{- end }}

{{/* Not empty if no group of workers always has one. */}}
{{- define "lorafleet.scalesToZero" -}}
{{- $kept := false }}
{{- range $key, $_ := .Values.workers }}
{{- $group := include "lorafleet.group" (list $ $key) | fromJson }}
{{- if or (not $group.autoscaling.enabled) (gt (int $group.autoscaling.min) 0) }}{{ $kept = true }}{{ end }}
{{- end }}
{{- if not $kept }}true{{ end }}
{{- end }}
