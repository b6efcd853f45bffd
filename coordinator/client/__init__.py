"""The Client, what a worker on the gradients queue does: shards, partial sums, evaluation, prediction."""
