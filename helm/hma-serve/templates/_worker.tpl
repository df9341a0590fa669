{{/* One worker pool: (dict "root" $ "role" "decode" "pool" POOL "args" [..] "grace" SECONDS "hpaMetrics" Y "kedaTriggers" Y) */}}
{{- define "hma.pool" -}}
{{- $root := .root }}
{{- $pool := .pool }}
{{- $role := .role }}
{{- $name := printf "%s-%s-%s" (include "hma.fullname" $root) $role $pool.name }}
{{- $poolLabels := printf "app.kubernetes.io/component: %s\nhma-serve/pool: %s" $role $pool.name }}
{{- $labels := printf "%s\nhma-serve/pool: %s\nhma-serve/vendor: %s" (include "hma.labels" (dict "root" $root "component" $role)) $pool.name $pool.vendor }}
{{- $selector := printf "%s\n%s" (include "hma.selector" $root) $poolLabels }}
{{- $port := index $root.Values.workerPorts $role }}
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ $name }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- $labels | nindent 4 }}
spec:
  {{- if eq $pool.autoscaling.type "none" }}
  replicas: {{ int $pool.replicas }}
  {{- end }}
  # A start that loads or compiles for long is progress all the while.
  progressDeadlineSeconds: {{ add (int $pool.startupSeconds) 600 }}
  selector:
    matchLabels:
      {{- $selector | nindent 6 }}
  strategy:
    rollingUpdate:
      {{- toYaml $pool.strategy | nindent 6 }}
  template:
    metadata:
      labels:
        {{- $labels | nindent 8 }}
      {{- with $pool.podAnnotations }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      {{- include "hma.podBasics" $root | nindent 6 }}
      terminationGracePeriodSeconds: {{ .grace }}
      securityContext:
        {{- toYaml $root.Values.podSecurityContext | nindent 8 }}
        {{- with $pool.supplementalGroups }}
        supplementalGroups:
          {{- toYaml . | nindent 10 }}
        {{- end }}
      {{- include "hma.placement" $pool | nindent 6 }}
      {{- if $pool.dra.deviceClassName }}
      resourceClaims:
        - name: devices
          resourceClaimTemplateName: {{ $name }}
      {{- end }}
      containers:
        - name: {{ $role }}
          image: {{ include "hma.image" (dict "root" $root "image" $pool.image) }}
          imagePullPolicy: {{ $root.Values.image.pullPolicy }}
          command: [hma-serve, {{ $role }}]
          args:
            - --model={{ $root.Values.model.name }}
            {{- range .args }}
            - {{ . }}
            {{- end }}
            {{- range $flag, $value := dict "max-model-len" $pool.maxModelLen "threads" $pool.threads }}
            {{- if $value }}
            - --{{ $flag }}={{ int $value }}
            {{- end }}
            {{- end }}
            - --listen={{ $root.Values.listenAddress }}:{{ $port }}
            - --advertise=$(POD_IP)
            - --http-listen={{ $root.Values.listenAddress }}:{{ $root.Values.workerPorts.status }}
            - --price-per-hour={{ $pool.pricePerHour }}
            - --drain-grace={{ int $pool.drainSeconds }}
            - --log-format=json
            {{- with include "hma.tlsFlags" $root }}
            {{- trim . | nindent 12 }}
            {{- end }}
            {{- range $pool.extraArgs }}
            - {{ . | quote }}
            {{- end }}
          env:
            {{- include "hma.env" (dict "root" $root "component" $role "extra" $pool.extraEnv) | nindent 12 }}
          ports:
            - {name: grpc, containerPort: {{ $port }}}
            - {name: status, containerPort: {{ $root.Values.workerPorts.status }}}
          {{- include "hma.probes" (dict "port" "status" "startupSeconds" $pool.startupSeconds) | nindent 10 }}
          resources:
            {{- include "hma.resources" $pool | nindent 12 }}
          securityContext:
            {{- toYaml $root.Values.securityContext | nindent 12 }}
          volumeMounts:
            {{- include "hma.mounts" $root | nindent 12 }}
            {{- if $pool.hugepages1Gi }}
            - {name: hugepages, mountPath: /dev/hugepages-1G}
            {{- end }}
            {{- if gt (int $pool.tp) 1 }}
            - {name: shared-memory, mountPath: /dev/shm}
            {{- end }}
            {{- with $pool.extraVolumeMounts }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
      volumes:
        {{- include "hma.volumes" $root | nindent 8 }}
        {{- if $pool.hugepages1Gi }}
        - name: hugepages
          emptyDir: {medium: HugePages-1Gi}
        {{- end }}
        {{- if gt (int $pool.tp) 1 }}
        # Ranks meet in it; a container's own has 64 MiB.
        - name: shared-memory
          emptyDir: {medium: Memory, sizeLimit: 1Gi}
        {{- end }}
        {{- with $pool.extraVolumes }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
---
# Headless: for scraping and for names, not for balancing. Routers find workers in etcd.
apiVersion: v1
kind: Service
metadata:
  name: {{ $name }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- $labels | nindent 4 }}
spec:
  clusterIP: None
  selector:
    {{- $selector | nindent 4 }}
  ports:
    - {name: grpc, port: {{ $port }}, targetPort: grpc, appProtocol: {{ include "hma.grpcProtocol" $root }}}
    - {name: status, port: {{ $root.Values.workerPorts.status }}, targetPort: status, appProtocol: http}
{{- if $pool.dra.deviceClassName }}
---
apiVersion: resource.k8s.io/v1
kind: ResourceClaimTemplate
metadata:
  name: {{ $name }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- $labels | nindent 4 }}
spec:
  spec:
    devices:
      requests:
        - name: devices
          exactly:
            deviceClassName: {{ $pool.dra.deviceClassName }}
            allocationMode: ExactCount
            count: {{ int $pool.dra.count }}
            {{- with $pool.dra.selectors }}
            selectors:
              {{- range . }}
              - cel: {expression: {{ . | quote }}}
              {{- end }}
            {{- end }}
{{- end }}
{{- include "hma.autoscaler" (dict "root" $root "name" $name "labels" $labels "autoscaling" $pool.autoscaling "hpaMetrics" .hpaMetrics "kedaTriggers" .kedaTriggers) }}
{{- include "hma.disruptionBudget" (dict "root" $root "name" $name "labels" $labels "selector" $selector "budget" $pool.podDisruptionBudget) }}
{{- end -}}

{{/* A pool's resources: its own, its devices, its huge pages, its claim. */}}
{{- define "hma.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- $limits := mergeOverwrite (dict) (default (dict) $resources.limits) .device.resources -}}
{{- $requests := default (dict) $resources.requests -}}
{{- if .hugepages1Gi -}}
{{- $pages := printf "%dGi" (int .hugepages1Gi) -}}
{{- $_ := set $limits "hugepages-1Gi" $pages -}}
{{- $_ := set $requests "hugepages-1Gi" $pages -}}
{{- end -}}
{{- $_ := set $resources "limits" $limits -}}
{{- $_ := set $resources "requests" $requests -}}
{{- if .dra.deviceClassName -}}
{{- $_ := set $resources "claims" (list (dict "name" "devices")) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}
