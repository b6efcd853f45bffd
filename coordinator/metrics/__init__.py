"""What Prometheus scrapes: the fleet and its runs as figures, by the control plane alone."""
