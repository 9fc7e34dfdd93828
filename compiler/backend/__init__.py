"""From a rewritten graph to bundles: fractional bits, costs, protocols, instructions, files."""
