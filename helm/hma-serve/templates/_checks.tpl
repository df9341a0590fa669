{{/* Deployments that cannot work fail here, with a sentence. */}}
{{- define "hma.check" -}}
{{- if and (not .Values.etcd.enabled) (not .Values.etcd.externalEndpoints) -}}
{{- fail "Services find each other in etcd: set etcd.enabled, or give etcd.externalEndpoints." -}}
{{- end -}}
{{- if and .Values.etcd.enabled .Values.etcd.externalEndpoints -}}
{{- fail "etcd.externalEndpoints would be ignored while etcd.enabled is true: choose one." -}}
{{- end -}}
{{- if and .Values.etcd.enabled (eq 0 (mod (int .Values.etcd.replicas) 2)) -}}
{{- fail (printf "etcd.replicas must be odd, or losing half of %d members stops the registry." (int .Values.etcd.replicas)) -}}
{{- end -}}
{{- if and .Values.etcd.enabled (not .Values.etcd.persistence.enabled) (gt (int .Values.etcd.replicas) 1) -}}
{{- fail "etcd.persistence.enabled is false: a member that comes back without its data breaks the others; set etcd.replicas to 1." -}}
{{- end -}}
{{- if and .Values.etcd.enabled .Values.etcd.externalTlsSecret -}}
{{- fail "etcd.externalTlsSecret is for etcd.externalEndpoints; the chart's own etcd takes the certificates of tls." -}}
{{- end -}}
{{- if and .Values.tls.enabled (not .Values.tls.existingSecret) (not .Values.tls.certManager.issuerName) -}}
{{- fail "tls.enabled needs tls.existingSecret or tls.certManager.issuerName." -}}
{{- end -}}
{{- if or .Values.tls.enabled .Values.etcd.externalTlsSecret -}}
{{- range .Values.etcd.externalEndpoints -}}
{{- if hasPrefix "http://" . -}}
{{- fail (printf "TLS is on but etcd.externalEndpoints names %s without TLS." .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if not .Values.decode.pools -}}
{{- fail "decode.pools is empty: nobody would sample a token." -}}
{{- end -}}
{{- range $role := list "prefill" "decode" -}}
{{- $seen := dict -}}
{{- range $pool := (include "hma.pools" (dict "root" $ "role" $role) | fromJson).pools -}}
{{- $where := printf "%s pool %q" $role $pool.name -}}
{{- if hasKey $seen $pool.name -}}
{{- fail (printf "%s is there twice." $where) -}}
{{- end -}}
{{- $_ := set $seen $pool.name true -}}
{{- if and $pool.device.resources $pool.dra.deviceClassName -}}
{{- fail (printf "%s asks for its devices twice: set device.resources or dra, not both." $where) -}}
{{- end -}}
{{- if and (eq (toString $pool.strategy.maxSurge) "0") (eq (toString $pool.strategy.maxUnavailable) "0") -}}
{{- fail (printf "%s could never be updated: strategy.maxSurge and maxUnavailable are both 0." $where) -}}
{{- end -}}
{{- include "hma.checkAutoscaling" (dict "root" $ "where" $where "autoscaling" $pool.autoscaling) -}}
{{- end -}}
{{- end -}}
{{- include "hma.checkAutoscaling" (dict "root" . "where" "router" "autoscaling" .Values.router.autoscaling) -}}
{{- end -}}

{{- define "hma.checkAutoscaling" -}}
{{- if ne .autoscaling.type "none" -}}
{{- if gt (int .autoscaling.minReplicas) (int .autoscaling.maxReplicas) -}}
{{- fail (printf "%s: autoscaling.minReplicas is above maxReplicas." .where) -}}
{{- end -}}
{{- if and (eq .autoscaling.type "hpa") (lt (int .autoscaling.minReplicas) 1) -}}
{{- fail (printf "%s: an HPA cannot scale to zero; use keda, with autoscaling.metrics of your own, for minReplicas 0." .where) -}}
{{- end -}}
{{- if and (eq .autoscaling.type "keda") (not .autoscaling.metrics) (lt (int .autoscaling.minReplicas) 1) -}}
{{- fail (printf "%s: with no pod there is nothing to measure, so the default triggers would never start one: set autoscaling.metrics, or minReplicas to 1 or more." .where) -}}
{{- end -}}
{{- if and (eq .autoscaling.type "keda") (not .autoscaling.metrics) (not .root.Values.monitoring.prometheusAddress) -}}
{{- fail (printf "%s: keda asks Prometheus: set monitoring.prometheusAddress, or autoscaling.metrics." .where) -}}
{{- end -}}
{{- end -}}
{{- end -}}
