"""Loops over time in C++ and Triton, without a gate in them: those are the recurrences' own."""
