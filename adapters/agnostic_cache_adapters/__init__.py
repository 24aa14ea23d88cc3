"""Adapters of agnostic-cache: one module per framework. Importing one imports its framework."""
