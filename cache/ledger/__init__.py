"""The control plane of a run: records, life, slots, commits, versions, evaluations, events, workers."""
