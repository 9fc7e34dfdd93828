"""What a party needs to run a compiled program: ops, protocols, transport, roles."""

from __future__ import annotations

from mergec import bare_names

if __name__ == "runtime":  # imported from a checkout without the prefix
    bare_names.stand_for(__name__)
