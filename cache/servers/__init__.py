"""Talking to Redis-compatible servers: addresses, connections, nodes, clusters, fast and plain client."""
