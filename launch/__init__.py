"""Ray, and what a person types."""
