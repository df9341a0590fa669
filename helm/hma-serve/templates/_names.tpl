{{/*
Names and labels. Every object is <release>-<part>; labels follow Kubernetes' recommendation. A service's name may have
63 characters: 34 of the release, "-prefill-", 20 of the pool.
*/}}

{{- define "hma.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 34 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 34 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 34 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Labels that select all pods of the release. */}}
{{- define "hma.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Labels of an object: (dict "root" $ "component" "decode"). */}}
{{- define "hma.labels" -}}
{{ include "hma.selector" .root }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* An image's reference: (dict "root" $ "image" .image). A digest wins over a tag. */}}
{{- define "hma.image" -}}
{{- $registry := default .root.Values.image.registry .image.registry -}}
{{- $name := .image.repository -}}
{{- if $registry }}{{ $name = printf "%s/%s" $registry .image.repository }}{{ end -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $name .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (default .root.Chart.AppVersion .image.tag) -}}
{{- end -}}
{{- end -}}

{{/* Pools of a role with their defaults filled in, as {"pools": [...]} in JSON: (dict "root" $ "role" "decode"). */}}
{{- define "hma.pools" -}}
{{- $role := index .root.Values .role -}}
{{- $pools := list -}}
{{- range $pool := $role.pools -}}
{{- $pools = append $pools (mergeOverwrite (deepCopy $role.defaults) (deepCopy $pool)) -}}
{{- end -}}
{{- dict "pools" $pools | toJson -}}
{{- end -}}

{{- define "hma.tlsSecret" -}}
{{- default (printf "%s-tls" (include "hma.fullname" .)) .Values.tls.existingSecret -}}
{{- end -}}

{{- define "hma.etcdScheme" -}}{{ ternary "https" "http" .Values.tls.enabled }}{{- end -}}

{{/* The value of ETCD_ENDPOINTS. */}}
{{- define "hma.etcdEndpoints" -}}
{{- if .Values.etcd.enabled -}}
{{- $name := printf "%s-etcd" (include "hma.fullname" .) -}}
{{- $urls := list -}}
{{- range $i := until (int .Values.etcd.replicas) -}}
{{- $urls = append $urls (printf "%s://%s-%d.%s.%s.svc:2379" (include "hma.etcdScheme" $) $name $i $name $.Release.Namespace) -}}
{{- end -}}
{{- join "," $urls -}}
{{- else -}}
{{- join "," .Values.etcd.externalEndpoints -}}
{{- end -}}
{{- end -}}

{{/* What gateways may expect on a gRPC port. */}}
{{- define "hma.grpcProtocol" -}}{{ ternary "tls" "kubernetes.io/h2c" .Values.tls.enabled }}{{- end -}}
