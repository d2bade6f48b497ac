{{/* Parts of network policies. Ports are those of pods, not of services. */}}

{{/* Selects the pods of a component: (list $ "gateway"). */}}
{{- define "lorafleet.pods" -}}
matchLabels: {{- include "lorafleet.selector" . | nindent 2 }}
{{- end }}

{{/* Selects the workers of all groups. */}}
{{- define "lorafleet.workerPods" -}}
matchLabels:
  app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 }}
  app.kubernetes.io/instance: {{ .Release.Name }}
  lorafleet/role: worker
{{- end }}

{{- define "lorafleet.toNames" -}}
- ports: [{ protocol: UDP, port: 53 }, { protocol: TCP, port: 53 }]
{{- end }}

{{- define "lorafleet.outside" -}}
- ipBlock:
    cidr: {{ .Values.networkPolicy.outside.cidr }}
    {{- with .Values.networkPolicy.outside.except }}
    except: {{- toYaml . | nindent 6 }}
    {{- end }}
{{- end }}

{{- define "lorafleet.toOutside" -}}
- ports:
    {{- range .Values.networkPolicy.outside.ports }}
    - { protocol: TCP, port: {{ . }} }
    {{- end }}
  to: {{- include "lorafleet.outside" . | nindent 4 }}
{{- end }}

{{/* The queue, and the names that it takes to find it. */}}
{{- define "lorafleet.toQueue" -}}
{{ include "lorafleet.toNames" . }}
{{- if .Values.queue.enabled }}
- ports: [{ protocol: TCP, port: 6379 }]
  to:
    - podSelector: {{- include "lorafleet.pods" (list . "queue") | nindent 8 }}
{{- else }}
- ports:
    - { protocol: TCP, port: {{ .Values.queue.external.port }} }
    {{- range .Values.queue.external.sentinels }}
    - { protocol: TCP, port: {{ regexFind "[0-9]+$" . }} }
    {{- end }}
  to: {{- include "lorafleet.outside" . | nindent 4 }}
{{- end }}
{{- end }}

{{- define "lorafleet.toStore" -}}
- ports: [{ protocol: TCP, port: 9000 }]
  to:
    - podSelector: {{- include "lorafleet.pods" (list . "store") | nindent 8 }}
{{- end }}

{{/* Who may read metrics; nobody where nobody is named. */}}
{{- define "lorafleet.fromScrapers" -}}
{{- if .Values.networkPolicy.scrapers -}}
- ports: [{ protocol: TCP, port: 9100 }]
  from: {{- toYaml .Values.networkPolicy.scrapers | nindent 4 }}
{{- else -}}
[]
{{- end }}
{{- end }}
