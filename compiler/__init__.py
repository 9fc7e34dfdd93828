"""Compile a Hugging Face decoder into a program that two parties run together."""
