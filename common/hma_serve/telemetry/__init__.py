"""What the services say about themselves: metrics, logs, liveness. Every metric name stands in `metrics`."""
