"""Mixers side by side: the file, the schedule, the cells, what they cost, and the page about it."""
