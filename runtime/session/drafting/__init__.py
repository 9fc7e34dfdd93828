"""Drafts of the next tokens, made by the client in the clear, which one step of the parties checks.

The client knows the tokens of prompt and answer, so drafting takes no protocol, and what drafts are
made from stays with it.
"""

from mergec.runtime.session.drafting.drafter import Drafter
from mergec.runtime.session.drafting.speculation import Speculation

__all__ = ["Drafter", "Speculation"]
