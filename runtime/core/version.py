"""The version of mergec, in one place."""

VERSION = "0.1.0"
