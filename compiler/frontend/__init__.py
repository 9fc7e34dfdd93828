"""Loads a model and captures its graph."""
