"""The finished student outside the system: folded, as ONNX, and as a folder without pickle."""
