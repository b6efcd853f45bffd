"""What pages about runs show, as JSON-able values: lists, curves, timelines, comparisons; no web server."""
