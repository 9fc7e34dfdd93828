"""The client as a local service: OpenAI's interface for existing apps, and a chat page."""
