"""Maths on one device: layers, scans and the language model. Imports torch, nothing else of the project."""
