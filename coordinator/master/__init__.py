"""The Master, what a person's program holds: runs, reports, following, prediction, audit, replay."""
