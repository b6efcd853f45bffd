"""The training server, what a worker on the updates queue does: advance, commit, takeover, upkeep, finish."""
