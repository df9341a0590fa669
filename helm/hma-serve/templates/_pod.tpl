{{/* The parts that the pods of all services share. */}}

{{/* Environment: (dict "root" $ "component" "decode" "extra" .extraEnv). A variable that `extra` names is taken from there. */}}
{{- define "hma.env" -}}
{{- $extra := default list .extra -}}
{{- $named := dict -}}
{{- range $extra -}}{{- $_ := set $named .name true -}}{{- end -}}
{{- $env := list -}}
{{- range (include "hma.ownEnv" . | fromYamlArray) -}}
{{- if not (hasKey $named .name) -}}{{- $env = append $env . -}}{{- end -}}
{{- end -}}
{{- toYaml (concat $env $extra) -}}
{{- end -}}

{{- define "hma.ownEnv" -}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: POD_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
- name: ETCD_ENDPOINTS
  value: {{ include "hma.etcdEndpoints" .root | quote }}
# The root file system is read-only: whatever is fetched or compiled goes to the cache.
- name: HOME
  value: /cache
- name: HF_HOME
  value: /cache/huggingface
- name: TRITON_CACHE_DIR
  value: /cache/triton
{{- with .root.Values.model.hubTokenSecret }}
{{- if .name }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .name }}, key: {{ .key }}}}
{{- end }}
{{- end }}
{{- with .root.Values.tracing.otlpEndpoint }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ . | quote }}
- name: OTEL_SERVICE_NAME
  value: hma-serve-{{ $.component }}
{{- end }}
{{- end -}}

{{- define "hma.probes" -}}
startupProbe:
  httpGet: {path: /live, port: {{ .port }}}
  periodSeconds: 5
  failureThreshold: {{ max 1 (div (int .startupSeconds) 5) }}
livenessProbe:
  httpGet: {path: /live, port: {{ .port }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /ready, port: {{ .port }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
{{- end -}}

{{- define "hma.mounts" -}}
- {name: cache, mountPath: /cache}
- {name: tmp, mountPath: /tmp}
{{- if .Values.model.volume }}
- {name: models, mountPath: {{ .Values.model.mountPath }}, readOnly: true}
{{- end }}
{{- if .Values.tls.enabled }}
- {name: tls, mountPath: /etc/hma-serve/tls, readOnly: true}
{{- end }}
{{- if .Values.etcd.externalTlsSecret }}
- {name: etcd-tls, mountPath: /etc/hma-serve/etcd-tls, readOnly: true}
{{- end }}
{{- end -}}

{{- define "hma.volumes" -}}
- name: cache
  {{- toYaml (default (dict "emptyDir" (dict "sizeLimit" .Values.model.cacheSizeLimit)) .Values.model.cacheVolume) | nindent 2 }}
- name: tmp
  emptyDir: {sizeLimit: 1Gi}
{{- with .Values.model.volume }}
- name: models
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if .Values.tls.enabled }}
- name: tls
  secret: {secretName: {{ include "hma.tlsSecret" . }}, defaultMode: 0440}
{{- end }}
{{- with .Values.etcd.externalTlsSecret }}
- name: etcd-tls
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end -}}

{{/* Flags for certificates. */}}
{{- define "hma.tlsFlags" -}}
{{- if .Values.tls.enabled }}
- --tls-dir=/etc/hma-serve/tls
{{- end }}
{{- if .Values.etcd.externalTlsSecret }}
- --etcd-tls-dir=/etc/hma-serve/etcd-tls
{{- end }}
{{- end -}}

{{/* Constraints for what should not share a node, unless the values say others: labels that select the pods. */}}
{{- define "hma.spread" -}}
- maxSkew: 1
  topologyKey: kubernetes.io/hostname
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels:
      {{- . | nindent 6 }}
{{- end -}}

{{/* Where pods may run: a part of the values, as .Values.router. */}}
{{- define "hma.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end -}}

{{- define "hma.podBasics" -}}
serviceAccountName: {{ include "hma.fullname" . }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
