{{/* How a Deployment grows, and how far a disruption may shrink it. */}}

{{/* (dict "root" $ "name" NAME "labels" LABELS "selector" SELECTOR "autoscaling" A "hpaMetrics" YAML "kedaTriggers" YAML) */}}
{{- define "hma.autoscaler" -}}
{{- if eq .autoscaling.type "hpa" }}
---
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- .labels | nindent 4 }}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: {{ .name }}}
  minReplicas: {{ int .autoscaling.minReplicas }}
  maxReplicas: {{ int .autoscaling.maxReplicas }}
  metrics:
    {{- if .autoscaling.metrics }}
    {{- toYaml .autoscaling.metrics | nindent 4 }}
    {{- else }}
    {{- .hpaMetrics | nindent 4 }}
    {{- end }}
  behavior:
    # A worker that starts loads weights for minutes: shrink slowly.
    scaleDown: {stabilizationWindowSeconds: 600}
{{- else if eq .autoscaling.type "keda" }}
---
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- .labels | nindent 4 }}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: {{ .name }}}
  minReplicaCount: {{ int .autoscaling.minReplicas }}
  maxReplicaCount: {{ int .autoscaling.maxReplicas }}
  cooldownPeriod: 600
  triggers:
    {{- if .autoscaling.metrics }}
    {{- toYaml .autoscaling.metrics | nindent 4 }}
    {{- else }}
    {{- .kedaTriggers | nindent 4 }}
    {{- end }}
{{- end }}
{{- end -}}

{{/* A trigger that asks Prometheus: (dict "root" $ "query" Q "threshold" T). */}}
{{- define "hma.prometheusTrigger" -}}
- type: prometheus
  metadata:
    serverAddress: {{ .root.Values.monitoring.prometheusAddress }}
    query: {{ .query | squote }}
    threshold: {{ .threshold | toString | quote }}
{{- end -}}

{{/* (dict "root" $ "name" NAME "labels" LABELS "selector" SELECTOR "budget" B) */}}
{{- define "hma.disruptionBudget" -}}
{{- if .budget.enabled }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- .labels | nindent 4 }}
spec:
  maxUnavailable: {{ .budget.maxUnavailable }}
  selector:
    matchLabels:
      {{- .selector | nindent 6 }}
{{- end }}
{{- end -}}
