"""What a party needs to run a compiled program: ops, protocols, transport, roles."""
