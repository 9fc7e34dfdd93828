"""The client as a local service: an OpenAI-compatible API for existing apps, and a chat page."""
