"""Maths on one device: layers, scans, the language model. Imports torch and no other room."""
