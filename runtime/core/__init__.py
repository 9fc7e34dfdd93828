"""What every part of the runtime speaks in: visibility, costs, values, messages, ops, errors."""
