"""One run, many devices."""
