"""What users see of a program: tables, graphs as text, DOT and ONNX, and the inspection page."""
